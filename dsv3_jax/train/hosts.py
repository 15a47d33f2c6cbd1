"""A run by several processes: joined for it, one shared folder, one line in each when one of them fails."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.checkpoint import newest_checkpoint
from dsv3_jax.config import Config, ConfigError, to_toml
from sharding.launch import Alone, Launch, LaunchError, start

_SHARED_SECONDS = 20.0
"""How late a network file system may show what another machine wrote."""


@contextlib.contextmanager
def together(config: Config, out: Path, launch: Launch | None) -> Iterator[Alone]:
    """The run's other processes, joined before JAX looks for devices; what fails here is told to them.

    Raises:
        ConfigError: ``launch`` or the environment cannot be.
        LaunchError: the processes did not come together.
    """
    try:
        peers = start(launch, settings=to_toml(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    peers.advice = lambda: where_to_go_on(out)
    try:
        yield peers
    except BaseException as error:
        peers.fail(_one_line(error))
        raise
    peers.done()


def where_to_go_on(out: Path) -> str:
    """What the last complete checkpoint is."""
    newest = newest_checkpoint(out / "checkpoints")
    if newest is None:
        return "there is no complete checkpoint yet; the same command starts again"
    return f"the newest complete checkpoint is {newest}; the same command goes on from it"


def sign_folder(out: Path, peers: Alone) -> None:
    """Process 0 leaves the job's mark in the run folder, the others look for it there.

    Raises:
        ConfigError: this process sees another folder of that name.
    """
    mark = out / ".job"
    if peers.count == 1:
        return
    if peers.index == 0:
        mark.write_text(peers.token, encoding="utf-8")
        return
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (mark.is_file() and mark.read_text(encoding="utf-8") == peers.token):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--out = {str(out)!r} is not the same folder in processes 0 and {peers.index}: it must lie on storage "
                "that all of them share"
            )
        time.sleep(0.1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once"
    text = " ".join(str(error).split())[:500]
    known = isinstance(error, (ConfigError, LaunchError)) or type(error).__module__.startswith("dsv3_jax.")
    return text if known else f"{type(error).__name__}: {text}"
