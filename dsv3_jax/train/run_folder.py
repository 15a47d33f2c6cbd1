"""A run's folder: one run, one writer, one configuration; and how a run is asked to stop."""

import contextlib
import fcntl
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dsv3_jax.checkpoint import newest_checkpoint
from dsv3_jax.config import Config, ConfigError, differences, load_config, to_toml
from dsv3_jax.data.files import write_whole

_MAY_CHANGE = frozenset(
    {
        "train.log_every",
        "train.eval_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.max_nonfinite_steps",
        "train.ema_every",
        "train.bigram_gate",
        "data.workers",
        "data.prefetch",
        # Where layers, experts and sequences lie, and in which order they are gone through.
        "train.micro_batch_size",
        "train.unroll",
        "mesh.pipe",
        "mesh.schedule",
        "mesh.waiting",
        "mesh.lag",
        "mesh.expert",
        "mesh.data",
        "mesh.capacity",
        "mesh.cluster",
    }
)
_MAY_GROW = frozenset({"train.steps", "train.tokens"})


@contextlib.contextmanager
def open_run_folder(config: Config, out: Path, *, primary: bool = True) -> Iterator[list[str]]:
    """Make or enter a run folder and hold it against other processes; gives the allowed changes, one line each.

    Raises:
        ConfigError: it cannot be made, another process trains in it, or it is of a run with other settings.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a") if primary else None
    except OSError as error:
        raise ConfigError(f"--out = {str(out)!r} cannot be a run folder: {error.strerror}") from error
    try:
        if lock is not None:
            _hold(lock, out)
        changes = _changes(config, out)
        if primary:
            write_whole(out / "config.toml", to_toml(config))
        yield changes
    finally:
        if lock is not None:
            lock.close()


def _hold(lock: Any, out: Path) -> None:
    """The kernel lets go when the process ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"--out = {str(out)!r} is in use: another process trains in it") from error


def _changes(config: Config, out: Path) -> list[str]:
    """Differences to the run that is already there; ConfigError when one may not be.

    A command that failed before it had a tokenizer or a checkpoint leaves nothing that settings would belong to.
    """
    begun = (out / "tokenizer.json").exists() or newest_checkpoint(out / "checkpoints") is not None
    if not begun or not (out / "config.toml").exists():
        return []
    old = load_config(str(out / "config.toml"))
    changes = differences(old, config)
    refused = [line for line in changes if not _allowed(line.partition(":")[0], old, config)]
    if refused:
        raise ConfigError(
            f"--out = {str(out)!r} holds a run with other settings ({'; '.join(refused)}): give the run's own again, "
            "or another --out (a run may be made longer; mesh, logging, evaluation and checkpoint intervals may change)"
        )
    return changes


def _allowed(name: str, old: Config, new: Config) -> bool:
    if name in _MAY_CHANGE:
        return True
    if name not in _MAY_GROW:
        return False
    section, _, field = name.partition(".")
    before, after = (getattr(getattr(config, section), field) or math.inf for config in (old, new))
    return after > before


class StopRequest:
    """Ctrl-C and SIGTERM while steps are made: the first asks to save and stop, another stops at once.

    Use as a context manager. Both stop at once, by KeyboardInterrupt, outside :meth:`deferred`. In other threads than
    the main one, where Python has no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal sets :attr:`asked` and nothing else."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Noted before it is raised: Python drops what is raised in a callback of the garbage collector.
        again, self.asked = self.asked, True
        if again or not self._deferred:
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        # Not print: a handler may interrupt a print.
        os.write(2, f"\n{name}: saving after this step; once more stops at once\n".encode())
