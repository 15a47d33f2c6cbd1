"""What one transformer block keeps for its backward pass, tensor by tensor, for each mode of recomputation.

Without recomputation JAX keeps what the derivative of every operation needs. The list below is that of the program
(tests compare it with the traced one).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig
from sharding.expert_parallel import ExpertParallel, hops_of, memory_rows
from sharding.expert_parallel.placement import received

Tensors = dict[str, int]
"""Bytes by name."""


@dataclass(frozen=True)
class Work:
    """What a device does at one time."""

    tokens: int
    """Tokens of one micro-batch on one device."""
    sequences: int
    element: int
    """Bytes of one activation: 2 with bf16, 4 with fp32."""
    placement: ExpertParallel
    block: int
    """Rows that one expert's share is padded to a multiple of."""
    sequence_balance: bool
    """Whether the sequence-wise balance loss is computed."""
    fused_attention: bool
    """cuDNN's attention, which keeps the softmax's sums; the portable form in chunks keeps none (tests)."""
    unroll: bool = False
    """Whether XLA sees all layers at once, both ways."""
    fp8: bool = False
    """Whether linear layers keep 8 bits a value: tiles of their inputs."""


def kept_by_block(model: ModelConfig, work: Work, remat: str, *, moe: bool) -> Tensors:
    """Bytes that one block keeps from its forward to its backward pass; routing records are not among them.

    Args:
        model: the architecture.
        work: how much it computes at one time.
        remat: ``train.remat``.
        moe: a mixture-of-experts block, else a dense one.
    """
    per_token = work.tokens * work.element
    if remat == "full":
        return {"block input": per_token * model.hidden_size}
    if remat == "paper":
        return {"block input": per_token * model.hidden_size} | _named(model, work, moe=moe)
    kept = {"norms": _input_norm(model.hidden_size, work)} | _attention(model, work)
    kept |= _experts(model, work) if moe else _dense(model, work)
    if moe and work.unroll:
        # The backward pass sorts them again; XLA finds both in one program and sorts once. FP8's reads their columns
        # alone, which hang on nothing of that pass: XLA may make them early.
        _, rows = rows_of_experts(model, work)
        kept["experts' rows"] = _input(rows, model.hidden_size, work)
    return kept


def put_off_by_block(model: ModelConfig, work: Work) -> Tensors:
    """Bytes that one mixture-of-experts block keeps of a backward pass whose weight gradients are put off: inputs of
    its matrix products, once each, and gradients of their outputs. In FP8 steps that is 8 bits a value of all but
    the router's input."""
    tokens, d, width = work.tokens, model.hidden_size, model.moe_intermediate_size
    heads, query, value = model.num_attention_heads, model.qk_head_dim, model.value_head_dim
    if model.attention == "mla":
        read = [d, model.q_lora_rank, model.kv_lora_rank]
        made = [heads * query, model.kv_lora_rank + model.qk_rope_head_dim, model.q_lora_rank]
        made.append(heads * (model.qk_nope_head_dim + value))
    else:
        read, made = [d], [heads * query, *[model.num_key_value_heads * head for head in (query, value)]]
    held, rows = rows_of_experts(model, work)
    shared = model.n_shared_experts * width
    return {
        "attention's inputs": sum(_input(tokens, size, work) for size in read) + _gradient(tokens, heads * value, work),
        "gradients of attention's outputs": sum(_gradient(tokens, size, work) for size in [*made, d]),
        "experts' rows": _input(held, d, work) + _gradient(rows, d, work),
        "experts' hidden rows": _gradient(rows, width, work) + _gradient(rows, 2 * width, work),
        "router's input and gradients": tokens * (d * work.element + 4 * model.n_routed_experts),
        "shared experts": sum(_gradient(tokens, size, work) for size in (d, shared, 2 * shared)) if shared else 0,
        "tokens in 8 bits": _input(tokens, d, work) if work.fp8 and shared else 0,
    }


def computed_again(model: ModelConfig, work: Work, remat: str, *, moe: bool) -> int:
    """Bytes that one block's backward pass makes anew, experts' rows aside (:func:`experts_at_work`): within one layer
    elementwise chains are fused, so that of a norm and of SwiGLU the output alone exists."""
    if remat == "none":
        return 0
    per_token, d = work.tokens * work.element, model.hidden_size
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    again = per_token * ((heads + kv_heads) * model.qk_head_dim + kv_heads * model.value_head_dim + 2 * d)
    if model.attention == "mla":
        again += per_token * (model.q_lora_rank + model.kv_lora_rank)
    again += per_token * (model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size)
    return again + (sum(_named(model, work, moe=moe).values()) if remat == "full" else 0)


