"""``dsv3 plan memory PRESET``: what a device will hold, before anything is compiled; the other plans are next door."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.cli import plan_compile, plan_pipeline
from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import Config, ConfigError, load_cluster
from dsv3_jax.planning.fit import DEFAULT_SHARE, remedy
from dsv3_jax.planning.memory import plan_memory

PLANS = ("memory", "pipeline", "compile")


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 plan memory``."""

    json: bool = False
    """Print one JSON object, for programs."""
    device_gb: float = 0.0
    """Memory of one device in GB; 0 takes that of mesh.cluster, if there is one."""
    device_share: float = DEFAULT_SHARE
    """Share of it that JAX may use (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


def run(argv: Sequence[str]) -> int:
    """Print the plan that is asked for; the exit status."""
    words = list(argv)
    if not words:
        raise ConfigError("name what to plan, as in `dsv3 plan memory deepseek_v3 --mesh.cluster h800_2048`")
    if words[0] not in (*PLANS, "-h", "--help"):
        raise ConfigError(f"dsv3 plan {words[0]!r} is not known; there is {', '.join(PLANS)}")
    if words[0] == "pipeline":
        return plan_pipeline.run(words[1:])
    if words[0] == "compile":
        return plan_compile.run(words[1:])
    description = (
        "Bytes on each device while a preset trains on a mesh, by component. Nothing is compiled. "
        "See also `dsv3 plan pipeline --help` and `dsv3 plan compile --help`."
    )
    rest = words[1:] if words[0] in PLANS else words
    config, options = parse_config("dsv3 plan memory", rest, description, Options, trainable=False)
    if options.device_gb < 0:
        raise ConfigError(f"--device-gb = {options.device_gb:g} must not be negative")
    if not math.isfinite(options.device_gb * 1e9):
        raise ConfigError(
            f"--device-gb = {options.device_gb:g} must be a number of GB, such as 80; 0 takes that of mesh.cluster"
        )
    if not 0 < options.device_share <= 1:
        raise ConfigError(f"--device-share = {options.device_share:g} must be above 0 and at most 1")
    facts = describe_memory(config, options)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_memory(facts)
    return 0


def describe_memory(config: Config, options: Options) -> dict[str, Any]:
    """The facts that ``--json`` prints, in bytes of one device.

    ``state`` and ``step`` are components of ``arguments`` and ``temporaries``, which sum to ``total``; ``kept`` is what
    one layer of each kind keeps of one micro-batch; ``host`` is in host memory, for each device. ``device`` and
    ``fits`` are null where the device is not known; ``remedy`` is null but where it does not fit.
    """
    plan = plan_memory(config)
    cluster = load_cluster(config.mesh.cluster) if config.mesh.cluster else None
    gigabytes = options.device_gb or (cluster.memory_gb if cluster else 0.0)
    device = round(gigabytes * 1e9) or None
    share = options.device_share
    return {
        "name": config.name,
        "mesh": plan.mesh,
        "cluster": config.mesh.cluster or None,
        "schedule": config.mesh.schedule if config.mesh.pipe > 1 else None,
        "transport": config.mesh.transport if config.mesh.expert > 1 else None,
        "precision": config.train.precision,
        "remat": plan.remat,
        "tokens_per_micro_batch": plan.tokens,
        "micro_batches": plan.micro_batches,
        "state": plan.state,
        "step": plan.step,
        "kept": plan.kept,
        "host": plan.host,
        "arguments": plan.arguments,
        "temporaries": plan.temporaries,
        "total": plan.total,
        "device": device,
        "fits": plan.total <= device * share if device else None,
        "remedy": remedy(config, plan, device, share) if device else None,
    }


def _print_memory(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    # As Text: square brackets of a name are no markup.
    table = Table(title=Text(f"{facts['name']} on {mesh}: one device", "table.title"), title_justify="left")
    for heading in ("component", "bytes", "GB"):
        table.add_column(heading, justify="left" if heading == "component" else "right")

    def row(name: str, count: int) -> None:
        if count:
            table.add_row(name, f"{count:,}", f"{count / 1e9:,.3f}")

    for part, total in (("state", "arguments"), ("step", "temporaries")):
        for name, count in facts[part].items():
            row(name, count)
        table.add_section()
        row({"state": "state between steps", "step": "while a step runs"}[part], facts[total])
        table.add_section()
    row("total", facts["total"])
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)

    console.print(table)
    told = {"schedule": facts["schedule"], "transport": facts["transport"], "precision": facts["precision"]}
    settings = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    say(
        f"{facts['micro_batches']} micro-batches of {facts['tokens_per_micro_batch']:,} tokens, "
        f"recomputation {facts['remat']}, {settings}"
    )
    for kind, tensors in facts["kept"].items():
        parts = ", ".join(f"{name} {count / 1e6:,.1f}" for name, count in tensors.items() if count)
        say(f"kept by one {kind} layer for one micro-batch, MB: {parts}")
    if any(facts["host"].values()):
        parts = ", ".join(f"{name} {count / 1e9:,.3f}" for name, count in facts["host"].items())
        say(f"in host memory for each device, GB: {parts}")
    if facts["device"]:
        say(facts["remedy"] or f"fits: {facts['total'] / 1e9:,.1f} GB on a device of {facts['device'] / 1e9:,.1f} GB")
