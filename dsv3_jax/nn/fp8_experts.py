"""Experts in FP8: both products and the SwiGLU between them as one function, whose backward keeps 8 bits a value."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.nn.fp8 import (
    ROWS,
    Codes,
    FP8Weight,
    Groups,
    Quantized,
    gemm,
    gradient,
    pad_rows,
    quantize,
    trim,
    wgrad,
)
from pallas_kernels.permute import (
    Plan,
    pairs_to_rows,
    permute_both,
    permute_columns,
    permute_tiles,
    rows_to_pairs,
    unpermute,
)
from pallas_kernels.quantize import Tiles, quantize_both, quantize_rows, requantize_columns
from pallas_kernels.quantize.reference import pad_to_tiles
from pallas_kernels.swiglu_quantize import swiglu_backward_quantize, swiglu_quantize


def fp8_experts(
    params: tuple[FP8Weight, FP8Weight],
    x: Float[Array, "R D"] | Quantized,
    weights_RK: Float[Array, "R K"],
    plan: Plan,
) -> Float[Array, "R D"]:
    """One rank's routed experts, :func:`dsv3_jax.nn.experts.swiglu_experts` in FP8.

    Who brings tiles has them from where shared experts have theirs, which then also see the same gradient of the
    output: it is quantized as theirs, so that XLA finds the two alike and makes one.

    Raises:
        ValueError: blocks of other than 128 rows, which share their scales in the weight gradient.
    """
    if plan.block != ROWS:
        raise ValueError(f"fp8_experts: rows of an expert come in blocks of {ROWS}, got {plan.block}")
    choices, shared = _Choices(weights_RK, plan), isinstance(x, Quantized)
    tokens = x if isinstance(x, Quantized) else quantize(x, power_of_two=True)
    return _network(tokens.source, tokens.tiles, *params, choices, shared)


def expert_network(x: Quantized, gate_up: FP8Weight, down: FP8Weight) -> Float[Array, "*rows D"]:
    """``down(silu(gate(x)) * up(x))`` of one expert that every token goes to.

    Raises:
        ValueError: the scales of ``x`` are no powers of two.
    """
    if not x.power_of_two:
        raise ValueError("expert_network: x must be quantized with power_of_two = True")
    return _network(x.source, x.tiles, gate_up, down, None, True)


class _Choices(NamedTuple):
    """Gate values, and where the rows of tokens that they weigh lie."""

    weights_RK: Array
    plan: Plan

    @property
    def groups(self) -> Groups:
        return Groups(self.plan.group_of_block, self.plan.num_blocks)

    @property
    def weight_M(self) -> Array:
        return pairs_to_rows(self.weights_RK, self.plan)


class _Kept(NamedTuple):
    """What the backward pass reads: tokens and what ``gate_up`` put out, 8 bits a value each (spec 12)."""

    x: Tiles
    hidden: Tiles
    gate_up: Codes
    down: Codes
    choices: _Choices | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _network(
    source: Array, tiles: Tiles, gate_up: FP8Weight, down: FP8Weight, choices: _Choices | None, shared: bool
) -> Array:
    """One expert on all tokens, or each token's sum over the experts that it chose.

    Tokens, and the gradients of what they sum up to, are quantized once, with scales that are powers of two, and then
    sorted (spec 11.3). A gate value multiplies the scales of what the down projection reads.
    """
    return _forward(source, tiles, gate_up, down, choices, shared)[0]


def _forward(
    source: Array, tiles: Tiles, gate_up: FP8Weight, down: FP8Weight, choices: _Choices | None, shared: bool
) -> tuple[Array, _Kept]:
    del shared
    rows, groups = (tiles, None) if choices is None else (permute_tiles(tiles, choices.plan), choices.groups)
    hidden_MF = gemm(rows, gate_up.forward, groups, source.dtype)[:, : gate_up.shape[-1]]
    # The first is what a recomputed down product reads, the second what the backward keeps.
    activated, stored = (_named(tiles, "gate_up") for tiles in swiglu_quantize(hidden_MF))
    kept = _Kept(tiles, stored, gate_up.backward, down.backward, choices)
    if choices is None:
        y_MD = gemm(activated, down.forward, None, source.dtype)
        return trim(y_MD, source.shape[:-1], down.shape[-1]), kept
    weighted = Tiles(activated.q, activated.scale * choices.weight_M)
    y_MD = gemm(weighted, down.forward, groups, source.dtype)[:, : down.shape[-1]]
    return unpermute(y_MD, None, choices.plan), kept


def _backward(shared: bool, kept: _Kept, dy: Array) -> tuple[Array, None, FP8Weight, FP8Weight, _Choices | None]:
    tiles, stored, gate_up, down, choices = kept
    dim_d, width, experts = dy.shape[-1], stored.q.shape[1], gate_up.q.shape[0]
    dy_MD = dy.reshape(-1, dim_d)
    if choices is None:
        groups, weight_M, x_columns = None, None, requantize_columns(*tiles, power_of_two=True)
        dy_rows, dy_columns = quantize_both(pad_to_tiles(dy_MD, 2), power_of_two=True)
    else:
        groups, weight_M, x_columns = choices.groups, choices.weight_M, permute_columns(tiles, choices.plan)
        if shared:
            dy_tokens, _ = quantize_both(pad_to_tiles(dy_MD, 2), power_of_two=True)
        else:
            dy_tokens = quantize_rows(pad_rows(dy_MD), power_of_two=True)
        dy_rows, dy_columns = permute_both(dy_tokens, choices.plan)
    dout_MI = gemm(dy_rows, down, groups, dy.dtype)[:, : width // 2]
    dh_rows, dh_columns, activated_columns, dweight_M = swiglu_backward_quantize(stored, dout_MI, weight_M)
    ddown = wgrad(activated_columns, dy_columns, groups, experts)[..., :dim_d]
    dx_MD = gemm(dh_rows, gate_up, groups, dy.dtype)[:, : tiles.q.shape[1]]
    dgate_up = wgrad(x_columns, dh_columns, groups, experts)[..., :width]
    if choices is None or dweight_M is None:
        return trim(dx_MD, dy.shape[:-1], dx_MD.shape[1]), None, gradient(dgate_up), gradient(ddown), None
    dx = unpermute(dx_MD, None, choices.plan)
    dweights = rows_to_pairs(dweight_M, choices.plan).astype(choices.weights_RK.dtype)
    nothing: Any = None
    return dx, None, gradient(dgate_up), gradient(ddown), _Choices(dweights, nothing)


_network.defvjp(_forward, _backward)


def _named(tiles: Tiles, name: str) -> Tiles:
    """``tiles`` under a name that a policy of recomputation may save.

    The codes go as bits: JAX rounds what it saves by the exponent and mantissa of its dtype, which takes e4m3fn's
    values above 240 for infinities.
    """
    bits = checkpoint_name(lax.bitcast_convert_type(tiles.q, jnp.uint8), name)
    return Tiles(lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), checkpoint_name(tiles.scale, name))
