"""Every transport against the dense layer: values and all gradients, on meshes of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.testing import assert_close
from sharding.expert_parallel import TRANSPORTS, ExpertParallel, memory_rows, routed, supported
from tests.sharding.expert_parallel.layer import (
    CHOICES,
    EXPERTS,
    TOKENS,
    dense_layer,
    draw,
    expert_fn,
    routings,
    sharded_layer,
)

PLACEMENTS = [
    *(ExpertParallel(size, "padded") for size in (2, 4, 8)),
    *(ExpertParallel(size, "counted", capacity=1.0) for size in (2, 4, 8)),
    *(ExpertParallel(size, "ring") for size in (2, 4, 8)),
    ExpertParallel(4, "two_hop", capacity=1.0),
    ExpertParallel(8, "two_hop", capacity=0.0),
]


def name_of(placement):
    return f"{placement.transport}-{placement.size}{'-fp8' if placement.fp8 else ''}"


def assert_equal_to_the_dense_layer(placement, size=16):
    x, weights, params, dy = draw(size)
    for name, experts in routings().items():
        found = sharded_layer(placement)(x, experts, weights, params, dy)
        expected = dense_layer(x, experts, weights, params, dy, placement.fp8)
        for part, left, right in zip(
            ("y", "dx", "dweights", "da", "db"), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
        ):
            try:
                assert_close(left, right, tolerance=1e-6)
            except AssertionError as error:
                pytest.fail(f"{name}, {part}: {error}")


@pytest.mark.parametrize("placement", PLACEMENTS, ids=name_of)
def test_values_and_gradients_equal_the_dense_layer_for_every_routing(placement):
    assert_equal_to_the_dense_layer(placement)


@pytest.mark.parametrize("transport", ["ring", "two_hop"])
def test_fp8_changes_values_and_gradients_by_one_rounding_of_tokens_and_of_the_outputs_gradient(transport):
    assert_equal_to_the_dense_layer(ExpertParallel(4, transport, capacity=0.0, fp8=True), size=144)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(placement, dtype=np.float32, size=16):
    """The program of :func:`assert_equal_to_the_dense_layer`, traced once for both."""
    x, weights, params, dy = draw(size)
    x, params, dy = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, params, dy))
    return sharded_layer(placement).trace(x, routings()["uniform"], weights, params, dy).jaxpr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bfloat16_tokens_travel_as_bytes_and_sums_as_bfloat16(transport):
    placement = ExpertParallel(4, transport, capacity=0.0 if transport == "two_hop" else 4.0, fp8=True)
    collective = "ppermute" if transport == "ring" else "all_to_all"
    wide = [
        (str(equation.invars[0].aval.dtype), equation.invars[0].aval.shape[-1])
        for equation in equations(traced(placement, jnp.bfloat16, 32))
        if equation.primitive.name == collective and equation.invars[0].aval.shape[-1] > 2 * CHOICES
    ]
    # a row of 32 values and one scale out and, for the gradient, out again; sums back both times
    assert set(wide) == {("uint8", 33), ("bfloat16", 32)}
    hops = 2 if transport == "two_hop" else 1
    if transport != "ring":
        assert sorted(wide) == sorted([("uint8", 33), ("bfloat16", 32)] * 2 * hops)


@pytest.mark.parametrize(
    "placement",
    [*PLACEMENTS, ExpertParallel(8, "counted", capacity=1.5), ExpertParallel(8, "two_hop", capacity=1.5)],
    ids=name_of,
)
def test_no_array_of_forward_or_backward_is_larger_than_stated(placement):
    rows = max(
        int(np.prod(variable.aval.shape[:-1]))
        for equation in equations(traced(placement))
        if equation.primitive.name not in ("shard_map", "jit")  # whole arrays of all devices
        for variable in equation.outvars
        if variable.aval.shape[-1:] == (16,)
    )
    assert rows == max(memory_rows(placement, TOKENS, CHOICES, EXPERTS, 4))


def test_two_ranks_have_room_for_the_worst_case_by_default():
    for choices, experts in ((8, 256), (3, 4), (8, 8)):
        counted, padded = (
            memory_rows(ExpertParallel(2, name), 100, choices, experts, 8) for name in ("counted", "padded")
        )
        assert counted == padded


def test_stated_rows_are_bounded_by_the_load_where_promised():
    tokens, choices, experts, block = 4096, 8, 256, 128
    stated = {
        name: memory_rows(ExpertParallel(64, name, capacity=1.5), tokens, choices, experts, block)
        for name in TRANSPORTS
    }
    worst = 64 * tokens
    assert stated["padded"][0] == worst
    assert stated["padded"][1] >= 4 * worst
    assert stated["ring"][0] == tokens
    for name in ("counted", "two_hop"):
        assert stated[name][1] <= 1.7 * tokens * choices, name


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_jax_agrees_on_the_axes_that_everything_varies_over(transport):
    x, weights, params, dy = draw()
    layer = sharded_layer(ExpertParallel(4, transport, capacity=1.0), check_vma=True)
    y = layer.trace(x, routings()["uniform"], weights, params, dy).out_info[0]
    assert y.shape == x.shape


def on_one_rank(x, experts, weights, params, **changes):
    return routed(
        x, experts, weights, params, **({"expert_fn": expert_fn, "num_experts": EXPERTS, "block": 4} | changes)
    )


def test_one_rank_needs_no_mesh():
    x, weights, params, dy = jax.tree.map(jnp.asarray, draw())
    experts = jnp.asarray(routings()["uniform"])

    def both(x, weights, params):
        y, back = jax.vjp(lambda x, w, params: on_one_rank(x, experts, w, params), x, weights, params)
        return y, *back(dy)

    found = jax.jit(both)(x, weights, params)
    expected = dense_layer(x, experts, weights, params, dy)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, tolerance=1e-6)


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (ExpertParallel(2, "two_hop"), r"'two_hop' needs expert >= 4 .* got 2$"),
        (ExpertParallel(3), r"^8 experts do not divide over expert = 3 ranks$"),
        (ExpertParallel(2, "counted", capacity=0.0), r"^capacity = 0.0 must be above 0"),
    ],
)
def test_what_cannot_run_is_told_in_one_line(placement, reason):
    x, weights, params, _ = jax.tree.map(jnp.asarray, draw())
    with pytest.raises(ValueError, match=reason):
        on_one_rank(x, jnp.zeros((len(x), CHOICES), int), weights, params, placement=placement)


@pytest.mark.parametrize(
    ("sizes", "transport", "node_size", "reason"),
    [
        ({"expert": 1}, "two_hop", 0, None),
        ({"pipe": 2, "expert": 4, "data": 1}, "two_hop", 0, None),
        ({"expert": 64}, "two_hop", 8, None),
        ({"expert": 2}, "padded", 0, None),
        ({}, "ring", 0, None),
        ({"expert": 3}, "two_hop", 0, "needs expert >= 4"),
        ({"expert": 6}, "two_hop", 4, "nodes of 4 ranks do not divide expert = 6"),
        ({"expert": 4}, "two_hop", 4, "nodes of 4 ranks do not divide expert = 4"),
        ({"expert": 4}, "two_hop", 1, "nodes of 1 ranks do not divide expert = 4"),
        ({"expert": 4}, "pigeon", 0, "transport 'pigeon' is not one of padded, counted, ring, two_hop"),
    ],
)
def test_supported_says_why_not(sizes, transport, node_size, reason):
    found = supported(sizes, transport, node_size)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found
