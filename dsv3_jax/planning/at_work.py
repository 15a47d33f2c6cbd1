"""What a step needs beside what it keeps: the end of the forward pass, and a layer's backward pass, at work."""

import math

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.planning.activations import Tensors, Work, computed_again, kept_by_block, rows_of_experts
from dsv3_jax.planning.shapes import block_shapes
from sharding.rules import dims_of


def size_of(parts: Tensors) -> int:
    """Bytes of all."""
    return sum(parts.values())


def mtp_kept(model: ModelConfig, work: Work, remat: str) -> int:
    """A block with the two norms and the projection before it and the norm after it."""
    d, block = model.hidden_size, size_of(kept_by_block(model, work, remat, moe=model.n_routed_experts > 0))
    if remat != "none":
        return block + work.tokens * work.element * d  # two inputs instead of one
    return block + work.tokens * (3 * (12 * d + 8) + 2 * d * work.element)


PARTS = 8
"""In which a pipeline sums a head's gradient, one after the other, so that a chunk's share of it is never whole."""


def head_at_work(config: Config, work: Work, *, in_parts: bool = False) -> Tensors:
    """The end of the forward pass; ``in_parts``, as a pipeline does it: weights come cast, and what a head's gradient
    grows by is never there whole."""
    model, depth = config.model, config.model.num_nextn_predict_layers
    d, vocab, heads = model.hidden_size, model.vocab_size, 1 + config.model.num_nextn_predict_layers
    chunk = min(config.train.loss_chunk, work.tokens)
    return {
        "head's norms, inputs and their gradients": heads * work.tokens * (12 + 3 * work.element) * d,
        "logits of a chunk": chunk * vocab * (4 + work.element),
        "head and table: casts and MTP's gradients": vocab
        * d
        * (4 // PARTS if in_parts else (4 if work.element == 2 else 0) + 8 * depth),
    }


def layer_at_work(config: Config, work: Work) -> Tensors:
    """The largest layer's backward pass: what it computes again, gradients of activations, its weights cast, their
    gradients before they are stacked; and the rows that travel to its experts and back."""
    model = config.model
    kinds = ([False] if model.n_dense_layers else []) + ([True] if model.n_routed_experts else [])
    return max((_one_layer(model, work, config.train.remat, moe=moe) for moe in kinds), key=size_of)


def _one_layer(model: ModelConfig, work: Work, remat: str, *, moe: bool) -> Tensors:
    attention = 2 * work.tokens * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim)
    if moe:
        held, rows = rows_of_experts(model, work)
        ffn = rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
        ways = 2 * held * model.hidden_size * work.element if work.placement.size > 1 else 0
    else:
        ffn, ways = 3 * work.tokens * model.intermediate_size, 0
    numbers = sum(
        math.prod(shape) // (work.placement.size if dims_of(path, len(shape))[0] == "expert" else 1)
        for path, shape in block_shapes(model, moe=moe).items()
    )
    weights = "a layer's gradients" if work.unroll else "a layer's weights, cast, and their gradients"
    return {
        "a layer computed again": computed_again(model, work, remat, moe=moe),
        "gradients of a layer's activations": max(attention, ffn) * work.element,
        weights: numbers * (4 if work.unroll else work.element + 4),
        "rows on their way to experts": ways,
    }
