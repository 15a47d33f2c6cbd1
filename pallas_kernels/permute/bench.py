"""Times the plan, both directions and their gradients on the models' shapes.

    python -m pallas_kernels.permute.bench [--json FILE] [--quick] [--tune]

GB/s counts what must move: each row that is not padding read once and written once, tokens' rows once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.permute import (
    Plan,
    columns_sm90,
    gather_sm90,
    make_plan,
    permute,
    permute_both,
    permute_columns,
    permute_tiles,
    rows_sm90,
    unpermute,
)
from pallas_kernels.quantize import Tiles, quantize_rows, requantize_columns

CASES = {  # name: (T, D, E, K, block)
    "bench_3b": (16384, 2048, 64, 6, 128),
    "bench_3b at 8": (32768, 2048, 64, 6, 128),
    "v3_per_device": (8192, 7168, 8, 8, 128),
    "small_model": (4096, 128, 16, 4, 64),
}


def _gradient_of_permute(x_TD: Array, dy_MD: Array, plan: Plan) -> Array:
    return jax.vjp(lambda x: permute(x, plan), x_TD)[1](dy_MD)[0]


def _gradients_of_unpermute(y_MD: Array, weights_TK: Array, dout_TD: Array, plan: Plan) -> tuple[Array, Array]:
    return jax.vjp(lambda y, w: unpermute(y, w, plan), y_MD, weights_TK)[1](dout_TD)


def _tiles_of_rows(x_TD: Array, plan: Plan) -> Tiles:
    return quantize_rows(permute(x_TD, plan), power_of_two=True)


def _rows_of_tiles(x_TD: Array, plan: Plan) -> Tiles:
    return permute_tiles(quantize_rows(x_TD, power_of_two=True), plan)


def _both_in_two_steps(tiles: Tiles, plan: Plan) -> tuple[Tiles, Tiles]:
    rows = permute_tiles(tiles, plan)
    return rows, requantize_columns(*rows, power_of_two=True)


def _columns_in_two_steps(tiles: Tiles, plan: Plan) -> Tiles:
    return _both_in_two_steps(tiles, plan)[1]


def _codes(table: bench_table.Table, name: str, x_TD: Array, plan: Plan, sorted_rows: int, tune: bool) -> None:
    """Tokens' codes to sorted codes: rows, columns, both; with ``tune`` for several numbers of tiles a block."""
    tiles = jax.jit(lambda x: quantize_rows(x, power_of_two=True))(x_TD)
    tokens, dim = x_TD.shape
    once, written = (rows * (dim + 4 * dim // 128) for rows in (tokens, sorted_rows))
    moved = once + written

    def rows_by_rows(tiles: Tiles, plan: Plan) -> Tiles:
        scale = tiles.scale.at[:, plan.token_of_row_M].get(mode="fill", fill_value=1)
        return Tiles(gather_sm90.copy_rows(tiles.q, plan.token_of_row_M), scale)

    later = table.measure(name, "to rows", "whole rows, scales apart", rows_by_rows, (tiles, plan), moved_bytes=moved)
    table.measure(name, "to rows", "one kernel", permute_tiles, (tiles, plan), moved_bytes=moved, against=later)
    for operation, forms, two_steps, one_step in (
        ("to columns", 1, _columns_in_two_steps, permute_columns),
        ("to both", 2, _both_in_two_steps, permute_both),
    ):
        moved = once + forms * written
        later = table.measure(name, operation, "permute, requantize", two_steps, (tiles, plan), moved_bytes=moved)
        table.measure(name, operation, "one kernel", one_step, (tiles, plan), moved_bytes=moved, against=later)
    if not tune:
        return
    used = plan.num_blocks
    for span in (1, 2, 4, 8, 16):
        kernels = [
            functools.partial(columns_sm90.permute_columns, span=span),
            functools.partial(columns_sm90.permute_both, span=span),
            lambda tiles, index, _, span=span: rows_sm90.permute_rows(tiles, index, span=span),
        ]
        for operation, forms, kernel in zip(("to columns", "to both", "to rows"), (1, 2, 1), kernels, strict=True):
            arguments, moved = (tiles, plan.token_of_row_M, used), once + forms * written
            table.measure(name, operation, f"one kernel, {span} tiles", kernel, arguments, moved_bytes=moved)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = bench_table.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="the kernels for codes with other numbers of tiles a block")
    options = parser.parse_args(arguments)
    table = bench_table.Table(options.json)
    for name in list(CASES)[: 2 if options.quick else None]:
        tokens, dim, experts, choices, block = CASES[name]
        keys = jax.random.split(jax.random.key(0), 4)
        _, idx = jax.lax.top_k(jax.random.normal(keys[0], (tokens, experts)), choices)
        x, dout = (jax.random.normal(key, (tokens, dim), jnp.bfloat16) for key in keys[1:3])
        weights = jax.random.uniform(keys[3], (tokens, choices))
        plan = jax.jit(make_plan, static_argnums=(1, 2))(idx, experts, block)
        rows = jax.jit(permute)(x, plan)
        once, all_rows = 2 * tokens * dim, 2 * tokens * choices * dim
        table.measure(name, "plan", "xla", lambda idx, e=experts, b=block: make_plan(idx, e, b), (idx,))
        for operation, function, inputs, moved in (
            ("permute", permute, (x, plan), once + all_rows),
            ("its grad", _gradient_of_permute, (x, rows, plan), all_rows + once),
            ("unpermute", unpermute, (rows, weights, plan), all_rows + once),
            ("its grad", _gradients_of_unpermute, (rows, weights, dout, plan), 2 * all_rows + once),
        ):
            table.measure(name, operation, "xla", function, inputs, moved_bytes=moved)
        moved = 2 * tokens * dim + tokens * choices * dim
        later = table.measure(name, "to tiles", "permute, quantize", _tiles_of_rows, (x, plan), moved_bytes=moved)
        table.measure(
            name, "to tiles", "quantize, permute", _rows_of_tiles, (x, plan), moved_bytes=moved, against=later
        )
        if block % 128 == 0:
            _codes(table, name, x, plan, tokens * choices, options.tune)


if __name__ == "__main__":
    main()
