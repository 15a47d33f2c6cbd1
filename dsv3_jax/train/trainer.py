"""A run from its configuration to its summary: data, steps, validation, checkpoints, resume."""

import contextlib
import dataclasses
import errno
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int64
from rich.console import Console

from dsv3_jax.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    newest_checkpoint,
    read_info,
    restore,
)
from dsv3_jax.config import Config, ConfigError, to_toml
from dsv3_jax.data import Data, RowStream, Tokenizer, merge_states, prepare_data
from dsv3_jax.data.baselines import predicted_bytes
from dsv3_jax.interop.pretrained import load_into, tokenizer_of
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.train import schedule
from dsv3_jax.train.batches import Batches, without_padding
from dsv3_jax.train.ema import MovingAverage, abstract_average
from dsv3_jax.train.finish import summarize
from dsv3_jax.train.hosts import sign_folder, together
from dsv3_jax.train.metrics import LAG, LOAD_FILE, MetricsQueue, Record, RunFiles, read_expert_load, read_metrics
from dsv3_jax.train.plain import to_stages
from dsv3_jax.train.progress import RunProgress
from dsv3_jax.train.run_folder import StopRequest, open_run_folder
from dsv3_jax.train.state import (
    TrainState,
    abstract_plain_state,
    config_layout,
    config_mesh,
    init_state,
    model_of,
    plain_state,
    staged_state,
)
from dsv3_jax.train.step import make_eval_step, make_train_step, out_of_memory
from sharding.launch import Alone, Launch

DONE, FAILED, INTERRUPTED = 0, 1, 130
_LARGEST_SAMPLED = 32 * 2**30
"""Bytes of float32 weights up to which a run on several devices ends with samples, written by one of them."""


class RunError(RuntimeError):
    """A run that cannot go on, told in one line."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What :func:`train` gives back."""

    config: Config
    out: Path
    state: TrainState
    tokenizer: Tokenizer
    summary: dict[str, Any]
    """What ``summary.json`` says; empty for a run that was interrupted."""
    status: int
    """Exit status: 0 done, 1 not better than the bigram model where that is asked, 130 interrupted after saving."""

    @property
    def metrics(self) -> list[Record]:
        """``metrics.jsonl``: one dict a step."""
        return read_metrics(self.out)

    @property
    def expert_load(self) -> tuple[Int64[np.ndarray, " points"], Float[np.ndarray, "points routers E"]]:
        """Steps at log points, and each expert's load relative to balance."""
        return read_expert_load(self.out / LOAD_FILE)

    @property
    def plots(self) -> list[Path]:
        """The pictures."""
        return sorted((self.out / "plots").glob("*.png"))

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return newest_checkpoint(self.out / "checkpoints")

    def model(self) -> DeepSeekV3:
        """The model with the run's weights."""
        plain = plain_state(self.config, self.state)
        return model_of(self.config, plain.params, plain.router_bias)


def train(
    config: Config,
    out: str | Path,
    *,
    stop_after: int | None = None,
    console: Console | None = None,
    launch: Launch | None = None,
) -> Run:
    """Train until the run's end, from the newest checkpoint in ``out`` if there is one.

    Args:
        config: the run.
        out: its folder; made if it is not there.
        stop_after: save and return after this optimizer step, as an interruption would; call again to go on.
        console: where progress is shown; standard output if not given.
        launch: of a job of several processes, what the environment does not say (:mod:`sharding.launch`).

    Raises:
        ConfigError: the user's mistake, other settings than the folder's run among them.
        LaunchError: the job's processes did not come together.
        CheckpointError: a damaged checkpoint, or one that cannot be written.
        RunError: non-finite steps without end, a full disk, too little device memory.
        KeyboardInterrupt: a second Ctrl-C.
    """
    out, console = Path(out), console or Console()
    total = schedule.total_steps(config)
    if config.train.bigram_gate and not config.train.eval_sequences:
        raise ConfigError("train.bigram_gate = true needs validation: set train.eval_sequences above 0")
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(together(config, out, launch))
        primary = peers.index == 0
        with peers.primary_first():
            changes = stack.enter_context(open_run_folder(config, out, primary=primary))
            sign_folder(out, peers)
        stack.enter_context(_in_one_line(config, out, peers))
        stop = stack.enter_context(StopRequest())
        shown = console if primary else Console(quiet=True)
        for line in changes:
            shown.print(f"changed since the run began: {line}", highlight=False, markup=False, soft_wrap=True)
        if note := schedule.ramp_note(config):
            shown.print(note, highlight=False, markup=False, soft_wrap=True)
        session = _Session(config, out, shown, stop, total, peers)
        return session.run(min(total, stop_after or total))


