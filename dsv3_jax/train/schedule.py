"""Schedules as pure host-side functions of consumed tokens, in Python floats (spec 8.1, 8.2, 21.1).

Consumed tokens are those before the step at hand: the first step sees 0. Only the warm-up counts steps, from 1.
"""

import functools
import math

from dsv3_jax.config import Config, ConfigError, Schedule, schedulable


def value_at(schedule: Schedule, tokens: int | float, *, total: int | float | None = None) -> float:
    """Value of a schedule after ``tokens`` consumed tokens.

    A piece owns its end: at ``tokens == until`` its own value holds, so that V3's rate at 10T is still the peak. After
    the last piece its value stays.

    Args:
        schedule: pieces in order; must not be empty.
        tokens: consumed tokens.
        total: tokens of the whole run, when ``until`` is a share of it; ``None`` when ``until`` counts tokens.

    Raises:
        ValueError: an empty schedule.
    """
    if not schedule:
        raise ValueError("an empty schedule has no value")
    scale = 1.0 if total is None else total
    start, before = 0.0, schedule[0].value
    for piece in schedule:
        end = piece.until * scale
        if tokens <= end:
            if piece.shape == "constant":
                return piece.value
            share = (tokens - start) / (end - start) if end > start else 1.0
            if piece.shape == "linear":
                return before + (piece.value - before) * share
            return piece.value + 0.5 * (before - piece.value) * (1.0 + math.cos(math.pi * share))
        start, before = end, piece.value
    return before


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 1) after ``tokens`` consumed tokens (spec 8.1).

    The linear warm-up factor is ``min(1, step / warmup_steps)``: the peak is reached exactly at ``warmup_steps``.
    """
    optim = config.optim
    warmup = min(1.0, step / optim.warmup_steps) if optim.warmup_steps else 1.0
    factor = 1.0
    if optim.schedule:
        total = total_tokens(config) if optim.schedule_unit == "fraction" else None
        factor = value_at(optim.schedule, tokens, total=total)
    return optim.learning_rate * factor * warmup


def mtp_weight(config: Config, tokens: int) -> float:
    """Lambda of the MTP loss after ``tokens`` consumed tokens; 0 for an empty schedule."""
    return value_at(config.loss.mtp_weight, tokens) if config.loss.mtp_weight else 0.0


def bias_update_speed(config: Config, tokens: int) -> float:
    """Gamma of the router bias update after ``tokens`` consumed tokens; 0 for an empty schedule."""
    return value_at(config.loss.bias_update_speed, tokens) if config.loss.bias_update_speed else 0.0


def batch_size(config: Config, tokens: int) -> int:
    """Sequences of the step that follows ``tokens`` consumed tokens.

    The ramp is rounded to the nearest whole number of micro-batches that the mesh's schedule can run (the published
    increments are UNCONFIRMED, spec 8.1), at most ``train.batch_size``; :func:`ramp_note` tells where it begins higher.
    """
    train = config.train
    if not train.batch_ramp:
        return train.batch_size
    lane = config.mesh.expert * config.mesh.data * train.micro_batch_size
    fewest, divisor = schedulable(config.mesh)
    unit = lane * divisor
    wanted = value_at(train.batch_ramp, tokens)
    return min(train.batch_size, max(lane * fewest, unit * math.floor(wanted / unit + 0.5)))


def ramp_note(config: Config) -> str | None:
    """One line where the batch-size ramp begins with more sequences than it says; None elsewhere."""
    first = batch_size(config, 0)
    if not config.train.batch_ramp or first <= (said := value_at(config.train.batch_ramp, 0)):
        return None
    mesh, micro = config.mesh, config.train.micro_batch_size
    count = first // (mesh.expert * mesh.data * micro)
    return (
        f"train.batch_ramp says {said:g} sequences at first; steps begin with {first}: mesh.schedule = "
        f"{mesh.schedule!r} on {mesh.pipe} ranks, {count} micro-batches of {micro} on {mesh.expert * mesh.data} devices"
    )


@functools.lru_cache(maxsize=16)
def _length(config: Config) -> tuple[int, int]:
    """Steps and tokens of the whole run; the ramp is walked step by step, the constant rest is arithmetic."""
    train = config.train
    if not train.steps and not train.tokens:
        raise ConfigError("train.steps = 0 and train.tokens = 0 leave the run without an end: set one of them")
    step_limit = train.steps or math.inf
    token_limit = train.tokens or math.inf
    ramp = train.batch_ramp
    while len(ramp) > 1 and ramp[-1].shape == "constant" and ramp[-1].value == ramp[-2].value:
        ramp = ramp[:-1]
    if ramp and ramp[-1].shape == "constant":
        ramp = ramp[:-1]
    ramp_end = ramp[-1].until if ramp else -1.0
    steps = tokens = 0
    while tokens <= ramp_end and steps < step_limit and tokens < token_limit:
        tokens += batch_size(config, tokens) * train.seq_len
        steps += 1
    per_step = batch_size(config, tokens) * train.seq_len
    left = step_limit - steps
    if token_limit < math.inf:
        left = min(left, max(0, math.ceil((int(token_limit) - tokens) / per_step)))
    return int(steps + left), int(tokens + left * per_step)


def total_steps(config: Config) -> int:
    """Optimizer steps of the run: ``train.steps`` or the step in which ``train.tokens`` are reached, the earlier.

    Raises:
        ConfigError: neither is set.
    """
    return _length(config)[0]


def total_tokens(config: Config) -> int:
    """Tokens that the run has consumed at its end; the scale of schedules in fractions.

    Raises:
        ConfigError: neither ``train.steps`` nor ``train.tokens`` is set.
    """
    return _length(config)[1]
