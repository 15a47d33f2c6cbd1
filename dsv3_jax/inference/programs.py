"""The two compiled programs of the engine: one reads prompts into pages, the other writes a few tokens a sequence.

A prompt's last token is left to the writing program, which needs its logits anyway. Rows that pad a batch and tokens
that pad a chunk land in page 0, or in slots that are overwritten before any query may see them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.inference.sampler import Penalties, Settings, count_tokens, penalize
from dsv3_jax.inference.sequence import MOST_LOGPROBS
from dsv3_jax.inference.speculation import Drafts, propose, verify
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.block import Cache
from dsv3_jax.nn.cache import LayerCache, Pages
from dsv3_jax.nn.mla import AttentionForm


class Rows(NamedTuple):
    """Where each sequence stands, B of them."""

    last: Int[Array, " B"]
    """Its last token."""
    length: Int[Array, " B"]
    """Tokens it has."""
    end: Int[Array, " B"]
    """Tokens it may have; a row that pads the batch has no more than its length."""
    new: Int[Array, " B"]
    """Tokens of it that were written."""
    slot: Int[Array, " B"]
    """Its row of the drafts' memory."""
    fresh: Bool[Array, " B"]
    """Whether that row holds nothing of it."""
    stop: Int[Array, "B E"]
    """Tokens that end it, -1 where there are fewer."""


class History(NamedTuple):
    """What penalties look at."""

    tokens: Int[Array, "B S"]
    prompt: Int[Array, " B"]
    """Tokens of the prompt."""
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]


class Told(NamedTuple):
    """Log-probabilities of the tokens written, and of the best ones."""

    own: Float[Array, "B Y"]
    best: Int[Array, "B Y K"]
    theirs: Float[Array, "B Y K"]


class Written(NamedTuple):
    """What one call of :func:`write` adds."""

    tokens: Int[Array, "B Y"]
    size: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    """Whether a stop token came, which is not among them."""
    told: Told | None
    proposed: Int[Array, " B"]
    accepted: Int[Array, " B"]


@functools.partial(
    jax.jit, static_argnames=("graph", "dtype", "form", "drafting"), donate_argnames=("pages",), keep_unused=True
)
def read(
    state: nnx.State,
    pages: Pages,
    table: Int[Array, "B X"],
    tokens: Int[Array, "B T1"],
    start: Int[Array, " B"],
    *,
    graph: nnx.GraphDef[DeepSeekV3],
    dtype: jnp.dtype,
    form: AttentionForm,
    drafting: bool,
) -> Pages:
    """The pages with T tokens of each sequence in them, from position ``start`` on. The token after the last is given
    too, for the MTP module, whose layer is filled with ``drafting``."""
    model = nnx.merge(graph, state)
    positions = start[:, None] + jnp.arange(tokens.shape[1] - 1)
    cache = Cache(pages, table)
    hidden, _, cache = model.trunk(tokens[:, :-1], positions, dtype=dtype, cache=cache, form=form)
    assert cache is not None
    if not drafting:
        return cache.pages
    below = LayerCache(cache.pages, table, model.config.num_hidden_layers)
    ahead = model.embedding(tokens[:, 1:], dtype)
    return model.mtp[0].with_cache(_mtp_input(model, hidden), ahead, positions, below, form)[2].pages


class _Turn(NamedTuple):
    number: Int[Array, ""]
    pages: Pages
    last: Int[Array, " B"]
    length: Int[Array, " B"]
    running: Bool[Array, " B"]
    drafts: Drafts
    seen: Int[Array, "B V"] | None
    written: Int[Array, "B V"] | None
    out: Written