@contextlib.contextmanager
def _in_one_line(config: Config, out: Path, peers: Alone) -> Iterator[None]:
    """Failures of the machine as one line each."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        newest = newest_checkpoint(out / "checkpoints")
        kept = f"the newest complete checkpoint is {newest}" if newest else "there is no complete checkpoint yet"
        raise RunError(
            f"cannot write to {out}: {error.strerror}; {kept}; free space and run the same command again"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise RunError(out_of_memory(config)) from error
        if peers.count == 1:
            raise
        # An exchange with a process that is gone fails before, or a little after, its going is noticed.
        peers.await_verdict()
        raise RunError(f"an exchange between processes failed: {' '.join(str(error).split())[:300]}") from error


class _Session:
    """One process's part of a run, from what ``out`` holds to the end or an interruption."""

    def __init__(self, config: Config, out: Path, console: Console, stop: StopRequest, total: int, peers: Alone):
        self.config, self.out, self.console, self.stop, self.total = config, out, console, stop, total
        self.peers, self.primary = peers, peers.index == 0
        self.mesh = config_mesh(config)
        if config.train.init_from and newest_checkpoint(out / "checkpoints") is None:
            _require_same_tokenizer(config)
        # The first may train a tokenizer, which the others then read.
        with peers.primary_first():
            self.data: Data = prepare_data(config, out, self._say)
        self.val_bpb: float | None = None
        self.streak = 0
        self.seconds = 0.0
        self.average: MovingAverage | None = None
        self.state, saved = self._starting_point()
        self.first_step = self.saved_step = self.state.step
        self.stream: RowStream = self.data.train_rows(jax.process_index(), jax.process_count(), saved)
        self.train_step = make_train_step(config, self.mesh)
        self.batches = Batches(config, self.stream, self.train_step, self.data.tokenizer.pad_id)
        self.eval_step = make_eval_step(config, self.mesh)
        self.val_rows = without_padding(self.data.validation_rows, self.data.tokenizer.pad_id)
        self.queue = MetricsQueue(config.train.log_every)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _starting_point(self) -> tuple[TrainState, dict[str, Any] | None]:
        newest = newest_checkpoint(self.out / "checkpoints")
        if newest is None:
            state = self._fresh_state()
            if self.config.train.ema_decay:
                self.average = MovingAverage(self.config, state.params, self.mesh, say=self._say)
            return state, None
        wanted = abstract_plain_state(self.config, self.mesh).arrays()
        if self.config.train.ema_decay:
            wanted["ema"] = abstract_average(self.config, self.mesh)
        saved = restore(newest, wanted)
        info = read_info(newest)
        if info.step > self.total:
            raise ConfigError(f"the run in {self.out} is at step {info.step}, past its end at step {self.total}")
        self.val_bpb, self.seconds = info.val_bpb, info.extra["seconds"]
        self._say(f"going on from {newest}")
        if "ema" in saved:
            self.average = MovingAverage.restored(self.config, saved.pop("ema"), self.mesh, say=self._say)
        plain = TrainState(**saved, step=info.step, tokens=info.tokens)
        return staged_state(self.config, plain, self.mesh), info.data

    def _fresh_state(self) -> TrainState:
        state, source = init_state(self.config, self.mesh), self.config.train.init_from
        if not source:
            return state
        abstract = abstract_plain_state(self.config, self.mesh)
        try:
            given = load_into(source, {"params": abstract.params, "router_bias": abstract.router_bias})
        except ConfigError as error:
            raise ConfigError(f"train.init_from = {source!r}: {error}") from error
        self._say(f"weights from {source}")
        given = to_stages(config_layout(self.config, self.mesh), given)
        return dataclasses.replace(state, **given)

    def run(self, last_step: int) -> Run:
        """All steps up to ``last_step``, and the summary if that is the end."""
        tokenizer_json = self.out / "tokenizer.json"
        with contextlib.ExitStack() as stack:
            stack.callback(self.stream.close)
            self.files = RunFiles(self.out, self.first_step) if self.primary else None
            if self.files is not None:
                stack.enter_context(_closing(self.files))
            self.writer = stack.enter_context(
                CheckpointWriter(
                    self.out / "checkpoints",
                    keep=self.config.train.keep_checkpoints,
                    config_toml=to_toml(self.config),
                    tokenizer_json=tokenizer_json if tokenizer_json.exists() else None,
                )
            )
            self.progress = stack.enter_context(RunProgress(self.console, self.config, self.total, self.state.step))
            with self.stop.deferred():
                self._steps(last_step)
                self._save()
                self.writer.wait()
                self.peers.saved()
        if self.state.step == self.total > self.saved_step:
            raise RunError(
                f"the run ended at step {self.total} with a loss or gradient that is not finite; the newest checkpoint "
                f"is of step {self.saved_step} (0: none); go on in another --out with a lower --optim.learning-rate "
                f"(now {self.config.optim.learning_rate:g})"
            )
        if self.state.step < self.total:
            self._say(
                f"stopped after step {self.state.step} of {self.total}{self._why_stopped()}; the same command goes on "
                f"from step {self.saved_step}"
            )
            return Run(self.config, self.out, self.state, self.data.tokenizer, {}, INTERRUPTED)
        return self._end()

    def _steps(self, last_step: int) -> None:
        train = self.config.train
        if self.state.step < last_step:
            self.progress.status("compiling the training step")
        began = time.perf_counter()
        while self.state.step < last_step and not self._asked_to_stop():
            before, compiling = self.state.tokens, self.state.step == self.first_step
            batch = self.batches.take(self.state, last=self.state.step + 1 == last_step)
            self.state, metrics = self.train_step(self.state, batch)
            if self.average is not None:
                self.average.follow(self.state, metrics)
            step = self.state.step
            if compiling:
                jax.block_until_ready(metrics["loss"])
            measured = {}
            self.val_bpb = None
            if len(self.val_rows) and (step % train.eval_every == 0 or step == self.total):
                self.val_bpb = measured["val_bpb"] = self._validate()
            self.queue.push(metrics, self.state.tokens - before, **measured)
            if compiling:
                self.queue.start_clock()
            if step % train.log_every == 0:
                self._drain(LAG)
                self.writer.raise_if_failed()
            if step % train.checkpoint_every == 0 and step < last_step:
                self.seconds += time.perf_counter() - began
                began = time.perf_counter()
                self._save()
        self._drain(0)
        self.seconds += time.perf_counter() - began

    def _asked_to_stop(self) -> bool:
        """All processes stop after the same step: a signal to one does not reach the others."""
        return self.peers.stops_at(self.state.step, self.stop.asked)

    def _why_stopped(self) -> str:
        since = self.peers.asked_at
        if since is None:
            return ""
        who = f"{self.peers.asked_by} was asked to, and " if self.peers.asked_by else ""
        return f" ({who}all was saved {time.monotonic() - since:.1f} s later)"

    def _validate(self) -> float:
        jax.block_until_ready(self.state.params)
        began = time.perf_counter()
        nats, _ = self.eval_step(self.state, self.val_rows)
        bits = nats / math.log(2) / predicted_bytes(self.data.validation_rows, self.data.tokenizer)
        self.progress.validation(self.state.step, bits)
        self.queue.pause(time.perf_counter() - began)
        return bits

    def _drain(self, lag: int) -> None:
        records = self.queue.drain(lag)
        if not records:
            return
        if self.files is not None:
            self.files.write(records)
        self.progress.update(records)
        self.streak = records[-1]["nonfinite"]
        limit = self.config.train.max_nonfinite_steps
        for record in records:
            if record["nonfinite"] >= limit:
                raise RunError(self._diverged(record))

    def _diverged(self, record: Record) -> str:
        """The last good checkpoint is one from which a finite step was made: older than the last finite step."""
        with contextlib.suppress(CheckpointError):
            self.writer.wait()
        last_finite = record["step"] - record["nonfinite"]
        found = list_checkpoints(self.out / "checkpoints")
        good = [path for path in found if int(path.name) < last_finite]
        bad = [path.name for path in found if int(path.name) >= last_finite]
        told = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was saved before"
        if bad:
            told += f"; delete {', '.join(bad)} beside it, whose weights lead to this"
        return (
            f"step {record['step']}: loss or gradient was not finite {record['nonfinite']} steps in a row; {told}; "
            f"go on in another --out with --train.init-from {self.out} and a lower --optim.learning-rate (now "
            f"{self.config.optim.learning_rate:g})"
        )

    def _save(self) -> None:
        """Everything, after the metrics of the same steps are on the disk; never a bad state in a good one's place."""
        self._drain(0)
        step = self.state.step
        if step == self.saved_step:
            return
        if self.streak or not self._gives_finite_loss():
            self.progress.say(f"step {step}: not saved, its loss or gradient is not finite")
            return
        began = time.perf_counter()
        if self.files is not None:
            self.files.sync()
        average = {"ema": self.average.plain()} if self.average is not None else {}
        self.writer.save(
            plain_state(self.config, self.state, self.mesh).arrays() | average,
            step=step,
            tokens=self.state.tokens,
            data=_of_all_processes(self.batches.position()),
            val_bpb=self.val_bpb,
            extra={"seconds": self.seconds, "name": self.config.name},
        )
        self.saved_step = step
        self.queue.pause(time.perf_counter() - began)

    def _gives_finite_loss(self) -> bool:
        """The last step's metrics are of the weights before it: those after it are tried on validation text."""
        if self.val_bpb is not None or not len(self.val_rows):
            return self.val_bpb is None or math.isfinite(self.val_bpb)
        return math.isfinite(self.eval_step(self.state, self.val_rows[:1])[0])

    def _end(self) -> Run:
        if self.val_bpb is None and len(self.val_rows):
            self.val_bpb = self._validate()
        summary: dict[str, Any] = {}
        model = self._sampled_model()
        if self.primary:
            facts = {"val_bpb": self.val_bpb, "steps": self.state.step, "tokens": self.state.tokens}
            facts["seconds"] = round(self.seconds, 1)
            summary = summarize(self.config, self.out, self.data, model, facts, self.console)
        beaten = summary.get("beats_bigram_consumed")
        failed = self.config.train.bigram_gate and self.primary and not beaten
        if failed:
            self._say(
                "train.bigram_gate: validation does not beat the bigram model over the tokens consumed, hence status 1"
            )
        return Run(self.config, self.out, self.state, self.data.tokenizer, summary, FAILED if failed else DONE)

    def _sampled_model(self) -> DeepSeekV3 | None:
        """The model whole on this process's first device, from the shares of all; None where it is too large."""
        plain = plain_state(self.config, self.state, self.mesh)
        shared_out = (plain.params, plain.router_bias)
        if self.mesh.size > 1 and sum(leaf.nbytes for leaf in jax.tree.leaves(shared_out)) > _LARGEST_SAMPLED:
            return None
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(shared_out)
        return model_of(self.config, *jax.tree.map(lambda leaf: leaf.addressable_data(0), whole))


def _require_same_tokenizer(config: Config) -> None:
    """Weights know pieces of text by their ids."""
    source, given = config.train.init_from, config.data.tokenizer
    try:
        theirs = tokenizer_of(source)
    except ConfigError as error:
        raise ConfigError(f"train.init_from = {source!r}: {error}") from error
    if theirs is None:
        return
    try:
        same = given != "train" and Tokenizer.load(given).same_ids(theirs)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error
    if not same:
        raise ConfigError(
            f"data.tokenizer = {given!r} is not the tokenizer of train.init_from = {source!r}, whose weights know its "
            f"ids: give --data.tokenizer {source}"
        )


@contextlib.contextmanager
def _closing(files: RunFiles) -> Iterator[None]:
    """Close at the end; after a failure, what a full disk does not take is not a second failure."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            files.close()
        raise
    files.close()


def _of_all_processes(state: dict[str, Any]) -> dict[str, Any]:
    """Every process's data state as one."""
    if jax.process_count() == 1:
        return state
    own = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(own.size)))
    padded = np.pad(own, (0, int(sizes.max()) - own.size))
    every = np.asarray(multihost_utils.process_allgather(padded))
    return merge_states([json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)])
