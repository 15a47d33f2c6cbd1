"""Documents of a source, indexed once, read again one at a time; and their seeded split into train and validation."""

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.python_docs import python_readers
from dsv3_jax.data.readers import Reader, find_readers


class Corpus:
    """An index of documents. Texts stay on disk; a document costs about 40 bytes of memory.

    Opening reads everything once, so that what cannot be read is found before training starts. Blank documents, and
    all but the first of documents with the same text, are left out.

    Attributes:
        bytes: int64 [documents], size as UTF-8.
        digests: uint64 [documents], hash of the text.
    """

    def __init__(self, readers: Sequence[Reader], source: str):
        """Index what ``readers`` hold; ``source`` is for messages.

        Raises:
            ConfigError: a file cannot be read, or there is no text at all.
        """
        self.source = source
        self._readers = list(readers)
        places, sizes, digests = array("q"), array("q"), array("Q")
        for number, reader in enumerate(self._readers):
            for start, length, text in reader.scan():
                if text and not text.isspace():
                    raw = text.encode()
                    places.extend((number, start, length))
                    sizes.append(len(raw))
                    digests.append(_digest(raw))
        if not sizes:
            raise ConfigError(f"data.source = {source!r} holds no text: every document is empty")
        _, first = np.unique(np.array(digests, np.uint64), return_index=True)
        kept = np.sort(first)
        self._places = np.array(places, np.int64).reshape(-1, 3)[kept]
        self.bytes: Int64[np.ndarray, " documents"] = np.array(sizes, np.int64)[kept]
        self.digests: UInt64[np.ndarray, " documents"] = np.array(digests, np.uint64)[kept]

    def __len__(self) -> int:
        return len(self.bytes)

    def name(self, document: int) -> str:
        """File that holds a document."""
        return self._readers[self._places[document, 0]].name

    def text(self, document: int) -> str:
        """Text of a document, read again.

        Raises:
            ConfigError: the file is not what it was when the corpus was opened.
        """
        number, start, length = (int(value) for value in self._places[document])
        text = self._readers[number].read(start, length)
        if _digest(text.encode()) != self.digests[document]:
            raise ConfigError(f"{self.name(document)} changed while the run was reading it: put it back and resume")
        return text

    def texts(self, documents: Sequence[int] | Int64[np.ndarray, " _"]) -> list[str]:
        """Texts of several documents."""
        return [self.text(int(document)) for document in documents]


def open_corpus(config: DataConfig) -> Corpus:
    """The documents that ``data.source`` names.

    Raises:
        ConfigError: a missing, unreadable or empty source; one line with the file, and the line or record.
    """
    if config.source == "python":
        return Corpus(python_readers(), config.source)
    return Corpus(find_readers(config.source, config.text_field), config.source)


def split(
    corpus: Corpus, val_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " val"]]:
    """Documents of the train and of the validation split.

    A document's text and the seed alone decide, so a document stays where it is when others come or go; but of two or
    more documents each split has at least one, unless ``val_fraction`` is 0.
    """
    keys = _keys(corpus.digests, seed, purpose=1)
    held_out = keys < np.uint64(int(val_fraction * 2.0**64))
    if val_fraction > 0 and len(corpus) > 1:
        held_out[np.argmin(keys)] = True
        held_out[np.argmax(keys)] = False
    elif len(corpus) == 1:
        held_out[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def choose(
    corpus: Corpus, documents: Int64[np.ndarray, " _"], max_bytes: int, seed: int, purpose: int
) -> Int64[np.ndarray, " chosen"]:
    """Documents in a seeded order, as many as hold ``max_bytes`` (the one that crosses it included); 0 takes all."""
    order = documents[np.argsort(_keys(corpus.digests[documents], seed, purpose), kind="stable")]
    if max_bytes <= 0:
        return order
    before = np.cumsum(corpus.bytes[order]) - corpus.bytes[order]
    return order[before < max_bytes]


def _digest(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _keys(digests: UInt64[np.ndarray, " _"], seed: int, purpose: int) -> UInt64[np.ndarray, " _"]:
    """A 64-bit hash of every digest, independent for every seed and purpose (two rounds of splitmix64)."""
    start = int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "little")
    keys = digests ^ np.uint64(start)
    for _ in range(2):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys
