"""Shapes of all parameters by path, in closed form: the tree of :class:`~dsv3_jax.model.DeepSeekV3`, flat."""

from dsv3_jax.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Every trained parameter, ``moe/moe/gate_up`` and the like; layers of one kind have a leading layer dim."""
    d, vocab = model.hidden_size, model.vocab_size
    shapes: Shapes = {"embedding/table": (vocab, d), "final_norm/scale": (d,)}
    if not model.tie_word_embeddings:
        shapes["head/kernel"] = (d, vocab)
    for name, layers, moe in (("dense", model.n_dense_layers, False), ("moe", model.n_moe_layers, True)):
        if layers:
            shapes |= {f"{name}/{path}": (layers, *shape) for path, shape in block_shapes(model, moe=moe).items()}
    for depth in range(model.num_nextn_predict_layers):
        shapes |= {f"mtp/{depth}/{norm}_norm/scale": (d,) for norm in ("embedding", "hidden", "head")}
        shapes[f"mtp/{depth}/project/kernel"] = (2 * d, d)
        block = block_shapes(model, moe=model.n_routed_experts > 0)
        shapes |= {f"mtp/{depth}/block/{path}": shape for path, shape in block.items()}
    return shapes


def block_shapes(model: ModelConfig, *, moe: bool) -> Shapes:
    """One transformer block."""
    d = model.hidden_size
    shapes = {"attention_norm/scale": (d,), "ffn_norm/scale": (d,)}
    shapes |= {f"attention/{path}": shape for path, shape in _attention_shapes(model).items()}
    if not moe:
        return shapes | _ffn_shapes("ffn", d, model.intermediate_size)
    experts, width = model.n_routed_experts, model.moe_intermediate_size
    shapes["moe/router/kernel"] = (d, experts)
    shapes["moe/gate_up"], shapes["moe/down"] = (experts, d, 2 * width), (experts, width, d)
    if model.n_shared_experts:
        shapes |= _ffn_shapes("moe/shared", d, model.n_shared_experts * width)
    return shapes


def router_bias_shapes(model: ModelConfig) -> Shapes:
    """Selection biases, which the optimizer leaves alone; empty where routers have none."""
    if not model.has_router_bias:
        return {}
    experts = (model.n_routed_experts,)
    shapes: Shapes = {"moe/moe/router/bias": (model.n_moe_layers, *experts)} if model.n_moe_layers else {}
    depths = range(model.num_nextn_predict_layers)
    return shapes | {f"mtp/{depth}/block/moe/router/bias": experts for depth in depths}


def _ffn_shapes(name: str, size: int, width: int) -> Shapes:
    return {f"{name}/gate_up/kernel": (size, 2 * width), f"{name}/down/kernel": (width, size)}


def _attention_shapes(model: ModelConfig) -> Shapes:
    d, heads, query, value = model.hidden_size, model.num_attention_heads, model.qk_head_dim, model.value_head_dim
    out: Shapes = {"out/kernel": (heads * value, d)}
    if model.attention == "mha":
        kv_heads = model.num_key_value_heads
        widths = {"query": heads * query, "key": kv_heads * query, "value": kv_heads * value}
        return out | {f"{name}/kernel": (d, width) for name, width in widths.items()}
    latent, query_latent = model.kv_lora_rank, model.q_lora_rank
    if query_latent:
        out |= {"q_down/kernel": (d, query_latent), "q_norm/scale": (query_latent,)}
    out["q_up/kernel"] = (query_latent or d, heads * query)
    out |= {"kv_down/kernel": (d, latent + model.qk_rope_head_dim), "kv_norm/scale": (latent,)}
    out["kv_up/kernel"] = (latent, heads * (model.qk_nope_head_dim + value))
    return out
