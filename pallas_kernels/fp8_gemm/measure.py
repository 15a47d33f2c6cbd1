"""What the benches of the FP8 products share: tilings compiled at once, checked, timed in a burst and under load."""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.fp8_gemm import tiles, timing
from pallas_kernels.fp8_gemm.product_sm90 import Tiling
from pallas_kernels.fp8_gemm.timing import Operands

_FEWEST_MICROSECONDS = 400
_QUICK_COMPILE: dict[str, Any] = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass
class Work:
    """One case for the bench.

    Attributes:
        name: of the case.
        flops: useful operations of a call.
        moved_bytes: bytes that a call must move.
        make: seed -> random operands, made on the device.
        into: makes the array that a call adds to, or None.
        kernel: (tiling, operands, into) -> result.
        reference: operands -> the float32 result, by the portable implementation.
        peer_us: DeepGEMM, sustained.
        peer_burst_us: DeepGEMM, kernel time with a cold L2.
        dense: rows, columns and contraction of one bfloat16 product of the size, for XLA's time.
        default: the tiling that the operation takes.
        tiled: groups, rows and columns that are cut into tiles.
        table: the tilings to choose from, the first of cost 1; None where the choice does not go by cost.
        column_scales: whether the kernel is the one with two scale vectors.
    """

    name: str
    flops: int
    moved_bytes: int
    make: Callable[[Array], Operands]
    into: Callable[[], Array] | None
    kernel: Callable[[Tiling, Operands, Array | None], Array]
    reference: Callable[..., Array]
    peer_us: float | None
    peer_burst_us: float | None
    dense: tuple[int, int, int]
    default: Tiling
    tiled: tuple[int, int, int]
    table: tiles.Table | None = None
    column_scales: bool = False

    @property
    def floor_us(self) -> float:
        """The least that a call can take, microseconds, at 1.4 PFLOP/s and 4.2 TB/s."""
        return max(self.flops / 1.4e9, self.moved_bytes / 4.2e6)

    def kernel_of(self, tiling: Tiling) -> Callable[[Operands, Array | None], Array]:
        """The kernel with a tiling."""
        return functools.partial(self.kernel, tiling)


