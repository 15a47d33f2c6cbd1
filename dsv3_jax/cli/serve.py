"""``dsv3 serve --checkpoint PATH``: an HTTP server that speaks OpenAI's protocol."""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv3_jax.cli.loading import Loading, load
from dsv3_jax.cli.main import DONE, FAILURE
from dsv3_jax.cli.overrides import parse_options
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Options(Loading):
    """Options of ``dsv3 serve``."""

    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own reach the world, and want a key."""
    port: int = 8000
    """0 takes any free one, which is told on stderr."""
    model_name: str = ""
    """Name told to clients; empty is the checkpoint folder's."""
    api_key_file: str = ""
    """File that holds the key which clients send; without one the variable DSV3_API_KEY is read."""
    thinking: bool = False
    """Chats open with <think> where they do not say."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_new_tokens: int = 4096
    """Tokens that one choice may write."""
    max_waiting: int = 128
    """Sequences that may stand in line behind those that run."""
    max_seconds: float = 600.0
    """How long a request may take."""
    compile_first: bool = False
    """Compile the programs of every size before the first request is taken, which takes minutes the first time; without
    it each is compiled when it is first needed."""
    log: Literal["critical", "error", "warning", "info", "debug"] = "info"
    """What the HTTP server tells on stderr, from that level on."""


def run(argv: Sequence[str]) -> int:
    """Serve until interrupted; the exit status."""
    options = parse_options("dsv3 serve", argv, "An HTTP server that speaks OpenAI's protocol.", Options)
    _check(options)
    name = _name(options)
    key = _key(options)
    if key is None and not _is_loopback(options.host):
        raise ConfigError(f"--host {options.host} is open to others: give a key with --api-key-file or DSV3_API_KEY")
    try:
        import uvicorn

        from dsv3_jax.inference.server import ServerOptions, make_app
    except ImportError as error:
        raise ConfigError(f"dsv3 serve needs the serve extra ({error.name}): pip install 'dsv3-jax[serve]'") from error
    with contextlib.ExitStack() as held:
        # A place that cannot be had is told before the model is loaded, and nobody else takes it meanwhile.
        sockets = _bind(options, held)
        loaded = load(options)
        if loaded is None:
            return FAILURE
        if options.compile_first:
            print(f"dsv3: {loaded.engine.runner.compile()} programs are ready", file=sys.stderr)
        told = ServerOptions(
            model_name=name,
            api_key=key,
            max_body=options.max_body,
            max_new_tokens=options.max_new_tokens,
            max_waiting=options.max_waiting,
            max_seconds=options.max_seconds,
            thinking=options.thinking,
        )
        server = uvicorn.Server(uvicorn.Config(make_app(loaded.engine, told), log_level=options.log))
        _listen(options, sockets)
        try:
            server.run(sockets=sockets)
        except KeyboardInterrupt:
            return DONE
        except SystemExit:  # uvicorn's 3, after it told why it could not start
            return FAILURE
        return DONE


def _check(options: Options) -> None:
    """Numbers that no server can have are told before anything is loaded."""
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port = {options.port} must be between 0 and 65535 (0 takes any free one)")
    if options.max_waiting < 0:
        raise ConfigError(
            f"--max-waiting = {options.max_waiting} must not be negative (0 turns away what cannot begin)"
        )
    for name in ("max_body", "max_new_tokens", "max_seconds"):
        value = getattr(options, name)
        if not value > 0:  # which nan is not either
            raise ConfigError(f"--{name.replace('_', '-')} = {value} must be greater than 0")


def _name(options: Options) -> str:
    """What clients are told that the model is called."""
    name = options.model_name or Path(options.checkpoint).resolve().name
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"--model-name = {name!a} is not UTF-8 text: give another") from error
    return name


def _bind(options: Options, held: contextlib.ExitStack) -> list[socket.socket]:
    """A socket for each address of the host, bound and not yet listening: until it does, clients are turned away.
    They are closed with ``held``."""
    port, absent = options.port, None
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(options.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                one = held.enter_context(socket.socket(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], port, *address[2:]))
            except OSError as error:
                # A name may stand for an address that this machine has not, such as IPv6's, beside one that it has.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
            else:
                bound.append(one)
                port = one.getsockname()[1]  # the same for all of them, where any would do
        if absent is not None and not bound:
            raise absent
    except (OSError, UnicodeError) as error:
        raise _unbindable(options, error) from error
    return bound


def _listen(options: Options, sockets: Sequence[socket.socket]) -> None:
    """Take connections, and say where."""
    try:
        for one in sockets:
            one.listen()
    except OSError as error:  # another server was bound at the same time, and listened first
        raise _unbindable(options, error) from error
    host = f"[{options.host}]" if ":" in options.host else options.host or "0.0.0.0"
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    logging.getLogger("uvicorn.error").info("Uvicorn running on %s (Press CTRL+C to quit)", where)


def _unbindable(options: Options, error: OSError | UnicodeError) -> ConfigError:
    told = f"--host {ascii(options.host)[1:-1]} --port {options.port} cannot be listened on"
    if isinstance(error, UnicodeError):
        return ConfigError(f"{told} (no name of a host): give --host an address of this machine")
    remedy = "give --host an address of this machine"
    if error.errno == errno.EADDRINUSE:
        remedy = "give another --port, or 0 for any free one"
    elif error.errno == errno.EACCES:
        remedy = "give a --port above 1023"
    return ConfigError(f"{told} ({error.strerror}): {remedy}")


def _key(options: Options) -> str | None:
    if not options.api_key_file:
        return os.environ.get("DSV3_API_KEY") or None
    try:
        key = Path(options.api_key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {options.api_key_file} cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api-key-file {options.api_key_file} is empty: write the key into it")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
