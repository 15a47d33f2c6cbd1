"""Golden points and properties 29 and 31 of the specification (sections 8.1, 21.1, 24, 28)."""

import math

import pytest

from dsv3_jax.config import Config, ConfigError, LossConfig, MeshConfig, OptimConfig, Segment, TrainConfig, load_config
from dsv3_jax.train import schedule

T = 10**12
AFTER_WARMUP = 1_000_000


def _multi_step() -> Config:
    pieces = (Segment(0.8, 1.0), Segment(0.9, 0.316), Segment(1.0, 0.1))
    return Config(
        train=TrainConfig(steps=1000, seq_len=10, batch_size=4),
        optim=OptimConfig(learning_rate=4.2e-4, warmup_steps=10, schedule=pieces, schedule_unit="fraction"),
    )


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(5, 2.2e-4), (11, 1.947324e-4), (12.15, 1.21e-4), (13, 6.339597e-5), (14.3, 2.2e-5), (14.7, 7.3e-6)],
)
def test_v3_learning_rate_golden_points(tokens, rate):
    config = load_config("deepseek_v3")
    assert schedule.learning_rate(config, AFTER_WARMUP, int(tokens * T)) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("edge", [10.0, 14.3])
def test_v3_learning_rate_is_continuous_where_the_cosine_begins_and_ends(edge):
    config = load_config("deepseek_v3")
    before, after = (schedule.learning_rate(config, AFTER_WARMUP, int(edge * T) + d) for d in (-1_000_000, 1_000_000))
    assert before == pytest.approx(after, rel=1e-6)


def test_v3_warmup_is_linear_in_steps_and_reaches_the_peak_exactly_at_step_2000():
    config = load_config("deepseek_v3")
    assert schedule.learning_rate(config, 1, 0) == pytest.approx(2.2e-4 / 2000, rel=1e-12)
    assert schedule.learning_rate(config, 1999, 0) < 2.2e-4
    assert schedule.learning_rate(config, 2000, 0) == 2.2e-4
    assert schedule.learning_rate(config, 2001, 0) == 2.2e-4


def test_v3_gamma_stops_at_14_3T_and_lambda_falls_at_10T():
    config = load_config("deepseek_v3")
    assert schedule.bias_update_speed(config, int(14.3 * T)) == 0.001
    assert schedule.bias_update_speed(config, int(14.3 * T) + 1) == 0.0
    assert schedule.mtp_weight(config, 10 * T) == 0.3
    assert schedule.mtp_weight(config, 10 * T + 1) == 0.1


def test_v3_batch_ramp_golden_point_and_ends():
    config = load_config("deepseek_v3")
    assert schedule.batch_size(config, 0) == 3072
    assert schedule.batch_size(config, 234_500_000_000) == 9216
    assert schedule.batch_size(config, 469_000_000_000) == 15360
    assert schedule.batch_size(config, 14 * T) == 15360


def test_v3_run_length_is_the_step_in_which_14_8T_are_reached():
    config = load_config("deepseek_v3")
    total = schedule.total_tokens(config)
    assert 14.8e12 <= total < 14.8e12 + 15360 * 4096
    steps = schedule.total_steps(config)
    assert steps > 14.8e12 / (15360 * 4096)
    assert steps < 14.8e12 / (15360 * 4096) + 469e9 / (3072 * 4096)


def test_batch_ramp_is_rounded_to_whole_micro_batches_of_every_device():
    ramp = (Segment(0.0, 8.0), Segment(1000.0, 64.0, "linear"))
    config = Config(
        train=TrainConfig(steps=100, batch_size=64, batch_ramp=ramp, micro_batch_size=4, seq_len=16),
        mesh=MeshConfig(data=2),
    )
    sizes = [schedule.batch_size(config, tokens) for tokens in range(0, 1200, 10)]
    assert sizes[0] == 8
    assert sizes[-1] == 64
    assert sizes == sorted(sizes)
    assert {size % 8 for size in sizes} == {0}


@pytest.mark.parametrize(
    ("share", "factor"), [(0.0, 1.0), (0.8, 1.0), (0.81, 0.316), (0.9, 0.316), (0.95, 0.1), (1.0, 0.1)]
)
def test_multi_step_is_1_then_0_316_then_0_1_of_the_peak(share, factor):
    config = _multi_step()
    tokens = round(share * schedule.total_tokens(config))
    assert schedule.learning_rate(config, 500, tokens) == pytest.approx(4.2e-4 * factor, rel=1e-12)


