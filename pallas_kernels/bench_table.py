"""One table of measurements that every room's ``bench.py`` prints as it goes, and keeps as JSON."""

import argparse
import json
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


class Table:
    """Measures, prints and collects one result at a time; a failure is a result too.

    *Burst* (the main column) is the median device time of ``repeats`` calls after a rest; *sustained* is the mean over
    half a second of calls back to back, where a power limit shows.
    """

    def __init__(self, json_path: Path | None, *, repeats: int = 10) -> None:
        self.json_path, self.repeats = json_path, repeats
        self.rows: list[dict[str, Any]] = []
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

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
        expected: Array | None = None,
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
            expected: what a call returns; its relative L2 error is printed.
            sustained: whether to measure under load too.
            against: microseconds of a baseline, for the ratio to it.
        """
        row: dict[str, Any] = {"case": case, "operation": operation, "implementation": implementation}
        try:
            compiled = jax.jit(function)
            if expected is not None:
                row["error"] = float(_relative_l2(compiled(*arguments), expected))
            time.sleep(0.2)
            row["us"] = median_microseconds(compiled, *arguments, repeats=self.repeats)
            if sustained:
                row["sustained_us"] = sustained_microseconds(compiled, *arguments)
            for prefix in ("", "sustained_") if sustained else ("",):
                microseconds = row[f"{prefix}us"]
                row[f"{prefix}tflops"] = flops / microseconds / 1e6
                row[f"{prefix}gbs"] = moved_bytes / microseconds / 1e3
            if against is not None:
                row["times_as_fast"] = against / row["us"]
        except Exception as error:  # a configuration that cannot run must not end the bench
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.rows.append(row)
        print(_line(row), flush=True)
        if self.json_path is not None:
            self.json_path.write_text(json.dumps(self.rows, indent=1))
        return row.get("us")


@jax.jit
def _relative_l2(got: Array, expected: Array) -> Array:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def _line(row: dict[str, Any]) -> str:
    line = f"{row['case']:<16} {row['operation']:<9} {row['implementation']:<34}"
    if "failed" in row:
        return f"{line} failed: {row['failed']}"
    for prefix, word in (("", ""), ("sustained_", "  sustained")):
        if f"{prefix}us" in row:
            line += f"{word} {row[f'{prefix}us']:9.1f} us"
            line += f" {row[f'{prefix}tflops']:5.0f} TFLOP/s" if row[f"{prefix}tflops"] else ""
            line += f" {row[f'{prefix}gbs']:5.0f} GB/s" if row[f"{prefix}gbs"] else ""
    line += f"  {row['times_as_fast']:.2f}x" if "times_as_fast" in row else ""
    return line + (f"  error {row['error']:.1e}" if "error" in row else "")
