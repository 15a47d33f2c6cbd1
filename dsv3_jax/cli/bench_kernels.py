"""``dsv3 bench kernels``: every kernel room's bench in a process of its own, and one table of what they wrote."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.cli.overrides import check_writable, parse_options
from dsv3_jax.config import ConfigError

ROOMS = (
    "quantize",
    "norm_quantize",
    "swiglu_quantize",
    "fp8_gemm",
    "grouped_fp8_gemm",
    "grouped_gemm",
    "attention",
    "paged_attention",
    "permute",
)


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 bench kernels``."""

    only: str = ""
    """Rooms to bench, separated by commas; empty for all: quantize, norm_quantize, swiglu_quantize, fp8_gemm,
    grouped_fp8_gemm, grouped_gemm, attention, paged_attention, permute."""
    seconds: float = 90.0
    """Time limit of each room; one that runs longer is stopped, and what it measured until then is kept."""
    quick: bool = False
    """Fewer shapes or configurations."""
    json: str = ""
    """File that all rows are written to."""


def run(argv: Sequence[str]) -> int:
    """Benches the rooms that are asked for; the exit status."""
    description = "Every kernel room's bench in a process of its own, and one table of what they wrote."
    options = parse_options("dsv3 bench kernels", argv, description, Options)
    rooms = tuple(part.strip() for part in options.only.split(",")) if options.only else ROOMS
    if unknown := [room for room in rooms if room not in ROOMS]:
        raise ConfigError(f"--only names {unknown[0]!r}; the rooms are {', '.join(ROOMS)}")
    if not 0 < options.seconds < math.inf:
        raise ConfigError(f"--seconds = {options.seconds:g} must be a finite number above 0")
    check_writable("--json", options.json)
    if (obstacle := _obstacle()) is not None:
        raise ConfigError(f"dsv3 bench kernels needs an NVIDIA Hopper GPU: {obstacle}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for room in rooms:
            rows += _bench(room, options, Path(folder) / f"{room}.json")
            if options.json:
                Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    _print_table(rows)
    return 0 if {row["room"] for row in rows if "failed" not in row} == set(rooms) else 1


def _obstacle() -> str | None:
    """What keeps the kernels from running here; asked in another process, which leaves the GPU's memory free."""
    program = "from pallas_kernels import dispatch; print(dispatch.hopper_obstacle() or '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["JAX cannot start"])[-1]
    return done.stdout.strip() or None


def _bench(room: str, options: Options, file: Path) -> list[dict[str, Any]]:
    """One room's rows; what the bench prints goes to standard error as it comes."""
    command = [sys.executable, "-m", f"pallas_kernels.{room}.bench", "--json", str(file)]
    if options.quick:
        command.append("--quick")
    print(f"== {room}", file=sys.stderr, flush=True)
    why = "wrote no rows"
    try:
        done = subprocess.run(command, stdout=sys.stderr, timeout=options.seconds, check=False)
        if done.returncode:
            why = f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"stopped after {options.seconds:.0f} s"
        print(f"== {room} {why}", file=sys.stderr, flush=True)
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [{"case": "", "failed": why}]
    return [{"room": room, **row} for row in rows]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: the rooms name their errors and ratios by what they compare."""
    what = " ".join(str(row[key]) for key in ("operation", "implementation", "tiling") if key in row)
    if "failed" in row:
        return row["room"], row.get("case", ""), what, f"failed: {row['failed']}", *("",) * 6
    error = next((row[key] for key in ("calc_diff", "error", "differs") if key in row), None)
    ratio = row.get("sustained_to_xla") or row.get("times_as_fast")

    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) else ""

    return (
        row["room"],
        row["case"],
        what,
        number("us", ",.1f"),
        number("tflops", ",.0f"),
        number("gbs", ",.0f"),
        number("sustained_us", ",.1f"),
        number("sustained_tflops", ",.0f"),
        "" if error is None else f"{error:.1e}",
        "" if ratio is None else f"{ratio:.2f}",
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="times: burst, and under load (sustained)", title_justify="left")
    for name in ("room", "shape", "what"):
        table.add_column(name, overflow="fold")
    for name in ("us", "TFLOP/s", "GB/s", "sustained us", "sustained TFLOP/s", "error", "times XLA's speed"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, cells(row)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
