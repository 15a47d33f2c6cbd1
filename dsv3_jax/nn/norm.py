"""RMSNorm."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """``x / sqrt(mean(x^2) + eps) * scale``, all in float32, cast back to x's dtype (spec 3)."""
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last dim; ``scale`` starts at 1."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The normalized rows, in x's dtype."""
        return checkpoint_name(rms_norm(x, self.scale[...], self.eps), "norm")
