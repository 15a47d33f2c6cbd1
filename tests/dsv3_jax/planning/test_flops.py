"""FLOPs and cache of a token (spec 2.4, 2.5), and the peaks they are divided by."""

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.planning import cache_bytes_per_token, count_parameters, flops_per_token, peak_flops
from dsv3_jax.planning.flops import cache_elements_per_token


def model(name):
    return load_config(name, model_only=True).model


def test_v3_training_flops_at_4k_are_those_of_the_specification():
    v3 = model("deepseek_v3")
    linear = 6 * count_parameters(v3).active_no_embedding
    assert linear / 1e9 == pytest.approx(219.754, abs=5e-4)
    assert (flops_per_token(v3, 4096) - linear) / 1e9 == pytest.approx(30.710, abs=5e-4)
    assert (flops_per_token(v3, 4096, causal=False) - linear) / 1e9 == pytest.approx(61.405, abs=5e-4)
    assert flops_per_token(v3, 4096) / 1e9 == pytest.approx(250.46, abs=5e-3)
    assert flops_per_token(v3, 4096, causal=False) / 1e9 == pytest.approx(281.16, abs=5e-3)


def test_v2_training_flops_are_the_published_155():
    assert flops_per_token(model("deepseek_v2"), 4096) / 1e9 == pytest.approx(155, abs=0.5)


def test_benchmark_flops_are_those_the_peers_were_measured_with():
    # The peers' count has T / 2 seen positions where this has (T + 1) / 2, and no router biases.
    assert flops_per_token(model("bench_3b"), 4096) / 1e9 == pytest.approx(4.7056, rel=1e-4)


def test_mtp_adds_its_block_and_a_second_pass_through_the_head():
    v3 = model("deepseek_v3")
    added = flops_per_token(v3, 4096, mtp=True) - flops_per_token(v3, 4096)
    counts = count_parameters(v3)
    attention = 3 * 2 * 128 * (192 + 128) * 2048.5
    assert added == 6 * (counts.mtp_active + counts.head) + attention
    block_active = counts.mtp_active - 102_760_448 - 3 * 7168
    assert block_active == 187_107_328 + 14_336 + 398_196_992


def test_mtp_changes_nothing_for_a_model_without_it():
    v2 = model("deepseek_v2")
    assert flops_per_token(v2, 4096, mtp=True) == flops_per_token(v2, 4096)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek_v3", 35_136),
        ("deepseek_v2", 34_560),
        ("deepseek_v2_lite", 15_552),
        ("deepseek_llm_67b", 95 * 2 * 8 * 128),  # grouped queries: 2 n_g d_h l
        ("deepseek_moe_16b", 28 * 2 * 16 * 128),
    ],
)
def test_cache_of_a_token_is_the_published_one(name, elements):
    assert cache_elements_per_token(model(name)) == elements
    assert cache_bytes_per_token(model(name)) == 2 * elements


def test_v3_cache_of_a_token_is_70272_bytes():
    assert cache_bytes_per_token(model("deepseek_v3")) == 70_272


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_the_data_sheets_and_unknown_devices_have_none(kind, peak):
    assert peak_flops(kind) == peak
