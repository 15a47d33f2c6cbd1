"""A conversation as the ids that the chat template makes of it, content never taken for markers (spec 9.4).

What a user writes is encoded as plain text: a special token spelled in it stays text. Rendering the template and
parsing the whole would let a message end its own turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer

THINK, END_THINK = "<think>", "</think>"
_ROLES = ("system", "user", "assistant", "tool")
_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
_CALL, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"  # noqa: RUF001
_OUTPUTS, _OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"  # noqa: RUF001
_OUTPUT, _OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"  # noqa: RUF001
_MARKERS = frozenset({BOS, EOS, USER, ASSISTANT, THINK, _CALLS, _CALLS_END, _CALL, _CALL_END, _SEP}) | {
    _OUTPUTS,
    _OUTPUTS_END,
    _OUTPUT,
    _OUTPUT_END,
}


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, thinking: bool = False) -> list[int]:
    """Ids of a conversation up to where the assistant answers.

    Args:
        tokenizer: of the model.
        messages: ``role`` (system, user, assistant, tool) and ``content``; an assistant's may have ``tool_calls``.
        thinking: open the answer with ``<think>`` and a line break, as R1's template does.

    Raises:
        ConfigError: no message, an unknown role, content that is no text, or a marker that the tokenizer has not.
    """
    _check(messages)
    ids: list[int] = []
    text = ""
    for piece, is_marker in _pieces(messages, thinking):
        if not is_marker:
            text += piece
            continue
        if text:
            ids += tokenizer.encode(text)
            text = ""
        if piece not in tokenizer.specials:
            raise ConfigError(f"the tokenizer has no token {piece}, which the chat template needs")
        ids.append(tokenizer.specials[piece])
    return ids + (tokenizer.encode(text) if text else [])


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ConfigError("messages is empty: give at least one with role and content")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise ConfigError(f"messages[{number}].role = {role!r} must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str) and not (role == "assistant" and content is None):
            raise ConfigError(f"messages[{number}].content must be text, not {type(content).__name__}")


def _pieces(messages: Sequence[Mapping[str, Any]], thinking: bool) -> Iterator[tuple[str, bool]]:
    """The template's output in pieces, and whether each is a marker."""

    def mark(*texts: str) -> Iterator[tuple[str, bool]]:
        return ((text, text in _MARKERS) for text in texts if text)

    yield BOS, True
    yield "\n\n".join(message["content"] for message in messages if message["role"] == "system"), False
    before = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "user":
            yield USER, True
            yield content, False
        elif role == "assistant":
            if before != "tool":
                yield ASSISTANT, True
            yield content.split(END_THINK)[-1], False
            if calls := message.get("tool_calls"):
                yield _CALLS, True
                for place, call in enumerate(calls):
                    yield from mark("\n" if place else "", _CALL, "function", _SEP)
                    yield _call_text(call["function"]), False
                    yield _CALL_END, True
                yield _CALLS_END, True
            yield EOS, True
        elif role == "tool":
            yield from mark("" if before == "tool" else _OUTPUTS, _OUTPUT)
            yield content, False
            last = number + 1 == len(messages) or messages[number + 1]["role"] != "tool"
            yield from mark(_OUTPUT_END, _OUTPUTS_END if last else "")
        before = role
    if before != "tool":
        yield ASSISTANT, True
        if thinking:
            yield THINK, True
            yield "\n", False


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function['name']}\n```json\n{text}\n```"
