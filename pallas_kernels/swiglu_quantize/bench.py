"""Times SwiGLU with quantized output, and its backward, on the models' shapes, beside a plain copy of as many bytes.

    python -m pallas_kernels.swiglu_quantize.bench [--json FILE] [--quick] [--case NAME ...] [--seconds LIMIT] [--tune]

GB/s counts what must be read and written once. "xla, then both" is XLA's backward and the quantizer's own kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import memory_bench
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.reference import TILE, Tiles
from pallas_kernels.quantize.tile_loop import Tiling
from pallas_kernels.swiglu_quantize import backward_sm90, cases, pallas_sm90, reference


def run(bench: memory_bench.MemoryBench, case: cases.Case, tune: bool) -> None:
    """All implementations on one shape."""
    keys = jax.random.split(jax.random.key(0))
    gate_up = jax.random.normal(keys[0], case.shape, jnp.bfloat16)
    dout = jax.random.normal(keys[1], (case.shape[0], case.shape[1] // 2), jnp.bfloat16)
    arguments, moved = (gate_up,), (2 * 2 + 3) * dout.size + 3 * 4 * dout.size // TILE
    bench.copy(case.name, moved)
    measure = functools.partial(bench.measure, case.name, "swiglu_quantize", arguments=arguments, moved_bytes=moved)
    expected = jax.jit(reference.swiglu_quantize)(gate_up)
    baseline = measure("xla", reference.swiglu_quantize)
    usual = pallas_sm90.ROWS_PER_BLOCK
    for rows in (16, 32, 64) if tune else (usual,):
        kernel = functools.partial(pallas_sm90.swiglu_quantize, tiling=Tiling(rows=rows))
        measure(f"pallas rows {rows}", kernel, expected=expected, against=baseline, sustained=rows == usual)
    moved = (2 + 2 + 4 + 1) * dout.size + 3 * 4 * dout.size // TILE
    inputs = (expected[1], dout)
    bench.measure(case.name, "swiglu_backward", "xla", reference.swiglu_backward, inputs, moved_bytes=moved)
    run_backward(bench, case, inputs, tune)


def run_backward(bench: memory_bench.MemoryBench, case: cases.Case, inputs: tuple[Tiles, Array], tune: bool) -> None:
    """The backward that quantizes what it writes."""
    moved = 9 * inputs[1].size + (2 + 2 + 2 + 1) * 4 * inputs[1].size // TILE
    name = "backward_quantize"
    measure = functools.partial(bench.measure, case.name, name, arguments=inputs, moved_bytes=moved)
    expected = jax.jit(reference.swiglu_backward_quantize)(*inputs)
    baseline = measure("xla", reference.swiglu_backward_quantize)
    measure("xla, then both", _in_two_steps, against=baseline)
    for chunk in (16, 8) if tune else (16,):
        kernel = functools.partial(backward_sm90.swiglu_backward_quantize, chunk=chunk)
        measure(f"pallas c{chunk}", kernel, expected=expected, against=baseline, sustained=chunk == 16)
    weighted = (*inputs, jnp.ones(len(inputs[1])))
    kernel = backward_sm90.swiglu_backward_quantize
    bench.measure(case.name, name, "pallas, weighted", kernel, weighted, moved_bytes=moved, against=baseline)


def _in_two_steps(stored: Tiles, dout: Array) -> tuple[tuple[Tiles, Tiles], Tiles]:
    dgate_up, out = jax.lax.optimization_barrier(reference.swiglu_backward(stored, dout)[:2])
    return quantizer.quantize_both(dgate_up), out


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = memory_bench.parser(__doc__, [case.name for case in cases.BENCHED]).parse_args(arguments)
    bench = memory_bench.MemoryBench(options.json, options.seconds)
    for case in cases.BENCHED[: 1 if options.quick else None]:
        if not options.case or case.name in options.case:
            bench.guard(f"swiglu_quantize {case.name}", functools.partial(run, bench, case, options.tune))


if __name__ == "__main__":
    main()
