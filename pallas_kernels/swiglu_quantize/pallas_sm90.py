"""The Hopper kernel (Mosaic GPU) of the forward: a tile of the gate and one of up, from global memory and back."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.pallas_sm90 import ROWS
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.registers import round_16, sigmoid
from pallas_kernels.quantize.tile_loop import Tiling, tiles_of

ROWS_PER_BLOCK = 16
"""The fastest measured on an H200 at bench_3b's shape: 151.8 us, 160.1 with 32."""


def obstacle(gate_up_MF: Array) -> str | None:
    """Says why the kernel cannot take ``gate_up_MF``, or None where it can."""
    if (why := quantizer.obstacle(gate_up_MF)) is not None:
        return why
    if gate_up_MF.shape[1] % (2 * TILE):
        return f"I must be a multiple of {TILE}, got {gate_up_MF.shape[1] // 2}"
    return None


def swiglu_quantize(
    gate_up_MF: Array, power_of_two: bool = False, *, tiling: Tiling | None = None, interpret: Any = None
) -> tuple[Tiles, Tiles]:
    """See ``reference.swiglu_quantize``."""
    (rows, both), dtype = gate_up_MF.shape, gate_up_MF.dtype
    block_rows, i_tiles = (tiling or Tiling(rows=ROWS_PER_BLOCK)).rows, both // 2 // TILE
    quantize = functools.partial(quantizer.quantize_tile, layout=ROWS, power_of_two=power_of_two, interpret=interpret)

    def body(x_ref: Any, out_ref: Any, out_scale_ref: Any, kept_ref: Any, kept_scale_ref: Any) -> None:
        index = lax.axis_index("tile")
        ib, here_m = lax.rem(index, i_tiles), pl.ds(lax.div(index, i_tiles) * block_rows, block_rows)

        def columns(tile: Any) -> Any:
            return pl.ds(tile * TILE, TILE)

        tiles = (ib, ib + i_tiles)
        gate, up = (plgpu.load(x_ref.at[here_m, columns(tile)], layout=ROWS, optimized=False) for tile in tiles)
        gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
        out = gate32 * sigmoid(gate32, layout=ROWS, interpret=interpret) * up32
        out = round_16(out, dtype, layout=ROWS, interpret=interpret)
        out_ref[here_m, columns(ib)], out_scale_ref[ib, here_m] = quantize(out)
        for tile, x in zip(tiles, (gate, up), strict=True):
            kept_ref[here_m, columns(tile)], kept_scale_ref[tile, here_m] = quantize(x)

    kernel = plgpu.kernel(
        body,
        out_type=[*tiles_of(rows, both // 2), *tiles_of(rows, both)],
        grid=(rows // block_rows * i_tiles,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    made = [varying.like(out, gate_up_MF) for out in kernel(gate_up_MF)]
    return Tiles(*made[:2]), Tiles(*made[2:])
