"""The thread that the engine runs in, and the tickets by which requests hear of their sequences."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Iterable

from dsv3_jax.inference.engine import Engine, News
from dsv3_jax.inference.sequence import Sequence

_log = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine stopped with an error, and with it the server's work."""


class Full(Exception):
    """The line is as long as it may get."""


class Ticket:
    """One request's sequences, and what comes of them."""

    def __init__(self, sequences: list[Sequence], loop: asyncio.AbstractEventLoop):
        self.sequences = sequences
        self.loop = loop
        self.news: asyncio.Queue[News | BaseException] = asyncio.Queue()
        self.open = len(sequences)
        """Sequences that are not finished, as far as the reader knows."""
        self.began = time.monotonic()
        self.first = 0.0
        """Seconds until the first token."""

    async def next(self) -> News:
        """What comes next of any of the sequences.

        Raises:
            EngineFailed: nothing comes any more.
        """
        news = await self.news.get()
        if isinstance(news, BaseException):
            raise news
        if news.tokens and not self.first:
            self.first = time.monotonic() - self.began
        self.open -= news.finish is not None
        return news


class Worker:
    """Runs an engine; every method but :meth:`_run` is for other threads.

    Args:
        engine: nobody else steps it.
        max_waiting: sequences that may stand in line.
    """

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: EngineFailed | None = None
        self._inbox: queue.SimpleQueue[tuple[str, list[Sequence]]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End it, whatever is unfinished."""
        self._stopping = True
        self._inbox.put(("wake", []))
        self._thread.join()

    @property
    def open(self) -> int:
        """Sequences that are not finished."""
        return len(self._tickets)

    def submit(self, sequences: list[Sequence]) -> Ticket:
        """Sequences of one request; called in the event loop that reads the ticket.

        Raises:
            Full: they would make the line too long.
            EngineFailed: the engine has stopped.
        """
        ticket = Ticket(sequences, asyncio.get_running_loop())
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if len(self._tickets) + len(sequences) > self.max_waiting + self.engine.options.max_batch:
                raise Full
            self._tickets |= {sequence.number: ticket for sequence in sequences}
        self._inbox.put(("submit", sequences))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody reads the ticket any more."""
        self._inbox.put(("cancel", ticket.sequences))

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_in(wait=not self.engine.busy)
                if self.engine.busy:
                    self._tell(self.engine.step())
        except Exception as error:
            _log.exception("the engine failed")
            with self._lock:
                self.failure = EngineFailed(f"the engine failed: {type(error).__name__}")
                tickets = set(self._tickets.values())
                self._tickets.clear()
            for ticket in tickets:
                _post(ticket, [self.failure])

    def _take_in(self, wait: bool) -> None:
        while True:
            try:
                what, sequences = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            for sequence in sequences:
                if what == "submit":
                    self.engine.submit(sequence)
                elif self._forget(sequence) is not None:
                    self.engine.cancel(sequence)

    def _forget(self, sequence: Sequence) -> Ticket | None:
        with self._lock:
            return self._tickets.pop(sequence.number, None)

    def _tell(self, told: Iterable[News]) -> None:
        by_ticket: dict[Ticket, list[News]] = {}
        for news in told:
            number = news.sequence.number
            ticket = self._forget(news.sequence) if news.finish else self._tickets.get(number)
            if ticket is not None:
                by_ticket.setdefault(ticket, []).append(news)
        for ticket, items in by_ticket.items():
            _post(ticket, items)


def _post(ticket: Ticket, items: list[News] | list[EngineFailed]) -> None:
    def put() -> None:
        for item in items:
            ticket.news.put_nowait(item)

    try:
        ticket.loop.call_soon_threadsafe(put)
    except RuntimeError:  # the event loop is closed: nobody is left to hear
        _log.debug("a ticket's event loop is closed")
