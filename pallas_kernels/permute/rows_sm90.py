"""The Hopper kernel (Mosaic GPU) that sorts tokens' tiles: codes and scales.

A thread block takes 128 sorted rows, and of those ``SPAN`` tiles of 128 columns one after another. All blocks take the
same columns before any takes the next: the tokens' codes in those stay in the cache for all the rows that want them,
where all columns of 32768 tokens do not.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.permute import turn
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.tile_loop import tiles_of

SPAN = 4
"""Tiles of columns of a thread block, where as many divide the row."""


def permute_rows(tiles: Tiles, index_M: Array, *, span: int = SPAN, interpret: Any = None) -> Tiles:
    """The tiles of the rows ``index_M``; zero codes and scales of 1 where it is not below the tokens' number.

    What it cannot take is what ``columns_sm90`` cannot.
    """
    dim, (made,) = tiles.q.shape[1], index_M.shape
    span = max(size for size in range(1, span + 1) if dim // TILE % size == 0)
    blocks = made // TILE

    def body(q_ref: Any, scale_ref: Any, index_ref: Any, row_ref: Any, row_scale_ref: Any) -> None:
        task = lax.axis_index("task")
        here_m, first_kb = pl.ds(lax.rem(task, blocks) * TILE, TILE), lax.div(task, blocks) * span
        of_row = plgpu.load(index_ref.at[here_m], layout=turn.ROWS.reduce(1), optimized=False)
        of_line = turn.load_line(index_ref.at[here_m], interpret=interpret)

        def step(number: Any, carry: Any) -> Any:
            kb = first_kb + number
            here_k = pl.ds(kb * TILE, TILE)
            scales = turn.gather_scales(scale_ref.at[kb], of_line, interpret=interpret)
            row_ref[here_m, here_k] = turn.gather_rows(q_ref.at[:, here_k], of_row, interpret=interpret)
            row_scale_ref[kb, here_m] = scales
            return carry

        lax.fori_loop(0, span, step, jnp.int32(0))

    kernel = plgpu.kernel(
        body,
        out_type=tiles_of(made, dim),
        grid=(blocks * (dim // TILE // span),),
        grid_names=("task",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    operands = (*tiles, index_M)
    return Tiles(*(varying.like(one, *operands) for one in kernel(*operands)))
