"""``config.json`` of the published families to our configuration and back (spec 29)."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.config import ConfigError, ModelConfig, RopeScaling, validate_model
from dsv3_jax.config.loader import build

WeightsDtype = Literal["fp32", "bf16", "fp8"]

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Families by ``model_type``: V3 and R1 (and what shares their code), V2 and V2-Lite, DeepSeekMoE, the dense LLM."""

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_TORCH_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}

_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = (
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "scoring_func",
)
_GROUPS = ("n_group", "topk_group", "topk_method", "routed_scaling_factor")
_OURS = ("init_std", "init_distribution", "mtp_hidden")
"""Fields that no config.json of theirs has: kept under the key ``dsv3_jax``."""

_YARN = tuple(field.name for field in dataclasses.fields(RopeScaling))


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture that a folder's ``config.json`` describes.

    Raises:
        ConfigError: no such file, not JSON, or an architecture that this model is not; one line naming the field.
    """
    return from_hf(read_json(folder / "config.json"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: it is missing, unreadable or not an object.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist: name a Hugging Face folder, or a run of dsv3 train") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds {type(tree).__name__} where an object of fields is expected")
    return tree


def from_hf(tree: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a ``config.json``.

    Raises:
        ConfigError: what this model does not compute, named by field.
    """
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigError(
            f"config.json: model_type = {family!r} is not a family that this model computes; "
            f"there are {', '.join(ARCHITECTURES)}"
        )
    _refuse_unknown_parts(tree)
    given = {name: tree[name] for name in _SHARED if tree.get(name) is not None}
    _require_fields(tree, family)
    given["eos_token_id"] = _first(given.get("eos_token_id", 1))
    given["num_nextn_predict_layers"] = 0
    given |= _FROM[str(family)](tree)
    theta, scaling = _read_rope(tree)
    given |= {"rope_theta": theta, "rope_scaling": dataclasses.asdict(scaling)}
    given |= {name: value for name, value in _section(tree, "dsv3_jax").items() if name in _OURS}
    model = build(ModelConfig, given, "config.json: ")
    validate_model(model)
    return model


