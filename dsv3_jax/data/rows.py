"""Documents to packed rows of tokens: the one path from text to what a step is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.boundary import BoundarySplitter
from dsv3_jax.data.fim import cut_in_three, psm, require_fim
from dsv3_jax.data.packing import pack
from dsv3_jax.data.tokenizer import Tokenizer


def plain_rows(tokenizer: Tokenizer, texts: Sequence[str], width: int) -> Int32[np.ndarray, "rows {width}"]:
    """Rows of ``texts`` as they are: no FIM, no splitting. For validation and for counting."""
    return pack(tokenizer.documents(texts), width, tokenizer.pad_id)


@dataclass(frozen=True)
class RowMaker:
    """Makes training rows. What chance decides depends on the seed, the epoch and the document, on nothing else."""

    tokenizer: Tokenizer
    splitter: BoundarySplitter
    width: int
    """Tokens of a row: T inputs, and one more so that the last has a target."""
    fim_rate: float
    split_rate: float
    seed: int
    fim_cuts: Literal["characters", "tokens"] = "characters"

    def __post_init__(self) -> None:
        """Refuse FIM without its tokens."""
        if self.fim_rate > 0:
            require_fim(self.tokenizer)

    def documents(self, texts: Sequence[str], numbers: Sequence[int], epoch: int) -> list[Int32[np.ndarray, " _"]]:
        """Each text as tokens closed by EOS, some in FIM form, some of their joined tokens split.

        Args:
            texts: of the documents.
            numbers: of the documents in the corpus, which seed them.
            epoch: how often the stream has been through the corpus.
        """
        rngs = [np.random.default_rng([self.seed, epoch, number]) for number in numbers]
        cut = [rng.random() < self.fim_rate for rng in rngs]
        before = self.fim_cuts == "characters"
        parts = [
            list(cut_in_three(text, rng)) if fim and before else [text]
            for text, rng, fim in zip(texts, rngs, cut, strict=True)
        ]
        encoded = iter(self.tokenizer.encode_batch([part for several in parts for part in several]))
        documents = []
        for rng, fim in zip(rngs, cut, strict=True):
            if fim and before:
                ids = psm(self.tokenizer, next(encoded), next(encoded), next(encoded))
            elif fim:
                ids = psm(self.tokenizer, *cut_in_three(list(next(encoded)), rng))
            else:
                ids = np.array([*next(encoded), self.tokenizer.eos_id], np.int32)
            documents.append(self.splitter.split(ids, self.split_rate, rng))
        return documents

    def rows(
        self, texts: Sequence[str], numbers: Sequence[int], epoch: int, window: int, shard: int
    ) -> Int32[np.ndarray, "rows width"]:
        """The documents of one window packed, their rows shuffled so that a batch is not one long document."""
        rows = pack(self.documents(texts, numbers, epoch), self.width, self.tokenizer.pad_id)
        order = np.random.default_rng([self.seed, epoch, window, shard, _WINDOW]).permutation(len(rows))
        return rows[order]


_WINDOW = 0x77696E64
"""A last word of the seed, so that a window never shares its stream of numbers with a document."""
