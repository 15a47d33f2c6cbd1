"""A pass goes through its stage's layers once each and in order, whether they are a loop's or stand apart."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.pipeline.walk import Apart, Loop, Pass

SLOTS, LEAST = 3, 1
COUNTS = (3, 1)
"""Layers of a rank's two stages."""
WALKS = [pytest.param(Loop(), id="loop"), pytest.param(Apart(2 * SLOTS, SLOTS, LEAST), id="apart")]
UP, DOWN, PAIRED = 100, 200, 1000


def write(log, number):
    entries, end = log
    return entries.at[end].set(number), end + 1


def empty():
    return jnp.zeros(16, jnp.int32), jnp.int32(0)


def step(way):
    return lambda of, i, log: write(log, way + of.first + i)


def pair(ahead, i, back, j, log):
    return step(PAIRED + DOWN)(back, j, step(PAIRED + UP)(ahead, i, log))


def told(log):
    return np.asarray(log[0])[: int(log[1])].tolist()


def one(chunk):
    """A pass through a stage, or none; traced."""
    return Pass(jnp.int32(max(chunk, 0) * SLOTS), jnp.int32(COUNTS[chunk] if chunk >= 0 else 0), jnp.int32(0))


def layers(chunk, way):
    return [way + max(chunk, 0) * SLOTS + i for i in range(COUNTS[chunk] if chunk >= 0 else 0)]


@pytest.mark.parametrize("walk", WALKS)
def test_a_pass_up_or_down_goes_through_its_stage(walk):
    up, down = (
        jax.jit(lambda of, go=go, way=way: go(step(way), of, empty())) for go, way in ((walk.up, UP), (walk.down, DOWN))
    )
    for chunk in (-1, 0, 1):
        assert told(up(one(chunk))) == layers(chunk, UP)
        assert told(down(one(chunk))) == layers(chunk, DOWN)[::-1]


@pytest.mark.parametrize("walk", WALKS)
def test_two_passes_each_go_through_their_stage_and_meet_where_they_are_paired(walk):
    @jax.jit
    def both(ahead, back, paired):
        return walk.both(step(UP), step(DOWN), pair, ahead, back, paired, empty())

    for ahead, back in itertools.product((-1, 0, 1), repeat=2):
        paired = ahead >= 0 and back >= 0
        if paired and ahead == back:
            continue  # no schedule pairs two passes of one stage
        log = told(both(one(ahead), one(back), jnp.asarray(paired)))
        assert sum(number >= PAIRED for number in log) == 2 * LEAST * paired
        log = [number % PAIRED for number in log]
        assert [number for number in log if number < DOWN] == layers(ahead, UP)
        assert [number for number in log if number >= DOWN] == layers(back, DOWN)[::-1]
