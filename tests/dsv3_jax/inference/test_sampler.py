"""The sampler draws from the distribution that temperature and nucleus leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampler import keep_nucleus, sample

DRAWS = 4096
LOGITS = np.array([1.0, -0.5, 0.3, 2.0, -3.0], np.float32)
drawn = jax.jit(sample)
nucleus = jax.jit(keep_nucleus)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def chi_square(temperature, top_p, expected, seed=0):
    """Statistic over the ids that may come; others must not."""
    logits = jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1))
    counts = np.bincount(drawn(logits, jax.random.key(seed), temperature, top_p), minlength=5)
    possible = expected > 0
    assert not counts[~possible].any()
    return np.sum((counts - DRAWS * expected)[possible] ** 2 / (DRAWS * expected[possible]))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_draws_follow_the_softmax_of_logits_over_temperature(temperature):
    right = softmax(LOGITS / temperature)
    assert chi_square(temperature, 1.0, right) < 18.47  # 4 degrees of freedom, 1 in 1000
    assert chi_square(temperature, 1.0, np.roll(right, 1)) > 1000


def test_draws_in_a_nucleus_follow_the_renormalized_probabilities():
    # 0.59, 0.22, 0.11, 0.05, 0.004 in order: 0.8 is reached by two of them, 0.9 by three.
    p = softmax(LOGITS)
    for top_p, kept in ((0.8, [3, 0]), (0.9, [3, 0, 2])):
        right = np.zeros(5)
        right[kept] = p[kept] / p[kept].sum()
        assert chi_square(1.0, top_p, right) < 13.82  # 2 degrees of freedom, 1 in 1000


def test_the_nucleus_comes_after_the_temperature():
    p = softmax(LOGITS / 2.5)
    assert p[[3, 0]].sum() < 0.8 < p[[3, 0, 2]].sum()
    right = np.zeros(5)
    right[[3, 0, 2]] = p[[3, 0, 2]] / p[[3, 0, 2]].sum()
    assert chi_square(2.5, 0.8, right) < 13.82


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_a_nucleus_is_the_smallest_best_set_that_reaches_its_mass(top_p):
    logits = np.random.default_rng(3).normal(size=(64, 33)).astype(np.float32) * 3
    kept = np.isfinite(nucleus(jnp.asarray(logits), top_p))
    for row, keep in zip(logits, kept, strict=True):
        p = softmax(row.astype(np.float64))
        assert p[keep].sum() > top_p - 1e-5
        assert p[keep].sum() - p[keep].min() < top_p + 1e-5
        assert not (~keep).any() or p[keep].min() >= p[~keep].max()


def test_a_nucleus_among_equals_takes_the_lowest_ids():
    kept = np.isfinite(nucleus(jnp.zeros((64, 33)), 0.5))
    assert kept[:, :17].all()
    assert not kept[:, 17:].any()


def test_temperature_zero_takes_the_best_whatever_the_key():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, 33)), jnp.float32)
    best = np.argmax(logits, axis=-1)
    for seed, temperature, top_p in ((0, 0.0, 1.0), (1, 0.0, 0.3), (2, 1e-30, 1.0), (3, 1.0, 1e-6)):
        np.testing.assert_array_equal(drawn(logits, jax.random.key(seed), temperature, top_p), best)


def test_equal_keys_draw_equal_tokens_and_other_keys_others():
    logits = jnp.zeros((16, 33))
    first, again, other = (np.asarray(drawn(logits, jax.random.key(s), 1.0, 1.0)) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).sum() > 8
    assert len(set(first.tolist())) > 8  # rows draw each their own


def test_a_row_draws_the_same_in_any_batch():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(16, 33)), jnp.float32)
    key = jax.random.key(9)
    np.testing.assert_array_equal(drawn(logits[:4], key, 1.0, 0.9), drawn(logits, key, 1.0, 0.9)[:4])


def test_keeping_all_the_mass_changes_no_draw():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(16, 33)), jnp.float32)
    key = jax.random.key(4)
    np.testing.assert_array_equal(drawn(logits, key, 1.0, 1.0), drawn(logits, key, 1.0, 0.9999999))
