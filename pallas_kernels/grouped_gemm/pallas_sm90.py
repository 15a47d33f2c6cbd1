"""The Hopper kernels (Mosaic GPU): the product with either orientation of the weights, and the weight gradient.

Both are one persistent, warp-specialised matrix product, fed differently. A thread block stays on its SM and walks
over output tiles of 128 rows in an order that keeps operands in L2. One warpgroup copies operand tiles of 64 along the
contraction into a ring of shared-memory stages (TMA); two others multiply (wgmma) into float32 registers, one product
always in flight, and hand stages back one step late. Results leave in column chunks by TMA while the copies for the
next tile already run. The two either share a tile, 64 rows each, or take turns (``ping_pong``): each has every second
tile to itself and stores its result while the other multiplies; that the stages are filled tile by tile keeps them in
turn.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying

TILE_M = 128
"""Rows of an output tile."""
STEP = 64
"""Elements along the contraction in one stage: 128 bytes, the widest swizzle."""

_MATH_WARPGROUPS = 2
_COPY_REGISTERS = 40
_MATH_REGISTERS = 232
_SUPPORTED_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is tuned.

    Attributes:
        tile_n: columns of an output tile, at most 256, or 128 with ``ping_pong`` (registers).
        stages: operand tiles in flight in shared memory.
        store_slots: result chunks in flight to global memory, for each multiplying warpgroup.
        minor: dimension of the tile grid (0 rows, 1 columns) that is walked first.
        width: tiles of the minor dimension that are walked before the other dimension moves.
        ping_pong: whether the multiplying warpgroups take turns instead of sharing a tile.
    """

    tile_n: int = 256
    stages: int = 4
    store_slots: int = 2
    minor: int = 1
    width: int = 8
    ping_pong: bool = False


_WGRAD_TILING = Tiling(tile_n=128, stages=5, width=8, ping_pong=True)
"""Float32 results are twice as wide: taking turns hides their store (2.5 to 3% on an H200, docs/performance.md)."""


class _Tile(NamedTuple):
    """Where one output tile gets its operands and leaves its result."""

    a_at: Callable[[Any], Any]
    b_at: Callable[[Any], Any]
    out: Any
    steps: Any


