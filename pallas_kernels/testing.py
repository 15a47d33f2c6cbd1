"""Error metrics, tolerances, FLOP counting and the benchmark timer that the kernels' tests and benches share."""

import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from numpy.typing import ArrayLike

RELATIVE_L2_TOLERANCE = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 8e-3}
"""Largest relative L2 error of one operation against a float64 or float32 definition, by the dtype of its result."""

_DOT_PRIMITIVES = ("dot_general",)
_log = logging.getLogger(__name__)


def relative_l2(actual: ArrayLike, expected: ArrayLike) -> float:
    """``|actual - expected| / |expected|`` in float64; ``|actual|`` where the expected array is all zeros."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    norm = float(np.linalg.norm(y))
    return float(np.linalg.norm(x - y)) / (norm or 1.0)


def calc_diff(actual: ArrayLike, expected: ArrayLike) -> float:
    """DeepGEMM's measure ``1 - 2<x, y> / (<x, x> + <y, y>)`` in float64; 0 where both arrays are all zeros."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    energy = float((x * x).sum() + (y * y).sum())
    return 1.0 - 2.0 * float((x * y).sum()) / energy if energy else 0.0


def assert_close(actual: ArrayLike, expected: ArrayLike, *, tolerance: float | None = None) -> None:
    """Asserts equal shapes, finite values and a relative L2 error within the dtype's (or the given) tolerance."""
    shape, wanted = np.shape(actual), np.shape(expected)
    assert shape == wanted, f"shape {shape}, expected {wanted}"
    assert bool(np.isfinite(np.asarray(actual, np.float64)).all()), "not every value is finite"
    name = str(jnp.asarray(actual).dtype)
    limit = RELATIVE_L2_TOLERANCE[name] if tolerance is None else tolerance
    error = relative_l2(actual, expected)
    assert error <= limit, f"relative L2 error {error:.3e} of a {name} result is above {limit:.1e}"


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations of all matrix products ``function`` traces to, with scans counted at full length.

    XLA's own ``cost_analysis`` counts the body of a loop once, so it cannot bound a scanned computation.

    Raises:
        NotImplementedError: a matrix product stands in a ``while`` loop, whose length is unknown.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _DOT_PRIMITIVES:
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[dim] for dim in contract)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [_count(sub) for sub in _sub_jaxprs(params)]
        if name == "scan":
            total += params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "while" and any(inner):
            raise NotImplementedError("a matrix product inside a while loop of unknown length")
        else:
            total += sum(inner)
    return total


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: isinstance(x, jax_core.ClosedJaxpr | jax_core.Jaxpr)
    )
    return [
        leaf.jaxpr if isinstance(leaf, jax_core.ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, jax_core.ClosedJaxpr | jax_core.Jaxpr)
    ]


def spilled_bytes(program: str) -> list[int]:
    """Bytes of register spills, stores and loads, of each Mosaic GPU kernel that a Python program compiles.

    The program runs in its own process, on the GPU, for the compiler's report goes straight to the standard output.

    Raises:
        RuntimeError: the program failed.
    """
    environment = os.environ | {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    pairs = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    return [int(stores) + int(loads) for stores, loads in pairs]


def median_microseconds(function: Callable[..., Any], *arguments: Any, repeats: int = 20, warmup: int = 2) -> float:
    """Median time of one call of ``jax.jit(function)`` on ``arguments``, in microseconds, compilation left out.

    On a GPU it is the sum of the kernels' device times (CUPTI) of calls made back to back, else the wall clock of a
    call that is waited for. Inputs stay the same, so what fits in a cache is there.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    compiled = _jitted(function)
    for _ in range(max(warmup, 1)):
        jax.block_until_ready(compiled(*arguments))
    if jax.default_backend() == "gpu":
        return 1e3 * float(np.median(_device_milliseconds(compiled, arguments, repeats)))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return 1e6 * float(np.median(seconds))


def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)


def _device_milliseconds(compiled: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> list[float]:
    """Device time of each call by CUPTI; where it does not work, the mean over calls made back to back."""
    from jax.experimental.mosaic.gpu import profiler  # slow to import, and of use on GPUs only

    try:
        profile = profiler.Cupti(finalize=False)  # left attached: attaching takes long
        _, milliseconds = profile.measure(compiled, iterations=repeats)(*arguments)
    except RuntimeError as error:
        _log.warning("CUPTI does not work here (%s); timing by the wall clock", error)
        milliseconds = None
    if milliseconds is None:
        return [1e3 * _mean_seconds(compiled, arguments, repeats)]
    return np.atleast_1d(milliseconds).tolist()


def sustained_microseconds(function: Callable[..., Any], *arguments: Any, seconds: float = 0.5) -> float:
    """Mean time of one call among calls made back to back for about ``seconds``, in microseconds.

    It is what a long run sees: under load a GPU lowers its clock to stay within its power limit.
    """
    compiled = _jitted(function)
    jax.block_until_ready(compiled(*arguments))
    calls = max(2, round(seconds / _mean_seconds(compiled, arguments, 3)))
    return 1e6 * _mean_seconds(compiled, arguments, calls)


def _mean_seconds(compiled: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        compiled(*arguments)
    jax.block_until_ready(compiled(*arguments))
    return (time.perf_counter() - start) / calls
