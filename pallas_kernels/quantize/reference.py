"""The definition of the FP8 quantizers (spec 11.3, 12) in plain jax.numpy; it is also the portable implementation.

A *tile* is a group of values with one scale: 128 along the contraction of a row (activations and gradients) or a
128 x 128 block (weights). Values past the edge of the array count as zeros. In every form

    amax = max |x| over the tile, in float32, at least 1e-4
    scale = amax / 448                      with ``power_of_two``: rounded up to a power of two
    q = e4m3fn(x / scale)                   round to nearest even
    x is about q * scale

A tile that holds an infinity or a NaN has a scale that is not finite and codes that are all zero: its dequantized
values are NaN, so that nothing is hidden, and no code is ever NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32

TILE = 128
"""Values that share a scale along a dim."""

E4M3_MAX = 448.0
"""Largest finite e4m3fn value."""

AMAX_FLOOR = 1e-4
"""Smallest amax a scale is made from."""


class Tiles(NamedTuple):
    """Quantized rows with one scale for 128 values along the contraction, which is the last dim of ``q``.

    The scales lie transposed, ``[ceil(K / 128), M]``: a GEMM reads those of many rows at one step of K in one copy.
    """

    q: Float8e4m3fn[Array, "M K"]
    scale: Float32[Array, "KB M"]


class Blocks(NamedTuple):
    """A quantized matrix with one scale for each 128 x 128 block; leading dims are independent matrices."""

    q: Float8e4m3fn[Array, "*lead R C"]
    scale: Float32[Array, "*lead RB CB"]


def divide(x: Float[Array, "..."], by: Float[Array, "..."] | float) -> Float32[Array, "..."]:
    """``x / by`` in float32, correctly rounded on every device.

    XLA turns a division by a constant or a broadcast into a product with a rounded reciprocal, and divides within two
    units in the last place on a GPU. A float64 quotient rounded once shows neither.
    """
    with jax.enable_x64(True):
        quotient = x.astype(jnp.float64) / jnp.asarray(by, jnp.float32).astype(jnp.float64)
        # XLA drops a conversion that another follows; this rounding it keeps.
        return lax.reduce_precision(quotient, exponent_bits=8, mantissa_bits=23).astype(jnp.float32)


def round_to(x: Float32[Array, "..."], dtype: jnp.dtype) -> Float32[Array, "..."]:
    """``x`` rounded to ``dtype`` and kept in float32; XLA drops a pair of conversions, this it keeps."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def round_to_e4m3(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``x`` of at most 448 in magnitude rounded to e4m3fn and kept in float32, zeros with their sign.

    A code that is widened in the same program needs it: of two conversions in a row XLA drops the first on a GPU.
    """
    quantum = 2.0**-9  # of numbers below 2 ** -6, all of which have it
    subnormal = lax.round(x * (1 / quantum), lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    return jnp.where(jnp.abs(x) < 2.0**-6, subnormal, lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3))


def round_up_to_power_of_two(scale: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``2 ** ceil(log2(scale))`` exactly, for positive normal numbers; infinity and NaN become infinity."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    raised = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(scale < jnp.inf, raised, jnp.inf)


def largest_magnitude(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float32[Array, "..."]:
    """``max |x|`` in float32, zero of nothing, NaN if there is one.

    It compares bit patterns, which are ordered as the magnitudes and then NaN: XLA's maximum of floats drops NaN on a
    CPU.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, initial=0), jnp.float32)


def scale_of(amax: Float32[Array, "..."], power_of_two: bool = False) -> Float32[Array, "..."]:
    """The scale of a tile whose largest magnitude is ``amax``."""
    scale = divide(jnp.where(amax < AMAX_FLOOR, jnp.float32(AMAX_FLOOR), amax), E4M3_MAX)
    return round_up_to_power_of_two(scale) if power_of_two else scale


def encode(x: Float[Array, "..."], scale: Float32[Array, "..."]) -> Float8e4m3fn[Array, "..."]:
    """``e4m3fn(x / scale)``, zero where the scale is not finite; ``scale`` broadcasts against ``x``."""
    return jnp.where(jnp.isfinite(scale), round_to_e4m3(divide(x, scale)), 0.0).astype(jnp.float8_e4m3fn)


