"""How layers lie on the ranks of a pipeline, and how many micro-batches are under way (design section 5, spec 13.1)."""

from dataclasses import dataclass
from typing import Literal, get_args

from dsv3_jax.config import ModelConfig

Schedule = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Stages:
    """Mixture-of-experts layers are [pipe, slots, ...], some slots empty; embedding, dense layers, head and MTP are on
    every rank. One program runs on all ranks, so that buffers are as large on each."""

    stored: int
    """Slots whose masters, moments and EMA one rank keeps."""
    held: int
    """Slots whose weights and gradients one rank holds during a step: DualPipe's mirror copy is among them."""
    chunk: int
    """Slots that one forward pass goes through."""
    under_way: int
    """Forward passes of a chunk whose backward passes have not come, at most."""
    under_way_first: int
    """Of these, passes of the first stage. The last stage, with head and MTP, has one: its backward pass comes next."""


def stages_of(model: ModelConfig, pipe: int, schedule: Schedule, micro_batches: int) -> Stages:
    """The stages of ``pipe`` ranks; one rank is no pipeline, whatever the schedule.

    Under way are PP micro-batches with ``1f1b`` and ``zb1p``, PP + 1 with the two-way schedules (spec 13.1), whose V
    form counts 2 pipe stages; not more than there are.
    """
    layers = model.n_moe_layers
    if pipe == 1:
        return Stages(layers, layers, layers, 1, 1)
    count = 2 * pipe if schedule == "dualpipev" else pipe
    chunk = -(-layers // count)
    passes = 2 * micro_batches if schedule == "dualpipev" else micro_batches
    if schedule in ("1f1b", "zb1p"):
        return Stages(chunk, chunk, chunk, min(count, passes), min(count, passes))
    stored = 2 * chunk if schedule == "dualpipev" else chunk
    return Stages(stored, 2 * chunk, chunk, min(count + 1, passes), min(count, passes))
