"""The mixture-of-experts layer against a dense formulation (properties 13, 15 of spec 28), and its compiled work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.nn.moe import MoE, block_rows
from pallas_kernels.permute import num_blocks_bound
from pallas_kernels.testing import assert_close, matmul_flops
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLAT = micro.config(micro.V3 | {"n_group": 1, "topk_group": 1}).model
GROUPED = micro.config(micro.V3).model


def layer_of(config, seed=0):
    return micro.module(lambda rngs: MoE(config, rngs=rngs), seed)


def draw(config, batch=2, tokens=19, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, tokens, config.hidden_size)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(graph, state, x, balance):
    return nnx.merge(graph, state)(x, balance)


def sum_of_weights(routing):
    return jnp.sum(routing.weights)


def apply(layer, x, balance=sum_of_weights):
    return _apply(*nnx.split(layer), jnp.asarray(x), balance)


def weights_of(layer):
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    return micro.moe_weights(state, state["router"].get("bias"))


def dense(layer, x, routing):
    """Every expert on every token, weighted: the layer's definition in plain jax.numpy."""
    gate, up = jnp.split(layer.gate_up[...], 2, axis=-1)
    hidden = jax.nn.silu(jnp.einsum("btd,edi->btei", x, gate)) * jnp.einsum("btd,edi->btei", x, up)
    out = jnp.einsum("btei,eid->bted", hidden, layer.down[...])
    chosen = jax.nn.one_hot(routing.experts, out.shape[2])
    return jnp.einsum("bte,bted->btd", jnp.einsum("btk,btke->bte", routing.weights, chosen), out)


@pytest.mark.parametrize(
    "bias", [None, [5.0, 5.0, 4.0, 0, 0, 0, 0, 0]], ids=["spread", "three experts take everything"]
)
def test_output_equals_the_loop_over_tokens_and_experts(bias):
    layer, x = layer_of(FLAT), draw(FLAT)
    if bias:
        layer.router.bias[...] = jnp.asarray(bias)
    out, aux = apply(layer, x)
    weights, traces = weights_of(layer), []
    expected = [reference.moe(row.astype(np.float64), weights, FLAT, traces) for row in x]
    assert min(margin for *_, margin in traces) > 1e-5
    np.testing.assert_allclose(out, expected, atol=2e-5)
    counts = np.bincount(np.concatenate([experts for experts, *_ in traces]), minlength=8)
    np.testing.assert_array_equal(aux.counts, counts)
    assert (counts == 0).sum() == (5 if bias else 0)


def test_gradients_equal_those_of_the_dense_formulation():
    layer, x = layer_of(GROUPED), jnp.asarray(draw(GROUPED))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    target = jnp.asarray(draw(GROUPED, seed=2))

    def ours(params, x):
        layer = nnx.merge(graph, params, rest)
        return jnp.vdot(layer.routed(x, layer.router(x)), target)

    def theirs(params, x):
        layer = nnx.merge(graph, params, rest)
        return jnp.vdot(dense(layer, x, layer.router(x)), target)

    found, expected = jax.jit(lambda *a: (jax.grad(ours, (0, 1))(*a), jax.grad(theirs, (0, 1))(*a)))(params, x)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, tolerance=1e-5)
    assert float(jnp.abs(found[0]["router"]["kernel"][...]).max()) > 1e-3


def test_permuting_experts_with_their_router_columns_changes_nothing():
    layer, x = layer_of(FLAT), draw(FLAT)
    before, aux = apply(layer, x)
    order = np.random.default_rng(3).permutation(8)
    layer.gate_up[...], layer.down[...] = layer.gate_up[...][order], layer.down[...][order]
    layer.router.kernel[...] = layer.router.kernel[...][:, order]
    layer.router.bias[...] = layer.router.bias[...][order]
    after, permuted = apply(layer, x)
    np.testing.assert_allclose(after, before, atol=2e-6)
    np.testing.assert_array_equal(permuted.counts, aux.counts[order])


def test_without_routed_experts_the_shared_ones_are_left_unscaled():
    layer, x = layer_of(GROUPED), draw(GROUPED)
    layer.down[...] = jnp.zeros_like(layer.down[...])
    out, _ = apply(layer, x)
    np.testing.assert_allclose(
        out, reference.swiglu(x.astype(np.float64), weights_of(layer)["shared_experts"]), atol=1e-5
    )


def test_several_shared_experts_are_one_network_of_their_summed_width():
    layer = layer_of(micro.config(micro.V2_LITE).model)
    assert layer.shared.gate_up.kernel.shape == (32, 2 * 2 * 11)
    assert layer.shared.down.kernel.shape == (2 * 11, 32)


def test_the_balance_loss_is_charged_on_the_routing():
    _, aux = apply(layer_of(GROUPED), draw(GROUPED))
    assert float(aux.balance_loss) == pytest.approx(2.5 * 38, rel=1e-5)


@pytest.mark.parametrize(("rows", "experts"), [(1, 64), (24, 8), (96, 8), (4096, 16), (16384, 16), (1 << 20, 4)])
def test_padding_to_blocks_stays_below_the_useful_rows(rows, experts):
    block = block_rows(rows, experts)
    assert block & (block - 1) == 0
    assert 8 <= block <= 128
    if rows >= 16 * experts:
        assert num_blocks_bound(rows, experts, block) * block <= 1.5 * rows


def test_compiled_work_of_forward_and_backward_is_at_most_twice_the_useful_work():
    tokens, size, width, experts, chosen = 1024, 64, 32, 16, 4
    config = micro.config(
        micro.V3
        | {
            "hidden_size": size,
            "moe_intermediate_size": width,
            "n_routed_experts": experts,
            "num_experts_per_tok": chosen,
        }
    ).model
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0))), nnx.Param, ...)

    def loss(params, rest, x):
        return jnp.sum(jnp.square(nnx.merge(graph, params, rest)(x)[0]))

    step = jax.value_and_grad(loss, argnums=(0, 2))
    arguments = (params, rest, jax.ShapeDtypeStruct((1, tokens, size), jnp.float32))
    useful = 3 * 2 * tokens * size * (3 * width * (chosen + config.n_shared_experts) + experts)
    # XLA counts the body of a loop once, so its number alone would not bound the work.
    assert useful <= matmul_flops(step, *arguments) <= 2 * useful
    compiled = jax.jit(step).lower(*arguments).compile().cost_analysis()
    assert compiled["flops"] <= 2 * useful


@pytest.mark.parametrize("tokens", [1, 5])
def test_served_tokens_get_what_trained_ones_get_in_either_form_for_few_of_them(tokens):
    more = {"n_group": 1, "topk_group": 1, "n_routed_experts": 32, "num_experts_per_tok": 3}
    layer = layer_of(micro.config(micro.V3 | more).model)
    x = jnp.asarray(draw(layer.config, batch=tokens, tokens=1))

    def served(x):
        return layer(x, serving=True)[0]

    assert_close(jax.jit(served)(x), apply(layer, x)[0], tolerance=1e-5)
    assert " sort[" in str(jax.make_jaxpr(lambda x: layer(x)[0])(x))
    assert " sort[" not in str(jax.make_jaxpr(served)(x))
