"""The bench of operations bound by memory: against a plain copy of as many bytes, bit by bit, within a time limit."""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_table


def parser(doc: str | None, case_names: list[str]) -> argparse.ArgumentParser:
    """The command line of these benches."""
    made = bench_table.parser(doc)
    made.add_argument("--case", nargs="+", choices=case_names, help="only these shapes")
    made.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after so many seconds")
    made.add_argument("--tune", action="store_true", help="try all configurations")
    return made


class MemoryBench(bench_table.Table):
    """A table whose error is the share of elements with other bits, and whose bytes are compared with a copy's."""

    rest_seconds, load_seconds = 0.0, 0.2
    error_name = "differs"

    def __init__(self, json_path: Path | None, seconds: float = float("inf")) -> None:
        super().__init__(json_path, seconds)
        self.copy_gbs: float | None = None

    def copy(self, case: str, moved_bytes: int) -> None:
        """Measures ``x + 1`` by XLA that moves as many bytes; the rows that follow are compared with it."""
        x = jax.random.normal(jax.random.key(0), (moved_bytes // 4,), jnp.bfloat16)
        self.copy_gbs = None
        us = self.measure(case, "copy", "xla", lambda x: x + jnp.bfloat16(1), (x,), moved_bytes=4 * x.size)
        self.copy_gbs = 4 * x.size / us / 1e3 if us else None

    def error(self, got: Any, expected: Any) -> float:
        """The share of elements whose bits differ."""
        differing = total = 0
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            differing += int(_count_differing(a, b))
            total += a.size
        return differing / total

    def more(self, row: dict[str, Any]) -> dict[str, Any]:
        """``of_copy``: GB/s over the copy's."""
        return {"of_copy": row["gbs"] / self.copy_gbs} if self.copy_gbs else {}


@jax.jit
def _count_differing(a: jax.Array, b: jax.Array) -> jax.Array:
    kind = np.dtype(f"uint{8 * a.dtype.itemsize}")
    return jnp.sum(jax.lax.bitcast_convert_type(a, kind) != jax.lax.bitcast_convert_type(b, kind))
