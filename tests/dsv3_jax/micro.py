"""Models small enough for a unit test, with weights of useful size, and their weights under the published names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import load_config
from dsv3_jax.model import abstract_model, merge_model, split_model
from dsv3_jax.train.optimizer import make_optimizer
from dsv3_jax.train.plain import plain_shardings
from dsv3_jax.train.state import TrainState, config_layout, config_mesh, staged_state

V3 = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
}
"""MLA with query compression, dense then routed layers, groups, bias, one shared expert, MTP: all of V3."""

V2_LITE = V3 | {
    "q_lora_rank": 0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}

V2 = V2_LITE | {
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}

DENSE_GQA = V3 | {
    "attention": "mha",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_interleave": False,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
}

ROUTED_ONLY = V3 | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "attention": "mha",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
"""Fewest parts that still have every kind of loss and state: what tests of the step compile."""

YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}


def config(model=V3, **sections):
    """A checked configuration; ``sections`` lay over small defaults."""
    tree = {
        "model": {"max_position_embeddings": 4096} | model,
        "train": {"seq_len": 12, "batch_size": 8, "steps": 10},
        "optim": {"warmup_steps": 0},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return load_config(tree)


def fill(tree, seed=0):
    """Arrays for a tree of shapes: matrices of deviation 1/sqrt(fan in), norms about 1, router biases small."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(getattr(path[-1], "key", path[-1]))
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "scale":
            return jnp.asarray(1 + 0.2 * noise)
        if name == "bias":
            return jnp.asarray(0.1 * noise)
        return jnp.asarray(noise / np.float32(np.sqrt(1 if name == "table" else leaf.shape[-2])))

    return jax.tree_util.tree_map_with_path(draw, tree)


def parts(model_config, seed=0):
    """Graph, parameters and router biases of a model with drawn weights."""
    abstract = split_model(abstract_model(model_config))
    return abstract._replace(params=fill(abstract.params, seed), router_bias=fill(abstract.router_bias, seed + 1))


def model(model_config, seed=0):
    return merge_model(*parts(model_config, seed))


def train_state(config, params=None, seed=0, **changes):
    """A run's state with drawn weights (or ``params``), laid out as the configuration says. A step uses it up."""
    _, drawn, bias = parts(config.model, seed)
    params = drawn if params is None else params
    fields = {
        "params": params,
        "router_bias": bias,
        "opt_state": make_optimizer(config.optim).init(params),
        "nonfinite": jnp.zeros((), jnp.int32),
    } | changes
    places = plain_shardings(config_layout(config, config_mesh(config)), fields)
    arrays = jax.tree.map(lambda leaf, place: jax.device_put(np.array(leaf), place), fields, places)
    return staged_state(config, TrainState(**arrays, step=0, tokens=0))


def module(create, seed=0):
    """An NNX module, made abstractly by ``create(rngs)`` and filled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return nnx.merge(graph, nnx.State(fill(nnx.to_pure_dict(state), seed)))


def tokens(model_config, rows=2, width=13, seed=0):
    return np.random.default_rng(seed).integers(0, model_config.vocab_size, (rows, width), dtype=np.int32)


def _halves(kernel):
    gate, up = np.split(kernel, 2, axis=-1)
    return {"gate_proj": gate.T, "up_proj": up.T}


def _ffn(p):
    return _halves(p["gate_up"]["kernel"]) | {"down_proj": p["down"]["kernel"].T}


_ATTENTION = {
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
}


def attention_weights(p):
    """One attention layer's weights under the published names."""
    names = _ATTENTION | {"q_up": "q_b_proj" if "q_down" in p else "q_proj"}
    return {names[key]: part["kernel"].T if "kernel" in part else part["scale"] for key, part in p.items()}


def moe_weights(p, bias):
    """One routed layer's weights under the published names."""
    out = {
        "gate": p["router"]["kernel"].T,
        "experts": [_halves(w) | {"down_proj": down.T} for w, down in zip(p["gate_up"], p["down"], strict=True)],
    }
    if bias is not None:
        out["e_score_correction_bias"] = bias
    if "shared" in p:
        out["shared_experts"] = _ffn(p["shared"])
    return out


def _block(p, bias):
    return {
        "input_layernorm": p["attention_norm"]["scale"],
        "post_attention_layernorm": p["ffn_norm"]["scale"],
        "self_attn": attention_weights(p["attention"]),
        "mlp": moe_weights(p["moe"], bias) if "moe" in p else _ffn(p["ffn"]),
    }


def published(split):
    """All weights of :func:`parts` in float64 under the published names, for ``reference.forward``."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), split.params)
    biases = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), split.router_bias)
    layers = []
    for kind in ("dense", "moe"):
        if kind in params:
            bias = biases["moe"]["moe"]["router"]["bias"] if kind == "moe" and biases else None
            for i in range(params[kind]["ffn_norm"]["scale"].shape[0]):
                layers.append(
                    _block(jax.tree.map(lambda leaf, i=i: leaf[i], params[kind]), None if bias is None else bias[i])
                )
    modules = [
        {
            "enorm": p["embedding_norm"]["scale"],
            "hnorm": p["hidden_norm"]["scale"],
            "eh_proj": p["project"]["kernel"].T,
            "shared_head.norm": p["head_norm"]["scale"],
            "block": _block(p["block"], biases["mtp"][i]["block"]["moe"]["router"]["bias"] if biases else None),
        }
        for i, p in sorted(params.get("mtp", {}).items())
    ]
    table = params["embedding"]["table"]
    return {
        "embed_tokens": table,
        "layers": layers,
        "norm": params["final_norm"]["scale"],
        "lm_head": params["head"]["kernel"].T if "head" in params else table,
        "mtp": modules,
    }
