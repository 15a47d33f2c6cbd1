"""The Hopper kernels (Mosaic GPU) of E5M6: rows to E4M3 tiles and to storage, and storage to rows and transposed tiles.

Stored codes are the upper 12 bits of float16 numbers, subnormals included: reading them takes no arithmetic.
"""

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
from pallas_kernels.quantize.pallas_sm90 import COLUMNS, ROWS
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.registers import round_16
from pallas_kernels.quantize.tile_loop import F8, Tiling, smem_tile, tiles_of
from pallas_kernels.quantize.words import e5m6_values


def obstacle(x_MK: Array | jax.ShapeDtypeStruct) -> str | None:
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


def unpack_obstacle(stored: PackedE5M6, dtype: Any) -> str | None:
    """Says why the kernel cannot read ``stored``, or None where it can."""
    rows, size = stored.packed.shape
    return obstacle(jax.ShapeDtypeStruct((rows, size // 3 * 2), dtype))


def unpack_and_quantize_columns(stored: PackedE5M6, *, dtype: Any, interpret: Any = None) -> tuple[Array, Tiles]:
    """See ``op.unpack_and_quantize_columns``. A thread block takes 128 rows of a tile and of its partner."""
    rows, size = stored.packed.shape
    dim_k, half = size // 3 * 2, size // 3 // TILE

    def body(
        packed_ref: Any, scale_ref: Any, x_ref: Any, q_ref: Any, q_scale_ref: Any, *, wide: Any, codes: Any
    ) -> None:
        index = lax.axis_index("tile")
        mb, kb = lax.div(index, half), lax.rem(index, half)
        here_m = pl.ds(mb * TILE, TILE)

        def bytes_of(tile: Any) -> Array:
            return plgpu.load(packed_ref.at[here_m, pl.ds(tile * TILE, TILE)], layout=ROWS, optimized=False)

        high = bytes_of(2 * half + kb)
        for number, tile in enumerate((kb, kb + half)):
            here_k = pl.ds(tile * TILE, TILE)
            scale = plgpu.load(scale_ref.at[tile, here_m], layout=ROWS.reduce(1), optimized=False)
            value = _values(bytes_of(tile), high, number, interpret) * lax.broadcast_in_dim(scale, (TILE, TILE), [0])
            x = round_16(value, dtype, layout=ROWS, interpret=interpret)
            x_ref[here_m, here_k] = x
            wide[...] = x
            plgpu.commit_smem()
            columns = plgpu.load(wide.T, layout=COLUMNS, optimized=False)
            q, q_scale = pallas_sm90.quantize_tile(columns, layout=COLUMNS, power_of_two=True, interpret=interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            codes[...] = q
            plgpu.commit_smem()
            q_scale_ref[mb, here_k] = q_scale
            plgpu.copy_smem_to_gmem(codes, q_ref.at[here_k, here_m])
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows, dim_k), dtype), *tiles_of(dim_k, rows)],
        scratch_types={"wide": smem_tile(dtype), "codes": smem_tile(F8)},
        grid=(rows // TILE * half,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    x, *tiles = (varying.like(out, *stored) for out in kernel(*stored))
    return x, Tiles(*tiles)


def _values(low: Array, high: Array, half: int, interpret: Any) -> Array:
    """Of codes, in float32: those of a row's first half, whose upper bits are the lower ones of ``high``, or others."""
    if not interpret:
        return e5m6_values(low, high, half, layout=ROWS).astype(jnp.float32)
    low, high = low.astype(jnp.uint16), high.astype(jnp.uint16)
    codes = low << 4 | (high >> 4 if half else high & 15) << 12
    return lax.bitcast_convert_type(codes, jnp.float16).astype(jnp.float32)
