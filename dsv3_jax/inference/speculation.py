"""Tokens drafted by the MTP module and checked by the model, several in one pass (spec 7.3).

A greedy draft counts if the model would write it too. A drawn one counts with probability ``min(1, p / q)`` and is
replaced from what p has more than q where it does not, which leaves the model's own distribution (Leviathan et al.,
arXiv 2211.17192, theorem 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.inference.sampler import Settings, draw, probabilities
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.block import Cache
from dsv3_jax.nn.cache import LayerCache

ACCEPT, DRAW, DRAFT = 0, 1, 2
"""What a key is for."""


class Drafts(NamedTuple):
    """What comes next by the MTP module, K tokens a row."""

    tokens: Int[Array, "B K"]
    q: Float[Array, "B K V"]
    """What each was drawn from; not kept where no row draws."""
    valid: Bool[Array, " B"]
    """Whether the row has any."""


class Verdict(NamedTuple):
    """What the model makes of a row's drafts."""

    tokens: Int[Array, "B T"]
    """The drafts that count, then one token of the model's own; what follows means nothing."""
    size: Int[Array, " B"]
    """Tokens that count, at least 1."""


def no_drafts(rows: int, depth: int, vocabulary: int) -> Drafts:
    """Memory for them."""
    return Drafts(
        jnp.zeros((rows, depth), jnp.int32), jnp.zeros((rows, depth, vocabulary), jnp.float32), jnp.zeros(rows, bool)
    )


def verify(
    logits: Float[Array, "B T V"], drafts: Drafts, settings: Settings, index: Int[Array, " B"], *, drawing: bool
) -> Verdict:
    """Which drafts count, and the token behind them.

    Args:
        logits: of the token before the drafts and of each draft, T = K + 1, penalized.
        drafts: K of them; none with K = 0, which is how tokens are drawn without speculation.
        settings: how tokens are chosen.
        index: number of the row's next new token, which its draw depends on.
        drawing: whether any row's temperature is above 0.
    """
    depth = drafts.tokens.shape[1]
    behind = jnp.arange(depth + 1)

    def right_in_a_row(right: Array) -> Array:
        return jnp.sum(jnp.cumprod(right & drafts.valid[:, None], axis=1, dtype=jnp.int32), axis=1)

    if not drawing:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Verdict(best, right_in_a_row(best[:, :depth] == drafts.tokens) + 1)
    p = probabilities(logits, settings)
    q = jnp.where(drafts.valid[:, None, None], drafts.q, 0)
    at = index[:, None] + behind
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(settings.keys(at[:, :depth], ACCEPT))
    p_draft, q_draft = (jnp.take_along_axis(of[:, :depth], drafts.tokens[..., None], axis=-1)[..., 0] for of in (p, q))
    accepted = right_in_a_row(uniform * q_draft < p_draft)
    # Behind the last draft nothing was drafted: all of p is left to draw from.
    rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    rest = jnp.where(total > 0, rest / total, p)
    own = draw(_at(rest, accepted), _at(settings.keys(at, DRAW), accepted))
    padded = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    return Verdict(jnp.where(behind < accepted[:, None], padded, own[:, None]), accepted + 1)


def _at(of: Array, column: Array) -> Array:
    """One column of each row."""
    return jax.vmap(lambda row, at: row[at])(of, column)


def propose(
    model: DeepSeekV3,
    hidden: Float[Array, "B T D"],
    verdict: Verdict,
    positions: Int[Array, "B T"],
    cache: Cache,
    settings: Settings,
    index: Int[Array, " B"],
    *,
    depth: int,
    drawing: bool,
) -> tuple[Drafts, Cache]:
    """The next drafts of each row by the model's first MTP module, used again for each further one.

    Its cache is filled up to the last token that counts. Further drafts stand on its own output in place of the
    model's, which is not known there yet; what they leave in the cache is overwritten before it is read again.

    Args:
        model: has an MTP module.
        hidden: what the module reads, at ``positions``.
        verdict: the tokens behind each of them.
        positions: of ``hidden``.
        cache: with a layer for the module behind the trunk's.
        settings: how drafts are drawn.
        index: number of the first new token to draft.
        depth: K.
        drawing: whether any row's temperature is above 0.
    """
    module, layer = model.mtp[0], model.config.num_hidden_layers
    last_B = verdict.size - 1
    tokens, at_BT, pages = verdict.tokens, positions, cache.pages
    drafted, chances = [], []
    for number in range(depth):
        embedded = model.embedding(tokens, hidden.dtype)
        below = LayerCache(pages, cache.table, layer)
        recycled, normed, above = module.with_cache(hidden, embedded, at_BT, below, "absorbed")
        pages = above.pages
        if not number:
            recycled, normed = (_at(states, last_B)[:, None] for states in (recycled, normed))
            at_BT = _at(at_BT, last_B)[:, None]
        logits = model.logits(normed)[:, 0].astype(jnp.float32)

        if drawing:
            q = probabilities(logits, settings)
            token = draw(q, settings.keys((index + number)[:, None], DRAFT)[:, 0])
        else:
            q, token = jnp.zeros_like(logits), jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drafted.append(token)
        chances.append(q)
        tokens, hidden, at_BT = token[:, None], recycled, at_BT + 1
    drafts = Drafts(jnp.stack(drafted, 1), jnp.stack(chances, 1), jnp.ones(tokens.shape[0], bool))
    return drafts, cache._replace(pages=pages)
