"""Tokens to text as they come: whole characters only, and nothing that may turn out to begin a stop text."""

import codecs
from collections.abc import Iterable

from dsv3_jax.data.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: what tokens stand for.
        stop: texts that end it and are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """Whether a stop text came."""

    def add(self, token: int) -> str:
        """What can be told with one more token, which is nothing once a stop text came."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        return self._tell()

    def end(self) -> str:
        """What was held back; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        told = self._tell()
        rest, self._held = self._held, ""
        return told + rest

    def _tell(self) -> str:
        places = [self._held.find(text) for text in self._stop]
        if found := [place for place in places if place >= 0]:
            self.stopped = True
            told, self._held = self._held[: min(found)], ""
            return told
        keep = max((_beginning(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        told, self._held = self._held[:cut], self._held[cut:]
        return told


def _beginning(held: str, stop: str) -> int:
    """Characters at the end of ``held`` that ``stop`` begins with."""
    return next((n for n in range(min(len(held), len(stop) - 1), 0, -1) if held.endswith(stop[:n])), 0)
