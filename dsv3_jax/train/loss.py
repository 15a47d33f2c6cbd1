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
from dsv3_jax.planning.at_work import PARTS
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
    hidden, labels, weights = _in_chunks(hidden, labels, weights, chunk)
    return _chunked(hidden, head, labels, weights)


def _in_chunks(hidden: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    rows = labels.shape[0]
    chunk = min(chunk, rows)
    padding = -rows % chunk
    if padding:
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        labels, weights = jnp.pad(labels, (0, padding)), jnp.pad(weights, (0, padding))
    split = (-1, chunk)
    return hidden.reshape(*split, hidden.shape[-1]), labels.reshape(split), weights.reshape(split)


def _chunk_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, head, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (normalizer - picked)), normalizer


def _chunk_gradients(
    states: jax.Array, cast: jax.Array, targets: jax.Array, shares: jax.Array, scale: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunk's loss, and ``scale`` times its gradients of hidden states and of logits."""
    logits = _chunk_logits(states, cast)
    loss, normalizer = _chunk_loss(logits, targets, shares)
    probabilities = jnp.exp(logits - normalizer[:, None])
    hits = jnp.arange(logits.shape[-1]) == targets[:, None]
    d_logits = ((probabilities - hits) * (scale * shares)[:, None]).astype(states.dtype)
    return loss, _chunk_logits(d_logits, cast.T).astype(states.dtype), d_logits


@jax.named_scope("loss")
def cross_entropy_gradients(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: tuple[Int[Array, "B Tk"], Float[Array, "B Tk"]],
    chunk: int,
    scale: Float[Array, ""],
    d_head: Float[Array, "D V"],
) -> tuple[Float[Array, ""], Float[Array, "B T D"], Float[Array, "D V"]]:
    """:func:`cross_entropy` of one of :func:`head_targets`; ``scale`` times its gradient of ``hidden``; and ``d_head``
    with ``scale`` times the head's added to it in place, some rows at a time."""
    labels, weights = targets
    used = hidden[:, : labels.shape[1]]
    chunks = _in_chunks(used.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1), chunk)
    cast, dim_d = head.astype(hidden.dtype), hidden.shape[-1]
    part = dim_d // PARTS if dim_d % PARTS == 0 else dim_d

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, d_head = carry
        states, targets, shares = chunk
        loss, d_states, d_logits = _chunk_gradients(states, cast, targets, shares, scale)

        def add(i: jax.Array, d_head: jax.Array) -> jax.Array:
            found = _chunk_logits(lax.dynamic_slice_in_dim(states, i * part, part, 1).T, d_logits)
            now = lax.dynamic_slice_in_dim(d_head, i * part, part)
            return lax.dynamic_update_slice_in_dim(d_head, now + found, i * part, 0)

        return (total + loss, lax.fori_loop(0, dim_d // part, add, d_head)), d_states

    (total, d_head), d_states = lax.scan(body, (jnp.zeros((), jnp.float32), d_head), chunks)
    d_used = d_states.reshape(-1, dim_d)[: labels.size].reshape(used.shape)
    return total, jnp.pad(d_used, ((0, 0), (0, hidden.shape[1] - used.shape[1]), (0, 0))), d_head


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
        loss, d_states, d_logits = _chunk_gradients(states, cast, targets, shares, 1)
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
    head, hidden = model.head_weight(), [states.main, *states.mtp]
    main, *others = (
        cross_entropy(
            state[:, : labels.shape[1]].reshape(-1, raw.shape[-1]),
            head,
            labels.reshape(-1),
            weights.reshape(-1),
            train.loss_chunk,
        )
        for state, (labels, weights) in zip(hidden, head_targets(tokens_or_pad, label_total, len(hidden)), strict=True)
    )
    mtp = sum(others, jnp.zeros((), jnp.float32)) / max(len(others), 1)
    balance_total, counts = total_balance(states.aux, tokens.shape[0] / sequence_total, len(others), mtp_weight)
    return Losses(main + mtp_weight * mtp + balance_total, main, mtp, balance_total, counts)


def head_targets(
    tokens: Int[Array, "B T1"], label_total: Float[Array, ""], heads: int
) -> list[tuple[Int[Array, "B Tk"], Float[Array, "B Tk"]]]:
    """Labels and their weights in the step's mean, of the main head and of each MTP depth; padding is negative."""
    labels, weights = jnp.maximum(tokens, 0), has_label(tokens).astype(jnp.float32) / label_total
    return [(labels[:, depth + 1 :], weights[:, depth:]) for depth in range(heads)]


def total_balance(
    aux: MoEAux | None, share: Float[Array, ""], mtp_depths: int, mtp_weight: Float[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, "L E"] | None]:
    """``share`` of the balance losses of all routers, and their counts; 0 and None where nothing routes.

    MTP's routers, the last ``mtp_depths``, add nothing while lambda is 0: MTP is off then (spec 28, property 21).
    """
    if aux is None:
        return jnp.zeros((), jnp.float32), None
    routers = aux.balance_loss.shape[0]
    on = (jnp.arange(routers) < routers - mtp_depths) | (mtp_weight != 0)
    return jnp.sum(jnp.where(on, aux.balance_loss, 0.0)) * share, aux.counts
