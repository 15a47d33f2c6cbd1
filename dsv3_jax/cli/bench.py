"""``dsv3 bench train PRESET``: a training step measured; ``mesh``: it on many meshes; ``transports``: of tokens
to experts; ``decode``: the engine; ``precision``: losses; ``kernels``."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.overrides import check_writable, parse_config
from dsv3_jax.config import ConfigError
from sharding.flags import apply_gpu_flags


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 bench train``."""

    steps: int = 12
    """Steps that are timed."""
    warmup: int = 4
    """Steps before them."""
    profiled: int = 3
    """Further steps under the profiler, for the table of where a step goes; 0 leaves it out."""
    json: str = ""
    """File that the figures, with a profiled step's longest operations, are written to as one JSON object, first
    before steps are profiled; '-' prints the object alone."""


def run(argv: Sequence[str]) -> int:
    """Measure what is asked for; the exit status."""
    words = list(argv)
    if words and words[0] == "kernels":
        from dsv3_jax.cli import bench_kernels

        return bench_kernels.run(words[1:])
    if words and words[0] == "precision":
        from dsv3_jax.cli import bench_precision

        return bench_precision.run(words[1:])
    if words and words[0] == "transports":
        from dsv3_jax.cli import bench_transports

        return bench_transports.run(words[1:])
    if words and words[0] == "mesh":
        from dsv3_jax.cli import bench_mesh

        return bench_mesh.run(words[1:])
    if words and words[0] == "decode":
        from dsv3_jax.cli import bench_decode

        return bench_decode.run(words[1:])
    if words and words[0] not in ("train", "-h", "--help"):
        known = "`train PRESET`, `mesh PRESET`, `transports`, `decode PRESET`, `precision PRESET` and `kernels`"
        raise ConfigError(f"dsv3 bench {words[0]!r} is not known; there are {known}")
    if not words:
        raise ConfigError("name what to measure, as in `dsv3 bench train bench_3b` or `dsv3 bench kernels`")
    description = (
        "Time the training step on random tokens: compile seconds, median step, tokens/s, FLOP/s; where its time goes, "
        "and where its memory; with --train.ema-decay, the moving average's cost too."
    )
    rest = words[1:] if words[0] == "train" else words
    config, options = parse_config("dsv3 bench train", rest, description, Options)
    if options.steps < 1 or options.warmup < 1:
        raise ConfigError(f"--steps = {options.steps} and --warmup = {options.warmup} must be at least 1")
    if options.profiled < 0:
        raise ConfigError(f"--profiled = {options.profiled} must not be negative")
    if config.train.ema_decay and options.steps < config.train.ema_every:
        raise ConfigError(f"--steps = {options.steps} must be at least train.ema_every = {config.train.ema_every}")
    if options.json != "-":
        check_writable("--json", options.json)
    mesh = config.mesh
    apply_gpu_flags(os.environ, mesh.devices, beside=mesh.sends_beside)
    import jax

    from dsv3_jax.train.bench import bench_step
    from dsv3_jax.train.step import out_of_memory
    from dsv3_jax.train.step_table import as_text

    keep_compiled(options.compile_cache)

    def keep(known: Any) -> None:
        if options.json not in ("", "-"):
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(_as_json(known) + "\n")

    try:
        result = bench_step(
            config,
            steps=options.steps,
            warmup=options.warmup,
            profiled=options.profiled,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            keep=keep,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"dsv3: error: {out_of_memory(config)}", file=sys.stderr)
        return 1
    if options.json == "-":
        print(_as_json(result))
        return 0
    keep(result)
    _print_table(dataclasses.asdict(result))
    print(memory_text(result))
    if result.average is not None:
        print(f"\n{result.average}")
    if result.where is not None:
        print(f"\n{as_text(result.where)}")
    return 0


def _as_json(result: Any) -> str:
    return json.dumps(dataclasses.asdict(result), indent=2)


def memory_text(result: Any) -> str:
    """The plan's rows, their sum, and what that is beside the measured peak."""
    lines = [f"\n{'memory of one device':<20} {'GiB':>8}"]
    lines += [f"{name:<20} {size:>8.2f}" for name, size in result.memory_gib.items()]
    lines.append(f"{'sum, planned':<20} {result.planned_memory_gib:>8.2f}")
    if result.compiled_memory_gib:
        lines.append(f"{'compiled program':<20} {result.compiled_memory_gib:>8.2f}")
    if result.peak_memory_gib:
        share = result.planned_memory_gib / result.peak_memory_gib
        lines.append(f"{'measured peak':<20} {result.peak_memory_gib:>8.2f}   the plan is {share:.1%} of it")
    return "\n".join(lines)


def _print_table(facts: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: square brackets of a name are no markup.
    title = Text(f"{facts['preset']} on {facts['devices']} x {facts['device']}", "table.title")
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in facts.items():
        if name not in ("preset", "device", "devices", "where", "operations", "memory_gib", "average"):
            table.add_row(name.replace("_", " "), Text(_text(value)))
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "not known"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, int | float)
        else str(value)
    )