def parser(doc: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a bench over the named cases."""
    made = bench_table.parser(doc)
    made.add_argument("--case", nargs="+", help=f"only cases whose name holds one of these; all: {', '.join(names)}")
    made.add_argument("--sweep", action="store_true", help="try other tilings too")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    made.add_argument("--passes", type=int, default=1, help="measure under load so often in turns, take the median")
    made.add_argument("--fence", action="store_true", help="also the default with its fence (see Tiling) the other way")
    made.add_argument("--no-xla", action="store_true", help="leave out XLA's bfloat16 product")
    return made


class Bench(bench_table.Rows):
    """Measures works: a row for each tiling. Not a ``Table``: the tilings of a case are compiled together, and take
    turns under a load that leaves no gap between kernels."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.json, options.seconds)
        self.options = options

    def chosen(self, name: str) -> bool:
        """Whether the options ask for the case (``--quick``: one an operation) and there is time left to begin it."""
        done = {row["case"].split("/")[0] for row in self.rows} if self.options.quick else set()
        wanted = not self.options.case or any(part in name for part in self.options.case)
        return wanted and not self.over and name.split("/")[0] not in done

    def run(self, work: Work, others: Sequence[Tiling]) -> None:
        """The case with its default tiling and what the options ask for besides."""
        tilings = [work.default]
        if self.options.fence:
            tilings.append(dataclasses.replace(work.default, fenced=not work.default.fenced))
        if self.options.sweep:
            tilings += [tiling for tiling in others if tiling not in tilings]
        try:
            self._run(work, tilings)
        except Exception as error:  # what does not fit must not end the bench
            row = {"case": work.name, "tiling": "all", "failed": bench_table.failure(error)}
            self.keep(row, _line(row))

    def _run(self, work: Work, tilings: Sequence[Tiling]) -> None:
        keys = jax.random.split(jax.random.key(0), 64)
        make = jax.jit(work.make)
        first = make(keys[0])
        expected = jax.jit(work.reference, compiler_options=_QUICK_COMPILE)(*first)
        if work.into is not None:
            expected = expected + work.into()
        xla_us = None if self.options.no_xla else timing.dense_microseconds(*work.dense)
        count = max(
            math.ceil(timing.ROTATED_BYTES / sum(x.nbytes for x in first)),
            min(48, math.ceil(_FEWEST_MICROSECONDS / work.floor_us)),
        )
        sets = [first] + [make(key) for key in keys[1:count]]
        built, reports = _build_all(work, tilings, sets)
        rows: list[dict[str, Any]] = []
        for tiling, (once, looped, failure) in zip(tilings, built, strict=True):
            name = tiling.name(work.column_scales)
            row: dict[str, Any] = {"case": work.name, "tiling": name, "default": tiling == work.default}
            if work.table is not None:
                row["cost_one"] = work.table[0][0].name(work.column_scales)
            rows.append(row)
            if failure:
                row["failed"] = failure
                continue
            try:
                intos = None if work.into is None else [work.into() for _ in sets]
                row["us"], outs = timing.burst(once, sets, intos, "fp8")
                row["calc_diff"] = device_calc_diff(outs[0], expected)
                row["spilled_bytes"] = reports.get(name)
                row["copies"] = len(re.findall(r"= (?:bf16|f32|f8\w+)\[[\d,]{5,}\]\S* copy\(", looped[0].as_text()))
                del outs, intos
            except Exception as error:
                row["failed"] = bench_table.failure(error)
        self._sustain(work, rows, built, sets)
        for tiling, row in zip(tilings, rows, strict=True):
            if "failed" not in row:
                row["cost"] = row["sustained_us"] / tiles.tile_columns(tiling, *work.tiled)
                for prefix, peer in (("", work.peer_burst_us), ("sustained_", work.peer_us)):
                    row[f"{prefix}tflops"] = work.flops / row[f"{prefix}us"] / 1e6
                    row[f"{prefix}gbs"] = work.moved_bytes / row[f"{prefix}us"] / 1e3
                    row[f"{prefix}to_peer"] = peer / row[f"{prefix}us"] if peer else None
                row["sustained_to_xla"] = xla_us / row["sustained_us"] if xla_us else None
            self.keep(row, _line(row))

    def finish(self) -> None:
        """Prints what the rows say of the table in ``tiles.py``, and of the fence."""
        measured = [row for row in self.rows if "failed" not in row]
        sustained = {(row["case"], row["tiling"]): row["sustained_us"] for row in measured}
        for line in [*_costs(measured), *_fence(measured, sustained)]:
            print(line, flush=True)

    def _sustain(self, work: Work, rows: list[dict[str, Any]], built: list[Any], sets: list[Operands]) -> None:
        """Adds the median of ``--passes`` passes, in each of which the tilings take turns: a card's clock drifts."""
        seconds: list[list[float]] = [[] for _ in rows]
        outs = _zeros(work, sets)
        for _ in range(self.options.passes):
            for row, times, (_, looped, _) in zip(rows, seconds, built, strict=True):
                if "failed" not in row:
                    us, outs = timing.sustained(looped, sets, outs)
                    times.append(us)
        for row, times in zip(rows, seconds, strict=True):
            if times:
                row["sustained_us"], row["passes"] = float(np.median(times)), times


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    """Lines: each operation's tilings and their cost, the mean over shapes of that against the table's first."""
    of_case = {(row["case"], row["tiling"]): row["cost"] for row in rows}
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if (first := of_case.get((row["case"], row.get("cost_one", "")))) is not None:
            found.setdefault((row["case"].split("/")[0], row["tiling"]), []).append(row["cost"] / first)
    return [
        f"cost {operation:<12} {tiling:<28} {np.exp(np.mean(np.log(costs))):.3f} over {len(costs)} shapes"
        for (operation, tiling), costs in found.items()
    ]


def _fence(rows: list[dict[str, Any]], sustained: dict[tuple[str, str], float]) -> list[str]:
    """Lines: the sustained time with the fence over that without, where both were measured."""
    pairs = [(row, sustained.get((row["case"], row["tiling"] + "f"))) for row in rows]
    return [
        f"fence {row['case']:<28} {row['tiling']:<26} costs {100 * (us / row['sustained_us'] - 1):+.1f}%"
        for row, us in pairs
        if us is not None
    ]


def _zeros(work: Work, sets: list[Operands]) -> list[Array]:
    out = jax.eval_shape(
        work.kernel_of(work.default), sets[0], None if work.into is None else jax.eval_shape(work.into)
    )
    return [jnp.zeros(out.shape, out.dtype) for _ in sets]


def _build_all(work: Work, tilings: Sequence[Tiling], sets: list[Operands]) -> tuple[list[Any], dict[str, int]]:
    """Every tiling's function over all sets, once and looped, or why it failed; and ptxas's spills by kernel name."""
    adding = work.into is not None
    intos_type = None if work.into is None else [jax.eval_shape(work.into)] * len(sets)

    def build(tiling: Tiling) -> tuple[Any, Any, str]:
        call = work.kernel_of(tiling)
        one = jax.jit(call)

        def over_all(sets: list[Operands], intos: list[Array] | None) -> list[Array]:
            return [one(operands, None if intos is None else intos[i]) for i, operands in enumerate(sets)]

        try:
            once = jax.jit(over_all).lower(sets, intos_type).compile()
            outs = [jax.eval_shape(call, sets[0], None if intos_type is None else intos_type[0])] * len(sets)
            return once, timing.loop(call, sets, outs, adding, work.floor_us), ""
        except Exception as error:
            return None, None, bench_table.failure(error)

    with _CapturedOutput() as captured, concurrent.futures.ThreadPoolExecutor(8) as pool:
        built = list(pool.map(build, tilings))
        for once, _, _ in built:  # some of the compilation waits for the first call
            if once is not None:
                jax.block_until_ready(once(sets, None if work.into is None else [work.into() for _ in sets]))
    return built, spilled_bytes(captured.text)


def spilled_bytes(report: str) -> dict[str, int]:
    """Bytes of spill stores and loads by kernel, from what ptxas prints under ``MOSAIC_GPU_DUMP_PTXAS=1``."""
    found = {}
    pattern = r"Function properties for (\w+?)(?:_mosaic_gpu_kernel)?\n.*?(\d+) bytes spill stores, (\d+) bytes spill"
    for name, stores, loads in re.findall(pattern, report):
        found[name] = int(stores) + int(loads)
    return found


class _CapturedOutput:
    """What C++ code writes to standard output and error meanwhile, in ``text``; goes nowhere else."""

    def __enter__(self) -> "_CapturedOutput":
        self._file = tempfile.TemporaryFile()
        self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        for fd, _ in self._saved:
            os.dup2(self._file.fileno(), fd)
        return self

    def __exit__(self, *_: object) -> None:
        for fd, saved in self._saved:
            os.dup2(saved, fd)
            os.close(saved)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
        self._file.close()


def device_calc_diff(got: Array, expected: Array) -> float:
    """``calc_diff`` as ``|x - y|^2 / (|x|^2 + |y|^2)``, sums by row on the device; NaN where a value is not finite."""

    @jax.jit
    def sums(x: Array, y: Array) -> tuple[Array, Array]:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.square(x - y).sum(-1), (x * x + y * y).sum(-1)

    difference, energy = (np.asarray(s, np.float64).sum() for s in sums(got, expected))
    return float(difference / energy)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['case']:<28} {row['tiling']:<26}{'*' if row.get('default') else ' '}"
    if "failed" in row:
        return f"{line} failed: {row['failed']}"
    for prefix, word in (("", "burst"), ("sustained_", "sustained")):
        line += f" {word} {row[f'{prefix}us']:7.1f} us {row[f'{prefix}tflops']:5.0f} TF {row[f'{prefix}gbs']:5.0f} GB/s"
        line += f" {row[f'{prefix}to_peer']:.2f}x" if row[f"{prefix}to_peer"] else ""
    line += f" xla {row['sustained_to_xla']:.2f}x" if row["sustained_to_xla"] else ""
    line += f" diff {row['calc_diff']:.1e}"
    line += f" COPIES {row['copies']}" if row.get("copies") else ""
    return line + (f" SPILLED {row['spilled_bytes']}" if row.get("spilled_bytes") else "")


def e4m3(key: Array, shape: tuple[int, ...]) -> Array:
    """Random normal values quantized as tiles of 128 are: the largest of 128 at 448."""
    return (jax.random.normal(key, shape, jnp.float32) * (448 / 2.7)).clip(-448, 448).astype(jnp.float8_e4m3fn)


def scales(key: Array, shape: tuple[int, ...]) -> Array:
    """Random float32 scales, within a factor of four."""
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 2.0) * (2.7 / 448)
