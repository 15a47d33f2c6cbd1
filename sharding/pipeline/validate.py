"""What every schedule must keep: each pass once, in an order that can be done, within a bound of passes under way."""

from collections import Counter, deque

from sharding.pipeline.actions import BACKWARD, DEFERRING, FORWARD, Action, Kind
from sharding.pipeline.schedule import Schedule
from sharding.pipeline.simulate import simulate
from sharding.pipeline.waiting import UNBOUNDED

_PARTS = {
    Kind.F: (True, False),
    Kind.B: (False, True),
    Kind.BX: (False, True),
    Kind.W: (False, True),
    Kind.FB: (True, True),
    Kind.FBX: (True, True),
}
"""Whether an action names a forward pass, and a backward pass."""


def validate(schedule: Schedule) -> None:
    """Check a schedule by its lists alone.

    Every stage has one forward and one backward pass of every micro-batch, on the rank and chunk that hold it; weight
    gradients that were put off are made once each, the oldest first, and no more of them wait at one time than the
    schedule says; some order in time does all of it; and no rank has more passes under way than
    :func:`in_flight_bound`.

    Raises:
        ValueError: the first of these that does not hold; one line.
    """
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            _check_action(schedule, rank, action)
        _check_weights(schedule, rank, actions)
    _check_passes(schedule)
    timeline = simulate(schedule)
    for rank, (under_way, held) in enumerate(zip(timeline.in_flight, timeline.held, strict=True)):
        bound, bound_held = in_flight_bound(schedule, rank)
        if under_way > bound:
            raise ValueError(f"{_at(schedule, rank)}: {under_way} passes are under way, at most {bound} may be")
        if held > bound_held:
            raise ValueError(
                f"{_at(schedule, rank)}: {held} passes are under way or wait for weight gradients, "
                f"at most {bound_held} may"
            )


def in_flight_bound(schedule: Schedule, rank: int) -> tuple[int, int]:
    """Most passes that a rank may have under way, and most with those whose weight gradient waits (spec 13.1)."""
    ranks, micro_batches = schedule.ranks, schedule.micro_batches
    if schedule.name == "gpipe":
        return micro_batches, micro_batches
    if schedule.name in ("1f1b", "zb1p"):
        ahead = min(ranks - rank, micro_batches)
        return ahead, ahead if schedule.name == "1f1b" else min(ranks, micro_batches)
    return schedule.n_stages + 1, schedule.n_stages + 1


def _at(schedule: Schedule, rank: int) -> str:
    return f"{schedule.name} of {schedule.ranks} ranks and {schedule.micro_batches} micro-batches, rank {rank}"


def _check_action(schedule: Schedule, rank: int, action: Action) -> None:
    if action.kind not in _PARTS:
        raise ValueError(f"{_at(schedule, rank)}: {action} is no action of a list")
    ahead, back = (action.f_chunk, action.f_micro), (action.b_chunk, action.b_micro)
    for (chunk, micro), named in zip((ahead, back), _PARTS[action.kind], strict=True):
        if not named and (chunk, micro) != (-1, -1):
            raise ValueError(f"{_at(schedule, rank)}: {action} names a pass that it does not do")
        if named and not (0 <= chunk < schedule.chunks and 0 <= micro < schedule.micro_batches):
            raise ValueError(f"{_at(schedule, rank)}: {action} names a chunk or micro-batch that is not there")
        if named and schedule.chunk_of(schedule.stage_of[rank][chunk], micro) != (rank, chunk):
            raise ValueError(f"{_at(schedule, rank)}: {action} is of a micro-batch that does not pass this chunk")


def _check_weights(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    waiting: deque[tuple[int, int]] = deque()
    for action in actions:
        if action.kind in DEFERRING:
            waiting.append((action.b_chunk, action.b_micro))
            if schedule.waiting != UNBOUNDED and len(waiting) > schedule.waiting:
                raise ValueError(
                    f"{_at(schedule, rank)}: after {action} {len(waiting)} weight gradients wait, "
                    f"at most {schedule.waiting} may"
                )
        elif action.kind == Kind.W:
            if not waiting:
                raise ValueError(f"{_at(schedule, rank)}: {action} has no weight gradient to make")
            oldest = waiting.popleft()
            if oldest != (action.b_chunk, action.b_micro):
                raise ValueError(f"{_at(schedule, rank)}: {action} comes before that of chunk and micro-batch {oldest}")
    if waiting:
        raise ValueError(f"{_at(schedule, rank)}: the weight gradient of chunk and micro-batch {waiting[0]} is missing")


def _check_passes(schedule: Schedule) -> None:
    for kinds, what in ((FORWARD, "forward"), (BACKWARD, "backward")):
        counts: Counter[tuple[int, int]] = Counter()
        for rank, actions in enumerate(schedule.actions):
            for action in actions:
                if action.kind in kinds:
                    ahead = what == "forward"
                    chunk, micro = (action.f_chunk, action.f_micro) if ahead else (action.b_chunk, action.b_micro)
                    counts[schedule.stage_of[rank][chunk], micro] += 1
        for stage in range(schedule.n_stages):
            for micro in range(schedule.micro_batches):
                if counts[stage, micro] != 1:
                    raise ValueError(
                        f"{schedule.name}: stage {stage} has {counts[stage, micro]} {what} passes "
                        f"of micro-batch {micro}, not one"
                    )
