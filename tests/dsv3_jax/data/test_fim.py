import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data.boundary import BoundarySplitter
from dsv3_jax.data.fim import cut_in_three, psm
from dsv3_jax.data.rows import RowMaker


def _maker(tokenizer, rate: float, seed: int = 0, cuts="characters") -> RowMaker:
    return RowMaker(tokenizer, BoundarySplitter(tokenizer), 33, rate, 0.0, seed, cuts)


def _parts(tokenizer, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Prefix, suffix and middle by the positions of the FIM tokens, which must come once each and in order."""
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    assert ids[0] == tokenizer.fim_begin_id
    assert ids[-1] == tokenizer.eos_id
    assert hole < end
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]
    assert not {*prefix, *suffix, *middle} & set(tokenizer.specials.values())
    return prefix, suffix, middle


def test_about_a_tenth_of_documents_become_fim(tokenizer):
    documents = _maker(tokenizer, 0.1).documents(["some text"] * 4000, range(4000), epoch=0)
    share = np.mean([ids[0] == tokenizer.fim_begin_id for ids in documents])
    assert 0.085 < share < 0.115  # three standard deviations


@pytest.mark.parametrize("cuts", ["characters", "tokens"])
def test_order_is_begin_prefix_hole_suffix_end_middle_eos_and_the_parts_make_the_document(tokenizer, texts, cuts):
    texts = [*texts, "汉字かな🙂 é", "a", "\n"]
    documents = _maker(tokenizer, 1.0, cuts=cuts).documents(texts, range(len(texts)), epoch=0)
    for text, ids in zip(texts, documents, strict=True):
        prefix, suffix, middle = _parts(tokenizer, ids.tolist())
        assert tokenizer.decode([*prefix, *middle, *suffix]) == text
        if cuts == "tokens":
            assert [*prefix, *middle, *suffix] == tokenizer.encode(text)


def test_documents_without_fim_are_the_text_and_eos(tokenizer, texts):
    documents = _maker(tokenizer, 0.0).documents(texts, range(len(texts)), epoch=3)
    assert [ids.tolist() for ids in documents] == [ids.tolist() for ids in tokenizer.documents(texts)]


def test_cuts_are_uniform_over_character_borders():
    rng = np.random.default_rng(0)
    cuts = [cut_in_three("abcd", rng) for _ in range(6000)]
    borders = np.array([(len(prefix), len(prefix) + len(middle)) for prefix, middle, _ in cuts])
    counts = np.bincount(borders.ravel(), minlength=5) / borders.size
    np.testing.assert_allclose(counts, 0.2, atol=0.02)
    assert all("".join(parts) == "abcd" for parts in cuts)


def test_chance_depends_on_seed_epoch_and_document_and_replays(tokenizer):
    text, numbers = ["x = 1\n" * 20] * 50, range(50)
    drawn = _maker(tokenizer, 0.5).documents(text, numbers, epoch=0)
    same = _maker(tokenizer, 0.5).documents(text, numbers, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, same, strict=True))
    alone = _maker(tokenizer, 0.5).documents(text[:1], [7], epoch=0)
    assert np.array_equal(alone[0], drawn[7])
    for other in (
        _maker(tokenizer, 0.5).documents(text, numbers, epoch=1),
        _maker(tokenizer, 0.5, seed=1).documents(text, numbers, epoch=0),
    ):
        assert not all(np.array_equal(a, b) for a, b in zip(drawn, other, strict=True))


def test_psm_of_empty_parts_still_has_all_its_marks(tokenizer):
    assert psm(tokenizer, [], [], []).tolist() == [
        tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id, tokenizer.eos_id,
    ]  # fmt: skip


def test_fim_without_its_tokens_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "fim_hole_id", None)
    with pytest.raises(ConfigError, match=r"data\.fim_rate must be 0"):
        _maker(tokenizer, 0.1)
    _maker(tokenizer, 0.0)
