"""Times the norm with quantized output, and its backward, on the models' shapes, beside a plain copy of as many bytes.

    python -m pallas_kernels.norm_quantize.bench [--json FILE] [--quick] [--case NAME ...] [--seconds LIMIT]

GB/s counts what must be read and written once. "norm, then quantize" is XLA's norm and the quantizer's own kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import memory_bench
from pallas_kernels.norm_quantize import backward_sm90, cases, pallas_sm90, reference
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.reference import TILE, Tiles

EPS = 1e-6


def _in_two_steps(x: Array, weight: Array) -> Tiles:
    y = jax.lax.optimization_barrier(reference.rms_norm(x, weight, EPS).astype(x.dtype))
    return quantizer.quantize_rows(y)


def run(bench: memory_bench.MemoryBench, case: cases.Case) -> None:
    """All implementations on one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, case.shape, jnp.bfloat16) for key in keys[:2])
    weight = 1 + 0.1 * jax.random.normal(keys[2], case.shape[1:])
    bench.copy(case.name, 3 * x.size)
    for with_output in (False, True):
        moved = (5 if with_output else 3) * x.size + 4 * x.size // TILE
        operation = "norm_quantize" + (" + y" if with_output else "")
        portable = functools.partial(reference.norm_quantize, eps=EPS, with_output=with_output)
        expected = jax.jit(portable)(x, weight)
        baseline = bench.measure(case.name, operation, "xla", portable, (x, weight), moved_bytes=moved)
        kernel = functools.partial(pallas_sm90.norm_quantize, eps=EPS, with_output=with_output)
        inputs, compared = (x, weight), {"moved_bytes": moved, "expected": expected, "against": baseline}
        bench.measure(case.name, operation, "pallas", kernel, inputs, **compared, sustained=True)
        if not with_output:
            bench.measure(case.name, operation, "two steps", _in_two_steps, (x, weight), moved_bytes=moved)
    for dresidual in (None, jax.random.normal(keys[0], case.shape, jnp.bfloat16)):
        operation = "norm_backward" + ("" if dresidual is None else " + residual")
        moved = (6 if dresidual is None else 8) * x.size
        inputs = (x, weight, dy, dresidual)
        bench.copy(case.name, moved)
        portable = functools.partial(reference.norm_backward, eps=EPS)
        baseline = bench.measure(case.name, operation, "xla", portable, inputs, moved_bytes=moved)
        kernel = functools.partial(backward_sm90.norm_backward, eps=EPS)
        bench.measure(
            case.name, operation, "pallas", kernel, inputs, moved_bytes=moved, against=baseline, sustained=True
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = memory_bench.parser(__doc__, [case.name for case in cases.BENCHED]).parse_args(arguments)
    bench = memory_bench.MemoryBench(options.json, options.seconds)
    for case in cases.BENCHED[: 1 if options.quick else None]:
        if not options.case or case.name in options.case:
            bench.guard(f"norm_quantize {case.name}", functools.partial(run, bench, case))


if __name__ == "__main__":
    main()
