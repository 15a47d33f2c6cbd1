"""The Hopper kernel (Mosaic GPU) of a few rows through every group's weight, which is as fast as weights are read.

A persistent thread block walks over tiles of 64 rows by up to 256 columns of one group. One warpgroup copies tiles of
64 along the contraction into a ring of shared-memory stages (TMA), of rows no more than there are; two others multiply,
each half of the columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.grouped_gemm.pallas_sm90 import STEP, swizzled

MOST_ROWS = 64
"""Rows of a group, the least a wgmma multiplies: with more, the grouped product reads weights as seldom."""
_LEAST_ROWS = 8
"""Rows come in multiples of it: the height of a swizzled piece of shared memory."""
_STAGES = 4
_MATH_WARPGROUPS = 2
_CHUNK = 64
_COPY_REGISTERS = 40
_MATH_REGISTERS = 232


def obstacle(x: Array, w_GKN: Array) -> str | None:
    """Says why the kernel cannot compute this product, or None where it can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if str(x.dtype) != "bfloat16":
        return f"x must be bfloat16, got {x.dtype}"
    if x.shape[-2] > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows of a group, got {x.shape[-2]}"
    dim_k, dim_n = w_GKN.shape[1:]
    if dim_k % STEP or dim_n % (_MATH_WARPGROUPS * _CHUNK):
        return f"K must be a multiple of {STEP} and N of {_MATH_WARPGROUPS * _CHUNK}, got {dim_k} and {dim_n}"
    return None


def gemm(x: Array, w_GKN: Array, *, sm_count: int = dispatch.HOPPER_SM_COUNT, interpret: Any = None) -> Array:
    """``[T, K]`` or ``[G, T, K]`` rows times each group's weight: ``[G, T, N]`` in their dtype, of what
    :func:`obstacle` finds nothing against."""
    groups, dim_k, dim_n = w_GKN.shape
    given, shared = x.shape[-2], x.ndim == 2
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, -given % _LEAST_ROWS), (0, 0)))
    rows = x.shape[-2]
    x = x.reshape(-1, rows, dim_k)
    half = 2 * _CHUNK if dim_n % (4 * _CHUNK) == 0 else _CHUNK
    columns, steps, slots = dim_n // (2 * half), dim_k // STEP, half // _CHUNK

    def few_rows(
        x_ref: Any, w_ref: Any, out_ref: Any, *, a_smem: Any, b_smem: Any, out_smem: Any, full: Any, empty: Any
    ) -> None:
        warpgroup = lax.axis_index("warpgroup")

        def following(slot: Any) -> Any:
            return jnp.where(slot == _STAGES - 1, 0, slot + 1)

        def for_every_tile(work: Any) -> None:
            @plgpu.nd_loop((groups * columns,), collective_axes="sm", init_carry=jnp.int32(0))
            def _(info: plgpu.NDLoopInfo, carry: Any) -> Any:
                return work(lax.div(info.index[0], columns), lax.rem(info.index[0], columns) * (2 * half), carry)

        @pl.when(warpgroup == _MATH_WARPGROUPS)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def fill(group: Any, first: Any, slot: Any) -> Any:
                x_group = x_ref.at[0 if shared else group]

                def step(k: Any, slot: Any) -> Any:
                    plgpu.barrier_wait(empty.at[slot])
                    along = pl.ds(k * STEP, STEP)
                    plgpu.copy_gmem_to_smem(x_group.at[:, along], a_smem.at[slot, pl.ds(0, rows)], full.at[slot])
                    for side in range(_MATH_WARPGROUPS):
                        w_half = w_ref.at[group, along, pl.ds(first + side * half, half)]
                        plgpu.copy_gmem_to_smem(w_half, b_smem.at[slot, side], full.at[slot])
                    return following(slot)

                return lax.fori_loop(0, steps, step, slot)

            for_every_tile(fill)
            for slot in range(_STAGES):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < _MATH_WARPGROUPS)
        def _math() -> None:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(empty.at[slot])

            def multiply(group: Any, first: Any, slot: Any) -> Any:
                def accumulate(acc_ref: Any) -> tuple[Any, Any]:
                    def step(k: Any, slots: Any) -> Any:
                        slot, previous = slots
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc_ref, a_smem.at[slot], b_smem.at[slot, warpgroup])
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(empty.at[previous])

                        return following(slot), slot

                    slot_after, last = lax.fori_loop(0, steps, step, (slot, slot))
                    acc = plgpu.wgmma_accumulator_load(acc_ref)
                    plgpu.barrier_arrive(empty.at[last])
                    return acc, slot_after

                acc, slot = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((MOST_ROWS, half), jnp.float32))
                for n in range(slots):
                    staged = out_smem.at[warpgroup, n]
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    staged[...] = acc[:, n * _CHUNK : (n + 1) * _CHUNK].astype(x.dtype)
                    plgpu.commit_smem()
                    place = pl.ds(first + warpgroup * half + n * _CHUNK, _CHUNK)
                    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, rows)], out_ref.at[group, :, place])
                return slot

            for_every_tile(multiply)
            plgpu.wait_smem_to_gmem(0)

    transforms = swizzled(x.dtype)
    kernel = plgpu.kernel(
        few_rows,
        out_type=jax.ShapeDtypeStruct((groups, rows, dim_n), x.dtype),
        scratch_types={
            "a_smem": plgpu.SMEM((_STAGES, MOST_ROWS, STEP), x.dtype, transforms=transforms),
            "b_smem": plgpu.SMEM((_STAGES, _MATH_WARPGROUPS, STEP, half), x.dtype, transforms=transforms),
            "out_smem": plgpu.SMEM((_MATH_WARPGROUPS, slots, MOST_ROWS, _CHUNK), x.dtype, transforms=transforms),
            "full": plgpu.Barrier(num_arrivals=1 + _MATH_WARPGROUPS, num_barriers=_STAGES),
            "empty": plgpu.Barrier(num_arrivals=_MATH_WARPGROUPS, num_barriers=_STAGES),
        },
        grid=(sm_count,),
        grid_names=("sm",),
        num_threads=_MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    return varying.like(kernel(x, w_GKN), x, w_GKN)[:, :given]
