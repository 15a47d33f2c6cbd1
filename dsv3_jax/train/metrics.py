"""What a run writes down: ``metrics.jsonl``, ``expert_load.bin`` and TensorBoard, without stopping the devices.

Metrics stay on the devices as they come and are read a few steps late, many at once. On resume every file is cut back
to the restored step, so that the curve of an interrupted run is that of an uninterrupted one.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int64
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

METRICS_FILE, LOAD_FILE = "metrics.jsonl", "expert_load.bin"
LAG = 2
"""Newest steps left unread at a log point, so that reading does not wait for the device."""

Record = dict[str, Any]
_HOST_KEYS = ("step", "tokens", "lr")
_DEVICE_KEYS = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "skipped", "nonfinite")
_COUNTS = ("skipped", "nonfinite")
_NOT_DRAWN = ("step", "tokens", "skipped", "nonfinite")


class MetricsQueue:
    """Takes each step's metrics as they are and reads them later, many at once.

    Args:
        log_every: steps between two readings of the expert load.
    """

    def __init__(self, log_every: int):
        self._log_every = log_every
        self._waiting: list[tuple[Record, dict[str, Any]]] = []
        self._clock: float | None = None
        self._tokens = 0
        self._speed: float | None = None

    def push(self, metrics: Mapping[str, Any], consumed: int, **measured: float) -> None:
        """Keep a step's metrics for later.

        Args:
            metrics: what the training step returned: device arrays and host numbers.
            consumed: tokens of this step.
            measured: host numbers of this step, such as ``val_bpb``.
        """
        record: Record = {key: metrics[key] for key in _HOST_KEYS} | {"measured": measured}
        arrays = {key: metrics[key] for key in _DEVICE_KEYS if key in metrics}
        if record["step"] % self._log_every == 0 and "expert_load" in metrics:
            arrays["expert_load"] = metrics["expert_load"]
        self._waiting.append((record, arrays))
        self._tokens += consumed

    def start_clock(self) -> None:
        """Begin to count tokens per second: after the step that compiled."""
        self._clock, self._tokens = time.perf_counter(), 0

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` just spent, on validation or on a checkpoint, out of tokens per second."""
        if self._clock is not None:
            self._clock += seconds

    def drain(self, lag: int = LAG) -> list[Record]:
        """All but the newest ``lag`` steps as records; a value that is not finite is None, as JSON has no NaN."""
        count = max(0, len(self._waiting) - lag)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        if not ready:
            return []
        fetched = jax.device_get([arrays for _, arrays in ready])
        self._measure()
        return [self._record(record, values, self._speed) for (record, _), values in zip(ready, fetched, strict=True)]

    def _measure(self) -> None:
        """Tokens of the steps begun since the last reading, over the time since: the device is at most a few behind."""
        now = time.perf_counter()
        if self._clock is not None and self._tokens and now > self._clock:
            self._speed = round(self._tokens / (now - self._clock), 1)
            self._clock, self._tokens = now, 0

    @staticmethod
    def _record(record: Record, values: Mapping[str, Any], speed: float | None) -> Record:
        told = {key: record[key] for key in _HOST_KEYS}
        for key in _DEVICE_KEYS:
            if key in values:
                told[key] = int(values[key]) if key in _COUNTS else _finite(float(values[key]))
        told["tokens_per_second"] = speed
        told |= {key: _finite(value) for key, value in record["measured"].items()}
        if values.get("expert_load") is not None and values["expert_load"].size:
            told["expert_load"] = values["expert_load"]
        return told


