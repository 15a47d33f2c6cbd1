"""The bench of operations bound by memory: against a plain copy of as many bytes, within a time limit."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_table
from pallas_kernels.testing import median_microseconds, sustained_microseconds


def parser(doc: str | None, case_names: list[str]) -> argparse.ArgumentParser:
    """The command line of these benches."""
    made = bench_table.parser(doc)
    made.add_argument("--case", nargs="+", choices=case_names, help="only these shapes")
    made.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after so many seconds")
    made.add_argument("--tune", action="store_true", help="try all configurations")
    return made


class MemoryBench:
    """Measures, prints and keeps one result at a time; a failure is a result too."""

    def __init__(self, json_path: Path | None, seconds: float = float("inf")) -> None:
        self.json_path, self.end = json_path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.copy_gbs = float("nan")
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    def copy(self, case: str, moved_bytes: int) -> None:
        """Measures ``x + 1`` by XLA that moves as many bytes; the rows that follow are compared with it."""
        x = jnp.zeros(moved_bytes // 4, jnp.bfloat16)
        self.copy_gbs = float("nan")
        us = self.measure(case, "copy", "xla", lambda x: x + jnp.bfloat16(1), (x,), moved_bytes=4 * x.size)
        self.copy_gbs = 4 * x.size / us / 1e3 if us else float("nan")

    def guard(self, name: str, run: Callable[[], None]) -> None:
        """Runs ``run``, prints why where it fails, leaves it out where the time is over."""
        if time.monotonic() > self.end:
            print(f"{name}: left out, the time is over", flush=True)
            return
        try:
            run()
        except Exception as error:  # memory that does not suffice for one shape must not end the bench
            print(f"{name} failed: {type(error).__name__}: {error}"[:500], flush=True)

    def measure(
        self,
        case: str,
        operation: str,
        implementation: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        moved_bytes: int,
        expected: Any = None,
        against: float | None = None,
        sustained: bool = False,
    ) -> float | None:
        """Times ``function(*arguments)``, prints a line and returns its microseconds, None where it failed.

        Args:
            case: name of the shapes.
            operation: what is computed.
            implementation: what computes it.
            function: compiled with ``jax.jit`` here.
            arguments: its inputs.
            moved_bytes: bytes that must be read and written.
            expected: what a call returns; the share of bytes that differ is printed.
            against: microseconds of a baseline, for the ratio to it.
            sustained: whether to measure calls back to back for a fifth of a second too.
        """
        if time.monotonic() > self.end:
            return None
        row: dict[str, Any] = {"case": case, "operation": operation, "implementation": implementation}
        try:
            compiled = jax.jit(function)
            if expected is not None:
                row["differs"] = _differing_share(compiled(*arguments), expected)
            row["us"] = median_microseconds(compiled, *arguments, repeats=10)
            row["gbs"] = moved_bytes / row["us"] / 1e3
            row["of_copy"] = row["gbs"] / self.copy_gbs
            if sustained:
                row["sustained_us"] = sustained_microseconds(compiled, *arguments, seconds=0.2)
            if against is not None:
                row["times_as_fast"] = against / row["us"]
        except Exception as error:  # a configuration that cannot run must not end the bench
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.rows.append(row)
        print(_line(row), flush=True)
        if self.json_path is not None:
            self.json_path.write_text(json.dumps(self.rows, indent=1))
        return row.get("us")


def _differing_share(got: Any, expected: Any) -> float:
    """The share of elements whose bits differ."""
    differing = total = 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        differing += int(_count_differing(a, b))
        total += a.size
    return differing / total


@jax.jit
def _count_differing(a: jax.Array, b: jax.Array) -> jax.Array:
    kind = np.dtype(f"uint{8 * a.dtype.itemsize}")
    return jnp.sum(jax.lax.bitcast_convert_type(a, kind) != jax.lax.bitcast_convert_type(b, kind))


def _line(row: dict[str, Any]) -> str:
    line = f"{row['case']:<14} {row['operation']:<19} {row['implementation']:<14}"
    if "failed" in row:
        return f"{line} failed: {row['failed']}"
    line += f" {row['us']:9.1f} us {row['gbs']:5.0f} GB/s"
    line += f" {100 * row['of_copy']:4.0f}% of copy" if math.isfinite(row["of_copy"]) else ""
    line += f"  sustained {row['sustained_us']:9.1f} us" if "sustained_us" in row else ""
    line += f"  {row['times_as_fast']:.2f}x" if "times_as_fast" in row else ""
    return line + (f"  differs {row['differs']:.1e}" if "differs" in row else "")
