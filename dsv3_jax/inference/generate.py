"""Generation from Python: prompts in, what follows them out, by an engine of the right size."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine, EngineOptions, attention_form, check_prompt
from dsv3_jax.inference.sequence import Sampling
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.mla import AttentionForm

_FEWEST_SLOTS, _PAGE = 16, 16
_MOST_AT_ONCE = 256
_TURNS = 64


def generate(
    model: DeepSeekV3,
    prompt_tokens: Sequence[Any] | np.ndarray | Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    drafts: int = 0,
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
        temperature: 0 is greedy; see :class:`~dsv3_jax.inference.sequence.Sampling`.
        top_p: share of the probability that is drawn from.
        seed: the same seed draws the same tokens; each prompt of a batch draws its own.
        eos_id: token that ends a sequence; None is the model's own, a negative number is none.
        drafts: tokens that the MTP module drafts and the model checks in one pass; greedy text stays the same.
        form: how MLA reads the cache while decoding; both give the same text up to rounding (spec 4.5). Prompts are
            always read in the naive form.
        dtype: of activations, matrix products and cache.

    Raises:
        ConfigError: an empty or too long prompt, ids that the vocabulary does not have, or a setting out of range.
    """
    config = model.config
    prompts = _checked_prompts(prompt_tokens, config)
    stop_tokens = (config.eos_token_id if eos_id is None else eos_id,)
    asked = [
        Sampling(max_new_tokens, temperature, top_p, seed=seed, choice=row, stop_tokens=stop_tokens)
        for row in range(len(prompts))
    ]
    longest = min(max(map(len, prompts)) + max_new_tokens, config.max_position_embeddings)
    batch = min(_round_up(len(prompts), 1), _MOST_AT_ONCE)
    options = EngineOptions(
        least_batch=batch,
        max_batch=batch,
        max_tokens=min(_round_up(longest, _FEWEST_SLOTS), config.max_position_embeddings),
        page_size=_PAGE,
        token_budget=batch * 512 + 1,
        turns=_TURNS,
        drafts=drafts,
        form=attention_form(form),
        share_prefixes=False,
    )
    engine = Engine(model, None, options, dtype=dtype)
    sequences = [engine.add(prompt, sampling) for prompt, sampling in zip(prompts, asked, strict=True)]
    engine.run()
    return [sequence.new for sequence in sequences]


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


def _round_up(number: int, least: int) -> int:
    """The next power of two."""
    return 1 << (max(number, least) - 1).bit_length()


def _checked_prompts(prompt_tokens: Iterable[Any], config: ModelConfig) -> list[list[int]]:
    rows = list(prompt_tokens)
    if not rows:
        raise ConfigError("the prompt is empty: give at least one token id, such as the EOS that starts a new document")
    if np.ndim(rows[0]) == 0:
        rows = [rows]
    longest = config.max_position_embeddings
    return [check_prompt(f"prompt {number}", np.asarray(row), config, longest) for number, row in enumerate(rows)]
