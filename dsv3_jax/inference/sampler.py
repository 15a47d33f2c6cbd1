"""Which token comes next: penalties, temperature, what cuts the tail off, and draws that depend on a row alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32


class Settings(NamedTuple):
    """How each row's token is chosen; see :class:`~dsv3_jax.inference.sequence.Sampling`."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    choice: Int[Array, " B"]

    def keys(self, index: Int[Array, "B T"], purpose: int) -> Key[Array, "B T"]:
        """A key for each row's new token number ``index``: of nothing else that is in the batch or came before."""

        def one(seed: Array, choice: Array, number: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), choice)
            return jax.random.fold_in(jax.random.fold_in(key, number), purpose)

        return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)))(self.seed, self.choice, index)


class Penalties(NamedTuple):
    """What earlier tokens take from logits, and which those are."""

    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    written: Int[Array, "B V"]
    """How often each token was written."""
    seen: Int[Array, "B V"]
    """How often it was, in the prompt too."""


def count_tokens(
    tokens: Int[Array, "B S"], start: Int[Array, " B"], stop: Int[Array, " B"], vocabulary: int
) -> Int[Array, "B V"]:
    """How often each token is among ``tokens[start:stop]`` of its row."""
    at = jnp.arange(tokens.shape[1])
    inside = (at >= start[:, None]) & (at < stop[:, None])
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocabulary), jnp.int32).at[rows, tokens].add(inside.astype(jnp.int32))


def penalize(logits: Float[Array, "B V"], penalties: Penalties) -> Float[Array, "B V"]:
    """Logits of tokens that stand before, lowered (or raised, by negative penalties)."""
    repetition = penalties.repetition[:, None]
    turned = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(penalties.seen > 0, turned, logits)
    logits = logits - penalties.frequency[:, None] * penalties.written
    return logits - penalties.presence[:, None] * (penalties.written > 0)


def probabilities(logits: Float[Array, "*rows V"], settings: Settings) -> Float[Array, "*rows V"]:
    """What tokens are drawn from, of [B, V] or [B, T, V]; where the temperature is 0, all of it on the best one.

    A token stays if each cut alone would keep it, all of them made on the distribution that the temperature leaves; the
    best one always stays, and among equals the lowest id comes first.
    """

    def rows(of: Array) -> Array:
        return of.reshape(-1, *(1,) * (logits.ndim - 1))

    temperature = rows(settings.temperature)
    # The best logit becomes 0 first, so that the smallest temperature cannot make two infinities.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1)
    p = jax.nn.softmax(scaled, axis=-1)

    def cut(p: Array) -> Array:
        order = jnp.argsort(-p, axis=-1, stable=True)
        ordered = jnp.take_along_axis(p, order, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        rank = jnp.arange(p.shape[-1])
        top_k = rows(settings.top_k)
        keep = (before < rows(settings.top_p)) | (rows(settings.top_p) >= 1)
        keep &= (rank < top_k) | (top_k == 0)
        keep &= ordered >= rows(settings.min_p) * ordered[..., :1]
        kept = jnp.where(keep | (rank == 0), ordered, 0)
        kept /= jnp.sum(kept, axis=-1, keepdims=True)
        return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)

    cuts = (settings.top_p < 1) | (settings.top_k > 0) | (settings.min_p > 0)
    p = lax.cond(jnp.any(cuts & (settings.temperature > 0)), cut, lambda p: p, p)
    return jnp.where(temperature > 0, p, jax.nn.one_hot(jnp.argmax(logits, axis=-1), p.shape[-1]))


def draw(p: Float[Array, "*rows V"], keys: Key[Array, "*rows"]) -> Int[Array, "*rows"]:
    """One token a row with the given probabilities; where all of it is on one, that one."""
    flat = p.reshape(-1, p.shape[-1])
    drawn = jax.vmap(jax.random.categorical)(keys.reshape(-1), jnp.log(flat))
    return drawn.reshape(p.shape[:-1]).astype(jnp.int32)
