"""FP8 layers: gradients against float32, what is quantized how, and what the backward pass keeps."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.nn import fp8
from dsv3_jax.nn.block import rematerialize
from dsv3_jax.nn.experts import swiglu_experts
from dsv3_jax.nn.fp8_experts import expert_network, fp8_experts
from dsv3_jax.nn.mtp import MTP
from pallas_kernels.permute import make_plan
from pallas_kernels.quantize import quantize_columns, quantize_rows, reference, requantize_columns
from pallas_kernels.testing import calc_diff
from tests.dsv3_jax import micro
from tests.dsv3_jax.nn.fp8_stack import BATCH, CONFIG, LAYERS, TOKENS, make_stack, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


def slope(actual, expected):
    """The factor by which ``actual`` follows ``expected``: 1 unless an error is more than noise."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float((x * y).sum() / (y * y).sum())


def fp8_weight(master):
    return fp8.FP8Weight(master, fp8.quantize_weight(fp8.pad_to_tiles(master, 2)))


def wide(tiles):
    """Row-wise tiles as float64."""
    q, scale = (np.asarray(part, np.float64) for part in tiles)
    return q * np.repeat(scale, 128, axis=0)[: q.shape[1]].T


def test_a_linear_layer_is_its_three_products_of_quantized_operands_and_near_float32():
    x, w, dy = normal(0, 3, 50, 192), normal(1, 192, 72) / 14, normal(2, 3, 50, 72)

    @jax.jit
    def run(x, w, dy):
        weight = fp8_weight(w)
        x_MK, dy_MN = x.reshape(-1, 192), dy.reshape(-1, 72)
        results = []
        for power_of_two in (False, True):

            def layer(x, master, power_of_two=power_of_two):
                return fp8.linear(fp8.quantize(x, power_of_two=power_of_two), fp8.FP8Weight(master, weight.codes))

            y, back = jax.vjp(layer, x, w)
            rows = quantize_rows(x_MK, power_of_two)
            results.append(((y, *back(dy)), (rows, requantize_columns(*rows, power_of_two))))
        return results, weight.codes, (quantize_rows(dy_MN), quantize_columns(dy_MN))

    results, codes, dy_tiles = run(x, w, dy)
    w_q = np.asarray(codes.q_KN, np.float64) * np.repeat(np.asarray(codes.scale_KN, np.float64), 128, axis=0)
    w_q, (dy_q, dyt_q) = w_q[:192, :72], map(wide, dy_tiles)
    x_MK, w_KN, dy_MN = (np.asarray(part, np.float64).reshape(-1, part.shape[-1]) for part in (x, w, dy))
    real = x_MK @ w_KN, dy_MN @ w_KN.T, x_MK.T @ dy_MN
    for found, x_tiles in results:
        x_q, xt_q = map(wide, x_tiles)
        exact = x_q @ w_q, dy_q @ w_q.T, xt_q @ dyt_q.T
        for name, value, quantized, float32 in zip(("y", "dx", "dw"), found, exact, real, strict=True):
            flat = np.asarray(value).reshape(quantized.shape)
            assert calc_diff(flat, quantized) < 1e-11, name
            assert 1e-5 < calc_diff(flat, float32) < 1.2e-3, name
    assert calc_diff(wide(results[1][1][1]), wide(results[1][1][0]).T) < 1e-8, "powers of two: requantized unchanged"


@pytest.fixture(scope="module")
def experts():
    """Output and gradients of routed experts, FP8 and float32, on bfloat16 rows; expert 2 has none."""
    rng, dims = np.random.default_rng(3), (4, 256, 256)
    plan = make_plan(jnp.asarray(rng.choice([0, 1, 3], (96, 1))), 4, fp8.ROWS)
    x_TD, dy_TD = (normal(seed, 96, 256, dtype=jnp.bfloat16) for seed in (4, 5))
    weights_TK = jnp.asarray(rng.uniform(0.5, 1.5, (96, 1)), jnp.float32)
    masters = normal(6, *dims) / 16, normal(7, 4, 128, 256) / 11

    @jax.jit
    def run(x_TD, masters, dy_TD):
        codes = [fp8_weight(master).codes for master in masters]

        def layer(x_TD, masters, weights_TK, low):
            function = fp8_experts if low else swiglu_experts
            params = tuple(map(fp8.FP8Weight, masters, codes)) if low else masters
            return function(params, x_TD if low else x_TD.astype(jnp.float32), weights_TK, plan)

        results = []
        for low in (True, False):
            y, back = jax.vjp(lambda x, m, w, low=low: layer(x, m, w, low), x_TD, masters, weights_TK)
            results.append((y, *back(dy_TD.astype(y.dtype))))
        return results

    return run(x_TD, masters, dy_TD)