def to_hf(model: ModelConfig, dtype: WeightsDtype) -> dict[str, Any]:
    """``config.json`` of a model: the fields of its family's release, in V3's names.

    Raises:
        ConfigError: no published architecture computes it.
    """
    family = family_of(model)
    moe = model.n_routed_experts > 0
    told: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    told |= {name: getattr(model, name) for name in _SHARED}
    told |= {"num_key_value_heads": model.num_key_value_heads, "hidden_act": "silu"}
    told |= {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": model.init_std}
    if model.attention == "mla":
        told |= {name: getattr(model, name) for name in _MLA} | {"q_lora_rank": model.q_lora_rank or None}
    else:
        told |= {"head_dim": model.head_dim}
    if moe:
        told |= {name: getattr(model, name) for name in _MOE}
        told |= {"moe_layer_freq": 1, "n_shared_experts": model.n_shared_experts or None}
    if family in ("deepseek_v3", "deepseek_v2"):
        told |= {name: getattr(model, name) for name in _GROUPS} | {"ep_size": 1}
    if family == "deepseek_v3":
        told |= {
            "num_nextn_predict_layers": model.num_nextn_predict_layers,
            "rope_interleave": model.rope_interleave,
        }
    told |= {"rope_theta": model.rope_theta, "rope_scaling": _write_yarn(model.rope_scaling)}
    told |= {"torch_dtype": _TORCH_DTYPE[dtype], "use_cache": True}
    if dtype == "fp8":
        told["quantization_config"] = QUANTIZATION
    return told | {"dsv3_jax": {name: getattr(model, name) for name in _OURS}}


def family_of(model: ModelConfig) -> str:
    """The ``model_type`` whose published code computes this model.

    Raises:
        ConfigError: there is none; names the first field that stands in the way.
    """
    if model.attention == "mla":
        _need(model.n_routed_experts > 0, "n_routed_experts = 0 with attention = 'mla'", "latent attention, all dense")
        _need(model.n_shared_experts > 0, "n_shared_experts = 0 with attention = 'mla'", "latent attention, no shared")
        if model.scoring_func == "sigmoid":
            _need(model.topk_method == "noaux_tc", f"topk_method = {model.topk_method!r}", "a sigmoid router")
            return "deepseek_v3"
        _need(model.topk_method != "noaux_tc", "topk_method = 'noaux_tc'", "a softmax router")
        _need(model.rope_interleave, "rope_interleave = false", "latent attention with a softmax router")
        _need(not model.norm_topk_prob, "norm_topk_prob = true", "a softmax router")
        _need(not model.num_nextn_predict_layers, "num_nextn_predict_layers > 0", "a softmax router")
        return "deepseek_v2"
    _need(not model.rope_interleave, "rope_interleave = true", "attention = 'mha'")
    _need(not model.num_nextn_predict_layers, "num_nextn_predict_layers > 0", "attention = 'mha'")
    scaling = model.rope_scaling
    _need(scaling.factor == 1 or not scaling.mscale_all_dim, "rope_scaling.mscale_all_dim above 0", "attention = 'mha'")
    if not model.n_routed_experts:
        return "llama"
    _need(model.scoring_func == "softmax", f"scoring_func = {model.scoring_func!r}", "attention = 'mha'")
    _need(model.topk_method == "greedy", f"topk_method = {model.topk_method!r}", "attention = 'mha'")
    _need(model.routed_scaling_factor == 1, "routed_scaling_factor above 1", "attention = 'mha'")
    return "deepseek"


def _need(good: bool, field: str, beside: str) -> None:
    if not good:
        raise ConfigError(
            f"model.{field}: no published architecture has it with {beside}, so no config.json can say it"
        )


def _refuse_unknown_parts(tree: Mapping[str, Any]) -> None:
    for name, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("moe_layer_freq", 1),
        ("pretraining_tp", 1),
        ("sliding_window", None),
    ):
        if tree.get(name) not in (None, only):
            raise ConfigError(f"config.json: {name} = {tree[name]!r} is not computed here, only {only!r}")
    if tree.get("quantization_config") is not None:
        quantization = _section(tree, "quantization_config")
        for name, only in QUANTIZATION.items():
            found = quantization.get(name)
            if found != only and not (found is None and name != "quant_method"):
                raise ConfigError(
                    f"config.json: quantization_config.{name} = {found!r} is not read here, only {only!r} (V3's)"
                )


