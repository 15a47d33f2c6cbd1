"""The Hopper kernel (Mosaic GPU) of the norm's backward: x, the gradient of y and that of the residual path, read once.

Thread blocks stay on their SM and take a few rows at a time. A thread has the same columns in all of them, and sums its
part of the weight's gradient in registers. Rows come to shared memory ahead of time (TMA) and are read from there
twice: for the sums that a row needs, and for its gradient. The sums of the four warps meet at a step's one barrier,
behind which nobody reads the rows of the step before: their stage is filled again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.quantize.registers import round_16
from pallas_kernels.quantize.words import widened

STAGES = 2
"""Steps whose rows are in shared memory."""

STEP_VALUES = 8192
"""Of each input that a step takes at most, unless a row has more."""

_WARPS, _LANES = 4, 32
_SHARED_MEMORY = 220 * 1024
"""Bytes of an SM that staged rows may take."""


def blocks_per_sm(dim_k: int, staged_bytes: int) -> int:
    """Thread blocks that share an SM: what shared memory holds, or a thread's registers for that many columns."""
    return min(4 if dim_k <= 4096 else 2, _SHARED_MEMORY // staged_bytes)


def norm_backward(
    x_MK: Array,
    weight_K: Array,
    dy_MK: Array,
    dresidual_MK: Array | None = None,
    *,
    eps: float,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """See ``reference.norm_backward``; the gradient of x in its dtype."""
    (rows, dim_k), dtype = x_MK.shape, x_MK.dtype
    neighbours = max(count for count in (2, 4, 8) if dim_k % (_WARPS * _LANES * count) == 0)
    chunk = (_WARPS, _LANES * neighbours)
    chunks = dim_k // (chunk[0] * chunk[1])
    layout = plgpu.Layout.TILED(plgpu.Tiling((chunk, (neighbours,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    step_rows = max(count for count in (1, 2, 4, 8) if count == 1 or count * dim_k <= STEP_VALUES)
    steps = rows // step_rows
    given = (x_MK, dy_MK) if dresidual_MK is None else (x_MK, dy_MK, dresidual_MK)
    staged_bytes = STAGES * len(given) * step_rows * dim_k * dtype.itemsize
    blocks = min(sm_count * blocks_per_sm(dim_k, staged_bytes), steps)

    def load(ref: Any) -> Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def body(*refs: Any, staged: Any, sums: Any, full: Any) -> None:
        given_refs, (weight_ref, dx_ref, dweight_ref) = refs[: len(given)], refs[len(given) :]
        block = lax.axis_index("block")
        zeros = plgpu.layout_cast(jnp.zeros(chunk, jnp.float32), layout)
        weight = [load(weight_ref.at[part]) for part in range(chunks)]

        def fetch_if_any(turn: Any) -> None:
            step, slot = block + turn * blocks, lax.rem(turn, STAGES)

            @pl.when(step < steps)
            def _() -> None:
                for number, ref in enumerate(given_refs):
                    source = ref.at[pl.ds(step * step_rows, step_rows)]
                    plgpu.copy_gmem_to_smem(source, staged.at[slot, number], full.at[slot])

        def take(turn: Any, dweight: list[Array]) -> list[Array]:
            step, slot, side = block + turn * blocks, lax.rem(turn, STAGES), lax.rem(turn, 2)

            def wide(number: int, row: Any, part: int) -> Array:
                values = load(staged.at[slot, number, row, part])
                return values.astype(jnp.float32) if interpret else widened(values, layout=layout)

            def sum_row(row: Any, _: None) -> None:
                square, along = zeros, zeros
                for part in range(chunks):
                    x, dy = wide(0, row, part), wide(1, row, part)
                    square += x * x
                    along += x * (dy * weight[part])
                sums[side, row, 0, :], sums[side, row, 1, :] = jnp.sum(square, axis=1), jnp.sum(along, axis=1)

            def finish_row(row: Any, dweight: list[Array]) -> list[Array]:
                dweight = list(dweight)
                square, along = (sum(sums[side, row, which, warp] for warp in range(_WARPS)) for which in (0, 1))
                inverse = lax.rsqrt(lax.broadcast(square * (1.0 / dim_k) + eps, chunk))
                factor = inverse * inverse * inverse * lax.broadcast(along * (1.0 / dim_k), chunk)
                for part in range(chunks):
                    x, dy = wide(0, row, part), wide(1, row, part)
                    dx = dy * weight[part] * inverse - x * factor
                    if dresidual_MK is not None:
                        dx += wide(2, row, part)
                    dx_ref[step * step_rows + row, part] = round_16(dx, dtype, layout=layout, interpret=interpret)
                    dweight[part] += dy * (x * inverse)
                return dweight

            # Rows are a loop, not copies of the program: finding layouts takes time that grows with its square.
            plgpu.barrier_wait(full.at[slot])
            lax.fori_loop(0, step_rows, sum_row, None)
            plgpu.commit_smem()
            fetch_if_any(turn + STAGES - 1)
            return lax.fori_loop(0, step_rows, finish_row, dweight)

        for turn in range(STAGES - 1):
            fetch_if_any(jnp.int32(turn))
        turns = lax.div(steps - block + blocks - 1, blocks)
        for part, dweight in enumerate(lax.fori_loop(0, turns, take, [zeros] * chunks)):
            dweight_ref[block, part] = dweight

    in_chunks = (chunks, *chunk)
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, *in_chunks), dtype),
            jax.ShapeDtypeStruct((blocks, *in_chunks), jnp.float32),
        ],
        scratch_types={
            "staged": plgpu.SMEM((STAGES, len(given), step_rows, *in_chunks), dtype),
            "sums": plgpu.SMEM((2, step_rows, 2, _WARPS), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=len(given), num_barriers=STAGES),
        },
        grid=(blocks,),
        grid_names=("block",),
        # Sums over more than a warp are taken here, and nobody reads here what is stored to global memory.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    made = kernel(
        *(array.reshape(rows, *in_chunks) for array in given), weight_K.astype(jnp.float32).reshape(in_chunks)
    )
    dx, dweight = (varying.like(out, *given, weight_K) for out in made)
    return dx.reshape(rows, dim_k), jnp.sum(dweight, axis=0).reshape(dim_k)
