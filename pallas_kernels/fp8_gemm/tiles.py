"""Which tiling a shape gets: rules by shape class, and entries that the bench found better (``bench.py --sweep``)."""

import dataclasses

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm.product_sm90 import Tiling

_SHARED_MEMORY = 232448 - 2048
"""Bytes of shared memory a block may have, less barriers and alignment."""


def deepened(tiling: Tiling, *, column_scales: bool = False, out_bytes: int = 2, most: int = 16) -> Tiling:
    """The tiling with as many stages as fit in shared memory."""
    stores = tiling.warpgroups * tiling.slots(out_bytes) * 64 * tiling.store_columns(out_bytes) * out_bytes
    stage = (tiling.block_m + tiling.block_n) * 128 + 4 * (tiling.block_m + column_scales * tiling.block_n)
    return dataclasses.replace(tiling, stages=min(most, (_SHARED_MEMORY - stores) // stage))


_DENSE = deepened(Tiling(unroll=4))
_FEW_ROWS = (16, 32, 64, 96, 128, 192)
"""Tile widths to choose from where the weights' bytes are the cost."""


def gemm(rows: int, columns: int, contraction: int) -> Tiling:
    """For ``fp8_gemm``: large tiles where arithmetic is the cost, else tiles that keep every SM reading weights."""
    del contraction
    if rows > 128:
        return _DENSE
    candidates = [
        Tiling(
            block_n=block_n,
            warpgroups=warpgroups,
            unroll=1 if block_n > 128 else 4,
            store_slots=3 if block_n % 96 == 0 else 2,
        )
        for warpgroups in ((1,) if rows <= 64 else (1, 2))
        for block_n in _FEW_ROWS
    ]

    def bytes_read(tiling: Tiling) -> float:
        down, across = tiling.grid(rows, columns)
        waves = -(-down * across // dispatch.HOPPER_SM_COUNT)
        return waves * (tiling.block_n + tiling.block_m / 2)  # A is read from the cache

    return deepened(min(candidates, key=bytes_read))


def wgrad(rows: int, columns: int, tokens: int) -> Tiling:
    """For ``fp8_wgrad``."""
    del rows, columns, tokens
    return deepened(Tiling(unroll=2), column_scales=True, out_bytes=4)


def grouped(columns: int, contraction: int) -> Tiling:
    """For ``grouped_fp8_gemm``."""
    del columns, contraction
    return _DENSE


def masked(max_rows: int, columns: int, contraction: int) -> Tiling:
    """For ``masked_fp8_gemm``."""
    del columns, contraction
    return deepened(Tiling(unroll=2) if max_rows > 64 else Tiling(block_n=64, warpgroups=1))


def grouped_wgrad(rows: int, columns: int) -> Tiling:
    """For ``grouped_fp8_wgrad``. Steps are not known beforehand: unrolled, products wait for one another."""
    del rows, columns
    return deepened(Tiling(unroll=1), column_scales=True, out_bytes=4)
