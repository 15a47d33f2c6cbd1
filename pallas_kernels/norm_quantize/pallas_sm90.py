"""The Hopper kernel (Mosaic GPU): a warp normalizes and quantizes a row, read from memory once.

The whole row is in registers, in 16 bits, from the mean square on: rows that are being normalized on all SMs together
are more than the cache holds. Half a warp holds a tile, so that nothing is needed but exchanges inside a warp, and none
of the barriers that Pallas would put before and after every store: nobody reads here what another thread has written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.registers import hide_16, round_16
from pallas_kernels.quantize.tile_loop import tiles_of

BLOCK = 4
"""Rows of a thread block."""

CHUNK = 4
"""Most tiles of a row that an operation takes: more take more registers, fewer make a program slow to compile."""

MOST_TILES = 64
"""Of a row: what a thread's registers hold."""

ROWS_OF_TILES = plgpu.Layout.TILED(
    plgpu.Tiling(((BLOCK, 2, TILE), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""``[4, 2 n, 128]``: a warp holds a row, half of it every second tile, a thread eight neighbours."""


def obstacle(x_MK: Array) -> str | None:
    """Says why the kernel cannot take ``x_MK``, or None where it can."""
    if (why := quantizer.obstacle(x_MK)) is not None:
        return why
    if x_MK.shape[1] % (2 * TILE):
        return f"K must be a multiple of {2 * TILE}, got {x_MK.shape[1]}"
    if x_MK.shape[1] > MOST_TILES * TILE:
        return f"K must be at most {MOST_TILES * TILE}, got {x_MK.shape[1]}"
    return None


def norm_quantize(
    x_MK: Array,
    weight_K: Array,
    eps: float,
    power_of_two: bool = False,
    with_output: bool = False,
    *,
    interpret: Any = None,
) -> tuple[Tiles, Array | None]:
    """See ``reference.norm_quantize``."""
    rows, dim_k = x_MK.shape
    k_tiles = dim_k // TILE
    chunk = max(size for size in range(2, CHUNK + 1, 2) if k_tiles % size == 0)
    shape = (BLOCK, chunk, TILE)
    dtype = x_MK.dtype

    def body(x_ref: Any, weight_ref: Any, q_ref: Any, scale_ref: Any, *y_refs: Any) -> None:
        here_m = pl.ds(lax.axis_index("rows") * BLOCK, BLOCK)
        parts = [pl.ds(first, chunk) for first in range(0, k_tiles, chunk)]
        row = [plgpu.load(x_ref.at[here_m, here_k], layout=ROWS_OF_TILES, optimized=False) for here_k in parts]

        squares = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ROWS_OF_TILES)
        for x in (part.astype(jnp.float32) for part in row):
            squares += x * x
        mean = jnp.sum(jnp.sum(squares, axis=2), axis=1) * (1.0 / dim_k)
        inverse = lax.broadcast_in_dim(lax.rsqrt(mean + eps), shape, [0])

        for here_k, x in zip(parts, row, strict=True):
            weight = plgpu.load(weight_ref.at[here_k], layout=ROWS_OF_TILES.reduce(0), optimized=False)
            x32 = hide_16(x, layout=ROWS_OF_TILES, interpret=interpret).astype(jnp.float32)
            y = x32 * inverse * lax.broadcast_in_dim(weight, shape, [1, 2])
            rounded = round_16(y, dtype, layout=ROWS_OF_TILES, interpret=interpret)
            y = rounded.astype(jnp.float32)
            amax = quantizer.largest(rounded, layout=ROWS_OF_TILES, interpret=interpret)
            scale = quantizer.scale_of(amax, power_of_two, interpret, ROWS_OF_TILES.reduce(2))
            how = {"power_of_two": power_of_two, "interpret": interpret, "narrow": True}
            q = quantizer.encode(y, scale, layout=ROWS_OF_TILES, **how)
            q_ref[here_m, here_k] = q
            scale_ref[here_m, here_k] = scale
            for y_ref in y_refs:
                y_ref[here_m, here_k] = rounded

    q_type, scale_type = tiles_of(rows, dim_k)
    out_type = [
        jax.ShapeDtypeStruct((rows, k_tiles, TILE), q_type.dtype),
        jax.ShapeDtypeStruct((rows, k_tiles), scale_type.dtype),
    ]
    kernel = plgpu.kernel(
        body,
        out_type=out_type + [jax.ShapeDtypeStruct((rows, k_tiles, TILE), dtype)] * with_output,
        grid=(rows // BLOCK,),
        grid_names=("rows",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    weight_BT = weight_K.astype(jnp.float32).reshape(k_tiles, TILE)
    made = [varying.like(out, x_MK, weight_K) for out in kernel(x_MK.reshape(rows, k_tiles, TILE), weight_BT)]
    y_MK = made[2].reshape(rows, dim_k) if with_output else None
    return Tiles(made[0].reshape(rows, dim_k), made[1].T), y_MK
