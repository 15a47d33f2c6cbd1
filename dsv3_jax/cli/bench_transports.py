"""``dsv3 bench transports``: how fast tokens get to their experts and back, by every transport."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.cli.overrides import check_writable, parse_options
from dsv3_jax.config import ConfigError
from sharding.flags import apply_gpu_flags


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 bench transports``."""

    gpus: int = 0
    """Devices, N; 0 takes all that this machine has."""
    only: str = ""
    """Transports, comma-separated; empty for all: padded, counted, ring, two_hop."""
    tokens: int = 4096
    """Of each device."""
    hidden: int = 7168
    """Values of a token."""
    experts: int = 256
    """Of all devices."""
    choices: int = 8
    """Experts of a token."""
    fp8: bool = True
    """Send tokens to their experts in FP8; they come back in bfloat16."""
    capacity: float = 2.0
    """Room of counted and two_hop over the balanced load."""
    node_size: int = 0
    """Devices that two_hop takes for a node; 0 is half of them below 16."""
    seconds: float = 120.0
    """Time after which no transport is begun."""
    each: float = 0.3
    """Seconds of calls for each time that is measured."""
    json: str = ""
    """File that all rows are written to after each."""


def run(argv: Sequence[str]) -> int:
    """Measure; 1 where a transport could not run."""
    description = (
        "Time dispatch and combine of every expert transport on DeepSeek-V3's shapes, in GB/s as DeepEP counts them, "
        "beside what DeepEP published and what NVLink can carry."
    )
    options = parse_options("dsv3 bench transports", argv, description, Options)
    for name in ("tokens", "hidden", "experts", "choices", "seconds", "each", "capacity"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name} = {getattr(options, name)} must be above 0")
    for name in ("gpus", "node_size"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} = {getattr(options, name)} must not be negative")
    if options.choices > options.experts:
        raise ConfigError(f"--choices = {options.choices} must be at most --experts = {options.experts}")
    check_writable("--json", options.json)
    apply_gpu_flags(os.environ, options.gpus or 2)
    import jax

    from sharding.expert_parallel import TRANSPORTS, Transport
    from sharding.expert_parallel.bench import Shapes, bench

    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(TRANSPORTS)
    if unknown := [name for name in names if name not in TRANSPORTS]:
        raise ConfigError(f"--only names {unknown[0]!r}; the transports are {', '.join(TRANSPORTS)}")
    there = jax.devices()
    devices = options.gpus or len(there)
    if devices > len(there):
        raise ConfigError(f"--gpus = {devices}: this machine has {len(there)} ({there[0].device_kind})")
    if devices < 2:
        raise ConfigError(f"--gpus = {devices}: experts on one device are sent nowhere, give 2 or more")
    if options.experts % devices:
        raise ConfigError(f"--experts = {options.experts} must be a multiple of the {devices} devices")
    possible: list[Transport] = [name for name in TRANSPORTS if name in names and (name != "two_hop" or devices >= 4)]
    if not possible:
        raise ConfigError(f"two_hop needs 4 devices or more, not {devices}")
    shapes = Shapes(options.tokens, options.hidden, options.experts, options.choices, options.fp8)
    rows = bench(
        shapes,
        devices,
        possible,
        json_path=Path(options.json) if options.json else None,
        limit=options.seconds,
        capacity=options.capacity,
        node_size=options.node_size,
        seconds=options.each,
    )
    _print_table(rows, shapes, there[0].device_kind)
    if len(possible) < len(names):
        print(f"two_hop needs 4 devices or more, not {devices}")
    return 0 if len(rows) == len(possible) else 1


def _print_table(rows: Sequence[dict[str, Any]], shapes: Any, kind: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from sharding.expert_parallel.bench import DEEPEP, nvlink

    way = "FP8" if shapes.fp8 else "bfloat16"
    title = (
        f"{rows[0]['ranks'] if rows else ''} x {kind}: {shapes.tokens} tokens x {shapes.hidden}, {shapes.choices} of "
        f"{shapes.experts} experts, {way} there, bfloat16 back"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("transport")
    for name in DEEPEP:
        for heading in (f"{name} us", "GB/s", "of DeepEP's", "wire GB/s", "of NVLink"):
            table.add_column(heading, justify="right", overflow="fold")
    for heading in ("exchanges us", "there and back us"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        cells = [row["transport"]]
        for name in DEEPEP:
            share = row[f"{name}_of_nvlink"]
            cells += [f"{row[f'{name}_us']:,.1f}", f"{row[f'{name}_gbs']:,.4g}", f"{row[f'{name}_of_deepep']:.2f}"]
            cells += [f"{row[f'{name}_wire_gbs']:,.4g}", "" if share is None else f"{share:.0%}"]
        alone = [row[f"{name}_us"] for name in ("exchange_there", "exchange_back") if f"{name}_us" in row]
        cells += [" + ".join(f"{one:,.0f}" for one in alone), f"{row['round_trip_us']:,.1f}"]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    limit = nvlink(kind)
    print(
        "GB/s: bytes of the rows that a rank receives, its own among them, over the time, as DeepEP counts its "
        f"intranode {DEEPEP['dispatch']:g} and {DEEPEP['combine']:g} GB/s (eight H800). Wire: what leaves a rank, "
        "empty slots included"
        + (f"; NVLink carries {limit:g} GB/s in one direction by the data sheet." if limit else ".")
    )