def obstacle(x_MK: Array, w_GKN: Array, block: int) -> str | None:
    """Says why the kernels cannot compute this product or its gradients, or None where they can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if str(x_MK.dtype) not in _SUPPORTED_DTYPES:
        return f"x_MK must be {' or '.join(_SUPPORTED_DTYPES)}, got {x_MK.dtype}"
    if block % TILE_M:
        return f"block must be a multiple of {TILE_M}, got {block}"
    if any(dim % TILE_M for dim in w_GKN.shape[1:]):
        return f"K and N must be multiples of {TILE_M}, got {w_GKN.shape[1:]}"
    return None


def gemm(
    x_MK: Array,
    w: Array,
    group_of_block: Array,
    num_blocks: Array,
    *,
    block: int,
    transpose_w: bool,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """Rows times their block's weight ``[G, K, N]`` (``[G, N, K]`` with ``transpose_w``), in ``x_MK``'s dtype.

    Blocks from ``num_blocks`` on are not read; their rows of the result are written as zeros.
    """
    rows, dim_k = x_MK.shape
    dim_n = w.shape[1] if transpose_w else w.shape[2]
    tiling = tiling or Tiling(tile_n=256 if dim_n % 256 == 0 else 128)
    tile_n = _divided(dim_n, tiling)
    grid = (rows // TILE_M, dim_n // tile_n)

    def locate(index: Any, x_ref: Any, w_ref: Any, group_ref: Any, used_ref: Any, out_ref: Any) -> _Tile:
        mi, ni = plgpu.planar_snake(index, grid, tiling.minor, tiling.width)
        block_index = lax.div(mi, block // TILE_M)
        w_group = w_ref.at[group_ref[block_index]]
        tile_rows, tile_columns = pl.ds(mi * TILE_M, TILE_M), pl.ds(ni * tile_n, tile_n)

        def w_at(k: Any) -> Any:
            return w_group.at[tile_columns, k] if transpose_w else w_group.at[k, tile_columns]

        return _Tile(
            a_at=lambda k: x_ref.at[tile_rows, k],
            b_at=w_at,
            out=out_ref.at[tile_rows, tile_columns],
            steps=jnp.where(block_index < used_ref[0], dim_k // STEP, 0),
        )

    return _persistent_product(
        (x_MK, w, group_of_block, jnp.reshape(num_blocks, (1,))),
        jax.ShapeDtypeStruct((rows, dim_n), x_MK.dtype),
        locate,
        num_tiles=math.prod(grid),
        transpose_a=False,
        transpose_b=transpose_w,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
    )


def wgrad(
    x_MK: Array,
    dy_MN: Array,
    group_of_block: Array,
    num_blocks: Array,
    *,
    block: int,
    num_groups: int,
    tiling: Tiling | None = None,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """``dw[g] = sum of x^T dy over the rows of group g``, float32 ``[G, K, N]``; a group without rows gets zeros.

    ``group_of_block`` must never decrease; blocks from ``num_blocks`` on are not read.
    """
    dim_k, dim_n = x_MK.shape[1], dy_MN.shape[1]
    tiling = tiling or _WGRAD_TILING
    tile_n = _divided(dim_n, tiling)
    grid = (dim_k // TILE_M, dim_n // tile_n)
    groups = jnp.arange(num_groups + 1, dtype=group_of_block.dtype)
    first_block = jnp.minimum(jnp.searchsorted(group_of_block, groups).astype(jnp.int32), num_blocks)

    def locate(index: Any, x_ref: Any, dy_ref: Any, first_ref: Any, out_ref: Any) -> _Tile:
        group, tile = lax.div(index, math.prod(grid)), lax.rem(index, math.prod(grid))
        ki, ni = plgpu.planar_snake(tile, grid, tiling.minor, tiling.width)
        first, end = first_ref[group], first_ref[group + 1]
        tile_rows, tile_columns = pl.ds(ki * TILE_M, TILE_M), pl.ds(ni * tile_n, tile_n)

        def rows_at(m: Any) -> Any:
            return pl.ds(first * block + m.start, STEP)

        return _Tile(
            a_at=lambda m: x_ref.at[rows_at(m), tile_rows],
            b_at=lambda m: dy_ref.at[rows_at(m), tile_columns],
            out=out_ref.at[group, tile_rows, tile_columns],
            steps=(end - first) * (block // STEP),
        )

    return _persistent_product(
        (x_MK, dy_MN, first_block),
        jax.ShapeDtypeStruct((num_groups, dim_k, dim_n), jnp.float32),
        locate,
        num_tiles=num_groups * math.prod(grid),
        transpose_a=True,
        transpose_b=False,
        tiling=tiling,
        sm_count=sm_count,
        interpret=interpret,
    )


def _divided(dim_n: int, tiling: Tiling) -> int:
    if dim_n % tiling.tile_n:
        raise ValueError(f"grouped_gemm: tile_n = {tiling.tile_n} does not divide the {dim_n} columns of the result")
    return tiling.tile_n


def swizzled(dtype: Any) -> tuple[Any, Any]:
    """The layout of a shared-memory tile whose rows are cut into 128-byte pieces."""
    tiling = plgpu.TilingTransform((8, 128 // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def _persistent_product(
    operands: tuple[Array, ...],
    out_type: jax.ShapeDtypeStruct,
    locate: Callable[..., _Tile],
    *,
    num_tiles: int,
    transpose_a: bool,
    transpose_b: bool,
    tiling: Tiling,
    sm_count: int,
    interpret: Any,
) -> Array:
    """Runs ``locate``'s tiles: each is the sum over its steps of (A tile) x (B tile), A and B given as they lie."""
    dtype, out_dtype = operands[0].dtype, out_type.dtype
    tile_n, stages, slots, ping_pong = tiling.tile_n, tiling.stages, tiling.store_slots, tiling.ping_pong
    chunk = 128 // out_dtype.itemsize
    rows = TILE_M if ping_pong else TILE_M // _MATH_WARPGROUPS
    arrivals = 1 if ping_pong else _MATH_WARPGROUPS

    def body(*refs: Any, a_smem: Any, b_smem: Any, out_smem: Any, full: Any, empty: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        def advance(slot: Any, steps: Any) -> Any:
            return lax.rem(slot + steps, stages)

        def following(slot: Any) -> Any:
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def full_at(slot: Any, consumer: Any) -> Any:
            # A barrier's waiters must see each of its phases, so warpgroups that take turns need their own.
            return full.at[consumer * stages + slot] if ping_pong else full.at[slot]

        def for_every_tile(work: Callable[[_Tile, Any, Any], Any]) -> None:
            @plgpu.nd_loop((num_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def _(info: plgpu.NDLoopInfo, carry: Any) -> Any:
                return work(locate(info.index[0], *refs), lax.rem(info.local_index, _MATH_WARPGROUPS), carry)

        @pl.when(warpgroup == _MATH_WARPGROUPS)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def fill(tile: _Tile, turn: Any, slot: Any) -> Any:
                def step(k: Any, slot: Any) -> Any:
                    plgpu.barrier_wait(empty.at[slot])
                    along = pl.ds(k * STEP, STEP)
                    plgpu.copy_gmem_to_smem(tile.a_at(along), a_smem.at[slot], full_at(slot, turn))
                    plgpu.copy_gmem_to_smem(tile.b_at(along), b_smem.at[slot], full_at(slot, turn))
                    return following(slot)

                return lax.fori_loop(0, tile.steps, step, slot)

            for_every_tile(fill)
            for slot in range(stages):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < _MATH_WARPGROUPS)
        def _math() -> None:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
            my_rows = pl.ds(0, rows) if ping_pong else pl.ds(warpgroup * rows, rows)

            @pl.when(warpgroup < arrivals)
            def _() -> None:
                for slot in range(stages):
                    plgpu.barrier_arrive(empty.at[slot])

            def multiply(tile: _Tile, slot: Any) -> Any:
                def accumulate(acc_ref: Any) -> tuple[Any, Any]:
                    def step(k: Any, slots: Any) -> Any:
                        slot, previous = slots
                        plgpu.barrier_wait(full_at(slot, warpgroup))
                        a = a_smem.at[slot, :, my_rows].T if transpose_a else a_smem.at[slot, my_rows]
                        b = b_smem.at[slot].T if transpose_b else b_smem.at[slot]
                        plgpu.wgmma(acc_ref, a, b)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(empty.at[previous])

                        return following(slot), slot

                    slot_after, last = lax.fori_loop(0, tile.steps, step, (slot, slot))
                    acc = plgpu.wgmma_accumulator_load(acc_ref)

                    @pl.when(tile.steps > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(empty.at[last])

                    return acc, slot_after

                acc, slot = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((rows, tile_n), jnp.float32))
                for n in range(tile_n // chunk):
                    columns = slice(n * chunk, (n + 1) * chunk)
                    staged = out_smem.at[warpgroup, n % slots]
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    staged[...] = acc[:, columns].astype(out_dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged, tile.out.at[my_rows, columns])
                return slot

            def take_turn(tile: _Tile, turn: Any, slot: Any) -> Any:
                mine = functools.partial(multiply, tile)
                return lax.cond(turn == warpgroup, mine, lambda slot: advance(slot, tile.steps), slot)

            for_every_tile(take_turn if ping_pong else lambda tile, turn, slot: multiply(tile, slot))
            plgpu.wait_smem_to_gmem(0)

    a_shape = (STEP, TILE_M) if transpose_a else (TILE_M, STEP)
    b_shape = (tile_n, STEP) if transpose_b else (STEP, tile_n)
    out_shape = (_MATH_WARPGROUPS, slots, rows, chunk)
    full_barriers = stages * (_MATH_WARPGROUPS if ping_pong else 1)
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types={
            "a_smem": plgpu.SMEM((stages, *a_shape), dtype, transforms=swizzled(dtype)),
            "b_smem": plgpu.SMEM((stages, *b_shape), dtype, transforms=swizzled(dtype)),
            "out_smem": plgpu.SMEM(out_shape, out_dtype, transforms=swizzled(out_dtype)),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=full_barriers),
            "empty": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        },
        grid=(sm_count,),
        grid_names=("sm",),
        num_threads=_MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    return varying.like(kernel(*operands), *operands)