RAMPS = {
    "linear": (Segment(0.0, 2.0), Segment(500.0, 8.0, "linear"), Segment(math.inf, 8.0)),
    "steps": (Segment(200.0, 2.0), Segment(800.0, 4.0), Segment(math.inf, 8.0)),
    "steps, the last one twice": (
        Segment(200.0, 2.0),
        Segment(800.0, 4.0),
        Segment(900.0, 8.0),
        Segment(math.inf, 8.0),
    ),
    "linear, held, then more": (
        Segment(0.0, 2.0),
        Segment(300.0, 4.0, "linear"),
        Segment(900.0, 4.0),
        Segment(1e9, 8.0),
    ),
    "one value": (Segment(math.inf, 4.0),),
}


@pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
@pytest.mark.parametrize("limits", [{"steps": 50}, {"tokens": 2345.0}, {"steps": 40, "tokens": 2345.0}])
def test_a_run_is_as_long_as_its_steps_counted_one_by_one(ramp, limits):
    config = Config(train=TrainConfig(batch_size=8, batch_ramp=ramp, micro_batch_size=1, seq_len=10, **limits))
    tokens = steps = 0
    while steps < limits.get("steps", math.inf) and tokens < limits.get("tokens", math.inf):
        tokens += schedule.batch_size(config, tokens) * 10
        steps += 1
    assert schedule.total_tokens(config) == tokens
    assert schedule.total_steps(config) == steps


@pytest.mark.parametrize(("name", "divisor"), [("dualpipe", 2), ("dualpipev", 1)])
def test_a_ramp_keeps_to_numbers_of_micro_batches_that_the_schedule_runs(name, divisor):
    ramp = (Segment(0.0, 4.0), Segment(1000.0, 64.0, "linear"))
    config = Config(
        train=TrainConfig(steps=100, batch_size=64, batch_ramp=ramp, micro_batch_size=2, seq_len=16),
        mesh=MeshConfig(pipe=4, data=2, schedule=name),
    )
    counts = [schedule.batch_size(config, tokens) // 4 for tokens in range(0, 1200, 10)]
    assert counts[0] == 8
    assert counts[-1] == 16
    assert counts == sorted(counts)
    assert {count % divisor for count in counts} == {0}
    assert len(set(counts)) == 8 // divisor + 1
    note = schedule.ramp_note(config)
    assert note is not None
    assert "says 4 sequences at first; steps begin with 32: mesh.schedule = " in note


def test_v3_begins_on_its_own_mesh_with_as_many_micro_batches_as_dualpipe_takes():
    config = load_config("deepseek_v3", {"mesh": {"cluster": "h800_2048"}})
    assert config.mesh.pipe == 16
    sizes = [schedule.batch_size(config, int(tokens)) for tokens in (0, 100e9, 200e9, 469e9)]
    assert sizes == [4096, 5632, 8192, 15360]
    assert schedule.ramp_note(config) is not None
    assert schedule.ramp_note(load_config("deepseek_v3")) is None


def test_the_earlier_of_steps_and_tokens_ends_the_run():
    assert schedule.total_steps(Config(train=TrainConfig(tokens=1001.0, batch_size=1, seq_len=10))) == 101
    assert schedule.total_steps(Config(train=TrainConfig(steps=7, tokens=1001.0, batch_size=1, seq_len=10))) == 7
    assert schedule.total_tokens(Config(train=TrainConfig(steps=700, tokens=1001.0, batch_size=1, seq_len=10))) == 1010


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=r"train\.steps = 0 and train\.tokens = 0"):
        schedule.total_steps(Config())


def test_an_empty_schedule_of_a_loss_term_is_off():
    config = Config(loss=LossConfig(mtp_weight=(), bias_update_speed=()))
    assert schedule.mtp_weight(config, 5) == 0.0
    assert schedule.bias_update_speed(config, 5) == 0.0
    with pytest.raises(ValueError, match="empty schedule"):
        schedule.value_at((), 0)


def test_the_last_value_stays_after_the_last_piece():
    pieces = (Segment(10.0, 1.0), Segment(20.0, 0.5, "cosine"))
    assert schedule.value_at(pieces, 15) == pytest.approx(0.75)
    assert schedule.value_at(pieces, 10**9) == 0.5
