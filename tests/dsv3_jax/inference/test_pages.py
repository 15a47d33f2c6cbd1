"""The cache holds exactly what the specification counts (property 5), wherever its pages lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, load_config
from dsv3_jax.inference import empty_pages
from dsv3_jax.nn.block import Cache
from dsv3_jax.nn.cache import LayerCache, read_cache, write_cache
from dsv3_jax.planning.flops import cache_elements_per_token
from pallas_kernels.paged_attention import quantize_latents


def sizes(config, pages, page_size, dtype=jnp.bfloat16, **how):
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_pages(config, pages, page_size, dtype, **how)))
    return sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_v3_keeps_576_numbers_a_layer_and_token_and_nothing_a_head():
    v3 = load_config("deepseek_v3", model_only=True).model
    assert sizes(v3, 1, 1) == (61 * (512 + 64), 70_272)
    assert sizes(v3, 3, 50)[0] == 3 * 50 * 61 * 576


def test_in_fp8_a_token_takes_flashmlas_656_bytes_a_layer():
    v3 = load_config("deepseek_v3", model_only=True).model
    assert sizes(v3, 1, 1, fp8=True)[1] == 61 * 656


def test_drafting_adds_one_layer():
    v3 = load_config("deepseek_v3", model_only=True).model
    assert sizes(v3, 1, 1, drafting=True)[0] == 62 * 576


@pytest.mark.parametrize(
    "name", ["tiny", "deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "deepseek_moe_16b", "deepseek_llm_67b"]
)
def test_the_closed_form_is_what_is_allocated(name):
    config = load_config(name, model_only=True).model
    assert sizes(config, 1, 1)[0] == cache_elements_per_token(config)


def test_fp8_without_latents_is_one_clear_line(toy):
    with pytest.raises(ConfigError, match="'fp8' stores latents, and model\\.attention = 'mha' has none"):
        empty_pages(toy(attention="mha"), 1, 1, jnp.float32, fp8=True)


@pytest.fixture(scope="module")
def model(toy, drawn_model):
    return drawn_model(toy(num_hidden_layers=3, q_lora_rank=0, n_routed_experts=0))


@pytest.fixture(scope="module")
def by_cache(model):
    """``(cache, tokens [3, 12]) -> (logits, pages)``: eight tokens in the naive form, then by the absorbed form three a
    time and one at a time."""
    graph, state = nnx.split(model)

    @jax.jit
    def compute(cache, tokens):
        model = nnx.merge(graph, state)
        hidden, start = [], 0
        for count, form in ((8, "naive"), (3, "absorbed"), (1, "absorbed")):
            positions = jnp.broadcast_to(jnp.arange(start, start + count), (tokens.shape[0], count))
            piece, _, cache = model.trunk(tokens[:, start : start + count], positions, cache=cache, form=form)
            hidden.append(piece)
            start += count
        return model.logits(model.final_norm(jnp.concatenate(hidden, axis=1))), cache.pages

    return compute


def test_pages_in_any_order_are_pages_in_order_and_no_cache_at_all(model, by_cache):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 12)), jnp.int32)
    whole = jax.jit(lambda tokens: model(tokens))(tokens)
    # What others left in memory, infinities too, must not matter.
    left = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), empty_pages(model.config, 20, 4, jnp.float32))
    table = np.zeros((3, 6), np.int32)
    table[:, :3] = np.arange(1, 10).reshape(3, 3)
    in_order, _ = by_cache(Cache(left, jnp.asarray(table)), tokens)
    table[:, :3] = np.random.default_rng(1).permutation(np.arange(1, 20))[:9].reshape(3, 3)
    scattered, after = by_cache(Cache(left, jnp.asarray(table)), tokens)
    assert float(jnp.std(whole)) > 0.5
    np.testing.assert_array_equal(scattered, in_order)
    np.testing.assert_allclose(scattered, whole, rtol=0, atol=1e-5)
    untouched = sorted(set(range(1, 20)) - set(table.ravel().tolist()))
    assert np.isinf(np.asarray(after.first)[:, untouched]).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_tokens_are_read_back_from_where_they_were_written_and_page_0_takes_what_is_past_the_table(model, fp8):
    rng = np.random.default_rng(0)
    latent, key = (jnp.asarray(rng.normal(size=(2, 6, dim)), jnp.float32) for dim in (12, 4))
    pages = empty_pages(model.config, 6, 2, jnp.float32, fp8=fp8)
    positions = jnp.arange(1, 7) + jnp.zeros((2, 1), jnp.int32)
    cache = write_cache(LayerCache(pages, jnp.array([[4, 2, 0], [1, 5, 3]]), 1), latent, key, positions)
    touched = np.abs(np.asarray(cache.pages.second)).sum(axis=(2, 3)) > 0
    assert np.argwhere(touched).tolist() == [[1, page] for page in range(6)]
    first, second = read_cache(cache, positions[:, :5], jnp.dtype("float32"))
    wanted = latent
    if fp8:
        codes, scales = quantize_latents(latent)
        wanted = codes.astype(jnp.float32) * scales
        assert 0.001 < float(jnp.max(jnp.abs(wanted - latent))) < 0.1
    np.testing.assert_array_equal(first[1, 1:6], wanted[1, :5])
    np.testing.assert_array_equal(second[1, 1:6], key[1, :5])
    np.testing.assert_array_equal(first[0, 1:4], wanted[0, :3])
    assert (np.asarray(first)[:, 0] == 0).all()


def test_the_pages_are_written_in_place(model):
    """Of the cache nothing is copied from layer to layer: what a program needs beside it is less than one layer's."""
    graph, state = nnx.split(model)
    shapes = jax.eval_shape(lambda: empty_pages(model.config, 4097, 16, jnp.float32))
    layer = 4 * shapes.first.size // 3

    def step(state, pages, table, token, position):
        model = nnx.merge(graph, state)
        return model.trunk(token, position, cache=Cache(pages, table), form="absorbed")[2].pages

    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    lowered = jax.jit(step, donate_argnums=1).lower(state, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32), one, one)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < layer