def pad_to_tiles(x: Array, dims: int) -> Array:
    """Zeros after the last ``dims`` dims up to multiples of 128."""
    padding = [(0, 0)] * (x.ndim - dims) + [(0, -size % TILE) for size in x.shape[x.ndim - dims :]]
    return jnp.pad(x, padding)


def quantize_rows(x_MK: Float[Array, "M K"], power_of_two: bool = False) -> Tiles:
    """1 x 128 tiles along K: ``q [M, K]``, ``scale [ceil(K / 128), M]``."""
    rows, dim_k = x_MK.shape
    x_MBK = pad_to_tiles(x_MK, 1).reshape(rows, -(-dim_k // TILE), TILE)
    scale_MB = scale_of(largest_magnitude(x_MBK, 2), power_of_two)
    q_MK = encode(x_MBK, scale_MB[:, :, None]).reshape(rows, -1)[:, :dim_k]
    return Tiles(q_MK, scale_MB.T)


def quantize_columns(x_MK: Float[Array, "M K"], power_of_two: bool = False) -> Tiles:
    """128 x 1 tiles along M, the rows of the transpose: ``q [K, M]``, ``scale [ceil(M / 128), K]``."""
    return quantize_rows(x_MK.T, power_of_two)


def quantize_blocks(w: Float[Array, "*lead R C"], power_of_two: bool = False) -> Blocks:
    """128 x 128 blocks: ``q [..., R, C]``, ``scale [..., ceil(R / 128), ceil(C / 128)]``.

    Transposing ``w`` transposes both results and changes no value.
    """
    *lead, rows, columns = w.shape
    padded = pad_to_tiles(w, 2)
    tiled = padded.reshape(*lead, padded.shape[-2] // TILE, TILE, padded.shape[-1] // TILE, TILE)
    scale = scale_of(largest_magnitude(tiled, (-3, -1)), power_of_two)
    q = encode(tiled, scale[..., :, None, :, None]).reshape(padded.shape)[..., :rows, :columns]
    return Blocks(q, scale)


def quantize_both(x_MK: Float[Array, "M K"], power_of_two: bool = False) -> tuple[Tiles, Tiles]:
    """The row-wise and the transposed form."""
    return quantize_rows(x_MK, power_of_two), quantize_columns(x_MK, power_of_two)


def quantize_weight(
    w_GKN: Float[Array, "G K N"], power_of_two: bool = False
) -> tuple[Float8e4m3fn[Array, "G K N"], Float8e4m3fn[Array, "G N K"], Float32[Array, "G KB NB"]]:
    """The blocks of each weight, the codes also transposed."""
    q_GKN, scale = quantize_blocks(w_GKN, power_of_two)
    return q_GKN, q_GKN.mT, scale


def dequantize_rows(
    q_MK: Float8e4m3fn[Array, "M K"], scale: Float32[Array, "KB M"], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "M K"]:
    """``q * scale`` in float32, rounded once to ``dtype``. The transposed form gives the transpose."""
    rows, dim_k = q_MK.shape
    q_MBK = pad_to_tiles(q_MK, 1).reshape(rows, -(-dim_k // TILE), TILE).astype(jnp.float32)
    return (q_MBK * scale.T[:, :, None]).reshape(rows, -1)[:, :dim_k].astype(dtype)


def dequantize_blocks(
    q: Float8e4m3fn[Array, "*lead R C"],
    scale: Float32[Array, "*lead RB CB"],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*lead R C"]:
    """``q * scale`` of each block in float32, rounded once to ``dtype``."""
    *lead, rows, columns = q.shape
    padded = pad_to_tiles(q, 2)
    tiled = padded.reshape(*lead, padded.shape[-2] // TILE, TILE, padded.shape[-1] // TILE, TILE)
    x = tiled.astype(jnp.float32) * scale[..., :, None, :, None]
    return x.reshape(padded.shape)[..., :rows, :columns].astype(dtype)


def requantize_columns(
    q_MK: Float8e4m3fn[Array, "M K"], scale: Float32[Array, "KB M"], power_of_two: bool = False
) -> Tiles:
    """The 128 x 1 form of stored 1 x 128 tiles: dequantized in float32, transposed, quantized again (spec 11.1).

    Between powers of two it changes no value that stays out of the subnormals of its new tile.
    """
    return quantize_columns(dequantize_rows(q_MK, scale), power_of_two)
