"""Runs a schedule inside ``shard_map``: a loop over the ticks of its table, each rank doing what its row says.

The executor knows messages and rings; what a forward or a backward pass is, it is told. A tick's computation holds no
exchange between stages: that comes after it, for all ranks alike, or, with lag 2, runs beside the next tick's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sharding.pipeline.actions import Kind
from sharding.pipeline.stack import put, ring, take
from sharding.pipeline.table import ARRIVALS, Col, Slots, Table

Tick = Callable[[Any, Array, Array, Array], tuple[Any, Array, Array]]
"""``(memory, x, dy, row) -> (memory, y, dx)``: what a rank computes in a tick.

``memory`` is any tree of arrays; ``x`` and ``dy`` are what came for the row's forward and backward pass, if it has them
and they are not of the pipeline's end; ``row`` is :class:`~sharding.pipeline.table.Col` by column."""


class Plan(NamedTuple):
    """What of a table is fixed when the program is compiled; the rows are not."""

    ranks: int
    kinds: frozenset[Kind]
    """Kinds of action there are."""
    channels: tuple[bool, ...]
    """Whether any rank gets anything in each of :data:`~sharding.pipeline.table.ARRIVALS`."""
    slots: Slots
    """Of every ring."""
    ticks: int
    """Rows that the program is given."""
    lag: int
    """See :func:`~sharding.pipeline.table.table`."""


def plan_of(*tables: Table) -> Plan:
    """The plan of a program that can run each of ``tables``, and whatever needs no more than they do."""
    kinds = frozenset(Kind(kind) for one in tables for kind in np.unique(one.rows[..., Col.KIND]))
    channels = np.any([one.channels.any(axis=0) for one in tables], axis=0)
    slots = Slots(*(max(counts) for counts in zip(*(one.slots for one in tables), strict=True)))
    ticks = max(one.ticks for one in tables)
    (lag,) = {one.lag for one in tables}
    return Plan(tables[0].schedule.ranks, kinds, tuple(map(bool, channels)), slots, ticks, lag)


def execute(
    tick: Tick, plan: Plan, rows: Int[Array, "ticks ranks C"], ticks: Int[Array, ""], memory: Any, message: Any
) -> Any:
    """``memory`` after ``ticks`` ticks of the table ``rows``; called per device inside ``shard_map``.

    Args:
        tick: what a rank computes.
        plan: of the table, or of the largest of several that one program is compiled for.
        rows: :attr:`~sharding.pipeline.table.Table.rows`, a traced array, the same on all ranks.
        ticks: how many of them count.
        memory: what the first tick starts with.
        message: shape and dtype of what goes from stage to stage, forward and backward.
    """
    rank = lax.axis_index("pipe")

    def turn(now: Int[Array, ""], carry: Any) -> Any:
        memory, rings, sent = carry
        row = take(rows, now, rank)
        coming = _exchanged(plan, *sent) if plan.lag == 2 else {}
        memory, y, dx = tick(memory, take(rings[0], row[Col.F_IN]), take(rings[1], row[Col.B_IN]), row)
        coming = coming or _exchanged(plan, y, dx)
        rings = _delivered(plan, rings, coming | {Col.ACT_SELF: y, Col.GRAD_SELF: dx}, row)
        return memory, rings, (y, dx) if plan.lag == 2 else ()

    rings = tuple(ring((count + 1,), message) for count in (plan.slots.activation, plan.slots.gradient))
    nothing = jnp.zeros(message.shape, message.dtype)
    sent = (nothing, nothing) if plan.lag == 2 else ()
    return lax.fori_loop(0, ticks, turn, (memory, rings, sent))[0]


def _exchanged(plan: Plan, y: Array, dx: Array) -> dict[Col, Array]:
    """What comes from the neighbours."""
    found = {}
    for used, column in zip(plan.channels, ARRIVALS, strict=True):
        if used and not column.name.endswith("SELF"):
            step = 1 if column.name.endswith("PREV") else -1
            pairs = [(rank, rank + step) for rank in range(plan.ranks) if 0 <= rank + step < plan.ranks]
            found[column] = lax.ppermute(y if column.name.startswith("ACT") else dx, "pipe", pairs)
    return found


def _delivered(plan: Plan, rings: tuple[Array, Array], coming: dict[Col, Array], row: Array) -> tuple[Array, Array]:
    """The rings with what came."""
    activations, gradients = rings
    for used, column in zip(plan.channels, ARRIVALS, strict=True):
        if used and column.name.startswith("ACT"):
            activations = put(activations, coming[column], row[column])
        elif used:
            gradients = put(gradients, coming[column], row[column])
    return activations, gradients
