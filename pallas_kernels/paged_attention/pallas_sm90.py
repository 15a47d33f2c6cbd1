"""The Hopper kernel (Mosaic GPU): attention of up to 64 rows (queries times heads) at a time over paged latents.

A thread block walks over its part of the line of key blocks (``schedule``). One warpgroup copies blocks, page by
page, into a ring of two slots (TMA). Two others share one output of 64 rows, half of its columns each, for it does not
fit in one's registers. They take turns with the scores: warpgroup w multiplies queries and keys of slot w, takes the
softmax and leaves the probabilities where the block's rotated keys were, which nobody needs any more; both then add
the block's values, each to its own columns. While one is at its softmax, the other multiplies.

A sequence that lies whole in one part is finished here. Of others each part leaves its unnormalized sum, its running
maximum and its denominator for :mod:`pallas_kernels.paged_attention.combine_sm90`.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.paged_attention import combine_sm90
from pallas_kernels.paged_attention.schedule import BLOCK, Schedule, divided

TILE = 64
"""Rows of an output tile, the least a wgmma multiplies."""
ROPE = 64
LARGEST_LATENT = 512

_SLOTS = 2
_MATH_WARPGROUPS = 2
_COPY_REGISTERS = 24
_MATH_REGISTERS = 240
_LOWEST = -1e30
"""Where running maxima begin: finite, for the difference of two of them must be a number."""

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def obstacle(q_BTNC: Array, latent_PSC: Array, key_PSR: Array, most_queries: int) -> str | None:
    """Says why the kernel cannot attend to these, or None where it can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    queries, dim = q_BTNC.shape[1], q_BTNC.shape[3]
    if {str(q_BTNC.dtype), str(latent_PSC.dtype), str(key_PSR.dtype)} != {"bfloat16"}:
        return f"it takes bfloat16, got {q_BTNC.dtype} over {latent_PSC.dtype} and {key_PSR.dtype}"
    if queries > most_queries:
        return f"it takes at most {most_queries} queries a sequence, got {queries}"
    if dim % 256 or dim > LARGEST_LATENT or key_PSR.shape[2] != ROPE:
        return f"C must be a multiple of 256 up to {LARGEST_LATENT} and R {ROPE}, got {dim} and {key_PSR.shape[2]}"
    if latent_PSC.shape[1] % BLOCK:
        return f"pages must have a multiple of {BLOCK} tokens, got {latent_PSC.shape[1]}"
    return None


