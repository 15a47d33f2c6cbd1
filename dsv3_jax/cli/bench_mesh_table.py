"""The table of ``dsv3 bench mesh``."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv3_jax.train.mesh_report import Figures

_COLUMNS = (
    "row",
    "mesh",
    "batch",
    "step ms",
    "tokens/s",
    "a device",
    "of one",
    "of share",
    "of stages",
    "losses",
    "bubble",
    "in ticks",
    "ideal",
    "comm. ms",
    "exposed",
    "peak GiB",
)
LEGEND = (
    "batch: sequences a step x those of a micro-batch. Of one: tokens/s a device over one device that takes the whole "
    "batch; of share: over one that takes a device's share; of stages: over one that runs the stages' program. "
    "Losses: largest relative difference of the first three from one device's. Bubble: share of the passes' time that "
    "devices wait, seen in a profile, or (~) what the step takes beyond one device's passes; in ticks and ideal: the "
    "simulator's, with one device's passes as costs. Comm.: of the first device, and of it what nothing else hides."
)


def print_table(title: str, lines: Sequence[Figures], refused: Mapping[str, str], tolerance: float = 0.0) -> None:
    """The lines, why the others are not there, and what the columns are."""
    table = Table(title=Text(title, "table.title"), title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("row", "mesh", "losses") else "right", overflow="fold")
    for line in lines:
        table.add_row(*cells(line), style="red" if line.differs else None)
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(LEGEND + (f" They may differ by {tolerance:g}." if tolerance else ""))
    for line in lines:
        if line.failed:
            say(f"{line.name}: {line.failed}")
    for name, reason in refused.items():
        say(f"{name} cannot be: {reason}")


def cells(line: Figures) -> tuple[str, ...]:
    """One row of the table; of one without figures, the reason stands in their place."""
    if line.step_ms is None:
        return line.name, line.what, *("",) * 7, "failed", *("",) * 6

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    differ = "" if line.loss_error is None else f"{line.loss_error:.1e}"
    bubble = number(line.bubble, ".1%")
    return (
        line.name,
        line.what,
        f"{line.sequences} x {line.micro_batch}",
        number(line.step_ms, ",.1f"),
        number(line.tokens_per_second, ",.0f"),
        number(line.tokens_per_second_per_device, ",.0f"),
        number(line.of_one, ".1%"),
        number(line.of_share, ".1%"),
        number(line.of_stages, ".1%"),
        f"DIFFER {differ}" if line.differs else differ,
        f"~{bubble}" if bubble and line.bubble_from == "times" else bubble,
        number(line.predicted_bubble, ".1%"),
        number(line.ideal_bubble, ".1%"),
        number(line.communication_ms, ",.1f"),
        number(line.exposed_ms, ",.1f"),
        number(line.peak_memory_gib, ",.1f"),
    )
