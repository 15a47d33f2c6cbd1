"""How layers lie on the ranks of a pipeline, and how many passes are under way (design section 5, spec 13.1)."""

import functools
from dataclasses import dataclass

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.planning.flops import block_flops, end_flops
from sharding.pipeline import Name, Slots, make_schedule, supported, table
from sharding.pipeline.partition import deal

Schedule = Name


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
    """Of these, passes of the first stage. The last stage computes head and MTP when its backward pass comes."""
    put_off: int = 0
    """Backward passes of a chunk whose weight gradients have not come, at most."""
    messages: int = 0
    """Activations and gradients of a stage's ends that a rank has room for: on their way, and the trunk's output."""


def stages_of(
    model: ModelConfig, pipe: int, schedule: Schedule, micro_batches: int, waiting: int = -1, lag: int = 1
) -> Stages:
    """The stages of ``pipe`` ranks; one rank is no pipeline, whatever the schedule. ``waiting`` and ``lag`` are the
    mesh's.

    Raises:
        ConfigError: the schedule cannot be made for so many ranks and micro-batches; one line.
    """
    layers = model.n_moe_layers
    if pipe == 1:
        return Stages(layers, layers, layers, 1, 1)
    reason = supported(schedule, pipe, micro_batches, waiting)
    if reason:
        raise ConfigError(f"mesh.schedule: {reason}")
    chunk = -(-layers // (2 * pipe if schedule == "dualpipev" else pipe))
    stored = 2 * chunk if schedule == "dualpipev" else chunk
    held = 2 * chunk if schedule in ("dualpipe", "dualpipev") else chunk
    # But for GPipe's, rings do not grow with more micro-batches than this (tests).
    few = micro_batches if schedule == "gpipe" else min(micro_batches, 4 * pipe)
    slots = _slots(schedule, pipe, few, waiting, lag)
    # Rings of messages have a slot that nobody reads; with lag 2 those of the last tick are on their way.
    messages = slots.activation + slots.gradient + slots.last + 3 + 2 * (lag - 1)
    return Stages(stored, held, chunk, slots.residual, slots.first, slots.deferred, messages)


def layers_of_stages(model: ModelConfig, seq_len: int, stages: int) -> tuple[int, ...]:
    """Mixture-of-experts layers of each stage, fewer at the ends, which have dense layers, and head and MTP, too."""
    block = sum(block_flops(model, seq_len, moe=True))
    first, last = (sum(flops) / block for flops in end_flops(model, seq_len))
    return deal(model.n_moe_layers, stages, first, last)


@functools.cache
def _slots(schedule: Schedule, pipe: int, micro_batches: int, waiting: int, lag: int) -> Slots:
    return table(make_schedule(schedule, pipe, micro_batches, waiting), lag).slots
