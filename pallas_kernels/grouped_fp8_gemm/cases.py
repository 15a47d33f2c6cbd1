"""Shapes of the grouped products: those that DeepGEMM's bench times, bench_3b's expert layers, and awkward ones."""

import dataclasses
from typing import Literal

import numpy as np

from pallas_kernels.fp8_gemm.reference import BLOCK


@dataclasses.dataclass(frozen=True)
class Case:
    """One grouped product.

    Attributes:
        operation: ``"contiguous"``, ``"masked"``, or ``"wgrad"`` with an array to add to.
        rows_of_group: tokens of each group.
        columns: N.
        dim_k: K.
        max_rows: M of the masked form, 0 elsewhere.
        spare: blocks after those in use (contiguous and wgrad).
        peer_us: DeepGEMM 2.6.1 on an H200, sustained, microseconds (see ``fp8_gemm/cases.py``).
        peer_burst_us: the same, kernel time with a cold L2.
    """

    operation: Literal["contiguous", "masked", "wgrad"]
    rows_of_group: tuple[int, ...]
    columns: int
    dim_k: int
    max_rows: int = 0
    spare: int = 0
    peer_us: float | None = None
    peer_burst_us: float | None = None

    @property
    def name(self) -> str:
        """Such as ``contiguous/8x4096/4096/7168``: groups x rows (of the first, if they differ), N, K."""
        rows = self.max_rows or self.rows_of_group[0]
        return f"{self.operation}/{len(self.rows_of_group)}x{rows}/{self.columns}/{self.dim_k}"

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.rows_of_group)

    @property
    def used_blocks(self) -> int:
        """Blocks that hold rows."""
        return sum(-(-rows // BLOCK) for rows in self.rows_of_group)

    @property
    def rows(self) -> int:
        """M with padding and spare blocks (contiguous and wgrad)."""
        return BLOCK * (self.used_blocks + self.spare)

    @property
    def flops(self) -> int:
        """Operations of one product over the rows that are not padding."""
        return 2 * sum(self.rows_of_group) * self.columns * self.dim_k

    @property
    def moved_bytes(self) -> int:
        """Bytes of operands and result once each; a weight gradient's result is read and written."""
        m, n, k, groups = sum(self.rows_of_group), self.columns, self.dim_k, self.num_groups
        if self.operation == "wgrad":
            return m * (k + n) * 33 // 32 + 8 * groups * k * n
        return m * k * 33 // 32 + groups * n * k + 2 * m * n

    def group_of_block(self) -> np.ndarray:
        """Group of each block, int32; spare blocks name the last group."""
        blocks = [-(-rows // BLOCK) for rows in self.rows_of_group]
        used = np.repeat(np.arange(self.num_groups, dtype=np.int32), blocks)
        return np.concatenate([used, np.full(self.spare, self.num_groups - 1, np.int32)])

    def row_mask(self) -> np.ndarray:
        """Bool [M]: True where the row is not padding (contiguous and wgrad)."""
        mask = np.zeros(self.rows, bool)
        row = 0
        for rows in self.rows_of_group:
            mask[row : row + rows] = True
            row += -(-rows // BLOCK) * BLOCK
        return mask


_CONTIGUOUS = (
    # groups, rows of each, N, K, sustained and cold-L2 microseconds of DeepGEMM
    (4, 8192, 4096, 7168, 1584.0, 1476.0),
    (4, 8192, 7168, 2048, 850.5, 800.1),
    (8, 4096, 4096, 7168, 1580.2, 1433.3),
    (8, 4096, 7168, 2048, 811.9, 830.8),
    (64, 1536, 1536, 2048, 531.8, 512.8),
    (64, 1536, 2048, 768, 337.7, 316.8),
)
_MASKED = (
    (1, 1024, 4096, 7168, 55.1, 52.1),
    (1, 1024, 7168, 2048, 33.4, 34.5),
    (2, 512, 4096, 7168, 57.3, 58.1),
    (2, 512, 7168, 2048, 34.4, 35.4),
    (4, 256, 4096, 7168, 63.4, 63.6),
    (4, 256, 7168, 2048, 36.4, 39.4),
)
_WGRAD = (
    # here the two sizes are those of the result; DeepGEMM's M is our N
    (4, 8192, 4096, 7168, 2234.7, 2034.5),
    (4, 8192, 7168, 2048, 1152.2, 1057.6),
    (8, 4096, 4096, 7168, 2333.4, 2080.4),
    (8, 4096, 7168, 2048, 1198.5, 1081.2),
)


def _cases(operation: Literal["contiguous", "masked", "wgrad"], table: tuple[tuple, ...]) -> tuple[Case, ...]:
    return tuple(
        Case(
            operation,
            (rows,) * groups,
            columns,
            dim_k,
            max_rows=rows if operation == "masked" else 0,
            peer_us=sustained,
            peer_burst_us=burst,
        )
        for groups, rows, columns, dim_k, sustained, burst in table
    )


CONTIGUOUS = _cases("contiguous", _CONTIGUOUS)
MASKED = _cases("masked", _MASKED)
WGRAD = _cases("wgrad", _WGRAD)
BENCHED = CONTIGUOUS + MASKED + WGRAD

SMALL = (
    Case("contiguous", (5, 130, 0, 1), 24, 136, spare=1),
    Case("masked", (3, 0, 8), 130, 256, max_rows=8),
    Case("wgrad", (0, 130, 4, 0), 24, 40, spare=1),
)
"""For the portable implementation: ragged and empty groups, spare blocks."""

RAGGED = (
    Case("contiguous", (700, 0, 1, 2050, 128, 1153, 0), 1536, 768, spare=5),
    Case("contiguous", (0, 1, 4000), 576, 7168, spare=2),
    Case("masked", (0, 1, 64, 65, 130, 256), 1536, 896, max_rows=256),
    Case("masked", (3, 20, 64), 2048, 640, max_rows=64),
    Case("wgrad", (700, 0, 1, 2050, 128, 1153, 0), 1536, 768, spare=5),
    Case("wgrad", (0, 1, 4000), 576, 2112, spare=2),
)
"""For the kernels on a GPU."""
