"""The router: which experts a token goes to, and with what weight (V3 eqs 12-16, spec 5.1, 27.3)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.linear import init_weight


class RouterBias(nnx.Variable):
    """Selection bias of auxiliary-loss-free balancing: no gradient, no optimizer state, no decay (spec 6.1)."""


class Routing(NamedTuple):
    """A router's decision for T tokens of B sequences."""

    experts: Int[Array, "B T K"]
    """Distinct experts of a token, best first."""
    weights: Float[Array, "B T K"]
    """Their gate values g, float32."""
    scores: Float[Array, "B T E"]
    """Affinities s before any bias, float32."""


class Router(nnx.Module):
    """Sigmoid or softmax gate with optional selection bias and group limit; everything in float32.

    Selection uses ``s + b``, weights use ``s`` alone. Groups outside the best are masked with minus infinity.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.kernel = nnx.Param(init_weight(config, rngs, config.hidden_size, config.n_routed_experts))
        if config.has_router_bias:
            self.bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32))

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "B T D"]) -> Routing:
        """Experts, gate values and affinities of every token."""
        config = self.config
        logits_BTE = router_logits(x, self.kernel[...])
        scores_BTE = jax.nn.sigmoid(logits_BTE) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits_BTE)
        biased_BTE = lax.stop_gradient(scores_BTE)
        if config.has_router_bias:
            biased_BTE = biased_BTE + lax.stop_gradient(self.bias[...])
        experts_BTK = select_experts(biased_BTE, config)
        weights_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
        if config.norm_topk_prob:
            weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
        return Routing(experts_BTK, weights_BTK * config.routed_scaling_factor, scores_BTE)


@jax.custom_vjp
def router_logits(x: Float[Array, "*rows D"], kernel: Float[Array, "D E"]) -> Float[Array, "*rows E"]:
    """``x @ kernel`` in float32; for the backward pass ``x`` is kept as it is, not widened."""
    return jnp.matmul(x.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)


def _logits_bwd(saved: tuple[Array, Array], dlogits: Array) -> tuple[Array, Array]:
    x, kernel = saved
    product = functools.partial(jnp.tensordot, precision=lax.Precision.HIGHEST)
    rows = tuple(range(x.ndim - 1))
    return product(dlogits, kernel, (-1, -1)).astype(x.dtype), product(x.astype(jnp.float32), dlogits, (rows, rows))


router_logits.defvjp(lambda x, kernel: (router_logits(x, kernel), (x, kernel)), _logits_bwd)


def select_experts(biased_BTE: Float[Array, "B T E"], config: ModelConfig) -> Int[Array, "B T K"]:
    """The K best experts, from the ``topk_group`` best groups where there are groups.

    A group's score is the sum of its two best biased scores with ``noaux_tc`` (V3), its best score otherwise (V2).
    """
    if config.n_group > 1:
        grouped_BTGX = biased_BTE.reshape(*biased_BTE.shape[:-1], config.n_group, -1)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_scores_BTG = jnp.sum(lax.top_k(grouped_BTGX, best)[0], axis=-1)
        _, kept_BTX = lax.top_k(group_scores_BTG, config.topk_group)
        keep_BTG = jnp.any(kept_BTX[..., None] == jnp.arange(config.n_group), axis=-2)
        biased_BTE = jnp.where(keep_BTG[..., None], grouped_BTGX, -jnp.inf).reshape(biased_BTE.shape)
    return lax.top_k(biased_BTE, config.num_experts_per_tok)[1]


@jax.named_scope("router")
def count_experts(experts: Int[Array, "*rows K"], n_experts: int) -> Int[Array, " E"]:
    """How many (token, slot) pairs each expert received."""
    return jnp.sum(experts.reshape(-1, 1) == jnp.arange(n_experts), axis=0, dtype=jnp.int32)
