"""Cross entropy in chunks, and the sum of all losses against NumPy: spec 6, 7.1, 27.5, properties 19-21 of spec 28."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from dsv3_jax.model import merge_model
from dsv3_jax.train.loss import cross_entropy, has_label, training_loss
from pallas_kernels.testing import assert_close
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, SIZE, VOCABULARY = 23, 8, 31


def draw(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(2 * rng.standard_normal((ROWS, SIZE)), dtype)
    head = jnp.asarray(rng.standard_normal((SIZE, VOCABULARY)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, VOCABULARY, ROWS, dtype=np.int32))
    weights = jnp.asarray(rng.random(ROWS) * (np.arange(ROWS) % 3 > 0), jnp.float32)
    return hidden, head, labels, weights


def plain(hidden, head, labels, weights):
    logits = jnp.matmul(hidden.astype(jnp.float32), head, precision="highest")
    return -jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0])


both = functools.partial(jax.jit, static_argnums=4)(jax.value_and_grad(cross_entropy, argnums=(0, 1)))


@pytest.mark.parametrize("chunk", [1, 5, ROWS, 100])
def test_value_and_gradients_equal_the_plain_formulation_whatever_the_chunk(chunk):
    arguments = draw()
    value, grads = both(*arguments, chunk)
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(*arguments)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert float(cross_entropy(*arguments, chunk)) == pytest.approx(float(expected), rel=1e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert_close(found, wanted)


def test_rows_of_weight_zero_add_nothing_whatever_they_hold():
    hidden, head, labels, weights = draw()
    out = np.asarray(weights) == 0
    assert out.sum() == 8
    _, (d_hidden, d_head) = both(hidden, head, labels, weights, 5)
    np.testing.assert_array_equal(np.asarray(d_hidden)[out], 0.0)
    other = jnp.where(out[:, None], 9.0, hidden), head, jnp.where(out, 0, labels), weights
    np.testing.assert_array_equal(both(*other, 5)[1][1], d_head)
    value, grads = both(hidden, head, labels, jnp.zeros(ROWS), 5)
    assert float(value) == 0.0
    assert not any(leaf.any() for leaf in grads)


def test_large_logits_do_not_overflow():
    hidden, head, labels, weights = draw()
    value, grads = both(1e4 * hidden, head, labels, weights, 5)
    assert float(value) == pytest.approx(float(plain(1e4 * hidden, head, labels, weights)), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in grads)


def test_bfloat16_states_give_a_float32_loss_and_a_float32_head_gradient():
    hidden, head, labels, weights = draw(dtype=jnp.bfloat16)
    value, (d_hidden, d_head) = both(hidden, head, labels, weights, 5)
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected, (want_hidden, want_head) = jax.value_and_grad(plain, argnums=(0, 1))(hidden, rounded, labels, weights)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert_close(d_hidden, want_hidden, tolerance=0.01)
    assert_close(d_head, want_head, tolerance=0.01)


def test_the_factor_of_a_loss_is_not_rounded_to_bfloat16():
    def scaled(hidden, factor):
        return factor * cross_entropy(hidden, head, labels, jnp.ones(ROWS), 5)

    hidden, head, labels, _ = draw(dtype=jnp.bfloat16)
    one, third = (jax.grad(scaled)(hidden, jnp.float32(factor)).astype(jnp.float32) for factor in (1.0, 0.3))
    # bfloat16(0.3) is 0.30078: every number would be 0.26% too large.
    assert float(jnp.vdot(one, third) / jnp.vdot(one, one)) == pytest.approx(0.3, rel=5e-4)


def equations(jaxpr):
    """Every equation of a program, those inside loops once."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(leaf):
                yield from equations(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)


def _is_jaxpr(leaf):
    return isinstance(leaf, ClosedJaxpr | Jaxpr)


def largest(jaxpr):
    """Elements of the largest array that a program makes."""
    return max(math.prod(var.aval.shape) for equation in equations(jaxpr) for var in equation.outvars)


