"""Shapes of the grouped product: the models' own, and the awkward ones."""

import dataclasses

import numpy as np

from pallas_kernels.permute import num_blocks_bound


@dataclasses.dataclass(frozen=True)
class Case:
    """One grouped product: rows of each group, the weight's shape and the rows in a block.

    Attributes:
        name: for test ids and tables.
        rows_of_group: rows each group is given, before padding.
        dim_k: contraction size K.
        dim_n: columns N.
        block: rows in a block.
        spare: whether blocks past the used ones follow, as a plan's static bound leaves them.
    """

    name: str
    rows_of_group: tuple[int, ...]
    dim_k: int
    dim_n: int
    block: int
    spare: bool = True

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.rows_of_group)

    @property
    def used_blocks(self) -> int:
        """Blocks that hold rows."""
        return sum(-(-rows // self.block) for rows in self.rows_of_group)

    @property
    def num_blocks(self) -> int:
        """All blocks, the static bound of a plan where there are spare ones."""
        if not self.spare:
            return self.used_blocks
        return num_blocks_bound(sum(self.rows_of_group), self.num_groups, self.block)

    @property
    def useful_flops(self) -> int:
        """Operations of one product over the rows that are not padding."""
        return 2 * sum(self.rows_of_group) * self.dim_k * self.dim_n

    def group_of_block(self) -> np.ndarray:
        """Group of each block, int32; spare blocks name the last group."""
        blocks = [-(-rows // self.block) for rows in self.rows_of_group]
        used = np.repeat(np.arange(self.num_groups, dtype=np.int32), blocks)
        return np.concatenate([used, np.full(self.num_blocks - len(used), self.num_groups - 1, np.int32)])

    def row_mask(self) -> np.ndarray:
        """Bool [M]: True where the row is not padding."""
        mask = np.zeros(self.num_blocks * self.block, bool)
        row = 0
        for rows in self.rows_of_group:
            mask[row : row + rows] = True
            row += -(-rows // self.block) * self.block
        return mask

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random normal x [M, K] and dy [M, N], zero in padding rows, and w [G, K, N] / sqrt(K); float32."""
        rng = np.random.default_rng(seed)
        mask = self.row_mask()[:, None]
        x = mask * rng.standard_normal((len(mask), self.dim_k), np.float32)
        w = rng.standard_normal((self.num_groups, self.dim_k, self.dim_n), np.float32) / np.float32(self.dim_k**0.5)
        dy = mask * rng.standard_normal((len(mask), self.dim_n), np.float32)
        return x, w, dy


TINY = Case("tiny", (5, 9, 3, 7), 16, 24, 8)
ODD = Case("odd", (1, 13, 4), 7, 5, 3)
EMPTY_GROUP = Case("empty_group", (0, 6, 0, 10, 0), 12, 8, 4)
SINGLE_ROW = Case("single_row", (0, 1), 8, 8, 4)
ONE_GROUP = Case("one_group", (12,), 8, 16, 4, spare=False)
CHUNKED = Case("chunked", (130,) * 4, 512, 1200, 8)
"""Large enough that the XLA path goes through its weights in chunks."""

SMALL = (TINY, ODD, EMPTY_GROUP, SINGLE_ROW, ONE_GROUP)

TRAINING = Case("training", (1024,) * 16, 128, 128, 64)
"""A small model's layer: 4096 tokens, 4 of 16 experts."""

BENCH_3B_UP = Case("bench_3b_up", (1536,) * 64, 2048, 1536, 128)
BENCH_3B_DOWN = Case("bench_3b_down", (1536,) * 64, 768, 2048, 128)
V3_UP = Case("v3_up", (4096,) * 8, 7168, 4096, 128)
V3_DOWN = Case("v3_down", (4096,) * 8, 2048, 7168, 128)
V3_UP_32 = Case("v3_up_32", (1024,) * 32, 7168, 4096, 128)
V3_DOWN_32 = Case("v3_down_32", (1024,) * 32, 2048, 7168, 128)

BENCHED = (BENCH_3B_UP, BENCH_3B_DOWN, V3_UP, V3_DOWN, V3_UP_32, V3_DOWN_32)
