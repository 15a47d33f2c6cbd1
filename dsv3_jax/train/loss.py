"""Cross entropy without the logits of all tokens at once, and the sum of all losses (spec 6, 7, 27.5)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.balance import balance_loss
from dsv3_jax.nn.moe import BalanceLoss, MoEAux
from pallas_kernels.precision import matmul_precision


@jax.named_scope("loss")
def cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " M"],
    weights: Float[Array, " M"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum over rows of ``weight * -log softmax(hidden @ head)[label]``, float32.

    Logits exist for ``chunk`` rows at a time. When differentiated, the gradients of ``hidden`` and ``head`` are made in
    the forward pass, chunk by chunk, so that logits are computed once.
    """
    rows = labels.shape[0]
    chunk = min(chunk, rows)
    padding = -rows % chunk
    if padding:
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        labels, weights = jnp.pad(labels, (0, padding)), jnp.pad(weights, (0, padding))
    split = (-1, chunk)
    return _chunked(hidden.reshape(*split, hidden.shape[-1]), head, labels.reshape(split), weights.reshape(split))


def _chunk_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, head, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (normalizer - picked)), normalizer


@jax.custom_vjp
def _chunked(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    cast = head.astype(hidden.dtype)

    def body(total: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        states, targets, shares = chunk
        return total + _chunk_loss(_chunk_logits(states, cast), targets, shares)[0], None

    return lax.scan(body, jnp.zeros((), jnp.float32), (hidden, labels, weights))[0]


def _chunked_fwd(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    cast = head.astype(hidden.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, d_head = carry
        states, targets, shares = chunk
        logits = _chunk_logits(states, cast)
        loss, normalizer = _chunk_loss(logits, targets, shares)
        probabilities = jnp.exp(logits - normalizer[:, None])
        hits = jnp.arange(logits.shape[-1]) == targets[:, None]
        d_logits = ((probabilities - hits) * shares[:, None]).astype(states.dtype)
        d_states = _chunk_logits(d_logits, cast.T).astype(states.dtype)
        return (total + loss, d_head + _chunk_logits(states.T, d_logits)), d_states

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), d_hidden = lax.scan(body, start, (hidden, labels, weights))
    return total, (d_hidden, d_head.astype(head.dtype))


def _chunked_bwd(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_head = residuals
    return ((d_hidden * g).astype(d_hidden.dtype), d_head * g, None, None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def activation_dtype(precision: str) -> Any:
    """What modules pass to each other under a ``train.precision``: bfloat16 around FP8 products too (spec 11.2)."""
    return jnp.float32 if precision == "fp32" else jnp.bfloat16


class Losses(NamedTuple):
    """What one micro-batch adds up to; losses are shares of the whole step's means."""

    total: Float[Array, ""]
    main: Float[Array, ""]
    mtp: Float[Array, ""]
    """Mean over depths, before lambda."""
    balance: Float[Array, ""]
    counts: Int[Array, "L E"] | None
    """Tokens each expert of each router received."""


def has_label(tokens: Int[Array, "*A B T1"]) -> Bool[Array, "*A B T"]:
    """Which positions have a next token to learn. Padding is any negative id."""
    return tokens[..., 1:] >= 0


def training_loss(
    model: DeepSeekV3,
    tokens: Int[Array, "B T1"],
    config: Config,
    *,
    mtp_weight: Float[Array, ""],
    label_total: Float[Array, ""],
    sequence_total: Float[Array, ""],
) -> Losses:
    """``L_main + lambda / D * sum_k L_MTP^k + L_Bal`` of one micro-batch, as its share of the step's means.

    Negative tokens are padding: they are read as token 0 and never learned.
    ``label_total`` is the number of labels and ``sequence_total`` the number of sequences of the whole step, so that
    shares add up over micro-batches and devices. MTP terms are divided by the main head's label count, although depth
    k has fewer (eq 24). Balance losses average over sequences and sum over routers.
    """
    train = config.train
    inputs = jnp.maximum(tokens, 0)
    dtype = activation_dtype(train.precision)
    raw, record, _ = model.trunk(
        inputs[:, :-1], dtype=dtype, balance=balance_of(config), remat=train.remat, unroll=train.unroll
    )
    return end_losses(
        model,
        raw,
        tokens,
        config,
        record,
        mtp_weight=mtp_weight,
        label_total=label_total,
        sequence_total=sequence_total,
    )


def balance_of(config: Config) -> BalanceLoss | None:
    """The balance losses of one router; None where nothing routes."""
    routes = config.model.n_moe_layers or config.model.num_nextn_predict_layers
    return functools.partial(balance_loss, loss=config.loss) if routes else None


def end_losses(
    model: DeepSeekV3,
    raw: Float[Array, "B T D"],
    tokens: Int[Array, "B T1"],
    config: Config,
    record: MoEAux | None = None,
    *,
    mtp_weight: Float[Array, ""],
    label_total: Float[Array, ""],
    sequence_total: Float[Array, ""],
) -> Losses:
    """:func:`training_loss` from the trunk's output and routing record; without the record, balance losses and counts
    are those of MTP's routers alone."""
    train = config.train
    tokens_or_pad, tokens = tokens, jnp.maximum(tokens, 0)
    states = model.ending(raw, tokens, record, balance=balance_of(config), remat=train.remat)
    weights = has_label(tokens_or_pad).astype(jnp.float32) / label_total
    head = model.head_weight()
    main = _head_loss(states.main, head, tokens[:, 1:], weights, train.loss_chunk)
    mtp = jnp.zeros((), jnp.float32)
    for depth, hidden in enumerate(states.mtp, start=1):
        labels = tokens[:, depth + 1 :]
        mtp += _head_loss(hidden[:, : labels.shape[1]], head, labels, weights[:, depth:], train.loss_chunk)
    mtp /= max(len(states.mtp), 1)
    balance_total, counts = jnp.zeros((), jnp.float32), None
    if states.aux is not None:
        balance_total = jnp.sum(states.aux.balance_loss) * (tokens.shape[0] / sequence_total)
        counts = states.aux.counts
    return Losses(main + mtp_weight * mtp + balance_total, main, mtp, balance_total, counts)


def _head_loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int) -> jax.Array:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return cross_entropy(flat, head, labels.reshape(-1), weights.reshape(-1), chunk)
