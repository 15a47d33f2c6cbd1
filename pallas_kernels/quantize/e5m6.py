"""E5M6: 12-bit storage of the attention output, which its own backward reads again (spec 12).

A sign, 5 exponent bits (bias 15) and 6 mantissa bits, as in IEEE formats with subnormals; the largest finite value is
65024. Tiles are 1 x 128 with a power-of-two scale. A row's bytes are the low eight bits of each value in order, then
the high four of two values a byte: one of the row's first half in the low bits, its partner of the second half in the
high ones. Nothing is interleaved, so that both directions are one elementwise pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from pallas_kernels.quantize.reference import AMAX_FLOOR, TILE, largest_magnitude, pad_to_tiles

_SMALLEST_NORMAL = 2.0**-14
_SUBNORMALS_PER_ONE = 2.0**20
_INTEGERS = 2.0**23
"""From here on float32 holds integers alone: adding it rounds to one."""


class PackedE5M6(NamedTuple):
    """Rows stored in 1.5 bytes a value, with a power of two for each 128 of them."""

    packed: UInt8[Array, "M K3_2"]
    scale: Float32[Array, "KB M"]


def encode_e5m6(x: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 12-bit code of each value of a magnitude of at most 65024, rounded to nearest even."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    subnormal = lax.bitcast_convert_type(jnp.abs(x) * _SUBNORMALS_PER_ONE + _INTEGERS, jnp.uint32) & 0x7F
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, normal) | ((bits >> 20) & 0x800)


def decode_e5m6(code: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """The value of each 12-bit code."""
    exponent, mantissa = (code >> 6) & 31, code & 63
    shifted = ((exponent + (127 - 15)) << 23) | (mantissa << 17)
    normal = lax.bitcast_convert_type(jnp.where(exponent == 31, jnp.uint32(0x7F800000), shifted), jnp.float32)
    magnitude = jnp.where(exponent == 0, mantissa.astype(jnp.float32) / _SUBNORMALS_PER_ONE, normal)
    return jnp.where(code >> 11 == 1, -magnitude, magnitude)


def scale_e5m6(amax: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``2 ** ceil(log2(amax / 65024))``, amax at least 1e-4; infinity where it is not finite."""
    bits = lax.bitcast_convert_type(jnp.maximum(amax, jnp.float32(AMAX_FLOOR)), jnp.int32)
    # 65024 is 127/64 of 2 ** 15: a larger significand carries into the exponent.
    scale = ((bits + 0x1FFFF) & 0x7F800000) - (15 << 23)
    return jnp.where(amax < jnp.inf, lax.bitcast_convert_type(scale, jnp.float32), jnp.inf)


def scaled_code_e5m6(x: Float32[Array, "..."], scale: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    """The code of ``x / scale`` for powers of two of ``x``'s shape; 0 where the scale is infinite."""
    inverse = lax.bitcast_convert_type((254 << 23) - lax.bitcast_convert_type(scale, jnp.int32), jnp.float32)
    return jnp.where(scale < jnp.inf, encode_e5m6(x * inverse), jnp.uint32(0))


def high_bits(first: UInt32[Array, "..."], second: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The byte of both codes' high four bits."""
    return (first >> 8) | (second >> 8 << 4)


def pack_e5m6(x_MK: Float[Array, "M K"]) -> PackedE5M6:
    """1 x 128 tiles in E5M6 with scales ``2 ** ceil(log2(amax / 65024))``, amax at least 1e-4.

    A tile with an infinity or a NaN gets an infinite scale and zero codes, so that it reads back as NaN.

    Raises:
        ValueError: K is odd.
    """
    rows, dim_k = x_MK.shape
    if dim_k % 2:
        raise ValueError(f"pack_e5m6: two values share three bytes, so K must be even, got {dim_k}")
    x_MBK = pad_to_tiles(x_MK, 1).reshape(rows, -(-dim_k // TILE), TILE).astype(jnp.float32)
    scale_MB = scale_e5m6(largest_magnitude(x_MBK, 2))
    codes = scaled_code_e5m6(x_MBK, jnp.broadcast_to(scale_MB[:, :, None], x_MBK.shape))
    first, second = jnp.split(codes.reshape(rows, -1)[:, :dim_k], 2, axis=1)
    packed = jnp.concatenate([first, second, high_bits(first, second)], axis=1).astype(jnp.uint8)
    return PackedE5M6(packed, scale_MB.T)


def unpack_e5m6(stored: PackedE5M6, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "M K"]:
    """The values ``[M, K]`` of :func:`pack_e5m6`, computed in float32 and rounded once to ``dtype``."""
    rows, size = stored.packed.shape
    dim_k = size // 3 * 2
    low, high = jnp.split(stored.packed.reshape(rows, 3, -1).astype(jnp.uint32), [2], axis=1)
    half = jnp.arange(2, dtype=jnp.uint32)[:, None]
    x_MK = decode_e5m6(low | ((high >> 4 * half & 15) << 8)).reshape(rows, dim_k)
    scaled = pad_to_tiles(x_MK, 1).reshape(rows, -1, TILE) * stored.scale.T[:, :, None]
    return scaled.reshape(rows, -1)[:, :dim_k].astype(dtype)
