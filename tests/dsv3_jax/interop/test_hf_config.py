"""``config.json`` in and out: the release's own values, every preset, and one line for what is not computed here."""

import dataclasses
import json
import re

import pytest

from dsv3_jax.config import ConfigError, RopeScaling, load_config, preset_names
from dsv3_jax.interop.hf_config import from_hf, read_model_config, to_hf

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "ep_size": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
"""The release's config.json (spec 29.1) without its training loss, ``aux_loss_alpha`` and ``seq_aux``."""

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "torch_dtype": "bfloat16",
}
V2_LITE_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}

NO_LAYOUT = "lfb_1b"
"""Sigmoid routing without latent attention: no published architecture."""


def test_v3_writes_the_config_of_the_release():
    written = to_hf(load_config("deepseek_v3_128k").model, "fp8")
    ours = {
        "initializer_range": 0.006,  # what V3's report says; the release's config.json never trained it
        "rope_scaling": YARN | {"rope_type": "yarn"},
    }
    assert {name: written.get(name) for name in V3} == V3 | ours
    added = {"use_cache": True, "rope_interleave": True}
    kept = {"init_std": 0.006, "init_distribution": "normal", "mtp_hidden": "post_norm"}
    assert {name: written[name] for name in written if name not in V3} == added | {"dsv3_jax": kept}


def test_v2_lite_writes_what_differs_from_v3():
    written = to_hf(stretched(load_config("deepseek_v2_lite").model), "bf16")
    assert {name: written.get(name, "absent") for name in V2_LITE} == V2_LITE
    assert written["rope_scaling"] == V2_LITE_YARN | {"rope_type": "yarn"}
    assert not written.keys() & {"num_nextn_predict_layers", "quantization_config"}


def stretched(model):
    """With the rotation of the released configs; the presets begin before it."""
    return dataclasses.replace(model, rope_scaling=dataclasses.replace(model.rope_scaling, factor=40.0))


def test_the_published_configs_are_our_presets():
    assert from_hf(V3) == dataclasses.replace(load_config("deepseek_v3_128k").model, init_std=from_hf(V3).init_std)
    lite = V3 | {"num_key_value_heads": 16, "rope_scaling": V2_LITE_YARN} | V2_LITE
    assert from_hf(lite) == stretched(load_config("deepseek_v2_lite").model)


def inert(model):
    """Without the fields that such a model does not read."""
    if not model.n_routed_experts:
        model = dataclasses.replace(model, first_k_dense_replace=0)
    return dataclasses.replace(model, rope_scaling=RopeScaling()) if model.rope_scaling.factor == 1 else model


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", sorted(set(preset_names()) - {NO_LAYOUT}))
def test_every_preset_goes_out_and_comes_back(name, dtype):
    model = load_config(name).model
    written = json.loads(json.dumps(to_hf(model, dtype)))
    assert inert(from_hf(written)) == inert(model)
    assert to_hf(from_hf(written), dtype) == written


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_type_is_told_and_only_fp8_is_quantized(dtype):
    written = to_hf(load_config("tiny").model, dtype)
    assert written["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert "quantization_config" not in written


def test_newer_names_of_the_rotation_mean_the_same():
    older = from_hf(V3)
    newer = {name: value for name, value in V3.items() if name not in ("rope_theta", "rope_scaling")}
    inner = {name: value for name, value in YARN.items() if name != "type"}
    assert from_hf(newer | {"rope_parameters": inner | {"rope_type": "yarn", "rope_theta": 10000}}) == older


def test_a_model_without_a_published_architecture_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.scoring_func = 'sigmoid'.*attention = 'mha'[^\n]*$"):
        to_hf(load_config(NO_LAYOUT).model, "bf16")


MISTAKES = {
    "another family": ({"model_type": "mixtral"}, ["model_type = 'mixtral'", "deepseek_v3"]),
    "no family": ({"model_type": None}, ["model_type = None"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
    "biases": ({"attention_bias": True}, ["attention_bias = True"]),
    "dense layers between": ({"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
    "another quantizer": (
        {"quantization_config": {"quant_method": "gptq"}},
        ["quantization_config.quant_method", "gptq"],
    ),
    "other blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]}},
        ["quantization_config.weight_block_size = [64, 128]"],
    ),
    "a static quantizer": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        ["quantization_config.activation_scheme = 'static'"],
    ),
    "another rotation": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_scaling", "'linear'"]),
    "half of a temperature": (
        {"rope_scaling": {**YARN, "mscale": None}},
        ["rope_scaling", "mscale_all_dim without mscale"],
    ),
    "a temperature of one number": ({"rope_scaling": YARN | {"attention_factor": 1.2}}, ["attention_factor"]),
    "no truncation": ({"rope_scaling": YARN | {"truncate": False}}, ["truncate"]),
    "another router": ({"scoring_func": "softmax"}, ["scoring_func = 'softmax'"]),
    "another choice of experts": ({"topk_method": "greedy"}, ["topk_method = 'greedy'"]),
    "groups that do not divide": ({"n_group": 7}, ["n_group"]),
    "a family that is a list": ({"model_type": ["deepseek_v3"]}, ["model_type = ['deepseek_v3']"]),
    "a section that is text": ({"rope_scaling": "yarn"}, ["rope_scaling = 'yarn'", "an object of fields"]),
    "a quantizer that is a list": ({"quantization_config": ["fp8"]}, ["quantization_config = ['fp8']"]),
    "our fields that are a number": ({"dsv3_jax": 1}, ["dsv3_jax = 1", "an object of fields"]),
    "a base that is missing": ({"rope_theta": None}, ["rope_theta = None", "must be a number"]),
    "a base that is text": ({"rope_theta": "high"}, ["rope_theta = 'high'", "must be a number"]),
    "a factor that is a list": ({"rope_scaling": {**YARN, "factor": [4]}}, ["rope_scaling.factor = [4]"]),
    "more digits than a float has": ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "too large"]),
    "a size that is text": ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
    "a negative size": ({"intermediate_size": -1}, ["intermediate_size", "-1"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_not_computed_is_one_line_with_its_field(case):
    change, words = MISTAKES[case]
    with pytest.raises(ConfigError) as caught:
        from_hf(V3 | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_all_missing_sizes_are_listed():
    tree = {name: value for name, value in V3.items() if name not in ("vocab_size", "kv_lora_rank", "n_routed_experts")}
    with pytest.raises(
        ConfigError, match=r"^config\.json .*deepseek_v3.* lacks vocab_size, kv_lora_rank, n_routed_exp"
    ):
        from_hf(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("{,", "cannot be read as JSON"),
        ("[1]", "holds list"),
        ('{"a": 1}', "model_type = None"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        read_model_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
