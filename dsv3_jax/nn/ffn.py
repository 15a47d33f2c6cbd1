"""SwiGLU and the dense feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.fp8 import Normalized, Quantized
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.norm import RMSNorm


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*rows F2"]) -> Float[Array, "*rows F"]:
    """``silu(gate) * up`` of the two halves of the last dim (spec 3), in float32, rounded once.

    For the backward pass ``gate_up`` alone is kept.
    """
    return _swiglu(gate_up).astype(gate_up.dtype)


def _swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_bwd(gate_up: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return jax.vjp(_swiglu, gate_up)[1](dy.astype(jnp.float32))


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_bwd)


class FeedForward(nnx.Module):
    """Dense SwiGLU network. ``gate_up`` holds both input projections, gate first: one product instead of two."""

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs):
        self.gate_up = Linear(config, config.hidden_size, 2 * width, rngs=rngs)
        self.down = Linear(config, width, config.hidden_size, rngs=rngs)

    def normalize(self, x: Float[Array, "*rows D"], norm: RMSNorm) -> Normalized:
        """``norm(x)`` as the network reads it, and ``x`` for the residual path."""
        return self.gate_up.normalize(x, norm)

    def __call__(self, x: Float[Array, "*rows D"] | Quantized) -> Float[Array, "*rows D"]:
        """``down(silu(gate(x)) * up(x))``."""
        return self.down(swiglu(checkpoint_name(self.gate_up(x), "gate_up")))
