"""The Hopper kernel (Mosaic GPU) that sorts tokens' codes and quantizes columns of the sorted rows in one pass.

A thread block takes 128 sorted rows, and of those 128 columns. All blocks take the same columns before any takes the
next: the tokens' codes in those are few enough to stay in the cache for all the rows that want them.
"""

import functools
import operator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.permute import rescale, turn
from pallas_kernels.quantize.pallas_sm90 import scale_of
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.tile_loop import F8, tiles_of


def obstacle(q_TD: Array, num_rows: int, block: int) -> str | None:
    """Says why the kernel cannot sort these codes, or None where it can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if q_TD.dtype != F8:
        return f"rows must be float8_e4m3fn, got {q_TD.dtype}"
    if 0 in q_TD.shape or q_TD.shape[1] % TILE:
        return f"a row must be a multiple of {TILE} numbers, got {q_TD.shape}"
    if block % TILE or not num_rows:
        return f"blocks must be of a multiple of {TILE} rows, got {block}"
    return None


def permute_columns(tiles: Tiles, index_M: Array, used: Array, **options: Any) -> Tiles:
    """The columns alone; see :func:`permute_both`."""
    return _sorting(tiles, index_M, used, with_rows=False, **options)[0]


def permute_both(tiles: Tiles, index_M: Array, used: Array, **options: Any) -> tuple[Tiles, Tiles]:
    """Row-wise and transposed tiles of the rows ``index_M``, of which those before ``128 used`` are made.

    Rows whose index is not below the tokens' number have zero codes and scales of 1.
    """
    rows, columns = _sorting(tiles, index_M, used, with_rows=True, **options)
    return rows, columns


def _sorting(tiles: Tiles, index_M: Array, used: Array, *, with_rows: bool, interpret: Any = None) -> list[Tiles]:
    dim, (made,) = tiles.q.shape[1], index_M.shape
    blocks = made // TILE

    def body(*refs: Any, codes: Any, along: Any, factors: Any, fits: Any, out: Any, out_scale: Any) -> None:
        q_ref, scale_ref, index_ref, used_ref, *row_refs, column_ref, column_scale_ref = refs
        tile = lax.axis_index("tile")
        mb, kb = lax.rem(tile, blocks), lax.div(tile, blocks)
        here_m, here_k = pl.ds(mb * TILE, TILE), pl.ds(kb * TILE, TILE)

        @pl.when(mb < used_ref[0])
        def _() -> None:
            of_row = plgpu.load(index_ref.at[here_m], layout=turn.ROWS.reduce(1), optimized=False)
            of_line = turn.load_line(index_ref.at[here_m], interpret=interpret)
            rows = turn.gather_rows(q_ref.at[:, here_k], of_row, interpret=interpret)
            scales = turn.gather_scales(scale_ref.at[kb], of_line, interpret=interpret)
            turn.put_rows(codes, rows, interpret=interpret)
            along[...] = scales
            rescale.note(factors, fits, scales, interpret=interpret)
            if with_rows:
                row_refs[0][here_m, here_k] = rows
                row_refs[1][kb, here_m] = scales
            plgpu.commit_smem()  # a barrier
            narrow = functools.reduce(operator.and_, (fits[warp] for warp in range(4)))
            for wide, chosen in ((False, narrow == 1), (True, narrow == 0)):

                @pl.when(chosen)
                def _(wide: bool = wide) -> None:
                    for half in range(2):

                        def numbers(half: int = half) -> Array:
                            q = turn.take_turned(codes, half, interpret=interpret)
                            return rescale.products(q, along if wide else factors, interpret=interpret)

                        x = numbers()
                        amax = rescale.largest(x, interpret=interpret)
                        scale = scale_of(amax, True, interpret, turn.TURNED.reduce(1))
                        out_scale[pl.ds(half * turn.HALF, turn.HALF)] = scale
                        # Made again, float32 numbers take no registers in between.
                        q = rescale.encode(numbers() if wide else x, scale, interpret=interpret)
                        turn.put_turned(out, half, q, interpret=interpret)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, column_ref.at[here_k, here_m])
            plgpu.copy_smem_to_gmem(out_scale, column_scale_ref.at[mb, here_k])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=[*(tiles_of(made, dim) if with_rows else ()), *tiles_of(dim, made)],
        scratch_types={
            "codes": plgpu.SMEM((TILE, TILE), F8),
            "along": plgpu.SMEM((TILE,), jnp.float32),
            "factors": plgpu.SMEM((TILE,), jnp.float16),
            "fits": plgpu.SMEM((4,), jnp.int32),
            "out": plgpu.SMEM((TILE, TILE), F8, transforms=turn.SWIZZLED),
            "out_scale": plgpu.SMEM((TILE,), jnp.float32),
        },
        grid=(blocks * (dim // TILE),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    operands = (*tiles, index_M, jnp.reshape(used, (1,)))
    outputs = [varying.like(one, *operands) for one in kernel(*operands)]
    return [Tiles(*outputs[i : i + 2]) for i in range(0, len(outputs), 2)]
