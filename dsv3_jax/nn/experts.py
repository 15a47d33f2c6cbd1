"""Routed experts as one function, whose backward pass keeps the tokens and what ``gate_up`` put out, and no more."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_gemm import every_group_gemm, grouped_gemm, grouped_gemm_backward
from pallas_kernels.permute import Plan, pairs_to_rows, permute, rows_to_pairs, unpermute
from pallas_kernels.precision import matmul_precision

Params = tuple[Float[Array, "E D I2"], Float[Array, "E I D"]]


@jax.custom_vjp
def swiglu_experts(
    params: Params, x_RD: Float[Array, "R D"], weights_RK: Float[Array, "R K"], plan: Plan
) -> Float[Array, "R D"]:
    """Each token's weighted sum over one rank's experts: gate, up and down on the plan's rows (V3 eq 12).

    The gate value multiplies what the down projection reads, in float32 before the one rounding there. Its gradient is
    then a product of what that projection's input and its gradient are anyway, and no output of an expert is kept.

    Args:
        params: ``gate_up`` [E, D, 2I] with the gate's columns first, and ``down`` [E, I, D].
        x_RD: tokens.
        weights_RK: gate values of the plan's choices.
        plan: where each choice's row goes.
    """
    return _forward(params, x_RD, weights_RK, plan)[0]


_Saved = tuple[Params, Array, Array, Array, Plan]


def _forward(params: Params, x_RD: Array, weights_RK: Array, plan: Plan) -> tuple[Array, _Saved]:
    gate_up_EDI, down_EID = params
    hidden_MI2 = checkpoint_name(grouped_gemm(permute(x_RD, plan), gate_up_EDI, **_blocks(plan)), "gate_up")
    scaled_MI = _scaled(hidden_MI2, pairs_to_rows(weights_RK, plan))
    out_MD = grouped_gemm(scaled_MI.astype(x_RD.dtype), down_EID, **_blocks(plan))
    return unpermute(out_MD, None, plan), (params, x_RD, hidden_MI2, weights_RK, plan)


def _backward(saved: _Saved, dout_RD: Array) -> tuple[Params, Array, Array, None]:
    (gate_up_EDI, down_EID), x_RD, hidden_MI2, weights_RK, plan = saved
    weight_M = pairs_to_rows(weights_RK, plan)
    scaled_MI, scaled_back = jax.vjp(_scaled, hidden_MI2, weight_M)
    dscaled_MI, ddown = grouped_gemm_backward(
        scaled_MI.astype(x_RD.dtype), down_EID, permute(dout_RD, plan), **_blocks(plan)
    )
    dhidden_MI2, dweight_M = scaled_back(dscaled_MI.astype(jnp.float32))
    drows_MD, dgate_up = grouped_gemm_backward(permute(x_RD, plan), gate_up_EDI, dhidden_MI2, **_blocks(plan))
    return (dgate_up, ddown), unpermute(drows_MD, None, plan), rows_to_pairs(dweight_M, plan), None


swiglu_experts.defvjp(_forward, _backward)


def _scaled(hidden_MI2: Array, weight_M: Array) -> Array:
    gate_MI, up_MI = jnp.split(hidden_MI2.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate_MI) * up_MI * weight_M[..., None]


_FEW_CHOICES = 4
"""Tokens' choices are each multiplied by their own expert's weights while they are so many times fewer than experts."""


@jax.named_scope("experts")
def few_tokens_experts(
    params: Params, x_TD: Float[Array, "T D"], experts_TK: Int[Array, "T K"], weights_TK: Float[Array, "T K"]
) -> Float[Array, "T D"]:
    """What :func:`swiglu_experts` computes, without a plan, for tokens so few that weights are what is read.

    A plan is some sixty small steps one after another, which take longer than the products. Instead all tokens go
    through every expert, those that did not choose it with zeros behind the activation; or, where a few choices meet
    many experts, each choice reads its own expert's weights. It has no gradient of its own.

    Args:
        params: as there.
        x_TD: tokens.
        experts_TK: distinct experts of each.
        weights_TK: their gate values, float32.
    """
    gate_up_EDI, down_EID = params
    if _FEW_CHOICES * experts_TK.size <= gate_up_EDI.shape[0]:
        return _chosen(params, x_TD, experts_TK, weights_TK)
    hit_TKE = experts_TK[:, :, None] == jnp.arange(gate_up_EDI.shape[0])
    weight_ET = jnp.sum(jnp.where(hit_TKE, weights_TK[:, :, None], 0), axis=1).T
    hidden_ETI2 = every_group_gemm(x_TD, gate_up_EDI)
    scaled_ETI = jnp.where(jnp.any(hit_TKE, axis=1).T[..., None], _scaled(hidden_ETI2, weight_ET), 0)
    out_ETD = every_group_gemm(scaled_ETI.astype(x_TD.dtype), down_EID)
    return jnp.sum(out_ETD.astype(jnp.float32), axis=0).astype(x_TD.dtype)


def _chosen(params: Params, x_TD: Array, experts_TK: Array, weights_TK: Array) -> Array:
    dtype = x_TD.dtype

    def product(x_MD: Array, w_EDI: Array) -> Array:
        chosen = w_EDI[experts_TK.reshape(-1)].astype(dtype)
        out = jnp.einsum(
            "md,mdi->mi", x_MD, chosen, precision=matmul_precision(dtype), preferred_element_type=jnp.float32
        )
        return out.astype(dtype)

    hidden_MI2 = product(jnp.repeat(x_TD, experts_TK.shape[1], axis=0), params[0])
    out_MD = product(_scaled(hidden_MI2, weights_TK.reshape(-1)).astype(dtype), params[1])
    return jnp.sum(out_MD.astype(jnp.float32).reshape(*experts_TK.shape, -1), axis=1).astype(dtype)


def _blocks(plan: Plan) -> dict[str, Any]:
    return {"group_of_block": plan.group_of_block, "block": plan.block, "num_blocks": plan.num_blocks}
