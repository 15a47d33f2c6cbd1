"""The Hopper kernel (Mosaic GPU) of the backward: it reads the stored codes and the output's gradient once.

A thread block takes a 128 x 128 tile of the gate, of up and of the gradient. Each of its warpgroups computes half the
rows, a few at a time in registers while the next ones are on their way, writes their row-wise tiles and leaves the
three results in shared memory, rounded as they would be stored; then each reads half of the columns transposed, where a
tile of 128 tokens is a row.

Two blocks share an SM: while one waits for its loads or at its barrier, the other computes. That leaves each 113 KB of
shared memory, of which this takes 112, and 128 registers a thread.

Pallas would put a barrier before and after every store. What is stored to global memory is not read here, and what goes
to shared memory is committed before anybody reads it: no other barrier is needed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.pallas_sm90 import COLUMNS, ROWS
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.registers import round_16, sigmoid
from pallas_kernels.quantize.tile_loop import F8, smem_tile, swizzled, tiles_of
from pallas_kernels.quantize.words import widened
from pallas_kernels.swiglu_quantize.reference import SwigluGradients

WARPGROUPS = 2
CHUNK = 16
"""Rows that a warpgroup computes at once, a multiple of 8."""

_SHARE = TILE // WARPGROUPS

Fetched = tuple[tuple[Array, Array], tuple[Array, Array], Array]
"""A few rows of a tile: the gate's codes and scales, those of up, and the output's gradient."""


def swiglu_backward_quantize(
    stored: Tiles,
    dout_MI: Array,
    weight_M: Array | None = None,
    power_of_two: bool = False,
    *,
    chunk: int = CHUNK,
    interpret: Any = None,
) -> SwigluGradients:
    """See ``reference.swiglu_backward_quantize``."""
    (rows, dim_i), dtype = dout_MI.shape, dout_MI.dtype
    weighted = weight_M is not None
    i_tiles = dim_i // TILE
    quantize = functools.partial(quantizer.quantize_tile, power_of_two=power_of_two, interpret=interpret)

    def along(per_row: Array) -> Array:
        return lax.broadcast_in_dim(per_row, (chunk, TILE), [0])

    def dequantized(q: Array, scale: Array) -> Array:
        return q.astype(jnp.float16).astype(jnp.float32) * along(scale)

    def body(
        kept_ref: Any, kept_scale_ref: Any, dout_ref: Any, *refs: Any, wide: Any, codes: Any, written: Any
    ) -> None:
        weight_refs, made_refs = refs[:weighted], refs[weighted:]
        row_ref, row_scale_ref, column_ref, column_scale_ref, out_ref, out_scale_ref, *dweight_refs = made_refs
        index, group = lax.axis_index("tile"), lax.axis_index("warpgroup")
        mb, ib = lax.div(index, i_tiles), lax.rem(index, i_tiles)
        tiles, mine, steps = (ib, ib + i_tiles), group * _SHARE, _SHARE // chunk

        def rows_of(step: Any) -> Any:
            return pl.ds(mb * TILE + mine + step * chunk, chunk)

        def per_row(ref: Any) -> Array:
            return plgpu.load(ref, layout=ROWS.reduce(1), optimized=False)

        def tile_of(ref: Any, step: Any, tile: Any) -> Array:
            return plgpu.load(ref.at[rows_of(step), pl.ds(tile * TILE, TILE)], layout=ROWS, optimized=False)

        def codes_of(step: Any, tile: Any) -> tuple[Array, Array]:
            return tile_of(kept_ref, step, tile), per_row(kept_scale_ref.at[tile, rows_of(step)])

        def fetched(step: Any) -> Fetched:
            return codes_of(step, tiles[0]), codes_of(step, tiles[1]), tile_of(dout_ref, step, ib)

        def turn(step: Any, given: Fetched) -> Fetched:
            here_m, (gate_codes, up_codes, dout16) = rows_of(step), given
            weights = [per_row(ref.at[here_m]) for ref in weight_refs]
            following = fetched(jnp.minimum(step + 1, steps - 1))
            gate, up = dequantized(*gate_codes), dequantized(*up_codes)
            dout = dout16.astype(jnp.float32) if interpret else widened(dout16, layout=ROWS)
            open_share = sigmoid(gate, layout=ROWS, interpret=interpret)
            silu = gate * open_share
            out = silu * up
            if weighted:
                dweight_refs[0][ib, here_m] = jnp.sum(dout * out, axis=1)
                dout, out = (x * along(weights[0]) for x in (dout, out))
            results = dout * up * open_share * (1.0 + gate * (1.0 - open_share)), dout * silu, out
            for number, wide_result in enumerate(results):
                result = round_16(wide_result, dtype, layout=ROWS, interpret=interpret)
                first = pl.multiple_of(mine + step * chunk, chunk)
                wide[number, pl.ds(first, chunk), :] = result
                if number < 2:
                    here = (here_m, pl.ds(tiles[number] * TILE, TILE))
                    row_ref[here], row_scale_ref[tiles[number], here_m] = quantize(result, layout=ROWS)
            return following

        lax.fori_loop(0, steps, turn, fetched(0))
        plgpu.commit_smem()
        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)
        here_m = pl.ds(mb * TILE, TILE)
        targets = [(column_ref, column_scale_ref, tile) for tile in tiles] + [(out_ref, out_scale_ref, ib)]
        for number, (to_codes, to_scales, tile) in enumerate(targets):
            columns = wide.at[number, :, pl.ds(pl.multiple_of(mine, _SHARE), _SHARE)]
            q, scale = quantize(plgpu.load(columns.T, layout=COLUMNS, optimized=False), layout=COLUMNS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            codes[group, :, :] = q
            plgpu.commit_smem()
            here_k = pl.ds(tile * TILE + mine, _SHARE)
            to_scales[mb, here_k] = scale
            plgpu.copy_smem_to_gmem(codes.at[group], to_codes.at[here_k, here_m])
        plgpu.wait_smem_to_gmem(0)

    partial_sums = [jax.ShapeDtypeStruct((i_tiles, rows), jnp.float32)] * weighted
    operands = (*stored, dout_MI, *([weight_M.astype(jnp.float32)] if weight_M is not None else ()))
    kernel = plgpu.kernel(
        body,
        out_type=[*tiles_of(rows, 2 * dim_i), *tiles_of(2 * dim_i, rows), *tiles_of(dim_i, rows), *partial_sums],
        scratch_types={
            "wide": smem_tile(dtype, 3),
            "codes": plgpu.SMEM((WARPGROUPS, _SHARE, TILE), F8, transforms=swizzled(F8)),
            "written": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid=(rows // TILE * i_tiles,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        # No sum or maximum is taken over more than a warp: none needs shared memory, and two blocks need all of it.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    made = [varying.like(out, *operands) for out in kernel(*operands)]
    dweight_M = jnp.sum(made[6], axis=0) if weighted else None
    return SwigluGradients(Tiles(*made[:2]), Tiles(*made[2:4]), Tiles(*made[4:6]), dweight_M)
