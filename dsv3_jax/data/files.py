"""Writing a file whole or not at all."""

import contextlib
import os
from pathlib import Path

from dsv3_jax.config import ConfigError


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that ``path`` is either as it was before or complete, never a part.

    Raises:
        ConfigError: the disk is full or the folder cannot be written; what stood at ``path`` is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}; make room or choose another folder") from error
