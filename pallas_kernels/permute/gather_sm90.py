"""The Hopper kernel (Mosaic GPU) that copies rows by index: a thread block a few of them, all on their way at once.

XLA's own loads an index and then 16 bytes, and waits for both.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying

ROWS = 8
"""Rows of a thread block."""

_THREADS = 128
_F8 = jnp.float8_e4m3fn


def obstacle(rows_TD: Array, index_M: Array) -> str | None:
    """Says why the kernel cannot copy these rows, or None where it can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    if rows_TD.dtype != _F8:
        return f"rows must be float8_e4m3fn, got {rows_TD.dtype}"
    if 0 in rows_TD.shape or rows_TD.shape[1] % _THREADS:
        return f"a row must be a multiple of {_THREADS} numbers, got {rows_TD.shape}"
    if index_M.shape[0] % ROWS:
        return f"there must be a multiple of {ROWS} indices, got {index_M.shape[0]}"
    return None


def copy_rows(rows_TD: Array, index_M: Array, *, interpret: Any = None) -> Array:
    """``rows[index]`` of codes, zeros where the index is ``len(rows)``."""
    (count, dim), (made,) = rows_TD.shape, index_M.shape
    vector = max(size for size in (1, 2, 4, 8, 16) if dim % (_THREADS * size) == 0)
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=vector)

    def body(rows_ref: Any, index_ref: Any, out_ref: Any) -> None:
        first = lax.axis_index("block") * ROWS
        found = [index_ref[first + row] for row in range(ROWS)]
        loaded = [
            plgpu.load(rows_ref.at[jnp.minimum(index, count - 1)], layout=layout, optimized=False) for index in found
        ]
        for row, (index, codes) in enumerate(zip(found, loaded, strict=True)):
            bits = lax.bitcast_convert_type(codes, jnp.uint8)
            there = jnp.where(index < count, jnp.uint8(255), jnp.uint8(0))
            out_ref[first + row] = lax.bitcast_convert_type(bits & there, _F8)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((made, dim), _F8),
        grid=(made // ROWS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return varying.like(kernel(rows_TD, index_M), rows_TD, index_M)
