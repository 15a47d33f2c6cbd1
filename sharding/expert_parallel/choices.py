"""A token's choices as seen by the ranks that own them, and what one rank does with them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.permute import Plan, make_plan

ExpertFn = Callable[[Any, Any, Array, Plan], Array]
"""``(params, x_RD, weights_RK, plan) -> y_RD``: each row's weighted sum over this rank's experts.

Experts see the rows that ``permute(x_RD, plan)`` is, sorted by expert, each expert's padded with zero rows to whole
blocks; the function moves them itself, in the form that its products read, and back. ``params`` are the local shards,
any tree of floating-point arrays; the function must not close over traced values."""


def localize(
    idx_RK: Int[Array, "R K"], weights_RK: Float[Array, "R K"], first: Int[Array, "*R"] | int, experts: int
) -> tuple[Int[Array, "R C"], Float[Array, "R C"]]:
    """Choices among the ``experts`` from ``first`` on, numbered from 0, in ``C = min(K, experts)`` columns.

    An unused column has the value ``experts`` and weight 0. ``first`` may differ from row to row.
    """
    local_RK = idx_RK - (first if isinstance(first, int) or first.ndim == 0 else first[:, None])
    if experts < idx_RK.shape[1]:  # fewer columns than choices: one for each expert
        hit_RKC = local_RK[:, :, None] == jnp.arange(experts)
        idx_RC = jnp.where(jnp.any(hit_RKC, axis=1), jnp.arange(experts), experts)
        return idx_RC, jnp.sum(jnp.where(hit_RKC, weights_RK[:, :, None], 0), axis=1)
    mine_RK = (local_RK >= 0) & (local_RK < experts)
    return jnp.where(mine_RK, local_RK, experts), jnp.where(mine_RK, weights_RK, 0)


def local_experts(
    expert_fn: ExpertFn,
    params: Any,
    x_RD: Any,
    idx_RK: Int[Array, "R K"],
    weights_RK: Float[Array, "R K"],
    *,
    experts: int,
    block: int,
    most_pairs: int | None = None,
) -> Float[Array, "R D"]:
    """Each row's weighted sum over its choices among this rank's ``experts``; the value ``experts`` is no choice."""
    plan = make_plan(idx_RK, experts, block, most_pairs)
    with jax.named_scope("experts"):
        return expert_fn(params, x_RD, weights_RK, plan)
