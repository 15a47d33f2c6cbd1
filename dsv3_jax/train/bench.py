"""A training step measured: compile time, step time, tokens/s, model FLOP/s, memory."""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.planning import count_parameters, flops_per_token
from dsv3_jax.planning.devices import peak_flops
from dsv3_jax.planning.memory import plan_memory
from dsv3_jax.train.ema import MovingAverage
from dsv3_jax.train.hlo_text import parse_hlo
from dsv3_jax.train.profile import compile_step, profile_steps, random_batches
from dsv3_jax.train.state import TrainState, config_mesh, init_state
from dsv3_jax.train.step import Metrics, TrainStep, make_train_step
from dsv3_jax.train.step_table import Operation, Row


@dataclasses.dataclass(frozen=True)
class AverageBench:
    """What the moving average of parameters costs beside the steps."""

    every: int
    """``train.ema_every``."""
    step_ms: float
    """Mean of the timed steps: at one of ``every``, the device copies parameters, at all it folds in a share."""
    alone_ms: float
    """Mean of as many steps before them, without the average."""
    longest_wait_ms: float
    """That the device stood still until a share had come."""
    share_ms: float
    """From a step's end until the share that is folded in after the next one has come; median."""
    gb: float
    """Float32 parameters of this process; one part in ``every`` is a share."""

    def __str__(self) -> str:
        return (
            f"moving average, every {self.every} steps: {self.step_ms:.4g} ms a step (mean), {self.alone_ms:.4g} "
            f"without; of its {self.gb:.3g} GB a share came up in {self.share_ms:.4g} ms, for which the device waited "
            f"{self.longest_wait_ms:.3g} ms at most"
        )


@dataclasses.dataclass(frozen=True)
class StepBench:
    """What one configuration's training step costs.

    Steps are timed as a run makes them: the next one is handed to the device before the host waits for this one, so
    that the host's part overlaps. A time is that between the ends of two steps, by the host's clock.
    """

    preset: str
    device: str
    devices: int
    jax: str
    precision: str
    remat: str
    sequences: int
    seq_len: int
    micro_batch_size: int
    parameters: int
    """Trainable."""
    compile_seconds: float
    """Lowering in Python and XLA's compilation; little where the program was kept from an earlier run."""
    instructions: int
    """Of the compiled program, those inside fusions left out."""
    step_ms: float
    """Median."""
    step_ms_min: float
    step_ms_max: float
    steps: int
    tokens_per_second: float
    gflop_per_token: float
    """Model FLOPs by spec 2.4, causal, MTP included, recomputation not counted."""
    model_tflops: float
    """Of one device."""
    mfu: float | None
    """Share of the device's dense BF16 peak; None where that is not known."""
    peak_memory_gib: float | None
    """The allocator's own figure, one device; on a CPU, what XLA planned for the step."""
    loss_first: float
    """Cross entropy, mean over the batches at the first visit of each, nats."""
    loss_last: float
    """The same over the last visits."""
    memory_gib: dict[str, float]
    """The plan's six rows (:attr:`~dsv3_jax.planning.memory.MemoryPlan.table`), which sum to ``planned_memory_gib``."""
    planned_memory_gib: float
    compiled_memory_gib: float | None
    """What XLA planned: arguments and temporaries."""
    where: list[Row] | None
    """Where one step's time goes; None where no steps were profiled."""
    operations: list[Operation] | None
    """The longest instructions of that step."""
    average: AverageBench | None
    """Of a configuration with ``train.ema_decay``."""


