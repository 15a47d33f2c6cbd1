"""Weights stored in FP8 stay so in memory, and a model of them writes as the training's FP8 products compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.inference import generate
from dsv3_jax.interop.pretrained import from_pretrained, save_pretrained
from dsv3_jax.model import merge_model, split_model
from dsv3_jax.nn.fp8 import attach, in_fp8, linear, quantize, quantize_weights
from dsv3_jax.nn.fp8_stored import StoredFP8, stored
from pallas_kernels.testing import relative_l2


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def saved(toy, drawn_model, tmp_path_factory, tokenizer):
    config = toy(
        vocab_size=300, num_hidden_layers=1, first_k_dense_replace=0, moe_intermediate_size=128, n_shared_experts=1
    )
    model = drawn_model(config)
    folder = tmp_path_factory.mktemp("fp8") / "model"
    run = dataclasses.replace(Config(), name="toy", model=config)
    return save_pretrained(model, run, folder, dtype="fp8", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def kept(saved):
    return from_pretrained(saved, dtype="fp8").model


def leaves(model):
    params = split_model(model).params
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, StoredFP8))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def test_every_matrix_of_fp8_products_is_a_byte_a_number_and_nothing_else(kept):
    held = leaves(kept)
    assert {name for name, leaf in held.items() if isinstance(leaf, StoredFP8)} == set(filter(in_fp8, held))
    for name, leaf in held.items():
        arrays = jax.tree.leaves(leaf)
        if isinstance(leaf, StoredFP8):
            codes, scales = arrays
            assert codes.dtype == jnp.float8_e4m3fn
            assert scales.size * 128 * 128 == codes.size
        else:
            assert [array.dtype for array in arrays] == [jnp.bfloat16], name


def test_codes_times_scales_are_the_weights_read_in_full(saved, kept):
    whole = leaves(from_pretrained(saved, dtype="fp32").model)
    for name, leaf in leaves(kept).items():
        if isinstance(leaf, StoredFP8):
            assert leaf.shape == whole[name].shape
            np.testing.assert_array_equal(leaf.dequantized(jnp.float32), whole[name])


@pytest.mark.slow
def test_logits_are_those_of_the_same_codes_under_training(saved, kept):
    """Whose masters are the codes' numbers, so that quantizing them again gives the codes."""
    model = from_pretrained(saved, dtype="fp32").model
    graph, params, bias = split_model(model)
    trained = merge_model(graph, attach(params, quantize_weights(params)), bias)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (1, 12)), jnp.int32)
    wanted, got, plain = (jax.jit(lambda t, m=m: m(t))(tokens) for m in (trained, kept, model))
    assert 0.001 < relative_l2(wanted, plain) < 0.2
    assert relative_l2(got, wanted) < 0.5 * relative_l2(wanted, plain)


@pytest.mark.slow
def test_a_model_of_them_writes(kept):
    texts = [generate(kept, [5, 17, 3], max_new_tokens=6, eos_id=-1) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 2


def test_parts_that_are_not_whole_blocks_are_one_clear_line(toy, drawn_model, tmp_path):
    config = toy(vocab_size=300, moe_intermediate_size=48)
    run = dataclasses.replace(Config(), name="toy", model=config)
    folder = save_pretrained(drawn_model(config), run, tmp_path / "odd", dtype="fp8")
    with pytest.raises(ConfigError, match="parts that are no multiple of 128 wide; take 'bf16'"):
        from_pretrained(folder, dtype="fp8")
    with pytest.raises(ValueError, match="have no scales of"):
        stored(jnp.zeros((8, 96), jnp.float8_e4m3fn), jnp.ones((1, 2)))


def test_a_product_reads_the_codes(kept):
    weight = leaves(kept)["moe/attention/out/kernel"]
    first = jax.tree.map(lambda leaf: leaf[0], weight)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, first.shape[0])), jnp.float32)
    got = jax.jit(lambda x, weight: linear(quantize(x), weight))(x, first)
    assert 0.001 < relative_l2(got, x @ first.dequantized(jnp.float32)) < 0.05