def test_gradients_of_experts_are_float32s_within_the_formats_error(experts):
    found, wanted = (jax.tree.leaves_with_path(result) for result in experts)
    for (path, left), (_, right) in zip(found, wanted, strict=True):
        # The gradient of a gate value is one sum, of 128 products of a recomputed output and its gradient.
        assert calc_diff(left, right) < (6e-3 if left.shape[-1] == 1 else 4e-3), path


def test_masters_gradients_are_float32_and_zero_for_an_expert_without_rows(experts):
    for gradient in experts[0][2]:
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(gradient[2], 0.0)
        assert not np.array_equal(gradient[0], gradient[0].astype(jnp.bfloat16)), "never rounded to the activations'"


def test_experts_refuse_blocks_that_scales_would_straddle_and_scales_that_are_no_powers_of_two():
    x_MK = normal(2, 128, 128)
    weights = fp8.FP8Weight(x_MK, None), fp8.FP8Weight(x_MK, None)
    with pytest.raises(ValueError, match="blocks of 128, got 64"):
        fp8_experts(weights, x_MK, jnp.ones((128, 1)), make_plan(jnp.zeros((128, 1), jnp.int32), 1, 64))
    with pytest.raises(ValueError, match="power_of_two"):
        expert_network(fp8.Quantized(x_MK, None, power_of_two=False), *weights)


def test_recomputation_of_an_expert_changes_no_number():
    x = normal(0, 128, 128)
    weights = fp8_weight(normal(1, 128, 256) / 11), fp8_weight(normal(2, 128, 128) / 11)

    @jax.jit
    def run(x, weights):
        def loss(x, remat):
            # The square makes the backward pass read the output, and so compute the down product again.
            def squared(x):
                return jnp.square(expert_network(fp8.quantize(x, power_of_two=True), *weights))

            return jnp.vdot(rematerialize(squared, remat, scanned=False)(x), x)

        return [jax.value_and_grad(loss)(x, remat) for remat in ("none", "paper", "full")]

    plain, *others = run(x, weights)
    for found in others:
        jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.fixture(scope="module")
def stack():
    return make_stack()


@pytest.fixture(scope="module")
def gradients(stack):
    """Output and gradients of the stack, in FP8 and in float32."""
    loss, masters, x = stack
    grad = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
    codes = jax.jit(fp8.quantize_weights)(masters)
    return [(out, *grads) for grads, out in (grad(masters, codes, x), grad(masters, {}, x.astype(jnp.float32)))]


def test_gradients_of_whole_blocks_are_float32s_within_the_formats_error(gradients):
    (out, dmasters, dx), (wanted_out, wanted, wanted_dx) = gradients
    assert calc_diff(out, wanted_out) < 3e-3
    assert calc_diff(dx, wanted_dx) < 5e-3
    leaves = jax.tree.leaves_with_path(dmasters)
    assert len(leaves) == 14
    for (path, left), right in zip(leaves, jax.tree.leaves(wanted), strict=True):
        assert left.dtype == jnp.float32
        # Rounding adds up over the products that a gradient has come through, six for the first of attention's.
        assert calc_diff(left, right) < (5e-3 if "attention" not in str(path) else 1.2e-2), path
        assert slope(left, right) == pytest.approx(1.0, abs=0.03), path


