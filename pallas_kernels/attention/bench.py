"""Times causal attention, forward and with its gradients, on the models' shapes.

    python -m pallas_kernels.attention.bench [--json FILE] [--quick]

FLOPs of the causal half, as the peers count them: forward B N T^2 (H + W), backward B N T^2 (3 H + 2 W).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.attention import causal_attention
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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = bench_table.parser(__doc__).parse_args(arguments)
    table = bench_table.Table(options.json)
    for name in list(CASES)[: 1 if options.quick else None]:
        batch, length, heads, dim, value_dim = CASES[name]
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, dy = (
            jax.random.normal(key, (batch, length, heads, size), jnp.bfloat16)
            for key, size in zip(keys, (dim, dim, value_dim, value_dim), strict=True)
        )
        square = batch * heads * length * length
        forward_flops, backward_flops = square * (dim + value_dim), square * (3 * dim + 2 * value_dim)
        baselines: dict[str, float | None] = {}
        for implementation in ("xla", "cudnn"):
            how = {"scale": dim**-0.5, "implementation": implementation}
            for operation, function, inputs, flops in (
                ("forward", functools.partial(causal_attention, **how), (q, k, v), forward_flops),
                ("fwd+bwd", functools.partial(with_gradients, **how), (q, k, v, dy), forward_flops + backward_flops),
            ):
                against = None if implementation == "xla" else baselines[operation]
                baselines[operation] = table.measure(
                    name, operation, implementation, function, inputs, flops=flops, sustained=True, against=against
                )


if __name__ == "__main__":
    main()
