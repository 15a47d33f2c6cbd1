"""The processes of one job, tied together by one TCP connection from each to process 0, beside JAX's own.

JAX learns of a dead process late, and then aborts with a stack trace. Here the kernel says at once when a process ends
(its connection closes), silence of a whole machine is noticed after a stated time, and every other process ends with
status 1 and one line that names the one that is gone. Over the same connections the processes agree on the step to
stop at, and process 0 does first what the others then find done. No step waits for any of it.

Messages are JSON objects, one a line: see ``Peers._from_spoke`` and ``Peers._from_hub``.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_LONGEST = 1 << 20
"""Bytes of one message: what is longer comes from a stranger."""
_GRACE_SECONDS = 1.0
"""How much later than the failure of an exchange the end of the other process may be noticed."""


class Link:
    """One end of a connection that carries JSON lines."""

    def __init__(self, connection: socket.socket, process: int):
        self.connection, self.process = connection, process
        self.heard = time.monotonic()
        self.unread: list[dict[str, Any]] = []
        """What came together with a message that was waited for."""
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """A broken connection is noticed by whoever reads it, not here."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, waiting for something if need be; None at the connection's end.

        Raises:
            TimeoutError: nothing came within the connection's own time limit.
        """
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            return None
        self.heard = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class Alone:
    """What :class:`Peers` is to a job of one process."""

    def __init__(self) -> None:
        self.index, self.count, self.token = 0, 1, ""
        self.advice: Callable[[], str] = lambda: ""
        """Said after what happened: where to go on from."""
        self.asked_at: float | None = None
        """When the request to stop was heard (``time.monotonic``)."""

    @property
    def asked_by(self) -> str:
        """The process that was asked to stop, where there are several."""
        return ""

    @contextlib.contextmanager
    def primary_first(self) -> Iterator[None]:
        """Nobody to wait for."""
        yield

    def begin(self) -> None:
        """Nothing to prepare."""

    def stops_at(self, step: int, asked: bool) -> bool:
        """Whether to stop before the step after ``step``: where this process is asked to."""
        if asked and self.asked_at is None:
            self.asked_at = time.monotonic()
        return asked

    def saved(self) -> None:
        """Nobody waits for it."""

    def await_verdict(self) -> None:
        """No other process can be the cause of a failure."""

    def done(self) -> None:
        """Nobody to tell."""

    def fail(self, line: str) -> None:
        """Nobody to tell."""


class Peers(Alone):
    """The other processes of the job, watched by a thread until :meth:`leave`.

    Args:
        index: number of this process.
        hosts: host name of every process.
        token: the job's own name, the same in every process.
        links: from process 0 one to every other process, from the others one to process 0.
        peer_seconds: silence after which a process counts as gone.
        save_seconds: time from a request to stop until everything must be saved.
    """

    def __init__(
        self,
        index: int,
        hosts: list[str],
        token: str,
        links: Mapping[int, Link],
        *,
        peer_seconds: float = 60.0,
        save_seconds: float = 120.0,
    ):
        super().__init__()
        self.index, self.count, self.hosts, self.token = index, len(hosts), hosts, token
        self.left = False
        self.finished = False
        """A run came to its end or was saved; :meth:`leave` may wait for the others."""
        self._links = dict(links)
        self._peer_seconds, self._save_seconds = peer_seconds, save_seconds
        self._changed = threading.Condition()
        self._over = self._ending = False
        self._turns = self._turns_taken = 0
        self._begun, self._held = 0, False
        self._asked_by: int | None = None
        self._stop_at: int | None = None
        self._replies: dict[int, int] = {}
        self._unsaved_since: float | None = None
        self._byes: set[int] = set()
        self._parted = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        for link in self._links.values():
            link.connection.settimeout(peer_seconds)
        self._thread.start()

    def name(self, process: int) -> str:
        """Such as ``process 3 of 8 (node2)``."""
        return f"process {process} of {self.count} ({self.hosts[process]})"

    # What the main thread calls.

    @contextlib.contextmanager
    def primary_first(self) -> Iterator[None]:
        """Process 0 goes through the body first, the others then; all come to it the same number of times."""
        self._turns_taken += 1
        if self.index:
            with self._changed:
                self._changed.wait_for(lambda: self._turns >= self._turns_taken)
        yield
        if not self.index:
            self._send_all(turn=self._turns_taken)

    def begin(self) -> None:
        """A run begins: requests to stop an earlier one are forgotten."""
        with self._changed:
            self._begun, self._held, self._asked_by, self._stop_at = 0, False, None, None
            self.asked_at = self._unsaved_since = None
            self.finished = False

    def stops_at(self, step: int, asked: bool) -> bool:
        """Whether all processes stop before the step after ``step``; called by each before every step.

        Once one is asked, each says how far it is and waits here until the farthest is known: there all stop.
        """
        with self._changed:
            if asked and self._asked_by is None:
                if self.index == 0:
                    self._ask(0)
                else:
                    self._links[0].send(asked=True)
            self._changed.wait_for(lambda: not self._held)
            if self._stop_at is not None:
                return step >= self._stop_at
            self._begun = step + 1
            return False

    @property
    def asked_by(self) -> str:
        """The process that was asked to stop; empty where none was."""
        return "" if self._asked_by is None else self.name(self._asked_by)

    def saved(self) -> None:
        """Everything is saved: the request's time limit is kept."""
        with self._changed:
            self._unsaved_since = None

    def await_verdict(self) -> None:
        """After a failed exchange with other processes: the watching thread ends this one if a process is gone."""
        time.sleep(self._peer_seconds + 1)

    def done(self) -> None:
        """The run is complete or saved."""
        self.finished = True

    def fail(self, line: str) -> None:
        """This process ends with an error: every other ends too, and says whose it was.

        Where another process is found to be gone, that is the cause, and the watching thread ends this one with it.
        """
        with self._changed:
            if self.left or (self._over and not self._ending):
                return
            self._changed.wait_for(lambda: self._ending, _GRACE_SECONDS)
            self._over = True
        if self._ending:
            self._thread.join()
        self._tell_everyone(f"{self.name(self.index)} failed: {line}", advise=False)
        time.sleep(0.2)

    def leave(self) -> None:
        """Wait until every process comes here; then nobody is watched any more."""
        if self.left:
            return
        with self._changed:
            self._byes.add(0)
        if self.index:
            self._links[0].send(bye=True)
        else:
            self._part_if_all_came()
        self._parted.wait()
        self.left = True
        self._thread.join()

    def close(self, wait_seconds: float = 30.0) -> None:
        """After :meth:`leave`: close the connections; process 0 waits until the others have closed theirs."""
        for link in self._links.values():
            if not self.index:
                link.connection.settimeout(wait_seconds)
                with contextlib.suppress(TimeoutError):
                    while link.receive() is not None:
                        pass
            link.close()

    # What the watching thread does.

    def _watch(self) -> None:
        interval = self._peer_seconds / 6
        last_ping = 0.0
        with selectors.DefaultSelector() as selector:
            for link in self._links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
                self._deal(link, link.unread)
            while not self._parted.is_set():
                for key, _ in selector.select(timeout=min(interval / 2, 0.5)):
                    if not self._read(key.data):
                        selector.unregister(key.data.connection)
                now = time.monotonic()
                if now - last_ping >= interval:
                    last_ping = now
                    self._send_all(ping=True)
                for link in self._links.values():
                    if now - link.heard > self._peer_seconds and not self._parted.is_set():
                        self._lost(link, f"nothing was heard of it for {self._peer_seconds:g} s")
                if self._unsaved_since is not None and now - self._unsaved_since > self._save_seconds:
                    self._everyone_ends(
                        f"{self.name(self.index)} could not save within {self._save_seconds:g} s of the request to stop"
                    )

    def _read(self, link: Link) -> bool:
        """Whether the connection is still open."""
        try:
            messages = link.receive()
        except TimeoutError:
            return True
        self._deal(link, messages or ())
        if messages is None and not self._parted.is_set():
            self._lost(link, "its connection closed")
        return messages is not None

    def _deal(self, link: Link, messages: Iterable[dict[str, Any]]) -> None:
        for message in messages:
            if self.index:
                self._from_hub(message)
            else:
                self._from_spoke(link.process, message)

    def _from_spoke(self, process: int, message: dict[str, Any]) -> None:
        """At process 0: ``ping``, ``asked`` (to stop), ``at`` (a step), ``failed`` (with what), ``bye``."""
        with self._changed:
            if "asked" in message:
                self._ask(process)
            elif "at" in message:
                self._replies[process] = message["at"]
                self._settle()
            elif "bye" in message:
                self._byes.add(process)
                self._part_if_all_came()
        if "failed" in message:
            # A loss that process 0 has not seen itself is one to go on from; an error names its own remedy.
            self._everyone_ends(message["failed"], advise=message["advise"])

    def _from_hub(self, message: dict[str, Any]) -> None:
        """At the others: ``ping``, ``turn`` (number), ``ask`` (who is to stop), ``stop_at``, ``end``, ``part``."""
        with self._changed:
            if "turn" in message:
                self._turns = message["turn"]
            elif "ask" in message:
                self._hold(message["ask"])
                self._links[0].send(at=self._begun)
            elif "stop_at" in message:
                self._stop_at, self._held = message["stop_at"], False
            elif "part" in message:
                self._parted.set()
            self._changed.notify_all()
        if "end" in message:
            self._end(message["end"], advise=message["advise"])

    def _ask(self, process: int) -> None:
        if self._asked_by is None and not self._byes - {0}:
            self._hold(process)
            self._replies = {0: self._begun}
            self._send_all(ask=process)
            self._settle()

    def _hold(self, process: int) -> None:
        self._asked_by, self._held = process, True
        self.asked_at = self._unsaved_since = time.monotonic()

    def _settle(self) -> None:
        if len(self._replies) == self.count and self._held:
            self._stop_at, self._held = max(self._replies.values()), False
            self._send_all(stop_at=self._stop_at)
            self._changed.notify_all()

    def _part_if_all_came(self) -> None:
        if len(self._byes) == self.count:
            self._send_all(part=True)
            self._parted.set()

    def _lost(self, link: Link, how: str) -> None:
        if not self._parted.is_set():
            self._everyone_ends(f"{self.name(link.process)} is gone: {how}")

    def _everyone_ends(self, line: str, *, advise: bool = True) -> None:
        self._tell_everyone(line, advise=advise)
        self._end(line, advise=advise)

    def _tell_everyone(self, line: str, *, advise: bool) -> None:
        """By way of process 0."""
        if self.index:
            self._links[0].send(failed=line, advise=advise)
        else:
            self._send_all(end=line, advise=advise)

    def _end(self, line: str, *, advise: bool) -> None:
        """End this process, from whatever its main thread is waiting for."""
        with self._changed:
            if self._over:
                return
            self._over = self._ending = True
            self._changed.notify_all()
        told = [line, *filter(None, [self.advice() if advise else ""])]
        # Not print: the main thread may be inside one.
        shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        os.write(2, f"{shown}dsv3: error: {'; '.join(told)}\n".encode())
        time.sleep(0.2)
        os._exit(1)

    def _send_all(self, **message: Any) -> None:
        for link in self._links.values():
            link.send(**message)