def _require_fields(tree: Mapping[str, Any], family: str) -> None:
    """Sizes have no defaults: a wrong one would be found late, or never."""
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
    if family in ("deepseek_v3", "deepseek_v2"):
        needed += [*_MLA, "q_lora_rank"]
    if family != "llama":
        needed += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"]
    missing = [name for name in needed if name not in tree]
    if missing:
        raise ConfigError(f"config.json of model_type {family!r} lacks {', '.join(missing)}")


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object of fields at ``name``; empty where there is none."""
    found = tree.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: {name} = {found!r} must be an object of fields")
    return found


def _number[N: (int, float)](kind: type[N], value: Any, name: str) -> N:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"config.json: {name} = {value!r} must be a number") from None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _mla(tree: Mapping[str, Any]) -> dict[str, Any]:
    heads = {"num_key_value_heads": tree.get("num_attention_heads")}
    given = {name: tree[name] for name in _MLA if name in tree}
    return given | heads | {"attention": "mla", "q_lora_rank": tree.get("q_lora_rank") or 0}


def _moe(tree: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: tree[name] for name in (*_MOE, *_GROUPS) if tree.get(name) is not None}
    return given | {"n_shared_experts": tree.get("n_shared_experts") or 0}


def _v3(tree: Mapping[str, Any]) -> dict[str, Any]:
    given = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1}
    given |= _mla(tree) | _moe(tree)
    _only(given, scoring_func=("sigmoid",), topk_method=("noaux_tc",))
    return given | {
        # Its own default: a folder that does not say may hold one layer or none.
        "num_nextn_predict_layers": tree.get("num_nextn_predict_layers", 1) or 0,
        "rope_interleave": tree.get("rope_interleave", True),
    }


def _v2(tree: Mapping[str, Any]) -> dict[str, Any]:
    given = {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    given |= _mla(tree) | _moe(tree)
    _only(given, scoring_func=("softmax",), topk_method=("greedy", "group_limited_greedy"))
    if given["topk_method"] == "greedy":
        given |= {"n_group": 1, "topk_group": 1}
    # The published V2 code and weights never normalize: transformers ignores the field.
    return given | {"norm_topk_prob": False, "routed_scaling_factor": tree.get("routed_scaling_factor", 1.0)}


def _mha(tree: Mapping[str, Any]) -> dict[str, Any]:
    heads = _number(int, tree.get("num_attention_heads") or 1, "num_attention_heads")
    size = _number(int, tree.get("hidden_size") or 0, "hidden_size")
    return {
        "attention": "mha",
        "num_key_value_heads": tree.get("num_key_value_heads") or heads,
        "head_dim": tree.get("head_dim") or size // heads,
        "rope_interleave": False,
    }


def _deepseek(tree: Mapping[str, Any]) -> dict[str, Any]:
    given = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    given |= _moe(tree) | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    _only(given, scoring_func=("softmax",), topk_method=("greedy",))
    return given | _mha(tree)


def _llama(tree: Mapping[str, Any]) -> dict[str, Any]:
    return _mha(tree) | {"n_routed_experts": 0, "n_shared_experts": 0}


_FROM: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "deepseek_v3": _v3,
    "deepseek_v2": _v2,
    "deepseek": _deepseek,
    "llama": _llama,
}


def _only(given: Mapping[str, Any], **allowed: tuple[str, ...]) -> None:
    for name, values in allowed.items():
        if given[name] not in values:
            raise ConfigError(f"config.json: {name} = {given[name]!r} does not go with its model_type, only {values}")


def _read_rope(tree: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Base and YaRN, from ``rope_scaling`` or the newer ``rope_parameters``."""
    told = {**_section(tree, "rope_parameters"), **_section(tree, "rope_scaling")}
    theta = _number(float, told.get("rope_theta", tree.get("rope_theta", 10000.0)), "rope_theta")
    kind = told.get("rope_type", told.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} is not computed here, only 'yarn'")
    if told.get("attention_factor") is not None:
        raise ConfigError("config.json: rope_scaling.attention_factor is not read here: give mscale and mscale_all_dim")
    if told.get("truncate") is False:
        raise ConfigError("config.json: rope_scaling.truncate = false is not computed here, only true")
    if told.get("mscale_all_dim") and tree.get("model_type") in ("llama", "deepseek"):
        raise ConfigError(
            f"config.json: rope_scaling.mscale_all_dim has no meaning with model_type {tree['model_type']!r}"
        )
    given = {name: _number(float, told[name], f"rope_scaling.{name}") for name in _YARN if told.get(name) is not None}
    name = "original_max_position_embeddings"
    original = told.get(name, tree.get("max_position_embeddings", 4096))
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        if given.get("mscale_all_dim"):
            raise ConfigError("config.json: rope_scaling has mscale_all_dim without mscale: give both, or neither")
        # The whole temperature then sits in the rotation (spec 4.4).
        given |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    given.pop(name, None)
    return theta, RopeScaling(original_max_position_embeddings=_number(int, original, name), **given)


def _write_yarn(scaling: RopeScaling) -> dict[str, Any] | None:
    return None if scaling.factor == 1 else {"type": "yarn", "rope_type": "yarn"} | dataclasses.asdict(scaling)
