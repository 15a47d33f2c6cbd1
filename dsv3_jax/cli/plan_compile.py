"""``dsv3 plan compile PRESET``: the training step compiled for a cluster's GPUs, which need not be here."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import Config, ConfigError, load_cluster
from dsv3_jax.planning.fit import DEFAULT_SHARE
from dsv3_jax.planning.memory import plan_memory


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 plan compile``."""

    hlo: str = ""
    """File to write XLA's scheduled program to."""
    json: bool = False
    """Print one JSON object, for programs."""
    device_share: float = DEFAULT_SHARE
    """Share of a device's memory that JAX may use (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


def run(argv: Sequence[str]) -> int:
    """Compile and print; the exit status: 1 where the step does not fit its device."""
    description = (
        "Compile a preset's training step for the devices of mesh.cluster on this machine, without them: what XLA "
        "plans to hold on each, beside `dsv3 plan memory`, and the scheduled program. Needs the extra cuda13, no GPU."
    )
    config, options = parse_config("dsv3 plan compile", argv, description, Options)
    if not 0 < options.device_share <= 1:
        raise ConfigError(f"--device-share = {options.device_share:g} must be above 0 and at most 1")
    facts = describe_program(config, options)
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0 if facts["fits"] else 1


def describe_program(config: Config, options: Options) -> dict[str, Any]:
    """The facts that ``--json`` prints: bytes of one device, seconds, and exchanges by kind."""
    import jax

    # This machine's own GPUs, if there are any, have no part in it.
    jax.config.update("jax_platforms", "cpu")
    from dsv3_jax.train.ahead_of_time import compile_ahead
    from dsv3_jax.train.hlo_text import parse_hlo

    ahead = compile_ahead(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    if options.hlo:
        Path(options.hlo).parent.mkdir(parents=True, exist_ok=True)
        Path(options.hlo).write_text(ahead.text, encoding="utf-8")
    cluster = load_cluster(config.mesh.cluster)
    plan, device = plan_memory(config, gpu=cluster.device != "cpu"), round(cluster.memory_gb * 1e9)
    return {
        "name": config.name,
        "cluster": cluster.name,
        "mesh": plan.mesh,
        "arguments": ahead.arguments,
        "temporaries": ahead.temporaries,
        "total": ahead.total,
        "planned_arguments": plan.arguments,
        "planned_temporaries": plan.temporaries,
        "planned_total": plan.total,
        "device": device,
        "device_share": options.device_share,
        "fits": ahead.total <= device * options.device_share,
        "instructions": len(parse_hlo(ahead.text)),
        "lower_seconds": round(ahead.lower_seconds, 1),
        "compile_seconds": round(ahead.compile_seconds, 1),
        "hlo": options.hlo or None,
    }


def as_text(facts: dict[str, Any]) -> str:
    """What is printed for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    lines = [f"{facts['name']} on {mesh} of {facts['cluster']}, one device, GB", f"{'':<24}{'XLA':>10}{'plan':>10}"]
    rows = {"arguments": "state and batch", "temporaries": "while a step runs", "total": "total"}
    for name, told in rows.items():
        lines.append(f"{told:<24}{facts[name] / 1e9:>10.3f}{facts[f'planned_{name}'] / 1e9:>10.3f}")
    verdict = "fits" if facts["fits"] else "does not fit"
    lines += [
        f"{verdict} the {facts['device'] * facts['device_share'] / 1e9:,.1f} GB that JAX takes of a device of "
        f"{facts['device'] / 1e9:,.1f} GB (--device-share {facts['device_share']:g})",
        f"{facts['instructions']:,} instructions; lowered in {facts['lower_seconds']} s, compiled in "
        f"{facts['compile_seconds']} s",
    ]
    if facts["hlo"]:
        lines.append(f"program: {facts['hlo']}")
    return "\n".join(lines)
