"""One table of measurements that every room's ``bench.py`` prints as it goes, and keeps as JSON."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.testing import median_microseconds, sustained_microseconds


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with what all benches share: ``--json FILE`` and ``--quick``."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="write all results there, again after every measurement")
    made.add_argument("--quick", action="store_true", help="fewer configurations")
    return made


class Rows:
    """Results that are printed and written one at a time; a failure is a result too, and time may run out."""

    def __init__(self, json_path: Path | None, seconds: float = math.inf) -> None:
        self.json_path, self.end = json_path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.end

    def keep(self, row: dict[str, Any], line: str) -> None:
        """Prints a result's line and writes all results."""
        self.rows.append(row)
        print(line, flush=True)
        if self.json_path is not None:
            self.json_path.write_text(json.dumps(self.rows, indent=1))

    def guard(self, name: str, run: Callable[[], None]) -> None:
        """Runs ``run``, prints why where it fails, leaves it out where the time is over."""
        if self.over:
            print(f"{name}: left out, the time is over", flush=True)
            return
        try:
            run()
        except Exception as error:  # memory that does not suffice for one shape must not end the bench
            print(f"{name} failed: {failure(error)}", flush=True)


def failure(error: Exception) -> str:
    """The first line of an error, not too long."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class Table(Rows):
    """Measures functions.

    *Burst* (the main column) is the median device time of ``repeats`` calls after a rest; *sustained* is the mean over
    ``load_seconds`` of calls back to back, where a power limit shows.
    """

    repeats, rest_seconds, load_seconds = 10, 0.2, 0.5
    error_name = "error"
    """How the error is called."""

    def measure(
        self,
        case: str,
        operation: str,
        implementation: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        flops: int = 0,
        moved_bytes: int = 0,
        expected: Any = None,
        sustained: bool = False,
        against: float | None = None,
    ) -> float | None:
        """Times ``function(*arguments)``, prints a line and returns its microseconds, None where it failed.

        Args:
            case: name of the shapes.
            operation: what is computed.
            implementation: what computes it.
            function: compiled with ``jax.jit`` here.
            arguments: its inputs.
            flops: useful operations of a call, for TFLOP/s; 0 leaves the column out.
            moved_bytes: bytes that must be read and written, for GB/s; 0 leaves the column out.
            expected: what a call returns; :meth:`error` against it is printed.
            sustained: whether to measure under load too.
            against: microseconds of a baseline, for the ratio to it.
        """
        if self.over:
            return None
        row: dict[str, Any] = {"case": case, "operation": operation, "implementation": implementation}
        try:
            compiled = jax.jit(function)
            if expected is not None:
                row[self.error_name] = self.error(compiled(*arguments), expected)
            time.sleep(self.rest_seconds)
            row["us"] = median_microseconds(compiled, *arguments, repeats=self.repeats)
            if sustained:
                row["sustained_us"] = sustained_microseconds(compiled, *arguments, seconds=self.load_seconds)
            for prefix in ("", "sustained_") if sustained else ("",):
                microseconds = row[f"{prefix}us"]
                row[f"{prefix}tflops"] = flops / microseconds / 1e6
                row[f"{prefix}gbs"] = moved_bytes / microseconds / 1e3
            if against is not None:
                row["times_as_fast"] = against / row["us"]
            row |= self.more(row)
        except Exception as error:  # a configuration that cannot run must not end the bench
            row["failed"] = failure(error)
        self.keep(row, self.line(row))
        return row.get("us")

    def error(self, got: Any, expected: Any) -> float:
        """How far ``got`` is from ``expected``: relative L2."""
        return float(_relative_l2(got, expected))

    def more(self, row: dict[str, Any]) -> dict[str, Any]:
        """Further entries of a row."""
        del row
        return {}

    def line(self, row: dict[str, Any]) -> str:
        """What is printed of a row."""
        line = f"{row['case']:<14} {row['operation']:<19} {row['implementation']:<26}"
        if "failed" in row:
            return f"{line} failed: {row['failed']}"
        for prefix, word in (("", ""), ("sustained_", "  sustained")):
            if f"{prefix}us" in row:
                line += f"{word} {row[f'{prefix}us']:9.1f} us"
                line += f" {row[f'{prefix}tflops']:5.0f} TFLOP/s" if row[f"{prefix}tflops"] else ""
                line += f" {row[f'{prefix}gbs']:5.0f} GB/s" if row[f"{prefix}gbs"] else ""
        line += f" {100 * row['of_copy']:4.0f}% of copy" if "of_copy" in row else ""
        line += f"  {row['times_as_fast']:.2f}x" if "times_as_fast" in row else ""
        return line + (f"  {self.error_name} {row[self.error_name]:.1e}" if self.error_name in row else "")


@jax.jit
def _relative_l2(got: Array, expected: Array) -> Array:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel())
