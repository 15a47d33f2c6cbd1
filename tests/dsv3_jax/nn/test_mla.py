"""Latent attention as a layer: what its norm touches, causality (properties 7 and 8 of spec 28), bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.nn.mla import MLA
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(micro.V3).model
RANK = CONFIG.kv_lora_rank
X = np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(9), (2, 9))


@functools.partial(jax.jit, static_argnums=0)
def _attend(graph, state, x):
    return nnx.merge(graph, state)(x, jnp.asarray(POSITIONS))[0]


def attend(layer, x=X):
    return np.asarray(_attend(*nnx.split(layer), jnp.asarray(x)))


@pytest.fixture
def layer():
    return micro.module(lambda rngs: MLA(CONFIG, rngs=rngs))


def test_a_token_changes_no_output_before_its_own(layer):
    before = attend(layer)
    for j in (0, 4, 8):
        changed = X.copy()
        changed[:, j] += 1.0
        after = attend(layer, changed)
        np.testing.assert_array_equal(after[:, :j], before[:, :j])
        assert (np.abs(after - before)[:, j:].max(-1) > 1e-4).all(), "every later position sees it"


def test_scaling_the_latent_columns_changes_nothing_because_the_latent_is_normalized(layer):
    before = attend(layer)
    layer.kv_down.kernel[...] = layer.kv_down.kernel[...].at[:, :RANK].multiply(7.0)
    np.testing.assert_allclose(attend(layer), before, atol=1e-5)


def test_scaling_the_rope_key_columns_changes_the_output_because_that_part_is_not_normalized(layer):
    before = attend(layer)
    layer.kv_down.kernel[...] = layer.kv_down.kernel[...].at[:, RANK:].multiply(7.0)
    assert np.abs(attend(layer) - before).max() > 0.05


def test_scaling_the_query_latent_changes_nothing_because_it_is_normalized(layer):
    before = attend(layer)
    layer.q_down.kernel[...] *= 5.0
    np.testing.assert_allclose(attend(layer), before, atol=1e-5)


def test_without_the_latent_norm_the_output_is_another(layer, monkeypatch):
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    p = micro.attention_weights(weights)
    found, x = attend(layer)[0], X[0].astype(np.float64)
    np.testing.assert_allclose(found, reference.mla(x, POSITIONS[0], p, CONFIG), atol=1e-5)
    plain = reference.rms_norm
    monkeypatch.setattr(reference, "rms_norm", lambda x, w, eps: x if w is p["kv_a_layernorm"] else plain(x, w, eps))
    assert np.abs(found - reference.mla(x, POSITIONS[0], p, CONFIG)).max() > 0.05


def test_bfloat16_is_close_to_float32(layer):
    exact = attend(layer)
    low = attend(layer, jnp.asarray(X, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(np.float32) - exact) < 0.02 * np.linalg.norm(exact)
