"""The dense Hopper kernels: which tiles of which operands, and what the kernel cannot do."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import tiles
from pallas_kernels.fp8_gemm.product_sm90 import STEP, Tile, Tiling, run, tile_index


def operand_obstacle(rows: int, columns: int, contraction: int) -> str | None:
    """Says what of a product's sizes the copy engine's tiles of 8 rows or the steps of 128 do not allow, or None."""
    if contraction % STEP:
        return f"the contraction must be a multiple of {STEP}, got {contraction}"
    if rows % 8:
        return f"the rows must be a multiple of 8, got {rows}"
    if columns % 8:
        return f"the columns must be a multiple of 8, got {columns}"
    return None


def gemm_obstacle(q: Array, w: Array, dtype: Any) -> str | None:
    """Says why the kernels cannot multiply ``[..., M, K]`` by ``[..., N, K]``, or None where they can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if jnp.dtype(dtype).name not in ("bfloat16", "float32"):
        return f"the result must be bfloat16 or float32, got {jnp.dtype(dtype).name}"
    return operand_obstacle(q.shape[-2], w.shape[-2], q.shape[-1])


def wgrad_obstacle(x_KM: Array, dy_NM: Array) -> str | None:
    """Says why the kernels cannot compute a weight gradient, grouped or not, or None where they can."""
    return dispatch.hopper_obstacle() or operand_obstacle(x_KM.shape[0], dy_NM.shape[0], x_KM.shape[1])


def gemm(
    q_MK: Array,
    sa_KM: Array,
    w_NK: Array,
    sb_NK: Array,
    *,
    dtype: Any = jnp.bfloat16,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``fp8_gemm`` on Hopper, ``[M, N]`` in ``dtype``."""
    (rows, dim_k), columns = q_MK.shape, w_NK.shape[0]
    tiling = tiling or tiles.gemm(rows, columns, dim_k)
    grid = tiling.grid(rows, columns)

    def locate(index: Any, q_ref: Any, w_ref: Any, sa_ref: Any, sb_ref: Any, out_ref: Any) -> Tile:
        row, column = tile_index(index, grid, tiling)
        row, column = row * tiling.block_m, column * tiling.block_n
        return Tile(
            a_at=lambda k: q_ref.at[pl.ds(row, tiling.block_m), pl.ds(k * STEP, STEP)],
            b_at=lambda k: w_ref.at[pl.ds(column, tiling.block_n), pl.ds(k * STEP, STEP)],
            a_scale_at=lambda k: sa_ref.at[k, pl.ds(row, tiling.block_m)],
            b_scale_at=None,
            b_block_scale=lambda chunk, k: sb_ref[weight_block(column, chunk, tiling, sb_NK.shape[0]), k],
            out_at=lambda m, n: out_ref.at[pl.ds(row + m.start, m.size), pl.ds(column + n.start, n.size)],
            steps=dim_k // STEP,
        )

    return run(
        (q_MK, w_NK, sa_KM, sb_NK),
        jax.ShapeDtypeStruct((rows, columns), dtype),
        locate,
        num_tiles=math.prod(grid),
        step_multiple=dim_k // STEP,
        column_scales=False,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
    )


def weight_block(column: Any, chunk: int, tiling: Tiling, blocks: int) -> Any:
    """Which of a weight's blocks of rows a tile's chunk of columns lies in; the last for chunks past the end."""
    return jnp.minimum(lax.div(column + chunk * tiling.chunk, STEP), blocks - 1)


def wgrad(
    x_KM: Array,
    sx_MK: Array,
    dy_NM: Array,
    sdy_MN: Array,
    *,
    into: Array | None = None,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``fp8_wgrad`` on Hopper, float32 ``[K, N]``, added to ``into`` where it is given."""
    (rows, tokens), columns = x_KM.shape, dy_NM.shape[0]
    tiling = tiling or tiles.wgrad(rows, columns, tokens)
    grid = tiling.grid(rows, columns)

    def locate(index: Any, x_ref: Any, dy_ref: Any, sx_ref: Any, sdy_ref: Any, out_ref: Any) -> Tile:
        row, column = tile_index(index, grid, tiling)
        row, column = row * tiling.block_m, column * tiling.block_n
        return Tile(
            a_at=lambda k: x_ref.at[pl.ds(row, tiling.block_m), pl.ds(k * STEP, STEP)],
            b_at=lambda k: dy_ref.at[pl.ds(column, tiling.block_n), pl.ds(k * STEP, STEP)],
            a_scale_at=lambda k: sx_ref.at[k, pl.ds(row, tiling.block_m)],
            b_scale_at=lambda k: sdy_ref.at[k, pl.ds(column, tiling.block_n)],
            b_block_scale=None,
            out_at=lambda m, n: out_ref.at[pl.ds(row + m.start, m.size), pl.ds(column + n.start, n.size)],
            steps=tokens // STEP,
        )

    return run(
        (x_KM, dy_NM, sx_MK, sdy_MN),
        jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        locate,
        num_tiles=math.prod(grid),
        step_multiple=tokens // STEP,
        column_scales=True,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
        into=into,
    )
