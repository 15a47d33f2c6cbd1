import unicodedata

import numpy as np
import pytest

from dsv3_jax.data.boundary import BoundarySplitter, cut_joined

TEXT = "if x:\n    f(y);\n\n} // z\n\n.\n" * 50


@pytest.fixture(scope="module")
def splitter(tokenizer):
    return BoundarySplitter(tokenizer)


def test_only_tokens_joining_punctuation_and_line_breaks_are_known(tokenizer, splitter):
    assert len(splitter.parts) > 3
    for index, parts in splitter.parts.items():
        text = tokenizer.decode([index])
        marks = text.rstrip("\r\n").removeprefix(" ")
        assert marks
        assert text[-1] in "\r\n"
        assert all(unicodedata.category(mark)[0] in "PS" for mark in marks)
        assert tokenizer.decode(parts) == text
    joined = {tokenizer.decode([index]) for index in splitter.parts}
    assert not joined & {"\n", "\n\n", "    ", ":", "x\n"}
    assert ":\n" in joined


@pytest.mark.parametrize(
    ("token", "parts"),
    [
        (b"):\n", ("):", "\n")),
        (b" };\r\n\n", (" };", "\r\n\n")),
        ("。\n".encode(), ("。", "\n")),
        (b"x\n", None),
        (b".x\n", None),
        (b"  .\n", None),
        (b"\n\n", None),
        (b" \n", None),
        (b"):", None),
        (b"\n.", None),
        (b"\xe3\x80\n", None),
    ],
)
def test_a_joined_token_is_cut_between_its_marks_and_its_line_breaks(token, parts):
    assert cut_joined(token) == parts


def test_parts_are_the_two_halves_encoded_anew(tokenizer, splitter):
    (index,) = tokenizer.encode(":\n")
    assert splitter.parts[index] == tokenizer.encode(":") + tokenizer.encode("\n")


def test_rate_0_changes_nothing_and_rate_1_leaves_none(tokenizer, splitter):
    ids = np.array(tokenizer.encode(TEXT), np.int32)
    rng = np.random.default_rng(0)
    assert np.array_equal(splitter.split(ids, 0.0, rng), ids)
    split = splitter.split(ids, 1.0, rng)
    assert np.isin(ids, list(splitter.parts)).sum() >= 100
    assert not np.isin(split, list(splitter.parts)).any()
    assert tokenizer.decode(split) == TEXT


def test_the_rate_is_the_share_that_is_split_and_the_seed_decides_which(tokenizer, splitter):
    ids = np.array(tokenizer.encode(TEXT * 20), np.int32)
    joined = np.isin(ids, list(splitter.parts)).sum()
    split = splitter.split(ids, 0.1, np.random.default_rng(0))
    left = np.isin(split, list(splitter.parts)).sum()
    assert 0.08 < 1 - left / joined < 0.12
    assert tokenizer.decode(split) == TEXT * 20
    assert np.array_equal(split, splitter.split(ids, 0.1, np.random.default_rng(0)))
    assert not np.array_equal(split, splitter.split(ids, 0.1, np.random.default_rng(1)))


def test_special_tokens_and_empty_documents_pass_through(tokenizer, splitter):
    ids = np.array([tokenizer.eos_id, tokenizer.fim_begin_id], np.int32)
    rng = np.random.default_rng(0)
    assert np.array_equal(splitter.split(ids, 1.0, rng), ids)
    assert splitter.split(ids[:0], 1.0, rng).size == 0
