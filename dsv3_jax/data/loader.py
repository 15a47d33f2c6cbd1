"""A run's data from its configuration: tokenizer, documents, validation rows, and the stream of training rows."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.boundary import BoundarySplitter
from dsv3_jax.data.corpus import Corpus, choose, open_corpus, split
from dsv3_jax.data.fim import require_fim
from dsv3_jax.data.rows import RowMaker, plain_rows
from dsv3_jax.data.stream import RowStream, shard_dataset
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

_CHOOSE_TRAIN, _CHOOSE_TOKENIZER, _CHOOSE_VALIDATION, _CHOOSE_SAMPLE = 2, 3, 4, 5
_ORDER_VERSION = 1
"""To be raised by a change to this package that gives other rows for the same settings: old states are then refused."""
_SAMPLE_BYTES = 1 << 18
_MOST_BYTES_PER_TOKEN = 16
"""No text of length packs tighter than this with BPE: a split that holds so many bytes for each token of a batch needs
no counting."""


@dataclass(frozen=True)
class Data:
    """What a run reads. Made by :func:`prepare_data`."""

    config: Config
    tokenizer: Tokenizer
    corpus: Corpus
    train_ids: Int64[np.ndarray, " train"]
    """Documents of the train split, by their number in the corpus."""
    val_ids: Int64[np.ndarray, " val"]
    validation_rows: Int32[np.ndarray, "rows width"]
    """Packed rows of the validation split as it is, at most ``train.eval_sequences``; T + 1 tokens each."""
    bytes_per_token: float
    """Of a sample of the train split."""

    @property
    def train_documents(self) -> int:
        """Documents of the train split."""
        return len(self.train_ids)

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the train split."""
        return int(self.corpus.bytes[self.train_ids].sum())

    @property
    def tokens_per_epoch_estimate(self) -> int:
        """Tokens of the train split, by the sample's bytes per token."""
        return round(self.train_bytes / self.bytes_per_token)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides which rows come in which order."""
        config = self.config
        # As it was before there was a choice of cuts, so that runs from then go on.
        fim = config.data.fim_rate
        if fim and config.data.fim_cuts != "characters":
            fim = (fim, config.data.fim_cuts)
        parts = (
            _ORDER_VERSION, self.tokenizer.fingerprint, config.train.seed, config.train.seq_len, fim,
            config.data.split_rate, config.data.pack_window, config.data.shards,
        )  # fmt: skip
        documents = self.train_ids.tobytes() + self.corpus.digests[self.train_ids].tobytes()
        return hashlib.blake2b(documents + repr(parts).encode(), digest_size=8).hexdigest()

    @cached_property
    def row_maker(self) -> RowMaker:
        """Turns texts into training rows."""
        data = self.config.data
        splitter = BoundarySplitter(self.tokenizer)
        width = self.config.train.seq_len + 1
        seed = self.config.train.seed
        return RowMaker(self.tokenizer, splitter, width, data.fim_rate, data.split_rate, seed, data.fim_cuts)

    def train_rows(
        self, process_index: int = 0, process_count: int = 1, state: Mapping[str, Any] | None = None
    ) -> RowStream:
        """The endless stream of training rows, from its start or from where ``state`` left off.

        Raises:
            ConfigError: ``data.shards`` does not suit the processes or the documents, or ``state`` is of other data.
        """
        data, shards = self.config.data, self.config.data.shards
        if shards % process_count:
            raise ConfigError(f"data.shards = {shards} must be a multiple of the {process_count} processes")
        if shards > self.train_documents:
            raise ConfigError(f"data.shards = {shards} must be at most the {self.train_documents} train documents")
        owned = range(process_index, shards, process_count)
        row_tokens = self.config.train.seq_len + 1
        documents_ahead = min(data.pack_window, self.train_documents)
        window_tokens = documents_ahead * self.tokens_per_epoch_estimate / self.train_documents
        batches_tokens = data.prefetch * self.config.train.batch_size * row_tokens / shards
        ahead = max(1, data.workers // len(owned))
        windows_ahead = max(ahead, math.ceil(batches_tokens / window_tokens))
        datasets = {
            shard: shard_dataset(
                self.corpus,
                self.train_ids[shard::shards],
                self.row_maker,
                shard,
                data.pack_window,
                ahead if data.workers else 0,
                windows_ahead,
            )
            for shard in owned
        }
        return RowStream(datasets, shards, row_tokens, process_index, process_count, self.fingerprint, state)


def prepare_data(config: Config, out: Path | None = None, progress: Callable[[str], None] | None = None) -> Data:
    """Open the corpus, load or train the tokenizer, pack the validation rows.

    Args:
        config: the run.
        out: run folder; its tokenizer.json is used if it has one, else the tokenizer is saved there.
        progress: is told what is going on, one line at a time.

    Raises:
        ConfigError: what the user can mend: a missing or unreadable source, too little text, a tokenizer that does not
            suit the model, a disk that is full. One line.
    """
    say = progress or (lambda line: None)
    say(f"reading {config.data.source}")
    corpus = open_corpus(config.data)
    train_ids, val_ids = _splits(config, corpus)
    tokenizer = _tokenizer(config, out, corpus, train_ids, say)
    _check_tokenizer(config, tokenizer)
    sample = choose(corpus, train_ids, _SAMPLE_BYTES, config.data.seed, _CHOOSE_SAMPLE)
    sample_tokens = sum(ids.size for ids in tokenizer.documents(corpus.texts(sample)))
    data = Data(
        config=config,
        tokenizer=tokenizer,
        corpus=corpus,
        train_ids=train_ids,
        val_ids=val_ids,
        validation_rows=_validation_rows(config, corpus, val_ids, tokenizer),
        bytes_per_token=float(corpus.bytes[sample].sum()) / sample_tokens,
    )
    _check_enough(data)
    say(
        f"{data.train_documents} train documents of {data.train_bytes / 1e6:.1f} MB, about "
        f"{data.tokens_per_epoch_estimate / 1e6:.2f} M tokens; {len(val_ids)} validation documents; "
        f"{tokenizer.vocab_size} ids of {data.bytes_per_token:.2f} bytes on average"
    )
    return data


def _splits(config: Config, corpus: Corpus) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " val"]]:
    data = config.data
    train_ids, val_ids = split(corpus, data.val_fraction, data.seed)
    if config.train.eval_sequences and data.val_fraction and not len(val_ids):
        raise ConfigError(
            f"data.source = {data.source!r} holds one document, which leaves none for validation: give more, or set "
            "train.eval_sequences = 0"
        )
    if data.max_bytes:
        train_ids = np.sort(choose(corpus, train_ids, data.max_bytes, data.seed, _CHOOSE_TRAIN))
    return train_ids, val_ids


def _tokenizer(
    config: Config, out: Path | None, corpus: Corpus, train_ids: Int64[np.ndarray, " train"], say: Callable[[str], None]
) -> Tokenizer:
    kept = out / "tokenizer.json" if out is not None else None
    if kept is not None and kept.exists():
        return Tokenizer.load(kept)
    if config.data.tokenizer == "train":
        chosen = choose(corpus, train_ids, config.data.tokenizer_bytes, config.data.seed, _CHOOSE_TOKENIZER)
        size = corpus.bytes[chosen].sum() / 1e6
        say(f"training a tokenizer of {config.model.vocab_size} ids on {size:.1f} MB")
        tokenizer = train_tokenizer((corpus.text(int(document)) for document in chosen), config.model.vocab_size)
    else:
        try:
            tokenizer = Tokenizer.load(config.data.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"data.tokenizer: {error}") from error
    if kept is not None:
        tokenizer.save(kept)
    return tokenizer


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    model = config.model
    if config.data.fim_rate > 0:
        require_fim(tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} ids: raise it, "
            "or give another data.tokenizer"
        )
    for name, found in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if getattr(model, name) != found:
            raise ConfigError(f"model.{name} = {getattr(model, name)} must be {found}, as the tokenizer has it")


def _validation_rows(
    config: Config, corpus: Corpus, val_ids: Int64[np.ndarray, " val"], tokenizer: Tokenizer
) -> Int32[np.ndarray, "rows width"]:
    """Rows chosen by seed from a seeded choice of documents, more of them than needed so that many are heard."""
    wanted, width = config.train.eval_sequences, config.train.seq_len + 1
    if not wanted or not len(val_ids):
        return np.zeros((0, width), np.int32)
    seed = config.data.seed
    heard = choose(corpus, val_ids, 8 * _MOST_BYTES_PER_TOKEN * wanted * width, seed, _CHOOSE_VALIDATION)
    rows = plain_rows(tokenizer, corpus.texts(heard), width)
    chosen = np.random.default_rng([seed, _CHOOSE_VALIDATION]).permutation(len(rows))[:wanted]
    return rows[np.sort(chosen)]


def _check_enough(data: Data) -> None:
    """A split that makes fewer rows than a batch would show documents twice in one step."""
    batch, width = data.config.train.batch_size, data.config.train.seq_len + 1
    if data.train_bytes >= _MOST_BYTES_PER_TOKEN * batch * width:
        return
    rows = len(plain_rows(data.tokenizer, data.corpus.texts(data.train_ids), width))
    if rows < batch:
        raise ConfigError(
            f"train.batch_size = {batch} needs {batch} rows of {width} tokens, but the train split of data.source = "
            f"{data.config.data.source!r} makes {rows}: give more text, or lower train.batch_size or train.seq_len"
        )
