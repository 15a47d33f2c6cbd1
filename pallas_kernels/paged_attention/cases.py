"""Shapes of attention over pages: the models' own, those of the peers' tables, and the awkward ones."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of given lengths, their pages dealt out at random.

    Attributes:
        name: for test ids and tables.
        lengths: tokens of each sequence, its queries included.
        queries: T, the last tokens of each sequence.
        heads: N.
        latent: C.
        rope: R.
        page: tokens in a page, S.
        spare: entries of the table behind the longest sequence.
    """

    name: str
    lengths: tuple[int, ...]
    queries: int
    heads: int
    latent: int = 512
    rope: int = 64
    page: int = 64
    spare: int = 0

    @property
    def flops(self) -> int:
        """As FlashMLA counts them: all heads' two products over every token."""
        return 2 * sum(self.lengths) * self.queries * self.heads * (2 * self.latent + self.rope)

    def bytes(self, itemsize: int = 2) -> int:
        """Queries, cache and output once, all of ``itemsize`` bytes a number."""
        rows = len(self.lengths) * self.queries * self.heads
        return itemsize * (sum(self.lengths) * (self.latent + self.rope) + rows * (2 * self.latent + self.rope))

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Random normal queries ``[B, T, N, C]`` and ``[B, T, N, R]``, pages ``[P, S, C]`` and ``[P, S, R]``, the table
        and the first queries' positions; float32 and int32. A page that no sequence has is infinite."""
        rng = np.random.default_rng(seed)
        counts = [-(-length // self.page) for length in self.lengths]
        pages = sum(counts) + 1
        order = rng.permutation(pages - 1).astype(np.int32) + 1
        table = np.zeros((len(self.lengths), max(counts) + self.spare), np.int32)
        starts = np.cumsum([0, *counts])
        for row, count in enumerate(counts):
            table[row, :count] = order[starts[row] : starts[row] + count]
        shape = (len(self.lengths), self.queries, self.heads)
        queries = [rng.standard_normal((*shape, dim), np.float32) for dim in (self.latent, self.rope)]
        held = [rng.standard_normal((pages, self.page, dim), np.float32) for dim in (self.latent, self.rope)]
        held[0][0] = held[1][0] = np.inf
        first = np.array(self.lengths, np.int32) - self.queries
        return *queries, *held, table, first


TINY = Case("tiny", (5, 12, 1, 9), 1, 3, 12, 4, 4)
DRAFTED = Case("drafted", (6, 13), 2, 2, 12, 4, 4, spare=3)
FOUR_QUERIES = Case("four_queries", (4, 17), 4, 5, 24, 8, 8)
ONE_TOKEN = Case("one_token", (1,), 1, 1, 8, 4, 16)
WHOLE_PAGES = Case("whole_pages", (16, 8), 1, 2, 8, 4, 8)
MANY_TILES = Case("many_tiles", (7, 3), 1, 2, 300, 4, 4)
"""A latent of more than two FP8 tiles, the last not whole."""

SMALL = (TINY, DRAFTED, FOUR_QUERIES, ONE_TOKEN, WHOLE_PAGES, MANY_TILES)

V3 = Case("v3", (4096,) * 128, 1, 128)
V3_LONG = Case("v3_long", (8192,) * 128, 1, 128)
V3_DRAFTED = Case("v3_drafted", (4096,) * 128, 2, 128)
HEADS_64 = Case("heads_64", (4096,) * 128, 1, 64)
HEADS_16 = Case("heads_16", (4096,) * 128, 1, 16)
HEADS_16_DRAFTED = Case("heads_16_drafted", (4096,) * 128, 2, 16)
BENCH_3B = Case("bench_3b", (4096,) * 32, 1, 16)
BENCH_3B_SHORT = Case("bench_3b_short", (640,) * 32, 1, 16)
RAGGED = Case("ragged", tuple(range(64, 8192, 256)), 1, 128)
"""Lengths of 64 to 8,000: work must be divided by pages, not by sequences."""

BENCHED = (V3, V3_LONG, V3_DRAFTED, HEADS_64, HEADS_16, HEADS_16_DRAFTED, BENCH_3B, BENCH_3B_SHORT, RAGGED)
"""Of FlashMLA's table batch 128, the batch of 32 and what ``bench_3b`` decodes; the rest has no peer's number."""
