"""The model of a run folder: weights from one of its checkpoints, with configuration and tokenizer."""

from pathlib import Path
from typing import Literal, NamedTuple

from dsv3_jax.checkpoint import best_checkpoint, list_checkpoints, restore, verify
from dsv3_jax.config import Config, ConfigError, load_config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model import DeepSeekV3, abstract_model, merge_model, split_model

Weights = Literal["params", "ema", "best"]


class Run(NamedTuple):
    """A model ready to use."""

    model: DeepSeekV3
    """Float32 parameters on the default device."""
    config: Config
    tokenizer: Tokenizer


def load_run(path: str | Path, *, step: int | None = None, weights: Weights = "params") -> Run:
    """Model, configuration and tokenizer of a run. Optimizer state and other copies of the weights are not read.

    Args:
        path: run folder (``dsv3 train --out``), or one checkpoint of it, ``RUN/checkpoints/STEP``.
        step: the checkpoint of a run folder; None takes the newest.
        weights: ``params`` as trained, ``ema`` their moving average, ``best`` those of the checkpoint with the lowest
            validation.

    Raises:
        ConfigError: the run, the checkpoint or what was asked of it is not there.
        CheckpointError: the checkpoint is damaged.
    """
    chosen = _choose(Path(path), step, weights)
    try:
        config = load_config(chosen / "config.toml")
    except ConfigError:
        verify(chosen)  # names the damage, where that is the cause
        raise
    if weights == "ema" and not config.train.ema_decay:
        raise ConfigError(f"weights = 'ema': {path} keeps no moving average (train.ema_decay = 0); choose 'params'")
    name = "ema" if weights == "ema" else "params"
    graph, params, router_bias = split_model(abstract_model(config.model))
    arrays = restore(chosen, {name: params, "router_bias": router_bias}, partial=True)
    # A checkpoint has its tokenizer beside it where the run had one when it was written.
    tokenizer = Tokenizer.load(chosen if (chosen / "tokenizer.json").is_file() else chosen.parent.parent)
    return Run(merge_model(graph, arrays[name], arrays["router_bias"]), config, tokenizer)


def _choose(path: Path, step: int | None, weights: str) -> Path:
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
