"""A schedule in lockstep: one row of numbers for each tick and rank, all that an SPMD program that scans them needs.

In one tick a rank reads the messages that its action needs, computes, exchanges with its neighbours, and keeps what has
come: a message may come into the slot that was read in the same tick. The two passes of a pair never share a slot: what
one saves may be written before, while or after the other reads. Each ring has as few slots as that allows, and as many
on all ranks.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from sharding.pipeline.actions import Action, Kind
from sharding.pipeline.flow import earliest, makes
from sharding.pipeline.schedule import Schedule


class Col(IntEnum):
    """Columns of a row; -1 is none in every one of them but the first."""

    KIND = 0
    F_CHUNK = 1
    F_MICRO = 2
    B_CHUNK = 3
    B_MICRO = 4
    F_STAGE = 5
    """Stage that the forward pass is of."""
    B_STAGE = 6
    """Stage that the backward pass or the ``W`` is of."""
    F_IN = 7
    """Activation slot that the forward pass reads; none on the first stage, which reads tokens."""
    F_SAVE = 8
    """Residual slot that the forward pass writes."""
    F_SAVE_FIRST = 9
    """Slot for what only the first stage saves (embedding, dense layers); none on other stages."""
    F_SAVE_LAST = 10
    """Slot for what only the last stage saves (head, MTP); none on other stages."""
    B_IN = 11
    """Gradient slot that the backward pass reads; none on the last stage, which has the loss."""
    B_SAVED = 12
    """Residual slot that the backward pass reads."""
    B_SAVED_FIRST = 13
    """The same."""
    B_SAVED_LAST = 14
    DEFERRED = 15
    """Slot that a ``BX`` writes and its ``W`` reads."""
    ACT_PREV = 16
    """Activation slot for what the exchange of this tick brings from the previous rank, of chunk 0."""
    ACT_NEXT = 17
    """The same from the next rank, of chunk 1."""
    ACT_SELF = 18
    """The same from this rank's own chunk 0 for its chunk 1: the turn of the V."""
    GRAD_PREV = 19
    """Gradient slot for what comes from the previous rank, of chunk 1."""
    GRAD_NEXT = 20
    """The same from the next rank, of chunk 0."""
    GRAD_SELF = 21
    """The same from this rank's own chunk 1 for its chunk 0."""


ARRIVALS = (Col.ACT_PREV, Col.ACT_NEXT, Col.ACT_SELF, Col.GRAD_PREV, Col.GRAD_NEXT, Col.GRAD_SELF)
"""Columns of :attr:`Table.arrivals`."""

_IDLE = np.asarray([Kind.IDLE] + [-1] * (len(Col) - 1), np.int32)


class Slots(NamedTuple):
    """Slots that each ring needs. A ring that is 0 is not needed.

    Written with one slot more, a ring takes what index -1 writes (NumPy's last) and nobody reads it.
    """

    activation: int
    """Incoming activations, from their arrival to their forward pass."""
    gradient: int
    """Incoming gradients, from their arrival to their backward pass."""
    residual: int
    """What a forward pass saves for its backward pass, of any stage."""
    first: int
    """What the first stage alone saves."""
    last: int
    """What the last stage alone saves."""
    deferred: int
    """What a ``BX`` leaves for its ``W``, of any stage. What the ends alone compute makes its weights' gradients at
    once: nobody waits for the first stage's input, and the last stage's loss comes with its gradients."""


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule in lockstep."""

    schedule: Schedule
    rows: np.ndarray
    """int32 [ticks, ranks, len(Col)]."""
    arrivals: np.ndarray
    """int32 [ticks, ranks, 6]: micro-batch that each of :data:`ARRIVALS` is of, or -1. For reading and tests."""
    slots: Slots
    lag: int
    """Ticks from a message's computation to its first use on the neighbour."""

    @property
    def ticks(self) -> int:
        """Length."""
        return self.rows.shape[0]

    @property
    def actions(self) -> np.ndarray:
        """int32 [ticks, ranks, 5]: the :class:`Action` of each tick."""
        return self.rows[..., :5]

    @property
    def channels(self) -> np.ndarray:
        """bool [ticks, 6]: whether any rank gets anything in that column of :data:`ARRIVALS` in that tick."""
        return (self.rows[..., ARRIVALS[0] :] >= 0).any(axis=1)

    def padded(self, ticks: int) -> np.ndarray:
        """``rows`` with idle ticks at the end, ``ticks`` in all.

        Raises:
            ValueError: the table is longer.
        """
        if ticks < self.ticks:
            raise ValueError(f"a table of {self.ticks} ticks does not go into {ticks}")
        idle = np.broadcast_to(_IDLE, (ticks - self.ticks, *self.rows.shape[1:]))
        return np.concatenate([self.rows, idle])


