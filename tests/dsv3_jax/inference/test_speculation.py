"""Drafted tokens change the pace of the text, and neither the text nor its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampler import Settings
from dsv3_jax.inference.speculation import Drafts, verify

ROWS, WORDS = 8192, 6
check = jax.jit(verify, static_argnames="drawing")


def settings(temperature=1.0, rows=ROWS):
    zeros = np.zeros(rows, np.int32)
    ones = np.ones(rows, np.float32)
    return Settings(temperature * ones, ones, zeros, 0 * ones, zeros.astype(np.uint32), np.arange(rows, dtype=np.int32))


def tiled(array):
    return jnp.broadcast_to(jnp.asarray(array, jnp.float32), (ROWS, *np.shape(array)))


def chi_square(tokens, p):
    counts = np.bincount(tokens, minlength=WORDS)
    assert not counts[p == 0].any()
    expected = (p * counts.sum())[p > 0]
    return np.sum((counts[p > 0] - expected) ** 2 / expected)


@pytest.fixture(scope="module")
def drawn():
    """p of three places, q of two drafts, and what became of drafts drawn from q."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(WORDS), 3), rng.dirichlet(np.ones(WORDS), 2)
    q[0, 2], q[0, 3] = 0, q[0, 2] + q[0, 3]
    tokens = np.stack([rng.choice(WORDS, ROWS, p=row) for row in q], axis=1).astype(np.int32)
    drafts = Drafts(jnp.asarray(tokens), tiled(q), jnp.ones(ROWS, bool))
    verdict = check(tiled(np.log(p)), drafts, settings(), jnp.zeros(ROWS, jnp.int32), drawing=True)
    return p, q, tokens, np.asarray(verdict.tokens), np.asarray(verdict.size)


LIMIT = 20.52  # 5 degrees of freedom, 1 in 1000


def test_the_first_token_has_the_models_distribution_whatever_was_drafted(drawn):
    p, q, drafted, tokens, _ = drawn
    assert chi_square(drafted[:, 0], q[0]) < LIMIT
    assert chi_square(tokens[:, 0], p[0]) < LIMIT
    assert chi_square(tokens[:, 0], q[0] + 1e-9) > 1000


def test_so_has_every_further_one_that_comes(drawn):
    p, _, _, tokens, size = drawn
    for place in (1, 2):
        come = tokens[size > place, place]
        assert len(come) > 500
        assert chi_square(come, p[place]) < LIMIT
        # and independently of what stands before it
        assert chi_square(tokens[(size > place) & (tokens[:, 0] == tokens[0, 0]), place], p[place]) < LIMIT


def test_the_share_of_drafts_that_count_is_what_p_and_q_have_in_common(drawn):
    p, q, _, _, size = drawn
    common = np.minimum(p[:2], q).sum(axis=1)
    assert np.mean(size > 1) == pytest.approx(common[0], abs=0.02)
    assert np.mean(size > 2) == pytest.approx(common[0] * common[1], abs=0.02)


def test_drafts_that_are_not_there_leave_plain_draws(drawn):
    p, q, drafted, _, _ = drawn
    none = Drafts(jnp.asarray(drafted), tiled(q), jnp.zeros(ROWS, bool))
    verdict = check(tiled(np.log(p)), none, settings(), jnp.zeros(ROWS, jnp.int32), drawing=True)
    assert (verdict.size == 1).all()
    assert chi_square(np.asarray(verdict.tokens)[:, 0], p[0]) < LIMIT


@pytest.mark.parametrize("drawing", [False, True])
def test_greedy_drafts_count_while_they_are_the_best(drawing):
    best = [3, 1, 4]
    logits = jnp.tile(5 * jax.nn.one_hot(jnp.array(best), WORDS), (4, 1, 1))
    tokens = jnp.array([[3, 1], [3, 2], [0, 1], [3, 1]], jnp.int32)
    drafts = Drafts(tokens, jnp.zeros((4, 2, WORDS)), jnp.array([True, True, True, False]))
    verdict = check(logits, drafts, settings(0.0, 4), jnp.zeros(4, jnp.int32), drawing=drawing)
    assert verdict.size.tolist() == [3, 2, 1, 1]
    for row, size in enumerate((3, 2, 1, 1)):
        assert verdict.tokens[row, :size].tolist() == best[:size]