def test_the_logits_of_all_rows_never_exist():
    rows, size, vocabulary, chunk = 512, 16, 4096, 32
    shapes = (
        jax.ShapeDtypeStruct((rows, size), jnp.float32),
        jax.ShapeDtypeStruct((size, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    gradient = jax.value_and_grad(lambda *a: cross_entropy(*a, chunk), argnums=(0, 1))
    assert largest(jax.make_jaxpr(gradient)(*shapes).jaxpr) == chunk * vocabulary
    assert largest(jax.make_jaxpr(jax.value_and_grad(plain))(*shapes).jaxpr) == rows * vocabulary, "the walk sees them"
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * vocabulary * 4 / 2


# The whole loss.


def loss_function(config, graph):
    @jax.jit
    def losses(params, bias, tokens, mtp_weight):
        return training_loss(
            merge_model(graph, params, bias),
            tokens,
            config,
            mtp_weight=mtp_weight,
            label_total=jnp.sum(has_label(tokens), dtype=jnp.float32),
            sequence_total=jnp.float32(tokens.shape[0]),
        )

    return losses


def test_labels_are_missing_where_the_next_token_is_padding():
    rows = jnp.asarray([[5, 0, 7, -1, -1], [1, 2, 3, 4, -9]])
    np.testing.assert_array_equal(has_label(rows), [[1, 1, 0, 0], [1, 1, 1, 0]])


def test_every_loss_equals_the_numpy_models():
    model = micro.ROUTED_ONLY | {"num_nextn_predict_layers": 2}
    config = micro.config(model, loss={"sequence_balance": 0.01}, train={"loss_chunk": 7})
    cfg = config.model
    split, rows = micro.parts(cfg), micro.tokens(cfg)
    rows[1, -4:] = -1
    found = loss_function(config, split.graph)(split.params, split.router_bias, jnp.asarray(rows), jnp.float32(0.3))

    weights, labels = micro.published(split), np.sum(rows[:, 1:] >= 0)
    main = balance = 0.0
    ahead = [0.0, 0.0]
    for row in rows:
        read = np.maximum(row, 0)
        logits, depths, traces = reference.forward(read, weights, cfg)
        learned = row[1:] >= 0
        main += reference.nats(logits, read[1:])[learned].sum()
        for k, depth in enumerate(depths, start=1):
            ahead[k - 1] += reference.nats(depth[: len(row) - 1 - k], read[k + 1 :])[learned[k:]].sum()
        for trace in traces:
            scores = np.stack([s for _, s, _ in trace])
            top = np.argsort(-scores, axis=1)[:, : cfg.num_experts_per_tok]
            balance += 0.01 * reference.sequence_balance(scores, top, cfg.num_experts_per_tok) / len(rows)
    assert float(found.main) == pytest.approx(main / labels, rel=1e-5)
    assert float(found.mtp) == pytest.approx(sum(ahead) / labels / 2, rel=1e-5)
    assert float(found.balance) == pytest.approx(balance, rel=1e-4)
    total = main / labels + 0.3 * sum(ahead) / labels / 2 + balance
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert found.counts.shape == (2 + 2, 8)
    np.testing.assert_array_equal(found.counts.sum(-1), [2 * 12 * 3, 2 * 12 * 3, 2 * 12 * 3, 2 * 11 * 3])


SMALL = micro.DENSE_GQA | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
CONFIG = micro.config(SMALL, train={"loss_chunk": 9})


@pytest.fixture(scope="module")
def case():
    split, rows = micro.parts(CONFIG.model), jnp.asarray(micro.tokens(CONFIG.model))
    losses = loss_function(CONFIG, split.graph)
    grad = jax.jit(jax.grad(lambda params, weight: losses(params, split.router_bias, rows, weight).total))
    return split, rows, grad


def test_without_mtp_weight_the_trunk_has_the_gradients_of_a_model_without_mtp(case):
    split, rows, grad = case
    without = micro.config(SMALL | {"num_nextn_predict_layers": 0})
    other = micro.parts(without.model)
    losses = loss_function(without, other.graph)
    trunk = {name: part for name, part in split.params.items() if name != "mtp"}
    expected = jax.jit(jax.grad(lambda params: losses(params, {}, rows, jnp.float32(0.3)).total))(trunk)
    found = grad(split.params, jnp.float32(0.0))
    assert jax.tree.structure(expected) == jax.tree.structure({k: v for k, v in found.items() if k != "mtp"})
    for name, part in expected.items():
        jax.tree.map(assert_close, found[name], part)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found["mtp"]))


def test_without_mtp_weight_mtps_routers_have_no_balance_loss():
    config = micro.config(train={"loss_chunk": 9}, loss={"sequence_balance": 0.1})
    assert config.model.num_nextn_predict_layers
    split, rows = micro.parts(config.model), jnp.asarray(micro.tokens(config.model))
    losses = loss_function(config, split.graph)
    grad = jax.jit(jax.grad(lambda params, weight: losses(params, split.router_bias, rows, weight).total))
    off, on = (grad(split.params, jnp.float32(weight)) for weight in (0.0, 1e-30))
    assert not any(leaf.any() for leaf in jax.tree.leaves(off["mtp"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(off["moe"]["moe"]["router"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(on["mtp"]))


def test_embedding_and_head_get_the_gradient_of_the_main_model_plus_that_of_mtp(case):
    split, rows, grad = case

    def apart(shared, own):
        """The same losses, MTP reading an embedding and a head of its own."""
        model = merge_model(split.graph, split.params | shared, split.router_bias)
        hidden, *_ = model.trunk(rows[:, :-1])
        normed = model.final_norm(hidden)
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1] - 1), (rows.shape[0], rows.shape[1] - 1))
        _, ahead, _ = model.mtp[0](normed, own["embedding"]["table"][rows[:, 1:]], positions)
        log_main = jax.nn.log_softmax(normed @ shared["head"]["kernel"])
        log_ahead = jax.nn.log_softmax(ahead[:, :-1] @ own["head"]["kernel"])
        main = jnp.take_along_axis(log_main, rows[:, 1:, None], -1)
        second = jnp.take_along_axis(log_ahead, rows[:, 2:, None], -1)
        return -(jnp.sum(main) + 0.3 * jnp.sum(second)) / main.size

    tables = {name: split.params[name] for name in ("embedding", "head")}
    of_main, of_mtp = jax.jit(jax.grad(apart, argnums=(0, 1)))(tables, tables)
    found = grad(split.params, jnp.float32(0.3))
    for name in tables:
        whole, main, ahead = (jax.tree.leaves(part[name])[0] for part in (found, of_main, of_mtp))
        assert float(jnp.linalg.norm(ahead)) > 0.1 * float(jnp.linalg.norm(main))
        assert_close(whole, main + ahead, tolerance=1e-5)


def test_bfloat16_runs_with_float32_gradients_close_to_those_of_float32(case):
    split, rows, grad = case
    config = micro.config(SMALL, train={"loss_chunk": 9, "precision": "bf16"})
    losses = loss_function(config, split.graph)

    @jax.jit
    def low(params):
        def total(params):
            found = losses(params, split.router_bias, rows, jnp.float32(0.3))
            return found.total, found

        return jax.grad(total, has_aux=True)(params)

    grads, found = low(split.params)
    exact = grad(split.params, jnp.float32(0.3))
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, found[:4]))} == {jnp.dtype(jnp.float32)}
    flat, wanted = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, exact))
    assert 1e-4 < np.linalg.norm(flat - wanted) / np.linalg.norm(wanted) < 0.1


