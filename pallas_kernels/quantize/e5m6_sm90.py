"""The Hopper kernel (Mosaic GPU) that quantizes rows twice in one pass: to E4M3 tiles, and to E5M6 for storage."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.quantize import e5m6, pallas_sm90
from pallas_kernels.quantize.e5m6 import PackedE5M6
from pallas_kernels.quantize.pallas_sm90 import ROWS
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.tile_loop import Tiling, tiles_of


def obstacle(x_MK: Array) -> str | None:
    """Says why the kernel cannot take ``x_MK``, or None where it can."""
    if (why := pallas_sm90.obstacle(x_MK)) is not None:
        return why
    if x_MK.shape[1] % (2 * TILE):
        return f"K must be a multiple of {2 * TILE}, got {x_MK.shape[1]}"
    return None


def quantize_and_pack(x_MK: Array, *, tiling: Tiling | None = None, interpret: Any = None) -> tuple[Tiles, PackedE5M6]:
    """See ``op.quantize_and_pack``. A thread block takes a tile of a row's first half and its partner in the second."""
    rows, dim_k = x_MK.shape
    block_rows, half = (tiling or Tiling(rows=32)).rows, dim_k // 2 // TILE
    quantize = functools.partial(pallas_sm90.quantize_tile, layout=ROWS, power_of_two=True, interpret=interpret)

    def body(x_ref: Any, q_ref: Any, scale_ref: Any, packed_ref: Any, packed_scale_ref: Any) -> None:
        index = lax.axis_index("tile")
        kb, here_m = lax.rem(index, half), pl.ds(lax.div(index, half) * block_rows, block_rows)

        def columns(tile: Any) -> Any:
            return pl.ds(tile * TILE, TILE)

        tiles, codes = (kb, kb + half), []
        loaded = [plgpu.load(x_ref.at[here_m, columns(tile)], layout=ROWS, optimized=False) for tile in tiles]
        for tile, narrow in zip(tiles, loaded, strict=True):
            here, x = (here_m, columns(tile)), narrow.astype(jnp.float32)
            q_ref[here], scale_ref[tile, here_m] = quantize(narrow)
            packed_scale_ref[tile, here_m] = scale = e5m6.scale_e5m6(
                pallas_sm90.largest(narrow, layout=ROWS, interpret=interpret)
            )
            codes.append(e5m6.scaled_code_e5m6(x, lax.broadcast_in_dim(scale, x.shape, [0])))
            packed_ref[here] = codes[-1].astype(jnp.uint8)
        packed_ref[here_m, columns(2 * half + kb)] = e5m6.high_bits(*codes).astype(jnp.uint8)

    kernel = plgpu.kernel(
        body,
        out_type=[
            *tiles_of(rows, dim_k),
            jax.ShapeDtypeStruct((rows, dim_k // 2 * 3), jnp.uint8),
            jax.ShapeDtypeStruct((dim_k // TILE, rows), jnp.float32),
        ],
        grid=(rows // block_rows * half,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    made = [varying.like(out, x_MK) for out in kernel(x_MK)]
    return Tiles(*made[:2]), PackedE5M6(*made[2:])
