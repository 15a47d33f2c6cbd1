"""The pre-norm transformer block, and a stack of equal blocks run by one scan."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.cache import LayerCache, Pages
from dsv3_jax.nn.ffn import FeedForward
from dsv3_jax.nn.mha import MHA
from dsv3_jax.nn.mla import MLA, AttentionForm
from dsv3_jax.nn.moe import BalanceLoss, MoE, MoEAux
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.router import Router
from sharding.expert_parallel import DISPATCHED

Remat = Literal["none", "paper", "full"]
_SAVED = ("latent", "attention", "residual", "gate_up", DISPATCHED)


class Block(nnx.Module):
    """``h + attention(norm(h))``, then ``h + ffn(norm(h))`` (spec 3)."""

    def __init__(self, config: ModelConfig, *, moe: bool, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = (MLA if config.attention == "mla" else MHA)(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if moe:
            self.moe = MoE(config, rngs=rngs, router=router)
        else:
            self.ffn = FeedForward(config, config.intermediate_size, rngs=rngs)
        self.is_moe = moe

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        balance: BalanceLoss | None = None,
        cache: LayerCache | None = None,
        form: AttentionForm = "naive",
    ) -> tuple[Float[Array, "B T D"], MoEAux | None, LayerCache | None]:
        """The block's output, its routing record where it routes, and its cache where one was given."""
        normed, x = self.attention.normalize(x, self.attention_norm)
        attended, cache = self.attention(normed, positions, cache, form)
        x = checkpoint_name(x + attended, "residual")
        if self.is_moe:
            normed, x = self.moe.normalize(x, self.ffn_norm)
            out, aux = self.moe(normed, balance, serving=cache is not None)
        else:
            normed, x = self.ffn.normalize(x, self.ffn_norm)
            out, aux = self.ffn(normed), None
        return x + out, aux, cache


def stack_blocks(
    config: ModelConfig, layers: int, *, moe: bool, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router
) -> Block:
    """A :class:`Block` whose every variable has a leading layer dim, each layer drawn from its own key."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, moe=moe, rngs=rngs, router=router)

    return create(rngs)


class Cache(NamedTuple):
    """What all layers keep of the tokens behind each sequence."""

    pages: Pages
    table: Int[Array, "B X"]
    """Pages of each sequence in order, the same in every layer; 0 where it has none."""


def run_blocks(
    blocks: Block,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    *,
    balance: BalanceLoss | None = None,
    remat: Remat = "none",
    unroll: bool = False,
    cache: Cache | None = None,
    first_layer: int = 0,
    form: AttentionForm = "naive",
) -> tuple[Float[Array, "B T D"], MoEAux | None, Cache | None]:
    """All layers of a stack by one ``lax.scan``, so that compile time does not grow with depth; or ``unroll``-ed.

    Returned routing records have a leading layer dim. The stack has the cache's layers from ``first_layer`` on, whose
    pages go through the scan as one array that is written in place.
    """
    graph, stacked = nnx.split(blocks)

    def layer(
        carry: tuple[jax.Array, Pages | None], inputs: tuple[Any, jax.Array]
    ) -> tuple[tuple[jax.Array, Pages | None], MoEAux | None]:
        (x, pages), (state, number) = carry, inputs
        block = nnx.merge(graph, state)
        below = LayerCache(pages, cache.table, number) if cache and pages else None
        x, aux, above = block(x, positions, balance=balance, cache=below, form=form)
        return (x, above.pages if above else None), aux

    turn = rematerialize(layer, remat, scanned=not unroll, pinned=(True, False))
    numbers = first_layer + jnp.arange(jax.tree.leaves(stacked)[0].shape[0])
    (x, pages), aux = lax.scan(turn, (x, cache.pages if cache else None), (stacked, numbers), unroll=unroll)
    return x, aux, cache._replace(pages=pages) if cache and pages else None


def rematerialize[**P, R](
    function: Callable[P, R], remat: Remat, *, scanned: bool, pinned: bool | tuple[bool, ...] = True
) -> Callable[P, R]:
    """``function`` under the chosen recomputation.

    ``paper`` keeps what matrix products other than MLA's up-projections put out and what other ranks sent, and
    computes norms, up-projections, rotation and SwiGLU again in the backward pass (spec 12); ``full`` keeps a block's
    input only.

    Outside of a loop XLA would find both computations in one program and do one. What ``pinned`` arguments (one for
    each, or all) hold goes through a barrier that hides it. Weights should not: XLA would have to keep each layer's
    float32 slice of its stack from the one pass to the other, where it casts the stack once and reads that in both.
    """
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*_SAVED) if remat == "paper" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned and pinned)


def concatenate_aux(records: list[MoEAux | None]) -> MoEAux | None:
    """Routing records of several stacks as one, in order of depth; None where nothing routes."""
    found = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[1:]), record) for record in records if record]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found) if found else None
