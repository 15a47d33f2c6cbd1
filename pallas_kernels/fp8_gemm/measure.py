"""What the benches of the FP8 products share: tilings compiled at once, checked, timed in a burst and under load."""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.fp8_gemm.product_sm90 import Tiling

ROTATED_BYTES = 200 * 10**6
"""Inputs that calls rotate over: more than three times an H200's L2 cache."""
LOAD_SECONDS = 0.15
_FEWEST_MICROSECONDS = 400
_QUICK_COMPILE: dict[str, Any] = {"xla_gpu_autotune_level": 0}

Operands = tuple[Array, ...]


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
    column_scales: bool = False


def parser(doc: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a bench over the named cases."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="write all results there, again after every row")
    made.add_argument("--case", nargs="+", help=f"only cases whose name holds one of these; all: {', '.join(names)}")
    made.add_argument("--sweep", action="store_true", help="try other tilings too")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    made.add_argument("--no-xla", action="store_true", help="leave out XLA's bfloat16 product")
    return made


class Bench:
    """Measures works and prints and keeps a row for each tiling; what fails is a row too."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    def chosen(self, name: str) -> bool:
        """Whether the options ask for the case and there is time left to begin it."""
        if time.monotonic() - self.began > self.options.seconds:
            return False
        return not self.options.case or any(part in name for part in self.options.case)

    def keep(self, row: dict[str, Any]) -> None:
        """Prints a row and writes all of them."""
        self.rows.append(row)
        print(_line(row), flush=True)
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.rows, indent=1))

    def run(self, work: Work, others: Sequence[Tiling]) -> None:
        """The case with its default tiling and, where the options ask for a sweep, the others."""
        tilings = [work.default]
        if self.options.sweep:
            tilings += [tiling for tiling in others if tiling != work.default]
        try:
            self._run(work, tilings)
        except Exception as error:  # what does not fit must not end the bench
            self.keep({"case": work.name, "tiling": "all", "failed": f"{type(error).__name__}: {error}"[:300]})

    def _run(self, work: Work, tilings: Sequence[Tiling]) -> None:
        keys = jax.random.split(jax.random.key(0), 64)
        make = jax.jit(work.make)
        first = make(keys[0])
        expected = jax.jit(work.reference, compiler_options=_QUICK_COMPILE)(*first)
        xla_us = None if self.options.no_xla else _dense_microseconds(*work.dense)
        input_bytes = sum(x.nbytes for x in first)
        floor_us = max(work.flops / 1.4e9, work.moved_bytes / 4.2e6)
        count = max(math.ceil(ROTATED_BYTES / input_bytes), min(48, math.ceil(_FEWEST_MICROSECONDS / floor_us)))
        sets = [first] + [make(key) for key in keys[1:count]]
        compiled, reports = _compile_all(work, tilings, sets)
        for tiling, (function, burst_function, failure) in zip(tilings, compiled, strict=True):
            name = tiling.name(work.column_scales)
            row: dict[str, Any] = {"case": work.name, "tiling": name, "default": tiling == work.default}
            if function is None:
                self.keep(row | {"failed": failure})
                continue
            try:
                intos = None if work.into is None else [work.into() for _ in sets]
                row["us"] = _burst(burst_function, sets, intos)
                outs = function(sets, intos)
                start = 0.0 if work.into is None else work.into()
                row["calc_diff"] = device_calc_diff(outs[0], expected + start)
                del start
                row["spilled_bytes"] = reports.get(name)
                row["sustained_us"] = _sustained(function, sets, outs if intos else None)
                del outs
                for prefix, peer in (("", work.peer_burst_us), ("sustained_", work.peer_us)):
                    row[f"{prefix}tflops"] = work.flops / row[f"{prefix}us"] / 1e6
                    row[f"{prefix}gbs"] = work.moved_bytes / row[f"{prefix}us"] / 1e3
                    row[f"{prefix}to_peer"] = peer / row[f"{prefix}us"] if peer else None
                row["sustained_to_xla"] = xla_us / row["sustained_us"] if xla_us else None
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.keep(row)


def _compile_all(work: Work, tilings: Sequence[Tiling], sets: list[Operands]) -> tuple[list[Any], dict[str, int]]:
    """Every tiling's function over all sets, in place and not, or why it failed; and ptxas's spills by kernel name."""
    intos_type = None if work.into is None else [jax.eval_shape(work.into)] * len(sets)

    def build(tiling: Tiling) -> tuple[Any, Any, str]:
        one = jax.jit(lambda operands, into: work.kernel(tiling, operands, into))

        def over_all(sets: list[Operands], intos: list[Array] | None) -> list[Array]:
            return [one(operands, None if intos is None else intos[i]) for i, operands in enumerate(sets)]

        try:
            in_place = jax.jit(over_all, donate_argnums=1).lower(sets, intos_type).compile()
            if work.into is None:
                return in_place, in_place, ""
            return in_place, jax.jit(over_all).lower(sets, intos_type).compile(), ""
        except Exception as error:
            return None, None, f"{type(error).__name__}: {error}".splitlines()[0][:200]

    with _CapturedOutput() as captured, concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(build, tilings))
        for function, _, _ in compiled:  # some of the compilation waits for the first call
            if function is not None:
                jax.block_until_ready(function(sets, None if work.into is None else [work.into() for _ in sets]))
    return compiled, spilled_bytes(captured.text)


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


def _burst(function: Any, sets: list[Operands], intos: Any) -> float:
    """Device time of a call after a rest (CUPTI), microseconds; each finds its inputs out of the cache."""
    from jax.experimental.mosaic.gpu import profiler

    time.sleep(0.15)
    kernels: Any
    _, kernels = profiler.Cupti(finalize=False).measure(function, aggregate=False)(sets, intos)
    milliseconds: list[float] = [ms for name, ms in kernels or () if name.startswith("fp8")]  # not XLA's copies
    if len(milliseconds) != len(sets):
        raise RuntimeError(f"CUPTI saw {len(milliseconds)} of {len(sets)} kernels")
    return 1e3 * float(np.median(milliseconds))


def _sustained(function: Any, sets: list[Operands], intos: Any) -> float:
    """Time of a call among calls back to back for ``LOAD_SECONDS``, microseconds."""
    intos, seconds = _seconds(function, sets, intos, 2)
    rounds = max(3, round(LOAD_SECONDS / (seconds / 2)))
    return 1e6 * _seconds(function, sets, intos, rounds)[1] / rounds / len(sets)


def _seconds(function: Any, sets: list[Operands], intos: Any, rounds: int) -> tuple[Any, float]:
    start = time.perf_counter()
    outs = intos
    for _ in range(rounds):
        outs = function(sets, intos)
        intos = None if intos is None else outs
    jax.block_until_ready(outs)
    return intos, time.perf_counter() - start


def _dense_microseconds(rows: int, columns: int, contraction: int) -> float:
    """Sustained time of XLA's bfloat16 product (cuBLAS) of this size, microseconds."""
    a_bytes = 2 * contraction * (rows + columns)
    count = min(48, max(1, math.ceil(ROTATED_BYTES / a_bytes)))
    keys = jax.random.split(jax.random.key(1), 2 * count)
    sets = [
        (
            jax.random.normal(keys[2 * i], (rows, contraction), jnp.bfloat16),
            jax.random.normal(keys[2 * i + 1], (columns, contraction), jnp.bfloat16),
        )
        for i in range(count)
    ]
    over_all = jax.jit(lambda sets: [jnp.einsum("mk,nk->mn", a, b) for a, b in sets])
    return _sustained(lambda sets, _: over_all(sets), sets, None)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['case']:<28} {row['tiling']:<26}{'*' if row.get('default') else ' '}"
    if "failed" in row:
        return f"{line} failed: {row['failed']}"
    for prefix, word in (("", "burst"), ("sustained_", "sustained")):
        line += f" {word} {row[f'{prefix}us']:7.1f} us {row[f'{prefix}tflops']:5.0f} TF {row[f'{prefix}gbs']:5.0f} GB/s"
        line += f" {row[f'{prefix}to_peer']:.2f}x" if row[f"{prefix}to_peer"] else ""
    line += f" xla {row['sustained_to_xla']:.2f}x" if row["sustained_to_xla"] else ""
    line += f" diff {row['calc_diff']:.1e}"
    return line + (f" SPILLED {row['spilled_bytes']}" if row.get("spilled_bytes") else "")


def e4m3(key: Array, shape: tuple[int, ...]) -> Array:
    """Random normal values quantized as tiles of 128 are: the largest of 128 at 448."""
    return (jax.random.normal(key, shape, jnp.float32) * (448 / 2.7)).clip(-448, 448).astype(jnp.float8_e4m3fn)


def scales(key: Array, shape: tuple[int, ...]) -> Array:
    """Random float32 scales, within a factor of four."""
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 2.0) * (2.7 / 448)
