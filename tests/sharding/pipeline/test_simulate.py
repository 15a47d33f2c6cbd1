"""Schedules in time: the golden numbers of spec 13.1 and 28, bubbles by their formulas, uneven stages, lockstep."""

from itertools import pairwise

import pytest

from sharding.pipeline import NAMES, Costs, bubble_formula, lockstep, make_schedule, simulate, table

ONE_WAY = ("gpipe", "1f1b", "zb1p")


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "total", "idle"),
    [(4, 8, 26, 2), (4, 10, 32, 2), (8, 16, 54, 6), (8, 20, 66, 6), (16, 32, 110, 14)],
)
def test_golden_makespans_of_dualpipe(ranks, micro_batches, total, idle):
    found = simulate(make_schedule("dualpipe", ranks, micro_batches))
    assert found.makespan == total
    assert set(found.idle) == {idle}
    assert set(found.in_flight) == {ranks + 1}


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 4), (2, 9), (4, 8), (4, 10), (4, 20), (8, 16)])
def test_dualpipev_is_dualpipe_on_half_the_ranks(ranks, micro_batches):
    found = simulate(make_schedule("dualpipev", ranks, micro_batches))
    assert set(found.idle) == {2 * (ranks - 1)}
    assert found.makespan == 2 * 3 * micro_batches + 2 * (ranks - 1)
    assert set(found.in_flight) == {2 * ranks + 1}


@pytest.mark.parametrize(
    ("name", "ranks", "times"),
    [
        ("dualpipe", 16, {-1: 374, 4: 376, 2: 377, 1: 378, 0: 394}),
        ("dualpipev", 8, {-1: 734, 4: 736, 2: 737, 1: 738, 0: 754}),
        ("zb1p", 16, {-1: 375, 4: 387, 2: 389, 1: 390, 0: 405}),
    ],
)
def test_what_a_bound_of_waiting_weight_gradients_costs(name, ranks, times):
    """One of eight that DualPipe puts off buys four fifths of what they buy."""
    assert {waiting: simulate(make_schedule(name, ranks, 120, waiting)).makespan for waiting in times} == times


def test_dualpipe_with_other_costs_idles_a_little_less_than_the_formula():
    """Spec 13.1: F = 2, B = 5, W = 2, F&B = 6 on 8 ranks gives 11 to 13, by the formula 15."""
    costs = Costs(f=2.0, b=5.0, w=2.0, pair=6 / 7)
    idle = [round(one, 6) for one in simulate(make_schedule("dualpipe", 8, 20), costs).idle]
    assert (min(idle), max(idle)) == (11, 13)
    assert bubble_formula("dualpipe", 8, costs) == pytest.approx(15)


@pytest.mark.parametrize("name", ONE_WAY)
@pytest.mark.parametrize(
    "costs", [Costs(), Costs(f=2.0, b=5.0, w=2.0), Costs(f=1.0, b=2.0, w=0.9), Costs(f=1.0, b=3.0, w=1.0)], ids=str
)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (8, 20), (7, 9)])
def test_bubbles_of_one_way_schedules_equal_their_formulas(name, costs, ranks, micro_batches):
    found = simulate(make_schedule(name, ranks, micro_batches), costs)
    assert found.idle == pytest.approx([bubble_formula(name, ranks, costs)] * ranks)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_bubble_and_passes_under_way_do_not_grow_with_micro_batches(name):
    few, many = (simulate(make_schedule(name, 4, micro_batches)) for micro_batches in (12, 40))
    assert few.idle == many.idle
    assert few.in_flight == many.in_flight
    assert few.held == many.held


def test_passes_under_way_of_one_way_schedules():
    assert simulate(make_schedule("gpipe", 4, 10)).in_flight == (10,) * 4
    assert simulate(make_schedule("1f1b", 4, 10)).in_flight == (4, 3, 2, 1)
    late = simulate(make_schedule("zb1p", 4, 10))
    assert late.in_flight == (4, 3, 2, 1)
    assert late.held == (4,) * 4


