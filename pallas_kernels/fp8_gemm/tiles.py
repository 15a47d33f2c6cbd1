"""Which tiling a shape gets.

Where arithmetic is the cost, a product takes as long as its busiest SM: rounds of tiles, times the columns of a tile,
times what a column costs with that tiling. The costs are the table that the bench prints (``bench.py --sweep``), from
sustained times on an H200, relative to a class's first entry; the tiling with the least product is taken. Where the
weights' bytes are the cost, with few rows, tiles are chosen that keep every SM reading.
"""

import dataclasses

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm.product_sm90 import Tiling

_SHARED_MEMORY = 232448 - 2048
"""Bytes of shared memory a block may have, less barriers and alignment."""

Table = tuple[tuple[Tiling, float], ...]


def deepened(tiling: Tiling, *, column_scales: bool = False, out_bytes: int = 2, most: int = 16) -> Tiling:
    """The tiling with as many stages as fit in shared memory."""
    stores = tiling.warpgroups * tiling.slots(out_bytes) * 64 * tiling.store_columns(out_bytes) * out_bytes
    stage = (tiling.block_m + tiling.block_n) * 128 + 4 * (tiling.block_m + column_scales * tiling.block_n)
    return dataclasses.replace(tiling, stages=min(most, (_SHARED_MEMORY - stores) // stage))


def _table(*entries: tuple[Tiling, float], column_scales: bool = False) -> Table:
    out_bytes = 4 if column_scales else 2
    return tuple((deepened(t, column_scales=column_scales, out_bytes=out_bytes), cost) for t, cost in entries)


GEMM = _table(
    (Tiling(unroll=4, cluster=2), 1.0),
    (Tiling(block_n=192, unroll=1, cluster=2, store_slots=3), 1.05),
    (Tiling(unroll=4), 1.03),
)
WGRAD = _table(
    (Tiling(unroll=2, cluster=2), 1.0),
    (Tiling(block_n=192, unroll=1, store_slots=3), 0.96),
    (Tiling(unroll=2), 1.01),
    # For results so small that the others leave a quarter of the SMs without a tile.
    (Tiling(block_n=96, unroll=2, store_slots=3), 1.1),
    (Tiling(block_n=160, unroll=1, store_slots=1), 1.0),
    column_scales=True,
)
GROUPED = _table((Tiling(unroll=2, cluster=2, share="a"), 1.0))
MASKED = _table((Tiling(unroll=2, cluster=2), 1.0), (Tiling(unroll=2), 1.01))
# Steps are not known beforehand: unrolled, products would wait for one another.
_NARROW = Tiling(unroll=1, cluster=2, share="a", store_slots=4)
_WIDE = Tiling(block_n=192, unroll=1, cluster=2, share="a", store_slots=3)
GROUPED_WGRAD = _table((_NARROW, 1.0), (_WIDE, 0.89), column_scales=True)
# ``bench_3b``'s groups have 12 or 24 steps a tile: much of the time is the result's.
GROUPED_WGRAD_FEW_STEPS = _table((_NARROW, 1.0), (_WIDE, 0.955), column_scales=True)

MANY_STEPS = 32
"""Steps a group has on average, from which the first of these two holds (measured at 32; the second at 12 and 24)."""

FEW_ROWS = (16, 32, 64, 96, 128)
"""Tile widths to choose from where the weights' bytes are the cost."""


def rounds(tiling: Tiling, groups: int, rows: int, columns: int) -> int:
    """Tiles of the SM that has the most."""
    down, across = tiling.grid(rows, columns)
    return -(-groups * down * across // (dispatch.HOPPER_SM_COUNT // tiling.cluster))


def tile_columns(tiling: Tiling, groups: int, rows: int, columns: int) -> float:
    """Columns of 128 rows that the busiest SM computes: what a table's costs are relative to."""
    return rounds(tiling, groups, rows, columns) * tiling.block_n * tiling.block_m / 128


def cheapest(table: Table, groups: int, rows: int, columns: int) -> Tiling:
    """The table's tiling with the least estimated time for the shape."""
    return min(table, key=lambda entry: entry[1] * tile_columns(entry[0], groups, rows, columns))[0]


def gemm(rows: int, columns: int, contraction: int) -> Tiling:
    """For ``fp8_gemm``."""
    del contraction
    return _few_rows(rows, columns) if rows <= 128 else cheapest(GEMM, 1, rows, columns)


def _few_rows(rows: int, columns: int) -> Tiling:
    candidates = [
        Tiling(block_n=block_n, warpgroups=warpgroups, store_slots=3 if block_n % 96 == 0 else 2)
        for warpgroups in ((1,) if rows <= 64 else (1, 2))
        for block_n in FEW_ROWS
    ]

    def bytes_read(tiling: Tiling) -> float:
        return rounds(tiling, 1, rows, columns) * (tiling.block_n + tiling.block_m / 2)  # A is read from the cache

    return deepened(min(candidates, key=bytes_read))


def wgrad(rows: int, columns: int, tokens: int) -> Tiling:
    """For ``fp8_wgrad``."""
    del tokens
    return cheapest(WGRAD, 1, rows, columns)


def grouped(rows: int, columns: int, contraction: int) -> Tiling:
    """For ``grouped_fp8_gemm``."""
    del contraction
    return cheapest(GROUPED, 1, rows, columns)


def masked(groups: int, max_rows: int, columns: int, contraction: int) -> Tiling:
    """For ``masked_fp8_gemm``."""
    del contraction
    if max_rows <= 64:
        return deepened(Tiling(block_n=64, warpgroups=1))
    return cheapest(MASKED, groups, max_rows, columns)


def grouped_wgrad(groups: int, rows: int, columns: int, tokens: int) -> Tiling:
    """For ``grouped_fp8_wgrad``."""
    table = GROUPED_WGRAD if tokens >= 128 * MANY_STEPS * groups else GROUPED_WGRAD_FEW_STEPS
    return cheapest(table, groups, rows, columns)
