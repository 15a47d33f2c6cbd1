"""Times the quantizers on the models' shapes, beside a plain copy of as many bytes.

    python -m pallas_kernels.quantize.bench [--json FILE] [--quick] [--case NAME ...] [--seconds LIMIT] [--tune]

GB/s counts what must be read and written once; "of copy" is the copy's time over ours at equal bytes; the ratio is
XLA's time over ours. Codes and scales that differ from XLA's are counted. "xla float32" divides in float32, as XLA does
it on a GPU: what a definition without exact bits would cost.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import memory_bench
from pallas_kernels.quantize import cases, e5m6, e5m6_sm90, op, pallas_sm90, reference
from pallas_kernels.quantize.tile_loop import Tiling

ACTIVATION_OPERATIONS = {"quantize_rows": 1, "quantize_columns": 1, "quantize_both": 2}
"""Operations and the forms they write."""


def tilings(operation: str) -> dict[str, Tiling]:
    """The configurations to try, the default first."""
    if operation == "quantize_rows":
        return {f"rows {rows}": Tiling(rows=rows) for rows in (64, 32, 128)}
    if operation == "quantize_weight":
        return {
            f"s{stages} b{blocks}": Tiling(stages=stages, blocks_per_sm=blocks) for stages, blocks in ((2, 1), (1, 1))
        }
    pairs = ((2, 2), (3, 2), (1, 3), (1, 2), (4, 1))
    return {f"s{stages} b{blocks}": Tiling(stages=stages, blocks_per_sm=blocks) for stages, blocks in pairs}


def compare(
    bench: memory_bench.MemoryBench,
    case: cases.Case,
    operation: str,
    arguments: tuple[Any, ...],
    moved: int,
    portable: Callable[..., Any],
    kernel: Callable[..., Any],
    tune: bool,
) -> None:
    """One operation by XLA and by the kernel, over its configurations with ``tune``."""
    expected = jax.jit(portable)(*arguments)
    measure = functools.partial(bench.measure, case.name, operation, arguments=arguments, moved_bytes=moved)
    baseline = measure("xla", portable)
    for number, (name, tiling) in enumerate(tilings(operation).items()):
        if number == 0 or tune:
            function = functools.partial(kernel, tiling=tiling)
            measure(f"pallas {name}", function, expected=expected, against=baseline, sustained=number == 0)


def _float32_rows(x: Array) -> reference.Tiles:
    """Row-wise tiles with XLA's own division."""
    tiles = x.reshape(x.shape[0], -1, reference.TILE).astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(tiles), axis=2), reference.AMAX_FLOOR) / reference.E4M3_MAX
    return reference.Tiles((tiles / scale[:, :, None]).astype(jnp.float8_e4m3fn).reshape(x.shape), scale.T)


FLOAT32 = {
    "quantize_rows": _float32_rows,
    "quantize_columns": lambda x: _float32_rows(x.T),
    "quantize_both": lambda x: (_float32_rows(x), _float32_rows(x.T)),
}


def run_activations(bench: memory_bench.MemoryBench, case: cases.Case, tune: bool) -> None:
    """All operations on one array of activations, in bfloat16."""
    x = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16)
    bench.copy(case.name, 3 * x.size)
    for operation, forms in ACTIVATION_OPERATIONS.items():
        moved = 2 * x.size + forms * (x.size + 4 * x.size // reference.TILE)
        bench.measure(case.name, operation, "xla float32", FLOAT32[operation], (x,), moved_bytes=moved)
        kernel, portable = getattr(pallas_sm90, operation), getattr(reference, operation)
        compare(bench, case, operation, (x,), moved, portable, kernel, tune)
    stored = jax.jit(reference.quantize_rows)(x)
    moved = 2 * (x.size + 4 * x.size // reference.TILE)
    kernel, portable = pallas_sm90.requantize_columns, reference.requantize_columns
    compare(bench, case, "requantize_columns", tuple(stored), moved, portable, kernel, tune)
    run_storage(bench, case, x, tune)


def run_storage(bench: memory_bench.MemoryBench, case: cases.Case, x: Array, tune: bool) -> None:
    """E5M6: written beside row-wise tiles, and read."""
    moved = 9 * x.size // 2 + 2 * 4 * x.size // reference.TILE
    measure = functools.partial(bench.measure, case.name, "quantize_and_pack", arguments=(x,), moved_bytes=moved)
    portable = jax.jit(functools.partial(op.quantize_and_pack, implementation="xla"))
    expected, baseline = portable(x), measure("xla", portable)
    for rows in (32, 16, 64) if tune else (32,):
        kernel = functools.partial(e5m6_sm90.quantize_and_pack, tiling=Tiling(rows=rows))
        measure(f"pallas rows {rows}", kernel, expected=expected, against=baseline, sustained=rows == 32)
    packed = expected[1]
    unpack = functools.partial(e5m6.unpack_e5m6, dtype=jnp.bfloat16)
    bench.measure(case.name, "unpack_e5m6", "xla", unpack, (packed,), moved_bytes=7 * x.size // 2)

    def in_two_steps(stored: e5m6.PackedE5M6) -> tuple[Array, reference.Tiles]:
        back = jax.lax.optimization_barrier(unpack(stored))
        return back, pallas_sm90.quantize_columns(back, True)

    measure = functools.partial(bench.measure, case.name, "unpack, columns", arguments=(packed,), moved_bytes=moved)
    expected, baseline = jax.jit(in_two_steps)(packed), measure("two steps", in_two_steps)
    kernel = functools.partial(e5m6_sm90.unpack_and_quantize_columns, dtype=jnp.bfloat16)
    measure("pallas", kernel, expected=expected, against=baseline, sustained=True)


def run_weights(bench: memory_bench.MemoryBench, case: cases.Case, tune: bool) -> None:
    """Both orientations of float32 masters."""
    w = jax.random.normal(jax.random.key(0), case.shape, jnp.float32)
    bench.copy(case.name, 6 * w.size)
    kernel, portable = pallas_sm90.quantize_weight, reference.quantize_weight
    compare(bench, case, "quantize_weight", (w,), 6 * w.size, portable, kernel, tune)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = memory_bench.parser(__doc__, [case.name for case in cases.BENCHED])
    options = parser.parse_args(arguments)
    bench = memory_bench.MemoryBench(options.json, options.seconds)
    for case in cases.BENCHED[: 1 if options.quick else None]:
        if not options.case or case.name in options.case:
            run = run_weights if case in cases.WEIGHTS else run_activations
            bench.guard(f"quantize {case.name}", functools.partial(run, bench, case, options.tune))


if __name__ == "__main__":
    main()
