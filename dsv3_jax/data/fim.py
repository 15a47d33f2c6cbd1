"""Fill-in-the-middle in prefix-suffix-middle form, per document and before packing (spec 9.2)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer


def cut_in_three[Text: (str, list[int])](text: Text, rng: np.random.Generator) -> tuple[Text, Text, Text]:
    """Prefix, middle and suffix: two cuts, each uniform over the borders of characters or of tokens (spec 9.2)."""
    first, second = np.sort(rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def psm(
    tokenizer: Tokenizer, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]
) -> Int32[np.ndarray, " tokens"]:
    """``begin prefix hole suffix end middle EOS``, the order that V3 was trained on.

    Raises:
        ConfigError: the vocabulary has no FIM tokens.
    """
    begin, hole, end = require_fim(tokenizer)
    return np.array([begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id], np.int32)


def require_fim(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of FIM's begin, hole and end.

    Raises:
        ConfigError: the vocabulary has no FIM tokens.
    """
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise ConfigError("data.fim_rate must be 0: the tokenizer has no fill-in-the-middle tokens")
    return begin, hole, end
