"""RMSNorm."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """``x / sqrt(mean(x^2) + eps) * scale``, all in float32, cast back to x's dtype (spec 3).

    For the backward pass ``x`` itself is kept and one number a row, nothing in float32 of its size.
    """
    return _rms_norm_fwd(x, scale, eps)[0]


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _rms_norm_fwd(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, _Saved]:
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_norm_bwd(_eps: float, saved: _Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, inverse = saved
    unit = x.astype(jnp.float32) * inverse
    dy32 = dy.astype(jnp.float32)
    dscale = jnp.sum(dy32 * unit, axis=tuple(range(x.ndim - 1)))
    dunit = dy32 * scale
    dx = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class RMSNorm(nnx.Module):
    """RMSNorm over the last dim; ``scale`` starts at 1."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The normalized rows, in x's dtype."""
        return checkpoint_name(rms_norm(x, self.scale[...], self.eps), "norm")
