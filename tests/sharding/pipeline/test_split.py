"""A layer in parts computes what it computes in one, and only activations go from part to part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.testing import assert_close
from sharding.pipeline.split import in_parts


def layer(weights, given, x):
    """Two products with a cast between them, a norm-like vector, a loop that adds up, a second output."""
    first, second, scale, looped = weights
    hidden = jnp.tanh((x * scale) @ first.astype(jnp.float32) + given)
    y = hidden @ jnp.transpose(second.T) + _rounds(looped, x)
    return (y, jnp.sum(hidden**2)), jnp.argmax(y, axis=-1)


@jax.custom_vjp
def _rounds(weight, x):
    return lax.fori_loop(1, 3, lambda i, y: y + jnp.sin(x @ weight * i), jnp.sin(x @ weight * 0.5))


def _rounds_backward(saved, dy):
    weight, x = saved

    def one(turn, total):
        _, back = jax.vjp(lambda weight, x: jnp.sin(x @ weight * turn), weight, x)
        return jax.tree.map(jnp.add, total, back(dy))

    return lax.fori_loop(1, 3, one, jax.vjp(lambda weight, x: jnp.sin(x @ weight * 0.5), weight, x)[1](dy))


_rounds.defvjp(lambda weight, x: (_rounds(weight, x), (weight, x)), _rounds_backward)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


WEIGHTS = draw(4, 5), draw(5, 4, seed=1), draw(4, seed=2), draw(4, 4, seed=3)
X, GIVEN, D_OUT = draw(3, 4, seed=4), draw(5, seed=5), (draw(3, 4, seed=6), jnp.float32(0.3))


@pytest.fixture(params=["kept", "recomputed"])
def function(request):
    return layer if request.param == "kept" else jax.checkpoint(layer)


@pytest.fixture
def expected():
    out, back, aux = jax.vjp(lambda weights, x: layer(weights, GIVEN, x), WEIGHTS, X, has_aux=True)
    return out, aux, back(D_OUT)


def close(found, wanted):
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=1e-6), found, wanted)


def test_parts_give_the_same_values_and_gradients(function, expected):
    parts = in_parts(function, WEIGHTS, GIVEN, X)
    out, aux, kept = parts.forward(WEIGHTS, GIVEN, X)
    dx, dw = parts.backward(WEIGHTS, GIVEN, kept, D_OUT)
    close((out, aux, (dw, dx)), expected)


def test_a_weight_gradient_put_off_is_the_same(function, expected):
    parts = in_parts(function, WEIGHTS, GIVEN, X)
    *_, kept = parts.forward(WEIGHTS, GIVEN, X)
    dx, now, deferred = parts.backward_input(WEIGHTS, GIVEN, kept, D_OUT)
    later = parts.weight_gradient(WEIGHTS, GIVEN, deferred)
    assert [part is None for part in now] == [True, True, False, False], "the vector's, and the loop's turns"
    assert [part is None for part in later] == [False, False, True, False], "matrices', and what the loop begins with"
    found = [sum(part for part in parts if part is not None) for parts in zip(now, later, strict=True)]
    close((tuple(found), dx), expected[2])


@jax.custom_vjp
def coded_product(weight, x):
    return x @ weight


def _coded_backward(saved, dy):
    """The weight's gradient reads the input in 8 bits."""
    weight, x = saved
    scale = jnp.max(jnp.abs(x), axis=0) / 100
    codes = jnp.round(x / scale).astype(jnp.int8)
    return jnp.transpose(codes.astype(jnp.float32) * scale) @ dy, dy @ weight.T


coded_product.defvjp(lambda weight, x: (x @ weight, (weight, x)), _coded_backward)


def test_what_waits_is_kept_in_the_smallest_form_that_it_takes_on_its_way():
    def layer(weight, given, x):
        y = coded_product(weight, x + given)
        return (y, jnp.sum(y)), ()

    weight, given, x = draw(4, 5), draw(4, seed=5), draw(6, 4, seed=4)
    parts = in_parts(layer, weight, given, x)
    shapes = sorted((shape.shape, shape.dtype.name) for shape in parts.deferred)
    assert shapes == [((4,), "float32"), ((6, 4), "int8"), ((6, 5), "float32")]
    d_out = draw(6, 5, seed=7), jnp.float32(0.3)
    *_, kept = parts.forward(weight, given, x)
    dx, now, deferred = parts.backward_input(weight, given, kept, d_out)
    assert now is None
    _, back, _ = jax.vjp(lambda weight, x: layer(weight, given, x), weight, x, has_aux=True)
    close((parts.weight_gradient(weight, given, deferred), dx), back(d_out))


def test_what_goes_from_part_to_part_are_activations(function):
    parts = in_parts(function, WEIGHTS, GIVEN, X)
    shapes = [shape.shape for shape in [*parts.kept, *parts.deferred]]
    assert not {(4, 5), (5, 4), (4, 4)} & set(shapes)
    assert {shape[0] for shape in shapes if len(shape) > 1} == {3}


def test_input_gradients_are_not_computed_again_for_the_weights():
    parts = in_parts(layer, WEIGHTS, GIVEN, X)
    products = []
    for program, arguments in (
        (parts.backward, (parts.kept, D_OUT)),
        (parts.backward_input, (parts.kept, D_OUT)),
        (parts.weight_gradient, (parts.deferred,)),
    ):
        text = str(jax.make_jaxpr(program)(WEIGHTS, GIVEN, *arguments))
        products.append(text.count("dot_general["))
    assert products[0] == products[1] + products[2]


def test_what_is_put_off_keeps_the_scopes_it_lies_in():
    @jax.jit
    def product(weight, x):
        return jnp.sin(x @ weight)

    def scoped(weights, given, x):
        with jax.named_scope("experts"):
            return product(weights[0], x), None

    weights, x = (draw(4, 5),), draw(3, 4, seed=1)
    parts = in_parts(scoped, weights, None, x)
    *_, kept = parts.forward(weights, None, x)
    *_, deferred = parts.backward_input(weights, None, kept, draw(3, 5, seed=2))
    late = jax.make_jaxpr(parts.weight_gradient)(weights, None, deferred)
    products = [eqn for eqn in late.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert all("experts" in str(eqn.source_info.name_stack) for eqn in products)
