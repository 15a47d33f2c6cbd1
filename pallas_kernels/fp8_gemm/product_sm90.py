"""The one Hopper kernel (Mosaic GPU) under every block-scaled FP8 product: dense, grouped, masked, weight gradient.

Persistent and warp-specialised: a thread block stays on its SM and walks over output tiles. One warp copies operand
tiles of 128 along the contraction, and their scales, into a ring of shared-memory stages (TMA); one to three
warpgroups of 64 rows each multiply (wgmma). Hopper's tensor cores add FP8 products with about 14 bits, so after each
128 of the contraction the partial sums go to float32 registers, times both scales (spec 11.4). ``unroll`` steps share
a loop body and overlap: the sums of one are promoted while the next multiplies. In a cluster of two, blocks take
neighbouring tiles and the operand that both need is fetched once (TMA multicast).

Each result tile leaves in column chunks by TMA while the copies for the next one already run.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core as jax_core

from pallas_kernels import varying

STEP = 128
"""Elements of the contraction in one stage: the width of a scale's block, and of the widest swizzle."""

_ROWS = 64
_COPY_REGISTERS = 24
_ROW_SCALES = plgpu.Layout.WGMMA.reduce(1)
_COLUMN_SCALES = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is tuned.

    Attributes:
        block_n: columns of an output tile, a multiple of 16 and at most 256. Where a tile is not a part of one
            128-wide weight block, it takes a scale for each ``gcd(block_n, 128)`` columns.
        warpgroups: multiplying warpgroups; each has 64 rows of the tile.
        stages: operand tiles in flight in shared memory.
        unroll: steps in a loop body. Equal to ``stages`` and a divisor of the number of steps, slots are static.
        store_slots: most result chunks in flight to global memory, for each multiplying warpgroup (see ``slots``).
        minor: dimension of the tile grid (0 rows, 1 columns) that is walked first.
        width: tiles of the minor dimension that are walked before the other dimension moves.
        cluster: thread blocks in a cluster, 1 or 2.
        share: which operand a cluster fetches once: ``"b"`` for tiles below one another, ``"a"`` for tiles beside.
        fenced: whether a fence stands between reading scales from a stage and handing it back to the copy engine.
    """

    block_n: int = 128
    warpgroups: int = 2
    stages: int = 4
    unroll: int = 4
    store_slots: int = 2
    minor: int = 1
    width: int = 8
    cluster: int = 1
    share: Literal["a", "b"] = "b"
    fenced: bool = False

    @property
    def block_m(self) -> int:
        """Rows of an output tile."""
        return self.warpgroups * _ROWS

    @property
    def chunk(self) -> int:
        """Columns that share one weight scale, wherever the tile begins."""
        return math.gcd(self.block_n, STEP)

    def store_columns(self, out_bytes: int) -> int:
        """Columns of a result chunk: one scale's at most, and 128 bytes."""
        return math.gcd(self.chunk, 128 // out_bytes)

    def slots(self, out_bytes: int) -> int:
        """Slots for result chunks: a divisor of a tile's chunks, so that each is free again when its turn comes."""
        chunks = self.block_n // self.store_columns(out_bytes)
        return max(slots for slots in range(1, self.store_slots + 1) if chunks % slots == 0)

    def name(self, column_scales: bool) -> str:
        """Such as ``fp8_n128w2s5u4o2_n8c1``, ``fp8x8`` with column scales: names the kernel in profiles and reports."""
        cluster = f"c{self.cluster}{self.share if self.cluster > 1 else ''}"
        return (
            f"fp8{'x8' if column_scales else ''}_n{self.block_n}w{self.warpgroups}s{self.stages}u{self.unroll}"
            f"o{self.store_slots}_{'mn'[self.minor]}{self.width}{cluster}{'f' if self.fenced else ''}"
        )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles down and across, in whole clusters along the dimension that a cluster spans."""
        down, across = -(-rows // self.block_m), -(-columns // self.block_n)
        if self.share == "b":
            return -(-down // self.cluster), across
        return down, -(-across // self.cluster)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where one output tile gets its operands and leaves its result.

    Attributes:
        a_at: step -> A's ``[block_m, 128]`` in global memory.
        b_at: step -> B's ``[block_n, 128]``.
        a_scale_at: step -> the scales of A's rows ``[block_m]``.
        b_scale_at: step -> the scales of B's rows ``[block_n]``; None where B has block scales.
        b_block_scale: (chunk, step) -> the scale of the tile's chunk of columns; None where B has row scales.
        out_at: (rows, columns) -> that part of the tile's result.
        steps: of the contraction. A loop that may end before its first step costs registers, so where all tiles in use
            have as many steps this is a plain number.
        active: whether the tile has any step; else it is zeros. None: it has.
        row_limit: rows of the tile from here on are zeros; None: no such row.
    """

    a_at: Callable[[Any], Any]
    b_at: Callable[[Any], Any]
    a_scale_at: Callable[[Any], Any]
    b_scale_at: Callable[[Any], Any] | None
    b_block_scale: Callable[[int, Any], Any] | None
    out_at: Callable[[Any, Any], Any]
    steps: Any
    active: Any = None
    row_limit: Any = None


def tile_index(index: Any, grid: tuple[int, int], tiling: Tiling) -> tuple[Any, Any]:
    """Row and column of this block's tile, for the cluster's linear tile index."""
    row, column = plgpu.planar_snake(index, grid, tiling.minor, tiling.width)
    if tiling.cluster == 1:
        return row, column
    rank = lax.axis_index("cluster")
    if tiling.share == "b":
        return row * tiling.cluster + rank, column
    return row, column * tiling.cluster + rank


def _swizzled(dtype: Any, columns: int) -> tuple[Any, Any]:
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(columns * dtype.itemsize)  # pyright: ignore[reportAbstractUsage]


def _fence_scales() -> None:
    """Orders ordinary reads of shared memory before the copy engine's writes."""

    def fence_async_shared_cta(context: Any) -> None:  # the interpreter knows it by this name
        del context
        mosaic_utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)

    fence: Callable[..., Any] = plgpu.inline_mgpu()(fence_async_shared_cta)
    fence()


