"""Runs a schedule inside ``shard_map``: a loop over the ticks of its table, each rank doing what its row says.

The executor knows messages and rings; what a forward or a backward pass is, it is told. A tick's computation holds no
exchange between stages: that comes after it, for all ranks alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def plan_of(*tables: Table) -> Plan:
    """The plan of a program that can run each of ``tables``, and whatever needs no more than they do."""
    kinds = frozenset(Kind(kind) for one in tables for kind in np.unique(one.rows[..., Col.KIND]))
    channels = np.any([one.channels.any(axis=0) for one in tables], axis=0)
    slots = Slots(*(max(counts) for counts in zip(*(one.slots for one in tables), strict=True)))
    ticks = max(one.ticks for one in tables)
    return Plan(tables[0].schedule.ranks, kinds, tuple(map(bool, channels)), slots, ticks)


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
        memory, rings = carry
        row = take(rows, now, rank)
        memory, y, dx = tick(memory, take(rings[0], row[Col.F_IN]), take(rings[1], row[Col.B_IN]), row)
        return memory, _deliver(plan, rings, y, dx, row)

    rings = tuple(ring((count + 1,), message) for count in (plan.slots.activation, plan.slots.gradient))
    return lax.fori_loop(0, ticks, turn, (memory, rings))[0]


def _deliver(plan: Plan, rings: tuple[Array, Array], y: Array, dx: Array, row: Array) -> tuple[Array, Array]:
    """The tick's exchange between neighbours, and the rings with what came."""
    activations, gradients = rings
    for used, column in zip(plan.channels, ARRIVALS, strict=True):
        if used and column.name.startswith("ACT"):
            activations = put(activations, _moved(y, column, plan.ranks), row[column])
        elif used:
            gradients = put(gradients, _moved(dx, column, plan.ranks), row[column])
    return activations, gradients


def _moved(payload: Array, column: Col, ranks: int) -> Array:
    """What comes from the previous or the next rank, or stays."""
    if column.name.endswith("SELF"):
        return payload
    step = 1 if column.name.endswith("PREV") else -1
    pairs = [(rank, rank + step) for rank in range(ranks) if 0 <= rank + step < ranks]
    return lax.ppermute(payload, "pipe", pairs)
