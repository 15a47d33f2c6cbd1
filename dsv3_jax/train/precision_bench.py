"""The same run in several precisions, step by step on the same data: how far their losses lie apart (spec 11.5)."""

import dataclasses
import functools
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dsv3_jax.config import Config, replace
from dsv3_jax.data import Data, prepare_data
from dsv3_jax.train import schedule
from dsv3_jax.train.batches import Batches, without_padding
from dsv3_jax.train.plots import write_precision_plot
from dsv3_jax.train.state import TrainState, config_mesh, init_state
from dsv3_jax.train.step import EvalStep, make_eval_step, make_train_step

EMA = 0.9
"""Coefficient of the average that losses are smoothed by before they are compared."""

LIMIT = 0.0025
"""Largest relative difference that FP8 training shall show."""

AGAIN = "again"
"""Name of a second run in the first precision that differs from it by rounding alone: how far chance takes two runs."""

_IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class PrecisionRun:
    """One precision's run."""

    precision: str
    losses: list[float]
    """Main cross entropy of each step, nats."""
    val_losses: dict[str, float]
    """Nats per token of the validation rows after the last step, by the precision that computes them: the weights are
    the same, so that a difference is the forward pass's rounding alone. Empty without rows, or while it runs."""
    tokens_per_second: float | None
    """From the second step to the last; None where there is one, or while it runs."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs in the order asked for, each compared with the first over the last half of the steps."""

    preset: str
    device: str
    jax: str
    steps: int
    tokens_per_step: int
    runs: list[PrecisionRun]
    differences: dict[str, dict[str, float]]
    """By precision: ``max``, ``mean`` of the magnitude and ``signed_mean`` of the relative difference of smoothed
    losses."""


def compare_precisions(
    config: Config, out: Path, precisions: Sequence[str] = ("bf16", "fp8"), say: Callable[[str], None] = print
) -> Comparison:
    """Train ``config`` once in each precision, from the same seed on the same batches.

    After its last step each run's weights are validated in every precision. Writes ``precision.json`` and
    ``precision.png`` into ``out``, ten times a run with the steps that all have made; no checkpoints, no samples. The
    precision :data:`AGAIN` is the first once more, with its sums rounded in another order.
    """
    out.mkdir(parents=True, exist_ok=True)
    data, runs = prepare_data(config, out, say), []
    evaluate = _evaluation(config, data, [name for name in precisions if name != AGAIN])

    def write(run: PrecisionRun) -> Comparison:
        return _write(config, out, [*runs, run])

    result = None
    for name in precisions:
        if name == AGAIN:
            changes: dict[str, Any] = {"precision": precisions[0], "loss_chunk": max(1, config.train.loss_chunk // 2)}
        else:
            changes = {"precision": name}
        run = _run(name, replace(config, train=changes), data, say, write, evaluate)
        result = write(run)
        runs.append(run)
    if result is None:
        raise ValueError("compare_precisions: no precision is named")
    return result


def _write(config: Config, out: Path, runs: list[PrecisionRun]) -> Comparison:
    steps = min(len(run.losses) for run in runs)
    smooth = {run.precision: smoothed(run.losses[:steps]) for run in runs}
    first = smooth[runs[0].precision]
    relative = {name: line / first - 1 for name, line in smooth.items() if name != runs[0].precision}
    result = Comparison(
        preset=config.name,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        steps=steps,
        tokens_per_step=config.train.batch_size * config.train.seq_len,
        runs=runs,
        differences={name: _summary(line[len(line) // 2 :]) for name, line in relative.items()},
    )
    (out / "precision.json").write_text(json.dumps(dataclasses.asdict(result)) + "\n", encoding="utf-8")
    write_precision_plot(out / "precision.png", smooth, relative, LIMIT)
    return result


def smoothed(losses: Sequence[float]) -> Float[np.ndarray, " steps"]:
    """Exponential moving average with coefficient 0.9, begun at the first loss."""
    line, value = [], losses[0]
    for loss in losses:
        value = EMA * value + (1 - EMA) * loss
        line.append(value)
    return np.array(line)


def _summary(difference: Float[np.ndarray, " steps"]) -> dict[str, float]:
    size = np.abs(difference)
    return {"max": float(size.max()), "mean": float(size.mean()), "signed_mean": float(difference.mean())}


def _evaluation(config: Config, data: Data, precisions: Sequence[str]) -> Callable[[TrainState], dict[str, float]]:
    """Validates a run's weights in every precision; each is compiled once, for all runs."""

    @functools.cache
    def step_in(precision: str) -> EvalStep:
        return make_eval_step(replace(config, train={"precision": precision}), config_mesh(config))

    def evaluate(state: TrainState) -> dict[str, float]:
        if not len(data.validation_rows):
            return {}
        rows = without_padding(data.validation_rows, data.tokenizer.pad_id)
        found = {name: step_in(name)(state, rows) for name in precisions}
        return {name: nats / labels for name, (nats, labels) in found.items()}

    return evaluate


def _run(
    name: str,
    config: Config,
    data: Data,
    say: Callable[[str], None],
    write: Callable[[PrecisionRun], Any],
    evaluate: Callable[[TrainState], dict[str, float]],
) -> PrecisionRun:
    mesh = config_mesh(config)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    stream = data.train_rows(0, 1, None)
    total, pad = schedule.total_steps(config), data.tokenizer.pad_id
    batches = Batches(config, stream, step, pad)
    losses: list[float] = []
    waiting: deque[Any] = deque()
    begin, first_tokens = 0.0, 0
    say(f"{name}: compiling")
    try:
        while state.step < total:
            state, metrics = step(state, batches.take(state, last=state.step + 1 == total))
            waiting.append(metrics["loss"])
            if state.step == 1:
                jax.block_until_ready(metrics["loss"])
                begin, first_tokens = time.perf_counter(), state.tokens
            while len(waiting) > (_IN_FLIGHT if state.step < total else 0):
                losses.append(float(waiting.popleft()))
                if len(losses) % max(1, total // 10) == 0:
                    say(f"{name}: step {len(losses)} of {total}, loss {losses[-1]:.4f}")
                    write(PrecisionRun(name, losses, {}, None))
    finally:
        stream.close()
    seconds = time.perf_counter() - begin
    rate = (state.tokens - first_tokens) / seconds if total > 1 else None
    return PrecisionRun(name, losses, evaluate(state), rate)
