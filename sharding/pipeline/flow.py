"""What waits for what in a schedule, and when each action comes if none waits for longer than it must."""

from collections import deque
from collections.abc import Callable

from sharding.pipeline.actions import BACKWARD, FORWARD, Action
from sharding.pipeline.schedule import Schedule

Pass = tuple[str, int, int]
"""``F`` or ``B``, the stage, the micro-batch."""


def needs(schedule: Schedule, rank: int, action: Action) -> list[Pass]:
    """Passes that must have ended before an action starts, on its and on other ranks."""
    found, stages = [], schedule.stage_of[rank]
    if action.kind in FORWARD and stages[action.f_chunk] > 0:
        found.append(("F", stages[action.f_chunk] - 1, action.f_micro))
    if action.kind in BACKWARD:
        stage = stages[action.b_chunk]
        found.append(("F", stage, action.b_micro))
        if stage < schedule.n_stages - 1:
            found.append(("B", stage + 1, action.b_micro))
    return found


def makes(schedule: Schedule, rank: int, action: Action) -> list[Pass]:
    """Passes that have ended with an action."""
    found, stages = [], schedule.stage_of[rank]
    if action.kind in FORWARD:
        found.append(("F", stages[action.f_chunk], action.f_micro))
    if action.kind in BACKWARD:
        found.append(("B", stages[action.b_chunk], action.b_micro))
    return found


def earliest(schedule: Schedule, time: Callable[[int, Action], float], delay: float) -> list[list[tuple[float, float]]]:
    """Start and end of every action, by rank: each rank does its list in order, each action as soon as it can.

    Args:
        schedule: what ranks do.
        time: that a rank takes for an action.
        delay: from the end of a pass on one rank to the start of what needs it on another.

    Raises:
        ValueError: ranks wait for each other for ever; one line.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in range(schedule.ranks)]
    ended: dict[Pass, tuple[int, float]] = {}
    waiting: dict[Pass, list[int]] = {}
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        mine, actions = found[rank], schedule.actions[rank]
        now = mine[-1][1] if mine else 0.0
        while len(mine) < len(actions):
            action = actions[len(mine)]
            start, missing = now, None
            for need in needs(schedule, rank, action):
                where, when = ended.get(need, (-1, 0.0))
                if where < 0:
                    missing = need
                    break
                start = max(start, when if where == rank else when + delay)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            now = start + time(rank, action)
            mine.append((start, now))
            for one in makes(schedule, rank, action):
                ended[one] = rank, now
                ready.extend(waiting.pop(one, ()))
    for rank, actions in enumerate(schedule.actions):
        if len(found[rank]) < len(actions):
            raise ValueError(f"{schedule.name}: rank {rank} waits for ever to do {actions[len(found[rank])]}")
    return found
