"""Multi-token prediction: one more block that predicts a further token (V3 eqs 21-25, spec 7)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.block import Block, Remat, rematerialize
from dsv3_jax.nn.cache import LayerCache
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.mla import AttentionForm
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
            x, aux, _ = module.block(module.join(hidden, embedded), positions, balance=balance)
            return *module.heads(x), aux

        turn = rematerialize(forward, remat, scanned=False, pinned=(False, True, True))
        return turn(state, hidden, embedded)

    def with_cache(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache,
        form: AttentionForm,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], LayerCache]:
        """Both states of a call, over a cache of the module's own layer."""
        x, _, above = self.block(self.join(hidden, embedded), positions, cache=cache, form=form)
        assert above is not None
        return *self.heads(x), above

    def join(self, hidden: Float[Array, "B T D"], embedded: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block's input."""
        parts = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        if self.config.mtp_concat == "hidden_first":
            parts.reverse()
        return self.project(jnp.concatenate(parts, axis=-1))

    def heads(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """From the block's output, what the next depth reads and what the head reads."""
        normed = self.head_norm(x)
        return (normed if self.config.mtp_hidden == "post_norm" else x), normed
