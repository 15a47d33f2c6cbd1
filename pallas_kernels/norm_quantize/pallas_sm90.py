"""The Hopper kernel (Mosaic GPU): a warp normalizes and quantizes a row, read from memory once.

The row passes twice, first for its mean square, then, from the cache that it is still in, for the tiles. Half a warp
holds a tile, so that neither pass needs more than exchanges inside a warp.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.reference import TILE, Tiles, round_to
from pallas_kernels.quantize.tile_loop import tiles_of

BLOCK = 4
"""Rows of a thread block."""

CHUNK = 8
"""Most tiles of a row that are in registers at once."""

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
    return None


def norm_quantize(
    x_MK: Array,
    weight_K: Array,
    eps: float,
    power_of_two: bool = False,
    with_output: bool = False,
    *,
    chunk: int = CHUNK,
    interpret: Any = None,
) -> tuple[Tiles, Array | None]:
    """See ``reference.norm_quantize``."""
    rows, dim_k = x_MK.shape
    k_tiles = dim_k // TILE
    chunk = max(size for size in range(2, chunk + 1, 2) if k_tiles % size == 0)
    shape = (BLOCK, chunk, TILE)
    dtype = x_MK.dtype

    def body(x_ref: Any, weight_ref: Any, q_ref: Any, scale_ref: Any, *y_refs: Any) -> None:
        here_m = pl.ds(lax.axis_index("rows") * BLOCK, BLOCK)

        def load(step: Any) -> Array:
            x = plgpu.load(x_ref.at[here_m, pl.ds(step * chunk, chunk)], layout=ROWS_OF_TILES, optimized=False)
            return x.astype(jnp.float32)

        def add_squares(step: Any, total: Array) -> Array:
            x = load(step)
            return total + jnp.sum(x * x, axis=1)

        zeros = plgpu.layout_cast(jnp.zeros((BLOCK, TILE), jnp.float32), ROWS_OF_TILES.reduce(1))
        squares = jnp.sum(lax.fori_loop(0, k_tiles // chunk, add_squares, zeros), axis=1)
        inverse = lax.rsqrt(squares * (1.0 / dim_k) + eps)

        @pl.loop(0, k_tiles // chunk)
        def _(step: Any) -> None:
            here_k = pl.ds(step * chunk, chunk)
            weight = plgpu.load(weight_ref.at[here_k], layout=ROWS_OF_TILES.reduce(0), optimized=False)
            y = load(step) * lax.broadcast_in_dim(inverse, shape, [0]) * lax.broadcast_in_dim(weight, shape, [1, 2])
            rounded = y.astype(dtype)
            y = round_to(y, dtype) if interpret else rounded.astype(jnp.float32)
            scale = quantizer.scale_of(jnp.max(jnp.abs(y), axis=2), power_of_two, interpret, ROWS_OF_TILES.reduce(2))
            q = quantizer.encode(y, scale, layout=ROWS_OF_TILES, power_of_two=power_of_two, interpret=interpret)
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
        interpret=interpret,
    )
    weight_BT = weight_K.astype(jnp.float32).reshape(k_tiles, TILE)
    made = [varying.like(out, x_MK, weight_K) for out in kernel(x_MK.reshape(rows, k_tiles, TILE), weight_BT)]
    y_MK = made[2].reshape(rows, dim_k) if with_output else None
    return Tiles(made[0].reshape(rows, dim_k), made[1].T), y_MK
