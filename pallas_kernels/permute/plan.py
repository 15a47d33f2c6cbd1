"""The plan of a permutation: which (token, choice) goes to which row, all in small int32 arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import varying


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every row goes. Rows are sorted by expert, in token order inside one, each expert padded to whole blocks.

    Attributes:
        counts_E: rows each expert was given.
        group_of_block: expert of each block of ``block`` rows, never decreasing; blocks past ``num_blocks`` name the
            last expert and hold padding only.
        pair_of_row_M: for each padded row the flat index ``t * K + k`` it comes from, ``T * K`` for padding.
        row_of_pair_TK: for each (token, choice) its padded row, or M where the choice was dropped.
        num_blocks: blocks in use, at most ``len(group_of_block)``.
        block: rows in a block (static).
    """

    counts_E: jax.Array
    group_of_block: jax.Array
    pair_of_row_M: jax.Array
    row_of_pair_TK: jax.Array
    num_blocks: jax.Array
    block: int

    @property
    def token_of_row_M(self) -> jax.Array:
        """For each padded row its token, ``T`` for padding."""
        return self.pair_of_row_M // self.row_of_pair_TK.shape[1]

    @property
    def num_rows(self) -> int:
        """M, the static number of padded rows."""
        return self.pair_of_row_M.shape[0]

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        """The arrays (or whatever JAX put in their place), and the static block size."""
        arrays = (self.counts_E, self.group_of_block, self.pair_of_row_M, self.row_of_pair_TK, self.num_blocks)
        return arrays, self.block

    @classmethod
    def tree_unflatten(cls, block: int, arrays: tuple[Any, ...]) -> "Plan":
        """The inverse of ``tree_flatten``; runs no ``__init__``, so that JAX may put in any leaves."""
        plan = object.__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in zip(names, (*arrays, block), strict=True):
            object.__setattr__(plan, name, value)
        return plan


def num_blocks_bound(num_pairs: int, num_experts: int, block: int) -> int:
    """Blocks that always suffice, however ``num_pairs`` rows fall on the experts: each wastes up to block - 1 rows."""
    return (num_pairs + num_experts * (block - 1)) // block


def make_plan(idx_TK: Int[Array, "T K"], num_experts: int, block: int, most_pairs: int | None = None) -> Plan:
    """Plans the way of T tokens with K chosen experts each to expert-sorted rows.

    Args:
        idx_TK: expert of each choice, in ``[0, num_experts)``; the value ``num_experts`` drops the choice (it gets no
            row and adds nothing to the output), as expert parallelism does with other devices' experts.
        num_experts: E.
        block: rows that one expert's share is padded to a multiple of.
        most_pairs: the caller's promise that no more choices than that are kept; rows past it would be lost. None: T K.

    Returns:
        A plan of ``num_blocks_bound(most_pairs, num_experts, block)`` blocks.

    Raises:
        ValueError: ``num_experts`` or ``block`` is below 1.
    """
    if num_experts < 1 or block < 1:
        raise ValueError(f"make_plan: num_experts and block must be at least 1, got {num_experts} and {block}")
    num_pairs = idx_TK.size
    most_pairs = num_pairs if most_pairs is None else min(most_pairs, num_pairs)
    num_blocks_max = num_blocks_bound(most_pairs, num_experts, block)
    num_rows = num_blocks_max * block
    expert_P = idx_TK.reshape(-1).astype(jnp.int32)

    order_P = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    # Counted, not searched for: on a GPU every step of a search is several launches, each of a few microseconds.
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    first_of_expert = jnp.sum(expert_P < experts[:, None], axis=1, dtype=jnp.int32)
    start_E, counts_E = first_of_expert[:-1], jnp.diff(first_of_expert)

    blocks_E = -(-counts_E // block)
    block_end_E = jnp.cumsum(blocks_E)
    row_start_E = (block_end_E - blocks_E) * block
    block_ids = jnp.arange(num_blocks_max, dtype=jnp.int32)
    group_of_block = jnp.sum(block_end_E <= block_ids[:, None], axis=1, dtype=jnp.int32)
    group_of_block = jnp.minimum(group_of_block, num_experts - 1)

    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    expert_M = jnp.repeat(group_of_block, block)
    place_M = row_M - row_start_E[expert_M]
    sorted_M = jnp.minimum(start_E[expert_M] + place_M, num_pairs - 1)
    pair_of_row_M = jnp.where(place_M < counts_E[expert_M], order_P[sorted_M], num_pairs)

    rank_P = varying.like(jnp.zeros(num_pairs, jnp.int32), order_P)
    rank_P = rank_P.at[order_P].set(jnp.arange(num_pairs, dtype=jnp.int32), unique_indices=True)
    kept_P = expert_P < num_experts
    safe_P = jnp.where(kept_P, expert_P, 0)
    row_P = jnp.where(kept_P, row_start_E[safe_P] + rank_P - start_E[safe_P], num_rows)

    return Plan(
        counts_E=counts_E,
        group_of_block=group_of_block,
        pair_of_row_M=pair_of_row_M,
        row_of_pair_TK=row_P.reshape(idx_TK.shape),
        num_blocks=block_end_E[-1],
        block=block,
    )
