"""Whether devices wait for the moving average, seen from a thread beside the run."""

import contextlib
import math
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax

Say = Callable[[str], object]
_LOOK = 0.002
"""Seconds between two looks at what has come."""
_LATE = 0.05
"""Of a step's time: what devices may wait for a share before it is told."""
_LATE_IN_A_ROW = 3
"""Shares that came too late, one after another, before it is told: the first ones wait for pinned memory."""


class Watch:
    """Sees, in a thread, whether devices wait for shares of the average, and says so once.

    Args:
        every: ``train.ema_every``.
        nbytes: of this process's average.
        say: told with the value of ``train.ema_every`` at which nothing would wait.
    """

    def __init__(self, every: int, nbytes: int, say: Say):
        self._every, self._nbytes, self._say = every, nbytes, say
        self._looks: queue.Queue[tuple[list[jax.Array], jax.Array]] = queue.Queue()
        self._began: float | None = None
        self._seconds: deque[float] = deque(maxlen=64)
        self._late, self._told, self._longest = 0, False, 0.0
        # A daemon: a step that never ends must not keep the process from ending.
        threading.Thread(target=self._run, name="moving average", daemon=True).start()

    @property
    def share_seconds(self) -> float | None:
        """Median time of a share on its way; None before the first."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def longest_wait(self) -> float:
        """Seconds."""
        return self._longest

    def see(self, coming: Sequence[jax.Array], step: jax.Array) -> None:
        """Look on, in the thread, as ``coming`` arrives and ``step``, which runs meanwhile, ends."""
        self._looks.put((list(coming), step))

    def wait(self) -> None:
        """Return when all has been seen."""
        self._looks.join()

    def _run(self) -> None:
        while True:
            # What a step failed with is told by whoever reads its results.
            with contextlib.suppress(RuntimeError):
                self._look(*self._looks.get())
            self._looks.task_done()

    def _look(self, coming: list[Any], step: Any) -> None:
        ended = came = None
        while ended is None or came is None:
            now = time.perf_counter()
            ended = now if ended is None and step.is_ready() else ended
            came = now if came is None and all(piece.is_ready() for piece in coming) else came
            if ended is None or came is None:
                time.sleep(_LOOK)
        if self._began is not None:
            self.note(ended - self._began, came - self._began)
        # Behind both, the share is folded in and the next one begins to come.
        self._began = max(ended, came)

    def note(self, step_seconds: float, share_seconds: float) -> None:
        """A step took so long from the last one's end, and a share, which came up beside it, so long."""
        wait = max(0.0, share_seconds - step_seconds)
        self._seconds.append(share_seconds)
        self._longest = max(self._longest, wait)
        self._late = self._late + 1 if wait > _LATE * step_seconds else 0
        if self._late < _LATE_IN_A_ROW or self._told:
            return
        self._told = True
        enough = max(self._every + 1, math.ceil(1.1 * self._every * share_seconds / step_seconds))
        self._say(
            f"steps wait for the moving average: of this process's {self._nbytes / 1e9:.3g} GB one part in "
            f"{self._every} crosses the bus beside each step, in {share_seconds:.2g} s; a step takes "
            f"{step_seconds:.2g} s; raise train.ema_every to {enough} (now {self._every}; one fold's decay is "
            f"train.ema_decay to that power)"
        )
