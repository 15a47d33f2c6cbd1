"""What MLA and MHA share: attention with the projection after it, the cache they write, and attention over it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.nn import fp8_attention
from dsv3_jax.nn.fp8 import FP8Weight
from dsv3_jax.nn.linear import Linear
from pallas_kernels.attention import causal_attention


def attend_and_project(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T J H"],
    v_BTNW: Float[Array, "B T J W"],
    out: Linear,
    *,
    scale: float,
) -> Float[Array, "B T D"]:
    """``out(causal_attention(q, k, v))``."""
    kernel = out.kernel.get_value()
    if isinstance(kernel, FP8Weight):
        return fp8_attention.attend_and_project(q_BTNH, k_BTNH, v_BTNW, kernel, scale=scale)
    o_BTNW = causal_attention(q_BTNH, k_BTNH, v_BTNW, scale=scale)
    return out(checkpoint_name(o_BTNW.reshape(*q_BTNH.shape[:2], -1), "attention"))


class LayerCache(NamedTuple):
    """What one layer keeps of the tokens behind it; slot ``s`` holds the token at position ``s``.

    With MLA ``first`` is the normalized latent [B, S, C] and ``second`` the rotated shared key [B, S, R]
    (spec 4.3: as the official absorbed path stores them). With MHA they are keys [B, S, N', H] and values.
    """

    first: Float[Array, "B S ..."]
    second: Float[Array, "B S ..."]


def write_cache(
    cache: LayerCache, first: Float[Array, "B T ..."], second: Float[Array, "B T ..."], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with T new tokens of every sequence in the slots of their positions."""
    row = jnp.arange(positions.shape[0])[:, None]
    return LayerCache(
        cache.first.at[row, positions].set(first.astype(cache.first.dtype)),
        cache.second.at[row, positions].set(second.astype(cache.second.dtype)),
    )


def visible(positions: Int[Array, "B T"], slots: int) -> Bool[Array, "B 1 T S"]:
    """Which cache slots each query may see: those up to its own position."""
    return (jnp.arange(slots) <= positions[..., None])[:, None]


def masked_softmax(scores: Float[Array, "B N T S"], mask: Bool[Array, "B 1 T S"]) -> Float[Array, "B N T S"]:
    """Softmax over slots in float32, masked ones exactly zero."""
    return jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -jnp.inf), axis=-1)