def test_every_gradient_of_a_routed_model_in_bfloat16_is_float32():
    config = micro.config(micro.V3, train={"precision": "bf16"})
    split = micro.parts(config.model)
    losses = loss_function(config, split.graph)
    rows = jax.ShapeDtypeStruct((2, 13), jnp.int32)
    gradient = jax.grad(lambda params, rows: losses(params, split.router_bias, rows, jnp.float32(0.3)).total)
    found = jax.eval_shape(gradient, split.params, rows)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(gradient)(split.params, rows).jaxpr
    products = [e.invars[0].aval.dtype for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    # In float32: the routers, and what attention's backward pass makes of float32 scores.
    assert products.count(jnp.dtype(jnp.bfloat16)) > 2 * products.count(jnp.dtype(jnp.float32)) > 0


def test_no_logits_of_all_tokens_in_the_whole_loss():
    model = micro.ROUTED_ONLY | {"num_hidden_layers": 1, "vocab_size": 20_000}
    config = micro.config(model, train={"loss_chunk": 16, "seq_len": 128})
    split = micro.parts(config.model)
    losses = loss_function(config, split.graph)
    rows = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    gradient = jax.grad(lambda params, rows: losses(params, split.router_bias, rows, jnp.float32(0.3)).total)
    jaxpr = jax.make_jaxpr(gradient)(split.params, rows).jaxpr
    assert 20_000 * 32 <= largest(jaxpr) < 2 * 128 * 20_000 / 2