def table(schedule: Schedule, lag: int = 1) -> Table:
    """The schedule in as few ticks as its order and its dependencies allow, each action as early as it can be.

    Args:
        schedule: a valid one.
        lag: ticks from a computation to its first use on a neighbour. 1: the exchange comes after the computation of
            its tick. 2: it runs beside the computation of the next tick, from a buffer that the scan carries, and
            arrives at that tick's end. What stays on a rank takes one tick in either.

    Raises:
        ValueError: ranks wait for each other for ever.
    """
    if lag not in (1, 2):
        raise ValueError(f"lag = {lag} must be 1 or 2")
    ticks = _ticks(schedule, lag)
    length = 1 + max(max(rank.values()) for rank in ticks)
    rows = np.broadcast_to(_IDLE, (length, schedule.ranks, len(Col))).copy()
    for rank, when in enumerate(ticks):
        for action, tick in when.items():
            row = rows[tick, rank]
            row[:5] = action
            for chunk, stage in ((Col.F_CHUNK, Col.F_STAGE), (Col.B_CHUNK, Col.B_STAGE)):
                if row[chunk] >= 0:
                    row[stage] = schedule.stage_of[rank][row[chunk]]
    lives = _lives(schedule, ticks, lag)
    arrivals = np.full((length, schedule.ranks, len(ARRIVALS)), -1, np.int32)
    for ring in (lives["activation"], lives["gradient"]):
        for life in ring:
            arrivals[life.put, life.rank, ARRIVALS.index(life.put_column)] = life.micro
    messages = ("activation", "gradient")
    slots = {name: _fill(rows, ring, at_once=name in messages) for name, ring in lives.items()}
    return Table(schedule, rows, arrivals, Slots(**slots), lag)


def _ticks(schedule: Schedule, lag: int) -> list[dict[Action, int]]:
    """The tick of each action, by rank."""
    spans = earliest(schedule, lambda rank, action: 1.0, lag - 1.0)
    return [
        {action: int(start) for action, (start, _) in zip(actions, rank, strict=True)}
        for actions, rank in zip(schedule.actions, spans, strict=True)
    ]


class _Life(NamedTuple):
    """One use of a slot: where and when it is written and read."""

    rank: int
    put: int
    put_column: Col
    reads: tuple[tuple[int, Col], ...]
    """Ticks and columns, in order."""
    micro: int


def _lives(schedule: Schedule, ticks: list[dict[Action, int]], lag: int) -> dict[str, list[_Life]]:
    """By ring of :class:`Slots`."""
    done = {"F": {}, "B": {}, "W": {}}
    for rank, when in enumerate(ticks):
        for action, tick in when.items():
            for what, stage, micro in makes(schedule, rank, action):
                done[what][stage, micro] = tick
            if action.kind == Kind.W:
                done["W"][schedule.stage_of[rank][action.b_chunk], action.b_micro] = tick
    lives: dict[str, list[_Life]] = {name: [] for name in Slots._fields}
    last = schedule.n_stages - 1
    for (stage, micro), f in done["F"].items():
        rank, _ = schedule.chunk_of(stage, micro)
        b, w = done["B"][stage, micro], done["W"].get((stage, micro))
        if stage > 0:
            way, delay = _way(schedule, stage - 1, rank, micro, lag)
            lives["activation"].append(
                _Life(rank, done["F"][stage - 1, micro] + delay, Col["ACT_" + way], ((f, Col.F_IN),), micro)
            )
        if stage < last:
            way, delay = _way(schedule, stage + 1, rank, micro, lag)
            lives["gradient"].append(
                _Life(rank, done["B"][stage + 1, micro] + delay, Col["GRAD_" + way], ((b, Col.B_IN),), micro)
            )
        for name, suffix, there in (("", "", True), ("first", "_FIRST", stage == 0), ("last", "_LAST", stage == last)):
            if not there:
                continue
            reads = ((b, Col["B_SAVED" + suffix]),)
            lives[name or "residual"].append(_Life(rank, f, Col["F_SAVE" + suffix], reads, micro))
        if w is not None:
            lives["deferred"].append(_Life(rank, b, Col.DEFERRED, ((w, Col.DEFERRED),), micro))
    return lives


def _way(schedule: Schedule, source: int, rank: int, micro: int, lag: int) -> tuple[str, int]:
    """Where a message from stage ``source`` comes from, and in how many ticks after its computation it arrives."""
    sender, _ = schedule.chunk_of(source, micro)
    return ("SELF", 0) if sender == rank else ("PREV" if sender < rank else "NEXT", lag - 1)


def _fill(rows: np.ndarray, lives: list[_Life], *, at_once: bool) -> int:
    """Give each use the lowest slot that is free, write it into the rows, and count the slots.

    Uses are intervals, for which this takes as few slots as are in use at one time. ``at_once``: a slot can be written
    in the tick that it is read in.
    """
    free_from: dict[int, list[int]] = {}
    for life in sorted(lives, key=lambda life: life.put):
        ends = free_from.setdefault(life.rank, [])
        slot = next((i for i, end in enumerate(ends) if end < life.put + at_once), len(ends))
        ends[slot : slot + 1] = [life.reads[-1][0]]
        for tick, column in ((life.put, life.put_column), *life.reads):
            rows[tick, life.rank, column] = slot
    return max(map(len, free_from.values()), default=0)
