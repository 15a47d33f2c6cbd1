"""The grouped Hopper kernels: which tiles of which operands."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import tiles
from pallas_kernels.fp8_gemm.pallas_sm90 import weight_block
from pallas_kernels.fp8_gemm.product_sm90 import STEP, Tile, Tiling, run, tile_index


def gemm(
    q_MK: Array,
    sa_KM: Array,
    w_GNK: Array,
    sb_GNK: Array,
    group_of_block: Array,
    num_blocks: Array,
    *,
    dtype: Any = jnp.bfloat16,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``grouped_fp8_gemm`` on Hopper. Blocks from ``num_blocks`` on are not read; their rows are written as zeros.

    A cluster's tiles lie beside one another (``share = "a"``): tiles below may be of another group.
    """
    (rows, dim_k), columns = q_MK.shape, w_GNK.shape[1]
    tiling = tiling or tiles.grouped(rows, columns, dim_k)
    if tiling.warpgroups != 2 or (tiling.cluster > 1 and tiling.share == "b"):
        raise ValueError(f"grouped_fp8_gemm: tiles of 128 rows, clusters that share A; got {tiling}")
    grid = tiling.grid(rows, columns)

    def locate(
        index: Any, q_ref: Any, w_ref: Any, sa_ref: Any, sb_ref: Any, group_ref: Any, used_ref: Any, out_ref: Any
    ) -> Tile:
        block, column = tile_index(index, grid, tiling)
        row, column, group = block * tiling.block_m, column * tiling.block_n, group_ref[block]
        return Tile(
            a_at=lambda k: q_ref.at[pl.ds(row, tiling.block_m), pl.ds(k * STEP, STEP)],
            b_at=lambda k: w_ref.at[group, pl.ds(column, tiling.block_n), pl.ds(k * STEP, STEP)],
            a_scale_at=lambda k: sa_ref.at[k, pl.ds(row, tiling.block_m)],
            b_scale_at=None,
            b_block_scale=lambda chunk, k: sb_ref[group, weight_block(column, chunk, tiling, sb_GNK.shape[1]), k],
            out_at=lambda m, n: out_ref.at[pl.ds(row + m.start, m.size), pl.ds(column + n.start, n.size)],
            steps=dim_k // STEP,
            active=block < used_ref[0],
        )

    return run(
        (q_MK, w_GNK, sa_KM, sb_GNK, group_of_block, jnp.reshape(num_blocks, (1,))),
        jax.ShapeDtypeStruct((rows, columns), dtype),
        locate,
        num_tiles=math.prod(grid),
        step_multiple=dim_k // STEP,
        column_scales=False,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
    )


def masked(
    q_GMK: Array,
    sa_GKM: Array,
    w_GNK: Array,
    sb_GNK: Array,
    counts_G: Array,
    *,
    dtype: Any = jnp.bfloat16,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``masked_fp8_gemm`` on Hopper. Tiles without rows are not read; rows from ``counts_G`` on are zeros."""
    (groups, rows, dim_k), columns = q_GMK.shape, w_GNK.shape[1]
    tiling = tiling or tiles.masked(groups, rows, columns, dim_k)
    grid = tiling.grid(rows, columns)

    def locate(index: Any, q_ref: Any, w_ref: Any, sa_ref: Any, sb_ref: Any, count_ref: Any, out_ref: Any) -> Tile:
        group = lax.div(index, math.prod(grid))
        row, column = tile_index(lax.rem(index, math.prod(grid)), grid, tiling)
        row, column, count = row * tiling.block_m, column * tiling.block_n, count_ref[group]
        return Tile(
            a_at=lambda k: q_ref.at[group, pl.ds(row, tiling.block_m), pl.ds(k * STEP, STEP)],
            b_at=lambda k: w_ref.at[group, pl.ds(column, tiling.block_n), pl.ds(k * STEP, STEP)],
            a_scale_at=lambda k: sa_ref.at[group, k, pl.ds(row, tiling.block_m)],
            b_scale_at=None,
            b_block_scale=lambda chunk, k: sb_ref[group, weight_block(column, chunk, tiling, sb_GNK.shape[1]), k],
            out_at=lambda m, n: out_ref.at[group, pl.ds(row + m.start, m.size), pl.ds(column + n.start, n.size)],
            steps=dim_k // STEP,
            active=cluster_row(row, tiling) < count,
            row_limit=count - row,
        )

    return run(
        (q_GMK, w_GNK, sa_GKM, sb_GNK, counts_G),
        jax.ShapeDtypeStruct((groups, rows, columns), dtype),
        locate,
        num_tiles=groups * math.prod(grid),
        step_multiple=dim_k // STEP,
        column_scales=False,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
    )


def cluster_row(row: Any, tiling: Tiling) -> Any:
    """The first row of the cluster's tiles: all of a cluster must take as many steps."""
    if tiling.cluster == 1 or tiling.share == "a":
        return row
    return row - lax.axis_index("cluster") * tiling.block_m


def wgrad(
    x_KM: Array,
    sx_MK: Array,
    dy_NM: Array,
    sdy_MN: Array,
    group_of_block: Array,
    num_blocks: Array,
    *,
    num_groups: int,
    into: Array | None = None,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``grouped_fp8_wgrad`` on Hopper, float32 ``[G, K, N]``, added to ``into`` where it is given.

    ``group_of_block`` must never decrease; blocks from ``num_blocks`` on are not read.
    """
    rows, columns = x_KM.shape[0], dy_NM.shape[0]
    tiling = tiling or tiles.grouped_wgrad(num_groups, rows, columns, x_KM.shape[1])
    grid = tiling.grid(rows, columns)
    groups = jnp.arange(num_groups + 1, dtype=group_of_block.dtype)
    # Not by bisection: a loop, each turn of which is a kernel of its own.
    starts = jnp.searchsorted(group_of_block, groups, method="compare_all").astype(jnp.int32)
    first_block = jnp.minimum(starts, num_blocks)

    def locate(index: Any, x_ref: Any, dy_ref: Any, sx_ref: Any, sdy_ref: Any, first_ref: Any, out_ref: Any) -> Tile:
        group = lax.div(index, math.prod(grid))
        row, column = tile_index(lax.rem(index, math.prod(grid)), grid, tiling)
        row, column = row * tiling.block_m, column * tiling.block_n
        first, end = first_ref[group], first_ref[group + 1]
        return Tile(
            a_at=lambda k: x_ref.at[pl.ds(row, tiling.block_m), pl.ds((first + k) * STEP, STEP)],
            b_at=lambda k: dy_ref.at[pl.ds(column, tiling.block_n), pl.ds((first + k) * STEP, STEP)],
            a_scale_at=lambda k: sx_ref.at[first + k, pl.ds(row, tiling.block_m)],
            b_scale_at=lambda k: sdy_ref.at[first + k, pl.ds(column, tiling.block_n)],
            b_block_scale=None,
            out_at=lambda m, n: out_ref.at[group, pl.ds(row + m.start, m.size), pl.ds(column + n.start, n.size)],
            steps=end - first,
            active=end > first,
        )

    return run(
        (x_KM, dy_NM, sx_MK, sdy_MN, first_block),
        jax.ShapeDtypeStruct((num_groups, rows, columns), jnp.float32),
        locate,
        num_tiles=num_groups * math.prod(grid),
        step_multiple=1,
        column_scales=True,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
        into=into,
    )
