"""What rows of ``dsv3 bench mesh`` say about each other: losses, shares of one device's speed, bubbles."""

import math

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.train.mesh_report import TOLERANCE, figures, stage_costs
from dsv3_jax.train.mesh_rows import make_rows
from sharding.pipeline import Costs, make_schedule, simulate

BENCH = load_config("bench_3b")
MADE = {row.name: row for row in make_rows(BENCH, 4).run}
FLAT, PIPED = MADE["one"].trials
PASSES = {"f": 60.0, "b": 130.0, "bx": 90.0, "w": 45.0, "rest": 40.0}


def trial(sequences, ms, losses=(10.4, 10.5, 10.6, 10.0), norm=2.0):
    return {
        "sequences": sequences,
        "step_ms": ms,
        "step_ms_min": ms,
        "step_ms_max": ms,
        "tokens_per_second": sequences * 4096 / ms * 1e3,
        "losses": list(losses),
        "grad_norms": [norm] * 4,
    }


def measured(*trials, **more):
    return {"compile_seconds": 50.0, "trials": list(trials), "peak_memory_gib": [50.0, 51.0]} | more


def lines(facts, tolerance=0.0, rows=MADE):
    return {(line.name, line.sequences): line for line in figures(list(rows.values()), facts, tolerance)}


ONE = measured(trial(FLAT, 800.0), trial(PIPED, 3200.0))


def test_speed_is_told_against_one_device_with_the_whole_batch_and_with_a_share_of_it():
    facts = {"one": ONE, "one_share": measured(trial(4, 205.0)), "expert": measured(trial(FLAT, 220.0))}
    found = lines(facts)
    expert = found["expert", FLAT]
    assert expert.tokens_per_second == pytest.approx(FLAT * 4096 / 0.22)
    assert expert.tokens_per_second_per_device == pytest.approx(expert.tokens_per_second / 4)
    assert expert.of_one == pytest.approx(800 / 4 / 220)
    assert expert.of_share == pytest.approx(205 / 220)
    assert expert.of_stages is None
    assert expert.peak_memory_gib == 51.0
    assert found["one", FLAT].of_one is None
    assert list(found) == [("one", FLAT), ("one", PIPED), ("expert", FLAT), ("one_share", 4)]


@pytest.mark.parametrize(
    ("losses", "norm", "differs"),
    [
        ((10.4, 10.5, 10.6, 11.0), 2.0, False),  # the fourth is not compared
        ((10.4, 10.5001, 10.6, 10.0), 2.0, False),
        ((10.4, 10.5, 10.604, 10.0), 2.0, True),
        ((10.4, 10.5, 10.6, 10.0), 2.1, True),
        ((10.4, math.nan, 10.6, 10.0), 2.0, True),
        ((10.4, 10.5, 10.6, 10.0), math.nan, True),
    ],
)
def test_a_row_whose_losses_are_not_one_devices_has_failed(losses, norm, differs):
    facts = {"one": ONE, "data": measured(trial(FLAT, 210.0, losses, norm))}
    line = lines(facts)["data", FLAT]
    assert line.differs == differs
    assert (line.failed is not None) == differs
    assert line.step_ms == 210.0, "and is shown"


def test_a_tolerance_that_is_given_counts():
    facts = {"one": ONE, "data": measured(trial(FLAT, 210.0, (10.4, 10.5, 10.604, 10.0)))}
    assert not lines(facts, tolerance=1e-3)["data", FLAT].differs
    assert TOLERANCE["bf16"] < 1e-3


def test_losses_are_compared_on_the_same_batch():
    other = measured(trial(FLAT, 800.0, (1.0, 1.0, 1.0)), trial(PIPED, 3200.0))
    assert not lines({"one": other, "1f1b": measured(trial(PIPED, 1000.0))})["1f1b", PIPED].differs


def test_rows_without_figures_say_why():
    facts = {"one": ONE, "expert": {"failed": "out of memory"}, "data": {}}
    found = lines(facts)
    assert found["expert", None].failed == "out of memory"
    assert found["data", None].failed == "nothing was measured"


def test_without_its_reference_a_row_is_not_called_equal():
    line = lines({"one": {"failed": "out of memory"}, "data": measured(trial(FLAT, 210.0))})["data", FLAT]
    assert (line.loss_error, line.of_one, line.failed) == (None, None, None)


def test_one_devices_passes_are_dealt_out_to_stages():
    costs = stage_costs(MADE["1f1b"].config, PASSES, 4)
    for of, whole in ((costs.f, "f"), (costs.b, "b"), (costs.w, "w")):
        assert sum(of) == pytest.approx(PASSES[whole])
    assert isinstance(costs.b, tuple)
    assert isinstance(costs.f, tuple)
    # The head is all in the last stage's backward pass; its layers are fewer for it.
    assert costs.b[-1] / costs.f[-1] > costs.b[1] / costs.f[1]
    assert costs.b[1] / costs.f[1] == pytest.approx(costs.b[2] / costs.f[2])
    split = stage_costs(MADE["zb1p"].config, PASSES, 4)
    assert isinstance(split.b, tuple)
    assert sum(split.b) == pytest.approx(90 + 45), "the two parts of a pass that is always in two"
    odd = stage_costs(MADE["dualpipe"].config, PASSES | {"w": 140.0}, 4)
    assert isinstance(odd.b, tuple)
    assert isinstance(odd.w, tuple)
    assert all(b > w for b, w in zip(odd.b, odd.w, strict=True)), "no pass takes less than no time"


def test_a_bubble_stands_beside_the_simulators():
    schedule = make_schedule("1f1b", 4, 16)
    costs = stage_costs(MADE["1f1b"].config, PASSES, 4)
    line = simulate(schedule, costs)
    step = line.makespan + PASSES["rest"] / 4
    facts = {"one": ONE, "stages": measured(trial(PIPED, 3500.0), passes_ms=PASSES)}
    found = lines(facts | {"1f1b": measured(trial(PIPED, step))})["1f1b", PIPED]
    assert found.bubble == pytest.approx(line.bubble), "a step that takes what the simulator says has its bubble"
    assert found.bubble_from == "times"
    assert found.ideal_bubble == pytest.approx(line.bubble)
    assert found.predicted_bubble is not None
    assert found.predicted_bubble >= line.bubble
    assert found.of_stages == pytest.approx(3500 / 4 / step)
    seen = lines(facts | {"1f1b": measured(trial(PIPED, step), waiting=[0.2, 0.3, 0.3, 0.4])})["1f1b", PIPED]
    assert (seen.bubble, seen.bubble_from) == (pytest.approx(0.3), "profile")
    alone = lines({"one": ONE, "1f1b": measured(trial(PIPED, step))})["1f1b", PIPED]
    assert (alone.bubble, alone.predicted_bubble) == (None, None)


def test_equal_stages_have_the_formulas_bubble():
    """What the prediction is made of, where it can be checked by hand: (N - 1)(F + B) of 1F1B."""
    line = simulate(make_schedule("1f1b", 4, 16), Costs(f=1.0, b=2.0))
    assert line.bubble == pytest.approx(3 * 3 / (16 * 3 + 3 * 3))
