"""Batches a step ahead: the same rows in the same steps, and a position that does not count the one that waits."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import replace
from dsv3_jax.config.schema import Segment
from dsv3_jax.data import RowStream
from dsv3_jax.train.batches import Batches
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import make_train_step
from tests.dsv3_jax import micro

PAD = 7
CONFIG = micro.config(
    micro.DENSE_GQA | {"num_hidden_layers": 1}, train={"micro_batch_size": 2, "batch_size": 4}, mesh={"data": 2}
)


class Stream(RowStream):
    """Rows that are counted."""

    def __init__(self, position=0, width=CONFIG.train.seq_len + 1):
        self.position, self.width = position, width

    def take(self, n: int):
        rows = np.repeat(np.arange(self.position, self.position + n, dtype=np.int32)[:, None] % 50, self.width, axis=1)
        self.position += n
        return rows

    def state(self):
        return {"position": self.position}


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG)


def walk(config, step, stream, steps, last):
    """Each step's rows, its facts, and the position behind it."""
    batches, state, seen = Batches(config, stream, step, PAD), TrainState({}, {}, {}, None, step=0, tokens=0), []
    for number in range(steps):
        batch = batches.take(state, last=number + 1 == last)
        rows = np.asarray(batch.tokens).reshape(-1, stream.width)
        seen.append((rows[:, 0].tolist(), batch.step, batch.seen, batches.position()["position"], stream.position))
        state = dataclasses.replace(state, step=batch.step, tokens=batch.seen)
    return seen


def test_steps_get_the_stream_s_rows_in_order_and_the_position_is_behind_the_taken_ones(step):
    tokens = CONFIG.train.seq_len * 4
    found = walk(CONFIG, step, Stream(), 3, last=3)
    assert [one[0] for one in found] == [[0, 1, 2, 3], [4, 5, 6, -1], [8, 9, 10, 11]]
    assert [one[1:4] for one in found] == [(1, tokens, 4), (2, 2 * tokens, 8), (3, 3 * tokens, 12)]
    # One batch ahead, but for the last.
    assert [one[4] for one in found] == [8, 12, 12]


def test_what_goes_on_from_a_position_gets_the_following_rows(step):
    first = walk(CONFIG, step, Stream(), 2, last=9)
    on = walk(CONFIG, step, Stream(first[-1][3]), 1, last=9)
    assert on[0][0] == [8, 9, 10, 11]


def test_batches_ahead_follow_the_batch_ramp():
    tokens = 4 * CONFIG.train.seq_len
    ramp = (Segment(1.0 * tokens, 4.0), Segment(9.0 * tokens, 8.0))
    config = replace(CONFIG, train={"batch_size": 8, "batch_ramp": ramp, "micro_batch_size": 2})
    found = walk(config, make_train_step(config), Stream(), 3, last=3)
    assert [(one[2], one[3]) for one in found] == [(tokens, 4), (2 * tokens, 8), (4 * tokens, 16)]


def test_a_batch_of_another_step_is_refused(step):
    state = micro.train_state(CONFIG)
    rows = Stream().take(4)
    with pytest.raises(ValueError, match="a batch for step 3 was given to step 1"):
        step(state, step.place(rows, 3, 0))


def test_a_placed_batch_gives_what_its_rows_give(step):
    rows = micro.tokens(CONFIG.model, rows=4, seed=1)
    (plain, facts), (placed, same) = (
        step(micro.train_state(CONFIG), given) for given in (rows, step.place(rows, 1, 0))
    )
    jax.tree.map(np.testing.assert_array_equal, plain.params, placed.params)
    assert facts["lr"] == same["lr"]
    assert facts["tokens"] == same["tokens"] == 4 * CONFIG.train.seq_len
    assert (plain.step, plain.tokens) == (placed.step, placed.tokens)
