"""How the processes of a job find each other: all come to process 0, which waits for them and tells each who is there.

Whatever is wrong is said here, before JAX starts: who did not come, who was started differently.
"""

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sharding.launch.devices import count_gpus
from sharding.launch.peers import Link, Peers
from sharding.launch.place import Launch, Place

_HELLO = "dsv3"
_POLITE_SECONDS = 5.0
"""What a new connection has to say who it is."""

_Met = tuple[str, list[dict[str, Any]], dict[int, Link]]


class LaunchError(RuntimeError):
    """What did not come together, in one line."""


def join(place: Place, launch: Launch, settings: str = "") -> tuple[Peers, list[dict[str, Any]]]:
    """Connect with the other processes.

    Args:
        place: this process's.
        launch: its time limits.
        settings: text that must be the same in every process.

    Returns:
        The others, and what each process said of itself: ``host``, ``visible`` (of the GPUs), ``gpus``.

    Raises:
        LaunchError: one line that names what did not come, or does not fit.
    """
    me = {
        _HELLO: 1,
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus": count_gpus(os.environ),
        "settings": hashlib.blake2b(settings.encode(), digest_size=8).hexdigest(),
    }
    meet = _wait_for_all if place.process == 0 else _come_to_process_0
    token, everyone, links = meet(place, launch.connect_seconds, me)
    hosts = [told["host"] for told in everyone]
    limits = {"peer_seconds": launch.peer_seconds, "save_seconds": launch.save_seconds}
    return Peers(place.process, hosts, token, links, **limits), everyone


def _wait_for_all(place: Place, seconds: float, me: dict[str, Any]) -> _Met:
    deadline = time.monotonic() + seconds
    links: dict[int, Link] = {}
    everyone = {0: me}
    with _listen(place.port + 1) as listener:
        while len(everyone) < place.processes:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = _listed(sorted({*range(place.processes)} - everyone.keys()))
                line = f"{missing} of {place.processes} did not come to {_here(place)} within {seconds:g} s"
                raise _refuse(links.values(), line) from None
            link = _link(connection, -1, _POLITE_SECONDS)
            hello = _first_message(link)
            if hello is None or hello.get(_HELLO) != 1:
                link.close()  # A port scanner, or who takes JAX's port for ours.
                continue
            link.process = hello["process"]
            if link.process in links and _hung_up(links[link.process]):
                # It was started again while others were waited for.
                links.pop(link.process).close()
                everyone.pop(link.process)
            fault = _misfit(hello, me, everyone)
            if fault:
                raise _refuse([*links.values(), link], fault)
            everyone[link.process], links[link.process] = hello, link
    token, told = secrets.token_hex(8), [everyone[process] for process in range(place.processes)]
    for link in links.values():
        link.send(token=token, everyone=told)
    return token, told, links


def _come_to_process_0(place: Place, seconds: float, me: dict[str, Any]) -> _Met:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((place.host, place.port + 1), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                why = error.strerror or str(error) or type(error).__name__
                line = f"process 0 was not there within {seconds:g} s, at {_here(place)} ({why})"
                raise LaunchError(line) from error
            time.sleep(0.2)
    # Process 0 may have begun to wait just now; it says when its time is over.
    link = _link(connection, 0, seconds + 30)
    link.send(**me)
    answer = _first_message(link)
    if answer is None or "token" not in answer:
        told = answer.get("end") if answer else None
        raise LaunchError(told or f"process 0 at {_here(place)} ended before all processes were there")
    return answer["token"], answer["everyone"], {0: link}


def _misfit(hello: Mapping[str, Any], me: Mapping[str, Any], everyone: Mapping[int, Mapping[str, Any]]) -> str:
    process, host = hello["process"], hello["host"]
    ours, theirs = me["processes"], hello["processes"]
    if theirs != ours:
        return f"--launch.processes is {ours} in process 0 and {theirs} in process {process} ({host})"
    if process in everyone:
        return f"--launch.process = {process} is given to two processes, on {everyone[process]['host']} and on {host}"
    if hello["settings"] != me["settings"]:
        return f"process {process} ({host}) was started with other settings than process 0: give all the same command"
    return ""


def _refuse(links: Sequence[Link] | Any, line: str) -> LaunchError:
    for link in links:
        link.send(end=line)
        link.close()
    return LaunchError(line)


def _link(connection: socket.socket, process: int, seconds: float) -> Link:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(seconds)
    return Link(connection, process)


def _first_message(link: Link) -> dict[str, Any] | None:
    """None where the other side says nothing in time, hangs up or speaks another language."""
    try:
        while (messages := link.receive()) == []:
            pass
    except TimeoutError:
        return None
    if not messages:
        return None
    first, *link.unread = messages
    return first


def _hung_up(link: Link) -> bool:
    link.connection.setblocking(False)
    try:
        return not link.connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        link.connection.settimeout(_POLITE_SECONDS)


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
    except OSError as error:
        reason = f"port {port}, one above --launch.coordinator's, cannot be opened here: {error.strerror}"
        raise LaunchError(reason) from error


def _here(place: Place) -> str:
    return f"{place.host}:{place.port + 1}"


def _listed(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"
