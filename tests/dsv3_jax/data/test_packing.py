import numpy as np
import pytest

from dsv3_jax.data.packing import best_fit_decreasing, pack

PAD = -1


def _documents(seed: int, count: int, longest: int) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that each can be found again."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    starts = np.cumsum(lengths) - lengths
    return [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths, strict=True)]


def _naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """Spec 27.11 word for word."""
    bins: list[list[int]] = []
    space: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if space[b] >= lengths[piece]]
        if fitting:
            chosen = min(fitting, key=lambda b: space[b])
        else:
            chosen = len(bins)
            bins.append([])
            space.append(capacity)
        bins[chosen].append(piece)
        space[chosen] -= lengths[piece]
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_bins_are_as_full_as_those_of_the_specification(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 200).tolist()
    found, wanted = best_fit_decreasing(lengths, 32), _naive(lengths, 32)
    assert sorted(i for members in found for i in members) == list(range(200))
    assert sorted(sum(lengths[i] for i in b) for b in found) == sorted(sum(lengths[i] for i in b) for b in wanted)
    assert all(sum(lengths[i] for i in members) <= 32 for members in found)


def test_a_known_packing():
    assert best_fit_decreasing([5, 3, 7, 2, 2, 9], 10) == [[5], [2, 1], [0, 3, 4]]


def test_a_piece_longer_than_a_bin_is_an_error():
    with pytest.raises(ValueError, match="11 does not fit in a bin of 10"):
        best_fit_decreasing([11], 10)


@pytest.mark.parametrize(("longest", "width"), [(20, 33), (200, 33), (34, 33), (5, 2)])
def test_tokens_are_preserved_and_no_piece_that_fits_is_cut(longest, width):
    documents = _documents(longest, 150, longest)
    rows = pack(documents, width, PAD)
    assert rows.shape[1] == width
    kept = rows[rows != PAD]
    assert np.array_equal(np.sort(kept), np.concatenate(documents))
    place = {int(token): (r, c) for r, row in enumerate(rows) for c, token in enumerate(row) if token != PAD}
    for ids in documents:
        for start in range(0, ids.size, width):
            piece = ids[start : start + width]
            row, column = place[int(piece[0])]
            assert np.array_equal(rows[row, column : column + piece.size], piece)


def test_pad_fills_only_the_ends_of_rows_and_best_fit_leaves_little():
    rows = pack(_documents(0, 400, 60), 33, PAD)
    pads = rows == PAD
    assert np.array_equal(np.sort(pads, axis=1), pads)
    assert pads.mean() < 0.01
    alone = -(-np.array([ids.size for ids in _documents(0, 400, 60)]) // 33)
    assert len(rows) < 0.7 * alone.sum()


def test_a_document_that_fills_rows_exactly_needs_no_more():
    document = np.arange(66, dtype=np.int32)
    assert np.array_equal(pack([document], 33, PAD), document.reshape(2, 33))


def test_the_same_documents_give_the_same_rows():
    documents = _documents(3, 100, 50)
    assert np.array_equal(pack(documents, 33, PAD), pack(documents, 33, PAD))
