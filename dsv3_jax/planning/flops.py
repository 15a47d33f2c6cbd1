"""Arithmetic and cache of one token, in closed form (spec 2.4 and 2.5)."""

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.parameters import count_parameters


def flops_per_token(model: ModelConfig, seq_len: int, causal: bool = True, mtp: bool = False) -> float:
    """Floating-point operations of one training token, forward and backward, recomputation not counted.

    ``6 x active parameters without the input table``, plus three times attention's two products over the mean number
    of positions a query sees: ``(T + 1) / 2`` with ``causal``, else ``T``.

    Args:
        model: the architecture.
        seq_len: tokens a sequence, T.
        causal: count only what the causal mask leaves, as model FLOP/s are quoted; else the full square.
        mtp: add the MTP modules, each with its block and its pass through the shared head.
    """
    counts = count_parameters(model)
    seen = (seq_len + 1) / 2 if causal else seq_len
    linear, layers = counts.active_no_embedding, model.num_hidden_layers
    if mtp:
        depth = model.num_nextn_predict_layers
        linear += counts.mtp_active + depth * counts.head_matrix
        layers += depth
    attention = 3 * layers * 2 * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) * seen
    return float(6 * linear + attention)


def block_flops(model: ModelConfig, seq_len: int, *, moe: bool) -> tuple[float, float]:
    """Of one token's forward pass through one transformer block: products with weights, and attention's two products
    over the positions that the causal mask leaves."""
    counts = count_parameters(model)
    linear = counts.attention / model.num_hidden_layers
    if moe:
        active = counts.shared_experts + counts.routed_experts_active + counts.router
        linear += active / model.n_moe_layers
    else:
        linear += counts.dense_ffn / model.n_dense_layers
    seen = (seq_len + 1) / 2
    return 2 * linear, 2 * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) * seen


def end_flops(model: ModelConfig, seq_len: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of one token's forward pass, like :func:`block_flops`: of the dense layers, which come first in a pipeline, and
    of head and MTP, which come last."""
    dense = block_flops(model, seq_len, moe=False) if model.n_dense_layers else (0.0, 0.0)
    depth, head = model.num_nextn_predict_layers, 2.0 * model.hidden_size * model.vocab_size
    block = block_flops(model, seq_len, moe=True)
    project = 4.0 * model.hidden_size**2
    first = (model.n_dense_layers * dense[0], model.n_dense_layers * dense[1])
    return first, (head + depth * (block[0] + project + head), depth * block[1])


def cache_elements_per_token(model: ModelConfig) -> int:
    """Numbers that the cache of the main model keeps for one token: the latent and the shared RoPE key, or K and V."""
    if model.attention == "mla":
        per_layer = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        per_layer = model.num_key_value_heads * (model.qk_head_dim + model.value_head_dim)
    return model.num_hidden_layers * per_layer


def cache_bytes_per_token(model: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of :func:`cache_elements_per_token`; 2 a number is BF16."""
    return cache_elements_per_token(model) * bytes_per_element