@functools.partial(
    jax.jit,
    static_argnames=("graph", "dtype", "form", "most", "drawing", "telling"),
    donate_argnames=("pages", "memory"),
    keep_unused=True,
)
def write(
    state: nnx.State,
    pages: Pages,
    memory: Drafts,
    table: Int[Array, "B X"],
    rows: Rows,
    settings: Settings,
    history: History | None,
    turns: Int[Array, ""],
    *,
    graph: nnx.GraphDef[DeepSeekV3],
    dtype: jnp.dtype,
    form: AttentionForm,
    most: int,
    drawing: bool,
    telling: bool,
) -> tuple[Pages, Drafts, Written]:
    """``turns`` turns, each of which adds a token to every row that has not ended, and the drafts before it that count.

    Args:
        state: of the model.
        pages: memory of the caches, given up.
        memory: drafts of all slots, given up; K = 0 is plain decoding.
        table: pages of each row.
        rows: where the rows stand.
        settings: how tokens are chosen.
        history: of a batch in which a row has penalties; None leaves them out of the program.
        turns: at most ``most``.
        graph: of the model.
        dtype: of activations and matrix products.
        form: how MLA reads its cache.
        most: turns that there is room for in the result.
        drawing: whether any row's temperature is above 0.
        telling: also tell log-probabilities.
    """
    batch, vocabulary = rows.last.shape[0], nnx.merge(graph, state).config.vocab_size
    depth = memory.tokens.shape[1]
    room, at = most * (depth + 1), jnp.arange(batch)
    told = None
    if telling:
        best = min(MOST_LOGPROBS, vocabulary)
        told = Told(jnp.zeros((batch, room)), jnp.zeros((batch, room, best), jnp.int32), jnp.zeros((batch, room, best)))
    none = jnp.zeros(batch, jnp.int32)
    seen = written = None
    if history is not None:
        seen = count_tokens(history.tokens, none, rows.length, vocabulary)
        written = count_tokens(history.tokens, history.prompt, rows.length, vocabulary)
    mine = Drafts(memory.tokens[rows.slot], memory.q[rows.slot], memory.valid[rows.slot] & ~rows.fresh)

    def penalized(logits: Array, now: _Turn) -> Array:
        """Logits of a token and its drafts, each draft counted for those behind it."""
        if history is None:
            return logits
        seen, written, places = now.seen, now.written, []
        assert seen is not None
        assert written is not None
        for place in range(depth + 1):
            known = Penalties(history.presence, history.frequency, history.repetition, written, seen)
            places.append(penalize(logits[:, place], known))
            if place < depth:
                drafted = now.drafts.tokens[:, place]
                seen, written = seen.at[at, drafted].add(1), written.at[at, drafted].add(1)
        return jnp.stack(places, axis=1)

    def turn(now: _Turn) -> _Turn:
        model = nnx.merge(graph, state)
        tokens_BT = jnp.concatenate([now.last[:, None], now.drafts.tokens], axis=1)
        behind = jnp.arange(depth + 1)
        positions = now.length[:, None] - 1 + behind
        cache = Cache(now.pages, table)
        raw, _, cache = model.trunk(tokens_BT, positions, dtype=dtype, cache=cache, form=form)
        assert cache is not None
        logits = model.logits(model.final_norm(raw)).astype(jnp.float32)
        index = rows.new + now.out.size
        verdict = verify(penalized(logits, now), now.drafts, settings, index, drawing=drawing)
        # Of what counts, a row takes what stands before a stop token and before its end.
        is_stop = jnp.any(verdict.tokens[..., None] == rows.stop[:, None], axis=-1)
        before = jnp.cumprod(~is_stop & (behind < verdict.size[:, None]), axis=1, dtype=jnp.int32)
        taken = jnp.minimum(jnp.sum(before, axis=1), rows.end - now.length) * now.running
        stopped = now.running & (taken < verdict.size) & (now.length + taken < rows.end)
        length = now.length + taken
        # What is not taken goes past the end of the result, where it is dropped.
        place = jnp.where(behind < taken[:, None], now.out.size[:, None] + behind, room)
        put = functools.partial(_put, rows=at[:, None], place=place)
        out = now.out._replace(
            tokens=put(now.out.tokens, verdict.tokens),
            size=now.out.size + taken,
            stopped=now.out.stopped | stopped,
            proposed=now.out.proposed + now.running * now.drafts.valid * depth,
            accepted=now.out.accepted + now.running * (verdict.size - 1),
        )
        if now.out.told is not None:
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            theirs, best = lax.top_k(logprobs, now.out.told.best.shape[-1])
            own = jnp.take_along_axis(logprobs, verdict.tokens[..., None], axis=-1)[..., 0]
            old = now.out.told
            out = out._replace(told=Told(put(old.own, own), put(old.best, best), put(old.theirs, theirs)))
        seen, written = now.seen, now.written
        if seen is not None and written is not None:
            add = (behind < taken[:, None]).astype(jnp.int32)
            seen, written = (counts.at[at[:, None], verdict.tokens].add(add) for counts in (seen, written))
        last = jnp.take_along_axis(verdict.tokens, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
        last = jnp.where(taken > 0, last, now.last)
        running = now.running & ~stopped & (length < rows.end)
        drafts = now.drafts
        if depth:
            hidden, ahead = _mtp_input(model, raw), index + verdict.size
            drafts, cache = propose(
                model, hidden, verdict, positions, cache, settings, ahead, depth=depth, drawing=drawing
            )
        return _Turn(now.number + 1, cache.pages, last, length, running, drafts, seen, written, out)

    nothing = Written(jnp.zeros((batch, room), jnp.int32), none, jnp.zeros(batch, bool), told, none, none)
    running = rows.length < rows.end
    first = _Turn(jnp.int32(0), pages, rows.last, rows.length, running, mine, seen, written, nothing)
    last = lax.while_loop(lambda now: (now.number < turns) & jnp.any(now.running), turn, first)
    memory = jax.tree.map(lambda all_rows, own: all_rows.at[rows.slot].set(own), memory, last.drafts)
    return last.pages, memory, last.out


def _mtp_input(model: DeepSeekV3, raw: Array) -> Array:
    """What the first MTP module reads of the trunk (spec 7.2)."""
    return model.final_norm(raw) if model.config.mtp_hidden == "post_norm" else raw


def _put(array: Array, values: Array, *, rows: Array, place: Array) -> Array:
    return array.at[rows, place].set(values, mode="drop")
