"""Runs of one configuration in several precisions: their differences, their file and their picture (spec 11.5)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dsv3_jax.config import ConfigError
from dsv3_jax.data.files import write_whole
from dsv3_jax.train.plots import write_precision_plot

EMA = 0.9
"""Coefficient of the average that losses are smoothed by before they are compared."""

LIMIT = 0.0025
"""Largest relative difference that FP8 training shall show."""

FILE = "precision.json"


@dataclasses.dataclass(frozen=True)
class PrecisionRun:
    """One run."""

    precision: str
    seed: int
    losses: list[float]
    """Main cross entropy of each step, nats."""
    val_losses: dict[str, float]
    """Nats per token of the validation rows after the last step, by the precision that computes them: the weights are
    the same, so that a difference is the forward pass's rounding alone. Empty without rows, or while it runs."""
    tokens_per_second: float | None
    """From the second step to the last; None where there is one, or while it runs."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one precision's smoothed losses lie from the first's over the last half of the steps, relative to them.

    With several seeds the lines of difference are averaged first: chance, which takes two runs apart that differ in
    rounding alone, averages out, what the precision does stays.
    """

    max: float
    """Largest magnitude."""
    mean: float
    """Mean of the magnitude."""
    signed_mean: float
    by_seed: dict[int, float]
    """``signed_mean`` of each seed alone."""
    standard_error: float | None
    """Of ``signed_mean``, from the spread of the seeds; None with one."""
    validation: float | None
    """Mean over seeds of the difference of validation losses, each precision's weights in that precision."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs, the first precision's first, and each other precision compared with it."""

    preset: str
    steps: int
    """That are compared."""
    tokens_per_step: int
    settings: dict[str, str]
    """What all runs have in common: device, jax and configuration."""
    runs: list[PrecisionRun]
    differences: dict[str, Difference]
    """By precision, of those that the first seed has: over the seeds that all of them have whole; while there is none,
    over the steps that the first seed has."""


def smoothed(losses: Sequence[float]) -> Float[np.ndarray, " steps"]:
    """Exponential moving average with coefficient 0.9, begun at the first loss."""
    line, value = [], losses[0]
    for loss in losses:
        value = EMA * value + (1 - EMA) * loss
        line.append(value)
    return np.array(line)


def write_comparison(
    out: Path, preset: str, tokens_per_step: int, settings: Mapping[str, str], runs: Sequence[PrecisionRun]
) -> Comparison:
    """Compares ``runs`` and writes ``precision.json`` and ``precision.png`` into ``out``."""
    names = {run.precision for run in runs if run.seed == runs[0].seed}
    seeds = _comparable(runs, names)
    found = [run for run in runs if run.seed in seeds and run.precision in names]
    steps = min(len(run.losses) for run in found)
    lines = {(run.precision, run.seed): smoothed(run.losses[:steps]) for run in found}
    first, *others = dict.fromkeys(run.precision for run in found)
    relative = {name: np.stack([lines[name, seed] / lines[first, seed] - 1 for seed in seeds]) for name in others}
    by_key = {(run.precision, run.seed): run for run in found}
    result = Comparison(
        preset=preset,
        steps=steps,
        tokens_per_step=tokens_per_step,
        settings=dict(settings),
        runs=list(runs),
        differences={
            name: _difference(
                dict(zip(seeds, relative[name][:, steps // 2 :], strict=True)),
                [(by_key[first, seed], by_key[name, seed]) for seed in seeds],
            )
            for name in others
        },
    )
    write_whole(out / FILE, json.dumps(dataclasses.asdict(result)) + "\n")
    curves = {name: np.mean([lines[name, seed] for seed in seeds], axis=0) for name in (first, *others)}
    write_precision_plot(out / "precision.png", curves, relative, LIMIT)
    return result


def read_runs(out: Path, settings: Mapping[str, str]) -> list[PrecisionRun]:
    """The runs of ``precision.json`` that were finished; none where there is no such file.

    Raises:
        ConfigError: it is no such file, or of other settings.
    """
    path = out / FILE
    if not path.exists():
        return []
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        runs, former = [PrecisionRun(**run) for run in written["runs"]], dict(written["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {path} is no file of this dsv3 bench precision") from error
    if other := [name for name, value in settings.items() if former.get(name) != value]:
        raise ConfigError(f"--resume: {path} is of other settings ({', '.join(other)}); name another --out")
    return [run for run in runs if run.tokens_per_second is not None]


def _comparable(runs: Sequence[PrecisionRun], wanted: Set[str]) -> list[int]:
    """The seeds that every wanted precision has whole, or else the first seed."""
    have: dict[int, set[str]] = {}
    for run in runs:
        if run.tokens_per_second is not None:
            have.setdefault(run.seed, set()).add(run.precision)
    return [seed for seed, names in have.items() if names >= wanted] or [runs[0].seed]


def _difference(
    lines: Mapping[int, Float[np.ndarray, " steps"]], pairs: Sequence[tuple[PrecisionRun, PrecisionRun]]
) -> Difference:
    line = np.mean(list(lines.values()), axis=0)
    by_seed = {seed: float(one.mean()) for seed, one in lines.items()}
    validated = [_validation_difference(*pair) for pair in pairs]
    several = len(by_seed) > 1
    return Difference(
        max=float(np.abs(line).max()),
        mean=float(np.abs(line).mean()),
        signed_mean=float(line.mean()),
        by_seed=by_seed,
        standard_error=float(np.std(list(by_seed.values()), ddof=1) / len(by_seed) ** 0.5) if several else None,
        validation=None if None in validated else float(np.mean(np.array(validated, float))),
    )


def _validation_difference(first: PrecisionRun, other: PrecisionRun) -> float | None:
    """Each in its own precision, or in the first's where the other has none of its own (a second run in it)."""
    if not first.val_losses or not other.val_losses:
        return None
    own = other.val_losses.get(other.precision, other.val_losses[first.precision])
    return own / first.val_losses[first.precision] - 1
