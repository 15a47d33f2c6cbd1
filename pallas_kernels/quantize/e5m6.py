"""E5M6: 12-bit storage of the attention output, which its own backward reads again (spec 12).

A sign, 5 exponent bits (bias 15) and 6 mantissa bits, as in IEEE formats with subnormals; the largest finite value is
65024. Tiles are 1 x 128 with a power-of-two scale, and two values take three bytes, little-endian, the first in the low
bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from pallas_kernels.quantize.reference import (
    AMAX_FLOOR,
    TILE,
    divide,
    largest_magnitude,
    pad_to_tiles,
    round_up_to_power_of_two,
)

E5M6_MAX = 65024.0
_SMALLEST_NORMAL = 2.0**-14
_SUBNORMALS_PER_ONE = 2.0**20
_INFINITY = 31 << 6


class PackedE5M6(NamedTuple):
    """Rows stored in 1.5 bytes a value, with a power of two for each 128 of them."""

    packed: UInt8[Array, "M K3_2"]
    scale: Float32[Array, "KB M"]


def encode_e5m6(x: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 12-bit code of each value, rounded to nearest even; what is not finite, or rounds past 65024, is infinity."""
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    rounded = bits + 0xFFFF + ((bits >> 17) & 1)
    normal = jnp.minimum((rounded >> 17) - ((127 - 15) << 6), _INFINITY)
    subnormal = jnp.round(jnp.abs(x) * _SUBNORMALS_PER_ONE).astype(jnp.uint32)
    magnitude = jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, jnp.where(bits >= 0x7F800000, _INFINITY, normal))
    return magnitude | (jnp.signbit(x).astype(jnp.uint32) << 11)


def decode_e5m6(code: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """The value of each 12-bit code."""
    exponent, mantissa = (code >> 6) & 31, code & 63
    shifted = ((exponent + (127 - 15)) << 23) | (mantissa << 17)
    normal = lax.bitcast_convert_type(jnp.where(exponent == 31, jnp.uint32(0x7F800000), shifted), jnp.float32)
    magnitude = jnp.where(exponent == 0, mantissa.astype(jnp.float32) / _SUBNORMALS_PER_ONE, normal)
    return jnp.where(code >> 11 == 1, -magnitude, magnitude)


def _reciprocal(power_of_two: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``1 / power_of_two`` from the exponent, for a GPU's division is not exact."""
    return lax.bitcast_convert_type((254 << 23) - lax.bitcast_convert_type(power_of_two, jnp.int32), jnp.float32)


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
    amax_MB = largest_magnitude(x_MBK, 2)
    floored_MB = jnp.where(amax_MB < AMAX_FLOOR, jnp.float32(AMAX_FLOOR), amax_MB)
    scale_MB = round_up_to_power_of_two(divide(floored_MB, E5M6_MAX))
    usable_MB1 = jnp.isfinite(scale_MB)[:, :, None]
    codes = encode_e5m6(jnp.where(usable_MB1, x_MBK * _reciprocal(scale_MB)[:, :, None], 0.0))
    pair = codes.reshape(rows, -1, 2)[:, : dim_k // 2]
    both = pair[..., 0] | (pair[..., 1] << 12)
    packed = jnp.stack([both, both >> 8, both >> 16], axis=-1).astype(jnp.uint8)
    return PackedE5M6(packed.reshape(rows, -1), scale_MB.T)


def unpack_e5m6(stored: PackedE5M6, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "M K"]:
    """The values ``[M, K]`` of :func:`pack_e5m6`, computed in float32 and rounded once to ``dtype``."""
    rows = stored.packed.shape[0]
    low, middle, high = jnp.moveaxis(stored.packed.reshape(rows, -1, 3).astype(jnp.uint32), -1, 0)
    both = low | (middle << 8) | (high << 16)
    x_MK = decode_e5m6(jnp.stack([both & 0xFFF, both >> 12], axis=-1).reshape(rows, -1))
    dim_k = x_MK.shape[1]
    scaled = pad_to_tiles(x_MK, 1).reshape(rows, -1, TILE) * stored.scale.T[:, :, None]
    return scaled.reshape(rows, -1)[:, :dim_k].astype(dtype)
