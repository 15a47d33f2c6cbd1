"""Experts in FP8: both products and the SwiGLU between them as one function, whose backward keeps 8 bits a value."""

from typing import NamedTuple

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
    quantize,
    sort_rows,
    trim,
    wgrad,
)
from pallas_kernels.permute import Plan, unpermute
from pallas_kernels.quantize import Tiles, quantize_both, requantize_columns
from pallas_kernels.quantize.reference import pad_to_tiles
from pallas_kernels.swiglu_quantize import swiglu_backward_quantize, swiglu_quantize


def fp8_experts(
    params: tuple[FP8Weight, FP8Weight],
    x: Float[Array, "R D"] | Quantized,
    weights_RK: Float[Array, "R K"],
    plan: Plan,
) -> Float[Array, "R D"]:
    """One rank's routed experts, :func:`dsv3_jax.nn.experts.swiglu_experts` in FP8; tokens are quantized, then sorted.

    Raises:
        ValueError: blocks of other than 128 rows, which share their scales in the weight gradient.
    """
    if plan.block != ROWS:
        raise ValueError(f"fp8_experts: rows of an expert come in blocks of {ROWS}, got {plan.block}")
    tokens = x if isinstance(x, Quantized) else quantize(x, power_of_two=True)
    y_MD = expert_network(sort_rows(tokens, plan), *params, Groups(plan.group_of_block, plan.num_blocks))
    return unpermute(y_MD, weights_RK, plan)


def expert_network(
    x: Quantized, gate_up: FP8Weight, down: FP8Weight, groups: Groups | None = None
) -> Float[Array, "*rows D"]:
    """``down(silu(gate(x)) * up(x))`` of one expert, or of many by ``groups`` with weights ``[E, ...]``.

    Kept for the backward pass are ``x`` and what both halves of ``gate_up`` put out, 8 bits a value each; the SwiGLU
    output is computed again (spec 12). Scales of ``x`` and of the output's gradient are powers of two (spec 11.3).

    Raises:
        ValueError: the scales of ``x`` are not.
    """
    if not x.power_of_two:
        raise ValueError("expert_network: x must be quantized with power_of_two = True")
    return _network(x.source, x.tiles, gate_up, down, groups)


class _Kept(NamedTuple):
    x: Tiles
    hidden: Tiles
    """What ``gate_up`` put out."""
    groups: Groups | None
    gate_up: Codes
    down: Codes


@jax.custom_vjp
def _network(source: Array, tiles: Tiles, gate_up: FP8Weight, down: FP8Weight, groups: Groups | None) -> Array:
    return _forward(source, tiles, gate_up, down, groups)[0]


def _forward(
    source: Array, tiles: Tiles, gate_up: FP8Weight, down: FP8Weight, groups: Groups | None
) -> tuple[Array, _Kept]:
    hidden_MF = gemm(tiles, gate_up.forward, groups, source.dtype)[:, : gate_up.shape[-1]]
    # The first is what a recomputed down product reads, the second what the backward keeps.
    activated, stored = (_named(tiles, "gate_up") for tiles in swiglu_quantize(hidden_MF))
    y_MD = gemm(activated, down.forward, groups, source.dtype)
    kept = _Kept(tiles, stored, groups, gate_up.backward, down.backward)
    return trim(y_MD, source.shape[:-1], down.shape[-1]), kept


def _backward(kept: _Kept, dy: Array) -> tuple[Array, None, FP8Weight, FP8Weight, None]:
    tiles, stored, groups, gate_up, down = kept
    dim_d, width, experts = dy.shape[-1], stored.q.shape[1], gate_up.q.shape[0]
    dy_rows, dy_columns = quantize_both(pad_to_tiles(dy.reshape(-1, dim_d), 2), power_of_two=True)
    dout_MI = gemm(dy_rows, down, groups, dy.dtype)[:, : width // 2]
    dh_rows, dh_columns, activated_columns = swiglu_backward_quantize(stored, dout_MI)
    ddown = wgrad(activated_columns, dy_columns, groups, experts)
    dx_MD = gemm(dh_rows, gate_up, groups, dy.dtype)
    dgate_up = wgrad(requantize_columns(tiles.q, tiles.scale, True), dh_columns, groups, experts)
    dx = trim(dx_MD, dy.shape[:-1], tiles.q.shape[1])
    return dx, None, gradient(dgate_up[..., :width]), gradient(ddown[..., :dim_d]), None


_network.defvjp(_forward, _backward)


def _named(tiles: Tiles, name: str) -> Tiles:
    """``tiles`` under a name that a policy of recomputation may save.

    The codes go as bits: JAX rounds what it saves by the exponent and mantissa of its dtype, which takes e4m3fn's
    values above 240 for infinities.
    """
    bits = checkpoint_name(lax.bitcast_convert_type(tiles.q, jnp.uint8), name)
    return Tiles(lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), checkpoint_name(tiles.scale, name))
