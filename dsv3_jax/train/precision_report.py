"""Runs of one configuration in several precisions: their differences, their file and their picture (spec 11.5)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dsv3_jax.config import ConfigError
from dsv3_jax.data.files import write_whole
from dsv3_jax.train.plots import write_precision_plot

EMA = 0.9
"""Coefficient of the average that losses are smoothed by before they are compared."""

LIMIT = 0.0025
"""Largest relative difference that FP8 training shall show, in every pair of runs."""

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
class PairDifference:
    """One seed's: relative difference of smoothed losses over the last half of the steps."""

    max: float
    """Largest magnitude."""
    signed_mean: float
    beyond: int
    """Steps of that half at which the magnitude is above :data:`LIMIT`."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one precision's smoothed losses lie from the first's over the last half of the steps, relative to them.

    With several seeds the lines of difference are averaged first: chance, which takes two runs apart that differ in
    rounding alone, averages out, what the precision does stays.
    """

    steps: int
    """That are compared: those that all runs of both precisions have."""
    max: float
    """Largest magnitude."""
    mean: float
    """Mean of the magnitude."""
    signed_mean: float
    by_seed: dict[int, PairDifference]
    """Of each seed alone."""
    standard_error: float | None
    """Of ``signed_mean``, from the spread of the seeds; None with one."""
    validation: float | None
    """Mean over seeds of the difference of validation losses, each precision's weights in that precision."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs, the first precision's first, and each other precision compared with it."""

    preset: str
    tokens_per_step: int
    settings: dict[str, str]
    """What all runs have in common: device, jax and configuration."""
    runs: list[PrecisionRun]
    differences: dict[str, Difference]
    """By precision: over the seeds that it and the first precision have whole; while there is none, over the steps that
    one seed has so far."""


Pair = tuple[PrecisionRun, PrecisionRun]
"""A seed's run in the first precision and in another."""


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
    """Compares ``runs``, which begin with the first precision's, and writes both files into ``out``."""
    first, *others = dict.fromkeys(run.precision for run in runs)
    pairs = {name: found for name in others if (found := _pairs(runs, first, name))}
    result = Comparison(
        preset=preset,
        tokens_per_step=tokens_per_step,
        settings=dict(settings),
        runs=list(runs),
        differences={name: _difference(found) for name, found in pairs.items()},
    )
    write_whole(out / FILE, json.dumps(dataclasses.asdict(result)) + "\n")
    relative = {name: np.stack(list(_lines(found).values())) for name, found in pairs.items()}
    write_precision_plot(out / "precision.png", _curves(runs[0], pairs), relative, LIMIT)
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


def _pairs(runs: Sequence[PrecisionRun], first: str, name: str) -> dict[int, Pair]:
    """By seed: those that both precisions have whole, or else one of which both have begun."""
    by_key = {(run.precision, run.seed): run for run in runs}
    begun = {
        run.seed: (by_key[first, run.seed], run)
        for run in runs
        if run.precision == name and (first, run.seed) in by_key
    }
    whole = {seed: pair for seed, pair in begun.items() if all(run.tokens_per_second is not None for run in pair)}
    return whole or dict(list(begun.items())[:1])


def _steps(pairs: Mapping[int, Pair]) -> int:
    return min(len(run.losses) for pair in pairs.values() for run in pair)


def _lines(pairs: Mapping[int, Pair]) -> dict[int, Float[np.ndarray, " steps"]]:
    """By seed: the relative difference at each step."""
    steps = _steps(pairs)
    return {
        seed: smoothed(other.losses[:steps]) / smoothed(first.losses[:steps]) - 1
        for seed, (first, other) in pairs.items()
    }


def _curves(any_run: PrecisionRun, pairs: Mapping[str, Mapping[int, Pair]]) -> dict[str, Float[np.ndarray, " steps"]]:
    """Smoothed losses by precision, mean over the seeds that all of them have; one seed's where there is none."""
    if not pairs:
        return {any_run.precision: smoothed(any_run.losses)}
    shared = set.intersection(*map(set, pairs.values()))
    shown = {name: {seed: found[seed] for seed in shared or list(found)[:1]} for name, found in pairs.items()}
    steps = min(map(_steps, shown.values()))

    def mean(found: Mapping[int, Pair], which: int) -> Float[np.ndarray, " steps"]:
        return np.mean([smoothed(pair[which].losses[:steps]) for pair in found.values()], axis=0)

    others = {name: mean(found, 1) for name, found in shown.items()}
    return {any_run.precision: mean(next(iter(shown.values())), 0)} | others


def _difference(pairs: Mapping[int, Pair]) -> Difference:
    steps = _steps(pairs)
    halves = {seed: line[steps // 2 :] for seed, line in _lines(pairs).items()}
    line = np.mean(list(halves.values()), axis=0)
    by_seed = {
        seed: PairDifference(
            max=float(np.abs(one).max()), signed_mean=float(one.mean()), beyond=int((np.abs(one) > LIMIT).sum())
        )
        for seed, one in halves.items()
    }
    means = [pair.signed_mean for pair in by_seed.values()]
    validated = [_validation_difference(*pair) for pair in pairs.values()]
    return Difference(
        steps=steps,
        max=float(np.abs(line).max()),
        mean=float(np.abs(line).mean()),
        signed_mean=float(line.mean()),
        by_seed=by_seed,
        standard_error=float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
        validation=None if None in validated else float(np.mean(np.array(validated, float))),
    )


def _validation_difference(first: PrecisionRun, other: PrecisionRun) -> float | None:
    """Each in its own precision, or in the first's where the other has none of its own (a second run in it)."""
    if not first.val_losses or not other.val_losses:
        return None
    own = other.val_losses.get(other.precision, other.val_losses[first.precision])
    return own / first.val_losses[first.precision] - 1
