"""A local stand-in for JAX's coordination service, which never hangs up.

JAX's client aborts its process, with a stack trace, when the connection to the service breaks. Behind this forwarder it
hears nothing instead, and :mod:`sharding.launch.peers` has the time to end the process with one line. Proxy settings of
the environment do not matter to JAX either, whose connections all stay on this machine.
"""

import contextlib
import socket
import threading
import time


def open_shield(host: str, port: int) -> int:
    """Forward connections to a port of this machine, which is returned, to ``host:port``; until the process ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, host, port), name="shield", daemon=True).start()
    return listener.getsockname()[1]


def _accept(listener: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_connect, args=(near, host, port), name="shield", daemon=True).start()


def _connect(near: socket.socket, host: str, port: int) -> None:
    while True:
        try:
            far = socket.create_connection((host, port), timeout=10)
            break
        except OSError:
            # The service may start a moment later. How long to wait is the client's to say.
            time.sleep(0.05)
    far.settimeout(None)
    for connection in (near, far):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_forward, args=(near, far, True), name="shield-out", daemon=True).start()
    _forward(far, near, False)


def _forward(source: socket.socket, target: socket.socket, hangs_up: bool) -> None:
    """What JAX's client closes is closed; what the service closes, or no longer takes, is not."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            with contextlib.suppress(OSError):
                target.sendall(data)
    if hangs_up:
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
