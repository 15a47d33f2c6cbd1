"""``dsv3 bench precision PRESET --out DIR``: the same run in several precisions, losses compared."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import ConfigError, TrainConfig
from sharding.flags import apply_gpu_flags


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 bench precision``."""

    out: str = ""
    """Folder for precision.json, precision.png and the tokenizer."""
    precisions: str = "bf16,fp8"
    """Values of train.precision, comma-separated; the others are compared with the first. ``again`` is the first once
    more with its sums rounded in another order: what chance alone does to the loss."""


def run(argv: Sequence[str]) -> int:
    """Train once in each precision; 1 where FP8 is farther from the first than spec 11.5 allows."""
    description = "Train once in each precision from the same seed on the same batches, and compare smoothed losses."
    config, options = parse_config("dsv3 bench precision", argv, description, Options)
    names, known = options.precisions.split(","), get_args(get_type_hints(TrainConfig)["precision"])
    if len(names) < 2 or len(set(names)) < len(names) or not {*names} <= {*known, "again"} or names[0] == "again":
        raise ConfigError(
            f"--precisions = {options.precisions!r} must name two or more of {', '.join(known)}, each once, "
            "or one or more and then again"
        )
    if not options.out:
        raise ConfigError("--out is missing: the folder for what is measured")
    apply_gpu_flags(os.environ, config.mesh.devices, beside=config.mesh.sends_beside)
    from dsv3_jax.train.precision_bench import LIMIT, compare_precisions

    result = compare_precisions(config, Path(options.out), names)
    for line in result.runs:
        validation = "".join(f", validation in {name} {loss:.4f}" for name, loss in line.val_losses.items())
        rate = "" if line.tokens_per_second is None else f", {line.tokens_per_second:,.0f} tokens/s"
        print(f"{line.precision}: last loss {line.losses[-1]:.4f}{validation}{rate}")
    for name, difference in result.differences.items():
        told = ", ".join(f"{key} {100 * value:.4f}%" for key, value in difference.items())
        print(f"{name} against {names[0]}, EMA(0.9), last half of {result.steps} steps: {told}")
    return 1 if "fp8" in result.differences and result.differences["fp8"]["max"] > LIMIT else 0
