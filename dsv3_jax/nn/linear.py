"""Matrix product with a float32 master weight, and the linear layer and embedding made of it."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn import fp8
from dsv3_jax.nn.fp8 import FP8Weight, Normalized, Quantized
from dsv3_jax.nn.norm import RMSNorm
from pallas_kernels.precision import matmul_precision


@jax.custom_vjp
def matmul(x: Float[Array, "*rows in_"], w: Float[Array, "in_ out"]) -> Float[Array, "*rows out"]:
    """``x @ w`` computed in x's dtype with float32 accumulation.

    The weight's gradient is accumulated and returned in the weight's own dtype (float32 masters), never rounded
    through the activations' dtype (spec 3.3.3 of the V3 report as restated in spec 11.2).
    """
    return jnp.matmul(x, _cast(w, x.dtype), precision=matmul_precision(x.dtype))


@jax.named_scope("cast")
def _cast(w: jax.Array, dtype: DTypeLike) -> jax.Array:
    return w.astype(dtype)


def _matmul_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, w), (x, w)


def _matmul_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    precision = matmul_precision(x.dtype)
    dx = jnp.matmul(dy, _cast(w, dy.dtype).T, precision=precision)
    rows = tuple(range(x.ndim - 1))
    dw = lax.dot_general(x, dy, ((rows, rows), ((), ())), precision=precision, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def init_weight(config: ModelConfig, rngs: nnx.Rngs, *shape: int) -> Float[Array, "..."]:
    """Float32 weights drawn as the configuration says (spec 3: one standard deviation for all)."""
    size = math.prod(shape)
    chunks = 16 * -(-size // (16 * _CHUNK))
    draws = _draw(rngs.params(), chunks, config.init_distribution)
    return config.init_std * draws.reshape(-1)[:size].reshape(shape)


_CHUNK = 1 << 14


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, chunks: int, distribution: str) -> jax.Array:
    """Draws of deviation 1, [chunks, 16384].

    Compiling a random draw takes about a second on a CPU, whatever its shape; drawing in a loop over chunks of one size
    lets the many shapes of a model share a few programs.
    """

    def chunk(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        chunk_key = jax.random.fold_in(key, index)
        if distribution == "normal":
            return None, jax.random.normal(chunk_key, (_CHUNK,), jnp.float32)
        # Cut at three deviations, which leaves a deviation of 0.98658: undone here.
        return None, jax.random.truncated_normal(chunk_key, -3.0, 3.0, (_CHUNK,), jnp.float32) / 0.98658

    return lax.scan(chunk, None, jnp.arange(chunks))[1]


class Linear(nnx.Module):
    """``y = x @ kernel``, no bias anywhere in the family; ``kernel`` is [in, out] float32, or an FP8Weight of it."""

    def __init__(self, config: ModelConfig, size_in: int, size_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init_weight(config, rngs, size_in, size_out))

    def prepare(self, x: Float[Array, "*rows in_"]) -> Float[Array, "*rows in_"] | Quantized:
        """``x`` as the product reads it, for one or several layers that read the same: tiles for a weight in FP8."""
        return fp8.quantize(x) if isinstance(self.kernel.get_value(), FP8Weight) else x

    def normalize(self, x: Float[Array, "*rows in_"], norm: RMSNorm) -> Normalized:
        """``norm(x)`` as the product reads it, in FP8 nothing but tiles, and ``x`` for a residual path."""
        if not isinstance(self.kernel.get_value(), FP8Weight):
            return norm(x), x
        return fp8.normalize(x, norm.scale[...], norm.eps)

    def __call__(self, x: Float[Array, "*rows in_"] | Quantized) -> Float[Array, "*rows out"]:
        """The product, in x's dtype."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, FP8Weight):
            return fp8.linear(x if isinstance(x, Quantized) else fp8.quantize(x), kernel)
        return matmul(x, kernel)


class Embedding(nnx.Module):
    """Token embedding; ``table`` is [V, D] float32."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = nnx.Param(init_weight(config, rngs, config.vocab_size, config.hidden_size))

    def __call__(self, tokens: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """The tokens' rows of the table, in ``dtype``."""
        return self.table[...][tokens].astype(dtype)