@pytest.mark.parametrize("name", NAMES)
def test_work_is_conserved_and_ranks_do_one_thing_at_a_time(name):
    found = simulate(make_schedule(name, 4, 8), Costs(f=1.0, b=2.5, w=0.7, send=0.3))
    passes = 16 if name == "dualpipev" else 8
    assert found.busy == pytest.approx([passes * 3.5] * 4)
    for events in found.events:
        assert all(later.start >= earlier.end for earlier, later in pairwise(events))
    assert found.bubble == pytest.approx(1 - passes * 3.5 / found.makespan)


def test_an_overlapped_pair_takes_its_share_of_the_sum():
    alone, paired = (simulate(make_schedule("dualpipe", 4, 40), Costs(pair=pair)).makespan for pair in (1.0, 0.8))
    assert paired < 0.85 * alone
    one_way = make_schedule("1f1b", 4, 40)
    assert simulate(one_way, Costs(pair=0.8)).makespan == simulate(one_way).makespan


def test_messages_delay_who_needs_them_and_turns_send_none():
    for name in NAMES:
        schedule = make_schedule(name, 4, 8)
        assert simulate(schedule, Costs(send=0.5)).makespan > simulate(schedule).makespan
    turn = make_schedule("dualpipev", 1, 4)
    assert simulate(turn, Costs(send=0.5)).makespan == simulate(turn).makespan


def test_uneven_stages_wait_for_the_slowest():
    f, b = (1.0, 1.0, 1.0, 2.0), (2.0, 2.0, 2.0, 4.0)
    found = simulate(make_schedule("1f1b", 4, 20), Costs(f=f, b=b))
    assert found.busy == (60, 60, 60, 120)
    assert found.makespan == 3 + 120 + 6  # fill, the slowest stage's work, drain
    assert found.idle[3] == 9


def test_costs_by_stage_equal_one_cost_for_all():
    for name in NAMES:
        schedule = make_schedule(name, 4, 8)
        n = schedule.n_stages
        same = simulate(schedule, Costs((1.5,) * n, (2.5,) * n, (1.0,) * n, 0.9, 0.1))
        assert same.events == simulate(schedule, Costs(1.5, 2.5, 1.0, 0.9, 0.1)).events


def test_mistaken_costs_are_one_line():
    with pytest.raises(ValueError, match="w has 3 costs, 1f1b has 4 stages"):
        simulate(make_schedule("1f1b", 4, 8), Costs(w=(1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="of stages that cost the same"):
        bubble_formula("1f1b", 4, Costs(f=(1.0,) * 4))


@pytest.mark.parametrize("name", NAMES)
def test_lockstep_takes_no_less_than_the_schedule_and_lag_hides_messages(name):
    schedule, costs = make_schedule(name, 4, 16), Costs(send=0.2)
    free = simulate(schedule).makespan
    after, beside = (lockstep(table(schedule, lag), costs) for lag in (1, 2))
    assert free <= beside <= after
    assert lockstep(table(schedule, 1)) >= free


def test_lockstep_by_hand():
    """Two ranks, one micro-batch: F, send, F, B, send, B."""
    made = table(make_schedule("gpipe", 2, 1))
    assert made.ticks == 4
    assert lockstep(made, Costs(f=1.0, b=3.0, send=0.25)) == 1 + 1 + 3 + 3 + 4 * 0.25


def test_equal_parts_lose_nothing_in_lockstep_and_unequal_ones_do():
    """A tick is as long as the longest action of a rank and its neighbours; ZB1P's parts are equally long."""
    assert lockstep(table(make_schedule("zb1p", 8, 20))) == simulate(make_schedule("zb1p", 8, 20)).makespan
    assert lockstep(table(make_schedule("1f1b", 8, 20))) == 100
    assert simulate(make_schedule("1f1b", 8, 20)).makespan == 81


@pytest.mark.parametrize("name", NAMES)
def test_ticks_take_what_their_actions_take(name):
    """Without neighbours' meetings a table's ranks would work as long as the schedule's."""
    schedule = make_schedule(name, 4, 8)
    n = schedule.n_stages
    costs = Costs(tuple(1.0 + i for i in range(n)), tuple(2.5 + 2 * i for i in range(n)), (0.5,) * n, 0.8, 0.0)
    alone = [sum(costs.of(action, schedule.stage_of[rank]) for action in schedule.actions[rank]) for rank in range(4)]
    assert simulate(schedule, costs).busy == pytest.approx(alone)
    for lag in (1, 2):
        assert lockstep(table(schedule, lag), costs) >= max(alone)
