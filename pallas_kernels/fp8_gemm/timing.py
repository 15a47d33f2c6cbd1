"""A product's time two ways: each kernel's own with inputs out of the cache, and a call's under continuous load."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ROTATED_BYTES = 200 * 10**6
"""Inputs that calls rotate over: more than three times an H200's L2 cache."""
LOAD_SECONDS = 0.15
_LOOP_MICROSECONDS = 10_000
_IN_ORDER: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}

Operands = tuple[Array, ...]
Call = Callable[[Operands, Array | None], Array]
"""(operands, array to add to) -> result."""


def loop(call: Call, sets: list[Operands], outs: list[Any], adding: bool, floor_us: float) -> Any:
    """Compiles a loop over all sets for about 10 ms that leaves the host nothing to do: (sets, outs) -> outs.

    XLA records the loop's body as one CUDA graph, whose calls run in order; the buffers of a loop stay where they are,
    so it is recorded once. Each turn's inputs are tied to the turn's number: else one turn would do.

    Args:
        call: what is timed.
        sets: operands of each call in a turn.
        outs: the results' arrays, or their types; donated.
        adding: whether a call adds to its array.
        floor_us: the least that a call can take, for the number of turns.
    """
    turns = max(1, math.ceil(_LOOP_MICROSECONDS / (1.2 * floor_us * len(sets))))
    one = jax.jit(call)

    def turn(number: Any, sets: list[Operands], outs: list[Array]) -> list[Array]:
        made = []
        for operands, out in zip(sets, outs, strict=True):
            operands, _ = lax.optimization_barrier((operands, number))
            made.append(one(operands, out if adding else None))
        return made

    def whole(sets: list[Operands], outs: list[Array]) -> list[Array]:
        return lax.fori_loop(0, turns, lambda number, outs: turn(number, sets, outs), outs)

    compiled = jax.jit(whole, donate_argnums=1, compiler_options=_IN_ORDER).lower(sets, outs).compile()
    return compiled, turns * len(sets)


def sustained(looped: tuple[Any, int], sets: list[Operands], outs: list[Array]) -> tuple[float, list[Array]]:
    """Time of a call among calls back to back for ``LOAD_SECONDS``, microseconds; and the arrays handed on."""
    function, calls = looped
    outs, seconds = _seconds(function, sets, outs, 1)
    rounds = max(2, round(LOAD_SECONDS / seconds))
    outs, seconds = _seconds(function, sets, outs, rounds)
    return 1e6 * seconds / rounds / calls, outs


def _seconds(function: Any, sets: list[Operands], outs: list[Array], rounds: int) -> tuple[list[Array], float]:
    start = time.perf_counter()
    for _ in range(rounds):
        outs = function(sets, outs)
    jax.block_until_ready(outs)
    return outs, time.perf_counter() - start


def burst(function: Any, sets: list[Operands], intos: Any, kernel: str) -> tuple[float, list[Array]]:
    """Device time of a call after a rest (CUPTI), microseconds; each finds its inputs out of the cache.

    Args:
        function: (sets, intos) -> results, a kernel for each set.
        sets: operands.
        intos: arrays to add to, or None.
        kernel: how the kernels' names begin.
    """
    from jax.experimental.mosaic.gpu import profiler

    time.sleep(0.15)
    kernels: Any
    outs, kernels = profiler.Cupti(finalize=False).measure(function, aggregate=False)(sets, intos)
    milliseconds: list[float] = [ms for name, ms in kernels or () if name.startswith(kernel)]  # not XLA's copies
    if len(milliseconds) != len(sets):
        raise RuntimeError(f"CUPTI saw {len(milliseconds)} of {len(sets)} kernels")
    return 1e3 * float(np.median(milliseconds)), outs


def dense_microseconds(rows: int, columns: int, contraction: int) -> float:
    """Sustained time of XLA's bfloat16 product (cuBLAS) of this size, microseconds."""
    count = min(48, max(1, math.ceil(ROTATED_BYTES / (2 * contraction * (rows + columns)))))
    keys = jax.random.split(jax.random.key(1), 2 * count)
    make = jax.jit(lambda key, size: jax.random.normal(key, (size, contraction), jnp.bfloat16), static_argnums=1)
    sets = [(make(keys[2 * i], rows), make(keys[2 * i + 1], columns)) for i in range(count)]
    outs = [jnp.zeros((rows, columns), jnp.bfloat16) for _ in sets]
    moved = 2 * (contraction * (rows + columns) + rows * columns)
    floor_us = max(2 * rows * columns * contraction / 0.8e9, moved / 4.2e6)
    product = loop(lambda operands, _: jnp.einsum("mk,nk->mn", *operands), sets, outs, False, floor_us)
    return sustained(product, sets, outs)[0]
