"""Orders of DualPipe and DualPipeV: two chunks a rank, fed from both ends, or up and down a V (spec 13.1).

Both are the same eight steps. ``near`` is the chunk whose first stage is nearer: it is the one that fills the pipeline;
``far`` is the other. What DualPipe's two halves do to each other, the V does with its two arms.
"""

from collections import deque
from dataclasses import dataclass, field

from sharding.pipeline.actions import Action, Kind, backward, forward, weight


@dataclass
class _Writer:
    """Writes one rank's list, counting the micro-batches of each chunk and those whose weight gradient waits."""

    first_micro: tuple[int, int]
    """Micro-batch that each chunk begins with."""
    actions: list[Action] = field(default_factory=list)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    waiting: deque[tuple[int, int]] = field(default_factory=deque)

    def f(self, chunk: int) -> None:
        self.actions.append(forward(chunk, self._next(self.forwards, chunk)))

    def b(self, chunk: int, *, defer: bool = False) -> None:
        micro = self._next(self.backwards, chunk)
        if defer:
            self.waiting.append((chunk, micro))
        self.actions.append(backward(chunk, micro, defer=defer))

    def w(self) -> None:
        self.actions.append(weight(*self.waiting.popleft()))

    def fb(self, f_chunk: int, b_chunk: int) -> None:
        f_micro, b_micro = self._next(self.forwards, f_chunk), self._next(self.backwards, b_chunk)
        self.actions.append(Action(Kind.FB, f_chunk, f_micro, b_chunk, b_micro))

    def _next(self, counts: list[int], chunk: int) -> int:
        counts[chunk] += 1
        return self.first_micro[chunk] + counts[chunk] - 1


def step_counts(depth: int, ranks: int, passes: int) -> tuple[int, ...]:
    """How often a rank does each of the eight steps.

    Args:
        depth: ranks between this one and the nearest end that micro-batches enter at.
        ranks: of one arm, from an end to the turn (DualPipeV) or to the middle (DualPipe).
        passes: micro-batches that go through each of the rank's chunks.
    """
    rest = ranks - depth - 1
    return 2 * rest, depth + 1, rest, passes - 2 * ranks + depth + 1, rest, depth + 1, rest, depth + 1


def dualpipe(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Chunk 0 is stage ``rank`` for the first half of the micro-batches, chunk 1 the mirror stage for the other."""
    depth, half = min(rank, ranks - 1 - rank), micro_batches // 2
    return _order(depth, ranks // 2, half, near=int(rank >= ranks // 2), first_micro=(0, half))


def dualpipev(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Chunk 0 is stage ``rank``, chunk 1 stage ``2 ranks - 1 - rank``; every micro-batch goes through both."""
    return _order(rank, ranks, micro_batches, near=0, first_micro=(0, 0))


def _order(depth: int, ranks: int, passes: int, *, near: int, first_micro: tuple[int, int]) -> list[Action]:
    counts, far, out = step_counts(depth, ranks, passes), 1 - near, _Writer(first_micro)
    for _ in range(counts[0]):
        out.f(near)
    for _ in range(counts[1]):
        out.f(near)
        out.f(far)
    for _ in range(counts[2]):
        out.b(far, defer=True)
        out.w()
        out.f(far)
    for i in range(counts[3]):
        if i == 0 and depth == ranks - 1:
            # Where the first backward pass starts from, a pair would keep it from the others for one forward pass.
            out.f(near)
            out.b(far)
        else:
            out.fb(near, far)
        out.fb(far, near)
    for _ in range(counts[4]):
        out.b(far)
        out.fb(far, near)
    for i in range(counts[5]):
        # From the middle of this step on weight gradients are put off, for the ends to be full.
        turn, odd = counts[5] // 2, depth % 2
        out.b(far, defer=i > turn or (i == turn and odd == 1))
        out.b(near, defer=i >= turn)
    for _ in range(counts[6]):
        out.w()
        out.b(near, defer=True)
    for _ in range(counts[7]):
        out.w()
    return out.actions
