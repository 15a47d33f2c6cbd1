"""How tests ask torch and transformers: one process of ``.venv-oracle``'s Python for a list of jobs (oracle.py)."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
SCRIPT = Path(__file__).with_name("oracle.py")


class OracleError(Exception):
    """A job was refused or failed; the message is the oracle's one line."""


class Tensor(NamedTuple):
    """What torch saw of a stored tensor."""

    dtype: str
    """torch's name: ``float32``, ``bfloat16``, ``float8_e4m3fn``."""
    shape: tuple[int, ...]
    sha256: str
    """Of its bytes in row-major order."""


@dataclass(frozen=True)
class Family:
    """A random model that transformers wrote, and what it answers."""

    name: str
    config: Mapping[str, Any]
    """As published (families.py); the folder's own config.json may say it in transformers' newer names."""
    folder: Path
    answers_file: Path
    again_file: Path
    """The same answers, of the folder read a second time."""

    @cached_property
    def answers(self) -> dict[str, np.ndarray]:
        """``tokens`` [2, 40], ``logits`` [2, 40, V], ``prompt`` [2, 12], ``greedy`` [2, 12], ``greedy_margin``, and
        ``mtp_logits`` [2, 39, V] where there is a prediction layer."""
        return load(self.answers_file)


def why_absent() -> str | None:
    """Why the oracle cannot be asked; None where it can."""
    stamp = PYTHON.parent.parent / ".installed"
    if not (PYTHON.exists() and stamp.exists()):
        return ".venv-oracle (torch, transformers) is missing: make it with `make oracle`"
    if stamp.read_text() != (ROOT / ".ci" / "oracle-constraints.txt").read_text():
        return ".venv-oracle is out of date: `make oracle`"
    return None


def ask(jobs: Sequence[Mapping[str, Any]], *, timeout: float = 300) -> None:
    """Run jobs one after another in one process; each writes its ``out``. Paths may be Path objects.

    Raises:
        OracleError: with the oracle's line, at the first job that fails; those before it have written theirs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "jobs.json"
        listed.write_text(json.dumps([dict(job) for job in jobs], default=str))
        command = [str(PYTHON), str(SCRIPT), "batch", str(listed)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=timeout, cwd=scratch
        )
    if done.returncode:
        raise OracleError(done.stderr.strip() or f"oracle ended with status {done.returncode}")


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    with np.load(path) as arrays:
        return dict(arrays)


def tensors(path: Path) -> dict[str, Tensor]:
    """By name, the tensors that a ``torch_load`` or ``safetensors_dump`` job described."""
    columns = load(path)
    rows = zip(columns["name"], columns["dtype"], columns["shape"], columns["sha256"], strict=True)
    return {str(name): Tensor(str(dtype), tuple(json.loads(str(shape))), str(sha)) for name, dtype, shape, sha in rows}
