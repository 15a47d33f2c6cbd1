"""Stacked blocks: one scan equals layer after layer, and recomputation changes memory, not numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.nn.block import concatenate_aux, run_blocks, stack_blocks
from dsv3_jax.nn.moe import MoEAux
from pallas_kernels.testing import assert_close
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(micro.V3).model
BATCH, TOKENS, LAYERS = 2, 9, 2
POSITIONS = np.broadcast_to(np.arange(TOKENS), (BATCH, TOKENS))


def stack(moe=True):
    return micro.module(lambda rngs: stack_blocks(CONFIG, LAYERS, moe=moe, rngs=rngs))


def case_of(moe):
    graph, params, rest = nnx.split(stack(moe), nnx.Param, ...)
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.standard_normal((2, BATCH, TOKENS, 32)), jnp.float32)

    def loss(params, x, remat):
        out, aux, _ = run_blocks(
            nnx.merge(graph, params, rest),
            x,
            jnp.asarray(POSITIONS),
            balance=lambda routing: jnp.sum(jnp.square(routing.scores)),
            remat=remat,
        )
        return jnp.vdot(out, target) + (jnp.sum(aux.balance_loss) if moe else 0.0)

    return params, x, loss


@pytest.fixture(scope="module")
def case():
    return case_of(moe=True)


def test_recomputation_gives_the_same_loss_and_gradients():
    params, x, loss = case_of(moe=False)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    plain, found = (run(params, x, remat) for remat in ("none", "paper"))
    assert float(found[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    for left, right in zip(jax.tree.leaves(found[1]), jax.tree.leaves(plain[1]), strict=True):
        assert_close(left, right, tolerance=2e-6)


def kept(case, remat):
    """Shapes of what the backward pass of the stack holds beside the parameters, one a layer."""
    params, x, loss = case
    back = jax.eval_shape(lambda params, x: jax.vjp(lambda *a: loss(*a, remat), params, x)[1], params, x)
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return [leaf.shape for leaf in jax.tree.leaves(back) if leaf.shape[:1] == (LAYERS,) and leaf.shape not in weights]


def test_recomputed_unrolled_layers_hold_tokens_and_no_weight():
    graph, params, rest = nnx.split(stack(moe=False), nnx.Param, ...)

    def loss(params, x):
        out, *_ = run_blocks(nnx.merge(graph, params, rest), x, jnp.asarray(POSITIONS), remat="paper", unroll=True)
        return jnp.sum(out)

    text = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((BATCH, TOKENS, 32))).as_text()
    held = "".join(line for line in text.splitlines() if "stablehlo.optimization_barrier" in line)
    assert f"tensor<{BATCH}x{TOKENS}x32xf32>" in held
    for leaf in jax.tree.leaves(params):
        assert f"tensor<{'x'.join(map(str, leaf.shape[1:]))}xf32>" not in held


def test_each_kind_of_recomputation_keeps_less(case):
    sizes = {remat: sum(np.prod(shape) for shape in kept(case, remat)) for remat in ("none", "paper", "full")}
    assert sizes["full"] < sizes["paper"] < 0.7 * sizes["none"]
    assert sizes["full"] <= 1.5 * LAYERS * BATCH * TOKENS * 32


def test_the_papers_set_keeps_no_up_projection_and_no_activated_row(case):
    heads = CONFIG.num_attention_heads
    per_head = {CONFIG.qk_head_dim, CONFIG.qk_nope_head_dim + CONFIG.v_head_dim, CONFIG.qk_nope_head_dim}

    def up_projected(shape):
        return shape[1:3] == (BATCH, TOKENS) and (
            (shape[3] == heads and shape[-1] in per_head) or shape[3] in {heads * dim for dim in per_head}
        )

    assert any(map(up_projected, kept(case, "none"))), "without recomputation they are kept"
    assert not any(map(up_projected, kept(case, "paper")))
    assert not any(shape[-1] == CONFIG.moe_intermediate_size for shape in kept(case, "paper"))
    assert any(shape[-1] == 2 * CONFIG.moe_intermediate_size for shape in kept(case, "paper"))


def test_a_stack_equals_its_layers_one_after_another():
    blocks, x = stack(), jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, TOKENS, 32)), jnp.float32)
    graph, state = nnx.split(blocks)

    @jax.jit
    def both(state, x):
        whole, aux, _ = run_blocks(nnx.merge(graph, state), x, jnp.asarray(POSITIONS))
        records = []
        for i in range(LAYERS):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            x, record, _ = block(x, jnp.asarray(POSITIONS))
            records.append(record.counts)
        return whole, aux.counts, x, jnp.stack(records)

    whole, counts, one_by_one, records = both(state, x)
    np.testing.assert_allclose(whole, one_by_one, atol=1e-5)
    np.testing.assert_array_equal(counts, records)


def test_layers_of_a_stack_are_drawn_differently_at_the_configured_deviation():
    blocks = stack_blocks(micro.config(micro.V3 | {"init_std": 0.006}).model, 3, moe=True, rngs=nnx.Rngs(0))
    kernel = np.asarray(blocks.moe.gate_up[...])
    assert kernel.std(axis=(1, 2, 3)) == pytest.approx([0.006] * 3, rel=0.05)
    assert np.abs(np.corrcoef(kernel.reshape(3, -1)) - np.eye(3)).max() < 0.1
    np.testing.assert_array_equal(blocks.attention_norm.scale[...], 1.0)
    np.testing.assert_array_equal(blocks.moe.router.bias[...], 0.0)


def test_routing_records_of_several_stacks_follow_each_other():
    first = MoEAux(jnp.array([1.0, 2.0]), jnp.ones((2, 4), jnp.int32))
    second = MoEAux(jnp.array([3.0]), 2 * jnp.ones((1, 4), jnp.int32))
    found = concatenate_aux([first, None, second])
    np.testing.assert_array_equal(found.balance_loss, [1, 2, 3])
    np.testing.assert_array_equal(found.counts[:, 0], [1, 1, 2])
    assert concatenate_aux([None, None]) is None
