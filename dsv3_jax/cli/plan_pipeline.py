"""``dsv3 plan pipeline PRESET``: schedules of a pipeline compared, and drawn."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.planning.pipeline import PassTimes, PipelinePlan, SchedulePlan, plan_pipeline


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 plan pipeline``."""

    out: str = "pipeline.png"
    """Where to draw the timeline of mesh.schedule; empty draws none."""
    all: bool = False
    """Draw every schedule, with one scale of time."""
    json: bool = False
    """Print one JSON object, for programs."""
    micro_batches: int = 0
    """Of a step; 0 takes those of train.batch_size. Thousands take minutes."""
    time: PassTimes = field(default_factory=PassTimes)


def run(argv: Sequence[str]) -> int:
    """Print the comparison and draw; the exit status."""
    description = (
        "Bubble, passes under way and memory of every schedule on the ranks of mesh.pipe, and a picture. Nothing is "
        "compiled. Costs of stages are the model's FLOPs, or given times."
    )
    config, options = parse_config("dsv3 plan pipeline", argv, description, Options, trainable=False)
    _check(options)
    plan = plan_pipeline(config, options.time, options.micro_batches, say=_say)
    drawn = _drawn(config, plan, everything=options.all) if options.out else []
    if drawn:
        from sharding.pipeline.plot import write_timelines

        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_timelines(Path(options.out), [one.timeline for one in drawn], plan.unit)
    facts = describe_pipeline(config, plan, options.out if drawn else None)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe_pipeline(config: Config, plan: PipelinePlan, picture: str | None = None) -> dict[str, Any]:
    """The facts that ``--json`` prints: times in ``unit``, bytes of one device."""
    return {
        "name": config.name,
        "ranks": plan.ranks,
        "micro_batches": plan.micro_batches,
        "tokens_per_micro_batch": plan.tokens,
        "unit": plan.unit,
        "moe_layers_of_stages": plan.layers,
        "waiting": config.mesh.waiting,
        "schedules": {one.name: _facts(one) for one in plan.schedules},
        "refused": plan.refused,
        "picture": picture,
    }


def _facts(one: SchedulePlan) -> dict[str, Any]:
    timeline, step, carried = one.timeline, one.memory.step, one.memory.carried
    return {
        "stages": timeline.schedule.n_stages,
        "time": timeline.makespan,
        "bubble": timeline.bubble,
        "idle": timeline.idle,
        "idle_by_formula": one.formula,
        "time_in_lockstep": one.lockstep,
        "passes_under_way": timeline.in_flight,
        "passes_held": timeline.held,
        "weights": step["gathered weights"] + step["weights, cast"],
        "activations": sum(
            count for name, count in carried.items() if name.startswith(("activations", "weight gradients"))
        ),
        "memory": one.memory.total,
    }


def _drawn(config: Config, plan: PipelinePlan, *, everything: bool) -> list[SchedulePlan]:
    """What to draw.

    Raises:
        ConfigError: the run's own schedule cannot be; one line.
    """
    name = config.mesh.schedule
    if not everything and name in plan.refused:
        raise ConfigError(f"mesh.schedule: {plan.refused[name]}")
    return [one for one in plan.schedules if everything or one.name == name]


def _check(options: Options) -> None:
    for name, value in asdict(options.time).items():
        if not math.isfinite(value):
            raise ConfigError(f"--time.{name} = {value:g} must be a finite number")
        if value < 0 or (name == "pair" and value == 0):
            raise ConfigError(f"--time.{name} = {value:g} must {'be above 0' if name == 'pair' else 'not be negative'}")
    if options.micro_batches < 0:
        raise ConfigError(f"--micro-batches = {options.micro_batches} must not be negative")
    if options.out and Path(options.out).suffix.lower() != ".png":
        raise ConfigError(f"--out = {options.out!r} must end in .png")


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sharding.pipeline.plot import TITLES

    tokens, ranks = facts["tokens_per_micro_batch"], facts["ranks"]
    title = f"{facts['name']}: {ranks} ranks, {facts['micro_batches']} micro-batches of {tokens:,} tokens"
    # As Text: square brackets of a name are no markup.
    times = Table(title=Text(title, "table.title"), title_justify="left")
    sizes = Table(title="One device", title_justify="left")
    for heading in ("schedule", "time", "bubble", "idle", "formula", "in ticks", "passes", "held"):
        times.add_column(heading, justify="left" if heading == "schedule" else "right")
    for heading in ("schedule", "stages", "weights, GB", "activations, GB", "all, GB"):
        sizes.add_column(heading, justify="left" if heading == "schedule" else "right")
    for name, one in facts["schedules"].items():
        low, high = min(one["idle"]), max(one["idle"])
        idle = f"{low:.1f}" if high - low < 0.05 else f"{low:.1f}-{high:.1f}"
        times.add_row(
            TITLES[name], f"{one['time']:.1f}", f"{one['bubble']:.1%}", idle, f"{one['idle_by_formula']:.1f}",
            f"{one['time_in_lockstep']:.1f}", str(max(one["passes_under_way"])), str(max(one["passes_held"])),
        )  # fmt: skip
        gigabytes = [f"{one[part] / 1e9:,.1f}" for part in ("weights", "activations", "memory")]
        sizes.add_row(TITLES[name], str(one["stages"]), *gigabytes)
    console = Console()
    console.print(times)
    console.print(sizes)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)

    say(
        f"Time: {facts['unit']}. Idle: of each rank; formula: of equal stages. In ticks: the time where neighbours "
        "meet after every action. Passes: most of one rank whose backward pass has not ended; held: whose weight "
        "gradient has not."
    )
    if facts["waiting"] >= 0:
        say(f"Weight gradients of at most {facts['waiting']} passes of a rank wait at one time (mesh.waiting).")
    say(f"Mixture-of-experts layers of the {ranks} stages: {', '.join(map(str, facts['moe_layers_of_stages']))}")
    for reason in facts["refused"].values():
        say(f"Not possible: {reason}")
    if facts["picture"]:
        say(f"Drawn: {facts['picture']}")
