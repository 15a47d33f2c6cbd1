"""Whether a step fits, and what to change where it does not."""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Config, replace
from dsv3_jax.planning.memory import MemoryPlan, plan_memory
from dsv3_jax.planning.stages import Schedule

DEFAULT_SHARE = 0.75
"""Of a GPU's memory that JAX takes when it starts, unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise."""

_MOST = 0.95
"""Share that leaves room for CUDA, NCCL and cuDNN."""


def remedy(config: Config, plan: MemoryPlan, device: int, share: float, schedule: Schedule | None = None) -> str | None:
    """One line when ``plan`` is larger than ``share`` of the ``device`` bytes, with what to change; else None.

    Tried in this order: a larger share; smaller micro-batches, then fewer weight gradients that wait in a pipeline,
    then more recomputation, alone and together.
    """
    limit = device * share
    if plan.total <= limit:
        return None
    line = f"does not fit: {plan.total / 1e9:,.1f} GB of {limit / 1e9:,.1f} GB ({share:.0%} of the device)"
    if plan.total <= device * _MOST:
        return f"{line}; set XLA_PYTHON_CLIENT_MEM_FRACTION={_MOST} to use {device * _MOST / 1e9:,.1f} GB"
    found = [
        (changes, plan_memory(replace(config, **changes), schedule=schedule))
        for changes in _changes(config, schedule or config.mesh.schedule)
    ]
    for most, also in ((limit, ""), (device * _MOST, f" and XLA_PYTHON_CLIENT_MEM_FRACTION={_MOST}")):
        for changes, smaller in found:
            if smaller.total <= most:
                words = " and ".join(
                    f"{section}.{name} = {value!r}"
                    for section, values in changes.items()
                    for name, value in values.items()
                )
                return f"{line}; {words}{also} would take {smaller.total / 1e9:,.1f} GB"
    smaller = found[-1][1]
    parts = smaller.state | smaller.step
    largest = max(parts, key=lambda name: parts[name])
    axes = ", ".join(f"mesh.{axis} = {size}" for axis, size in plan.mesh.items())
    return (
        f"{line}, and the smallest micro-batch with full recomputation would still take {smaller.total / 1e9:,.1f} GB, "
        f"most of it {largest}: enlarge {axes}"
    )


def _changes(config: Config, schedule: Schedule) -> Iterator[dict[str, dict[str, Any]]]:
    train, now_waiting = config.train, config.mesh.waiting
    puts_off = config.mesh.pipe > 1 and schedule in ("zb1p", "dualpipe", "dualpipev")
    fewer = [most for most in (1, 0) if puts_off and (now_waiting == -1 or most < now_waiting)]
    now = train.micro_batch_size or train.batch_size // (config.mesh.expert * config.mesh.data)
    sizes = [size for size in range(now, 0, -1) if now % size == 0]
    modes = ("none", "paper", "full")
    for remat in modes[modes.index(train.remat) :]:
        for waiting in (now_waiting, *fewer):
            for size in sizes:
                changed = {} if size == now else {"micro_batch_size": size}
                changed |= {} if remat == train.remat else {"remat": remat}
                yield {"train": changed, "mesh": {} if waiting == now_waiting else {"waiting": waiting}}
