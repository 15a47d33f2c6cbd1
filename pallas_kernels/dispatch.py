"""Which implementation of an operation runs: chosen by name, or by the device and the shapes (``auto``)."""

import functools
import logging
from collections.abc import Mapping
from typing import Literal

import jax

Implementation = Literal["auto", "xla", "pallas"]
AttentionImplementation = Literal["auto", "xla", "cudnn"]

HOPPER_SM_COUNT = 132
"""Streaming multiprocessors of an H100, H200 or H800 SXM; the grid of a persistent kernel."""

_log = logging.getLogger(__name__)


@functools.cache
def hopper_obstacle() -> str | None:
    """Says why Hopper kernels cannot run on the default backend, or None where they can."""
    backend = jax.default_backend()
    if backend != "gpu":
        return f"the default backend is {backend!r}, not an NVIDIA Hopper GPU"
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability != "9.0":
        return f"the GPU has compute capability {capability}, not 9.0"
    return None


@functools.cache
def _say_fallback(operation: str, reasons: str) -> None:
    _log.warning("%s runs its XLA implementation on this GPU: %s", operation, reasons)


def choose(operation: str, requested: str, obstacles: Mapping[str, str | None]) -> str:
    """Resolves a requested implementation to the one that runs.

    Args:
        operation: name for messages, such as ``"grouped_gemm"``.
        requested: ``"auto"``, ``"xla"`` or a key of ``obstacles``.
        obstacles: for each accelerated implementation, best first, why it cannot run with these shapes and dtypes on
            this device; None where it can.

    Returns:
        ``"xla"`` or a key of ``obstacles``. ``"auto"`` takes the first without an obstacle, else ``"xla"``, which is
        said once in the log where the device is a GPU.

    Raises:
        ValueError: ``requested`` is unknown, or was asked for by name and cannot run.
    """
    if requested == "auto":
        for name, obstacle in obstacles.items():
            if obstacle is None:
                return name
        if jax.default_backend() == "gpu":
            _say_fallback(operation, "; ".join(f"{name}: {why}" for name, why in obstacles.items()))
        return "xla"
    if requested == "xla":
        return "xla"
    if requested not in obstacles:
        known = ", ".join(repr(name) for name in ("auto", "xla", *obstacles))
        raise ValueError(f"{operation}: unknown implementation {requested!r}; choose one of {known}")
    if (obstacle := obstacles[requested]) is not None:
        raise ValueError(f"{operation}: implementation {requested!r} cannot run: {obstacle}")
    return requested
