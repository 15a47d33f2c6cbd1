"""Generation: one compiled program reads the prompts into the cache, another adds a token a turn to every sequence.

Slot ``s`` of the cache is position ``s``, and prompts are padded on the right. What padding leaves in a slot is
overwritten before any query may see it, and every row of a batch is computed by itself (routing drops nothing), so a
sequence's tokens do not depend on what stands beside it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.cache import empty_cache
from dsv3_jax.inference.sampler import sample
from dsv3_jax.model import Cache, DeepSeekV3
from dsv3_jax.nn.mla import AttentionForm

_FEWEST_SLOTS = 16
_LONGEST_CHUNK = 512


def generate(
    model: DeepSeekV3,
    prompt_tokens: Sequence[Any] | np.ndarray | Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    form: AttentionForm = "absorbed",
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """New tokens behind each prompt, prompt and EOS left out.

    A sequence ends at EOS, after ``max_new_tokens``, or when it is ``max_position_embeddings`` long. The number of
    sequences and their length are rounded up to powers of two, so that few programs are compiled.

    Args:
        model: any model of the family.
        prompt_tokens: token ids of one prompt, or a list of prompts of any lengths. One prompt makes a list of one.
        max_new_tokens: at most so many a sequence.
        temperature: 0 is greedy; see :func:`~dsv3_jax.inference.sampler.sample`.
        top_p: share of the probability that is drawn from.
        seed: the same seed draws the same tokens; each prompt of a batch draws its own.
        eos_id: token that ends a sequence; None is the model's own, a negative number is none.
        form: how MLA reads the cache while decoding; both give the same text up to rounding (spec 4.5). Prompts are
            always read in the naive form.
        dtype: of activations, matrix products and cache.

    Raises:
        ConfigError: an empty or too long prompt, ids that the vocabulary does not have, or a setting out of range.
    """
    config = model.config
    prompts = _checked_prompts(prompt_tokens, config)
    _check_settings(max_new_tokens, temperature, top_p, seed, form)
    longest = max(map(len, prompts))
    ends = [min(len(prompt) + max_new_tokens, config.max_position_embeddings) for prompt in prompts]
    batch, slots = _round_up(len(prompts), 1), _round_up(max(ends), _FEWEST_SLOTS)
    tokens_BS = np.zeros((batch, slots), np.int32)
    lengths_B, ends_B = np.ones(batch, np.int32), np.ones(batch, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
        lengths_B[row], ends_B[row] = len(prompt), ends[row]
    graph, state = nnx.split(model)
    chunk = min(_round_up(longest - 1, _FEWEST_SLOTS), _LONGEST_CHUNK)
    dtype = jnp.dtype(dtype)
    cache = _prefill(graph, state, tokens_BS, np.int32(longest - 1), chunk=chunk, dtype=dtype)
    eos = np.int32(config.eos_token_id if eos_id is None else eos_id)
    drawing = _Drawing(jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
    last = _decode(graph, state, tokens_BS, lengths_B, ends_B, cache, eos, drawing, form=form, dtype=dtype)
    tokens_BS, stops_B = jax.device_get((last.tokens, last.lengths))
    return [tokens_BS[row, len(prompt) : stops_B[row]].tolist() for row, prompt in enumerate(prompts)]


def generate_text(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    parse_special: bool = False,
    **settings: Any,
) -> list[str]:
    """What the model writes behind each prompt, prompt left out.

    An empty prompt starts a new document, behind the EOS that training puts between documents. No BOS is added: write
    it into the prompt, with ``parse_special``, for a model that was trained with it.

    Args:
        model: any model of the family.
        tokenizer: the one that the model was trained with.
        prompts: one text, or several. One makes a list of one.
        max_new_tokens: at most so many a text.
        parse_special: special tokens spelled in prompts count as such.
        settings: those of :func:`generate`.

    Raises:
        ConfigError: as :func:`generate`.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [tokenizer.encode(text, parse_special=parse_special) or [tokenizer.eos_id] for text in texts]
    settings = {"eos_id": tokenizer.eos_id} | settings
    return [tokenizer.decode(new) for new in generate(model, ids, max_new_tokens=max_new_tokens, **settings)]


class _Drawing(NamedTuple):
    key: PRNGKeyArray
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class _Turn(NamedTuple):
    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    running: Bool[Array, " B"]
    cache: Cache
    number: Int[Array, ""]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("chunk", "dtype"))
