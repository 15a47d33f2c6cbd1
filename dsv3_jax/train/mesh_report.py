"""What the rows of ``dsv3 bench mesh`` say about each other: losses against one device's, speed against its speed, and
a pipeline's bubble against the simulator's."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.planning.flops import block_flops, end_flops
from dsv3_jax.planning.stages import layers_of_stages
from dsv3_jax.train.mesh_rows import ONE, SHARE, STAGES, Row
from dsv3_jax.train.pipeline import step_table
from sharding.pipeline import Costs, lockstep, simulate

CHECKED = 3
"""First steps whose losses are compared."""
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-4, "fp8": 2e-3}
"""Largest relative difference of a loss from one device's, by ``train.precision``."""
NORM_TOLERANCE = 50.0
"""The same of the first step's norm of gradients, in units of the losses' tolerance."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One line of the table: one row, on one of its batches."""

    name: str
    what: str
    failed: str | None = None
    """Why there are no figures, or why they do not count."""
    differs: bool = False
    """Losses are not one device's."""
    sequences: int | None = None
    micro_batch: int | None = None
    step_ms: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_device: float | None = None
    of_one: float | None = None
    """Tokens/s a device over those of one device that takes the whole batch, layers as the preset has them."""
    of_share: float | None = None
    """The same, over one device that takes one device's share of the batch."""
    of_stages: float | None = None
    """The same, over one device that runs the stages' program with the whole batch."""
    loss_error: float | None = None
    """Largest relative difference of the first losses from one device's."""
    norm_error: float | None = None
    """Of the first step's norm of gradients."""
    bubble: float | None = None
    """Mean share of the passes' time in which devices wait."""
    bubble_from: str | None = None
    """``profile``: seen in one; ``times``: what the step takes beyond one device's passes shared out evenly."""
    predicted_bubble: float | None = None
    """By the simulator where neighbours meet after every action, as the executor runs a table."""
    ideal_bubble: float | None = None
    """By the simulator where ranks wait only for what they need."""
    predicted_step_ms: float | None = None
    """In ticks, and what a step takes besides its passes."""
    communication_ms: float | None = None
    exposed_ms: float | None = None
    """Communication beside which the first device does nothing else; in a pipeline it holds waits for neighbours."""
    peak_memory_gib: float | None = None
    """Of the device that took most."""
    compile_seconds: float | None = None


def figures(rows: Sequence[Row], facts: Mapping[str, Mapping[str, Any]], tolerance: float = 0.0) -> list[Figures]:
    """The table's lines of all rows that have facts, in the order of ``rows``.

    Args:
        rows: what was to run.
        facts: of :func:`~dsv3_jax.train.mesh_bench.measure`, by name; ``failed`` says why there are none.
        tolerance: of losses, relative; 0 takes :data:`TOLERANCE`.
    """
    found = []
    for row in rows:
        if row.name in facts:
            found += _lines(row, facts[row.name], facts, tolerance or TOLERANCE[row.config.train.precision])
    return found


def _lines(row: Row, own: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], tolerance: float) -> list[Figures]:
    trials = own.get("trials") or []
    if not trials:
        return [Figures(row.name, row.what, failed=own.get("failed", "nothing was measured"))]
    return [_line(row, own, trial, facts, tolerance) for trial in trials]


