"""One row of ``dsv3 bench mesh`` measured: steps, a mesh's communication, the passes of a pipeline of one rank."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config, replace
from dsv3_jax.train.bench import peak_memory, time_steps
from dsv3_jax.train.hlo_text import parse_hlo
from dsv3_jax.train.mesh_profile import communication, waiting_share
from dsv3_jax.train.mesh_rows import ONE, ONE_RANK, STAGES, Row
from dsv3_jax.train.pipeline import Pipeline, step_table
from dsv3_jax.train.profile import compile_step, profile_steps, random_batches
from dsv3_jax.train.state import TrainState, abstract_state, config_mesh, init_state, placed_model
from dsv3_jax.train.step import TrainStep, make_train_step
from dsv3_jax.train.trace_events import read_events
from sharding.pipeline.partition import make_partition

Facts = dict[str, Any]
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much of a row is measured."""

    steps: int
    """Timed steps of a batch."""
    warmup: int
    """Steps before them."""
    profiled: int
    """Further steps of a mesh under the profiler; 0 leaves them out."""


def measure(row: Row, amount: Amount, *, say: Callable[[str], None], keep: Callable[[Facts], None]) -> Facts:
    """Times a row's steps from a fresh state on random tokens, on each of its batches; then what the row is there for:
    a mesh's communication from a profile, or the passes of a pipeline of one rank.

    Every program is compiled so that a profile tells its kernels apart (without CUDA graphs), and all are timed so.

    Args:
        row: what to measure.
        amount: how much.
        say: told what goes on.
        keep: given the facts so far after each part.

    Raises:
        ConfigError: more devices than there are.
        jax.errors.JaxRuntimeError: out of memory, among others.
    """
    config = row.config
    mesh = config_mesh(config)
    step = _step_of(row, mesh)
    begin = time.perf_counter()
    state: TrainState | None = init_state(config, mesh)
    jax.block_until_ready(state.params)
    facts: Facts = {"start_seconds": time.perf_counter() - begin}
    say("compiling")
    begin = time.perf_counter()
    compiled = _compiled(step, state)
    facts |= {"compile_seconds": time.perf_counter() - begin, "trials": []}
    step.program, planned = compiled, compiled.memory_analysis()
    for sequences in row.trials:
        say(f"compiled in {facts['compile_seconds']:.0f} s; timing steps of {sequences} sequences")
        part = step if sequences == config.train.batch_size else _smaller(step, sequences)
        state = state or init_state(part.config, mesh)
        batches = random_batches(part.config)
        state, times, seen = time_steps(part, state, batches, steps=amount.steps, warmup=amount.warmup)
        facts["trials"].append(_trial(part.config, times[amount.warmup - 1 :], seen))
        facts["peak_memory_gib"] = [peak_memory(one, planned) for one in mesh.local_devices]
        keep(facts)
        if row.name == ONE:
            state = None  # freed before the next one is made
    if row.name == STAGES and state is not None:
        say("timing passes")
        facts["passes_ms"] = pass_times(step, state)
    elif row.name != ONE and mesh.size > 1 and amount.profiled and state is not None:
        say(f"profiling {amount.profiled} steps")
        facts |= _profiled(step, state, amount.profiled)
    keep(facts)
    return facts


def compile_row(row: Row) -> float:
    """Compiles the program that :func:`measure` will run, without a state, for a cache of compiled programs to keep;
    seconds that it took."""
    mesh = config_mesh(row.config)
    step = _step_of(row, mesh)
    begin = time.perf_counter()
    _compiled(step, abstract_state(row.config, mesh))
    return time.perf_counter() - begin


def _step_of(row: Row, mesh: Mesh) -> TrainStep:
    step = make_train_step(row.config, mesh)
    return as_one_rank(step, *ONE_RANK[row.name]) if row.name in ONE_RANK else step


def _compiled(step: TrainStep, state: TrainState) -> Any:
    """In a thread of its own, which has no callers: programs are kept under a name that their lines are part of."""
    batch = random_batches(step.config, 1)[0]
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(compile_step, step, state, batch, for_trace=True).result()


def _smaller(step: TrainStep, sequences: int) -> TrainStep:
    """The same program for a smaller batch, its schedules those of a run of such batches."""
    part = make_train_step(replace(step.config, train={"batch_size": sequences}))
    part.program, part.most_micro_batches = step.program, step.most_micro_batches
    return part


