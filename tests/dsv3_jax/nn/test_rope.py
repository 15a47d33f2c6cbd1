"""Rotary embedding and YaRN: golden values of spec 24 and 4.4, properties 3, 4 and 6 of spec 28."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RopeScaling, load_config
from dsv3_jax.nn.rope import rope_frequencies, rotate, rotation, softmax_scale, yarn_bounds, yarn_mscale
from tests.dsv3_jax import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

YARN = RopeScaling(factor=40.0)
PLAIN = RopeScaling()


def tables(positions, dim=64, scaling=PLAIN):
    config = ModelConfig(qk_rope_head_dim=dim, rope_scaling=scaling)
    return rotation(config, jnp.asarray(positions)[None])


def test_yarn_interpolates_from_pair_10_to_pair_23():
    assert yarn_bounds(64, 10000.0, YARN) == (10, 23)


@pytest.mark.parametrize(
    ("k", "value", "share"),
    [
        (11, 0.0390069066, 0.925),
        (12, 0.0268793601, 0.85),
        (16, 0.0055, 0.55),
        (20, 7.905694e-4, 0.25),
        (22, 1.778279e-4, 0.1),
        (23, 3.333804e-5, 0.025),
        (31, 3.333804e-6, 0.025),
    ],
)
def test_yarn_frequencies_are_the_golden_ones(k, value, share):
    found = rope_frequencies(64, 10000.0, YARN)
    assert found[k] == pytest.approx(value, rel=1e-6)
    assert found[k] == pytest.approx(share * 10000.0 ** (-k / 32), rel=1e-12)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_has_the_golden_sum():
    plain, yarn = (rope_frequencies(64, 10000.0, scaling) for scaling in (PLAIN, YARN))
    np.testing.assert_array_equal(yarn[:11], plain[:11])
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40, rtol=1e-14)
    assert plain.sum() == pytest.approx(3.9979082345, abs=1e-10)
    assert yarn.sum() == pytest.approx(3.9489362741, abs=1e-10)


@pytest.mark.parametrize(
    ("dim", "base", "scaling"),
    [
        (64, 10000.0, YARN),
        (16, 500.0, RopeScaling(4.0, 128, 8.0, 2.0)),
        (8, 10000.0, RopeScaling(2.0, 4, 1.0, 1.0)),  # low == high
        (4, 10000.0, RopeScaling(8.0, 1 << 20, 32.0, 1.0)),  # high at its bound
    ],
)
def test_yarn_frequencies_equal_the_specification_for_other_shapes(dim, base, scaling):
    s, original, fast, slow = list(dataclasses.astuple(scaling))[:4]
    expected = reference.yarn_frequencies(dim, base, s, original, fast, slow)
    np.testing.assert_allclose(rope_frequencies(dim, base, scaling), expected, rtol=1e-13)


def test_factor_one_is_plain_rope_and_mscale_one():
    np.testing.assert_array_equal(
        rope_frequencies(64, 10000.0, RopeScaling(factor=1.0, beta_fast=3.0)), 10000.0 ** (-np.arange(32) / 32)
    )
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("m", "mscale", "squared", "scale"),
    [(1.0, 1.3688879454, 1.8738542071, 0.1352337789), (0.707, 1.2608037774, 1.5896261651, 0.1147213868)],
)
def test_attention_temperature_is_the_golden_one(m, mscale, squared, scale):
    assert yarn_mscale(40.0, m) == pytest.approx(mscale, abs=1e-10)
    assert yarn_mscale(40.0, m) ** 2 == pytest.approx(squared, abs=1e-10)
    config = ModelConfig(
        qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=RopeScaling(40.0, mscale=m, mscale_all_dim=m)
    )
    assert softmax_scale(config) == pytest.approx(scale, abs=1e-10)
    # The whole temperature is in the softmax scale: rotation keeps lengths.
    cos, sin = rotation(config, jnp.arange(7)[None])
    np.testing.assert_allclose(np.square(cos) + np.square(sin), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "model_only", "scale"),
    [
        ("deepseek_v3", True, 0.1352337789),
        ("deepseek_v3", False, 0.0721687836),
        ("deepseek_v3_32k", False, 0.1352337789),
        ("deepseek_v2_lite", True, 0.1147213868),
    ],
)
def test_released_models_have_yarn_on_and_4k_pretraining_has_it_off(preset, model_only, scale):
    assert softmax_scale(load_config(preset, model_only=model_only).model) == pytest.approx(scale, abs=1e-10)


def test_heads_without_latents_are_scaled_by_their_own_dim():
    assert softmax_scale(ModelConfig(attention="mha", head_dim=64)) == 0.125


def test_unequal_mscales_go_to_the_rotation():
    cos, sin = tables([0, 3, 9], scaling=RopeScaling(40.0, mscale=1.0, mscale_all_dim=0.707))
    gain = reference.mscale(40, 1.0) / reference.mscale(40, 0.707)
    np.testing.assert_allclose(np.hypot(cos, sin), gain, rtol=1e-6)


@pytest.mark.parametrize(("k", "expected"), [(0, (2.2015107348, -0.3915999037)), (16, (0.8987919219, 2.0474796901))])
def test_rotation_of_a_pair_is_the_golden_one(k, expected):
    x = np.zeros((1, 1, 1, 64), np.float32)
    x[..., 2 * k], x[..., 2 * k + 1] = 1.0, 2.0
    turned = np.asarray(rotate(jnp.asarray(x), tables([5]), interleave=True))[0, 0, 0]
    assert turned[2 * k : 2 * k + 2] == pytest.approx(expected, abs=1e-6)
    assert np.count_nonzero(turned) == 2


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_equals_the_complex_product(interleave):
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4, 5], [7, 900, 3, 3, 50, 4095]])
    config = ModelConfig(qk_rope_head_dim=8)
    found = rotate(jnp.asarray(x), rotation(config, jnp.asarray(positions)), interleave=interleave)
    turn = reference.rope_adjacent if interleave else reference.rope_halves
    theta = reference.yarn_frequencies(8, 10000.0, 1, 4096, 32, 1)
    for row, place, expected in zip(x, positions, found, strict=True):
        np.testing.assert_allclose(expected, turn(row.astype(np.float64), place, theta), atol=2e-4)


def scores(q, k, positions, interleave):
    cos_sin = tables(positions, dim=q.shape[-1])
    q, k = (np.asarray(rotate(jnp.asarray(a), cos_sin, interleave=interleave)) for a in (q, k))
    return np.einsum("btnr,bsnr->bnts", q, k)


def test_adjacent_scores_equal_half_split_scores_after_the_evens_odds_permutation():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 9, 2, 16)).astype(np.float32)
    order = np.r_[0:16:2, 1:16:2]
    adjacent = scores(q, k, np.arange(9), True)
    np.testing.assert_allclose(scores(q[..., order], k[..., order], np.arange(9), False), adjacent, atol=1e-5)
    assert np.abs(scores(q, k, np.arange(9), False) - adjacent).max() > 0.1, "without the permutation they differ"


@pytest.mark.parametrize("interleave", [True, False])
def test_scores_depend_on_relative_position_alone(interleave):
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 9, 2, 16)).astype(np.float32)
    near = scores(q, k, np.arange(9), interleave)
    np.testing.assert_allclose(scores(q, k, np.arange(9) + 1000, interleave), near, atol=2e-3)
    assert np.abs(scores(q, k, np.arange(9) * 2, interleave) - near).max() > 0.1


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 5, 2, 16)), jnp.bfloat16)
    cos_sin = tables(np.arange(100, 105), dim=16)
    found = rotate(x, cos_sin, interleave=True)
    assert found.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.float32), cos_sin, interleave=True)
    np.testing.assert_array_equal(found.astype(jnp.float32), wide.astype(jnp.bfloat16).astype(jnp.float32))
