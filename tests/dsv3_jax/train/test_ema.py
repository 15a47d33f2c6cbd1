"""The moving average of parameters: a plain loop's values, on the host, in no step's way, exact after a restart."""

import dataclasses
import gc
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import CheckpointWriter, restore
from dsv3_jax.config import replace
from dsv3_jax.train import ema
from dsv3_jax.train.ema import MovingAverage, abstract_average, fold
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
ROWS = micro.tokens(CONFIG.model, rows=8, seed=2)


class Steps:
    """What steps give, without the step: other parameters each time."""

    def __init__(self, config):
        self.config, self.state = config, micro.train_state(config)

    def next(self, skipped: object = 0):
        number = self.state.step + 1
        params = self.state.params if skipped == 1 else micro.train_state(self.config, seed=number).params
        self.state = dataclasses.replace(self.state, params=params, step=number)
        return self.state, {"skipped": jnp.int32(skipped) if isinstance(skipped, int) else skipped}


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


@pytest.mark.parametrize("shape", [(), (3,), (700, 800)])
def test_a_fold_is_the_plain_formula_in_place(shape):
    rng = np.random.default_rng(0)
    before, value = (np.asarray(rng.standard_normal(shape), np.float32) for _ in range(2))
    average = before.copy()
    fold(average, value, np.float32(0.25))
    np.testing.assert_array_equal(average, before + np.float32(0.25) * (value - before))


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
    assert average.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))


def test_a_step_runs_to_its_end_while_the_one_before_is_folded_in(step, monkeypatch):
    state = micro.train_state(CONFIG)
    average, expected = MovingAverage(CONFIG, state.params), host(state.params)
    opened, inside = threading.Event(), threading.Event()

    def held(*arguments):
        inside.set()
        assert opened.wait(60)
        fold(*arguments)

    monkeypatch.setattr(ema, "fold", held)
    state, metrics = step(state, ROWS)
    expected = followed(expected, state.params)
    average.follow(state, metrics)
    assert inside.wait(60)
    # The fold stands still; this step uses up the parameters of the one before, and ends.
    state, _ = step(state, ROWS)
    jax.block_until_ready(state.params)
    opened.set()
    same(average.plain(), expected)


def test_threads_and_the_sizes_of_pieces_and_tasks_do_not_change_a_bit(monkeypatch):
    found = []
    for threads, piece, task, block in ((1, 1 << 26, 1 << 22, 1 << 18), (5, 250, 100, 32)):
        for name, size in (("_PIECE", piece), ("_TASK", task), ("_BLOCK", block)):
            monkeypatch.setattr(ema, name, size)
        steps = Steps(CONFIG)
        average = MovingAverage(CONFIG, steps.state.params, threads=threads)
        for _ in range(2):
            average.follow(*steps.next())
        found.append(average.plain())
    largest = max(leaf.size for leaf in jax.tree.leaves(found[0])) // 4
    assert largest > 2 * 250, "one piece has all"
    exactly_same(*found)


class Skipped:
    """A metric that is there, or of a step that still runs."""

    def __init__(self, ready):
        self.is_ready = lambda: ready

    def __int__(self):
        return 0


@pytest.mark.parametrize("devices_wait", [True, False])
def test_one_set_of_parameters_is_under_way_at_a_time_and_waiting_devices_are_told_of_once(monkeypatch, devices_wait):
    steps, told, order = Steps(CONFIG), [], []
    average = MovingAverage(CONFIG, steps.state.params, say=told.append)
    opened = threading.Event()

    def held(*arguments):
        assert opened.wait(60), "the second set did not wait for the first"
        order.append("fold")
        fold(*arguments)

    class Joined(threading.Thread):
        """Whoever waits for it opens the gate."""

        def join(self, timeout=None):
            opened.set()
            super().join(timeout)
            opened.clear()

    copy = average._copy
    monkeypatch.setattr(ema, "fold", held)
    monkeypatch.setattr(ema.threading, "Thread", Joined)
    monkeypatch.setattr(average, "_copy", lambda params: (order.append("copy"), copy(params))[1])
    for _ in range(3):
        average.follow(*steps.next(Skipped(devices_wait)))
    average.wait()
    folds = ["fold"] * (len(order) // 3 - 1)
    assert folds
    assert order == ["copy", *folds] * 3
    assert len(told) == devices_wait
    assert all(re.search(r"raise train\.ema_every to [1-9]\d* \(now 1;", line) for line in told)
    assert (average.longest_wait > 0) == devices_wait
    assert (average.fold_seconds or 0) > 0


def test_copies_are_freed_as_they_are_used():
    steps = Steps(CONFIG)
    average = MovingAverage(CONFIG, steps.state.params)
    average.follow(*steps.next())
    average.wait()
    gc.collect()
    before = len(jax.live_arrays())
    average.follow(steps.state, {"skipped": jnp.int32(0)})
    average.wait()
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_steps_that_are_not_finite_leave_the_average_alone():
    steps = Steps(CONFIG)
    average = MovingAverage(CONFIG, steps.state.params)
    average.follow(*steps.next())
    before = host(average.plain())
    average.follow(*steps.next(skipped=1))
    exactly_same(average.plain(), before)


def test_what_is_saved_shares_no_memory_with_what_goes_on():
    average = MovingAverage(CONFIG, micro.train_state(CONFIG).params)
    saved, before = average.plain(), [{key: part.copy() for key, part in parts.items()} for parts in average._parts]
    for parts in average._parts:
        for part in parts.values():
            part.fill(np.nan)
    for leaf, parts in zip(jax.tree.leaves(saved), before, strict=True):
        for shard in leaf.addressable_shards:
            place = tuple(cut.indices(size)[:2] for cut, size in zip(shard.index, leaf.shape, strict=True))
            np.testing.assert_array_equal(shard.data, parts[place])


def test_every_third_step_counts_for_three():
    config = replace(CONFIG, train={"ema_every": 3})
    steps = Steps(config)
    average, expected = MovingAverage(config, steps.state.params), host(steps.state.params)
    for number in range(1, 8):
        average.follow(*steps.next())
        if number % 3 == 0:
            expected = followed(expected, steps.state.params, DECAY**3)
    same(average.plain(), expected)


def test_what_fails_in_the_background_is_raised_by_the_next_call(monkeypatch):
    steps = Steps(CONFIG)
    average = MovingAverage(CONFIG, steps.state.params)

    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(ema, "fold", broken)
    average.follow(*steps.next())
    with pytest.raises(ZeroDivisionError):
        average.follow(*steps.next())


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
def test_an_average_goes_on_exactly_on_another_mesh(tmp_path, before, after):
    saving, going_on = (replace(STAGED, mesh=MESHES[name]) for name in (before, after))
    steps = Steps(saving)
    average = MovingAverage(saving, steps.state.params)
    expected = host(plain_state(saving, steps.state).params)
    average.follow(*steps.next())
    expected = followed(expected, plain_state(saving, steps.state).params)
    with CheckpointWriter(tmp_path, keep=1, config_toml="") as writer:
        writer.save({"ema": average.plain()}, step=1, tokens=1, data={})
        # What is saved is a copy: this does not change it.
        average.follow(*steps.next())
        average.wait()
    found = restore(tmp_path / "1", {"ema": abstract_average(going_on)})["ema"]
    exactly_same(found, expected)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)} == {"pinned_host"}
    average = MovingAverage.restored(going_on, found)
    exactly_same(average.plain(), expected)
    steps = Steps(going_on)
    average.follow(*steps.next())
    exactly_same(average.plain(), followed(expected, plain_state(going_on, steps.state).params))
