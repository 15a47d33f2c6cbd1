"""Balance losses and the bias update: golden values of spec 24, properties 16-18 of spec 28."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import LossConfig
from dsv3_jax.nn import balance
from dsv3_jax.nn.router import Routing
from tests.dsv3_jax import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

sequence_balance = jax.jit(balance.sequence_balance, static_argnums=1)
expert_balance = jax.jit(balance.expert_balance)
device_balance = jax.jit(balance.device_balance, static_argnums=1)
communication_balance = jax.jit(balance.communication_balance, static_argnums=(1, 2))
balance_loss = jax.jit(balance.balance_loss, static_argnums=1)
update_bias = jax.jit(balance.update_bias, static_argnums=3)
max_violation = jax.jit(balance.max_violation)

SCORES = np.array([[0.9, 0.1, 0.5, 0.3], [0.8, 0.2, 0.6, 0.4], [0.7, 0.3, 0.1, 0.9], [0.6, 0.4, 0.2, 0.8]])


def routing(scores, experts):
    scores, experts = np.asarray(scores, np.float32), np.asarray(experts, np.int32)
    return Routing(jnp.asarray(experts), jnp.ones(experts.shape), jnp.asarray(scores))


def top(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


GOLDEN = routing(SCORES[None], top(SCORES, 2)[None])


def draw(batch=3, tokens=20, experts=8, k=3, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.random((batch, tokens, experts))
    chosen = np.stack([[rng.permutation(experts)[:k] for _ in range(tokens)] for _ in range(batch)])
    return routing(scores, chosen)


def test_bias_update_is_the_golden_one():
    change = update_bias(jnp.zeros(4), jnp.array([10, 30, 20, 20]), 0.001)
    np.testing.assert_allclose(change, [0.001, -0.001, 0, 0], rtol=1e-6)


def test_bias_update_compares_each_router_with_its_own_mean():
    bias = jnp.array([[0.5, 0.5], [0.1, -0.1]])
    counts = jnp.array([[100, 300], [4, 2]])
    np.testing.assert_allclose(update_bias(bias, counts, 0.01), [[0.51, 0.49], [0.09, -0.09]], rtol=1e-6)


def test_proportional_update_moves_by_the_share_of_the_mean_load():
    found = update_bias(jnp.zeros(4), jnp.array([10, 30, 20, 20]), 0.01, "error")
    np.testing.assert_allclose(found, [0.005, -0.005, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("rule", ["sign", "error"])
def test_speed_zero_freezes_the_bias(rule):
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8)), jnp.float32)
    counts = jnp.asarray(np.random.default_rng(1).integers(0, 99, (2, 8)))
    np.testing.assert_array_equal(update_bias(bias, counts, 0.0, rule), bias)


def test_updates_drive_a_stationary_skewed_router_towards_balance():
    rng = np.random.default_rng(2)
    affinity = 1 / (1 + np.exp(-(rng.standard_normal((2000, 16)) + np.linspace(-1.5, 1.5, 16))))
    bias, violations = jnp.zeros(16), []
    for _ in range(400):
        counts = np.bincount(top(affinity + np.asarray(bias), 4).ravel(), minlength=16)
        violations.append(float(max_violation(jnp.asarray(counts))))
        bias = update_bias(bias, jnp.asarray(counts), 0.002)
    assert violations[0] > 1.5
    assert max(violations[-20:]) < 0.1


def test_max_violation_is_the_excess_of_the_fullest_expert_averaged_over_routers():
    counts = jnp.array([[10, 30, 20, 20], [5, 5, 5, 5]])
    np.testing.assert_allclose(max_violation(counts), (0.5 + 0.0) / 2, rtol=1e-6)
    np.testing.assert_allclose(balance.relative_load(counts)[0], [0.5, 1.5, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(balance.relative_load(jnp.zeros((1, 4), jnp.int32)), 0.0)


@pytest.mark.parametrize("indicator", ["affinity", "selected"])
def test_sequence_balance_is_the_golden_one(indicator):
    np.testing.assert_allclose(balance.load_fraction(GOLDEN.experts, 4), [[2, 0, 1, 1]], rtol=1e-6)
    assert float(sequence_balance(GOLDEN, indicator)) == pytest.approx(1.26111111, abs=1e-6)


def test_device_balance_is_the_golden_one():
    normalized = GOLDEN._replace(scores=GOLDEN.scores / GOLDEN.scores.sum(-1, keepdims=True))
    assert float(device_balance(normalized, 2)) == pytest.approx(1.0, abs=1e-6)
    # Unequal devices: f' = [1.5, 0.5], P' = [0.51388889, 0.48611111].
    moved = normalized._replace(experts=jnp.asarray([[[0, 1], [0, 1], [0, 2], [1, 3]]]))
    assert float(device_balance(moved, 2)) == pytest.approx(1.5 * 0.51388889 + 0.5 * 0.48611111, abs=1e-6)


def test_the_indicator_chooses_between_raw_affinities_and_the_experts_really_selected():
    drawn = draw()
    by_affinity, by_selection = (float(sequence_balance(drawn, name)) for name in ("affinity", "selected"))
    scores, experts = np.asarray(drawn.scores, np.float64), np.asarray(drawn.experts)
    expected = [
        np.mean([reference.sequence_balance(s, rows, 3) for s, rows in zip(scores, chosen, strict=True)])
        for chosen in (top(scores, 3), experts)
    ]
    assert [by_affinity, by_selection] == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_v2_losses_equal_the_formulas_written_as_loops():
    drawn, devices, limit = draw(seed=4), 4, 2
    expert, device, communication = [], [], []
    for scores, chosen in zip(np.asarray(drawn.scores, np.float64), np.asarray(drawn.experts), strict=True):
        (T, N), K = scores.shape, chosen.shape[1]
        f = [N / (K * T) * sum(i in row for row in chosen) for i in range(N)]
        P = [scores[:, i].mean() for i in range(N)]
        members = [range(g * N // devices, (g + 1) * N // devices) for g in range(devices)]
        sent = [sum(any(i in row for i in group) for row in chosen) for group in members]
        expert.append(sum(f[i] * P[i] for i in range(N)))
        device.append(sum(np.mean([f[i] for i in g]) * sum(P[i] for i in g) for g in members))
        communication.append(sum(devices / (limit * T) * sent[n] * sum(P[i] for i in g) for n, g in enumerate(members)))
    assert float(expert_balance(drawn)) == pytest.approx(np.mean(expert), rel=1e-5)
    assert float(device_balance(drawn, devices)) == pytest.approx(np.mean(device), rel=1e-5)
    found = communication_balance(drawn, devices, limit)
    assert float(found) == pytest.approx(np.mean(communication), rel=1e-5)


def test_loads_sum_to_the_number_of_experts():
    np.testing.assert_allclose(balance.load_fraction(draw().experts, 8).sum(-1), 8.0, rtol=1e-6)


def test_a_uniform_load_or_uniform_affinities_give_exactly_one():
    every = np.stack([np.roll(np.arange(8), t)[:3] for t in range(8)])[None]
    rng = np.random.default_rng(5)
    skewed = routing(rng.random((1, 8, 8)), every)
    assert float(sequence_balance(skewed, "selected")) == pytest.approx(1.0, 1e-6)
    flat = draw()._replace(scores=jnp.full((3, 20, 8), 0.3))
    assert float(sequence_balance(flat, "selected")) == pytest.approx(1.0, 1e-6)


def test_load_that_follows_affinity_costs_more_than_one():
    scores = np.random.default_rng(6).random((2, 64, 8)) + np.linspace(0, 1, 8)
    assert float(sequence_balance(routing(scores, top(scores, 2)))) > 1.1


def test_gradient_flows_through_the_mean_affinity_and_never_through_the_load():
    drawn = draw(batch=1)

    def loss(scores):
        return sequence_balance(drawn._replace(scores=scores), "selected")

    found = jax.grad(loss)(drawn.scores)[0]
    s = np.asarray(drawn.scores[0], np.float64)
    f = np.array([8 / (3 * 20) * np.sum(np.asarray(drawn.experts) == i) for i in range(8)])
    total = s.sum(1, keepdims=True)
    expected = (f / total - (s @ f)[:, None] / total**2) / 20
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_the_configured_losses_add_up_each_times_its_alpha():
    drawn = draw()
    off = LossConfig(sequence_balance=0.0)
    assert float(balance_loss(drawn, off)) == 0.0
    parts = {
        "sequence_balance": sequence_balance(drawn),
        "expert_balance": expert_balance(drawn),
        "device_balance": device_balance(drawn, 4),
        "communication_balance": communication_balance(drawn, 4, 2),
    }
    alphas = dict(zip(parts, (0.1, 0.02, 0.003, 0.4), strict=True))
    shape = {"balance_devices": 4, "devices_per_token": 2}
    for name, part in parts.items():
        alone = dataclasses.replace(off, **shape, **{name: alphas[name]})
        assert float(balance_loss(drawn, alone)) == pytest.approx(alphas[name] * float(part), rel=1e-6)
    every = LossConfig(**shape, **alphas)
    expected = sum(alphas[name] * float(part) for name, part in parts.items())
    assert float(balance_loss(drawn, every)) == pytest.approx(expected, rel=1e-6)