def _math_registers(warpgroups: int) -> int:
    """Registers a thread of the multiplying warpgroups may use: what the copying one leaves, in eights.

    Three warpgroups start with 168 a thread, four with 128; asking for more than their sum would wait for ever.
    """
    return min(240, (504 - _COPY_REGISTERS) // warpgroups // 8 * 8)


def run(
    operands: tuple[Array, ...],
    out_type: jax.ShapeDtypeStruct,
    locate: Callable[..., Tile],
    *,
    num_tiles: int,
    step_multiple: int,
    column_scales: bool,
    tiling: Tiling,
    sm_count: int,
    interpret: Any,
    into: Array | None = None,
) -> Array:
    """Computes every tile that ``locate`` names: the scaled sum over its steps of A times B transposed.

    Args:
        operands: what ``locate`` gets as references, after the tile's index and before the output's reference. The
            first two are the e4m3 matrices.
        out_type: of the result.
        locate: ``(index, *references, out) -> Tile``.
        num_tiles: tiles, or pairs of them for clusters of two.
        step_multiple: a number that divides every tile's steps, the number itself where all have as many.
        column_scales: whether B's scales are one a row of B and step (``b_scale_at``), else one a block.
        tiling: see there.
        sm_count: thread blocks.
        interpret: parameters of the interpreter, None on a GPU.
        into: float32 array that the result is added to, in place where the caller's jit donates it.

    Raises:
        ValueError: the tiling cannot work.
    """
    dtype, out_dtype = operands[0].dtype, out_type.dtype
    block_m, block_n, chunk = tiling.block_m, tiling.block_n, tiling.chunk
    stages, unroll, warpgroups = tiling.stages, tiling.unroll, tiling.warpgroups
    store_columns, slots = tiling.store_columns(out_dtype.itemsize), tiling.slots(out_dtype.itemsize)
    if block_n % 16 or block_n > 256 or (column_scales and block_n % 32):
        raise ValueError(f"block_n must be a multiple of 16 (32 with column scales) up to 256, got {block_n}")
    if column_scales:
        chunk = block_n
    static_slots = unroll == stages and step_multiple % stages == 0
    shared = {operand: "cluster" if tiling.cluster > 1 and tiling.share == operand else None for operand in ("a", "b")}

    def body(*refs: Any, a_smem: Any, b_smem: Any, a_scales: Any, b_scales: Any, out_smem: Any, full: Any, empty: Any):
        warpgroup = lax.axis_index("warpgroup")

        def following(slot: Any) -> Any:
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def for_every_tile(work: Callable[[Tile, Any], Any]) -> None:
            @plgpu.nd_loop((num_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def _(info: plgpu.NDLoopInfo, carry: Any) -> Any:
                return work(locate(info.index[0], *refs), carry)

        def fill(tile: Tile, slot: Any) -> Any:
            def step(k: Any, slot: Any) -> Any:
                plgpu.barrier_wait(empty.at[slot])
                arrived = full.at[slot]
                plgpu.copy_gmem_to_smem(tile.a_at(k), a_smem.at[slot], arrived, collective_axes=shared["a"])
                plgpu.copy_gmem_to_smem(tile.b_at(k), b_smem.at[slot], arrived, collective_axes=shared["b"])
                plgpu.copy_gmem_to_smem(tile.a_scale_at(k), a_scales.at[slot], arrived)
                if tile.b_scale_at is not None:
                    plgpu.copy_gmem_to_smem(tile.b_scale_at(k), b_scales.at[slot], arrived)
                return following(slot)

            steps = tile.steps if tile.active is None else jnp.where(tile.active, tile.steps, 0)
            return lax.fori_loop(0, steps, step, slot)

        def hand_back(slot: Any) -> None:
            if tiling.fenced:
                _fence_scales()
            plgpu.barrier_arrive(empty.at[slot])

        def compute(tile: Tile, slot: Any) -> Any:
            def clear(slot: Any) -> Any:
                if into is None:
                    store(tile, (zeros(),) * (block_n // chunk))
                return slot

            if tile.active is None:
                return multiply(tile, slot)
            return lax.cond(tile.active, lambda slot: multiply(tile, slot), clear, slot)

        def zeros() -> Array:
            return plgpu.layout_cast(jnp.zeros((_ROWS, chunk), jnp.float32), plgpu.Layout.WGMMA)

        def multiply(tile: Tile, slot: Any) -> Any:
            rows = pl.ds(warpgroup * _ROWS, _ROWS)

            def promote(sums: tuple[Array, ...], partial: Any, slot: Any, row_scale: Any, factors: list[Any]) -> Any:
                if column_scales:
                    column_scale = plgpu.load(b_scales.at[slot], layout=_COLUMN_SCALES)
                    scaled = partial * lax.broadcast_in_dim(column_scale, partial.shape, [1])
                    return (sums[0] + scaled * lax.broadcast_in_dim(row_scale, partial.shape, [0]),)
                return tuple(
                    total
                    + partial[:, c * chunk : (c + 1) * chunk]
                    * lax.broadcast_in_dim(row_scale * factors[c], (_ROWS, chunk), [0])
                    for c, total in enumerate(sums)
                )

            def steps(k: Any, count: int, sums: tuple[Array, ...], slot: Any) -> tuple[tuple[Array, ...], Any]:
                """``count`` steps from k: the sums of each are promoted while the next multiplies."""

                def finish(waiting: Any, in_flight: int, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                    accumulator, slot, row_scale, factors = waiting
                    partial = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
                    if not column_scales:
                        hand_back(slot)
                    sums = promote(sums, partial, slot, row_scale, factors)
                    if column_scales:
                        hand_back(slot)
                    return sums

                def step(u: int, waiting: Any, sums: tuple[Array, ...], slot: Any) -> Any:
                    here = u if static_slots else slot
                    factors = (
                        [tile.b_block_scale(c, k + u) for c in range(block_n // chunk)] if tile.b_block_scale else []
                    )
                    plgpu.barrier_wait(full.at[here])
                    row_scale = plgpu.load(a_scales.at[here, rows], layout=_ROW_SCALES)

                    def scope(accumulator: Any) -> Any:
                        plgpu.wgmma(accumulator, a_smem.at[here, rows], b_smem.at[here].T)
                        done = sums if waiting is None else finish(waiting, 1, sums)
                        mine = (accumulator, here, row_scale, factors)
                        after = slot if static_slots else following(slot)
                        if u + 1 < count:
                            return step(u + 1, mine, done, after)
                        return finish(mine, 0, done), after

                    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((_ROWS, block_n), jnp.float32))

                return step(0, None, sums, slot)

            carry = ((zeros(),) * (block_n // chunk), slot)
            rounds = tile.steps // unroll if isinstance(tile.steps, int) else lax.div(tile.steps, unroll)
            carry = lax.fori_loop(0, rounds, lambda i, carry: steps(i * unroll, unroll, *carry), carry)
            if step_multiple % unroll:
                carry = lax.fori_loop(rounds * unroll, tile.steps, lambda k, carry: steps(k, 1, *carry), carry)
            sums, slot = carry
            store(tile, sums)
            return slot

        def store(tile: Tile, sums: tuple[Array, ...]) -> None:
            rows = pl.ds(warpgroup * _ROWS, _ROWS)
            for n in range(block_n // store_columns):
                total, first = sums[n * store_columns // chunk], n * store_columns % chunk
                part = total[:, first : first + store_columns]
                if tile.row_limit is not None:
                    shape, layout = (_ROWS, store_columns), plgpu.Layout.WGMMA
                    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + warpgroup * _ROWS
                    part = jnp.where(row < tile.row_limit, part, 0.0)
                staged = out_smem.at[warpgroup, n % slots]
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                staged[...] = part.astype(out_dtype)
                plgpu.commit_smem()
                out = tile.out_at(rows, pl.ds(n * store_columns, store_columns))
                plgpu.copy_smem_to_gmem(staged, out, reduction_op=None if into is None else "add")

        @pl.when(warpgroup == warpgroups)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp: Any) -> None:
                @pl.when(warp == 0)
                def _() -> None:
                    for_every_tile(fill)
                    for slot in range(stages):
                        plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < warpgroups)
        def _math() -> None:
            plgpu.set_max_registers(_math_registers(warpgroups), action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(empty.at[slot])
            for_every_tile(compute)
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = tiling.name(column_scales)
    kernel = plgpu.kernel(
        body,
        out_type=() if into is not None else out_type,
        scratch_types={
            "a_smem": plgpu.SMEM((stages, block_m, STEP), dtype, transforms=_swizzled(dtype, STEP)),
            "b_smem": plgpu.SMEM((stages, block_n, STEP), dtype, transforms=_swizzled(dtype, STEP)),
            "a_scales": plgpu.SMEM((stages, block_m), jnp.float32),
            "b_scales": plgpu.SMEM((stages, block_n) if column_scales else (1, 128), jnp.float32),
            "out_smem": plgpu.SMEM(
                (warpgroups, slots, _ROWS, store_columns), out_dtype, transforms=_swizzled(out_dtype, store_columns)
            ),
            "full": plgpu.Barrier(num_arrivals=4 if column_scales else 3, num_barriers=stages),
            # One thread of a warpgroup arrives on a barrier of a cluster, all 128 on a block's own.
            "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages),
        },
        grid=(sm_count // tiling.cluster,),
        grid_names=("sm",),
        cluster=(tiling.cluster,),
        cluster_names=("cluster",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )

    def call(*operands: Array) -> Array:
        if into is None:
            return kernel(*operands)
        total = jax.new_ref(operands[-1])
        kernel(*operands[:-1], total)
        return jax.freeze(total)

    operands += () if into is None else (into,)
    if varying.axes_of(*operands):
        # Code for one warp may not see operands that vary over a mesh: it is traced on operands that do not.
        traced = jax.make_jaxpr(call)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
        return varying.like(jax_core.jaxpr_as_fun(traced)(*operands)[0], *operands)
    return call(*operands)
