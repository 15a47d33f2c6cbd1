"""What a person sees of a run: two live lines on a terminal, plain lines at log points elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsv3_jax.config import Config
from dsv3_jax.planning.devices import peak_flops
from dsv3_jax.planning.flops import flops_per_token


class RunProgress:
    """Shows a run's steps. Use as a context manager.

    Args:
        console: where to; a terminal gets two lines that renew themselves, anything else plain lines.
        config: the run's.
        total_steps: where it ends.
        done_steps: where it begins.
    """

    def __init__(self, console: Console, config: Config, total_steps: int, done_steps: int):
        self.console = console
        self._total, self._done = total_steps, done_steps
        self._flops = flops_per_token(config.model, config.train.seq_len, mtp=True)
        self._peak = _peak_of_all(config)
        self._val: float | None = None
        self._skipped = 0
        self._seconds_left: float | None = None
        self._line = ""
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "RunProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _picture(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        left = "" if self._seconds_left is None else f"{_duration(self._seconds_left)} left"
        bar.add_row(ProgressBar(self._total, self._done, width=40), f"{self._done}/{self._total}", left)
        return Group(bar, Text(self._line, no_wrap=True, overflow="ellipsis"))

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(Text(line), soft_wrap=True)

    def status(self, line: str) -> None:
        """What is going on now, such as compilation: on a terminal until the next step shows, else a line."""
        self._line = line
        if self._live is None:
            self.say(line)

    def validation(self, step: int, val_bpb: float) -> None:
        """A validation result."""
        self._val = val_bpb
        if self._live is not None:
            self.say(f"step {step}: validation {val_bpb:.4f} bits per byte")

    def update(self, records: list[dict[str, Any]]) -> None:
        """The steps read at a log point; shows the newest."""
        if not records:
            return
        last = records[-1]
        self._skipped += sum(record["skipped"] for record in records)
        if last["tokens_per_second"] and len(records) > 1:
            tokens_per_step = (last["tokens"] - records[0]["tokens"]) / (len(records) - 1)
            self._seconds_left = (self._total - last["step"]) * tokens_per_step / last["tokens_per_second"]
        self._done, self._line = last["step"], self.describe(last)
        if self._live is None:
            left = "" if self._seconds_left is None else f"  {_duration(self._seconds_left)} left"
            self.say(f"step {self._done}/{self._total}  {self._line}{left}")

    def describe(self, record: Mapping[str, Any]) -> str:
        """One step in a line: what is not measured or not known is left out."""
        parts = [f"loss {_number(record['loss'], '.4f')}", f"lr {record['lr']:.2e}"]
        speed = record["tokens_per_second"]
        if speed:
            parts.append(f"{_short(speed)} tokens/s")
            if self._peak:
                parts.append(f"MFU {100 * speed * self._flops / self._peak:.1f}%")
        if record.get("max_vio") is not None:
            parts.append(f"MaxVio {record['max_vio']:.2f}")
        if self._val is not None:
            parts.append(f"val {self._val:.3f} bpb")
        if self._skipped:
            parts.append(f"skipped {self._skipped}")
        return "  ".join(parts)


def _peak_of_all(config: Config) -> float | None:
    """FLOP/s of all devices of the run together at BF16, where they are known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    mesh = config.mesh
    return peak * mesh.devices if peak else None


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _short(value: float) -> str:
    """Three digits and a unit: 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """``42 s``, ``3:05``, ``2:03:04`` or ``5 d 02 h``."""
    total = max(0, math.ceil(seconds))
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days} d {hours % 24:02d} h"
    if hours:
        return f"{hours}:{minutes % 60:02d}:{total % 60:02d}"
    return f"{minutes}:{total % 60:02d}" if minutes else f"{total} s"