def stored(stack, remat):
    """What the backward pass holds beside arguments of the forward pass, by dtype and shape."""
    loss, masters, x = stack
    codes = jax.eval_shape(fp8.quantize_weights, masters)

    def residuals(masters, codes, x):
        return jax.vjp(lambda masters, x: loss(masters, codes, x, remat)[0], masters, x)[1]

    jaxpr = jax.make_jaxpr(residuals)(masters, codes, x).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    made = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal) and v not in given}
    weights = {leaf.shape for leaf in jax.tree.leaves((masters, codes)) if len(leaf.shape) > 2}
    return [v.aval for v in made], weights


@pytest.mark.parametrize("remat", ["none", "paper", "full"])
def test_no_residual_has_a_weights_shape(stack, remat):
    residuals, weights = stored(stack, remat)
    assert residuals
    assert not {leaf.shape for leaf in residuals} & weights


def test_inputs_of_linear_layers_and_of_swiglu_are_kept_in_8_bits(stack):
    residuals, _ = stored(stack, "none")
    codes = Counter(leaf.shape for leaf in residuals if leaf.dtype == jnp.float8_e4m3fn)
    tokens, size, width = BATCH * TOKENS, CONFIG.hidden_size, CONFIG.moe_intermediate_size
    rows = (2 * tokens + 4 * 127) // 128 * 128
    attention = size + CONFIG.q_lora_rank + CONFIG.kv_lora_rank
    shared, routed = size + 2 * width, 2 * width
    kept = sum(int(np.prod(shape)) for shape in codes.elements())
    assert kept == LAYERS * (tokens * (attention + shared) + rows * routed)
    wide = [leaf.shape for leaf in residuals if leaf.dtype == jnp.bfloat16 and leaf.shape[-1:] == (size,)]
    stream, normed = (LAYERS, tokens, size), (LAYERS, BATCH, TOKENS, size)
    assert sorted(wide) == sorted([stream, stream, normed]), "what norms and the router read, nothing of the experts"


def test_attentions_output_is_kept_once_and_in_12_bits_and_norms_keep_their_input_alone(stack):
    residuals, _ = stored(stack, "none")
    tokens, heads, head = BATCH * TOKENS, CONFIG.num_attention_heads, CONFIG.v_head_dim
    by_type = Counter((str(leaf.dtype), leaf.shape[1:]) for leaf in residuals)
    assert by_type["uint8", (tokens, heads * head * 3 // 2)] == LAYERS
    assert by_type["bfloat16", (BATCH, TOKENS, heads, head)] == LAYERS, "values alone have this shape"
    assert by_type["bfloat16", (tokens, CONFIG.hidden_size)] == 2 * LAYERS, "inputs of the block's two norms"
    assert by_type["bfloat16", (BATCH, TOKENS, CONFIG.hidden_size)] == LAYERS, "what the router reads"


def test_only_weights_are_quantized_in_blocks_and_only_before_the_blocks_run(stack, monkeypatch):
    loss, masters, x = stack
    calls = []
    original = reference.quantize_blocks
    monkeypatch.setattr(reference, "quantize_blocks", lambda w, *rest: calls.append(w.shape) or original(w, *rest))
    codes = jax.eval_shape(lambda masters: fp8.quantize_weights(masters), masters)
    assert len(calls) == len(codes) == 9
    calls.clear()
    jax.eval_shape(jax.grad(lambda *given: loss(*given)[0]), masters, codes, x)
    assert calls == [], "gradients of activations are quantized in rows and columns alone"


def test_mtps_projection_head_embedding_router_and_norms_stay_out():
    module = micro.module(lambda rngs: MTP(CONFIG, rngs=rngs))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    names = set(jax.eval_shape(fp8.quantize_weights, {"mtp": {0: params}}))
    attention = {"q_down", "q_up", "kv_down", "kv_up", "out"}
    assert names == {f"mtp/0/block/attention/{name}/kernel" for name in attention} | {
        "mtp/0/block/moe/gate_up",
        "mtp/0/block/moe/down",
        "mtp/0/block/moe/shared/gate_up/kernel",
        "mtp/0/block/moe/shared/down/kernel",
    }
    assert not any(map(fp8.in_fp8, ("head/kernel", "embedding/table", "moe/moe/router/kernel", "dense/ffn_norm/scale")))
    assert fp8.in_fp8("dense/ffn/down/kernel")
