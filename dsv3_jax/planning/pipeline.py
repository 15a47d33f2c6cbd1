"""Schedules of a pipeline compared: time, bubble, passes under way and memory, from a model's FLOPs or given times."""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_jax.config import Config, ConfigError, ModelConfig, replace
from dsv3_jax.planning.flops import block_flops, end_flops
from dsv3_jax.planning.memory import MemoryPlan, plan_memory
from dsv3_jax.planning.stages import layers_of_stages
from sharding.pipeline import (
    NAMES,
    Costs,
    Name,
    Timeline,
    bubble_formula,
    lockstep,
    make_schedule,
    simulate,
    supported,
    table,
)

_MANY = 10_000
"""Passes of a schedule, over all ranks, whose simulation is felt."""


@dataclass(frozen=True)
class PassTimes:
    """Times of one micro-batch in one of ``mesh.pipe`` equal stages, in a unit of one's own. Where ``forward`` is 0,
    stages cost what their FLOPs say, and the unit is the mean forward pass."""

    forward: float = 0.0
    backward: float = 0.0
    """The whole backward pass; 0 is twice ``forward``."""
    weight: float = 0.0
    """The weight gradients' part of it; 0 is half."""
    pair: float = 1.0
    """Time of an overlapped forward and backward pass, over the sum of the two alone."""
    send: float = 0.0
    """A message to the next stage."""


@dataclass(frozen=True)
class SchedulePlan:
    """One schedule."""

    name: Name
    timeline: Timeline
    formula: float
    """Time that a rank waits by the paper's formula, with the mean of the stages' costs."""
    lockstep: float
    """Makespan where neighbours meet in every tick, as one program that scans a table runs it (``mesh.lag``)."""
    memory: MemoryPlan


@dataclass(frozen=True)
class PipelinePlan:
    """All schedules at the same ranks and micro-batches."""

    ranks: int
    micro_batches: int
    tokens: int
    """Of one micro-batch on one device."""
    unit: str
    """Of time."""
    layers: tuple[int, ...]
    """Mixture-of-experts layers of each of ``ranks`` stages."""
    schedules: tuple[SchedulePlan, ...]
    refused: dict[str, str]
    """Why the others cannot be."""


def plan_pipeline(
    config: Config,
    times: PassTimes | None = None,
    micro_batches: int = 0,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> PipelinePlan:
    """Every schedule that ``mesh.pipe`` ranks can run.

    Args:
        config: the run; its ``mesh`` need not be there.
        times: of passes; None takes FLOPs.
        micro_batches: of a step, each as large as the run's; 0 takes those of ``train.batch_size``.
        say: is told what is simulated, where that takes more than seconds.

    Raises:
        ConfigError: there is no pipeline, or it does not fit the model; one line.
    """
    times = PassTimes() if times is None else times
    mesh, train = config.mesh, config.train
    if mesh.pipe < 2:
        raise ConfigError(f"mesh.pipe = {mesh.pipe} is no pipeline: give --mesh.pipe, or a --mesh.cluster that has one")
    lanes = mesh.expert * mesh.data
    sequences = train.micro_batch_size or train.batch_size // lanes
    if micro_batches:
        config = replace(config, train={"batch_size": lanes * sequences * micro_batches, "micro_batch_size": sequences})
    count = config.train.batch_size // (lanes * sequences)
    found, refused = [], {}
    for name in NAMES:
        refused[name] = supported(name, mesh.pipe, count)
        if refused[name]:
            continue
        if count * mesh.pipe >= _MANY:
            say(f"simulating {name}: {count:,} micro-batches on {mesh.pipe} ranks")
        memory = plan_memory(config, schedule=name)
        schedule = make_schedule(name, mesh.pipe, count, mesh.waiting)
        costs = _costs(config, times, schedule.n_stages)
        found.append(
            SchedulePlan(
                name,
                simulate(schedule, costs),
                bubble_formula(name, mesh.pipe, _mean(costs)),
                lockstep(table(schedule, mesh.lag), costs),
                memory,
            )
        )
    return PipelinePlan(
        ranks=mesh.pipe,
        micro_batches=count,
        tokens=sequences * train.seq_len,
        unit="as given" if times.forward else "mean forward pass of a stage = 1",
        layers=layers_of_stages(config.model, train.seq_len, mesh.pipe),
        schedules=tuple(found),
        refused={name: reason for name, reason in refused.items() if reason},
    )


def stage_flops(model: ModelConfig, seq_len: int, stages: int) -> list[tuple[float, float]]:
    """FLOPs of each stage's forward pass for one token: of products with weights, and of attention's own products."""
    first, last = end_flops(model, seq_len)
    block = block_flops(model, seq_len, moe=True)
    found = [(layers * block[0], layers * block[1]) for layers in layers_of_stages(model, seq_len, stages)]
    found[0] = (found[0][0] + first[0], found[0][1] + first[1])
    found[-1] = (found[-1][0] + last[0], found[-1][1] + last[1])
    return found


def _costs(config: Config, times: PassTimes, stages: int) -> Costs:
    """Stages of a V are half as large as those of ``mesh.pipe``. Weight gradients of what the ends alone compute are
    not put off."""
    share = config.mesh.pipe / stages
    if times.forward:
        backward = times.backward or 2 * times.forward
        weight = times.weight or backward / 2
        return Costs(share * times.forward, share * backward, share * weight, times.pair, times.send)
    flops = stage_flops(config.model, config.train.seq_len, stages)
    unit = sum(map(sum, flops)) / config.mesh.pipe
    linear, _ = block_flops(config.model, config.train.seq_len, moe=True)
    layers = layers_of_stages(config.model, config.train.seq_len, stages)
    return Costs(
        f=tuple(sum(parts) / unit for parts in flops),
        b=tuple(2 * sum(parts) / unit for parts in flops),
        w=tuple(count * linear / unit for count in layers),
        pair=times.pair,
        send=times.send,
    )


def _mean(costs: Costs) -> Costs:
    f, b, w = (sum(cost) / len(cost) if isinstance(cost, tuple) else cost for cost in (costs.f, costs.b, costs.w))
    return Costs(f, b, w, costs.pair, costs.send)
