"""What ran on a device and when, from a trace of JAX's profiler."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError


class Event(NamedTuple):
    """One kernel, copy or CPU operation. Times are microseconds."""

    kernel: str
    instruction: str
    """Of the compiled program; ``command_buffer_N`` for what a CUDA graph replays."""
    begin: float
    end: float


class Shared(NamedTuple):
    """A span of time dealt out to its events."""

    spent: dict[int, float]
    """Microseconds by the place of an event in the list; of those that ran at one time, one gets it."""
    span: float
    """From the first event's begin to the last one's end."""


def trace_file(folder: Path) -> Path:
    """The newest trace under a folder that ``jax.profiler`` wrote into.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{folder} holds no trace of JAX's profiler")
    return found[-1]


def read_events(path: Path, device: int = 0) -> list[Event]:
    """Events of a trace file on GPU ``device``, or on the CPU where the trace has no GPU; by begin."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return events_of(json.load(file)["traceEvents"], device)


def events_of(records: Iterable[dict[str, Any]], device: int = 0) -> list[Event]:
    """:func:`read_events` of what the file says. A GPU's timelines repeat each kernel under its operation's name: those
    that were launched are told by their ``correlation_id``."""
    records = list(records)
    names = {one["pid"]: one["args"]["name"] for one in records if one.get("name") == "process_name"}
    gpus = {pid for pid, name in names.items() if "GPU:" in name}
    mine = {pid for pid in gpus if re.search(rf"GPU:{device}\b", names[pid])}
    found = []
    for one in records:
        given = one.get("args") or {}
        launched = one.get("pid") in mine and "correlation_id" in given
        if one.get("ph") == "X" and "hlo_op" in given and (launched or not gpus):
            begin = float(one["ts"])
            found.append(Event(one["name"], given["hlo_op"], begin, begin + one.get("dur", 0.0)))
    return sorted(found, key=lambda event: event.begin)


def share_out(events: Sequence[Event], waits: Callable[[Event], bool]) -> Shared:
    """Every moment to one event: the one that began last, for operations hold others; one that only ``waits``, such as
    communication, gets what no other event covers. What no event gets is idle."""
    ends = [(time, place, opens) for place, e in enumerate(events) if e.end > e.begin for time, opens in _ends(e)]
    running: dict[int, tuple[bool, float]] = {}
    spent: dict[int, float] = {}
    last = 0.0
    for time, place, opens in sorted(ends):
        if running and time > last:
            chosen = max(running, key=lambda one: running[one])
            spent[chosen] = spent.get(chosen, 0.0) + time - last
        last = time
        if opens:
            running[place] = (not waits(events[place]), events[place].begin)
        else:
            running.pop(place)
    span = max(e.end for e in events) - min(e.begin for e in events) if events else 0.0
    return Shared(spent, span)


def _ends(event: Event) -> tuple[tuple[float, bool], tuple[float, bool]]:
    return (float(event.begin), True), (float(event.end), False)


def times_run(events: Sequence[Event]) -> Counter[str]:
    """How often each instruction ran: as often as the rarest of its kernels."""
    kernels: dict[str, Counter[str]] = {}
    for event in events:
        kernels.setdefault(event.instruction, Counter())[event.kernel] += 1
    return Counter({name: min(counts.values()) for name, counts in kernels.items()})
