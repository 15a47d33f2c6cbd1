"""Training steps in FP8: weights quantized once, data parallelism, recomputation, evaluation, what modules exchange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import replace
from dsv3_jax.nn import fp8
from dsv3_jax.train.loss import activation_dtype
from dsv3_jax.train.step import make_eval_step, make_train_step
from pallas_kernels.quantize import reference
from pallas_kernels.testing import calc_diff
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
    state, metrics = make_train_step(config)(micro.train_state(config), ROWS)
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, state.opt_state[0].mu)


def test_two_devices_do_the_step_of_one():
    metrics, gradients = stepped(CONFIG)
    found_metrics, found = stepped(replace(CONFIG, mesh={"data": 2}))
    for name in ("loss", "grad_norm"):
        assert float(found_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-6), name
    for (path, left), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(gradients), strict=True):
        assert left.dtype == np.float32
        assert calc_diff(left, right) < 1e-9, path


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the weights that are quantized, in the order of tracing."""
    shapes, original = [], reference.quantize_blocks
    monkeypatch.setattr(reference, "quantize_blocks", lambda w, *rest: shapes.append(w.shape) or original(w, *rest))
    return shapes


def test_a_step_quantizes_each_weight_once_outside_its_loop_over_micro_batches(calls):
    step, state = make_train_step(CONFIG), micro.train_state(CONFIG)
    jaxpr = jax.make_jaxpr(step.jitted)(*step.arguments(state, ROWS)[0])
    assert len(calls) == sum(fp8.in_fp8(path) for path in paths(state.params)) == 6
    assert "while" in str(jaxpr), "micro-batches are a loop"


def paths(params):
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]


def test_evaluation_is_in_fp8_too(calls):
    step, state = make_eval_step(CONFIG), micro.train_state(CONFIG)
    jax.eval_shape(step._jitted, state.params, state.router_bias, ROWS[None])
    assert len(calls) == 6


def test_modules_pass_bfloat16_to_each_other_around_fp8_products():
    assert [activation_dtype(precision) for precision in ("fp32", "bf16", "fp8")] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    ]
