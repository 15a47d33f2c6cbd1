"""Times causal attention, forward and with its gradients, on the models' shapes.

    python -m pallas_kernels.attention.bench [--json FILE] [--quick] [--no-xla] [--passes N]

FLOPs of the causal half, as the peers count them: forward B N T^2 (H + W), backward B N T^2 (3 H + 2 W). "cudnn" is
JAX's own call of cuDNN with JAX's own rule for its gradients; "halves" is ``attention_forward`` and
``attention_backward``, which layers with a gradient of their own call.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.attention import attention_backward, attention_forward, causal_attention
from pallas_kernels.dispatch import AttentionImplementation

CASES = {  # name: (B, T, N, H, W)
    "bench_3b": (4, 4096, 16, 192, 128),
    "heads_32": (4, 4096, 32, 192, 128),
    "v3": (1, 4096, 128, 192, 128),
    "dense_llm": (4, 4096, 16, 128, 128),
}


def with_gradients(
    q: Array, k: Array, v: Array, dy: Array, *, scale: float, implementation: AttentionImplementation
) -> tuple[Array, ...]:
    """Output and gradients of q, k and v."""
    attend = functools.partial(causal_attention, scale=scale, implementation=implementation)
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(dy)


def by_halves(q: Array, k: Array, v: Array, dy: Array, *, scale: float) -> tuple[Array, ...]:
    """The same by the two calls of layers with a gradient of their own."""
    out, sums = attention_forward(q, k, v, scale=scale, implementation="cudnn")
    return out, *attention_backward(q, k, v, out, sums, dy, scale=scale)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = bench_table.parser(__doc__)
    parser.add_argument("--no-xla", action="store_true", help="leave out XLA's own attention")
    parser.add_argument("--passes", type=int, default=1, help="times that all is measured")
    options = parser.parse_args(arguments)
    table = bench_table.Table(options.json)
    for _ in range(options.passes):
        for name in list(CASES)[: 1 if options.quick else None]:
            run(table, name, xla=not options.no_xla)


def run(table: bench_table.Table, name: str, *, xla: bool) -> None:
    """All implementations on one shape."""
    batch, length, heads, dim, value_dim = CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dy = (
        jax.random.normal(key, (batch, length, heads, size), jnp.bfloat16)
        for key, size in zip(keys, (dim, dim, value_dim, value_dim), strict=True)
    )
    square, scale = batch * heads * length * length, dim**-0.5
    forward_flops, backward_flops = square * (dim + value_dim), square * (3 * dim + 2 * value_dim)
    baselines: dict[str, float | None] = {}

    def measure(operation: str, implementation: str, function: Callable[..., Any], *inputs: Array) -> None:
        flops = forward_flops + (backward_flops if operation == "fwd+bwd" else 0)
        us = table.measure(
            name, operation, implementation, function, inputs,
            flops=flops, sustained=True, against=baselines.get(operation),
        )  # fmt: skip
        baselines.setdefault(operation, us)

    names: list[AttentionImplementation] = ["xla", "cudnn"] if xla else ["cudnn"]
    for implementation in names:
        how: dict[str, Any] = {"scale": scale, "implementation": implementation}
        measure("forward", implementation, functools.partial(causal_attention, **how), q, k, v)
        measure("fwd+bwd", implementation, functools.partial(with_gradients, **how), q, k, v, dy)
    measure("fwd+bwd", "halves", functools.partial(by_halves, scale=scale), q, k, v, dy)


if __name__ == "__main__":
    main()