class RunFiles:
    """A run's ``metrics.jsonl`` (one object a step), ``expert_load.bin`` and TensorBoard events; all written at once.

    Args:
        folder: the run's.
        restored_step: what was written after it is removed; 0 removes all.
    """

    def __init__(self, folder: Path, restored_step: int):
        _cut_jsonl(folder / METRICS_FILE, restored_step)
        self._lines = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._loads = LoadFile(folder / LOAD_FILE, restored_step)
        (folder / "tensorboard").mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: its thread dies silently on a full disk, and then blocks the caller.
        self._events = EventsWriter(str(folder / "tensorboard" / "events"), f".{restored_step}")
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=restored_step + 1, session_log=start))

    def write(self, records: list[Record]) -> None:
        """Append records of :meth:`MetricsQueue.drain`, handed over to the system.

        Raises:
            OSError: the disk is full.
        """
        for record in records:
            load = record.get("expert_load")
            if load is not None:
                self._loads.append(record["step"], load)
            line = {key: value for key, value in record.items() if key != "expert_load"}
            self._lines.write(json.dumps(line) + "\n")
            drawn = [(key, value) for key, value in line.items() if key not in _NOT_DRAWN and value is not None]
            values = [Summary.Value(tag=f"train/{key}", simple_value=value) for key, value in drawn]
            event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
            self._events.write_event(event)
        self._lines.flush()
        self._loads.flush()
        self._events.flush()

    def sync(self) -> None:
        """Bring what was written down to the disk: before a checkpoint becomes visible."""
        os.fsync(self._lines.fileno())
        self._loads.sync()

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        self._loads.close()
        self._events.close()


class LoadFile:
    """Relative expert loads over time: a JSON line with the shape, then records of a step and float16 loads."""

    def __init__(self, path: Path, restored_step: int):
        steps, loads = read_expert_load(path)
        kept = steps <= restored_step
        self._shape = loads.shape[1:] if kept.any() else None
        if path.exists():
            replaced = path.with_suffix(".tmp")
            with replaced.open("wb") as stream:
                if self._shape is not None:
                    stream.write(_load_header(self._shape) + _load_records(steps[kept], loads[kept]))
            replaced.replace(path)
        self._stream = path.open("ab")

    def append(self, step: int, load: Float[np.ndarray, "routers E"]) -> None:
        """One more record."""
        if self._shape is None:
            self._shape = load.shape
            self._stream.write(_load_header(self._shape))
        self._stream.write(_load_records(np.array([step]), load[None]))

    def flush(self) -> None:
        """Hand what was appended to the system."""
        self._stream.flush()

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(folder: Path) -> list[Record]:
    """Every step's record in ``metrics.jsonl``, in order; a last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    return _whole_records(path.read_bytes()) if path.exists() else []


def read_expert_load(path: Path) -> tuple[Int64[np.ndarray, " points"], Float[np.ndarray, "points routers E"]]:
    """Steps and relative loads (1 is balance) of ``expert_load.bin``; empty where there is none."""
    content = path.read_bytes() if path.exists() else b""
    header, _, body = content.partition(b"\n")
    if not body:
        return np.zeros(0, np.int64), np.zeros((0, 0, 0), np.float32)
    shape = json.loads(header)
    dtype = _load_dtype((shape["routers"], shape["experts"]))
    records = np.frombuffer(body[: len(body) // dtype.itemsize * dtype.itemsize], dtype)
    return records["step"].astype(np.int64), records["load"].astype(np.float32)


def _load_dtype(shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("step", "<i8"), ("load", "<f2", shape)])


def _load_header(shape: tuple[int, ...]) -> bytes:
    return json.dumps({"routers": shape[0], "experts": shape[1], "record": "int64 step, float16 load"}).encode() + b"\n"


def _load_records(steps: np.ndarray, loads: np.ndarray) -> bytes:
    records = np.zeros(len(steps), _load_dtype(loads.shape[1:]))
    records["step"], records["load"] = steps, loads
    return records.tobytes()


def _whole_records(content: bytes) -> list[Record]:
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def _cut_jsonl(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in _whole_records(path.read_bytes()) if record["step"] <= last_step]
    replaced = path.with_suffix(".tmp")
    replaced.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    replaced.replace(path)


def _finite(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is null, and its step counts as skipped."""
    return value if math.isfinite(value) else None
