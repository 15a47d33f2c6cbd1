"""DeepSeekMoE: shared experts, and routed experts without dropping (V3 eqs 12-16, spec 5)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn import fp8
from dsv3_jax.nn.experts import few_tokens_experts, swiglu_experts
from dsv3_jax.nn.ffn import FeedForward
from dsv3_jax.nn.fp8 import Normalized, Quantized
from dsv3_jax.nn.fp8_experts import expert_network, fp8_experts
from dsv3_jax.nn.linear import init_weight
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.router import Router, Routing, count_experts
from pallas_kernels import dispatch
from pallas_kernels.grouped_gemm.every_group_sm90 import MOST_ROWS
from pallas_kernels.permute.plan import num_blocks_bound
from sharding.expert_parallel import ExpertParallel, routed

BalanceLoss = Callable[[Routing], Float[Array, ""]]


class MoEAux(NamedTuple):
    """What training needs of a mixture-of-experts layer beside its output."""

    balance_loss: Float[Array, "*L"]
    counts: Int[Array, "*L E"]
    """(token, slot) pairs each expert received."""


class MoE(nnx.Module):
    """Routed experts by grouped matrix products over rows sorted by expert, plus shared experts with weight 1.

    ``gate_up`` is [E, D, 2I] with the gate's columns first, ``down`` [E, I, D]; on several ranks each
    has its share of the experts (:func:`place_experts`). Any module that maps ``[B, T, D]`` to a
    :class:`Routing` can stand in for the router.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router):
        experts, width, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.config = config
        self.placement = ExpertParallel()
        self.router = router(config, rngs=rngs)
        self.gate_up = nnx.Param(init_weight(config, rngs, experts, size, 2 * width))
        self.down = nnx.Param(init_weight(config, rngs, experts, width, size))
        if config.n_shared_experts:
            self.shared = FeedForward(config, config.n_shared_experts * width, rngs=rngs)

    def normalize(self, x: Float[Array, "B T D"], norm: RMSNorm) -> Normalized:
        """``norm(x)`` as the layer reads it, in FP8 also as tiles, which all experts share, and ``x``."""
        if not isinstance(self.gate_up.get_value(), fp8.FP8Weight):
            return norm(x), x
        return fp8.normalize(x, norm.scale[...], norm.eps, power_of_two=True, with_output=True)

    def __call__(
        self, x: Float[Array, "B T D"] | Quantized, balance: BalanceLoss | None = None, *, serving: bool = False
    ) -> tuple[Float[Array, "B T D"], MoEAux]:
        """Shared plus routed experts' output, and the routing record, its loss made by ``balance``.

        With ``serving`` a few tokens go through the experts in a form for which no gradient is kept.
        """
        if isinstance(self.gate_up.get_value(), fp8.FP8Weight) and not isinstance(x, Quantized):
            x = fp8.quantize(x, power_of_two=True)
        routing = self.router(x.source if isinstance(x, Quantized) else x)
        out = self.routed(x, routing, serving=serving)
        if self.config.n_shared_experts:
            out = out + self._shared(x)
        loss = balance(routing) if balance else jnp.zeros((), jnp.float32)
        return out, MoEAux(loss, count_experts(routing.experts, self.config.n_routed_experts))

    def _shared(self, x: Float[Array, "B T D"] | Quantized) -> Float[Array, "B T D"]:
        if not isinstance(x, Quantized):
            return self.shared(x)
        gate_up: Any = self.shared.gate_up.kernel.get_value()
        down: Any = self.shared.down.kernel.get_value()
        return expert_network(x, gate_up, down)

    def routed(
        self, x: Float[Array, "B T D"] | Quantized, routing: Routing, *, serving: bool = False
    ) -> Float[Array, "B T D"]:
        """Sum over a token's experts of gate value times expert output.

        Raises:
            ValueError: the weights are not this rank's share of the experts.
        """
        experts, (local, size, _) = self.config.n_routed_experts, self.gate_up.shape
        if local * self.placement.size != experts:
            raise ValueError(
                f"weights of {local} experts on each of {self.placement.size} ranks, the model has {experts}"
            )
        chosen = routing.experts.shape[-1]
        source = x.source if isinstance(x, Quantized) else x
        x_TD = source.reshape(-1, size)
        rows = x_TD.shape[0] * chosen
        in_fp8 = isinstance(x, Quantized)
        block = fp8.ROWS if in_fp8 else block_rows(rows, local)
        # Padded to whole blocks, few choices make as many rows as all experts have together.
        few = x_TD.shape[0] <= MOST_ROWS and x_TD.shape[0] * local <= num_blocks_bound(rows, local, block) * block
        if serving and few and not in_fp8 and self.placement.size == 1:
            experts_TK, weights_TK = (of.reshape(-1, chosen) for of in (routing.experts, routing.weights))
            params = (self.gate_up.get_value(), self.down.get_value())
            return few_tokens_experts(params, x_TD, experts_TK, weights_TK).reshape(x.shape)
        # Tiles stay with one rank; between ranks rows travel in their own form.
        tokens = Quantized(x_TD, x.tiles, x.power_of_two) if in_fp8 and self.placement.size == 1 else x_TD
        out_TD = routed(
            tokens,
            routing.experts.reshape(-1, chosen),
            routing.weights.reshape(-1, chosen),
            (self.gate_up.get_value(), self.down.get_value()),
            fp8_experts if in_fp8 else swiglu_experts,
            num_experts=experts,
            block=block,
            placement=self.placement,
        )
        return out_TD.reshape(x.shape)


def place_experts(model: nnx.Module, placement: ExpertParallel) -> None:
    """Tells every mixture-of-experts layer of ``model`` how its experts lie over a mesh axis.

    Afterwards the layers' ``gate_up`` and ``down`` are expected to be one rank's share ``[E / N, ...]`` when they are
    called, per device inside ``jax.shard_map``; everything else of the model stays whole. The choice is part of the
    graph of ``nnx.split``, not of the arrays.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MoE):
            module.placement = placement


def block_rows(rows: int, experts: int) -> int:
    """Rows that each expert's share is padded to a multiple of: the Hopper kernels' tile of 128 on a GPU, elsewhere at
    most half of an expert's mean load, so that padding stays below the useful work."""
    if dispatch.platform() == "gpu":
        return 128
    return max(8, min(128, 1 << (rows // (2 * experts)).bit_length() - 1)) if rows >= 2 * experts else 8