def _prefill(
    graph: nnx.GraphDef[DeepSeekV3],
    state: nnx.State,
    tokens: Int[Array, "B S"],
    wanted: Int[Array, ""],
    *,
    chunk: int,
    dtype: jnp.dtype,
) -> Cache:
    """The cache of the first ``wanted`` tokens, a chunk at a time: scores take chunk x S, never S x S.

    A prompt's last token is left to the first turn of :func:`_decode`, which needs its logits anyway.
    """
    batch, slots = tokens.shape

    def read(index: Int[Array, ""], cache: Cache) -> Cache:
        model = nnx.merge(graph, state)
        start = index * chunk
        positions_BT = jnp.broadcast_to(start + jnp.arange(chunk), (batch, chunk))
        tokens_BT = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        _, _, filled = model.trunk(tokens_BT, positions_BT, dtype=dtype, cache=cache, form="naive")
        return cast(Cache, filled)

    empty = empty_cache(nnx.merge(graph, state).config, batch, slots, dtype)
    return lax.fori_loop(0, (wanted + chunk - 1) // chunk, read, empty)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("form", "dtype"), donate_argnames="cache")
def _decode(
    graph: nnx.GraphDef[DeepSeekV3],
    state: nnx.State,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    ends: Int[Array, " B"],
    cache: Cache,
    eos: Int[Array, ""],
    drawing: _Drawing,
    *,
    form: AttentionForm,
    dtype: jnp.dtype,
) -> _Turn:
    """The last turn: tokens with the new ones behind the prompts, and where each sequence stops."""
    rows_B = jnp.arange(tokens.shape[0])

    def turn(now: _Turn) -> _Turn:
        model = nnx.merge(graph, state)
        at_B1 = now.lengths[:, None] - 1
        last_B1 = jnp.take_along_axis(now.tokens, at_B1, axis=1)
        hidden_B1D, _, cache = model.trunk(last_B1, at_B1, dtype=dtype, cache=now.cache, form=form)
        logits_BV = model.logits(model.final_norm(hidden_B1D))[:, 0].astype(jnp.float32)
        key = jax.random.fold_in(drawing.key, now.number)
        drawn_B = sample(logits_BV, key, drawing.temperature, drawing.top_p)
        running = now.running & (drawn_B != eos)
        lengths = now.lengths + running
        # A row that has stopped goes on computing; its tokens land behind its end and are never read.
        tokens = now.tokens.at[rows_B, now.lengths].set(drawn_B)
        return _Turn(tokens, lengths, running & (lengths < ends), cast(Cache, cache), now.number + 1)

    first = _Turn(tokens, lengths, lengths < ends, cache, jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda now: jnp.any(now.running), turn, first)


def _round_up(number: int, least: int) -> int:
    """The next power of two."""
    return 1 << (max(number, least) - 1).bit_length()


def _checked_prompts(prompt_tokens: Iterable[Any], config: ModelConfig) -> list[np.ndarray]:
    rows = list(prompt_tokens)
    if not rows:
        raise ConfigError("the prompt is empty: give at least one token id, such as the EOS that starts a new document")
    if np.ndim(rows[0]) == 0:
        rows = [rows]
    return [_checked_prompt(f"prompt {number}", np.asarray(row), config) for number, row in enumerate(rows)]


def _checked_prompt(name: str, ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    vocabulary, longest = config.vocab_size, config.max_position_embeddings
    if ids.size == 0:
        raise ConfigError(f"{name} is empty: give at least one token id, such as the EOS that starts a new document")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be a list of token ids, not {ids.dtype} of shape {ids.shape}")
    unknown = ids[(ids < 0) | (ids >= vocabulary)]
    if unknown.size:
        raise ConfigError(
            f"{name} has the token {unknown[0]}: model.vocab_size = {vocabulary} knows 0 to {vocabulary - 1}"
        )
    if len(ids) >= longest:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, model.max_position_embeddings = {longest} leaves no room for a new one: "
            f"give at most {longest - 1}"
        )
    return ids


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int, form: str) -> None:
    for good, message in (
        (max_new_tokens > 0, f"max_new_tokens = {max_new_tokens} must be greater than 0"),
        (0 <= temperature < math.inf, f"temperature = {temperature} must be at least 0 (0 is greedy)"),
        (0 < top_p <= 1, f"top_p = {top_p} must be greater than 0 and at most 1"),
        (0 <= seed < 2**32, f"seed = {seed} must be at least 0 and less than 2**32"),
        (form in ("naive", "absorbed"), f"form = {form!r} must be 'naive' or 'absorbed'"),
    ):
        if not good:
            raise ConfigError(message)
