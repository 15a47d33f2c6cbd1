"""Random splitting of tokens that join punctuation and line breaks (spec 9.3).

A model that has only seen ``):\\n`` as one token is biased on a prompt that ends in ``):``. Some of these tokens are
therefore cut into their punctuation and their line breaks during training, each part encoded anew.
"""

import unicodedata

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer


class BoundarySplitter:
    """Knows every joined token of a vocabulary and its two parts."""

    def __init__(self, tokenizer: Tokenizer):
        """Search the vocabulary once and encode the parts of each joined token."""
        joined = {}
        for index in np.flatnonzero(tokenizer.token_bytes > 1).tolist():
            cut = cut_joined(tokenizer.raw[index])
            if cut is not None:
                joined[index] = cut
        encoded = tokenizer.encode_batch([part for cut in joined.values() for part in cut])
        pairs = zip(encoded[::2], encoded[1::2], strict=True)
        self.parts: dict[int, list[int]] = {
            index: head + tail for index, (head, tail) in zip(joined, pairs, strict=True)
        }
        width = max(map(len, self.parts.values()), default=1)
        self._length = np.ones(tokenizer.vocab_size, np.int32)
        self._table = np.zeros((tokenizer.vocab_size, width), np.int32)
        for index, ids in self.parts.items():
            self._length[index] = len(ids)
            self._table[index, : len(ids)] = ids

    def split(
        self, ids: Int32[np.ndarray, " tokens"], rate: float, rng: np.random.Generator
    ) -> Int32[np.ndarray, " more_tokens"]:
        """``ids`` with each joined token cut with probability ``rate``; the bytes they stand for stay the same."""
        cut = (self._length[ids] > 1) & (rng.random(ids.size) < rate)
        if not cut.any():
            return ids
        lengths = np.where(cut, self._length[ids], 1)
        starts = np.cumsum(lengths) - lengths
        out = np.repeat(ids, lengths)
        for place in range(self._table.shape[1]):
            here = cut & (lengths > place)
            out[starts[here] + place] = self._table[ids[here], place]
        return out


def cut_joined(raw: bytes) -> tuple[str, str] | None:
    """Punctuation and line breaks of ``" ?[punctuation or symbols]+[line breaks]+"``; None for any other token."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    head = text.rstrip("\r\n")
    marks = head.removeprefix(" ")
    if head == text or not marks or any(unicodedata.category(mark)[0] not in "PS" for mark in marks):
        return None
    return head, text[len(head) :]
