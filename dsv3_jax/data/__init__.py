"""Text to rows of tokens: tokenizer, corpus, fill-in-the-middle, packing, and the restorable stream of a run."""

from dsv3_jax.data.baselines import BigramCounts, consumed_counts, full_train_counts, gzip_bits_per_byte
from dsv3_jax.data.loader import Data, prepare_data
from dsv3_jax.data.stream import RowStream, merge_states
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "BigramCounts",
    "Data",
    "RowStream",
    "Tokenizer",
    "consumed_counts",
    "full_train_counts",
    "gzip_bits_per_byte",
    "merge_states",
    "prepare_data",
    "train_tokenizer",
]