def plan(
    q_BTNC: Array, latent_PSC: Array, table_BX: Array, first_B: Array, sm_count: int = dispatch.HOPPER_SM_COUNT
) -> Schedule:
    """Who attends to what; of the arrays only ``first_B`` is read, so all layers of a step have the same."""
    parts = max(1, sm_count // _tiles_of(q_BTNC))
    return divided(first_B, q_BTNC.shape[1], table_BX.shape[1] * (latent_PSC.shape[1] // BLOCK), parts)


def paged_attention(
    q_BTNC: Array,
    q_BTNR: Array,
    latent_PSC: Array,
    key_PSR: Array,
    table_BX: Array,
    first_B: Array,
    schedule: Schedule | None = None,
    *,
    scale: float,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> Array:
    """As :func:`pallas_kernels.paged_attention.op.paged_attention`, of what :func:`obstacle` finds nothing against.

    ``schedule`` is :func:`plan`'s; without one it is made here.
    """
    batch, queries, heads, dim = q_BTNC.shape
    rows = queries * heads
    spare = ((0, 0), (0, -rows % (8 if rows <= TILE else TILE)), (0, 0))
    q_BMC, q_BMR = (jnp.pad(q.reshape(batch, rows, -1), spare) for q in (q_BTNC, q_BTNR))
    latents, keys = (pages.reshape(-1, BLOCK, pages.shape[2]) for pages in (latent_PSC, key_PSR))
    schedule = schedule or plan(q_BTNC, latent_PSC, table_BX, first_B, sm_count)
    operands = (q_BMC, q_BMR, latents, keys, table_BX.astype(jnp.int32), first_B.astype(jnp.int32), *schedule)
    attend = functools.partial(
        _attend,
        queries=queries,
        heads=heads,
        blocks_of_page=latent_PSC.shape[1] // BLOCK,
        scale=scale,
        tiles=_tiles_of(q_BTNC),
        interpret=interpret,
    )
    out_BMC, sums, stats = attend(*(varying.like(operand, *operands) for operand in operands))
    out_BMC = combine_sm90.combine(out_BMC, sums, stats, *schedule, interpret=interpret)
    return varying.like(out_BMC[:, :rows].reshape(batch, queries, heads, dim), *operands)


def _tiles_of(q_BTNC: Array) -> int:
    return -(-q_BTNC.shape[1] * q_BTNC.shape[2] // TILE)


def _swizzled() -> tuple[Any, Any]:
    """The layout of a bfloat16 tile in shared memory whose rows are cut into 128-byte pieces."""
    tiling = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def _attend(
    q_BMC: Array,
    q_BMR: Array,
    latents: Array,
    keys: Array,
    table_BX: Array,
    first_B: Array,
    start_B: Array,
    work_P4: Array,
    *,
    queries: int,
    heads: int,
    blocks_of_page: int,
    scale: float,
    tiles: int,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """The output where a sequence is whole in a part, and the pieces: see :func:`combine_sm90.combine`."""
    batch, rows, dim = q_BMC.shape
    parts, half, quarter, tile_rows = work_P4.shape[0], dim // 2, dim // 4, min(rows, TILE)
    to_log2 = scale * math.log2(math.e)

    def mla_decode(
        q_ref: Any,
        q_rope_ref: Any,
        latent_ref: Any,
        key_ref: Any,
        table_ref: Any,
        first_ref: Any,
        start_ref: Any,
        work_ref: Any,
        out_ref: Any,
        sum_ref: Any,
        stat_ref: Any,
        *,
        q_smem: Any,
        q_rope_smem: Any,
        latent_smem: Any,
        rope_smem: Any,
        stat_smem: Any,
        q_full: Any,
        q_empty: Any,
        near_full: Any,
        far_full: Any,
        empty: Any,
        ready: Any,
        met: Any,
    ) -> None:
        warpgroup, sm = lax.axis_index("warpgroup"), lax.axis_index("sm")
        part, tile = lax.div(sm, tiles), lax.rem(sm, tiles)
        my_rows = pl.ds(tile * TILE, tile_rows)

        def unknown_zero(number: Any) -> Any:
            """Zero, but the compiler does not see that an address with it in it never changes."""
            return lax.shift_right_arithmetic(number, 30)

        def piece(b: Any) -> tuple[Any, Any]:
            """The blocks of sequence b that are this part's."""
            start = start_ref[b]
            return jnp.maximum(work_ref[part, 2], start) - start, jnp.minimum(
                work_ref[part, 3], start_ref[b + 1]
            ) - start

        @pl.when(warpgroup == _MATH_WARPGROUPS)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_queries(b: Any) -> None:
                plgpu.barrier_wait(q_empty)
                for i in range(4):
                    q_from = q_ref.at[b, my_rows, pl.ds(i * quarter, quarter)]
                    plgpu.copy_gmem_to_smem(q_from, q_smem.at[i, pl.ds(0, tile_rows)], q_full.at[0])
                plgpu.copy_gmem_to_smem(q_rope_ref.at[b, my_rows], q_rope_smem.at[0, pl.ds(0, tile_rows)], q_full.at[0])

            def sequence(b: Any, slot: Any) -> Any:
                begin, end = piece(b)

                def block(j: Any, slot: Any) -> Any:
                    page = table_ref[b, lax.div(j, blocks_of_page)] * blocks_of_page + lax.rem(j, blocks_of_page)
                    plgpu.barrier_wait(empty.at[2 * slot])
                    near, far = (latent_ref.at[page, :, pl.ds(side * half, half)] for side in range(2))
                    plgpu.copy_gmem_to_smem(near, latent_smem.at[slot, 0], near_full.at[slot])
                    plgpu.barrier_wait(empty.at[2 * slot + 1])
                    plgpu.copy_gmem_to_smem(far, latent_smem.at[slot, 1], far_full.at[slot])
                    plgpu.copy_gmem_to_smem(key_ref.at[page], rope_smem.at[slot], far_full.at[slot])
                    pl.when(j == jnp.minimum(begin + 1, end - 1))(lambda: copy_queries(b))
                    return 1 - slot

                return lax.fori_loop(begin, end, block, slot)

            lax.fori_loop(work_ref[part, 0], work_ref[part, 1], sequence, jnp.int32(0))
            for slot in range(_SLOTS):
                for side in range(2):
                    plgpu.barrier_wait(empty.at[2 * slot + side])
            plgpu.barrier_wait(q_empty)

        @pl.when(warpgroup < _MATH_WARPGROUPS)
        def _math() -> None:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
            plgpu.barrier_arrive(q_empty)
            for slot in range(_SLOTS):
                plgpu.barrier_arrive(empty.at[2 * slot + warpgroup])

            def filled(shape: tuple[int, ...], value: float, layout: Any) -> Any:
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            def own_scores(slot: Any, j: Any, limit: Any, m: Any) -> tuple[Any, Any]:
                """Scores and softmax of the block in this warpgroup's slot, for both warpgroups to multiply by."""

                zero = unknown_zero(j)  # else 76 addresses are kept in registers
                keys, rope = latent_smem.at[slot + zero], rope_smem.at[slot + zero]

                def product(acc_ref: Any) -> Any:
                    for i in range(4):
                        if i % 2 == 0:
                            plgpu.barrier_wait((near_full, far_full)[i // 2].at[slot])
                        plgpu.wgmma(acc_ref, q_smem.at[zero + i], keys.at[i // 2, :, pl.ds(i % 2 * quarter, quarter)].T)
                    plgpu.wgmma(acc_ref, q_rope_smem.at[zero], rope.T)
                    return acc_ref[...]

                scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, BLOCK), jnp.float32))
                position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + j * BLOCK
                seen = position <= lax.broadcast_in_dim(limit, scores.shape, [0])
                scores = jnp.where(seen, scores, -jnp.inf)
                m_new = jnp.maximum(m, scores.max(axis=1) * to_log2)
                p = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(m_new, scores.shape, [0]))
                rope[...] = p.astype(jnp.bfloat16)
                stat_smem.at[slot][...] = m_new
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[slot])
                return m_new, p.sum(axis=1)

            def others_scores(slot: Any) -> tuple[Any, Any]:
                plgpu.barrier_wait(ready.at[slot])
                return plgpu.load(stat_smem.at[slot], layout=_ROWS), filled((TILE,), 0.0, _ROWS)

            def blank(values: Any, count: Any) -> None:
                """Zeros behind a sequence's last token: what lies there may be infinite."""
                for c in range(0, half, 64):
                    some = values.at[:, pl.ds(c, 64)]
                    v = plgpu.load(some, layout=plgpu.Layout.WGMMA)
                    row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
                    some[...] = jnp.where(row < count, v, jnp.zeros_like(v))
                plgpu.commit_smem()

            def sequence(b: Any, slot: Any) -> Any:
                begin, end = piece(b)
                first = first_ref[b]
                row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=_ROWS) + tile * TILE
                limit = first + lax.div(row, heads)

                def block(j: Any, carry: Any) -> Any:
                    out, m, denominator, slot = carry
                    m_new, added = lax.cond(
                        slot == warpgroup,
                        lambda m: own_scores(slot, j, limit, m),
                        lambda m: others_scores(slot),
                        m,
                    )
                    change = jnp.exp2(m - m_new)
                    denominator = denominator * change + added
                    values = latent_smem.at[slot, warpgroup]
                    count = first + queries - j * BLOCK
                    pl.when(count < BLOCK)(lambda: blank(values, count))
                    out = out * lax.broadcast_in_dim(change, out.shape, [0])
                    out = _plus_product(out, rope_smem.at[slot], values, interpret)
                    plgpu.barrier_arrive(empty.at[2 * slot + warpgroup])
                    return out, m_new, denominator, 1 - slot

                plgpu.barrier_wait(q_full.at[unknown_zero(b)])
                nothing = filled((TILE, half), 0.0, plgpu.Layout.WGMMA), filled((TILE,), _LOWEST, _ROWS)
                carry = (*nothing, filled((TILE,), 0.0, _ROWS), slot)
                out, m, own_sum, slot = lax.fori_loop(begin, end, block, carry)
                stat_smem.at[_SLOTS + warpgroup][...] = own_sum
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)
                denominator = own_sum + plgpu.load(stat_smem.at[_SLOTS + 1 - warpgroup], layout=_ROWS)

                def leave(*places: Any) -> None:
                    """Copies what is staged in this warpgroup's two quarters."""
                    plgpu.commit_smem()
                    for i, to_ref in enumerate(places):
                        plgpu.copy_smem_to_gmem(q_smem.at[2 * warpgroup + i, pl.ds(0, tile_rows)], to_ref)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def in_pieces(i: int) -> Iterator[tuple[Any, Any]]:
                    """Columns of a quarter of the output, and what of it they are."""
                    for c in range(0, quarter, 64):
                        yield pl.ds(c, 64), out[:, i * quarter + c : i * quarter + c + 64]

                mine = [pl.ds(warpgroup * half + i * quarter, quarter) for i in range(2)]
                blocks = start_ref[b + 1] - start_ref[b]
                begin, end = piece(b)  # read again rather than kept: registers are scarce in the loop
                whole = end - begin == blocks

                @pl.when(whole)
                def _() -> None:
                    factor = 1 / denominator
                    for i in range(2):
                        for columns, some in in_pieces(i):
                            some *= lax.broadcast_in_dim(factor, some.shape, [0])
                            q_smem.at[2 * warpgroup + i, :, columns][...] = some.astype(jnp.bfloat16)
                    leave(*(out_ref.at[b, my_rows, columns] for columns in mine))

                @pl.when(jnp.logical_not(whole))
                def _() -> None:
                    which = jnp.where(b == work_ref[part, 0], 0, 1)
                    for i in range(2):
                        for columns, some in in_pieces(i):
                            bits = lax.bitcast_convert_type(some, jnp.int32) & jnp.int32(-(1 << 16))
                            large = lax.bitcast_convert_type(bits, jnp.float32)
                            q_smem.at[2 * warpgroup, :, columns][...] = large.astype(jnp.bfloat16)
                            q_smem.at[2 * warpgroup + 1, :, columns][...] = (some - large).astype(jnp.bfloat16)
                        leave(*(sum_ref.at[sm, which, size, :, mine[i]] for size in range(2)))

                    @pl.when(warpgroup == 0)
                    def _() -> None:
                        stat_ref[sm, which, 0] = m
                        stat_ref[sm, which, 1] = denominator

                plgpu.barrier_arrive(q_empty)
                return slot

            lax.fori_loop(work_ref[part, 0], work_ref[part, 1], sequence, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def tile_smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=_swizzled())

    kernel = plgpu.kernel(
        mla_decode,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((parts * tiles, 2, 2, tile_rows, dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((parts * tiles, 2, 2, TILE), jnp.float32),
        ),
        scratch_types={
            "q_smem": tile_smem(4, TILE, quarter),
            "q_rope_smem": tile_smem(1, TILE, ROPE),
            "latent_smem": tile_smem(_SLOTS, 2, BLOCK, half),
            "rope_smem": tile_smem(_SLOTS, BLOCK, ROPE),
            "stat_smem": plgpu.SMEM((_SLOTS + _MATH_WARPGROUPS, TILE), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=5, num_barriers=1),
            "q_empty": plgpu.Barrier(num_arrivals=_MATH_WARPGROUPS),
            "near_full": plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
            "far_full": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
            "empty": plgpu.Barrier(num_arrivals=1, num_barriers=2 * _SLOTS),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
            "met": plgpu.Barrier(num_arrivals=_MATH_WARPGROUPS),
        },
        grid=(parts * tiles,),
        grid_names=("sm",),
        num_threads=_MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(q_BMC, q_BMR, latents, keys, table_BX, first_B, start_B, work_P4)


def _plus_product(out: Any, p_ref: Any, value_ref: Any, interpret: Any) -> Any:
    """``out + p @ values``, accumulated in place; the interpreter knows only products that begin at zero."""

    def multiply(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, p_ref, value_ref)

    if interpret is None:
        return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(out))

    def product(acc_ref: Any) -> Any:
        multiply(acc_ref)
        return acc_ref[...]

    return out + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(out.shape, jnp.float32))
