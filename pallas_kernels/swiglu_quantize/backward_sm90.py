"""The Hopper kernel (Mosaic GPU) of the backward: it reads the stored codes and the output's gradient once.

A thread block takes a 128 x 128 tile of the gate, of up and of the gradient. Each of its warpgroups computes half the
rows, a few at a time in registers, writes their row-wise tiles and leaves the three results in shared memory, rounded
as they would be stored; then each reads half of the columns transposed, where a tile of 128 tokens is a row.
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
from pallas_kernels.quantize.pallas_sm90 import ROWS, WGMMA
from pallas_kernels.quantize.reference import TILE, Tiles, round_to
from pallas_kernels.quantize.tile_loop import F8, smem_tile, swizzled, tiles_of
from pallas_kernels.swiglu_quantize.reference import SwigluGradients

WARPGROUPS = 2
CHUNK = 16
"""Rows that a warpgroup has in registers at once, a multiple of 8."""

_SHARE = TILE // WARPGROUPS


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

    def rounded(x: Array) -> Array:
        return round_to(x, dtype) if interpret else x.astype(dtype)

    def body(
        kept_ref: Any, kept_scale_ref: Any, dout_ref: Any, *refs: Any, wide: Any, codes: Any, scales: Any, written: Any
    ) -> None:
        weight_refs, made_refs = refs[:weighted], refs[weighted:]
        row_ref, row_scale_ref, column_ref, column_scale_ref, out_ref, out_scale_ref, *dweight_refs = made_refs
        index, group = lax.axis_index("tile"), lax.axis_index("warpgroup")
        mb, ib = lax.div(index, i_tiles), lax.rem(index, i_tiles)
        tiles, mine = (ib, ib + i_tiles), group * _SHARE

        @pl.loop(0, _SHARE // chunk)
        def _(step: Any) -> None:
            first = pl.multiple_of(mine + step * chunk, chunk)
            here_m = pl.ds(mb * TILE + first, chunk)

            def load(ref: Any, tile: Any) -> Array:
                return plgpu.load(ref.at[here_m, pl.ds(tile * TILE, TILE)], layout=ROWS, optimized=False)

            def dequantized(tile: Any) -> Array:
                scale = plgpu.load(kept_scale_ref.at[tile, here_m], layout=ROWS.reduce(1), optimized=False)
                x = load(kept_ref, tile).astype(jnp.float16).astype(jnp.float32)
                return x * lax.broadcast_in_dim(scale, x.shape, [0])

            gate, up = (dequantized(tile) for tile in tiles)
            dout = load(dout_ref, ib).astype(jnp.float32)
            sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
            silu = gate * sigmoid
            out = silu * up
            if weighted:
                dweight_refs[0][ib, here_m] = jnp.sum(dout * out, axis=1)
                weight = plgpu.load(weight_refs[0].at[here_m], layout=ROWS.reduce(1), optimized=False)
                weight = lax.broadcast_in_dim(weight, out.shape, [0])
                dout, out = dout * weight, out * weight
            results = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), dout * silu, out
            for number, result in enumerate(map(rounded, results)):
                wide[number, pl.ds(first, chunk), :] = result.astype(dtype)
                if number < 2:
                    here = (here_m, pl.ds(tiles[number] * TILE, TILE))
                    row_ref[here], row_scale_ref[tiles[number], here_m] = quantize(result, layout=ROWS)

        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)
        here_m = pl.ds(mb * TILE, TILE)
        targets = [(column_ref, column_scale_ref, tile) for tile in tiles] + [(out_ref, out_scale_ref, ib)]
        for number, (to_codes, to_scales, tile) in enumerate(targets):
            columns = wide.at[number, :, pl.ds(pl.multiple_of(mine, _SHARE), _SHARE)]
            q, scale = quantize(plgpu.load(columns.T, layout=WGMMA), layout=WGMMA)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            codes[group, :, :] = q
            scales[group, :] = scale
            plgpu.commit_smem()
            here_k = pl.ds(tile * TILE + mine, _SHARE)
            plgpu.copy_smem_to_gmem(codes.at[group], to_codes.at[here_k, here_m])
            plgpu.copy_smem_to_gmem(scales.at[group], to_scales.at[mb, here_k])
        plgpu.wait_smem_to_gmem(0)

    partial_sums = [jax.ShapeDtypeStruct((i_tiles, rows), jnp.float32)] * weighted
    operands = (*stored, dout_MI, *([weight_M.astype(jnp.float32)] if weight_M is not None else ()))
    kernel = plgpu.kernel(
        body,
        out_type=[*tiles_of(rows, 2 * dim_i), *tiles_of(2 * dim_i, rows), *tiles_of(dim_i, rows), *partial_sums],
        scratch_types={
            "wide": smem_tile(dtype, 3),
            "codes": plgpu.SMEM((WARPGROUPS, _SHARE, TILE), F8, transforms=swizzled(F8)),
            "scales": plgpu.SMEM((WARPGROUPS, _SHARE), jnp.float32),
            "written": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid=(rows // TILE * i_tiles,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        interpret=interpret,
    )
    made = [varying.like(out, *operands) for out in kernel(*operands)]
    dweight_M = jnp.sum(made[6], axis=0) if weighted else None
    return SwigluGradients(Tiles(*made[:2]), Tiles(*made[2:4]), Tiles(*made[4:6]), dweight_M)
