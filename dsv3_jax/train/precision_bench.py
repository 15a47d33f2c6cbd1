"""The same run in several precisions, step by step on the same data: how far their losses lie apart (spec 11.5)."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config import Config, replace, to_toml
from dsv3_jax.data import Data, prepare_data
from dsv3_jax.train import schedule
from dsv3_jax.train.batches import Batches, without_padding
from dsv3_jax.train.precision_report import Comparison, PrecisionRun, read_runs, write_comparison
from dsv3_jax.train.state import TrainState, config_mesh, init_state
from dsv3_jax.train.step import make_eval_step, make_train_step

AGAIN = "again"
"""Name of a second run in the first precision that differs from it by rounding alone: how far chance takes two runs."""

_IN_FLIGHT = 4


def compare_precisions(
    config: Config,
    out: Path,
    precisions: Sequence[str] = ("bf16", "fp8"),
    seeds: Sequence[int] = (),
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Train ``config`` in each precision, once a seed: from the same weights on the same batches.

    After its last step each run's weights are validated in every precision. Writes ``precision.json`` and
    ``precision.png`` into ``out``, ten times a run with the steps that all have made; no checkpoints, no samples. The
    precision :data:`AGAIN` is the first once more, with its sums rounded in another order.

    Args:
        config: of the runs, but for ``train.precision`` and ``train.seed``.
        out: folder, made where it is missing.
        precisions: the others are compared with the first.
        seeds: values of ``train.seed``, for weights and the order of the data; its own alone where empty.
        resume: keep the finished runs of a ``precision.json`` that is there.
        say: takes lines of progress.

    Raises:
        ConfigError: ``resume``, and the file is of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = _settings(config)
    runs = read_runs(out, settings) if resume else []
    todo = [
        (name, seed)
        for seed in seeds or [config.train.seed]
        for name in precisions
        if (name, seed) not in {(run.precision, run.seed) for run in runs}
    ]
    if runs:
        say(f"resumed: {len(runs)} runs are there, {len(todo)} to make")

    def write(*unfinished: PrecisionRun) -> Comparison:
        tokens = config.train.batch_size * config.train.seq_len
        firsts_first = sorted([*runs, *unfinished], key=lambda run: run.precision != precisions[0])
        return write_comparison(out, config.name, tokens, settings, firsts_first)

    if todo:
        data = prepare_data(config, out, say)
        trainer = _Trainer(config, data, precisions, write, say)
        for name, seed in todo:
            runs.append(trainer.run(name, seed))
            write()
    return write()


def _settings(config: Config) -> dict[str, str]:
    common = replace(config, train={"precision": "bf16", "seed": 0})
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "config": to_toml(common)}


class _Trainer:
    """Makes runs; what is compiled for one seed serves the others."""

    def __init__(
        self,
        config: Config,
        data: Data,
        precisions: Sequence[str],
        write: Callable[[PrecisionRun], Any],
        say: Callable[[str], None],
    ):
        self._config, self._data, self._write, self._say = config, data, write, say
        self._first, self._mesh = precisions[0], config_mesh(config)
        self._evaluated_in = [name for name in precisions if name != AGAIN]
        self._train_step = functools.cache(lambda name: make_train_step(self._config_in(name), self._mesh))
        self._eval_step = functools.cache(lambda name: make_eval_step(self._config_in(name), self._mesh))

    def run(self, name: str, seed: int) -> PrecisionRun:
        config = replace(self._config_in(name), train={"seed": seed})
        state, step = init_state(config, self._mesh), self._train_step(name)
        stream = dataclasses.replace(self._data, config=config).train_rows(0, 1, None)
        batches = Batches(config, stream, step, self._data.tokenizer.pad_id)
        total, losses, waiting = schedule.total_steps(config), list[float](), deque[Any]()
        begin, first_tokens, label = 0.0, 0, f"{name}, seed {seed}"
        self._say(f"{label}: begins")
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
                        self._say(f"{label}: step {len(losses)} of {total}, loss {losses[-1]:.4f}")
                        if len(losses) < total:
                            jax.block_until_ready(metrics["loss"])  # no step runs while the clock stands still
                            paused = time.perf_counter()
                            self._write(PrecisionRun(name, seed, losses, {}, None))
                            begin += time.perf_counter() - paused
        finally:
            stream.close()
        seconds = time.perf_counter() - begin
        rate = (state.tokens - first_tokens) / seconds if total > 1 else None
        return PrecisionRun(name, seed, losses, self._evaluate(state), rate)

    def _config_in(self, name: str) -> Config:
        changes: Mapping[str, Any] = {"precision": name}
        if name == AGAIN:
            changes = {"precision": self._first, "loss_chunk": max(1, self._config.train.loss_chunk // 2)}
        return replace(self._config, train=changes)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        if not len(self._data.validation_rows):
            return {}
        rows = without_padding(self._data.validation_rows, self._data.tokenizer.pad_id)
        found = {name: self._eval_step(name)(state, rows) for name in self._evaluated_in}
        return {name: nats / labels for name, (nats, labels) in found.items()}
