"""Times the dense FP8 products at the shapes of DeepGEMM's tables, against its figures and XLA's bfloat16 product.

    MOSAIC_GPU_DUMP_PTXAS=1 python -m pallas_kernels.fp8_gemm.bench [--sweep] [--quick] [--json FILE]
        [--case PART ...] [--seconds LIMIT] [--passes N] [--fence] [--no-xla]

Burst is CUPTI's kernel time after a rest with inputs out of the cache, sustained is 150 ms of calls back to back that
rotate over 200 MB of inputs. ``x`` after a figure: DeepGEMM's time over ours (above 1 is faster). Spilled registers are
reported where the environment variable is set. ``--sweep`` ends with the costs that belong into ``tiles.py``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8_gemm import cases, measure, pallas_sm90, reference, tiles
from pallas_kernels.fp8_gemm.product_sm90 import Tiling
from pallas_kernels.fp8_gemm.tiles import deepened


def tilings(case: cases.Case) -> list[Tiling]:
    """What ``--sweep`` tries besides the default."""
    if case.operation == "wgrad":
        made = [
            tiles.WGRAD[0][0],
            Tiling(block_n=192, unroll=1, store_slots=3),
            Tiling(block_n=192, unroll=1, cluster=2, store_slots=3),
            Tiling(unroll=2, cluster=2, share="a"),
        ]
        return [deepened(tiling, column_scales=True, out_bytes=4) for tiling in made]
    if case.rows <= 128:
        return few_rows(case)
    made = [
        tiles.GEMM[0][0],
        Tiling(unroll=2, cluster=2),
        Tiling(unroll=4, cluster=2, share="a"),
        Tiling(unroll=4, cluster=2, width=16),
        Tiling(unroll=4, cluster=2, minor=0),
    ]
    if case.columns % 128:
        made = [
            tiles.GEMM[0][0],
            Tiling(block_n=192, unroll=1, store_slots=3),
            Tiling(block_n=192, unroll=1, cluster=2, share="a", store_slots=3),
            Tiling(block_n=176, unroll=1),
        ]
    return [deepened(tiling) for tiling in made]


def few_rows(case: cases.Case) -> list[Tiling]:
    """Around the default: in clusters, wider, narrower, and with the rows in one tile or two."""
    default = tiles.gemm(case.rows, case.columns, case.dim_k)

    def narrow(block_n: int, **how: Any) -> Tiling:
        slots, unroll = 3 if block_n % 96 == 0 else 2, 1 if block_n > 128 else 4
        return dataclasses.replace(default, block_n=block_n, store_slots=slots, unroll=unroll, **how)

    made = [narrow(default.block_n, cluster=2, share="a")]
    widths = sorted({*tiles.FEW_ROWS, 192})
    place = widths.index(default.block_n)
    made += [narrow(width) for width in widths[max(place - 1, 0) : place + 2]]
    if case.rows > 64 and default.warpgroups == 1:
        made += [narrow(default.block_n, cluster=2), narrow(max(16, default.block_n // 2), warpgroups=2)]
    elif case.rows > 64:
        made += [narrow(default.block_n, warpgroups=1, cluster=2)]
    return [tiling for tiling in map(deepened, made) if tiling != default]


def work(case: cases.Case) -> measure.Work:
    """The case as the bench measures it."""
    m, n, k = case.rows, case.columns, case.dim_k
    wgrad = case.operation == "wgrad"

    def make(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 4)
        if wgrad:
            a, b = measure.e4m3(keys[0], (k, m)), measure.e4m3(keys[1], (n, m))
            return a, measure.scales(keys[2], (m // 128, k)), b, measure.scales(keys[3], (m // 128, n))
        a, b = measure.e4m3(keys[0], (m, k)), measure.e4m3(keys[1], (n, k))
        return a, measure.scales(keys[2], (k // 128, m)), b, measure.scales(keys[3], (-(-n // 128), k // 128))

    def kernel(tiling: Tiling, operands: measure.Operands, into: Array | None) -> Array:
        if wgrad:
            return pallas_sm90.wgrad(*operands, into=into, tiling=tiling)
        return pallas_sm90.gemm(*operands, tiling=tiling)

    return measure.Work(
        name=case.name,
        flops=case.flops,
        moved_bytes=case.moved_bytes,
        make=make,
        into=(lambda: jnp.ones((k, n), jnp.float32)) if wgrad else None,
        kernel=kernel,
        reference=reference.fp8_wgrad if wgrad else reference.fp8_gemm,
        peer_us=case.peer_us,
        peer_burst_us=case.peer_burst_us,
        dense=(k, n, m) if wgrad else (m, n, k),
        default=(tiles.wgrad(k, n, m) if wgrad else tiles.gemm(m, n, k)),
        table=tiles.WGRAD if wgrad else tiles.GEMM if m > 128 else None,
        tiled=(1, k, n) if wgrad else (1, m, n),
        column_scales=wgrad,
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
