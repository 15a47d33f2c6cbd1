"""Runs a schedule inside ``shard_map``: a loop over the ticks of its table, each rank doing what its row says.

The executor knows messages, rings and kinds of action; what a forward or a backward pass is, it is told. Branches hold
no exchange between stages: those stand after them, for all ranks alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sharding.pipeline.actions import BACKWARD, FORWARD, Kind
from sharding.pipeline.stack import put, take, zeros
from sharding.pipeline.table import ARRIVALS, Col, Table

Row = Int[Array, " C"]
"""A rank's row of a table: see :class:`~sharding.pipeline.table.Col`."""


class Stage(ABC):
    """What the ranks of a pipeline compute. ``memory`` is a tree of arrays that goes from action to action: rings of
    what was kept, gradients, sums of losses. A message is an array of one shape, forward and backward."""

    @abstractmethod
    def forward(self, memory: Any, x: Array, row: Row) -> tuple[Any, Array]:
        """``(memory, y)``; ``x`` is of no meaning on the first stage."""

    @abstractmethod
    def backward(self, memory: Any, dy: Array, row: Row) -> tuple[Any, Array]:
        """``(memory, dx)`` with all gradients added; ``dy`` is of no meaning on the last stage."""

    @abstractmethod
    def backward_input(self, memory: Any, dy: Array, row: Row) -> tuple[Any, Array]:
        """:meth:`backward` that leaves weight gradients for later."""

    @abstractmethod
    def weight_gradient(self, memory: Any, row: Row) -> Any:
        """``memory`` with those added."""

    @abstractmethod
    def both(self, memory: Any, x: Array, dy: Array, row: Row) -> tuple[Any, Array, Array]:
        """``(memory, y, dx)`` of a forward pass and a :meth:`backward` of another micro-batch, overlapped."""


class Plan(NamedTuple):
    """What of a table is fixed when the program is compiled; the rows are not."""

    ranks: int
    kinds: tuple[Kind, ...]
    """Kinds of action there are."""
    channels: tuple[bool, ...]
    """Whether any rank gets anything in each of :data:`~sharding.pipeline.table.ARRIVALS`."""
    activation: int
    """Slots of the ring of incoming activations."""
    gradient: int
    """Slots of the ring of incoming gradients."""


def plan_of(table: Table) -> Plan:
    """The plan of a program that can run ``table``, and any with no more kinds, channels and slots."""
    kinds = tuple(Kind(kind) for kind in np.unique(table.rows[..., Col.KIND]))
    channels = tuple(bool(used) for used in table.channels.any(axis=0))
    return Plan(table.schedule.ranks, kinds, channels, table.slots.activation, table.slots.gradient)


def execute(
    stage: Stage, plan: Plan, rows: Int[Array, "ticks ranks C"], ticks: Int[Array, ""], memory: Any, message: Any
) -> Any:
    """``memory`` after ``ticks`` ticks of the table ``rows``; called per device inside ``shard_map``.

    Args:
        stage: what a rank computes.
        plan: of the table, or of the largest of several that one program is compiled for.
        rows: :attr:`~sharding.pipeline.table.Table.rows`, a traced array, the same on all ranks.
        ticks: how many of them count.
        memory: what the stage starts with.
        message: shape and dtype of what goes from stage to stage.
    """
    rank = lax.axis_index("pipe")
    nothing = jnp.zeros(message.shape, message.dtype)
    branches = [_branch(stage, kind, nothing) for kind in plan.kinds]
    branch_of = np.zeros(len(Kind), np.int32)
    branch_of[list(plan.kinds)] = np.arange(len(plan.kinds))

    def tick(now: Int[Array, ""], carry: Any) -> Any:
        memory, rings = carry
        row = take(rows, now, rank)
        x, dy = take(rings[0], row[Col.F_IN]), take(rings[1], row[Col.B_IN])
        memory, y, dx = lax.switch(jnp.asarray(branch_of)[row[Col.KIND]], branches, memory, x, dy, row)
        return memory, _deliver(plan, rings, y, dx, row)

    rings = zeros((plan.activation + 1,), message), zeros((plan.gradient + 1,), message)
    return lax.fori_loop(0, ticks, tick, (memory, rings))[0]


def _branch(stage: Stage, kind: Kind, nothing: Array) -> Callable[..., tuple[Any, Array, Array]]:
    """One kind of action as ``(memory, x, dy, row) -> (memory, y, dx)``."""

    def run(memory: Any, x: Array, dy: Array, row: Row) -> tuple[Any, Array, Array]:
        with jax.named_scope(kind.name):
            if kind == Kind.FB:
                return stage.both(memory, x, dy, row)
            y = dx = nothing
            if kind in FORWARD:
                memory, y = stage.forward(memory, x, row)
            if kind in BACKWARD:
                back = stage.backward if kind == Kind.B else stage.backward_input
                memory, dx = back(memory, dy, row)
            if kind == Kind.W:
                memory = stage.weight_gradient(memory, row)
            return memory, y, dx

    return run


def _deliver(plan: Plan, rings: tuple[Array, Array], y: Array, dx: Array, row: Row) -> tuple[Array, Array]:
    """The tick's exchange between neighbours, and the rings with what came."""
    activations, gradients = rings
    for used, column in zip(plan.channels, ARRIVALS, strict=True):
        if not used:
            continue
        is_activation = column.name.startswith("ACT")
        came = _moved(y if is_activation else dx, column, plan.ranks)
        if is_activation:
            activations = put(activations, came, row[column])
        else:
            gradients = put(gradients, came, row[column])
    return activations, gradients


def _moved(payload: Array, column: Col, ranks: int) -> Array:
    """What comes from the previous or the next rank, or stays."""
    if column.name.endswith("SELF"):
        return payload
    step = 1 if column.name.endswith("PREV") else -1
    pairs = [(rank, rank + step) for rank in range(ranks) if 0 <= rank + step < ranks]
    return lax.ppermute(payload, "pipe", pairs)
