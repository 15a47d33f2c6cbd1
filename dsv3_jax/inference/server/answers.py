"""Response objects: what one request's choices add up to, or each piece of it as it comes."""

import dataclasses
import time
import uuid
from typing import Any

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import News
from dsv3_jax.inference.sequence import Logprob, Sequence
from dsv3_jax.inference.server.reasoning import ReasoningSplit


@dataclasses.dataclass
class Answer:
    """One request's response.

    Args:
        kind: chat or text completion.
        model: the name told.
        tokenizer: for tokens beside log-probabilities.
        sequences: a choice each.
        thinking: whether a chat's prompt opened a thought.
    """

    chat: bool
    model: str
    tokenizer: Tokenizer
    sequences: list[Sequence]
    thinking: bool = False
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._place = {sequence.number: place for place, sequence in enumerate(self.sequences)}
        count = len(self.sequences)
        self._splits = [ReasoningSplit(self.thinking) for _ in range(count)]
        self._begun = [False] * count
        self._text, self._thought = [""] * count, [""] * count
        self._offset = [0] * count

    def take(self, news: News) -> None:
        """Add it to what :meth:`whole` gives."""
        place = self._place[news.sequence.number]
        thought, text = self._split(place, news)
        self._thought[place] += thought
        self._text[place] += text

    def whole(self) -> dict[str, Any]:
        """The response when every choice is finished."""
        choices = []
        for place, sequence in enumerate(self.sequences):
            choice: dict[str, Any] = {"index": place, "finish_reason": sequence.finish}
            if self.chat:
                message: dict[str, Any] = {"role": "assistant", "content": self._text[place], "refusal": None}
                if self._thought[place]:
                    message["reasoning_content"] = self._thought[place]
                choice["message"] = message
            else:
                choice["text"] = self._text[place]
            choice["logprobs"] = self._logprobs(place, sequence, sequence.logprobs)
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage()}

    def chunk(self, news: News) -> list[dict[str, Any]]:
        """The pieces of a stream that it makes; none where nothing is to be told yet."""
        place = self._place[news.sequence.number]
        thought, text = self._split(place, news)
        logprobs = self._logprobs(place, news.sequence, news.logprobs)
        choice: dict[str, Any] = {"index": place, "logprobs": logprobs, "finish_reason": news.finish}
        if not (thought or text or logprobs or news.finish):
            return []
        if not self.chat:
            return [self._head("text_completion") | {"choices": [choice | {"text": text}]}]
        delta: dict[str, Any] = {} if self._begun[place] else {"role": "assistant", "content": ""}
        self._begun[place] = True
        if thought:
            delta["reasoning_content"] = thought
        if text:
            delta["content"] = text
        return [self._head("chat.completion.chunk") | {"choices": [choice | {"delta": delta}]}]

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece of a stream that was asked for its usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens read and written; a prompt of several choices counts once."""
        prompts = {tuple(sequence.prompt): sequence.shared for sequence in self.sequences}
        read, new = sum(map(len, prompts)), sum(len(sequence.new) for sequence in self.sequences)
        return {
            "prompt_tokens": read,
            "completion_tokens": new,
            "total_tokens": read + new,
            "prompt_tokens_details": {"cached_tokens": sum(prompts.values())},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.model}

    def _split(self, place: int, news: News) -> tuple[str, str]:
        if not self.chat:
            return "", news.text
        return self._splits[place].add(news.text, last=news.finish is not None)

    def _logprobs(self, place: int, sequence: Sequence, told: list[Logprob]) -> dict[str, Any] | None:
        if sequence.sampling.logprobs is None or (not told and not sequence.finish):
            return None
        if self.chat:
            content = [self._token(one.token, one.logprob) for one in told]
            for entry, one in zip(content, told, strict=True):
                entry["top_logprobs"] = [self._token(*pair) for pair in one.best]
            return {"content": content, "refusal": None}
        tokens = [self._spelled(one.token) for one in told]
        offsets = []
        for token in tokens:
            offsets.append(self._offset[place])
            self._offset[place] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [{self._spelled(token): value for token, value in one.best} for one in told],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}

    def _spelled(self, token: int) -> str:
        """A token as text; as bytes where it is no whole character, so that two of them stay two."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
