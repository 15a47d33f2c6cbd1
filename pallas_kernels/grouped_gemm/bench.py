"""Times the grouped product on the models' shapes: forward, input gradient and weight gradient, every implementation.

    python -m pallas_kernels.grouped_gemm.bench [--json FILE] [--quick] [--case NAME ...] [--operation NAME ...]

TFLOP/s counts the rows that are not padding, GB/s each operand and the result once. The error is relative L2 against
the XLA implementation, the ratio its time over ours. "dense cublas" is one product of the same size without groups.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.grouped_gemm import cases, pallas_sm90, xla
from pallas_kernels.grouped_gemm.pallas_sm90 import Tiling

OPERATIONS = ("forward", "dgrad", "wgrad")

Product = Callable[[Array, Array, Array, Array, Array], Array]
"""A function of x, w, dy, group_of_block and num_blocks."""


def inputs_of(case: cases.Case) -> tuple[Array, Array, Array, Array, Array]:
    """Random bfloat16 x, w and dy made on the device, zero in padding rows, group_of_block and num_blocks."""
    mask = jnp.asarray(case.row_mask())[:, None]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.where(mask, jax.random.normal(keys[0], (mask.shape[0], case.dim_k), jnp.bfloat16), 0)
    w = jax.random.normal(keys[1], (case.num_groups, case.dim_k, case.dim_n), jnp.bfloat16)
    dy = jnp.where(mask, jax.random.normal(keys[2], (mask.shape[0], case.dim_n), jnp.bfloat16), 0)
    return x, w, dy, jnp.asarray(case.group_of_block()), jnp.int32(case.used_blocks)


def moved_bytes(case: cases.Case, operation: str) -> int:
    """Bytes of both operands and the result, once each; padding rows not counted."""
    rows, weights = sum(case.rows_of_group), case.num_groups * case.dim_k * case.dim_n
    return 2 * rows * (case.dim_k + case.dim_n) + (4 if operation == "wgrad" else 2) * weights


def tilings(dim_n: int, quick: bool) -> Iterator[Tiling]:
    """The tile configurations to try, the default first."""
    shared = [(256, 4, 2, False), (256, 3, 4, False), (128, 6, 2, False), (128, 5, 2, True), (128, 4, 2, True)]
    orders = [(1, 8)] if quick else [(1, 8), (1, 4), (0, 8)]
    for (tile_n, stages, slots, ping_pong), (minor, width) in itertools.product(shared, orders):
        if dim_n % tile_n == 0:
            yield Tiling(tile_n, stages, slots, minor, width, ping_pong)


def name_of(tiling: Tiling) -> str:
    """Such as ``n256 s4 o2 n8``: columns, stages, store slots, which dimension is walked first, how far."""
    turns = " turns" if tiling.ping_pong else ""
    return f"n{tiling.tile_n} s{tiling.stages} o{tiling.store_slots} {'mn'[tiling.minor]}{tiling.width}{turns}"


def hopper(case: cases.Case, operation: str, tiling: Tiling | None) -> Product:
    """The Hopper kernel."""
    common = {"block": case.block, "tiling": tiling}
    if operation == "wgrad":
        wgrad = functools.partial(pallas_sm90.wgrad, num_groups=case.num_groups, **common)
        return lambda x, w, dy, groups, used: wgrad(x, dy, groups, used)
    gemm = functools.partial(pallas_sm90.gemm, transpose_w=operation == "dgrad", **common)
    return lambda x, w, dy, groups, used: gemm(dy if operation == "dgrad" else x, w, groups, used)


def portable(case: cases.Case, operation: str) -> Product:
    """The XLA implementation."""
    if operation == "wgrad":
        wgrad = functools.partial(xla.wgrad, block=case.block, num_groups=case.num_groups)
        return lambda x, w, dy, groups, used: wgrad(x, dy, groups)
    gemm = functools.partial(xla.gemm, block=case.block, transpose_w=operation == "dgrad")
    return lambda x, w, dy, groups, used: gemm(dy if operation == "dgrad" else x, w, groups)


def dense(case: cases.Case, operation: str) -> Product:
    """One dense product of the same size by XLA (cuBLASLt): what the card reaches without groups."""
    del case
    if operation == "wgrad":
        return lambda x, w, dy, *_: jnp.einsum("mk,mn->kn", x, dy, preferred_element_type=jnp.float32)
    if operation == "dgrad":
        return lambda x, w, dy, *_: jnp.einsum("mn,kn->mk", dy, w[0])
    return lambda x, w, *_: jnp.einsum("mk,kn->mn", x, w[0])


def library(case: cases.Case, operation: str) -> Product:
    """The kernels that JAX ships as examples, on the same padded rows; they are not part of its public interface."""
    sizes = [-(-rows // case.block) * case.block for rows in case.rows_of_group]
    sizes[-1] += case.num_blocks * case.block - sum(sizes)
    tiles = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 4}
    if operation == "wgrad":
        from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

        return lambda x, w, dy, *_: transposed_ragged_dot(x, dy, group_sizes=jnp.asarray(sizes, jnp.int32), **tiles)
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    product = functools.partial(ragged_dot, transpose_rhs=operation == "dgrad", **tiles)
    return lambda x, w, dy, *_: product(dy if operation == "dgrad" else x, w, group_sizes=jnp.asarray(sizes, jnp.int32))


def run(table: bench_table.Table, case: cases.Case, operation: str, *, quick: bool) -> None:
    """All implementations of one operation, ours over its tilings, the best of them and the peers also sustained."""
    inputs = inputs_of(case)
    size = {"flops": case.useful_flops, "moved_bytes": moved_bytes(case, operation)}
    measure = functools.partial(table.measure, case.name, operation, arguments=inputs, **size)
    expected = jax.jit(portable(case, operation))(*inputs)
    baseline = measure("xla", portable(case, operation))
    best: tuple[float, Tiling] | None = None
    for tiling in tilings(case.dim_k if operation == "dgrad" else case.dim_n, quick):
        us = measure(f"pallas {name_of(tiling)}", hopper(case, operation, tiling), expected=expected)
        if us is not None and (best is None or us < best[0]):
            best = (us, tiling)
    for name, made in (("dense cublas", dense), ("jax library", library)):
        try:
            measure(name, made(case, operation), sustained=True)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
    chosen = [("pallas default", None)] + ([(f"best: {name_of(best[1])}", best[1])] if best else [])
    for name, tiling in chosen:
        measure(name, hopper(case, operation, tiling), sustained=True, expected=expected, against=baseline)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = bench_table.parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=[case.name for case in cases.BENCHED], help="only these shapes")
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="only these")
    options = parser.parse_args(arguments)
    table = bench_table.Table(options.json)
    for case in cases.BENCHED:
        if options.case and case.name not in options.case:
            continue
        for operation in options.operation:
            try:
                run(table, case, operation, quick=options.quick)
            except Exception as error:  # memory that does not suffice for one shape must not end the bench
                print(f"{case.name} {operation} failed: {type(error).__name__}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
