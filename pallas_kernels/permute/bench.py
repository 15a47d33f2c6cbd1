"""Times the plan, both directions and their gradients on the models' shapes.

    python -m pallas_kernels.permute.bench [--json FILE] [--quick]

GB/s counts what must move: each row that is not padding read once and written once, tokens' rows once.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.permute import Plan, make_plan, permute, permute_both, permute_columns, permute_tiles, unpermute
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


def _codes(table: bench_table.Table, name: str, x_TD: Array, plan: Plan, sorted_rows: int) -> None:
    """Tokens' codes to sorted codes: rows, columns, both."""
    tiles = jax.jit(lambda x: quantize_rows(x, power_of_two=True))(x_TD)
    tokens, dim = x_TD.shape
    once, written = (rows * (dim + 4 * dim // 128) for rows in (tokens, sorted_rows))

    def rows_by_xla(tiles: Tiles, plan: Plan) -> Tiles:
        return permute_tiles(tiles, plan, implementation="xla")

    for operation, forms, before, kernel in (
        ("to rows", 1, ("xla", rows_by_xla), permute_tiles),
        ("to columns", 1, ("permute, requantize", _columns_in_two_steps), permute_columns),
        ("to both", 2, ("permute, requantize", _both_in_two_steps), permute_both),
    ):
        moved = once + forms * written
        later = table.measure(name, operation, *before, (tiles, plan), moved_bytes=moved)
        table.measure(name, operation, "pallas", kernel, (tiles, plan), moved_bytes=moved, against=later)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = bench_table.parser(__doc__).parse_args(arguments)
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
            _codes(table, name, x, plan, tokens * choices)


if __name__ == "__main__":
    main()
