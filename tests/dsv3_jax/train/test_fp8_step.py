"""Training steps in FP8: weights quantized once, data parallelism, recomputation, evaluation, what modules exchange."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import replace
from dsv3_jax.nn import fp8
from dsv3_jax.train import step
from dsv3_jax.train.loss import activation_dtype
from dsv3_jax.train.state import abstract_state, config_layout, config_mesh, plain_state
from dsv3_jax.train.step import make_eval_step, make_train_step
from pallas_kernels.quantize import Weight, reference
from pallas_kernels.testing import calc_diff
from sharding.rules import in_fp8, travels_as
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(
    micro.ROUTED_ONLY
    | {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "head_dim": 64,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 0,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "num_nextn_predict_layers": 0,
    },
    train={"precision": "fp8", "seq_len": 128, "batch_size": 4, "micro_batch_size": 1, "remat": "paper"},
    optim={"learning_rate": 0.5, "eps": 1.0, "moment_dtype": "float32", "grad_clip_norm": 0.0},
    loss={"sequence_balance": 0.0},
)
"""Sequences of 128 tokens, one a micro-batch: tiles along tokens are the same wherever a sequence is."""
ROWS = micro.tokens(CONFIG.model, rows=4, width=129)


def stepped(config):
    """Metrics and gradients of a step."""
    rows = micro.tokens(config.model, rows=config.train.batch_size, width=129)
    state, metrics = make_train_step(config)(micro.train_state(config), rows)
    gradients = plain_state(config, state).opt_state[0].mu
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, gradients)


def assert_equal_steps(config, other, tolerance=1e-8):
    """Gradients to 1.4e-4 in relative norm: an activation whose last bit differs may get another 8-bit code."""
    (metrics, gradients), (found_metrics, found) = stepped(other), stepped(config)
    for name in ("loss", "grad_norm"):
        assert float(found_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-6), name
    np.testing.assert_array_equal(found_metrics["expert_load"], metrics["expert_load"])
    for (path, left), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(gradients), strict=True):
        assert left.dtype == np.float32
        assert calc_diff(left, right) < tolerance, path


def test_two_devices_do_the_step_of_one():
    assert_equal_steps(replace(CONFIG, mesh={"data": 2}), CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False])
def test_two_ranks_of_experts_do_the_step_of_one_device_that_takes_their_tokens_at_once(unroll):
    """A tile of 128 tokens of an expert has those of both ranks."""
    config = replace(CONFIG, mesh={"expert": 2}, train={"unroll": unroll})
    assert_equal_steps(config, replace(CONFIG, train={"micro_batch_size": 2}))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
def test_a_pipeline_on_shares_does_the_step_of_one_device(schedule):
    deep = replace(CONFIG, model={"num_hidden_layers": 4}, train={"batch_size": 8})
    assert_equal_steps(replace(deep, mesh={"pipe": 2, "data": 2, "schedule": schedule}), deep)


@pytest.mark.slow
def test_experts_tokens_that_travel_in_fp8_under_dualpipe_do_the_step_of_one_device():
    """The mesh, schedule and dispatch of V3's preset, small."""
    deep = replace(CONFIG, model={"num_hidden_layers": 4}, train={"batch_size": 8})
    mesh = {"pipe": 2, "expert": 2, "schedule": "dualpipe", "fp8_dispatch": True}
    assert_equal_steps(replace(deep, mesh=mesh), replace(deep, train={"micro_batch_size": 2}))


V3 = micro.config(micro.V3, train={"precision": "fp8"})
MESHES = [
    pytest.param({"expert": 4, "data": 2}, False, marks=pytest.mark.slow),
    pytest.param({"data": 8}, True, marks=pytest.mark.slow),
    pytest.param({"pipe": 2, "expert": 2, "data": 2, "schedule": "dualpipe"}, True),
    pytest.param({"pipe": 2, "data": 4, "schedule": "1f1b"}, False, marks=pytest.mark.slow),
]


def way(config):
    """``params -> (params, codes)`` of a step before its first micro-batch, as arrays over all devices."""
    layout = config_layout(config, config_mesh(config))
    pipeline = make_train_step(config)._pipeline
    specs = named(layout.whole)

    def local(params):
        whole, codes = layout.gather(params)
        return pipeline.with_mirror(whole, codes) if pipeline else (whole, codes)

    in_codes = config.train.precision == "fp8"
    codes = {path: Weight(*[spec] * 4) for path, spec in specs.items() if in_codes and in_fp8(path)}
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(layout.share,), out_specs=(layout.whole, codes), check_vma=False
    )


@functools.cache
def one_devices_codes():
    codes = jax.jit(fp8.quantize_weights)(micro.parts(V3.model).params)
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint8), codes)


