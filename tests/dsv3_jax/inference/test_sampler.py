"""Draws follow the distribution that penalties, temperature and cuts leave, and depend on a row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampler import Penalties, Settings, count_tokens, draw, penalize, probabilities

DRAWS = 4096
LOGITS = np.array([1.0, -0.5, 0.3, 2.0, -3.0], np.float32)
chances = jax.jit(probabilities)


def settings(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, choice=None):
    filled = [np.full(rows, value, kind) for value, kind in ((temperature, "f4"), (top_p, "f4"), (top_k, "i4"))]
    choices = np.arange(rows, dtype=np.int32) if choice is None else np.full(rows, choice, np.int32)
    return Settings(*filled, np.full(rows, min_p, np.float32), np.full(rows, seed, np.uint32), choices)


@jax.jit
def drawn(logits, how, index):
    return draw(probabilities(logits, how), how.keys(index[:, None], 1)[:, 0])


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_draws_follow_the_softmax_of_logits_over_temperature():
    logits = jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1))
    for temperature in (0.7, 1.0, 2.5):
        right = softmax(LOGITS / temperature)
        found = drawn(logits, settings(DRAWS, temperature), np.zeros(DRAWS, np.int32))
        counts = np.bincount(found, minlength=5)
        assert np.sum((counts - DRAWS * right) ** 2 / (DRAWS * right)) < 18.47  # 4 degrees of freedom, 1 in 1000
        wrong = np.roll(right, 1)
        assert np.sum((counts - DRAWS * wrong) ** 2 / (DRAWS * wrong)) > 1000


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        # 0.59, 0.22, 0.11, 0.05, 0.004 by ids 3, 0, 2, 1, 4: 0.8 is reached by two of them, 0.9 by three.
        ({"top_p": 0.8}, [3, 0]),
        ({"top_p": 0.9}, [3, 0, 2]),
        ({"top_p": 1e-6}, [3]),
        ({"top_k": 3}, [3, 0, 2]),
        ({"top_k": 9}, [3, 0, 2, 1, 4]),
        ({"min_p": 0.3}, [3, 0]),
        ({"min_p": 1.0}, [3]),
        ({"top_k": 3, "top_p": 0.8}, [3, 0]),
        ({"top_k": 1, "min_p": 0.001}, [3]),
        # After the temperature 0.41 and 0.27 are the best.
        ({"temperature": 2.5, "top_p": 0.6}, [3, 0]),
        ({"temperature": 0.0, "top_p": 0.6}, [3]),
    ],
)
def test_a_cut_keeps_the_best_and_makes_them_whole(cut, kept):
    (found,) = np.asarray(chances(jnp.asarray(LOGITS)[None], settings(1, **cut)))
    expected = np.zeros(5)
    p = softmax(LOGITS / (cut.get("temperature") or 1.0))
    expected[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.999])
def test_a_nucleus_is_the_smallest_best_set_that_reaches_its_mass(top_p):
    logits = np.random.default_rng(3).normal(size=(64, 33)).astype(np.float32) * 3
    kept = np.asarray(chances(jnp.asarray(logits), settings(64, top_p=top_p))) > 0
    for row, keep in zip(logits, kept, strict=True):
        p = softmax(row.astype(np.float64))
        assert p[keep].sum() > top_p - 1e-5
        assert p[keep].sum() - p[keep].min() < top_p + 1e-5
        assert p[keep].min() >= p[~keep].max()


def test_a_cut_among_equals_takes_the_lowest_ids():
    for cut in ({"top_p": 0.5}, {"top_k": 17}):
        kept = np.asarray(chances(jnp.zeros((64, 33)), settings(64, **cut))) > 0
        assert kept[:, :17].all()
        assert not kept[:, 17:].any()


def test_rows_of_one_batch_have_their_own_settings():
    logits = jnp.tile(jnp.asarray(LOGITS), (3, 1))
    how = settings(3)._replace(temperature=np.array([0, 1, 2], np.float32), top_k=np.array([0, 2, 0], np.int32))
    greedy, two, warm = np.asarray(chances(logits, how))
    assert greedy.tolist() == [0, 0, 0, 1, 0]
    assert (two > 0).tolist() == [True, False, False, True, False]
    np.testing.assert_allclose(warm, softmax(LOGITS / 2), atol=1e-6)


def test_temperatures_near_and_at_0_take_the_best():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 33)), jnp.float32)
    for temperature in (0.0, 1e-30):
        found = np.asarray(chances(logits, settings(64, temperature)))
        np.testing.assert_array_equal(found, np.eye(33)[np.argmax(logits, axis=-1)])


def test_a_draw_depends_on_seed_choice_and_number_and_on_nothing_else():
    logits = jnp.zeros((16, 33))
    index = np.full(16, 3, np.int32)
    first = drawn(logits, settings(16, seed=5), index)
    np.testing.assert_array_equal(first, drawn(logits, settings(16, seed=5), index))
    assert (first != drawn(logits, settings(16, seed=6), index)).sum() > 8
    assert (first != drawn(logits, settings(16, seed=5), index + 1)).sum() > 8
    assert len(set(np.asarray(first).tolist())) > 8
    assert len(set(np.asarray(drawn(logits, settings(16, seed=5, choice=2), index)).tolist())) == 1
    assert drawn(logits[:1], settings(1, seed=5, choice=2), index[:1])[0] == first[2]


def test_penalties_lower_what_stands_before():
    tokens = jnp.array([[3, 3, 0, 1, 1, 1, 4, 4]])
    start, stop = jnp.array([3]), jnp.array([6])
    written = count_tokens(tokens, start, stop, 5)
    seen = count_tokens(tokens, jnp.array([0]), stop, 5)
    assert written.tolist() == [[0, 3, 0, 0, 0]]
    assert seen.tolist() == [[1, 3, 0, 2, 0]]
    one = jnp.ones(1)
    found = penalize(jnp.asarray(LOGITS)[None], Penalties(0.5 * one, 0.25 * one, 2 * one, written, seen))
    np.testing.assert_allclose(found[0], [0.5, -1.0 - 0.75 - 0.5, 0.3, 1.0, -3.0], atol=1e-6)
