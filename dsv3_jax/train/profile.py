"""A few training steps under JAX's profiler, and the table of where their time goes."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.planning.devices import FP8_OVER_BF16, peak_bandwidth, peak_flops
from dsv3_jax.planning.step_flops import step_flops
from dsv3_jax.train.hlo_text import parse_hlo
from dsv3_jax.train.state import TrainState, config_mesh, init_state
from dsv3_jax.train.step import TrainStep, make_train_step
from dsv3_jax.train.step_table import Operation, Row, busiest, tabulate
from dsv3_jax.train.trace_events import read_events, trace_file

KERNELS_ONE_BY_ONE = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options of a profiled step: what a CUDA graph replays does not say which operation it is."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps that were recorded."""

    rows: list[Row]
    """Of one step on the first device."""
    operations: list[Operation]
    """The longest instructions of that step."""
    trace: Path
    """What a viewer opens."""
    step_ms: float
    """By the host's clock, with the profiler and without command buffers."""


def random_batches(config: Config, count: int = 4) -> list[np.ndarray]:
    """``count`` batches of uniform random tokens, int32 [sequences, T + 1]."""
    draw, train = np.random.default_rng(config.train.seed), config.train
    shape = (train.batch_size, train.seq_len + 1)
    return [draw.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(count)]


def compile_step(step: TrainStep, state: TrainState, batch: np.ndarray, *, for_trace: bool = False) -> Any:
    """The step's program, compiled for these arguments; ``for_trace`` so that a trace tells its operations apart."""
    lowered = step.jitted.lower(*step.arguments(state, batch))
    if not for_trace:
        return lowered.compile()
    with own_names():
        return lowered.compile(compiler_options=KERNELS_ONE_BY_ONE if jax.default_backend() == "gpu" else None)


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Of compiled programs that were kept, takes only those with the same named scopes: the others tell where an
    operation came from when they were made, which may be before an edit."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def profile_run(config: Config, folder: Path, *, steps: int = 3, say: Callable[[str], None] = print) -> Profile:
    """:func:`profile_steps` of a fresh state on random tokens."""
    mesh = config_mesh(config)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    say("compiling the step that is profiled")
    step.program = compile_step(step, state, random_batches(config, 1)[0], for_trace=True)
    return profile_steps(step, state, folder, steps=steps)[0]


def profile_steps(step: TrainStep, state: TrainState, folder: Path, *, steps: int = 3) -> tuple[Profile, TrainState]:
    """Records ``steps`` steps after two more, on random tokens.

    Args:
        step: whose ``program`` is one of :func:`compile_step` with ``for_trace``.
        state: used up.
        folder: where the trace goes.
        steps: at least 1.
    """
    config, batches = step.config, random_batches(step.config)
    for batch in batches[:2]:
        state, _ = step(state, batch)
    jax.block_until_ready(state.params)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        began = time.perf_counter()
        for i in range(steps):
            state, _ = step(state, batches[i % len(batches)])
        jax.block_until_ready(state.params)
        seconds = time.perf_counter() - began
    events, program = read_events(trace_file(folder)), parse_hlo(step.program.as_text())
    rows = tabulate(events, program, steps, **roofline(config, step.mesh.size))
    return Profile(rows, busiest(events, program, steps), trace_file(folder), 1e3 * seconds / steps), state


def roofline(config: Config, devices: int) -> dict[str, Any]:
    """What :func:`~dsv3_jax.train.step_table.tabulate` takes to compare one device of ``devices`` with its peaks."""
    kind = jax.devices()[0].device_kind
    tokens = config.train.batch_size * config.train.seq_len / devices
    flops = {part: tokens * count for part, count in step_flops(config).items()}
    bf16, fp8 = peak_flops(kind), {"expert GEMM", "dense GEMM"} if config.train.precision == "fp8" else set()
    # Of float32 products the peak is another, and not known here.
    known = bf16 if config.train.precision != "fp32" else None
    peaks = (
        {part: known * (FP8_OVER_BF16 if part in fp8 else 1) for part in flops if part != "routing"} if known else {}
    )
    return {"flops": flops, "peaks": peaks, "bandwidth": peak_bandwidth(kind)}


def how_to_open(trace: Path) -> str:
    """Two ways to look at a trace."""
    root = trace.parents[3] if len(trace.parents) > 3 else trace.parent
    return (
        f"trace: {trace}\n"
        f"open it at https://ui.perfetto.dev (Open trace file), or: pip install xprof && xprof --port 6006 {root}"
    )
