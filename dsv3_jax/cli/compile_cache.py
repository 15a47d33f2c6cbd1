"""Compiled programs kept between commands: JAX's persistent compilation cache, on by default."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OFF = "off"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the options of every command that compiles for seconds have in common."""

    compile_cache: str = ""
    """Folder that compiled programs are kept in for the next time; empty is one in the user's cache, 'off' none."""


def keep_compiled(folder: str) -> Path | None:
    """Have JAX keep what takes it a second or more to compile, and look there first; where, or None.

    Settings of the environment count where the user chose nothing here: ``DSV3_COMPILE_CACHE`` is a choice like
    ``folder``; JAX's own ``JAX_COMPILATION_CACHE_DIR`` goes before it, and ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps
    nothing. Of a job's processes the first alone writes. A folder that cannot be made is told in a line on stderr, and
    nothing is kept.

    Args:
        folder: the user's choice; empty takes :func:`default_folder`, ``"off"`` keeps nothing.
    """
    import jax

    # JAX asks once in a process, at its first compilation, whether there is a cache: settled anew by each command.
    from jax.experimental.compilation_cache import compilation_cache

    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.jax_enable_compilation_cache:
        return None
    if not folder:
        given = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
        if given:
            return Path(given)
        folder = os.environ.get("DSV3_COMPILE_CACHE", "")
        if folder == OFF:
            return None
    path = Path(folder).expanduser() if folder else default_folder(os.environ)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"compiled programs are not kept: {path}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    compilation_cache.reset_cache()
    return path


def default_folder(environment: Mapping[str, str], processor: str | None = None) -> Path:
    """A folder of the user's cache for this kind of processor: programs for a CPU use what the one that compiled has.

    Args:
        environment: ``os.environ``; ``XDG_CACHE_HOME`` counts, else ``~/.cache``.
        processor: what tells kinds of processors apart; this machine's if not given.
    """
    home = environment.get("HOME") or os.path.expanduser("~")
    base = environment.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    kind = hashlib.sha256((processor or _processor()).encode()).hexdigest()[:8]
    return Path(base) / "dsv3_jax" / f"compiled-{platform.machine()}-{kind}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
