"""The gate: golden values of spec 24, properties 9-12 and 14 of spec 28."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.router import Router, RouterBias, count_experts, select_experts
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = ModelConfig(
    hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
)
LOGITS = 2 * np.sin(1.7 * np.arange(16) + 0.3)
BIAS = 0.05 * np.cos(0.9 * np.arange(16))

V3 = ModelConfig(
    hidden_size=24, n_routed_experts=32, num_experts_per_tok=5, n_group=8, topk_group=3, routed_scaling_factor=2.5
)
V2 = dataclasses.replace(
    V3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
V2_LITE = dataclasses.replace(V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
FLAT = dataclasses.replace(V3, n_group=1, topk_group=1)
FAMILY = pytest.mark.parametrize("config", [V3, V2, V2_LITE, FLAT], ids=["v3", "v2", "v2_lite", "v3_without_groups"])


def router(config, seed=0, bias=None, kernel=None):
    """A router with drawn weights, called as one compiled program."""
    made = micro.module(lambda rngs: Router(config, rngs=rngs), seed)
    if bias is not None:
        made.bias[...] = jnp.asarray(bias, jnp.float32)
    if kernel is not None:
        made.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return made


@functools.partial(jax.jit, static_argnums=0)
def _route(graph, state, x):
    return nnx.merge(graph, state)(x)


def route(made, x):
    return _route(*nnx.split(made), jnp.asarray(x))


def golden(config, bias):
    return route(router(config, bias=bias, kernel=np.eye(16)), LOGITS[None, None].astype(np.float32))


def inputs(config, tokens=50, seed=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, tokens, config.hidden_size)).astype(np.float32)


def expected_of(x, made, config):
    """Experts and weights by the specification, and the smallest selection margin."""
    weight = np.asarray(made.kernel[...], np.float64).T
    bias = np.asarray(made.bias[...], np.float64) if config.has_router_bias else None
    scores = reference.gate_scores(x.astype(np.float64), weight, config)
    flat = scores.reshape(-1, scores.shape[-1])
    chosen = [reference.choose(s, bias, config) for s in flat]
    weights = [reference.gate_values(s, experts, config) for s, (experts, _) in zip(flat, chosen, strict=True)]
    shape = (*x.shape[:2], -1)
    margin = min(gap for _, gap in chosen)
    return np.reshape([experts for experts, _ in chosen], shape), np.reshape(weights, shape), scores, margin


def test_v3_gate_is_the_golden_one():
    routing = golden(GOLDEN, BIAS)
    np.testing.assert_array_equal(routing.experts[0, 0], [1, 12, 15, 0])
    np.testing.assert_allclose(routing.weights[0, 0], [0.682518, 0.692036, 0.614901, 0.510545], atol=1e-6)
    np.testing.assert_allclose(jnp.sum(routing.weights), 2.5, rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0, 0], 1 / (1 + np.exp(-LOGITS)), rtol=1e-6)


def test_gate_without_groups_or_bias_is_the_golden_one():
    flat = dataclasses.replace(GOLDEN, n_group=1, topk_group=1)
    np.testing.assert_array_equal(golden(flat, BIAS).experts[0, 0], [8, 1, 12, 15])
    np.testing.assert_array_equal(golden(flat, np.zeros(16)).experts[0, 0], [8, 12, 1, 4])


def test_groups_are_ranked_by_their_two_best_biased_scores_in_v3_and_by_their_best_in_v2():
    # The best group by its top two is {2, 3}, by its best alone {0, 1}.
    scores = jnp.asarray([[[0.9, 0.1, 0.6, 0.5]]])
    v3 = dataclasses.replace(GOLDEN, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    v2 = dataclasses.replace(v3, topk_method="group_limited_greedy")
    assert select_experts(scores, v3).tolist() == [[[2, 3]]]
    assert select_experts(scores, v2).tolist() == [[[0, 1]]]


@FAMILY
def test_decisions_equal_those_of_the_specification(config):
    made, x = router(config), inputs(config)
    routing = route(made, x)
    experts, weights, scores, margin = expected_of(x, made, config)
    assert margin > 1e-6
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, weights, rtol=2e-5)
    np.testing.assert_allclose(routing.scores, scores, rtol=2e-5)
    assert {leaf.dtype for leaf in routing[1:]} == {jnp.dtype(jnp.float32)}


@FAMILY
def test_weights_sum_to_the_scaling_factor_or_to_it_times_the_chosen_softmax(config):
    routing = route(router(config), inputs(config))
    total = np.asarray(routing.weights).sum(-1)
    if config.norm_topk_prob:
        expected = np.full_like(total, config.routed_scaling_factor)
    else:
        picked = np.take_along_axis(np.asarray(routing.scores), np.asarray(routing.experts), axis=-1)
        expected = config.routed_scaling_factor * picked.sum(-1)
        np.testing.assert_allclose(np.asarray(routing.scores).sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@FAMILY
def test_each_token_selects_k_distinct_experts_in_at_most_topk_group_groups(config):
    experts = np.asarray(route(router(config), inputs(config)).experts).reshape(-1, 5)
    assert all(len(set(row)) == 5 for row in experts)
    groups = [len(set(row // (32 // config.n_group))) for row in experts]
    assert max(groups) <= config.topk_group
    if config.n_group > 1:
        assert max(groups) == config.topk_group, "the limit is reached"


def test_a_constant_added_to_all_biases_changes_nothing():
    x = inputs(V3)
    bias = 0.1 * np.random.default_rng(5).standard_normal(32)
    before, after = (route(router(V3, bias=b), x) for b in (bias, bias + 0.75))
    *_, margin = expected_of(x, router(V3, bias=bias), V3)
    assert margin > 1e-6
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right)


def test_raising_one_bias_never_lowers_that_experts_load():
    x, loads = inputs(V3), []
    for step in np.linspace(-1, 1, 9):
        bias = np.zeros(32)
        bias[7] = step
        loads.append(int(np.sum(route(router(V3, bias=bias), x).experts == 7)))
    assert loads == sorted(loads)
    assert loads[0] == 0
    assert loads[-1] == 100


def test_weights_come_from_unbiased_scores():
    x = inputs(V3)
    bias = 0.3 * np.random.default_rng(6).standard_normal(32)
    biased, plain = (route(router(V3, bias=b), x) for b in (bias, np.zeros(32)))
    np.testing.assert_array_equal(biased.scores, plain.scores)
    sets = [np.sort(np.asarray(r.experts), axis=-1) for r in (biased, plain)]
    same = (sets[0] == sets[1]).all(-1)
    assert 0 < same.sum() < same.size, "the bias must move some selections and leave others"
    by_expert = [
        np.take_along_axis(np.asarray(r.weights), np.argsort(np.asarray(r.experts), axis=-1), axis=-1)
        for r in (biased, plain)
    ]
    np.testing.assert_allclose(by_expert[0][same], by_expert[1][same], rtol=1e-6)


def test_masked_groups_are_never_selected_even_when_every_biased_score_is_negative():
    x = inputs(V3)
    bias = -3 + 0.1 * np.random.default_rng(7).standard_normal(32)
    routing = route(router(V3, bias=bias), x)
    assert (np.asarray(routing.scores) + bias < 0).all()
    groups = [len(set(row // 4)) for row in np.asarray(routing.experts).reshape(-1, 5)]
    assert max(groups) <= 3
    np.testing.assert_array_equal(routing.experts, route(router(V3, bias=bias + 3), x).experts)


@FAMILY
def test_gradients_reach_the_router_through_the_selected_weights_alone(config):
    config = dataclasses.replace(config, norm_topk_prob=False)
    made, x = router(config), jnp.asarray(inputs(config, 1)[:, :1])  # so few tokens that some experts stay unchosen
    graph, params, bias = nnx.split(made, nnx.Param, RouterBias)

    def loss(params, bias):
        return jnp.sum(jnp.square(nnx.merge(graph, params, bias)(x).weights))

    d_params, d_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, bias)
    for leaf in jax.tree.leaves(d_bias):
        np.testing.assert_array_equal(leaf, 0.0)
    assert len(jax.tree.leaves(d_bias)) == config.has_router_bias
    column = np.abs(np.asarray(d_params["kernel"][...])).max(axis=0)
    chosen = np.unique(np.asarray(route(made, x).experts))
    assert (column[chosen] > 1e-4).all()
    if config.scoring_func == "sigmoid":
        np.testing.assert_array_equal(np.delete(column, chosen), 0.0)


def test_bfloat16_inputs_are_routed_in_float32():
    made, x = router(V3), jnp.asarray(inputs(V3), jnp.bfloat16)
    low, high = route(made, x), route(made, x.astype(jnp.float32))
    for left, right in zip(low, high, strict=True):
        np.testing.assert_array_equal(left, right)


def test_counts_are_those_of_every_token_and_slot():
    experts = np.random.default_rng(8).integers(0, 9, (3, 17, 2), dtype=np.int32)
    counts = count_experts(jnp.asarray(experts), 9)
    np.testing.assert_array_equal(counts, np.bincount(experts.ravel(), minlength=9))
