"""Backward passes written by hand: the gradients of the formula, from less than JAX would keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.nn.experts import swiglu_experts
from dsv3_jax.nn.ffn import swiglu
from dsv3_jax.nn.norm import rms_norm
from dsv3_jax.nn.router import router_logits
from pallas_kernels.permute import make_plan
from pallas_kernels.testing import assert_close

TOKENS, SIZE, WIDTH, EXPERTS, CHOICES = 24, 16, 8, 4, 2


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def norm_formula(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def swiglu_formula(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up


def logits_formula(x, kernel):
    return jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)


def experts_formula(gate_up, down, x, weights):
    """Every expert on every token, the unchosen with weight 0; one expert has no token and one choice is dropped."""
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    out = product("tei,eid->ted", swiglu_formula(product("td,edi->tei", x, gate_up)), down)
    return product("tke,tk,ted->td", jax.nn.one_hot(CHOSEN, EXPERTS), weights, out)


CHOSEN = np.stack([np.random.default_rng(0).permutation(EXPERTS - 1)[:CHOICES] for _ in range(TOKENS)])
CHOSEN = (CHOSEN + np.arange(TOKENS)[:, None]) % (EXPERTS - 1)
CHOSEN[3, 1] = EXPERTS


def experts(gate_up, down, x, weights):
    return swiglu_experts((gate_up, down), x, weights, make_plan(jnp.asarray(CHOSEN), EXPERTS, 8))


PARAMETERS = normal(2, EXPERTS, SIZE, 2 * WIDTH), normal(3, EXPERTS, WIDTH, SIZE)
FUNCTIONS = {
    "rms_norm": (lambda x, scale: rms_norm(x, scale, 1e-6), norm_formula, (normal(0, 3, 5, SIZE), normal(1, SIZE))),
    "swiglu": (swiglu, swiglu_formula, (normal(0, 3, 5, 2 * WIDTH),)),
    "router": (router_logits, logits_formula, (normal(0, 3, 5, SIZE), normal(1, SIZE, EXPERTS))),
    "experts": (experts, experts_formula, (*PARAMETERS, normal(0, TOKENS, SIZE), normal(1, TOKENS, CHOICES))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_the_formula(name):
    function, formula, inputs = FUNCTIONS[name]

    @jax.jit
    def both(inputs, dy):
        (y, back), (wanted, wanted_back) = jax.vjp(function, *inputs), jax.vjp(formula, *inputs)
        return (y, *back(dy)), (wanted, *wanted_back(dy))

    found, wanted = both(inputs, normal(9, *jax.eval_shape(formula, *inputs).shape))
    jax.tree.map(lambda left, right: assert_close(left, right, tolerance=2e-6), found, wanted)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rms_norm", {("bfloat16", (3, 5, SIZE)), ("float32", (SIZE,)), ("float32", (3, 5, 1))}),
        ("swiglu", {("bfloat16", (3, 5, 2 * WIDTH))}),
        ("router", {("bfloat16", (3, 5, SIZE)), ("float32", (SIZE, EXPERTS))}),
    ],
)
def test_what_is_kept_of_bfloat16_inputs(name, kept):
    function, _, (x, *weights) = FUNCTIONS[name]
    back = jax.eval_shape(lambda x, *weights: jax.vjp(function, x, *weights)[1], x.astype(jnp.bfloat16), *weights)
    assert {(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(back)} == kept


def test_experts_keep_tokens_and_the_first_products_output():
    gate_up, down, x, weights = FUNCTIONS["experts"][2]
    inputs = gate_up, down, x.astype(jnp.bfloat16), weights
    back = jax.eval_shape(lambda *inputs: jax.vjp(experts, *inputs)[1], *inputs)
    wide = [leaf.shape for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.bfloat16]
    rows = make_plan(jnp.asarray(CHOSEN), EXPERTS, 8).num_rows
    assert sorted(wide) == sorted([(TOKENS, SIZE), (rows, 2 * WIDTH)])
