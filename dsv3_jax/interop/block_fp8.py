"""Weights in blocks of 128 x 128 with one float32 scale each (spec 11.3, 15.1), in numpy and on the host.

Conversion works on row slices of tensors that never fit in memory, so this is a function of slices: rows must start
at a multiple of 128. The numbers are those of ``pallas_kernels.quantize``, bit for bit.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from dsv3_jax.interop.names import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
_LARGEST = np.float32(448)
_CLAMP = np.float32(1e-4)


def quantize(rows: Float[np.ndarray, "R C"]) -> tuple[np.ndarray, Float32[np.ndarray, "RB CB"]]:
    """E4M3 values and the scales that multiply them back.

    Args:
        rows: float32 or bfloat16, finite. Edge blocks count as padded with zeros.

    Raises:
        ValueError: a value is not finite, which FP8 cannot say.
    """
    with _on_host():
        amax = np.asarray(_block_amax(rows))
        if not np.isfinite(amax).all():
            raise ValueError("a value is infinite or not a number")
        scale = np.maximum(amax, _CLAMP) / _LARGEST
        return np.asarray(_round(_divided(rows, scale), shape=rows.shape)), scale


def dequantize(
    values: Float[np.ndarray, "R C"], scale: Float32[np.ndarray, "RB CB"], dtype: np.dtype
) -> Float[np.ndarray, "R C"]:
    """``values * scale`` in float32, then cast."""
    with _on_host():
        return np.asarray(_multiply(values, scale, dtype=jnp.dtype(dtype)))


def _on_host() -> contextlib.AbstractContextManager[None]:
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _blocks(rows: jax.Array) -> jax.Array:
    """[R, C] as [row blocks, 128, column blocks, 128], float32, padded with zeros."""
    padded = jnp.pad(rows.astype(jnp.float32), [(0, -size % BLOCK) for size in rows.shape])
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(blocks.shape[0] * BLOCK, -1)[: shape[0], : shape[1]]


@jax.jit
def _block_amax(rows: jax.Array) -> jax.Array:
    # As integers, which are ordered alike: on CPU, XLA's maximum of many floats passes over a NaN.
    bits = jax.lax.bitcast_convert_type(jnp.abs(_blocks(rows)), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=(1, 3)), jnp.float32)


def _divided(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks over their scales, by NumPy: XLA multiplies by a reciprocal instead, which rounds twice."""
    padded = np.pad(rows, [(0, -size % BLOCK) for size in rows.shape])
    blocks = padded.reshape(scale.shape[0], BLOCK, scale.shape[1], BLOCK).astype(np.float32, copy=False)
    return np.divide(blocks, scale[:, None, :, None])


@functools.partial(jax.jit, static_argnames="shape")
def _round(blocks: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """To E4M3, by XLA: ten times as fast as ml_dtypes."""
    return _unblocked(blocks.astype(jnp.float8_e4m3fn), shape)


@functools.partial(jax.jit, static_argnames="dtype")
def _multiply(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _unblocked((_blocks(values) * scale[:, None, :, None]).astype(dtype), values.shape)


def scale_rows(start: int, stop: int) -> tuple[int, int]:
    """Rows of the scales that rows ``start`` to ``stop`` of the values belong to."""
    return start // BLOCK, math.ceil(stop / BLOCK)
