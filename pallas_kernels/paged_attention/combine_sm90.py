"""The Hopper kernel that finishes the sequences which several parts of a schedule attended to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.schedule import share

_ROWS = 8
"""Rows of a thread block: each an accumulator of its own, so that their loads do not wait for one another."""
_LOWEST = -1e30


def combine(
    out_BMC: Array,
    sums: Array,
    stats: Array,
    start_B: Array,
    work_P4: Array,
    *,
    interpret: Any = None,
) -> Array:
    """The output with the pieces of divided sequences weighted by their maxima, added, and divided by their sum.

    Args:
        out_BMC: bfloat16, already right where a sequence is whole in one part; written in place.
        sums: bfloat16 ``[P * tiles, 2, 2, rows of a tile, C]``: unnormalized outputs of a part's first and of its last
            sequence, each as a truncated number and what that left.
        stats: float32 ``[P * tiles, 2, 2, 64]``: base-2 running maxima and denominators of their rows.
        start_B: see :class:`pallas_kernels.paged_attention.schedule.Schedule`.
        work_P4: as there.
        interpret: parameters of the interpreter, or None.
    """
    (batch, rows, dim), parts = out_BMC.shape, work_P4.shape[0]
    tiles = sums.shape[0] // parts
    if parts == 1:
        return out_BMC
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=dim // 128)

    def mla_combine(sum_ref: Any, stat_ref: Any, start_ref: Any, work_ref: Any, out_ref: Any) -> None:
        b, first_row = lax.axis_index("sequence"), lax.axis_index("rows") * _ROWS
        blocks = share(start_ref[batch], parts)
        tile, first_row_of_tile = lax.div(first_row, sums.shape[3]), lax.rem(first_row, sums.shape[3])
        start = start_ref[b]
        first, last = lax.div(start, blocks), lax.div(start_ref[b + 1] - 1, blocks)

        @pl.when(first < last)
        def _() -> None:
            def add(part: Any, carry: Any) -> Any:
                sm, which = part * tiles + tile, jnp.where(work_ref[part, 0] == b, 0, 1)
                made = []
                for i, (acc, m, denominator) in enumerate(carry):
                    row = first_row_of_tile + i
                    m_here = stat_ref[sm, which, 0, row]
                    m_new = jnp.maximum(m, m_here)
                    old, new = jnp.exp2(m - m_new), jnp.exp2(m_here - m_new)
                    large, small = (
                        plgpu.load(sum_ref.at[sm, which, size, row], layout=layout).astype(jnp.float32)
                        for size in range(2)
                    )
                    denominator = denominator * old + stat_ref[sm, which, 1, row] * new
                    made.append((acc * old + (large + small) * new, m_new, denominator))
                return tuple(made)

            zero = plgpu.layout_cast(jnp.zeros((dim,), jnp.float32), layout)
            nothing = (zero, jnp.float32(_LOWEST), jnp.float32(0))
            for i, (acc, _, denominator) in enumerate(lax.fori_loop(first, last + 1, add, (nothing,) * _ROWS)):
                out_ref[b, first_row + i] = (acc * (1 / denominator)).astype(jnp.bfloat16)

    kernel = plgpu.kernel(
        mla_combine, out_type=(), grid=(batch, rows // _ROWS), grid_names=("sequence", "rows"), interpret=interpret
    )
    out_ref = jax.new_ref(out_BMC)
    kernel(sums, stats, start_B, work_P4, out_ref)
    return jax.freeze(out_ref)
