"""The definition of RMSNorm with quantized output, in plain jax.numpy; it is also the portable implementation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.quantize import reference as quantizer
from pallas_kernels.quantize.reference import Tiles, round_to


def rms_norm(x_MK: Float[Array, "M K"], weight_K: Float[Array, " K"], eps: float) -> Float32[Array, "M K"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` (spec 3) in float32, rounded to the dtype of x."""
    x32_MK = x_MK.astype(jnp.float32)
    inverse_M1 = lax.rsqrt(jnp.mean(jnp.square(x32_MK), axis=1, keepdims=True) + eps)
    return round_to(x32_MK * inverse_M1 * weight_K.astype(jnp.float32), x_MK.dtype)


def norm_quantize(
    x_MK: Float[Array, "M K"],
    weight_K: Float[Array, " K"],
    eps: float,
    power_of_two: bool = False,
    with_output: bool = False,
) -> tuple[Tiles, Float[Array, "M K"] | None]:
    """Row-wise tiles of the normalized rows, and the rows themselves in the dtype of x where asked for."""
    y_MK = rms_norm(x_MK, weight_K, eps)
    return quantizer.quantize_rows(y_MK, power_of_two), y_MK.astype(x_MK.dtype) if with_output else None


def norm_backward(
    x_MK: Float[Array, "M K"],
    weight_K: Float[Array, " K"],
    dy_MK: Float[Array, "M K"],
    dresidual_MK: Float[Array, "M K"] | None = None,
    *,
    eps: float,
) -> tuple[Float[Array, "M K"], Float32[Array, " K"]]:
    """Gradients of x, in its dtype, and of the weight, in float32; the norm is computed again.

    ``dresidual_MK`` is what reaches x beside the norm: it is added before the sum is rounded.
    """
    x32_MK, dy32_MK = x_MK.astype(jnp.float32), dy_MK.astype(jnp.float32)
    inverse_M1 = lax.rsqrt(jnp.mean(jnp.square(x32_MK), axis=1, keepdims=True) + eps)
    normal_MK = x32_MK * inverse_M1
    dnormal_MK = dy32_MK * weight_K.astype(jnp.float32)
    along_M1 = jnp.mean(dnormal_MK * normal_MK, axis=1, keepdims=True)
    dx_MK = (dnormal_MK - normal_MK * along_M1) * inverse_M1
    if dresidual_MK is not None:
        dx_MK += dresidual_MK.astype(jnp.float32)
    return dx_MK.astype(x_MK.dtype), jnp.sum(dy32_MK * normal_MK, axis=0)
