"""Fewer weight gradients that wait at one time: memory against a little time."""

from collections import deque
from collections.abc import Iterable, Iterator

from sharding.pipeline.actions import DEFERRING, Action, Kind, weight

UNBOUNDED = -1
"""As many may wait as the schedule puts off."""

_AT_ONCE = {Kind.BX: Kind.B, Kind.FBX: Kind.FB}


def bounded(actions: Iterable[Action], most: int) -> Iterator[Action]:
    """A rank's list in which at most ``most`` weight gradients wait at any time.

    Where one more would, the oldest is made first: while the rank waits for the gradient of the pass that follows, that
    costs no time. A ``W`` of the list that finds nothing to do is left out. With 0 nothing is put off.

    Args:
        actions: the list.
        most: how many; :data:`UNBOUNDED` leaves the list as it is.
    """
    if most == UNBOUNDED:
        yield from actions
        return
    waiting: deque[tuple[int, int]] = deque()
    for action in actions:
        if action.kind in DEFERRING and not most:
            yield action._replace(kind=_AT_ONCE[action.kind])
        elif action.kind in DEFERRING:
            if len(waiting) == most:
                yield weight(*waiting.popleft())
            waiting.append((action.b_chunk, action.b_micro))
            yield action
        elif action.kind != Kind.W:
            yield action
        elif waiting:
            yield weight(*waiting.popleft())
