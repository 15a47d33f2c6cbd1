"""``dsv3 bench precision PRESET --out DIR``: the same run in several precisions, losses compared."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import ConfigError, TrainConfig
from sharding.flags import apply_gpu_flags


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 bench precision``."""

    out: str = ""
    """Folder for precision.json, precision.png and the tokenizer."""
    precisions: str = "bf16,fp8"
    """Values of train.precision, comma-separated; the others are compared with the first. ``again`` is the first once
    more with its sums rounded in another order: what chance alone does to the loss."""
    seeds: str = ""
    """Values of train.seed, comma-separated: each gives a run in every precision, and differences are averaged over
    them. Its own alone where none is given."""
    resume: bool = False
    """Keep the finished runs of OUT/precision.json."""


def run(argv: Sequence[str]) -> int:
    """Train in each precision; 1 where a seed's FP8 is farther from the first than spec 11.5 allows."""
    description = "Train in each precision from the same seed on the same batches, and compare smoothed losses."
    config, options = parse_config("dsv3 bench precision", argv, description, Options)
    names, known = options.precisions.split(","), get_args(get_type_hints(TrainConfig)["precision"])
    if len(names) < 2 or len(set(names)) < len(names) or not {*names} <= {*known, "again"} or names[0] == "again":
        raise ConfigError(
            f"--precisions = {options.precisions!r} must name two or more of {', '.join(known)}, each once, "
            "or one or more and then again"
        )
    seeds = _seeds(options.seeds)
    if not options.out:
        raise ConfigError("--out is missing: the folder for what is measured")
    apply_gpu_flags(os.environ, config.mesh.devices, beside=config.mesh.sends_beside)
    keep_compiled(options.compile_cache)
    from dsv3_jax.train.precision_bench import compare_precisions
    from dsv3_jax.train.precision_report import LIMIT

    result = compare_precisions(config, Path(options.out), names, seeds, resume=options.resume)
    for line in result.runs:
        validation = "".join(f", validation in {name} {loss:.4f}" for name, loss in line.val_losses.items())
        rate = "" if line.tokens_per_second is None else f", {line.tokens_per_second:,.0f} tokens/s"
        print(f"{line.precision}, seed {line.seed}: last loss {line.losses[-1]:.4f}{validation}{rate}")
    for name, found in result.differences.items():
        error = "" if found.standard_error is None else f" +- {100 * found.standard_error:.4f}"
        validated = "" if found.validation is None else f", validation {100 * found.validation:+.4f}%"
        print(
            f"{name} against {names[0]}, EMA(0.9), last half of {found.steps} steps: max {100 * found.max:.4f}%, "
            f"mean {100 * found.mean:.4f}%, signed mean {100 * found.signed_mean:+.4f}{error}%{validated}"
        )
        for seed, pair in found.by_seed.items():
            print(
                f"  seed {seed}: max {100 * pair.max:.4f}%, signed mean {100 * pair.signed_mean:+.4f}%, "
                f"beyond {100 * LIMIT:g}% at {pair.beyond} of {found.steps - found.steps // 2} steps"
            )
    fp8 = result.differences.get("fp8")
    return 1 if fp8 and any(pair.beyond for pair in fp8.by_seed.values()) else 0


def _seeds(words: str) -> list[int]:
    try:
        seeds = [int(word) for word in words.split(",")] if words else []
    except ValueError:
        seeds = [-1]
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ConfigError(f"--seeds = {words!r} must be whole numbers from 0 on, comma-separated, each once")
    return seeds