def experts_at_work(model: ModelConfig, work: Work, remat: str) -> tuple[int, int]:
    """Bytes of rows that experts' backward pass has at one time beside what their layer keeps: when the gradient of
    SwiGLU is made, and when that of the tokens is, after both gradients of weights."""
    _, rows = rows_of_experts(model, work)
    d, width = model.hidden_size, model.moe_intermediate_size
    sorted_again = 0 if remat == "none" and work.unroll else _input(rows, d, work)
    # The gradient of the output; of SwiGLU, its output and the gradients of that and of its input.
    if work.fp8:
        made = _input(rows, d, work) + _gradient(rows, d, work) + rows * width * work.element
        made += _input(rows, 2 * width, work) + _gradient(rows, 2 * width, work) + _gradient(rows, width, work)
    else:
        made = rows * (d + 4 * width) * work.element
    return sorted_again + made, rows * d * work.element + _input(rows, 2 * width, work)


def experts_forward(model: ModelConfig, work: Work) -> int:
    """Bytes of rows that experts' forward pass has at one time and does not keep."""
    _, rows = rows_of_experts(model, work)
    width = 2 * model.moe_intermediate_size if work.fp8 else model.hidden_size
    return rows * width * work.element


def recomputed_down(model: ModelConfig, work: Work) -> int:
    """Bytes that the paper's set also keeps of a block whose output is computed again: in FP8 what down projections
    read, which elsewhere is made of the kept gate and up."""
    if not work.fp8 or not model.n_routed_experts:
        return 0
    _, rows = rows_of_experts(model, work)
    width = model.moe_intermediate_size
    return _input(rows, width, work) + _input(work.tokens, model.n_shared_experts * width, work)


def rows_of_experts(model: ModelConfig, work: Work) -> tuple[int, int]:
    """Rows that a transport holds at most, and rows of experts' inputs with padding."""
    return memory_rows(work.placement, work.tokens, model.num_experts_per_tok, model.n_routed_experts, work.block)


