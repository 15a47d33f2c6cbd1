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
exchange alone became slower), ``parallel_collective_overlap_limit = 4``."""

ENVIRONMENT = (
    Setting(
        "NCCL_NVLS_ENABLE",
        "0",
        "Every figure of docs/performance.md was measured without NVLink multicast.",
    ),
)
"""Variables that libraries under XLA read."""


def apply_gpu_flags(environment: MutableMapping[str, str], devices: int) -> list[str]:
    """Put the settings into an environment, before JAX is used; names of those that were set.

    Args:
        environment: ``os.environ``.
        devices: of the run's mesh; a single one has no collectives, and nothing is set. Nor is it without GPUs.
    """
    if devices < 2 or not count_gpus(environment):
        return []
    given = environment.get("XLA_FLAGS", "")
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    flags = [one for one in XLA if one.name not in named]
    variables = [one for one in ENVIRONMENT if one.name not in environment]
    if flags:
        environment["XLA_FLAGS"] = " ".join(filter(None, [given, *(f"--{one.name}={one.value}" for one in flags)]))
    environment.update({one.name: one.value for one in variables})
    return [one.name for one in (*flags, *variables)]
