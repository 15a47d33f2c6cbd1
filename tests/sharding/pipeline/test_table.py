"""Lockstep tables: dependencies by ticks, messages that arrive where they are read, slots that nobody overwrites."""

import numpy as np
import pytest

from sharding.pipeline import ARRIVALS, NAMES, Action, Col, Kind, Table, make_schedule, table
from sharding.pipeline.actions import BACKWARD, DEFERRING, FORWARD

SIZES = [(name, ranks, micro) for name in NAMES for ranks, micro in ((2, 4), (4, 9), (6, 14))]
SIZES = [(name, ranks, micro + (name == "dualpipe" and micro % 2)) for name, ranks, micro in SIZES]
BOUNDED = [("zb1p", 4, 9, 1), ("zb1p", 4, 9, 0), ("dualpipe", 6, 14, 1), ("dualpipev", 4, 9, 2), ("dualpipev", 4, 9, 0)]
FEW = [("gpipe", 4, 1), ("1f1b", 4, 2), ("zb1p", 5, 3), ("dualpipev", 1, 2), ("1f1b", 1, 3), ("zb1p", 1, 2)]


@pytest.fixture(scope="module", params=[(size, lag) for size in SIZES + FEW + BOUNDED for lag in (1, 2)], ids=str)
def made(request) -> Table:
    size, lag = request.param
    return table(make_schedule(*size), lag)


def _actions(made: Table, rank: int) -> list[Action]:
    return [Action(Kind(int(row[0])), *map(int, row[1:])) for row in made.actions[:, rank] if row[0] != Kind.IDLE]


def test_each_rank_keeps_its_order(made):
    for rank, actions in enumerate(made.schedule.actions):
        assert _actions(made, rank) == list(actions)


def test_rows_are_int32_and_idle_rows_are_empty(made):
    assert made.rows.dtype == np.int32
    assert made.rows.shape == (made.ticks, made.schedule.ranks, len(Col))
    idle = made.rows[made.rows[..., Col.KIND] == Kind.IDLE]
    assert (idle[:, 1 : Col.ACT_PREV] == -1).all()
    assert (made.rows[-1, :, Col.KIND] != Kind.IDLE).any()


def test_a_program_that_reads_then_writes_the_rings_finds_what_it_needs(made):
    """Plays the table with names in place of arrays, as the executor does with arrays."""
    schedule, ranks = made.schedule, made.schedule.ranks
    last = schedule.n_stages - 1
    rings = {name: [[None] * (slots + 1) for _ in range(ranks)] for name, slots in made.slots._asdict().items()}
    flying = []  # what the last tick sent, where the exchange runs beside the next one
    counts = {"F": {}, "B": {}, "W": {}}

    def check(ring, rank, slot, expected):
        assert 0 <= slot < made.slots._asdict()[ring]
        assert rings[ring][rank][slot] == expected

    for tick in range(made.ticks):
        sent, writes = [], []
        for rank in range(ranks):
            row = {column: int(made.rows[tick, rank, column]) for column in Col}
            kind = Kind(row[Col.KIND])
            if kind in FORWARD:
                stage, micro = row[Col.F_STAGE], row[Col.F_MICRO]
                assert stage == schedule.stage_of[rank][row[Col.F_CHUNK]]
                if stage > 0:
                    check("activation", rank, row[Col.F_IN], ("F", stage - 1, micro))
                else:
                    assert row[Col.F_IN] == -1
                writes.append(("residual", rank, row[Col.F_SAVE], (stage, micro)))
                for ring, column, here in (
                    ("first", Col.F_SAVE_FIRST, stage == 0),
                    ("last", Col.F_SAVE_LAST, stage == last),
                ):
                    assert (row[column] >= 0) == here
                    writes.append((ring, rank, row[column], (stage, micro)))
                counts["F"][stage, micro] = counts["F"].get((stage, micro), 0) + 1
                if stage < last:
                    sent.append((rank, row[Col.F_CHUNK], ("F", stage, micro)))
            if kind in FORWARD and kind in BACKWARD:
                assert row[Col.F_SAVE] != row[Col.B_SAVED]
            if kind in BACKWARD:
                stage, micro = row[Col.B_STAGE], row[Col.B_MICRO]
                if stage < last:
                    check("gradient", rank, row[Col.B_IN], ("B", stage + 1, micro))
                else:
                    assert row[Col.B_IN] == -1
                check("residual", rank, row[Col.B_SAVED], (stage, micro))
                if stage == 0:
                    check("first", rank, row[Col.B_SAVED_FIRST], (stage, micro))
                if stage == last:
                    check("last", rank, row[Col.B_SAVED_LAST], (stage, micro))
                if kind in DEFERRING:
                    writes.append(("deferred", rank, row[Col.DEFERRED], (stage, micro)))
                else:
                    counts["W"][stage, micro] = counts["W"].get((stage, micro), 0) + 1
                counts["B"][stage, micro] = counts["B"].get((stage, micro), 0) + 1
                if stage > 0:
                    sent.append((rank, row[Col.B_CHUNK], ("B", stage, micro)))
            if kind == Kind.W:
                stage, micro = row[Col.B_STAGE], row[Col.B_MICRO]
                check("deferred", rank, row[Col.DEFERRED], (stage, micro))
                counts["W"][stage, micro] = counts["W"].get((stage, micro), 0) + 1
        for ring, rank, slot, value in writes:
            rings[ring][rank][slot] = value
        _exchange(made, tick, sent if made.lag == 1 else flying, sent, rings)
        flying = sent
    expected = {(stage, micro): 1 for stage in range(schedule.n_stages) for micro in range(schedule.micro_batches)}
    assert counts == {"F": expected, "B": expected, "W": expected}


