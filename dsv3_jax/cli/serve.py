"""``dsv3 serve --checkpoint PATH``: an HTTP server that speaks OpenAI's protocol."""

import ipaddress
import os
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
    key = _key(options)
    if key is None and not _is_loopback(options.host):
        raise ConfigError(f"--host {options.host} is open to others: give a key with --api-key-file or DSV3_API_KEY")
    try:
        import uvicorn

        from dsv3_jax.inference.server import ServerOptions, make_app
    except ImportError as error:
        raise ConfigError(f"dsv3 serve needs the serve extra ({error.name}): pip install 'dsv3-jax[serve]'") from error
    loaded = load(options)
    if loaded is None:
        return FAILURE
    if options.compile_first:
        print(f"dsv3: {loaded.engine.runner.compile()} programs are ready", file=sys.stderr)
    told = ServerOptions(
        model_name=options.model_name or Path(options.checkpoint).resolve().name,
        api_key=key,
        max_body=options.max_body,
        max_new_tokens=options.max_new_tokens,
        max_waiting=options.max_waiting,
        max_seconds=options.max_seconds,
        thinking=options.thinking,
    )
    uvicorn.run(make_app(loaded.engine, told), host=options.host, port=options.port, log_level=options.log)
    return DONE


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
