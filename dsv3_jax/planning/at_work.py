"""What a step needs beside what it keeps: the end of the forward pass, and a layer's backward pass, at work."""

import math

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.planning.activations import (
    Tensors,
    Work,
    computed_again,
    experts_at_work,
    experts_forward,
    kept_by_block,
    recomputed_down,
    rows_of_experts,
)
from dsv3_jax.planning.shapes import block_shapes
from sharding.rules import dims_of


def size_of(parts: Tensors) -> int:
    """Bytes of all."""
    return sum(parts.values())


def mtp_kept(model: ModelConfig, work: Work, remat: str) -> int:
    """A block with the two norms and the projection before it and the norm after it."""
    d, block = model.hidden_size, size_of(kept_by_block(model, work, remat, moe=model.n_routed_experts > 0))
    if remat != "none":
        # Two inputs instead of one; and its head reads the block's output, which is computed again.
        return block + work.tokens * work.element * d + (recomputed_down(model, work) if remat == "paper" else 0)
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


def forward_at_work(model: ModelConfig, work: Work) -> int:
    """Bytes of the last layer's forward pass that it does not keep."""
    return experts_forward(model, work) if model.n_routed_experts else 0


def layer_at_work(config: Config, work: Work) -> Tensors:
    """The largest layer's backward pass: what it computes again, gradients of activations, its weights cast, their
    gradients before they are stacked; and the rows that travel to its experts and back."""
    model = config.model
    kinds = ([False] if model.n_dense_layers else []) + ([True] if model.n_routed_experts else [])
    return max((_one_layer(model, work, config.train.remat, moe=moe) for moe in kinds), key=size_of)


def numbers_of_layer(model: ModelConfig, work: Work, *, moe: bool) -> int:
    """Parameters of one block on one device."""
    return sum(
        math.prod(shape) // (work.placement.size if dims_of(path, len(shape))[0] == "expert" else 1)
        for path, shape in block_shapes(model, moe=moe).items()
    )


def _one_layer(model: ModelConfig, work: Work, remat: str, *, moe: bool) -> Tensors:
    activations, made = "gradients of a layer's activations", "a layer's gradients"
    again = {"a layer computed again": computed_again(model, work, remat, moe=moe)}
    numbers = numbers_of_layer(model, work, moe=moe)
    if not work.unroll:
        again["a layer's weights, cast"] = numbers * work.element
    attention = 2 * work.tokens * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) * work.element
    if not moe:
        ffn = 3 * work.tokens * model.intermediate_size * work.element
        return again | {activations: max(attention, ffn), made: 4 * numbers}
    held, _ = rows_of_experts(model, work)
    ways = 2 * held * model.hidden_size * work.element if work.placement.size > 1 else 0
    again["rows on their way to experts"] = ways
    before, after = experts_at_work(model, work, remat)
    if not work.unroll:
        # XLA orders a loop's body otherwise than a whole step, and its gradients may be there before.
        return again | {activations: max(attention, before, after), made: 4 * numbers}
    return again | max({activations: before}, {activations: max(attention, after), made: 4 * numbers}, key=size_of)
