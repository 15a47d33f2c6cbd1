"""DeepSeekMoE: shared experts, and routed experts without dropping (V3 eqs 12-16, spec 5)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.ffn import FeedForward, swiglu
from dsv3_jax.nn.linear import init_weight
from dsv3_jax.nn.router import Router, Routing, count_experts
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.permute import make_plan, permute, unpermute

BalanceLoss = Callable[[Routing], Float[Array, ""]]


class MoEAux(NamedTuple):
    """What training needs of a mixture-of-experts layer beside its output."""

    balance_loss: Float[Array, "*L"]
    counts: Int[Array, "*L E"]
    """(token, slot) pairs each expert received."""


class MoE(nnx.Module):
    """Routed experts by grouped matrix products over rows sorted by expert, plus shared experts with weight 1.

    ``gate_up`` is [E, D, 2I] with the gate's columns first, ``down`` [E, I, D]. Any module that maps ``[B, T, D]`` to a
    :class:`Routing` can stand in for the router.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router):
        experts, width, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.config = config
        self.router = router(config, rngs=rngs)
        self.gate_up = nnx.Param(init_weight(config, rngs, experts, size, 2 * width))
        self.down = nnx.Param(init_weight(config, rngs, experts, width, size))
        if config.n_shared_experts:
            self.shared = FeedForward(config, config.n_shared_experts * width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], balance: BalanceLoss | None = None
    ) -> tuple[Float[Array, "B T D"], MoEAux]:
        """Shared plus routed experts' output, and the routing record, its loss made by ``balance``."""
        routing = self.router(x)
        out = self.routed(x, routing)
        if self.config.n_shared_experts:
            out = out + self.shared(x)
        loss = balance(routing) if balance else jnp.zeros((), jnp.float32)
        return out, MoEAux(loss, count_experts(routing.experts, self.config.n_routed_experts))

    def routed(self, x: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
        """Sum over a token's experts of gate value times expert output."""
        x_TD = x.reshape(-1, x.shape[-1])
        chosen = routing.experts.shape[-1]
        experts = self.config.n_routed_experts
        block = block_rows(x_TD.shape[0] * chosen, experts)
        plan = make_plan(routing.experts.reshape(-1, chosen), experts, block)
        rows_MD = permute(x_TD, plan)
        gemm = functools.partial(
            grouped_gemm, group_of_block=plan.group_of_block, block=block, num_blocks=plan.num_blocks
        )
        hidden_MI = swiglu(checkpoint_name(gemm(rows_MD, self.gate_up[...]), "gate_up"))
        out_MD = gemm(hidden_MI, self.down[...])
        return unpermute(out_MD, routing.weights.reshape(-1, chosen), plan).reshape(x.shape)


def block_rows(rows: int, experts: int) -> int:
    """Rows that each expert's share is padded to a multiple of: the Hopper kernels' tile of 128 on a GPU, elsewhere at
    most half of an expert's mean load, so that padding stays below the useful work."""
    if jax.default_backend() == "gpu":
        return 128
    return max(8, min(128, 1 << (rows // (2 * experts)).bit_length() - 1)) if rows >= 2 * experts else 8
