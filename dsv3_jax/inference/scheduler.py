"""What the next step computes: one more round for every running sequence, and prompts with what is left of the budget.

Sequences are served in the order in which they came. When pages run out, the youngest one gives all of its back and
waits at the head of the line, to be computed anew.
"""

import dataclasses
from collections import deque

from dsv3_jax.inference.block_manager import BlockManager
from dsv3_jax.inference.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of a sequence, to be read into its pages."""

    sequence: Sequence
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step's work."""

    prefill: list[Chunk]
    decode: list[Sequence]
    preempted: list[Sequence]
    """Sequences that gave their pages back for it."""


class Scheduler:
    """Line and running sequences.

    Args:
        blocks: the pages.
        max_batch: sequences that run at a time.
        token_budget: tokens a step computes at most, one for every sequence that writes among them.
        chunk: tokens of one prompt that a step reads at most.
        reach: tokens that a sequence may write in one step, drafted ones among them.
    """

    def __init__(self, blocks: BlockManager, *, max_batch: int, token_budget: int, chunk: int, reach: int):
        self.blocks, self.max_batch, self.token_budget = blocks, max_batch, token_budget
        self.chunk, self.reach = chunk, reach
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._slots = list(range(max_batch - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """To the end of the line."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that has ended, or that nobody wants any more, gives everything back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """The next step's work; pages for it are taken."""
        preempted: list[Sequence] = []
        decode: list[Sequence] = []
        for sequence in list(self.running):
            if sequence in self.running and sequence.prefilled and self._reserve(sequence, preempted):
                decode.append(sequence)
        budget = self.token_budget - len(decode)
        prefill: list[Chunk] = []
        for sequence in self.running:
            if not sequence.prefilled and budget > 0:
                budget -= self._read(sequence, budget, prefill)
        # Who was set aside in this step is not taken back in the same.
        while not preempted and budget > 0 and self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            sequence.pages = self.blocks.share(sequence.tokens)
            shared = len(sequence.pages)
            wanted = self.blocks.pages_for(len(sequence.tokens))
            # A page for each that runs is left free, lest one taken in is set aside again at once.
            if self.blocks.free - wanted + shared < len(self.running) or not self.blocks.extend(sequence.pages, wanted):
                self.blocks.release(sequence.pages)
                break
            self.running.append(self.waiting.popleft())
            sequence.computed = shared * self.blocks.page_size
            if sequence.slot < 0:  # the first time: later it finds what it computed itself
                sequence.shared = sequence.computed
            sequence.slot = self._slots.pop()
            if not sequence.prefilled:
                budget -= self._read(sequence, budget, prefill)
        return Plan(prefill, decode, preempted)

    def _read(self, sequence: Sequence, budget: int, prefill: list[Chunk]) -> int:
        start = sequence.computed
        stop = min(len(sequence.tokens) - 1, start + min(self.chunk, budget))
        prefill.append(Chunk(sequence, start, stop))
        return stop - start

    def _reserve(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Pages for what the sequence may write; the youngest give theirs until there are enough."""
        wanted = self.blocks.pages_for(min(len(sequence.tokens) + self.reach, sequence.end))
        while not self.blocks.extend(sequence.pages, wanted):
            youngest = self.running[-1]
            self.running.pop()
            self._leave(youngest)
            youngest.computed, youngest.published = 0, (0, 0)
            self.waiting.appendleft(youngest)
            preempted.append(youngest)
            if youngest is sequence:
                return False
        return True

    def _leave(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        self._slots.append(sequence.slot)
