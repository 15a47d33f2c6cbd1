"""The Hopper kernels (Mosaic GPU): row-wise tiles, their transposed form, both in one pass, and weights.

All are bound by memory. Row-wise tiles need no exchange between threads but within half a warp, which holds a tile, 16
bytes a thread: they go from global memory to registers and back. For the transposed form a 128 x 128 tile of the input
comes to shared memory and is read transposed (``ldmatrix.trans``), so that a tile of 128 tokens is again a row; codes
leave through shared memory. The row-wise form of the same input tile is read from there too. What is not of 16 bits
passes through float16, which holds every e4m3 code exactly, to be transposed.

The division is the true one, bit for bit, at the price of two or three products: see ``division``.

Pallas would put a barrier before and after every store. What goes to global memory is not read here, and what goes to
shared memory is committed before anybody reads it: only the kernel of weights has those barriers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.quantize import division, reference, words
from pallas_kernels.quantize.reference import AMAX_FLOOR, TILE, Tiles
from pallas_kernels.quantize.registers import e4m3_where
from pallas_kernels.quantize.tile_loop import F8, OUTBOX, Tile, Tiling, send, smem_tile, tiles_of, walk

_HALF = TILE // 2
_WEIGHT_TILING = Tiling(stages=2, blocks_per_sm=1)

ROWS = plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""``[8 n, 128]``: half a warp holds a row, eight neighbours a thread."""

WGMMA = plgpu.Layout.WGMMA
"""``[64 n, 8 k]``: four threads hold a row, two neighbours a thread; what ``ldmatrix`` reads, transposed or not."""

