"""``dsv3 bench mesh PRESET``: one step on many meshes of this machine's devices, each against one device."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dsv3_jax.cli.compile_cache import Kept
from dsv3_jax.cli.overrides import check_writable, parse_config
from dsv3_jax.config import Config, ConfigError, to_toml
from sharding.flags import apply_gpu_flags

SHARE = "0.9"
"""Of a GPU's memory, for the rows' processes, where ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says nothing."""
SHORTEST = 20.0
"""Seconds without which no row is begun."""


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 bench mesh``."""

    gpus: int = 0
    """Devices, N; 0 takes all that this machine has."""
    only: str = ""
    """Rows, comma-separated, beside the reference on one device; empty is all, the most important first."""
    json: str = ""
    """File that all is written to after every row."""
    resume: bool = False
    """Keep the rows that the file of --json has from a run with the same settings."""
    seconds: float = 540.0
    """Time limit of the whole command. A row that runs then is ended, and what it measured is kept."""
    each: float = 240.0
    """Time limit of one row, in seconds, lest one that hangs takes all the time."""
    steps: int = 4
    """Steps that are timed in every row."""
    warmup: int = 2
    """Steps before them."""
    profiled: int = 1
    """Further steps of every mesh under the profiler; 0 leaves them out."""
    micro_batches: int = 0
    """Of a step of a pipeline with N stages; 0 is 4 x N."""
    tolerance: float = 0.0
    """Largest relative difference of the first losses from one device's; 0 is by train.precision (1e-5 with fp32, 2e-4
    with bf16, 2e-3 with fp8)."""
    ahead: bool = False
    """Compile the rows' programs before the first one runs, as many at one time as there are devices, each choosing its
    kernels on another one. Needs compiled programs to be kept."""


def run(argv: Sequence[str]) -> int:
    """Runs the rows; 1 where one's losses are not one device's or it could not run, 130 when interrupted."""
    end = time.monotonic()
    description = (
        "Time the training step on one device and on meshes of N: experts, data, every schedule of a pipeline. Losses "
        "are compared with one device's; then speed, bubbles beside the simulator's, communication, memory."
    )
    config, options = parse_config("dsv3 bench mesh", argv, description, Options)
    _check(options)
    end += options.seconds
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", SHARE)
    machine = look(environment)
    devices = options.gpus or machine["count"]
    if devices > machine["count"]:
        raise ConfigError(f"--gpus = {devices}: this machine has {machine['count']} ({machine['kind']})")
    from dsv3_jax.train.mesh_rows import make_rows

    rows = make_rows(
        config,
        devices,
        [name.strip() for name in options.only.split(",") if name.strip()],
        micro_batches=options.micro_batches,
        memory=machine["memory"],
    )
    bench = Bench(config, options, machine, devices, rows, environment, end)
    with _ended_like_interrupted():
        try:
            bench.run()
        except KeyboardInterrupt:
            bench.show()
            raise
    return bench.show()


