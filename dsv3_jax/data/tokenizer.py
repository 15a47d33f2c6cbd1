# ruff: noqa: RUF001  (the special tokens and the CJK ranges are spelled with these characters)
"""Byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens: given as a tokenizer.json, or trained."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tokenizers as hf
from jaxtyping import Int32

from dsv3_jax.config import ConfigError
from dsv3_jax.data.files import write_whole

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

SPECIAL_TOKENS = (
    BOS, EOS, PAD, "<think>", "</think>", FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip
"""V3's special tokens in V3's order (spec 9.3). A trained tokenizer gives them ids 0 to 19 whatever its vocabulary, so
that 0, 1 and 2 are BOS, EOS and pad as in V3; V3 itself has the rest behind its 128,000 BPE entries."""

SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
"""The three regular expressions that V3 splits text by before BPE (spec 9.3): digits by at most three, CJK runs, and
words, punctuation with the line breaks behind it, and white space."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, and back: character -> byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Text to ids and back, with the raw bytes that each id stands for.

    Text is text: ``encode`` never turns a special token's spelling inside a document into the special token, unless
    asked to with ``parse_special=True`` (prompts written in the chat template). No BOS or EOS is added.

    Attributes:
        vocab_size: one more than the largest id.
        specials: id of every special token by its string, placeholders included.
        bos_id, eos_id, pad_id: where the vocabulary has no pad (V2's, the LLM's), the first id behind it, an unused row
            of the embedding.
        fim_begin_id, fim_hole_id, fim_end_id: None where the vocabulary has no fill-in-the-middle.
        raw: bytes each id stands for; a special token's are its spelling.
        token_bytes: int32 [vocab_size], UTF-8 bytes each id stands for; 0 for special tokens.
        fingerprint: hash of the tokenizer's definition.
    """

    def __init__(self, definition: str, name: str = "tokenizer.json"):
        """From the text of a tokenizer.json.

        Raises:
            ConfigError: not JSON, not a byte-level BPE, or without V3's BOS and EOS strings; one line with ``name``.
        """
        try:
            tree = json.loads(definition)
            self._with_specials = hf.Tokenizer.from_str(definition)
            vocabulary = self._with_specials.get_vocab(with_added_tokens=True)
            self.specials = {item["content"]: int(item["id"]) for item in tree["added_tokens"]}
            self._plain = hf.Tokenizer.from_str(json.dumps(tree | {"added_tokens": []}))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ConfigError(f"{name} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        for token in (BOS, EOS):
            if token not in self.specials:
                raise ConfigError(f"{name} has no token {token}: a DeepSeek tokenizer is needed")
        self.definition = definition
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()[:16]
        self.bos_id, self.eos_id = self.specials[BOS], self.specials[EOS]
        self.pad_id = self.specials.setdefault(PAD, max(vocabulary.values()) + 1)
        self.fim_begin_id, self.fim_hole_id, self.fim_end_id = map(self.specials.get, (FIM_BEGIN, FIM_HOLE, FIM_END))
        self.vocab_size = max(max(vocabulary.values()), self.pad_id) + 1
        self.raw = self._raw_bytes(vocabulary, name)
        self.token_bytes = np.array([len(raw) for raw in self.raw], np.int32)
        for token, number in self.specials.items():
            self.raw[number] = token.encode()
        self._special_ids = frozenset(self.specials.values())

    def _raw_bytes(self, vocabulary: dict[str, int], name: str) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, number in vocabulary.items():
            if token not in self.specials:
                try:
                    table[number] = bytes(_BYTE_OF[character] for character in token)
                except KeyError as error:
                    raise ConfigError(f"{name} is not byte-level BPE: token {number} is {token!r}") from error
        return table

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder that holds one.

        Raises:
            ConfigError: there is no such file, or it is not a DeepSeek tokenizer.json.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            definition = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError(f"{file} does not exist: name a tokenizer.json, or 'train'") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as a tokenizer.json: {error}") from error
        return cls(definition, str(file))

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether every id stands for the same bytes in both."""
        return self.raw == other.raw and self.specials == other.specials

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json, whole or not at all.

        Raises:
            ConfigError: the file cannot be written.
        """
        write_whole(Path(path), self.definition)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text``; with ``parse_special`` the special tokens written in it count as such."""
        return self._encoder(parse_special).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Ids of each text, on all cores."""
        found = self._encoder(parse_special).encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in found]

    def _encoder(self, parse_special: bool) -> hf.Tokenizer:
        return self._with_specials if parse_special else self._plain

    def decode_bytes(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> bytes:
        """Raw bytes of ``ids``. Ids past ``vocab_size`` (rows that pad the embedding) stand for nothing."""
        left_out = self._special_ids if skip_special else frozenset()
        plain = ids.tolist() if isinstance(ids, np.ndarray) else [index(i) for i in ids]
        return b"".join(self.raw[i] for i in plain if i < self.vocab_size and i not in left_out)

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def pieces(self, text: str) -> list[str]:
        """What the pre-tokenizer cuts ``text`` into; no BPE merge crosses a cut."""
        splitter = self._plain.pre_tokenizer
        found = splitter.pre_tokenize_str(text) if splitter is not None else [(text, (0, len(text)))]
        return [text[start:stop] for _, (start, stop) in found]

    def documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """Ids of each text, closed by EOS. No BOS stands between documents: EOS is the only border that V3's papers
        name for packed pre-training text (spec 9.2), and BOS opens prompts (spec 9.4)."""
        end = [self.eos_id]
        return [np.array(ids + end, np.int32) for ids in self.encode_batch(texts)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, V3's special tokens among them; the same texts give the same one.

    Raises:
        ConfigError: ``vocab_size`` does not hold the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"model.vocab_size = {vocab_size} must be at least {SMALLEST_VOCABULARY}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated") for pattern in SPLITS]
    trained = hf.Tokenizer(hf.models.BPE())
    trained.pre_tokenizer = hf.pre_tokenizers.Sequence([*splits, byte_level])
    trained.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[hf.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(texts, trainer)
    return Tokenizer(trained.to_str())