COLUMNS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 16), (16, 16), (8, 16), (4,), (2,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
"""``[64 n, 16 k]``: four threads hold a row, four neighbours a thread, so that four codes leave together; ``ldmatrix``
reads two matrices for them, each with half of its rows in the other's banks."""

LAYOUT_OF_CODES = {ROWS: ROWS, COLUMNS: plgpu.Layout.WGMMA_8BIT}
"""Layouts of the codes of 16-bit numbers."""


def obstacle(x_MK: Array | jax.ShapeDtypeStruct, dtypes: tuple[str, ...] = ("bfloat16", "float16")) -> str | None:
    """Says why the kernels cannot quantize ``x_MK``, or None where they can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if str(x_MK.dtype) not in dtypes:
        return f"the dtype must be {' or '.join(dtypes)}, got {x_MK.dtype}"
    if 0 in x_MK.shape or any(size % TILE for size in x_MK.shape[-2:]):
        return f"the last two dims must be multiples of {TILE}, got {x_MK.shape}"
    return None


def scale_of(amax: Array, power_of_two: bool, interpret: Any, layout: Any = ROWS) -> Array:
    """The scale of each tile; ``layout`` is that of ``amax`` where it is no scalar."""
    if interpret:
        return reference.scale_of(amax, power_of_two)
    return division.scale_in_kernel(jnp.maximum(amax, jnp.float32(AMAX_FLOOR)), layout, power_of_two)


def encode(x: Array, scale: Array, *, layout: Any, power_of_two: bool, interpret: Any, narrow: bool = False) -> Array:
    """``e4m3fn(x / scale)`` of float32 ``x``, one scale for its last dim or one alone; zero where it is not finite.

    ``narrow`` promises that ``x`` and the tile's largest magnitude have 16 bits: one instruction less a value.
    """
    dims = list(range(scale.ndim))
    along = functools.partial(lax.broadcast_in_dim, shape=x.shape, broadcast_dimensions=dims)
    finite = scale < jnp.inf
    if interpret:
        return jnp.where(along(finite), reference.divide(x, along(scale)), 0.0).astype(F8)
    scale_layout = layout.reduce(x.ndim - 1) if dims else layout
    quotient = division.divide_in_kernel(x, scale, layout, scale_layout, power_of_two, narrow)
    if not dims:
        return jnp.where(along(finite), quotient, 0.0).astype(F8)
    return e4m3_where(along(jnp.where(finite, jnp.int32(-1), jnp.int32(0))), quotient, layout=layout)


def largest(x: Array, *, layout: Any, interpret: Any) -> Array:
    """The largest magnitude of each row in float32, two values of 16 bits an instruction where ``x`` has them."""
    if x.dtype.itemsize == 2 and not interpret:
        return words.largest_of_rows(x, layout=layout)
    return jnp.max(jnp.abs(x), axis=x.ndim - 1).astype(jnp.float32)


def quantize_tile(x: Array, *, layout: Any, power_of_two: bool, interpret: Any) -> tuple[Array, Array]:
    """Codes and scales of the rows of an array in registers, of 16 bits a value or float32.

    Those of 16 bits are in ``ROWS`` or ``COLUMNS``.
    """
    of_rows = layout.reduce(1)
    scale = scale_of(largest(x, layout=layout, interpret=interpret), power_of_two, interpret, of_rows)
    if interpret or x.dtype.itemsize > 2:
        wide = x.astype(jnp.float32)
        return encode(wide, scale, layout=layout, power_of_two=power_of_two, interpret=interpret), scale
    quotient, factors = division.quotient_by(scale, of_rows, power_of_two)
    keep = jnp.where(scale < jnp.inf, jnp.int32(-1), jnp.int32(0))
    return words.codes_of_rows(quotient, x, factors, keep, layout=layout, codes_layout=LAYOUT_OF_CODES[layout]), scale


def quantize_rows(
    x_MK: Array, power_of_two: bool = False, *, tiling: Tiling | None = None, interpret: Any = None
) -> Tiles:
    """The row-wise form; see ``reference.quantize_rows``."""
    rows, dim_k = x_MK.shape
    k_tiles, block_rows = dim_k // TILE, (tiling or Tiling()).rows
    quantize = functools.partial(quantize_tile, layout=ROWS, power_of_two=power_of_two, interpret=interpret)

    def body(x_ref: Any, q_ref: Any, scale_ref: Any) -> None:
        index = lax.axis_index("tile")
        kb, here_m = lax.rem(index, k_tiles), pl.ds(lax.div(index, k_tiles) * block_rows, block_rows)
        here = (here_m, pl.ds(kb * TILE, TILE))
        q_ref[here], scale_ref[kb, here_m] = quantize(plgpu.load(x_ref.at[here], layout=ROWS, optimized=False))

    kernel = plgpu.kernel(
        body,
        out_type=tiles_of(rows, dim_k),
        grid=(rows // block_rows * k_tiles,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return Tiles(*(varying.like(made, x_MK) for made in kernel(x_MK)))


def quantize_columns(x_MK: Array, power_of_two: bool = False, **options: Any) -> Tiles:
    """The transposed form; see ``reference.quantize_columns``. Options are those of ``tile_loop.walk``."""
    return _transposing(x_MK, power_of_two, with_rows=False, **options)[0]


def quantize_both(x_MK: Array, power_of_two: bool = False, **options: Any) -> tuple[Tiles, Tiles]:
    """The row-wise and the transposed form, in one pass over the input."""
    rows, columns = _transposing(x_MK, power_of_two, with_rows=True, **options)
    return rows, columns


def _transposing(
    x_MK: Array,
    power_of_two: bool,
    *,
    with_rows: bool,
    tiling: Tiling | None = None,
    interpret: Any = None,
    **options: Any,
) -> list[Tiles]:
    (rows, dim_k), tiling = x_MK.shape, tiling or Tiling()
    quantize = functools.partial(quantize_tile, power_of_two=power_of_two, interpret=interpret)

    def fetch(tile: Tile, x_ref: Any, *_: Any) -> None:
        tile.fetch(x_ref.at[tile.rows, tile.columns], "x")

    def work(tile: Tile, _: Any, *out_refs: Any) -> None:
        *row_refs, q_ref, scale_ref = out_refs
        if with_rows:
            q, scale = quantize(plgpu.load(tile.smem("x"), layout=ROWS), layout=ROWS)
            row_refs[0][tile.rows, tile.columns] = q
            row_refs[1][tile.kb, tile.rows] = scale
        q, scale = quantize(plgpu.load(tile.smem("x").T, layout=COLUMNS, optimized=False), layout=COLUMNS)
        send(tile, q, scale, q_ref.at[tile.columns, tile.rows], scale_ref.at[tile.mb, tile.columns])

    made = walk(
        (x_MK,),
        [*(tiles_of(rows, dim_k) if with_rows else ()), *tiles_of(dim_k, rows)],
        grid=(rows // TILE, dim_k // TILE),
        staged={"x": smem_tile(x_MK.dtype, tiling.stages)},
        kept=OUTBOX,
        fetch=fetch,
        work=work,
        tiling=tiling,
        interpret=interpret,
        **options,
    )
    return [Tiles(*made[i : i + 2]) for i in range(0, len(made), 2)]


def requantize_columns(
    q_MK: Array,
    scale: Array,
    power_of_two: bool = False,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
    **options: Any,
) -> Tiles:
    """The transposed form of stored row-wise tiles; see ``reference.requantize_columns``."""
    (rows, dim_k), tiling = q_MK.shape, tiling or Tiling()
    quantize = functools.partial(quantize_tile, power_of_two=power_of_two, interpret=interpret)

    def fetch(tile: Tile, q_ref: Any, scale_ref: Any, *_: Any) -> None:
        tile.fetch(q_ref.at[tile.rows, tile.columns], "x")
        tile.fetch(scale_ref.at[tile.kb, tile.rows], "x_scale")

    def work(tile: Tile, _: Any, __: Any, q_ref: Any, scale_ref: Any) -> None:
        turned, layout = tile.kept["turned"], plgpu.Layout.WGMMA_8BIT
        turned[...] = plgpu.load(tile.smem("x"), layout=layout).astype(jnp.float16)
        plgpu.commit_smem()
        along = plgpu.load(tile.smem("x_scale"), layout=WGMMA.reduce(0))
        x = plgpu.load(turned.T, layout=WGMMA).astype(jnp.float32) * lax.broadcast_in_dim(along, (TILE, TILE), [1])
        q, scale = quantize(x, layout=WGMMA)
        send(tile, q, scale, q_ref.at[tile.columns, tile.rows], scale_ref.at[tile.mb, tile.columns])

    made = walk(
        (q_MK, scale),
        tiles_of(dim_k, rows),
        grid=(rows // TILE, dim_k // TILE),
        staged={"x": smem_tile(F8, tiling.stages), "x_scale": plgpu.SMEM((tiling.stages, TILE), jnp.float32)},
        kept=OUTBOX | {"turned": smem_tile(jnp.float16)},
        fetch=fetch,
        work=work,
        tiling=tiling,
        interpret=interpret,
        **options,
    )
    return Tiles(*made)


def quantize_weight(
    w_GKN: Array,
    power_of_two: bool = False,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """The codes of weights ``[G, K, N]``, those of their transposes and the scales ``[G, K / 128, N / 128]``."""
    (groups, dim_k, dim_n), tiling = w_GKN.shape, tiling or _WEIGHT_TILING
    k_tiles, n_tiles = dim_k // TILE, dim_n // TILE

    def fetch(tile: Tile, w_ref: Any, *_: Any) -> None:
        tile.fetch(w_ref.at[tile.rows, tile.columns], "w")

    def work(tile: Tile, _: Any, q_ref: Any, turned_ref: Any, scale_ref: Any) -> None:
        halves = [pl.ds(first, _HALF) for first in (0, _HALF)]
        group, kb = lax.div(tile.mb, k_tiles), lax.rem(tile.mb, k_tiles)

        def half(rows: Any) -> Array:
            return plgpu.load(tile.smem("w").at[rows], layout=WGMMA).astype(jnp.float32)

        upper, lower = (jnp.max(jnp.abs(half(rows)), axis=1) for rows in halves)
        scale = scale_of(jnp.max(jnp.maximum(upper, lower)), power_of_two, interpret)
        scale_ref[tile.mb, tile.kb] = scale
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for rows in halves:
            codes = encode(half(rows), scale, layout=WGMMA, power_of_two=power_of_two, interpret=interpret)
            tile.kept["q"][rows, :] = codes
            tile.kept["wide"][rows, :] = codes.astype(jnp.float16)
        tile.kept["turned"][...] = plgpu.load(tile.kept["wide"].T, layout=WGMMA).astype(F8)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile.kept["q"], q_ref.at[tile.rows, tile.columns])
        turned_rows, turned_columns = pl.ds((group * n_tiles + tile.kb) * TILE, TILE), pl.ds(kb * TILE, TILE)
        plgpu.copy_smem_to_gmem(tile.kept["turned"], turned_ref.at[turned_rows, turned_columns])

    q_KN, q_NK, scale_KN = walk(
        (w_GKN.reshape(groups * dim_k, dim_n),),
        [
            jax.ShapeDtypeStruct((groups * dim_k, dim_n), F8),
            jax.ShapeDtypeStruct((groups * dim_n, dim_k), F8),
            jax.ShapeDtypeStruct((groups * k_tiles, n_tiles), jnp.float32),
        ],
        grid=(groups * k_tiles, n_tiles),
        staged={"w": smem_tile(w_GKN.dtype, tiling.stages)},
        kept={"q": smem_tile(F8), "turned": smem_tile(F8), "wide": smem_tile(jnp.float16)},
        fetch=fetch,
        work=work,
        tiling=tiling,
        barriers=True,
        interpret=interpret,
        **options,
    )
    lead = (groups,)
    return q_KN.reshape(w_GKN.shape), q_NK.reshape(*lead, dim_n, dim_k), scale_KN.reshape(*lead, k_tiles, n_tiles)
