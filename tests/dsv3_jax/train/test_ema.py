"""The moving average of parameters: a plain loop's values, on the host, in no step's way, exact after a restart."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import CheckpointWriter, restore
from dsv3_jax.config import replace
from dsv3_jax.train import ema
from dsv3_jax.train.ema import MovingAverage, abstract_average
from dsv3_jax.train.ema_watch import Watch
from dsv3_jax.train.state import plain_state
from dsv3_jax.train.step import make_train_step
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

DECAY = 0.9
CONFIG = micro.config(
    micro.DENSE_GQA | {"num_hidden_layers": 1},
    train={"ema_decay": DECAY, "micro_batch_size": 1, "loss_chunk": 16},
    optim={"learning_rate": 0.1},
    mesh={"data": 4},
)
THIRD = replace(CONFIG, train={"ema_every": 3})
ROWS = micro.tokens(CONFIG.model, rows=8, seed=2)


class Steps:
    """What steps give, without the step: other parameters each time."""

    def __init__(self, config):
        self.config, self.state = config, micro.train_state(config)

    def next(self, skipped=0):
        number = self.state.step + 1
        params = self.state.params if skipped else micro.train_state(self.config, seed=number).params
        self.state = dataclasses.replace(self.state, params=params, step=number)
        return self.state, {"skipped": jnp.int32(skipped)}


def host(tree):
    return jax.tree.map(np.array, tree)


def followed(expected, params, decay=DECAY):
    return jax.tree.map(lambda a, p: a + np.float32(1 - decay) * (p - a), expected, host(params))


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7), found, expected)


def exactly_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG)


def test_the_average_of_steps_is_that_of_a_plain_loop_and_on_the_host(step):
    state = micro.train_state(CONFIG)
    average, expected = MovingAverage(CONFIG, state.params), host(state.params)
    for _ in range(4):
        state, metrics = step(state, ROWS)
        average.follow(state, metrics)
        expected = followed(expected, state.params)
    found = average.plain()
    same(found, expected)
    table = state.params["embedding"]["table"]
    assert np.abs(table - expected["embedding"]["table"]).max() > 0.01
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)} == {"pinned_host"}
    assert {part.sharding.memory_kind for piece in average._pieces for part in piece} == {"pinned_host"}


def test_the_sizes_of_pieces_do_not_change_a_bit(monkeypatch):
    found = []
    for piece in (1 << 26, 250):
        monkeypatch.setattr(ema, "_PIECE", piece)
        steps = Steps(CONFIG)
        average = MovingAverage(CONFIG, steps.state.params)
        for _ in range(2):
            average.follow(*steps.next())
        found.append(average.plain())
    largest = max(leaf.size for leaf in jax.tree.leaves(found[0])) // 4
    assert largest > 2 * 250, "one piece has all"
    exactly_same(*found)


def test_every_third_step_counts_for_three_and_each_step_carries_a_third(monkeypatch):
    monkeypatch.setattr(ema, "_PIECE", 100)
    moved = []
    to_host = ema._to_host
    monkeypatch.setattr(ema, "_to_host", lambda piece: (moved.append(piece.nbytes), to_host(piece))[1])
    steps = Steps(THIRD)
    average, expected = MovingAverage(THIRD, steps.state.params), host(steps.state.params)
    whole, carried = average.nbytes, []
    for number in range(1, 9):
        moved.clear()
        average.follow(*steps.next())
        carried.append(sum(moved))
        if number % 3 == 0:
            expected = followed(expected, steps.state.params, DECAY**3)
    # Nothing before the first round; the second is all but over.
    assert carried[:2] == [0, 0]
    assert sum(carried[2:5]) == whole
    assert max(carried) < 0.4 * whole
    same(average.plain(), expected)


def test_a_share_comes_up_a_step_before_it_is_folded_in(monkeypatch):
    """Copies that a program waits for can begin no sooner than the program before it ends."""
    steps, order = Steps(THIRD), []
    average = MovingAverage(THIRD, steps.state.params)
    fold, bring = ema._folded, average._to_devices
    monkeypatch.setattr(ema, "_folded", lambda given, *rest: (order.append(("fold", id(given))), fold(given, *rest))[1])

    def brought(piece):
        there = bring(piece)
        order.append(("bring", id(there)))
        return there

    monkeypatch.setattr(average, "_to_devices", brought)
    for _ in range(2):
        steps.next()
    for _ in range(3):
        before = {("fold", id(piece)) for piece in average._coming}
        order.clear()
        average.follow(*steps.next())
        assert {one for one in order if one[0] == "fold"} == before
        last_fold = max(place for place, one in enumerate(order) if one[0] == "fold")
        assert all(place > last_fold for place, one in enumerate(order) if one[0] == "bring")


def test_a_round_that_is_cut_short_by_a_save_is_the_same():
    found = []
    for saved_at in (None, 3, 4):
        steps = Steps(THIRD)
        average = MovingAverage(THIRD, steps.state.params)
        for number in range(1, 7):
            average.follow(*steps.next())
            if number == saved_at:
                average = MovingAverage.restored(THIRD, average.plain())
        found.append(average.plain())
    exactly_same(found[0], found[1])
    exactly_same(found[0], found[2])


def test_steps_that_are_not_finite_leave_the_average_alone():
    steps = Steps(CONFIG)
    average = MovingAverage(CONFIG, steps.state.params)
    average.follow(*steps.next())
    before = host(average.plain())
    average.follow(*steps.next(skipped=1))
    exactly_same(average.plain(), before)


def watch(said):
    return Watch(4, 8_000_000_000, said.append)


def test_devices_that_wait_are_told_of_once_with_a_value_at_which_nothing_waits():
    said = []
    seen = watch(said)
    for _ in range(9):
        seen.note(step_seconds=0.2, share_seconds=0.3)
    assert len(said) == 1
    told = re.search(
        r"steps wait .* 8 GB .* in 0\.3 s; a step takes 0\.2 s; raise train\.ema_every to (\d+) \(now 4;", said[0]
    )
    assert told
    # A share is as much smaller.
    assert 0.3 * 4 / int(told[1]) < 0.2
    assert seen.longest_wait == pytest.approx(0.1)
    assert seen.share_seconds == pytest.approx(0.3)


@pytest.mark.parametrize(
    "shares", [[0.1] * 9, [9.0, 9.0, 0.1, 9.0, 9.0], [0.205] * 9], ids=["in time", "seldom", "hardly"]
)
def test_what_comes_in_time_or_is_seldom_late_is_not_told(shares):
    said = []
    seen = watch(said)
    for share in shares:
        seen.note(step_seconds=0.2, share_seconds=share)
    assert said == []


def test_the_watch_sees_both_ends_of_a_step_and_a_share():
    said = []
    seen = watch(said)
    arrived, ended = jnp.zeros(3), jnp.int32(0)
    for _ in range(3):
        seen.see([arrived], ended)
    seen.wait()
    assert seen.share_seconds is not None
    assert 0 <= seen.share_seconds < 10
    assert seen.longest_wait < 10


def test_what_is_saved_shares_no_memory_with_what_goes_on():
    steps = Steps(CONFIG)
    average = MovingAverage(CONFIG, steps.state.params)
    saved = average.plain()
    before = host(saved)
    for _ in range(2):
        average.follow(*steps.next())
    average.wait()
    exactly_same(saved, before)
    assert any(
        (np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (average.plain(), before)), strict=True)
    )


STAGED = micro.config(
    micro.ROUTED_ONLY | {"num_hidden_layers": 5, "num_nextn_predict_layers": 0},
    train={"micro_batch_size": 1, "batch_size": 16, "ema_decay": DECAY},
)
MESHES = {
    "data": {"data": 4},
    "expert and data": {"expert": 2, "data": 2},
    "dualpipev": {"pipe": 2, "expert": 2, "schedule": "dualpipev"},
}


@pytest.mark.parametrize(("before", "after"), [("data", "dualpipev"), ("dualpipev", "expert and data")])
def test_an_average_goes_on_on_another_mesh(tmp_path, before, after):
    saving, going_on = (replace(STAGED, mesh=MESHES[name]) for name in (before, after))
    steps = Steps(saving)
    average = MovingAverage(saving, steps.state.params)
    expected = host(plain_state(saving, steps.state).params)
    average.follow(*steps.next())
    expected = followed(expected, plain_state(saving, steps.state).params)
    with CheckpointWriter(tmp_path, keep=1, config_toml="") as writer:
        saved = average.plain()
        writer.save({"ema": saved}, step=1, tokens=1, data={})
        # What is saved is a copy: this does not change it.
        average.follow(*steps.next())
        average.wait()
    found = restore(tmp_path / "1", {"ema": abstract_average(going_on)})["ema"]
    same(found, expected)
    exactly_same(found, host(saved))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)} == {"pinned_host"}
    average = MovingAverage.restored(going_on, found)
    exactly_same(average.plain(), host(saved))
    steps = Steps(going_on)
    average.follow(*steps.next())
    same(average.plain(), followed(expected, plain_state(going_on, steps.state).params))
