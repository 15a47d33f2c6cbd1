"""Which checkpoint of a run: the newest, one step's, or the best."""

from pathlib import Path
from typing import Literal

from dsv3_jax.checkpoint import best_checkpoint, list_checkpoints
from dsv3_jax.config import ConfigError

Weights = Literal["params", "ema", "best"]
"""As trained, their moving average, or as trained at the lowest validation."""


def choose_checkpoint(path: Path, step: int | None, weights: Weights) -> Path:
    """The folder ``checkpoints/STEP`` of a run, or ``path`` itself where it is one.

    Raises:
        ConfigError: it, or what was asked of it, is not there.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a run folder, the one that `dsv3 train --out` wrote")
    if (path / "manifest.json").is_file():
        if step is not None or weights == "best":
            wanted = "weights = 'best'" if step is None else f"step = {step}"
            raise ConfigError(f"{wanted} is for a run folder, and {path} is one checkpoint")
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ConfigError(
            f"{path} holds no complete checkpoint: name a run folder, the one that `dsv3 train --out` wrote"
        )
    if weights == "best":
        if step is not None:
            raise ConfigError(f"step = {step} and weights = 'best' name two checkpoints: give one of them")
        best = best_checkpoint(path / "checkpoints")
        if best is None:
            raise ConfigError(f"weights = 'best': no checkpoint of {path} has a validation; choose 'params'")
        return best
    if step is None:
        return found[-1]
    by_step = {int(folder.name): folder for folder in found}
    if step not in by_step:
        raise ConfigError(f"step = {step}: {path} has checkpoints of {', '.join(map(str, by_step))}")
    return by_step[step]
