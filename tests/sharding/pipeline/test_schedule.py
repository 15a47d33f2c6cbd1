"""Orders of the five schedules, what they cannot do, and what the validator finds in lists that are not right."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.pipeline import NAMES, Action, Kind, Schedule, make_schedule, supported, table, validate
from sharding.pipeline.actions import backward, forward, weight
from sharding.pipeline.two_way import step_counts


@pytest.mark.parametrize("name", NAMES)
@given(ranks=st.integers(1, 9), micro_batches=st.integers(1, 24), waiting=st.integers(-2, 4))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_schedule_that_is_supported_is_valid(name, ranks, micro_batches, waiting):
    reason = supported(name, ranks, micro_batches, waiting)
    if not reason:
        validate(make_schedule(name, ranks, micro_batches, waiting))
    else:
        assert "\n" not in reason
        with pytest.raises(ValueError, match=re.escape(reason)):
            make_schedule(name, ranks, micro_batches, waiting)


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "reason"),
    [
        ("zb2p", 4, 8, "'zb2p' is not known; there is gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("1f1b", 0, 8, "1f1b needs one rank and one micro-batch at least, not 0 and 8"),
        ("dualpipe", 3, 8, "even number of ranks, not 3"),
        ("dualpipe", 4, 9, "even number of micro-batches, not 9"),
        ("dualpipe", 4, 6, "dualpipe on 4 ranks needs 8 micro-batches at least, not 6"),
        ("dualpipev", 3, 5, "dualpipev on 3 ranks needs 6 micro-batches at least, not 5"),
        ("dualpipev", 3, 7, ""),
        ("zb1p", 4, 1, ""),
    ],
)
def test_what_a_schedule_cannot_do_is_one_line(name, ranks, micro_batches, reason):
    assert reason in supported(name, ranks, micro_batches)
    assert bool(reason) == bool(supported(name, ranks, micro_batches))


def test_step_counts_of_eight_ranks_and_twenty_micro_batches():
    """Spec 13.1; ranks 7 to 4 mirror ranks 0 to 3."""
    assert [step_counts(depth, 4, 10) for depth in range(4)] == [
        (6, 1, 3, 3, 3, 1, 3, 1),
        (4, 2, 2, 4, 2, 2, 2, 2),
        (2, 3, 1, 5, 1, 3, 1, 3),
        (0, 4, 0, 6, 0, 4, 0, 4),
    ]


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_lists_follow_the_step_counts(name):
    schedule = make_schedule(name, 8, 20)
    for rank, actions in enumerate(schedule.actions):
        depth, arm, passes = (min(rank, 7 - rank), 4, 10) if name == "dualpipe" else (rank, 8, 20)
        one, two, three, four, five, six, seven, eight = step_counts(depth, arm, passes)
        kinds = Counter(action.kind for action in actions)
        alone = int(depth == arm - 1)
        assert kinds[Kind.FB] == 2 * four + five - alone
        assert kinds[Kind.F] == one + 2 * two + three + alone
        assert kinds[Kind.W] == three + seven + eight == kinds[Kind.BX]
        assert kinds[Kind.B] + kinds[Kind.BX] == three + five + 2 * six + seven + alone


@pytest.mark.parametrize(("name", "ranks"), [("zb1p", 8), ("dualpipe", 8), ("dualpipev", 4)])
def test_a_bound_moves_weight_gradients_and_nothing_else(name, ranks):
    def passes(schedule, *kinds):
        return [[a[1:] for a in actions if a.kind in kinds] for actions in schedule.actions]

    free = make_schedule(name, ranks, 20)
    assert make_schedule(name, ranks, 20, 100) == replace(free, waiting=100)
    for most in (1, 2, 3):
        made = make_schedule(name, ranks, 20, most)
        assert table(made).slots.deferred == most < table(free).slots.deferred
        assert passes(made, *set(Kind) - {Kind.W}) == passes(free, *set(Kind) - {Kind.W})
        assert passes(made, Kind.W) == passes(free, Kind.W), "in the same order"
    none = make_schedule(name, ranks, 20, 0)
    kinds = {action.kind for actions in none.actions for action in actions}
    assert not kinds & {Kind.BX, Kind.W}
    assert table(none).slots.deferred == 0
    if name == "zb1p":
        assert none.actions == make_schedule("1f1b", ranks, 20).actions


def test_dualpipe_s_halves_mirror_each_other():
    schedule = make_schedule("dualpipe", 8, 20)

    def mirrored(chunk: int, micro: int) -> tuple[int, int]:
        return (1 - chunk, (micro + 10) % 20) if chunk >= 0 else (-1, -1)

    for rank in range(4):
        other = [
            Action(a.kind, *mirrored(a.f_chunk, a.f_micro), *mirrored(a.b_chunk, a.b_micro))
            for a in schedule.actions[7 - rank]
        ]
        assert list(schedule.actions[rank]) == other


def test_stages_lie_as_the_paper_says():
    assert make_schedule("1f1b", 3, 3).stage_of == ((0,), (1,), (2,))
    both = make_schedule("dualpipe", 4, 8)
    assert both.stage_of == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert (both.n_stages, both.chunks) == (4, 2)
    assert both.chunk_of(0, 0) == (0, 0)
    assert both.chunk_of(0, 7) == (3, 1)
    vee = make_schedule("dualpipev", 2, 4)
    assert vee.stage_of == ((0, 3), (1, 2))
    assert (vee.n_stages, vee.chunk_of(1, 3), vee.chunk_of(2, 3)) == (4, (1, 0), (1, 1))


def test_one_f_one_b_by_hand():
    assert make_schedule("1f1b", 2, 2).actions == (
        (forward(0, 0), forward(0, 1), backward(0, 0), backward(0, 1)),
        (forward(0, 0), backward(0, 0), forward(0, 1), backward(0, 1)),
    )


def test_more_weight_gradients_that_wait_than_may_are_found():
    late = make_schedule("zb1p", 4, 8)
    validate(replace(late, waiting=4))
    with pytest.raises(ValueError, match=r"rank 3: after Action\(.*\) 4 weight gradients wait, at most 3 may"):
        validate(replace(late, waiting=3))


def _changed(schedule: Schedule, rank: int, change) -> Schedule:
    actions = list(schedule.actions)
    actions[rank] = tuple(change(list(actions[rank])))
    return replace(schedule, actions=tuple(actions))


@pytest.mark.parametrize(
    ("name", "rank", "change", "line"),
    [
        ("1f1b", 1, lambda a: a[:-1], "stage 1 has 0 backward passes of micro-batch 3"),
        ("1f1b", 0, lambda a: [a[0], *a], "stage 0 has 2 forward passes of micro-batch 0"),
        ("1f1b", 1, lambda a: [a[1], a[0], *a[2:]], "waits for ever to do"),
        ("1f1b", 1, lambda a: [a[0], a[2], a[1], *a[3:]], "rank 1: 2 passes are under way, at most 1 may be"),
        ("zb1p", 1, lambda a: a[:-1], r"the weight gradient of chunk and micro-batch \(0, 3\) is missing"),
        ("zb1p", 0, lambda a: [a[3], *a[:3], *a[4:]], "has no weight gradient to make"),
        ("zb1p", 1, lambda a: [*a[:-2], a[-1], a[-2]], "comes before that of chunk and micro-batch"),
        ("zb1p", 1, lambda a: [x for x in a if x.kind != Kind.W] + [x for x in a if x.kind == Kind.W], "at most 2 may"),
        ("dualpipe", 0, lambda a: [forward(0, 3), *a], "is of a micro-batch that does not pass this chunk"),
        ("dualpipe", 0, lambda a: [forward(2, 0), *a], "names a chunk or micro-batch that is not there"),
        ("gpipe", 0, lambda a: [Action(Kind.F, 0, 0, 0, 0), *a], "names a pass that it does not do"),
        ("gpipe", 0, lambda a: [Action(Kind.IDLE), *a], "is no action of a list"),
        ("1f1b", 0, lambda a: [*a, weight(0, 0)], "has no weight gradient to make"),
    ],
)
def test_what_is_wrong_in_a_list_is_found(name, rank, change, line):
    with pytest.raises(ValueError, match=line) as error:
        validate(_changed(make_schedule(name, 2, 4), rank, change))
    assert "\n" not in str(error.value)