def block_rows(rows: int, experts: int, *, gpu: bool = True) -> int:
    """Rows that each expert's share is padded to a multiple of, as ``dsv3_jax.nn.moe.block_rows`` chooses."""
    if gpu:
        return 128
    return max(8, min(128, 1 << (rows // (2 * experts)).bit_length() - 1)) if rows >= 2 * experts else 8


def _named(model: ModelConfig, work: Work, *, moe: bool) -> Tensors:
    """What carries one of the names that the paper's set keeps."""
    per_token = work.tokens * work.element
    kept = {
        "attention": _attended(model, work),
        "residual": per_token * model.hidden_size,
    }
    if model.attention == "mla":
        kept["latent"] = per_token * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim)
    if not moe:
        return kept | {"gate_up": per_token * 2 * model.intermediate_size}
    _, rows = rows_of_experts(model, work)
    width = model.moe_intermediate_size
    kept["experts' gate_up"] = _input(rows, 2 * width, work)
    kept["shared experts' gate_up"] = _input(work.tokens, 2 * model.n_shared_experts * width, work)
    return kept | {"rows from other devices": sum(hop.arrived for hop in _hops(model, work))}


def _norm(width: int, work: Work) -> int:
    """Input and output, and a number a row in float32."""
    return work.tokens * (2 * width * work.element + 4)


def _input(rows: int, width: int, work: Work) -> int:
    """What a linear layer reads; in FP8 a byte a value and a float32 scale for each 128."""
    return rows * width + rows * 4 * math.ceil(width / 128) if work.fp8 else rows * width * work.element


def _gradient(rows: int, width: int, work: Work) -> int:
    """What a weight's gradient is made of: in FP8 the same, with the scales of columns."""
    return -(-width // 128) * 128 * (rows + 4 * math.ceil(rows / 128)) if work.fp8 else rows * width * work.element


def _input_norm(width: int, work: Work) -> int:
    """A norm before linear layers: in FP8 its input and its output's tiles."""
    return work.tokens * width * work.element + _input(work.tokens, width, work) if work.fp8 else _norm(width, work)


def _attended(model: ModelConfig, work: Work) -> int:
    """Attention's output; in FP8 steps 12 bits a value (E5M6)."""
    numbers = work.tokens * model.num_attention_heads * model.value_head_dim
    return numbers * 3 // 2 + numbers // 32 if work.fp8 else numbers * work.element


def _attention(model: ModelConfig, work: Work) -> Tensors:
    per_token, heads, kv_heads = work.tokens * work.element, model.num_attention_heads, model.num_key_value_heads
    query, value = model.qk_head_dim, model.value_head_dim
    kept = {
        "q, k, v": per_token * ((heads + kv_heads) * query + kv_heads * value),
        "attention": _attended(model, work) + (work.tokens * heads * 4 if work.fused_attention else 0),
    }
    if model.attention == "mla":
        queries = _input_norm(model.q_lora_rank, work) if model.q_lora_rank else 0
        kept["latent norms"] = queries + _input_norm(model.kv_lora_rank, work)
    return kept


def _swiglu(rows: int, width: int, work: Work) -> int:
    """Gate, up and their product, which a linear layer reads."""
    return 2 * rows * width * work.element + _input(rows, width, work)


def _dense(model: ModelConfig, work: Work) -> Tensors:
    return {
        "ffn norm": _input_norm(model.hidden_size, work),
        "swiglu": _swiglu(work.tokens, model.intermediate_size, work),
    }


def _experts(model: ModelConfig, work: Work) -> Tensors:
    tokens, d, width = work.tokens, model.hidden_size, model.moe_intermediate_size
    experts, chosen = model.n_routed_experts, model.num_experts_per_tok
    local = experts // work.placement.size
    held, rows = rows_of_experts(model, work)
    columns = chosen if work.placement.size == 1 else min(chosen, local)
    router = tokens * 4 * (experts if model.scoring_func == "sigmoid" else experts + 2)
    router += tokens * 4 * chosen * 2  # choices and weights
    if model.norm_topk_prob:
        router += tokens * 4 * (chosen + 2)
    if work.sequence_balance:
        router += tokens * 4 * (experts + 2) + work.sequences * 4 * experts
    kept = {
        "ffn norm": _norm(d, work),
        "router": router,
        "plan": 4 * (local + rows // work.block + rows + held * columns + 1),
        "experts' tokens": _input(held, d, work) + (4 * held * columns if work.placement.size > 1 else 0),
        "experts' gate_up": _input(rows, 2 * width, work),
    }
    if work.placement.size > 1:
        ring = tokens * 8 * chosen if work.placement.transport == "ring" else 0
        kept["exchanges"] = ring + sum(hop.without_remat for hop in _hops(model, work))
    if model.n_shared_experts:
        shared = model.n_shared_experts * width
        # An FP8 network makes the product again.
        kept["shared experts' swiglu"] = _input(tokens, 2 * shared, work) if work.fp8 else _swiglu(tokens, shared, work)
    return kept


@dataclass(frozen=True)
class _Exchange:
    """Bytes that one exchange of a layer keeps."""

    arrived: int
    """Rows that came, with their choices: what the paper's set keeps."""
    without_remat: int
    """Who went where; and its inputs, where further rounds are computed again from them."""


def _hops(model: ModelConfig, work: Work) -> Iterator[_Exchange]:
    tokens, choices, d = work.tokens, model.num_experts_per_tok, model.hidden_size
    for hop in hops_of(work.placement, tokens, choices, model.n_routed_experts):
        columns = min(choices, hop.experts)
        rows, _ = received(tokens, columns, hop.fan, hop.room)
        row = d + math.ceil(d / 128) if hop.fp8 else d * work.element
        mine = rows * choices * (columns if columns < choices else 1)  # which of its choices a place of a row takes
        slots = 4 * (rows + tokens * min(choices, hop.fan)) + mine
        rounds = 0
        if hop.room and hop.room < tokens * columns:
            pairs = tokens * (2 * choices + 4 * min(choices, hop.fan))
            rounds = tokens * d * work.element + 4 * pairs
        yield _Exchange(rows * (row + 8 * columns), slots + rounds)
        tokens, choices = rows, columns
