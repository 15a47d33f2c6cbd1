"""Tiny models of every family, as their ``config.json`` would be published: the cases of the comparison with
``transformers``. Dims differ from each other on purpose, so that a transposed or mixed-up tensor cannot fit."""

from typing import Any

Config = dict[str, Any]


def _without(config: Config, *names: str) -> Config:
    return {key: value for key, value in config.items() if key not in names}


_COMMON: Config = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2560,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_MLA: Config = {"kv_lora_rank": 28, "q_lora_rank": 36, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
_MOE: Config = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
}
_V3: Config = (
    _COMMON
    | _MLA
    | _MOE
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    }
)
_V2: Config = (
    _COMMON
    | _MLA
    | _MOE
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "bos_token_id": 100,
        "eos_token_id": 101,
    }
)
_LLAMA: Config = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MOE16B: Config = (
    _COMMON
    | _without(_MOE, "n_group", "topk_group")
    | {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "n_shared_experts": 2,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "bos_token_id": 100,
        "eos_token_id": 101,
    }
)


def _yarn(original: int, mscale: float = 1.0, mscale_all_dim: float = 1.0) -> Config:
    return {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


FAMILIES: dict[str, Config] = {
    "v3": _V3,
    "v3_ungrouped": _V3 | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_hidden_layers": 2},
    "v3_yarn": _V3 | {"rope_scaling": _yarn(4096), "max_position_embeddings": 163840, "qk_rope_head_dim": 16},
    "v3_yarn_short": _V3 | {"rope_scaling": _yarn(64), "first_k_dense_replace": 0},
    "v3_yarn_rotation_gain": _V3 | {"rope_scaling": _yarn(64, 1.0, 0.707)},
    "v3_half_split_rope": _without(_V3, "scoring_func", "topk_method", "moe_layer_freq") | {"rope_interleave": False},
    "v3_mtp": _V3 | {"num_nextn_predict_layers": 1, "rope_scaling": _yarn(64)},
    "v3_unnormalized_gates": _V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.5, "rope_theta": 50000},
    "moonlight": _V3
    | {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000,
    },
    "v2": _V2 | {"rope_scaling": _yarn(64, 0.707, 0.707)},
    "v2_plain_rope": _V2 | {"first_k_dense_replace": 2, "topk_group": 3},
    "v2_lite": _V2
    | {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "rope_scaling": _yarn(4096, 0.707, 0.707),
        "max_position_embeddings": 163840,
        "qk_rope_head_dim": 16,
    },
    "moe_16b": _MOE16B,
    "dense": _LLAMA,
    "dense_gqa": _LLAMA | {"num_key_value_heads": 2, "num_hidden_layers": 4},
    "dense_tied": _LLAMA | {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 8},
}
"""By name. The ``model_type`` of ``moe_16b`` was never in ``transformers``; oracle.py says what stands in for it."""

PUBLISHED_STYLE = frozenset({"v3_yarn", "v3_mtp", "moonlight", "v2_lite", "moe_16b", "dense_gqa"})
"""Families whose folder gets the dictionary above as its config.json, DeepSeek's own way (``rope_theta``,
``rope_scaling``, ``torch_dtype``); the others get what ``transformers`` writes now (``rope_parameters``, ``dtype``)."""