def _trial(config: Config, times: list[float], seen: list[Any]) -> Facts:
    median, sequences = statistics.median(times), config.train.batch_size
    return {
        "sequences": sequences,
        "step_ms": 1e3 * median,
        "step_ms_min": 1e3 * min(times),
        "step_ms_max": 1e3 * max(times),
        "tokens_per_second": sequences * config.train.seq_len / median,
        "losses": [float(metrics["loss"]) for metrics in seen],
        "grad_norms": [float(metrics["grad_norm"]) for metrics in seen],
    }


def as_one_rank(step: TrainStep, *schedules: str) -> TrainStep:
    """The step run as a pipeline of one rank: the program that the stages of a mesh run, without its bubble or its
    messages. It can run the tables of all of ``schedules``: 1F1B and ZB1P have every kind of pass but a pair, DualPipeV
    has pairs of a pass in each half of the layers."""
    config = step.config
    layers, halves = config.model.n_moe_layers, "dualpipev" in schedules
    counts = (layers - layers // 2, layers // 2) if halves else (layers,)
    partition = make_partition(counts, 1, chunks=len(counts))
    tables = [step_table(_scheduled(config, name), step.most_micro_batches) for name in schedules]
    step._pipeline = Pipeline(config, placed_model(config), partition, *tables)
    return step


def _scheduled(config: Config, name: str) -> Config:
    return replace(config, mesh={"schedule": name, "waiting": -1})


def pass_times(step: TrainStep, state: TrainState) -> dict[str, float]:
    """Milliseconds of one micro-batch's passes through the whole model, by the names of spec 13.1: ``f``, ``b`` (input
    and weight gradients), ``bx`` (the input's alone) and ``w``; ``b`` and ``bx`` hold the head's passes. ``rest`` is a
    step without any pass.

    A table is run to its first ticks; a pass is the difference that its tick makes.

    Args:
        step: of :func:`as_one_rank` with 1F1B and ZB1P, compiled.
        state: used up.
    """
    pipeline = step._pipeline
    if pipeline is None:
        raise ValueError("a step without a pipeline has no passes to time")
    batch = random_batches(step.config, 1)[0]
    arrays, tokens, scalars = step.arguments(state, batch)
    until: dict[str, list[float]] = {}
    for name, most in (("1f1b", 2), ("zb1p", 3)):
        rows, _ = pipeline.rows(step_table(_scheduled(step.config, name), step.most_micro_batches))
        until[name] = []
        for ticks in range(most + 1):
            seconds = []
            for _ in range(_REPEATS):
                begin = time.perf_counter()
                arrays, metrics = step.program(arrays, tokens, scalars._replace(table=(rows, np.int32(ticks))))
                jax.block_until_ready((arrays, metrics))
                seconds.append(1e3 * (time.perf_counter() - begin))
            until[name].append(statistics.median(seconds))
    whole, parts = until["1f1b"], until["zb1p"]
    return {
        "f": whole[1] - whole[0],
        "b": whole[2] - whole[1],
        "bx": parts[2] - parts[1],
        "w": parts[3] - parts[2],
        "rest": whole[0],
    }


def _profiled(step: TrainStep, state: TrainState, steps: int) -> Facts:
    """Communication of the first device, and in a pipeline the share of the passes' time that devices wait."""
    on_gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        profile, _ = profile_steps(step, state, Path(folder), steps=steps)
        program = parse_hlo(step.program.as_text())
        # A CPU's trace does not tell its virtual devices apart.
        devices = range(step.mesh.size if on_gpu else 1)
        events = [read_events(profile.trace, device) for device in devices]
    total, exposed = communication(events[0], program, steps)
    facts: Facts = {
        "profiled_step_ms": profile.step_ms,
        "communication_ms": total,
        "exposed_ms": exposed if on_gpu else None,
        "where": [dataclasses.asdict(row) for row in profile.rows],
        "operations": [dataclasses.asdict(operation) for operation in profile.operations],
    }
    if step.config.mesh.pipe > 1 and on_gpu:
        facts["waiting"] = [waiting_share(one, program) for one in events]
    return facts