def _exchange(made: Table, tick: int, travelling, local, rings) -> None:
    """What SPMD code does: both neighbours' messages and one's own, each written to the slot that the row names."""
    schedule, last = made.schedule, made.schedule.ranks - 1
    for rank in range(schedule.ranks):
        got = {}
        for sender, chunk, message in travelling:
            up = (message[0] == "F") == (chunk == 0)
            turns = (sender == last and up) or (sender == 0 and not up)
            if not turns and rank == sender + (1 if up else -1):
                way = "PREV" if up else "NEXT"
                got[Col[("ACT_" if message[0] == "F" else "GRAD_") + way]] = message
        for sender, chunk, message in local:
            if sender == rank == last and (message[0] == "F") == (chunk == 0):
                got[Col.ACT_SELF if message[0] == "F" else Col.GRAD_SELF] = message
        for index, column in enumerate(ARRIVALS):
            slot = int(made.rows[tick, rank, column])
            assert (slot >= 0) == (column in got)
            micro = int(made.arrivals[tick, rank, index])
            assert micro == (got[column][2] if column in got else -1)
            ring = "activation" if column < Col.GRAD_PREV else "gradient"
            rings[ring][rank][slot] = got.get(column)


def test_slots_are_as_few_as_are_in_use_at_one_time():
    assert table(make_schedule("gpipe", 4, 8)).slots.residual == 8
    assert table(make_schedule("1f1b", 4, 8)).slots.residual == 4
    assert table(make_schedule("zb1p", 4, 8)).slots[:3] == (1, 1, 4)
    assert table(make_schedule("zb1p", 4, 8)).slots.deferred == 4
    assert table(make_schedule("dualpipe", 8, 20)).slots.residual == 9
    assert table(make_schedule("dualpipev", 4, 20)).slots.residual == 9


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage_saves_for_one_backward_pass(name):
    assert table(make_schedule(name, 4, 16)).slots.last == (16 if name == "gpipe" else 1)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_rings_do_not_grow_with_micro_batches(name):
    assert table(make_schedule(name, 4, 12)).slots == table(make_schedule(name, 4, 40)).slots


def test_one_way_schedules_take_as_many_ticks_as_they_must():
    assert table(make_schedule("gpipe", 4, 8)).ticks == 2 * (8 + 3)
    assert table(make_schedule("1f1b", 4, 8)).ticks == 2 * (8 + 3)
    assert table(make_schedule("zb1p", 4, 8)).ticks == 3 * 8 + 3


def test_padding_is_idle():
    made = table(make_schedule("1f1b", 2, 4))
    padded = made.padded(made.ticks + 3)
    assert padded.dtype == np.int32
    np.testing.assert_array_equal(padded[: made.ticks], made.rows)
    assert (padded[made.ticks :, :, Col.KIND] == Kind.IDLE).all()
    assert (padded[made.ticks :, :, 1:] == -1).all()
    with pytest.raises(ValueError, match="10 ticks does not go into 3"):
        made.padded(3)


def test_channels_say_where_nobody_needs_an_exchange():
    made = table(make_schedule("1f1b", 4, 8))
    used = {column.name: made.channels[:, i] for i, column in enumerate(ARRIVALS)}
    assert {name for name, ticks in used.items() if ticks.any()} == {"ACT_PREV", "GRAD_NEXT"}
    assert used["ACT_PREV"][0]
    assert not used["GRAD_NEXT"][0]


def test_a_lag_that_is_not_is_refused():
    with pytest.raises(ValueError, match="lag = 3 must be 1 or 2"):
        table(make_schedule("1f1b", 2, 2), 3)
