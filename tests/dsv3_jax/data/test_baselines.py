import gzip
import itertools
import math

import numpy as np
import pytest

from dsv3_jax.data.baselines import (
    BigramCounts,
    consumed_counts,
    em_weights,
    full_train_counts,
    gzip_bits_per_byte,
    predicted_bytes,
)


def _byte_ids(tokenizer, count: int) -> np.ndarray:
    """Ids that stand for one byte each."""
    return np.flatnonzero(tokenizer.token_bytes == 1)[:count].astype(np.int32)


def _chain(tokenizer, rows: int, width: int, seed: int) -> tuple[np.ndarray, float]:
    """Rows of a Markov chain over eight tokens of a byte each, and its entropy rate in bits."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(8, 0.3), size=8)
    stationary = np.linalg.matrix_power(transition, 200)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.nansum(stationary[:, None] * transition * np.log2(transition))
    rng = np.random.default_rng(seed)
    states = np.empty((rows, width), np.int64)
    states[:, 0] = rng.choice(8, rows, p=stationary)
    bounds = np.cumsum(transition, axis=1)
    for t in range(1, width):
        states[:, t] = np.minimum((rng.random(rows)[:, None] > bounds[states[:, t - 1]]).sum(axis=1), 7)
    return _byte_ids(tokenizer, 8)[states], float(bits)


def test_the_bigram_model_reaches_the_entropy_of_a_markov_chain(tokenizer):
    train, entropy = _chain(tokenizer, 2000, 65, seed=1)
    val, _ = _chain(tokenizer, 2000, 65, seed=2)
    counts = BigramCounts(tokenizer)
    for part in np.array_split(train, 7):
        counts.add(part)
    assert entropy > 1
    assert counts.bits_per_byte(val, tokenizer) == pytest.approx(entropy, rel=0.01)


def test_the_bigram_model_equals_a_sum_over_tokens_written_out(tokenizer):
    rng = np.random.default_rng(3)
    ids = np.array([*_byte_ids(tokenizer, 5), tokenizer.eos_id, 300], np.int32)
    train, val = ids[rng.integers(0, 7, (40, 9))], ids[rng.integers(0, 7, (5, 9))]
    train[3, 6:] = val[1, 4:] = tokenizer.pad_id
    val[0, 2] = 400  # a context and a token never seen
    pairs = [(int(a), int(b), r % 10 == 0) for r, row in enumerate(train) for a, b in itertools.pairwise(row)]
    pairs = [pair for pair in pairs if pair[1] != tokenizer.pad_id]

    def components(before: int, after: int, seen: list[tuple[int, int]]) -> np.ndarray:
        unigram = sum(b == after for _, b in seen) / len(seen)
        context = sum(a == before for a, _ in seen)
        bigram = sum(pair == (before, after) for pair in seen) / context if context else unigram
        return np.array([1 / tokenizer.vocab_size, unigram, bigram])

    kept = [(a, b) for a, b, held in pairs if not held]
    events = np.array([components(a, b, kept) for a, b, held in pairs if held])
    weights = np.full(3, 1 / 3)
    for _ in range(3000):
        joint = events * weights
        weights = ((joint / joint.sum(axis=1, keepdims=True)).sum(axis=0) + 1) / (len(events) + 3)
    everything = [(a, b) for a, b, _ in pairs]
    bits, size = 0.0, 0
    for row in val:
        for before, after in itertools.pairwise(row.tolist()):
            if after != tokenizer.pad_id:
                bits -= math.log2(components(before, after, everything) @ weights)
                size += len(tokenizer.decode_bytes([after], skip_special=True))
    counts = BigramCounts(tokenizer)
    counts.add(train)
    assert counts.tokens == len(pairs)
    assert counts.bits_per_byte(val, tokenizer) == pytest.approx(bits / size, rel=1e-3)


def test_rows_may_come_in_any_portions(tokenizer):
    train, _ = _chain(tokenizer, 101, 33, seed=4)
    val, _ = _chain(tokenizer, 20, 33, seed=5)
    found = []
    for sizes in ([101], [1] * 101, [3, 98]):
        counts, start = BigramCounts(tokenizer), 0
        for size in sizes:
            counts.add(train[start : start + size])
            start += size
        found.append(counts.bits_per_byte(val, tokenizer))
    assert found[0] == found[1] == found[2]


def test_pad_changes_nothing(tokenizer):
    train, _ = _chain(tokenizer, 200, 33, seed=6)
    val, _ = _chain(tokenizer, 20, 33, seed=7)
    padded = [np.pad(rows, ((0, 0), (0, 5)), constant_values=tokenizer.pad_id) for rows in (train, val)]
    plain, wide = BigramCounts(tokenizer), BigramCounts(tokenizer)
    plain.add(train)
    wide.add(padded[0])
    assert plain.bits_per_byte(val, tokenizer) == wide.bits_per_byte(padded[1], tokenizer)
    assert gzip_bits_per_byte(val, tokenizer) == gzip_bits_per_byte(padded[1], tokenizer)
    assert predicted_bytes(padded[1], tokenizer) == predicted_bytes(val, tokenizer) == 20 * 32


def test_nothing_counted_is_the_uniform_distribution(tokenizer):
    val, _ = _chain(tokenizer, 20, 33, seed=7)
    assert BigramCounts(tokenizer).bits_per_byte(val, tokenizer) == pytest.approx(math.log2(tokenizer.vocab_size))
    one = BigramCounts(tokenizer)
    one.add(val[:1])
    assert math.isfinite(one.bits_per_byte(val, tokenizer))


def test_em_never_lowers_the_likelihood_and_finds_the_mixture():
    rng = np.random.default_rng(0)
    components = rng.dirichlet(np.ones(50), size=3).T
    truth = np.array([0.1, 0.3, 0.6])
    counts = rng.multinomial(200_000, components @ truth)
    weights, history = em_weights(components, counts.astype(np.int64), rounds=500)
    assert len(history) > 5
    assert np.all(np.diff(history) >= -1e-6)
    np.testing.assert_allclose(weights, truth, atol=0.03)
    assert weights.sum() == pytest.approx(1)


def test_em_keeps_every_part_alive():
    components = np.array([[0.5, 1e-6]] * 10)
    weights, history = em_weights(components, np.full(10, 100, np.int64))
    np.testing.assert_allclose(weights, [1001 / 1002, 1 / 1002], rtol=1e-4)
    assert np.all(np.diff(history) >= -1e-9)


def test_gzip_is_that_of_the_predicted_text(tokenizer):
    text = "the quick brown fox\n" * 30
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    rows = np.array([ids], np.int32)
    expected = 8 * len(gzip.compress(text.encode(), 9)) / len(text.encode())
    assert gzip_bits_per_byte(rows, tokenizer) == expected


def test_full_counts_see_every_train_token_once_and_consumed_counts_follow_the_stream(data):
    exact = sum(ids.size for ids in data.tokenizer.documents(data.corpus.texts(data.train_ids)))
    full = full_train_counts(data)
    assert 0.9 * exact < full.tokens < exact  # the first token of a row is not predicted
    stream = data.train_rows()
    rows = stream.take(500)
    stream.close()
    by_hand = BigramCounts(data.tokenizer)
    by_hand.add(rows)
    consumed = consumed_counts(data, 500)
    assert consumed.tokens == by_hand.tokens
    val = data.validation_rows
    assert consumed.bits_per_byte(val, data.tokenizer) == by_hand.bits_per_byte(val, data.tokenizer)
    assert 1 < full.bits_per_byte(val, data.tokenizer) < 6
