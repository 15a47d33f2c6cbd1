"""Rows of tokens as FP8 bytes for the way: e4m3 codes of 1 x 128 tiles, then one exponent byte a tile (spec 12)."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.quantize import dequantize_rows, quantize_rows


def pack(x_RD: Float[Array, "R D"]) -> UInt8[Array, "R Y"]:
    """``Y = D + ceil(D / 128)`` bytes a row, 7168 + 56 for DeepSeek-V3; a power of two is told by its exponent.

    A row of zero bytes unpacks to zeros. A tile with an infinity or a NaN unpacks to NaN.
    """
    q_RD, scale_BR = quantize_rows(x_RD, power_of_two=True)
    exponent_RB = (lax.bitcast_convert_type(scale_BR.T, jnp.uint32) >> 23).astype(jnp.uint8)
    return jnp.concatenate([lax.bitcast_convert_type(q_RD, jnp.uint8), exponent_RB], axis=1)


def unpack(bytes_RY: UInt8[Array, "R Y"], size: int, dtype: DTypeLike) -> Float[Array, "R D"]:
    """Rows of ``size`` values again; packing them once more would change no value."""
    q_RD = lax.bitcast_convert_type(bytes_RY[:, :size], jnp.float8_e4m3fn)
    scale_RB = lax.bitcast_convert_type(bytes_RY[:, size:].astype(jnp.uint32) << 23, jnp.float32)
    return dequantize_rows(q_RD, scale_RB.T, dtype)
