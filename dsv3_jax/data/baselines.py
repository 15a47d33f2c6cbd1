"""What a trained model has to beat, in bits per byte: an interpolated bigram model, and gzip."""

import gzip
import itertools
import math

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from dsv3_jax.data.loader import Data
from dsv3_jax.data.rows import plain_rows
from dsv3_jax.data.tokenizer import Tokenizer


def predicted_bytes(rows: Int[np.ndarray, "rows width"], tokenizer: Tokenizer) -> int:
    """Raw bytes of the tokens that a model predicts in ``rows``: all but each row's first. Special tokens have none."""
    return int(tokenizer.token_bytes[rows[:, 1:]].sum())


def gzip_bits_per_byte(val_rows: Int32[np.ndarray, "rows width"], tokenizer: Tokenizer) -> float:
    """Bits that ``gzip -9`` needs for a byte of the predicted text, row after row in one stream."""
    text = b"".join(tokenizer.decode_bytes(row[1:], skip_special=True) for row in val_rows)
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


class BigramCounts:
    """Counts of tokens and of pairs, row by row; every tenth row is kept apart to weigh the components.

    A pair is (token, next token) inside one row; pairs whose second is pad are left out, so that exactly what the
    model's loss covers is counted and predicted.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Empty counts over the ids of ``tokenizer``."""
        self._size, self._pad = tokenizer.vocab_size, tokenizer.pad_id
        self._rows = 0
        self._kept, self._held = _Pairs(), _Pairs()

    @property
    def tokens(self) -> int:
        """Predicted tokens counted, those kept apart included."""
        return int(self._kept.merged()[1].sum() + self._held.merged()[1].sum())

    def add(self, rows: Int32[np.ndarray, "rows width"]) -> None:
        """Count more rows of T + 1 tokens."""
        held = (np.arange(len(rows)) + self._rows) % 10 == 0
        self._rows += len(rows)
        self._kept.add(self._keys(rows[~held]))
        self._held.add(self._keys(rows[held]))

    def bits_per_byte(self, val_rows: Int32[np.ndarray, "rows width"], tokenizer: Tokenizer) -> float:
        """Jelinek-Mercer interpolation of uniform, unigram and bigram over ``val_rows``.

        The weights come from EM on the tenth kept apart; then that tenth is counted in with the rest. After a token
        never seen, the bigram component is the unigram one.
        """
        held_keys, held_counts = self._held.merged()
        weights, _ = em_weights(self._components(held_keys, self._kept.merged()), held_counts)
        everything = _Pairs()
        for part in (self._kept, self._held):
            everything.add(*part.merged())
        keys, counts = np.unique(self._keys(val_rows), return_counts=True)
        nats = -np.log(self._components(keys, everything.merged()) @ weights) @ counts
        return float(nats / math.log(2) / predicted_bytes(val_rows, tokenizer))

    def _keys(self, rows: Int32[np.ndarray, "rows width"]) -> Int64[np.ndarray, " pairs"]:
        before, after = rows[:, :-1], rows[:, 1:]
        real = after != self._pad
        return before[real].astype(np.int64) * self._size + after[real]

    def _components(
        self, keys: Int64[np.ndarray, " pairs"], counted: tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]
    ) -> Float64[np.ndarray, "pairs 3"]:
        """Uniform, unigram and bigram probability of each pair's second token."""
        pairs, counts = counted
        uniform = np.full(len(keys), 1 / self._size)
        if not len(pairs):
            return np.stack([uniform] * 3, axis=1)
        before, after = np.divmod(keys, self._size)
        unigram = np.bincount(pairs % self._size, counts, self._size)[after] / counts.sum()
        context = np.bincount(pairs // self._size, counts, self._size)[before]
        place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
        joint = np.where(pairs[place] == keys, counts[place], 0)
        bigram = np.where(context > 0, joint / np.maximum(context, 1), unigram)
        return np.stack([uniform, unigram, bigram], axis=1)


class _Pairs:
    """Sorted distinct keys with their counts; new keys wait in a list until many have come."""

    def __init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0

    def add(self, keys: np.ndarray, counts: np.ndarray | None = None) -> None:
        if counts is None:
            keys, counts = np.unique(keys, return_counts=True)
        self._waiting.append((keys, counts.astype(np.int64)))
        self._size += len(keys)
        if len(self._waiting) > 1 and self._size > max(4_000_000, 2 * len(self._waiting[0][0])):
            self.merged()

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self._waiting) != 1:
            keys = np.concatenate([np.zeros(0, np.int64), *(keys for keys, _ in self._waiting)])
            counts = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in self._waiting)])
            distinct, place = np.unique(keys, return_inverse=True)
            summed = np.bincount(place, counts, len(distinct)).astype(np.int64)
            self._waiting, self._size = [(distinct, summed)], len(distinct)
        return self._waiting[0]


def em_weights(
    components: Float64[np.ndarray, "events parts"], counts: Int64[np.ndarray, " events"], rounds: int = 100
) -> tuple[Float64[np.ndarray, " parts"], list[float]]:
    """Mixture weights of the highest likelihood, by expectation maximization from equal ones.

    Each part is credited one event beforehand, so that none ends at 0 and a token never counted keeps a probability.

    Args:
        components: probability that each part gives each event.
        counts: how often each event came; without events the weights stay equal.
        rounds: at most so many; it ends when a round gains less than 1e-9 nats an event.

    Returns:
        The weights, and before each round the log likelihood, the credited events included, which never falls.
    """
    weights = np.full(components.shape[1], 1 / components.shape[1])
    history: list[float] = []
    total = counts.sum() + weights.size
    for _ in range(rounds):
        joint = components * weights
        mixed = joint.sum(axis=1)
        history.append(float(counts @ np.log(mixed) + np.log(weights).sum()))
        if len(history) > 1 and history[-1] - history[-2] < 1e-9 * total:
            break
        weights = ((counts / mixed) @ joint + 1) / total
    return weights, history


def full_train_counts(data: Data) -> BigramCounts:
    """Counts over the whole train split, each document once, as it is."""
    counts = BigramCounts(data.tokenizer)
    width = data.config.train.seq_len + 1
    order = np.random.default_rng(data.config.data.seed).permutation(data.train_ids)
    for window in itertools.batched(order.tolist(), data.config.data.pack_window):
        counts.add(plain_rows(data.tokenizer, data.corpus.texts(window), width))
    return counts


def consumed_counts(data: Data, rows: int) -> BigramCounts:
    """Counts over the first ``rows`` rows of the training stream: what a run of so many has seen, on all processes.

    At most one epoch is counted. Further ones repeat the same text: the held-out tenth would then be text that was
    counted too, the weights would trust pairs of tokens too much, and the baseline would be too easy to beat.
    """
    rows = min(rows, max(1, data.tokens_per_epoch_estimate // (data.config.train.seq_len + 1)))
    counts = BigramCounts(data.tokenizer)
    stream = data.train_rows()
    try:
        for start in range(0, rows, 4096):
            counts.add(stream.take(min(4096, rows - start)))
    finally:
        stream.close()
    return counts
