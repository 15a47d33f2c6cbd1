"""Times the grouped FP8 products at the shapes of DeepGEMM's tables; figures as in ``fp8_gemm/bench.py``.

    MOSAIC_GPU_DUMP_PTXAS=1 python -m pallas_kernels.grouped_fp8_gemm.bench [--sweep] [--quick] [--json FILE]
        [--case PART ...] [--seconds LIMIT] [--passes N] [--fence] [--no-xla]

XLA's time is one dense bfloat16 product of the size.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8_gemm import measure, tiles
from pallas_kernels.fp8_gemm.product_sm90 import Tiling
from pallas_kernels.fp8_gemm.tiles import deepened
from pallas_kernels.grouped_fp8_gemm import cases, pallas_sm90, reference

TABLES = {"contiguous": tiles.GROUPED, "masked": tiles.MASKED, "wgrad": tiles.GROUPED_WGRAD}


def tilings(case: cases.Case) -> list[Tiling]:
    """What ``--sweep`` tries besides the default."""
    made = [TABLES[case.operation][0][0]]
    if case.operation == "wgrad":
        made += [
            Tiling(unroll=1, cluster=2, share="a"),
            Tiling(block_n=192, unroll=1, store_slots=3),
            Tiling(block_n=192, unroll=1, cluster=2, share="a", store_slots=3),
            Tiling(unroll=1, cluster=2),
        ]
        return [deepened(tiling, column_scales=True, out_bytes=4) for tiling in made]
    if case.operation == "masked":
        made += [Tiling(unroll=2), Tiling(unroll=2, cluster=2, share="a")]
        return [deepened(tiling) for tiling in made]
    made += [
        Tiling(unroll=4),
        Tiling(unroll=4, cluster=2, share="a"),
        Tiling(unroll=2, cluster=2, share="a", width=16),
        Tiling(unroll=2, cluster=2, share="a", minor=0, width=16),
    ]
    return [deepened(tiling) for tiling in made]


def default_tiling(case: cases.Case) -> Tiling:
    """What the operation takes."""
    if case.operation == "wgrad":
        return tiles.grouped_wgrad(case.num_groups, case.dim_k, case.columns, case.rows)
    if case.operation == "masked":
        return tiles.masked(case.num_groups, case.max_rows, case.columns, case.dim_k)
    return tiles.grouped(case.rows, case.columns, case.dim_k)


def tiled(case: cases.Case) -> tuple[int, int, int]:
    """Groups, rows and columns that are cut into tiles."""
    if case.operation == "wgrad":
        return case.num_groups, case.dim_k, case.columns
    if case.operation == "masked":
        return case.num_groups, case.max_rows, case.columns
    return 1, case.rows, case.columns


def work(case: cases.Case) -> measure.Work:
    """The case as the bench measures it."""
    n, k, groups = case.columns, case.dim_k, case.num_groups
    group_of_block = jnp.asarray(case.group_of_block())
    used = jnp.int32(case.used_blocks)
    m = case.max_rows if case.operation == "masked" else case.rows
    counts = jnp.asarray(case.rows_of_group, jnp.int32)

    def make(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 4)
        if case.operation == "wgrad":
            a, b = measure.e4m3(keys[0], (k, m)), measure.e4m3(keys[1], (n, m))
            scales = measure.scales(keys[2], (m // 128, k)), measure.scales(keys[3], (m // 128, n))
            return a, scales[0], b, scales[1], group_of_block, used
        leading = (groups,) if case.operation == "masked" else ()
        a, b = measure.e4m3(keys[0], (*leading, m, k)), measure.e4m3(keys[1], (groups, n, k))
        a_scales = measure.scales(keys[2], (*leading, k // 128, m))
        b_scales = measure.scales(keys[3], (groups, -(-n // 128), k // 128))
        last = (counts,) if case.operation == "masked" else (group_of_block, used)
        return a, a_scales, b, b_scales, *last

    def kernel(tiling: Tiling, operands: measure.Operands, into: Array | None) -> Array:
        if case.operation == "wgrad":
            return pallas_sm90.wgrad(*operands, num_groups=groups, into=into, tiling=tiling)
        if case.operation == "masked":
            return pallas_sm90.masked(*operands, tiling=tiling)
        return pallas_sm90.gemm(*operands, tiling=tiling)

    def expected(*operands: Array) -> Array:
        if case.operation == "wgrad":
            return reference.grouped_fp8_wgrad(*operands, num_groups=groups)
        if case.operation == "masked":
            return reference.masked_fp8_gemm(*operands)
        return reference.grouped_fp8_gemm(*operands)

    rows = sum(case.rows_of_group)
    return measure.Work(
        name=case.name,
        flops=case.flops,
        moved_bytes=case.moved_bytes,
        make=make,
        into=(lambda: jnp.ones((groups, k, n), jnp.float32)) if case.operation == "wgrad" else None,
        kernel=kernel,
        reference=expected,
        peer_us=case.peer_us,
        peer_burst_us=case.peer_burst_us,
        dense=(k, n, rows) if case.operation == "wgrad" else (rows, n, k),
        default=default_tiling(case),
        table=TABLES[case.operation],
        tiled=tiled(case),
        column_scales=case.operation == "wgrad",
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = measure.parser(__doc__, [case.name for case in cases.BENCHED]).parse_args(arguments)
    bench = measure.Bench(options)
    for case in cases.BENCHED:
        if bench.chosen(case.name):
            bench.run(work(case), tilings(case))
    bench.finish()


if __name__ == "__main__":
    main()