@contextlib.contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """A signal to end, as `timeout` sends, does what Ctrl-C does: no process of a row stays behind."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(options: Options) -> None:
    for name in ("steps", "warmup"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} = {getattr(options, name)} must be at least 1")
    for name in ("gpus", "profiled", "micro_batches", "tolerance"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} = {getattr(options, name)} must not be negative")
    for name in ("seconds", "each"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name} = {getattr(options, name):g} must be above 0")
    if options.ahead and "off" in (options.compile_cache, os.environ.get("DSV3_COMPILE_CACHE")):
        raise ConfigError("--ahead needs a folder for compiled programs: the cache is off (--compile-cache)")
    check_writable("--json", options.json)
    if options.resume and not options.json:
        raise ConfigError("--resume needs --json: the file of the run to go on with")


def look(environment: Mapping[str, str]) -> dict[str, Any]:
    """``kind``, ``count``, ``memory`` (bytes that a process may take of one, 0 where not known) and ``jax``, asked in
    another process, which leaves the devices' memory free.

    Raises:
        ConfigError: JAX cannot start.
    """
    program = (
        "import jax, json; one = jax.devices()[0]; stats = one.memory_stats() or {}; print(json.dumps({'kind': "
        "one.device_kind, 'count': len(jax.devices()), 'memory': stats.get('bytes_limit', 0), 'jax': jax.__version__}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"JAX cannot start: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclass
class Bench:
    """The rows of one command, and what is known of them."""

    config: Config
    options: Options
    machine: dict[str, Any]
    devices: int
    rows: Any
    """:class:`~dsv3_jax.train.mesh_rows.Rows`."""
    environment: dict[str, str]
    end: float
    """When the time is over, by the monotonic clock."""
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    others: dict[str, Any] = dataclasses.field(default_factory=dict)
    """``facts`` and ``figures`` of rows that a former run had and this one does not name; they stay in the file."""

    def run(self) -> None:
        """Every row that is not known yet, one after another."""
        if self.options.resume:
            self.facts = self._known()
        if self.options.ahead:
            self._ahead()
        for row in self.rows.run:
            if row.name in self.facts:
                continue
            left = self.end - time.monotonic()
            if left < SHORTEST:
                self.facts[row.name] = {"failed": "left out: the time is over", "left_out": True}
            else:
                print(f"== {row.name}: {row.what}", file=sys.stderr, flush=True)
                self.facts[row.name] = {}
                self.facts[row.name] = self._row(row, min(left, self.options.each))
            self._write()

    def _ahead(self) -> None:
        from dsv3_jax.cli.bench_mesh_ahead import compile_rows

        rows = [row for row in self.rows.run if row.name not in self.facts]
        cache, count = self.options.compile_cache, self.machine["count"]
        print(f"== compiling {len(rows)} programs", file=sys.stderr, flush=True)
        began = time.monotonic()
        compile_rows(rows, self.environment, cache, at_once=self.devices, gpus=count, end=self.end - SHORTEST)
        print(f"== compiled in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    def _row(self, row: Any, seconds: float) -> dict[str, Any]:
        """One row in its process; what it wrote when it is ended before its time, and ``failed`` says why."""
        from dsv3_jax.cli.bench_mesh_row import COMMAND, spec_of
        from dsv3_jax.train.mesh_bench import Amount

        options, environment = self.options, dict(self.environment)
        apply_gpu_flags(environment, row.devices, beside=row.config.mesh.sends_beside)
        amount = Amount(options.steps, options.warmup, options.profiled)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            spec, result = Path(folder) / "spec.json", Path(folder) / "result.json"
            spec.write_text(json.dumps(spec_of(row, amount, options.compile_cache)), encoding="utf-8")
            child = subprocess.Popen([*COMMAND, str(spec), str(result)], env=environment, stdout=sys.stderr)
            why = ""
            try:
                status = child.wait(seconds)
                why = f"its process ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                why = f"ended after {seconds:.0f} s"
            except KeyboardInterrupt:
                self.facts[row.name] = _read(result) | {"failed": "interrupted", "left_out": True}
                self._write()
                raise
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            found = _read(result)
        found["seconds"] = time.monotonic() - began
        if why:
            print(f"== {row.name}: {why}", file=sys.stderr, flush=True)
            found["failed"] = why
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        amount = {name: getattr(self.options, name) for name in ("steps", "warmup", "profiled", "micro_batches")}
        machine = {name: self.machine[name] for name in ("kind", "jax")}
        return amount | machine | {"devices": self.devices, "config": to_toml(self.config)}

    def _known(self) -> dict[str, dict[str, Any]]:
        """Rows that a former run has finished."""
        path = Path(self.options.json)
        if not path.exists():
            return {}
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
            settings, facts = former["settings"], former["facts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--resume: {path} is no file of dsv3 bench mesh") from error
        if settings != self._settings:
            other = [name for name, value in self._settings.items() if settings.get(name) != value]
            raise ConfigError(f"--resume: {path} is of other settings ({', '.join(other)}); name another --json")
        wanted = {row.name: list(row.trials) for row in self.rows.run}
        self.others = {
            "facts": {name: one for name, one in facts.items() if name not in wanted},
            "figures": [line for line in former["figures"] if line["name"] not in wanted],
        }
        return {
            name: one
            for name, one in facts.items()
            if "failed" not in one and [trial["sequences"] for trial in one["trials"]] == wanted.get(name)
        }

    def _figures(self) -> list[Any]:
        from dsv3_jax.train.mesh_report import figures

        return figures(self.rows.run, self.facts, self.options.tolerance)

    def _write(self) -> None:
        if not self.options.json:
            return
        told = {
            "preset": self.config.name,
            "machine": self.machine,
            "settings": self._settings,
            "refused": self.rows.refused,
            "figures": [*map(dataclasses.asdict, self._figures()), *self.others.get("figures", [])],
            "facts": self.facts | self.others.get("facts", {}),
        }
        path = Path(self.options.json)
        half = path.with_name(path.name + ".part")
        half.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        half.replace(path)

    def show(self) -> int:
        """Prints the table; the exit status."""
        from dsv3_jax.cli.bench_mesh_table import print_table

        self._write()
        lines = self._figures()
        title = f"{self.config.name} on {self.devices} x {self.machine['kind']}, {self.config.train.precision}"
        print_table(title, lines, self.rows.refused, self.options.tolerance)
        wrong = [line for line in lines if line.failed and not self.facts[line.name].get("left_out")]
        return 1 if wrong else 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
