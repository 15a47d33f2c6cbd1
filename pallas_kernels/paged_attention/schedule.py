"""Which blocks of keys each thread block of the Hopper kernel attends to: equal shares, whatever the lengths are.

The blocks of all sequences stand in one line, which is cut into parts of equal length. A sequence that a cut goes
through is attended to in pieces, at most two of them in any one part: its first and its last.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

BLOCK = 64
"""Keys in a block."""


class Schedule(NamedTuple):
    """Where the sequences and the parts lie in the line of blocks.

    Attributes:
        start_B: the first block of each sequence, and behind the last one the number of all blocks, ``[B + 1]``.
        work_P4: each part's first sequence, the one behind its last, its first block and the one behind its last.
    """

    start_B: Array
    work_P4: Array


def divided(first_B: Array, queries: int, width: int, parts: int) -> Schedule:
    """Divides sequences whose first query is at ``first_B``, each of at most ``width`` blocks, into ``parts``."""
    count_B = jnp.clip((first_B + (queries + BLOCK - 1)) // BLOCK, 1, width).astype(jnp.int32)
    before = jnp.arange(count_B.shape[0] + 1)[:, None] > jnp.arange(count_B.shape[0])
    start_B = jnp.sum(jnp.where(before, count_B, 0), axis=1, dtype=jnp.int32)
    total = start_B[-1]
    low_P = jnp.minimum(jnp.arange(parts, dtype=jnp.int32) * share(total, parts), total)
    high_P = jnp.minimum(low_P + share(total, parts), total)
    behind_B = start_B[1:]
    first_P = jnp.sum(behind_B <= low_P[:, None], axis=1, dtype=jnp.int32)
    end_P = jnp.sum(behind_B < high_P[:, None], axis=1, dtype=jnp.int32) + 1
    end_P = jnp.where(low_P < high_P, end_P, first_P)
    return Schedule(start_B, jnp.stack([first_P, end_P, low_P, high_P], axis=1))


def share(total: Array, parts: int) -> Array:
    """Blocks of each part but the last: the total divided, rounded up."""
    return (total + (parts - 1)) // parts