def bench_step(
    config: Config,
    *,
    steps: int = 12,
    warmup: int = 4,
    profiled: int = 0,
    say: Callable[[str], None] = print,
    keep: Callable[["StepBench"], None] | None = None,
) -> StepBench:
    """Time ``steps`` training steps after ``warmup`` ones, on four batches of uniform random tokens, cycled.

    The loss of the batches must fall while they repeat: both ends are in the result (one batch's rises while others
    are learned, so that a single step tells nothing). With ``train.ema_decay`` the same steps are timed again while the
    moving average follows as in a run (over a number of ``steps`` that is a multiple of ``train.ema_every``, their mean
    is fair). Afterwards ``profiled`` steps go under the profiler; on a GPU these are compiled again, without command
    buffers: ``keep`` gets what is known before.
    """
    mesh = config_mesh(config)
    train, model = config.train, config.model
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    batches = random_batches(config)
    jax.block_until_ready(state.params)
    say(f"{config.name}: {count_parameters(model).trainable:,} parameters; compiling")
    begin = time.perf_counter()
    on_gpu = jax.default_backend() == "gpu"
    step.program = compiled = compile_step(step, state, batches[0], for_trace=bool(profiled) and not on_gpu)
    compile_seconds = time.perf_counter() - begin
    planned, instructions = compiled.memory_analysis(), len(parse_hlo(compiled.as_text()))
    say(f"compiled in {compile_seconds:.1f} s")
    state, times, seen = time_steps(step, state, batches, steps=steps, warmup=warmup)
    losses, timed = [float(metrics["loss"]) for metrics in seen], times[warmup - 1 :]
    median = statistics.median(timed)
    tokens = train.batch_size * train.seq_len
    per_token = flops_per_token(model, train.seq_len, mtp=model.num_nextn_predict_layers > 0)
    device = jax.devices()[0]
    flops = per_token * tokens / median / mesh.size
    peak = peak_flops(device.device_kind)
    average = None
    if train.ema_decay:
        state, average = _time_average(config, step, state, batches, timed, warmup=warmup, say=say)
    measured_peak = peak_memory(device, planned)
    plan = plan_memory(config, gpu=on_gpu)
    result = StepBench(
        preset=config.name,
        device=device.device_kind,
        devices=mesh.size,
        jax=jax.__version__,
        precision=train.precision,
        remat=train.remat,
        sequences=train.batch_size,
        seq_len=train.seq_len,
        micro_batch_size=step.micro_batch,
        parameters=count_parameters(model).trainable,
        compile_seconds=compile_seconds,
        instructions=instructions,
        step_ms=1e3 * median,
        step_ms_min=1e3 * min(timed),
        step_ms_max=1e3 * max(timed),
        steps=steps,
        tokens_per_second=tokens / median,
        gflop_per_token=per_token / 1e9,
        model_tflops=flops / 1e12,
        mfu=flops / peak if peak else None,
        peak_memory_gib=measured_peak,
        loss_first=statistics.fmean(losses[: len(batches)]),
        loss_last=statistics.fmean(losses[-len(batches) :]),
        memory_gib={name: size / 2**30 for name, size in plan.table.items()},
        planned_memory_gib=plan.total / 2**30,
        compiled_memory_gib=_compiled(planned),
        where=None,
        operations=None,
        average=average,
    )
    say(f"{result.step_ms:.1f} ms a step, {result.tokens_per_second:,.0f} tokens/s")
    if keep is not None:
        keep(result)
    if not profiled:
        return result
    say(f"profiling {profiled} steps")
    if on_gpu:
        step.program = compile_step(step, state, batches[0], for_trace=True)
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_steps(step, state, Path(folder), steps=profiled)[0]
    return dataclasses.replace(result, where=profile.rows, operations=profile.operations)


def _time_average(
    config: Config,
    step: TrainStep,
    state: TrainState,
    batches: Sequence[np.ndarray],
    alone: Sequence[float],
    *,
    warmup: int,
    say: Callable[[str], None],
) -> tuple[TrainState, AverageBench]:
    """As many steps as ``alone`` has seconds of, followed by the moving average; its first folds are warm-up too."""
    every = config.train.ema_every
    average = MovingAverage(config, state.params, say=say)
    warmup += 2 * every
    state, times, _ = time_steps(step, state, batches, steps=len(alone), warmup=warmup, follow=average.follow)
    average.wait()
    return state, AverageBench(
        every=every,
        step_ms=1e3 * statistics.fmean(times[warmup - 1 :]),
        alone_ms=1e3 * statistics.fmean(alone),
        longest_wait_ms=1e3 * average.longest_wait,
        share_ms=1e3 * (average.share_seconds or 0.0),
        gb=average.nbytes / 1e9,
    )


def time_steps(
    step: TrainStep,
    state: TrainState,
    batches: Sequence[np.ndarray],
    *,
    steps: int,
    warmup: int,
    follow: Callable[[TrainState, Metrics], None] | None = None,
) -> tuple[TrainState, list[float], list[Metrics]]:
    """Runs ``warmup + steps`` steps on batches that are cycled, one step in flight and the next batch
    on the devices as in a run.

    ``follow`` is called with what each step gave, before the next.

    Returns:
        The last state, the seconds between the ends of each two steps, and the metrics of every step.
    """
    ends, seen = [], []
    ahead = step.place(batches[0], state.step + 1, state.tokens)
    for i in range(warmup + steps + 1):
        if i < warmup + steps:
            batch, ahead = ahead, step.place(batches[(i + 1) % len(batches)], ahead.step + 1, ahead.seen)
            state, metrics = step(state, batch)
            seen.append(metrics)
            if follow is not None:
                follow(state, metrics)
        if i:
            jax.block_until_ready(seen[i - 1]["loss"])
            ends.append(time.perf_counter())
    jax.block_until_ready(state.params)
    return state, [after - before for before, after in itertools.pairwise(ends)], seen


def peak_memory(device: Any, planned: Any) -> float | None:
    """GiB: the allocator's own figure, or what XLA planned for a program where the device has none."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else _compiled(planned)


def _compiled(planned: Any) -> float | None:
    if planned is None:
        return None
    total = planned.argument_size_in_bytes + planned.temp_size_in_bytes + planned.output_size_in_bytes
    return (total - planned.alias_size_in_bytes) / 2**30
