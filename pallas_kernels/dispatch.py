"""Which implementation of an operation runs: chosen by name, or by the device and the shapes (``auto``)."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax

Implementation = Literal["auto", "xla", "pallas"]
AttentionImplementation = Literal["auto", "xla", "cudnn"]

HOPPER_SM_COUNT = 132
"""Streaming multiprocessors of an H100, H200 or H800 SXM; the grid of a persistent kernel."""

_log = logging.getLogger(__name__)


class Target(NamedTuple):
    """The kind of device that a program is made for."""

    platform: str
    """``"cpu"``, ``"gpu"``: as ``jax.default_backend()`` says it."""
    capability: str = ""
    """Of a GPU, such as ``"9.0"``."""


_elsewhere: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside, implementations are chosen for ``target``, which need not be here.

    What was traced before, for another device, JAX may take again: for a process that makes programs for one target.
    """
    token = _elsewhere.set(target)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def platform() -> str:
    """The platform that programs are made for: the default backend's, but inside :func:`compiling_for`."""
    target = _elsewhere.get()
    return target.platform if target else jax.default_backend()


def hopper_obstacle() -> str | None:
    """Says why Hopper kernels cannot run on the default backend, or None where they can."""
    if target := _elsewhere.get():
        return _obstacle(*target)
    return _own_obstacle()


@functools.cache
def _own_obstacle() -> str | None:
    backend = jax.default_backend()
    devices = jax.devices() if backend == "gpu" else ()
    return _obstacle(backend, *(str(getattr(one, "compute_capability", "unknown")) for one in devices[:1]))


def _obstacle(platform: str, capability: str = "") -> str | None:
    if platform != "gpu":
        return f"the default backend is {platform!r}, not an NVIDIA Hopper GPU"
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
        if platform() == "gpu":
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