@pytest.mark.parametrize(("mesh", "unroll"), MESHES)
def test_devices_have_the_codes_of_one_device_bit_for_bit_and_other_weights_as_products_read_them(mesh, unroll):
    config = replace(V3, mesh=mesh, train={"batch_size": 32, "micro_batch_size": 1, "unroll": unroll})
    whole, codes = jax.jit(way(config))(micro.train_state(config).params)
    assert codes.keys() == one_devices_codes().keys()
    partition = config_layout(config, config_mesh(config)).partition
    for path, wanted in one_devices_codes().items():
        for one, other in zip(codes[path], wanted, strict=True):
            found = np.asarray(one).view(np.uint8)
            if partition is not None and path.startswith("moe/"):
                layers = partition.held.reshape(-1)
                found, other = found[layers >= 0], other[layers[layers >= 0]]
            np.testing.assert_array_equal(found, other, path)
    for (path, one), other in zip(named(whole).items(), jax.tree.leaves(micro.parts(V3.model).params), strict=True):
        if path not in codes and not path.startswith("moe/"):
            kept = travels_as(path, one.ndim, "fp8") == "fp32"
            np.testing.assert_array_equal(one, other if kept else other.astype(jnp.bfloat16).astype(jnp.float32), path)


@pytest.mark.parametrize("unroll", [True, False])
def test_what_a_step_gathers_is_a_byte_a_number_of_fp8_products_and_no_more(unroll):
    """Of the largest, those alone travel wider that enter no FP8 product: bfloat16, and norms and routers."""
    sent = {}
    for precision in ("fp8", "bf16"):
        config = replace(CONFIG, mesh={"data": 2}, train={"precision": precision, "unroll": unroll})
        program = jax.jit(way(config)).lower(abstract_state(config).params).as_text()
        sent[precision] = all_gathered(program)
    sizes = {path: leaf.size // 2 for path, leaf in named(micro.parts(CONFIG.model).params).items()}
    in_codes = sum(size for path, size in sizes.items() if in_fp8(path))
    assert sent["fp8"]["ui8"] == in_codes
    assert sent["bf16"]["bf16"] == sent["fp8"]["bf16"] + in_codes
    assert "ui8" not in sent["bf16"]
    scales = sent["fp8"]["f32"] - sent["bf16"]["f32"]
    assert 0 < 4 * scales < in_codes / 500


def all_gathered(program):
    """Numbers that a device sends, by element type."""
    found = collections.Counter()
    for line in program.splitlines():
        if '"stablehlo.all_gather"' in line:
            *sizes, kind = line.split(": (tensor<")[1].split(">")[0].split("x")
            found[kind] += math.prod(map(int, sizes))
    return found


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the weights that are quantized, in the order of tracing."""
    shapes, original = [], reference.quantize_blocks
    monkeypatch.setattr(reference, "quantize_blocks", lambda w, *rest: shapes.append(w.shape) or original(w, *rest))
    return shapes


def test_a_step_quantizes_each_weight_once_outside_its_loop_over_micro_batches(calls):
    step, state = make_train_step(CONFIG), micro.train_state(CONFIG)
    jaxpr = jax.make_jaxpr(step.jitted)(*step.arguments(state, ROWS))
    assert len(calls) == sum(in_fp8(path) for path in paths(state.params)) == 6
    assert "while" in str(jaxpr), "micro-batches are a loop"


def named(params):
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def paths(params):
    return list(named(params))


def test_evaluation_is_in_fp8_too(calls):
    step, state = make_eval_step(CONFIG), micro.train_state(CONFIG)
    jax.eval_shape(step._jitted, state.params, state.router_bias, ROWS[None])
    assert len(calls) == 6


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"pipe": 2, "data": 2}])
def test_evaluation_on_a_mesh_is_that_of_one_device(mesh):
    deep = replace(CONFIG, model={"num_hidden_layers": 2})
    (nats, labels), (found, count) = (
        make_eval_step(config)(micro.train_state(config), ROWS) for config in (deep, replace(deep, mesh=mesh))
    )
    assert count == labels
    assert found == pytest.approx(nats, rel=1e-6)


def test_modules_pass_bfloat16_to_each_other_around_fp8_products():
    assert [activation_dtype(precision) for precision in ("fp32", "bf16", "fp8")] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    ]


def test_gradients_do_not_depend_on_how_many_labels_a_step_has(monkeypatch):
    """As many times more labels make every gradient that much smaller: without the scale of the loss, below the
    quantizers' smallest scale."""
    _, expected = stepped(CONFIG)
    count, scale, labels = step.has_label, step.loss_scale(CONFIG), 2**24
    monkeypatch.setattr(step, "has_label", lambda tokens: count(tokens).astype(jnp.float32) * labels)
    for factor, equal in ((scale * labels, True), (1.0, False)):
        monkeypatch.setattr(step, "loss_scale", lambda config, factor=factor: factor)
        _, found = stepped(CONFIG)
        leaves = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
        assert all(np.array_equal(wanted, leaf * labels) for wanted, leaf in leaves) == equal
