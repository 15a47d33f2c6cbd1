"""Text comes in whole characters and ends before a stop text, however its tokens are cut."""

import pytest

from dsv3_jax.inference.text import TextStream


def told(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    return pieces, stream.end(), stream


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "naïve 语言 🙂!"
    pieces, rest, _ = told(tokenizer, text)
    assert len(pieces) > len(text)
    assert "".join(pieces) + rest == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_marked(tokenizer):
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokenizer.encode("🙂")[:2])) == ""
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("return",), "def add(a, b):\n    "),
        (("nothing", ":"), "def add(a, b)"),
        (("b", "add"), "def "),
        (("b):\n    return a + b\n",), "def add(a, "),
    ],
)
def test_text_ends_before_the_first_stop_text(tokenizer, stop, expected):
    pieces, rest, stream = told(tokenizer, "def add(a, b):\n    return a + b\n", stop)
    assert "".join(pieces) + rest == expected
    assert stream.stopped


def test_the_beginning_of_a_stop_text_is_held_back_and_told_when_it_was_none(tokenizer):
    pieces, rest, stream = told(tokenizer, "xx-yy--", ("--z",))
    assert "".join(pieces) == "xx-yy"
    assert rest == "--"
    assert not stream.stopped


def test_nothing_is_told_behind_a_stop_text(tokenizer):
    stream = TextStream(tokenizer, ("a",))
    for token in tokenizer.encode("bab"):
        stream.add(token)
    assert stream.add(tokenizer.encode("c")[0]) == ""
    assert stream.end() == ""