def _line(
    row: Row, own: Mapping[str, Any], trial: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], tolerance: float
) -> Figures:
    rate, sequences = trial["tokens_per_second"], trial["sequences"]
    losses, norm = _differences(trial, _trial(facts, ONE, sequences))
    if row.name in (ONE, SHARE):
        losses = norm = None
    wrong = losses is not None and norm is not None and not (losses <= tolerance and norm <= NORM_TOLERANCE * tolerance)
    reason = own.get("failed")
    if wrong:
        reason = f"losses differ from one device's by {losses:.1e}, the norm of gradients by {norm:.1e}"
    each = rate / row.devices

    def over(name: str, batch: int) -> float | None:
        reference = _trial(facts, name, batch)
        return each / reference["tokens_per_second"] if reference and row.name not in (ONE, SHARE) else None

    piped = row.config.mesh.pipe > 1
    return Figures(
        name=row.name,
        what=row.what,
        failed=reason,
        differs=wrong,
        sequences=sequences,
        micro_batch=row.config.train.micro_batch_size,
        step_ms=trial["step_ms"],
        tokens_per_second=rate,
        tokens_per_second_per_device=each,
        of_one=over(ONE, sequences),
        of_share=over(SHARE, sequences // row.devices),
        of_stages=over(STAGES, sequences) if piped else None,
        loss_error=losses,
        norm_error=norm,
        communication_ms=own.get("communication_ms"),
        exposed_ms=own.get("exposed_ms"),
        peak_memory_gib=max((size for size in own["peak_memory_gib"] if size is not None), default=None),
        compile_seconds=own.get("compile_seconds"),
        **(_bubbles(row, own, trial, facts) if piped else {}),
    )


def _trial(facts: Mapping[str, Mapping[str, Any]], name: str, sequences: int) -> Mapping[str, Any] | None:
    trials = facts.get(name, {}).get("trials") or []
    return next((trial for trial in trials if trial["sequences"] == sequences), None)


def _differences(trial: Mapping[str, Any], one: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    if one is None:
        return None, None
    pairs = zip(trial["losses"][:CHECKED], one["losses"][:CHECKED], strict=True)
    # Not max(): of a loss that is not a number it may choose the other.
    losses = float(np.max([abs(mine - theirs) / abs(theirs) for mine, theirs in pairs]))
    return losses, abs(trial["grad_norms"][0] - one["grad_norms"][0]) / abs(one["grad_norms"][0])


def _bubbles(
    row: Row, own: Mapping[str, Any], trial: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Bubbles measured and predicted, as fields of :class:`Figures`."""
    waiting, passes = own.get("waiting"), facts.get(STAGES, {}).get("passes_ms")
    found: dict[str, Any] = {}
    if waiting:
        found = {"bubble": sum(waiting) / len(waiting), "bubble_from": "profile"}
    if passes is None:
        return found
    mesh, train = row.config.mesh, row.config.train
    count = train.batch_size // (mesh.expert * mesh.data * train.micro_batch_size)
    table = step_table(row.config, count)
    costs = stage_costs(row.config, passes, table.schedule.n_stages)
    ideal, ticks = simulate(table.schedule, costs), lockstep(table, costs)
    work, rest = sum(ideal.busy) / mesh.pipe, passes["rest"] / row.devices
    if not waiting:
        found = {"bubble": 1 - work / (trial["step_ms"] - rest), "bubble_from": "times"}
    return found | {
        "predicted_bubble": 1 - work / ticks,
        "ideal_bubble": ideal.bubble,
        "predicted_step_ms": ticks + rest,
    }


def stage_costs(config: Config, passes: Mapping[str, float], stages: int) -> Costs:
    """Milliseconds of one micro-batch's passes on each of ``stages`` stages.

    One device's passes through the whole model are dealt out by the model's FLOPs; the head's own are all in the
    backward pass, where the executor makes them. An overlapped pair takes as long as its two passes, a message no time.

    Args:
        config: the run.
        passes: of :func:`~dsv3_jax.train.mesh_bench.pass_times`.
        stages: of the model.
    """
    model, seq_len = config.model, config.train.seq_len
    counts = np.asarray(layers_of_stages(model, seq_len, stages), float)
    (linear, attention), (first, last) = block_flops(model, seq_len, moe=True), end_flops(model, seq_len)
    at_first, at_last = np.eye(stages)[0], np.eye(stages)[-1]
    ahead = counts * (linear + attention) + at_first * sum(first)
    back = 2 * ahead + at_last * 3 * sum(last)
    later = counts * linear + at_first * first[0]
    # Where every backward pass is in two parts, the two are its cost; nor can a part cost more than the whole.
    in_two = config.mesh.schedule == "zb1p" or passes["w"] >= passes["b"]
    whole = passes["bx"] + passes["w"] if in_two else passes["b"]

    def dealt(time: float, shares: np.ndarray) -> tuple[float, ...]:
        return tuple(float(cost) for cost in time * shares / shares.sum())

    return Costs(f=dealt(passes["f"], ahead), b=dealt(whole, back), w=dealt(passes["w"], later))
