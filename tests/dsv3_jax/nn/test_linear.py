"""Matrix products over float32 masters, initialization, norm and SwiGLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.ffn import swiglu
from dsv3_jax.nn.linear import Embedding, init_weight, matmul
from dsv3_jax.nn.norm import rms_norm
from tests.dsv3_jax import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_weight_gradient_under_bfloat16_is_accumulated_and_kept_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 400, 8)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((3, 400, 6)), jnp.bfloat16)
    y, back = jax.vjp(matmul, x, w)
    dx, dw = back(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, dy, rounded = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, dy, w.astype(jnp.bfloat16)))
    np.testing.assert_allclose(dw, np.einsum("bti,bto->io", x, dy), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(y.astype(jnp.float32), x @ rounded, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(dx.astype(jnp.float32), dy @ rounded.T, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_weights_are_drawn_with_the_configured_deviation(distribution):
    config = ModelConfig(init_std=0.006, init_distribution=distribution)
    drawn = np.asarray(init_weight(config, nnx.Rngs(0), 300, 200))
    assert drawn.dtype == np.float32
    assert drawn.std() == pytest.approx(0.006, rel=0.01)
    assert abs(drawn.mean()) < 1e-4
    limit = np.abs(drawn).max() / 0.006
    assert limit > 3.5 if distribution == "normal" else 2.9 < limit < 3.05


def test_every_call_draws_anew_and_a_seed_draws_the_same():
    config, rngs = ModelConfig(), nnx.Rngs(0)
    first, second = init_weight(config, rngs, 30, 20), init_weight(config, rngs, 30, 20)
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.2
    np.testing.assert_array_equal(init_weight(config, nnx.Rngs(0), 30, 20), first)
    assert (np.asarray(init_weight(config, nnx.Rngs(1), 30, 20)) != np.asarray(first)).all()


def test_long_weights_do_not_repeat_themselves():
    drawn = np.ravel(init_weight(ModelConfig(), nnx.Rngs(0), 3, 1 << 15))
    assert np.unique(drawn).size > 0.98 * drawn.size


def test_norm_equals_the_formula_and_rounds_once():
    rng = np.random.default_rng(1)
    x, scale = 50 * rng.standard_normal((2, 3, 16)), 1 + rng.standard_normal(16)
    found = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-6)
    np.testing.assert_allclose(found, reference.rms_norm(x, scale, 1e-6), rtol=1e-5)
    low = jnp.asarray(x, jnp.bfloat16)
    wide = rms_norm(low.astype(jnp.float32), jnp.asarray(scale, jnp.float32), 1e-6)
    narrow = rms_norm(low, jnp.asarray(scale, jnp.float32), 1e-6)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow.astype(jnp.float32), wide.astype(jnp.bfloat16).astype(jnp.float32))


def test_norm_of_zeros_is_zero_and_its_gradient_finite():
    scale = jnp.ones(8)
    assert not rms_norm(jnp.zeros((1, 8)), scale, 1e-6).any()
    assert np.isfinite(jax.grad(lambda x: rms_norm(x, scale, 1e-6).sum())(jnp.zeros((1, 8)))).all()


def test_swiglu_gates_by_the_first_half():
    x = np.random.default_rng(2).standard_normal((5, 12)).astype(np.float32)
    np.testing.assert_allclose(swiglu(jnp.asarray(x)), reference.silu(x[:, :6]) * x[:, 6:], atol=1e-6)


def test_embedding_gradients_of_repeated_tokens_add_up_in_float32():
    embedding = Embedding(ModelConfig(vocab_size=5, hidden_size=4), rngs=nnx.Rngs(0))
    graph, state = nnx.split(embedding)
    tokens = jnp.asarray([[3] * 600 + [1]])

    def total(state):
        return jnp.sum(nnx.merge(graph, state)(tokens, jnp.bfloat16).astype(jnp.float32))

    found = jax.grad(total)(state)["table"][...]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[:, 0], [0, 1, 0, 600, 0])
