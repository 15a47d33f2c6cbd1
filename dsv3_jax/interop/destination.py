"""Where a conversion may be written: weights may be replaced where that is asked for, anything else never."""

import fcntl
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.folder_files import CARRIED

MANIFEST = "conversion.json"
"""Checksums and origin of what was converted, in the new folder."""


def check_destination(final: Path, force: bool) -> None:
    """Raise ConfigError where ``final`` may not be written."""
    if not final.name:
        raise ConfigError(f"DST = {str(final)!r} is not the name of a new folder")
    if not final.parent.is_dir():
        raise ConfigError(f"{final.parent} does not exist: make it first, {final.name} is made in it")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not force:
        raise ConfigError(f"{final} exists: choose another name, or --force to replace it")
    if reason := _irreplaceable(final):
        raise ConfigError(f"{final} {reason}, so --force does not replace it: choose another name")


def check_apart(source: Path, final: Path) -> None:
    """Raise ConfigError where ``source`` is ``final`` or lies in it: what replaces one would delete the other."""
    if _lies_in(source, final):
        raise ConfigError(f"DST = {str(final)!r} is or holds SRC = {str(source)!r}: name DST elsewhere")


def _lies_in(inner: Path, outer: Path) -> bool:
    path = inner.resolve()
    return outer.exists() and any(parent.exists() and parent.samefile(outer) for parent in (path, *path.parents))


def _irreplaceable(final: Path) -> str:
    """Why what is at ``final`` is more than weights; empty where it is weights and nothing else."""
    if not final.is_dir():
        return "is no folder"
    if _in_use(final):
        return "is in use by another process"
    converted = _converted_files(final)
    if (final / "metrics.jsonl").exists() or (converted is None and (final / "checkpoints").exists()):
        return "is a run of dsv3 train"
    if (final / "manifest.json").exists():
        return "is a checkpoint of dsv3 train"
    if converted is not None:
        there = (path for path in sorted(final.rglob("*")) if path.is_symlink() or not path.is_dir())
        strange = (name for path in there if (name := path.relative_to(final).as_posix()) not in converted)
    else:
        strange = (path.name for path in sorted(final.iterdir()) if path.is_dir() or not _matches(path.name, _HF_FILES))
    if name := next(strange, ""):
        return f"holds {name}, which is not of a folder of weights"
    names = [path.name for path in final.iterdir()]
    whole = converted is not None or ("config.json" in names and any(_matches(name, _HF_WEIGHTS) for name in names))
    return "" if whole else "holds no weights"


_LOCK = ".lock"
"""Held by ``dsv3 train`` in its run folder."""
_HF_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HF_FILES = (
    *_HF_WEIGHTS,
    *CARRIED,
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json", MANIFEST, _LOCK),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
)
"""What a Hugging Face folder of weights is made of."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _in_use(folder: Path) -> bool:
    """Whether another process trains in it."""
    if not (folder / _LOCK).is_file():
        return False
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _converted_files(folder: Path) -> set[str] | None:
    """Every file of a checkpoint of ours that ``convert`` wrote; None where it wrote none or training went on in it."""
    steps = list(folder.glob("checkpoints/*"))
    if len(steps) != 1:
        return None
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sealed = json.loads((steps[0] / "manifest.json").read_text(encoding="utf-8"))
        ours = (told["layout"], str(told["step"])) == ("orbax", steps[0].name)
        ours = ours and {name.partition("/")[0] for name in sealed["arrays"]} <= {"params", "router_bias", "scale_inv"}
        inside = {f"checkpoints/{steps[0].name}/{name}" for name in ("manifest.json", *sealed["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return inside | {"config.toml", MANIFEST, _LOCK} if ours else None
