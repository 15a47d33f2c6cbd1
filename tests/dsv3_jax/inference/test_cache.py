"""The cache holds exactly what the specification counts (property 5)."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.inference import empty_cache
from dsv3_jax.planning.flops import cache_elements_per_token


def sizes(config, batch, slots, dtype=jnp.bfloat16):
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, batch, slots, dtype)))
    return sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_v3_keeps_576_numbers_a_layer_and_token_and_nothing_a_head():
    v3 = load_config("deepseek_v3", model_only=True).model
    assert sizes(v3, 1, 1) == (61 * (512 + 64), 70_272)
    assert sizes(v3, 3, 50)[0] == 3 * 50 * 61 * 576


@pytest.mark.parametrize(
    "name", ["tiny", "deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "deepseek_moe_16b", "deepseek_llm_67b"]
)
def test_the_closed_form_is_what_is_allocated(name):
    config = load_config(name, model_only=True).model
    assert sizes(config, 1, 1)[0] == cache_elements_per_token(config)


def test_only_the_trunk_is_cached(toy):
    with_mtp, without = toy(num_nextn_predict_layers=1), toy()
    assert sizes(with_mtp, 2, 8) == sizes(without, 2, 8)
