"""When each action of a schedule happens, how long ranks wait, and how many passes are under way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sharding.pipeline.actions import BACKWARD, DEFERRING, FORWARD, Action, Kind
from sharding.pipeline.flow import earliest
from sharding.pipeline.schedule import Schedule
from sharding.pipeline.table import Col, Table


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch, in any unit: one number for all stages, or one for each stage of the model."""

    f: float | tuple[float, ...] = 1.0
    """A forward pass."""
    b: float | tuple[float, ...] = 2.0
    """A whole backward pass, weight gradient included."""
    w: float | tuple[float, ...] = 1.0
    """The weight gradient's part of ``b``."""
    pair: float = 1.0
    """Time of a forward and a backward pass that overlap, over the sum of the two alone: the paper's F&B is
    ``pair * (f + b)``. Below 1 where the communication of each hides under the other's computation."""
    send: float = 0.0
    """A message to a neighbour; in :func:`simulate` ranks do not wait for it unless they need it."""

    def of(self, action: Action, stages: Sequence[int]) -> float:
        """Time of an action on a rank whose chunks are those stages."""
        if action.kind == Kind.IDLE:
            return 0.0
        if action.kind == Kind.W:
            return _at(self.w, stages[action.b_chunk])
        ahead = _at(self.f, stages[action.f_chunk]) if action.kind in FORWARD else 0.0
        back = _at(self.b, stages[action.b_chunk]) if action.kind in BACKWARD else 0.0
        later = _at(self.w, stages[action.b_chunk]) if action.kind in DEFERRING else 0.0
        return (self.pair if ahead and back else 1.0) * (ahead + back) - later


def _at(cost: float | tuple[float, ...], stage: int) -> float:
    return cost[stage] if isinstance(cost, tuple) else cost


class Event(NamedTuple):
    """One action, in time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time. Passes are counted in chunks: one micro-batch in one of a rank's chunks is one."""

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]
    """By rank, in order."""

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(rank[-1].end for rank in self.events)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank works."""
        return tuple(sum(event.end - event.start for event in rank) for rank in self.events)

    @property
    def idle(self) -> tuple[float, ...]:
        """Time that each rank waits: the bubble."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Mean share of the makespan that ranks wait for."""
        return sum(self.idle) / (self.makespan * self.schedule.ranks)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Most passes of each rank whose forward has started and whose backward has not ended."""
        return tuple(max(counts) for counts in (_under_way(rank, deferred=False) for rank in self.events))

    @property
    def held(self) -> tuple[int, ...]:
        """The same with those whose weight gradient has not ended: what ranks hold something of."""
        return tuple(max(counts) for counts in (_under_way(rank, deferred=True) for rank in self.events))


def _under_way(events: Sequence[Event], *, deferred: bool) -> list[int]:
    """Passes under way during each action of a rank."""
    counts, now = [], 0
    for event in events:
        now += event.action.kind in FORWARD
        counts.append(now)
        ends = event.action.kind in BACKWARD and not (deferred and event.action.kind in DEFERRING)
        now -= ends or (deferred and event.action.kind == Kind.W)
    return counts


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Every rank does its list in order, each action as soon as its inputs are there.

    What an action makes is there at its end, and ``costs.send`` later on another rank. A pair starts when the inputs of
    both its passes are there.

    Raises:
        ValueError: ranks wait for each other for ever, or there are not as many costs as stages; one line.
    """
    costs = Costs() if costs is None else costs
    _check(schedule, costs)
    spans = earliest(schedule, lambda rank, action: costs.of(action, schedule.stage_of[rank]), costs.send)
    return Timeline(
        schedule,
        tuple(
            tuple(Event(action, *span) for action, span in zip(actions, rank, strict=True))
            for actions, rank in zip(schedule.actions, spans, strict=True)
        ),
    )


def lockstep(table: Table, costs: Costs | None = None) -> float:
    """Time of a table that is run tick by tick, neighbours meeting in every one.

    With lag 1 a tick ends when both neighbours have computed theirs and the exchange is done. With lag 2 the exchange
    is of what the tick before has computed, and runs beside the computation.

    Raises:
        ValueError: there are not as many costs as stages; one line.
    """
    costs = Costs() if costs is None else costs
    schedule = table.schedule
    _check(schedule, costs)
    now = np.zeros(schedule.ranks)
    for took in _times(table, costs):
        done = now + took
        meeting = now if table.lag == 2 else done
        around = np.maximum(meeting, np.maximum(np.append(meeting[1:], 0.0), np.append(0.0, meeting[:-1])))
        now = np.maximum(done, around + costs.send)
    return float(now.max())


def _times(table: Table, costs: Costs) -> np.ndarray:
    """Time of each tick on each rank."""

    def of(cost: float | tuple[float, ...], column: Col) -> np.ndarray:
        return np.resize(np.asarray(cost), table.schedule.n_stages)[table.rows[..., column]]

    kind = table.rows[..., Col.KIND]
    ahead, back = np.isin(kind, FORWARD), np.isin(kind, BACKWARD)
    whole = of(costs.f, Col.F_STAGE) * ahead + of(costs.b, Col.B_STAGE) * back
    weight = of(costs.w, Col.B_STAGE) * (1.0 * (kind == Kind.W) - np.isin(kind, DEFERRING))
    return np.where(ahead & back, costs.pair, 1.0) * whole + weight


def bubble_formula(name: str, ranks: int, costs: Costs | None = None) -> float:
    """Time that each rank waits, by the paper's table (spec 13.1), for stages that cost the same.

    Raises:
        ValueError: costs by stage; one line.
    """
    costs = Costs() if costs is None else costs
    if isinstance(costs.f, tuple) or isinstance(costs.b, tuple) or isinstance(costs.w, tuple):
        raise ValueError("the formulas of bubbles are of stages that cost the same")
    f, b, w = costs.f, costs.b, costs.w
    if name in ("gpipe", "1f1b"):
        return (ranks - 1) * (f + b)
    if name == "zb1p":
        return (ranks - 1) * (f + b - 2 * w)
    depth = ranks if name == "dualpipev" else ranks / 2
    return (depth - 1) * (costs.pair * (f + b) + b - 3 * w)


def _check(schedule: Schedule, costs: Costs) -> None:
    for name in ("f", "b", "w"):
        cost = getattr(costs, name)
        if isinstance(cost, tuple) and len(cost) != schedule.n_stages:
            raise ValueError(f"{name} has {len(cost)} costs, {schedule.name} has {schedule.n_stages} stages")
