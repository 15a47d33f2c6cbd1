"""Settings of XLA and NCCL for a run on several GPUs: in one place, each with its reason, set before JAX starts.

The user's own settings win: a flag that XLA_FLAGS names already, or a variable that is set, is left as it is.
"""

from collections.abc import MutableMapping
from typing import NamedTuple

from sharding.launch.devices import count_gpus


class Setting(NamedTuple):
    """One setting, and why."""

    name: str
    value: str
    reason: str


XLA = (
    Setting(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "Starts a collective early and ends it late, with computation between: of an all_to_all beside ten independent "
        "products on two H200, 50 to 63% of the shorter one's time was hidden.",
    ),
)
"""Flags of XLA_FLAGS. Tried without gain on two H200, and left alone: command buffers off, symmetric buffers (the
exchange alone became slower), without a pipeline ``parallel_collective_overlap_limit = 4``."""

BESIDE = (
    Setting(
        "xla_gpu_experimental_parallel_collective_overlap_limit",
        "8",
        "With one exchange at a time (XLA's choice) a loop that has exchanges of tokens in it is not put between start "
        "and end of a message between stages: with 8 all messages of a tick lie around all of its loops.",
    ),
)
"""Further flags where messages between stages travel beside a tick's computation (``mesh.lag = 2``)."""

ENVIRONMENT = (
    Setting(
        "NCCL_NVLS_ENABLE",
        "0",
        "Every figure of docs/performance.md was measured without NVLink multicast.",
    ),
)
"""Variables that libraries under XLA read."""


def apply_gpu_flags(environment: MutableMapping[str, str], devices: int, *, beside: bool = False) -> list[str]:
    """Put the settings into an environment, before JAX is used; names of those that were set.

    Args:
        environment: ``os.environ``.
        devices: of the run's mesh; a single one has no collectives, and nothing is set. Nor is it without GPUs.
        beside: messages between stages are to travel beside computation: :data:`BESIDE` too.
    """
    if devices < 2 or not count_gpus(environment):
        return []
    given = environment.get("XLA_FLAGS", "")
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    flags = [one for one in _flags(devices, beside) if one.name not in named]
    variables = [one for one in ENVIRONMENT if one.name not in environment]
    if flags:
        environment["XLA_FLAGS"] = " ".join(filter(None, [given, *(f"--{one.name}={one.value}" for one in flags)]))
    environment.update({one.name: one.value for one in variables})
    return [one.name for one in (*flags, *variables)]


def compiler_options(devices: int, *, beside: bool = False) -> dict[str, bool | int]:
    """The XLA flags of :func:`apply_gpu_flags` as options of one compilation."""
    return {
        one.name: one.value == "true" if one.value in ("true", "false") else int(one.value)
        for one in _flags(devices, beside)
    }


def _flags(devices: int, beside: bool) -> tuple[Setting, ...]:
    return () if devices < 2 else (*XLA, *(BESIDE if beside else ()))
