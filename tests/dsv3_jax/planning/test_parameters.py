"""Exact counts of spec 2 and of the benchmark's shape."""

import pytest

from dsv3_jax.config import load_config, preset_names
from dsv3_jax.planning import count_parameters


def counts(name):
    return count_parameters(load_config(name, model_only=True).model)


@pytest.mark.parametrize(
    ("name", "total", "active", "active_no_embedding"),
    [
        ("deepseek_v3", 671_026_419_200, 37_552_297_472, 36_625_618_432),
        ("deepseek_v2", 235_741_434_880, 21_375_800_320, 20_851_512_320),
        ("deepseek_v2_lite", 15_706_484_224, 2_661_150_208, 2_451_435_008),
        ("deepseek_moe_16b", 16_375_728_128, 2_828_650_496, 2_828_650_496 - 102_400 * 2048),
        ("deepseek_llm_7b", 6_910_365_696, 6_910_365_696, 6_910_365_696 - 102_400 * 4096),
        ("deepseek_llm_67b", 67_425_001_472, 67_425_001_472, 67_425_001_472 - 102_400 * 8192),
    ],
)
def test_published_models_have_their_exact_counts(name, total, active, active_no_embedding):
    found = counts(name)
    assert (found.total, found.active, found.active_no_embedding) == (total, active, active_no_embedding)


def test_v3_components_are_those_of_the_specification():
    found, moe_layers, d = counts("deepseek_v3"), 58, 7168
    expert = 44_040_192
    assert found.components == {
        "embedding": 926_679_040,
        "attention": 61 * 187_107_328,
        "norms": 61 * 14_336 + d,
        "dense_ffn": 3 * 396_361_728,
        "shared_experts": moe_layers * expert,
        "routed_experts": moe_layers * 256 * expert,
        "router": moe_layers * (1_835_264 - 256),
        "router_bias": moe_layers * 256,
        "head": 926_679_040,
    }
    per_layer = ("shared_experts", "routed_experts", "router", "router_bias")
    assert sum(found.components[name] for name in per_layer) == moe_layers * 11_320_164_608
    assert found.active_no_embedding - found.head == 35_698_939_392


def test_v3_mtp_module_and_the_released_file_have_their_exact_counts():
    found = counts("deepseek_v3")
    assert found.mtp == 11_610_068_224
    assert found.mtp - 102_760_448 - 3 * 7168 == 11_507_286_272, "the block alone"
    assert found.total + found.mtp + found.embedding + found.head == 684_489_845_504


def test_v3_trainable_counts_leave_out_every_router_bias():
    found = counts("deepseek_v3")
    assert found.trainable == found.total + found.mtp - 59 * 256


def test_benchmark_shape_has_the_peers_number_of_trainable_parameters():
    found = counts("bench_3b")
    assert found.trainable == 3_736_011_776
    assert found.active_no_embedding - found.router_bias == 658_441_216


def test_small_has_about_a_hundred_million_parameters():
    assert 90e6 < counts("small").total < 110e6


@pytest.mark.parametrize("name", preset_names())
def test_components_sum_to_the_total(name):
    found = counts(name)
    assert sum(found.components.values()) == found.total
    assert found.active <= found.total
    assert found.mtp_active <= found.mtp


def test_tied_head_is_stored_once_and_still_multiplied():
    untied = load_config("tiny").model
    tied = load_config("tiny", {"model": {"tie_word_embeddings": True}}).model
    table = untied.vocab_size * untied.hidden_size
    assert count_parameters(tied).total == count_parameters(untied).total - table
    assert count_parameters(tied).active_no_embedding == count_parameters(untied).active_no_embedding


def test_softmax_routers_have_no_bias():
    assert counts("deepseek_v2").router_bias == 0
