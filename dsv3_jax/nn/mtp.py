"""Multi-token prediction: one more block that predicts a further token (V3 eqs 21-25, spec 7)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.block import Block, Remat, rematerialize
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.moe import BalanceLoss, MoEAux
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.router import Router


class MTP(nnx.Module):
    """Prediction module of one depth. The embedding and the head are the model's: they come as arguments, so that
    one array serves all and gradients add up (spec 7.2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.embedding_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.project = Linear(config, 2 * size, size, rngs=rngs)
        self.block = Block(config, moe=config.n_routed_experts > 0, rngs=rngs, router=router)
        self.head_norm = RMSNorm(size, eps)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        balance: BalanceLoss | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], MoEAux | None]:
        """From the depth below, ``hidden``, and the embedding of the token k positions ahead.

        Returns the hidden state that the next depth reads, the normalized state that the head reads, and the block's
        routing record. Positions stay those of the slots (spec 7.2).
        """
        graph, state = nnx.split(self)

        def forward(state: Any, hidden: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array, MoEAux | None]:
            module = nnx.merge(graph, state)
            parts = [module.embedding_norm(embedded), module.hidden_norm(hidden)]
            if module.config.mtp_concat == "hidden_first":
                parts.reverse()
            x = module.project(jnp.concatenate(parts, axis=-1))
            x, aux, _ = module.block(x, positions, balance=balance)
            normed = module.head_norm(x)
            return (normed if module.config.mtp_hidden == "post_norm" else x), normed, aux

        return rematerialize(forward, remat, scanned=False)(state, hidden, embedded)
