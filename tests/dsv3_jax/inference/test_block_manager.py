"""Pages are given out once, shared by what they hold, and never lost."""

import random

import pytest

from dsv3_jax.inference.block_manager import BlockManager


def fill(blocks, tokens, computed=None):
    """A sequence's pages, shared where possible, published up to ``computed``."""
    pages = blocks.share(tokens)
    assert blocks.extend(pages, blocks.pages_for(len(tokens)))
    blocks.publish(pages, tokens, len(tokens) - 1 if computed is None else computed)
    return pages


def test_page_0_is_nobodys_and_all_others_are_given_once():
    blocks = BlockManager(6, 4)
    pages = []
    assert blocks.extend(pages, 5)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert (blocks.free, blocks.held) == (0, 5)
    assert not blocks.extend(pages, 6)
    assert len(pages) == 5


def test_nothing_is_taken_where_not_all_is_there():
    blocks = BlockManager(4, 4)
    pages = []
    assert not blocks.extend(pages, 4)
    assert (pages, blocks.free) == ([], 3)


def test_what_is_common_is_shared_by_whole_pages_and_never_the_last_token():
    blocks = BlockManager(20, 4)
    first = fill(blocks, list(range(13)))
    assert blocks.share([*range(10), 99]) == first[:2]
    assert blocks.share(list(range(12))) == first[:2]  # the third page would hold its last token
    assert blocks.share([*range(12), 99]) == first[:3]
    assert blocks.share([7, *range(12)]) == []
    assert blocks.held == 4


def test_a_page_is_known_by_what_stands_before_it_too():
    blocks = BlockManager(20, 2)
    fill(blocks, [1, 2, 5, 6, 0])
    other = fill(blocks, [3, 4, 5, 6, 0])
    assert blocks.share([3, 4, 5, 6, 9]) == other[:2]
    assert blocks.share([5, 6, 9]) == []


def test_only_what_is_computed_is_shared():
    blocks = BlockManager(20, 4)
    pages = fill(blocks, list(range(13)), computed=7)
    assert blocks.share([*range(12), 99]) == pages[:1]


def test_publishing_goes_on_where_it_stopped():
    blocks = BlockManager(20, 2)
    tokens = list(range(9))
    pages = blocks.share(tokens)
    assert blocks.extend(pages, 5)
    at = (0, 0)
    for computed in range(1, 9):
        at = blocks.publish(pages, tokens, computed, at)
    assert blocks.share([*tokens, 99]) == pages[:4]


def test_with_lookahead_the_next_token_belongs_to_a_page():
    blocks = BlockManager(20, 4, lookahead=1)
    pages = fill(blocks, [*range(8), 50, 51])
    assert blocks.share([*range(8), 50, 60]) == pages[:2]
    assert blocks.share([*range(8), 77, 60]) == pages[:1]


def test_without_sharing_nothing_is_found():
    blocks = BlockManager(20, 4, sharing=False)
    fill(blocks, list(range(13)))
    assert blocks.share(list(range(13))) == []


def test_released_pages_are_found_again_until_their_memory_is_needed():
    blocks = BlockManager(5, 4)
    first = fill(blocks, list(range(9)))
    kept = list(first)
    blocks.release(first)
    assert (first, blocks.held) == ([], 0)
    again = blocks.share([*range(8), 1])
    assert again == kept[:2]
    blocks.release(again)
    taken = []
    assert blocks.extend(taken, 3)  # two were empty; of the others the end of the sequence goes first
    assert blocks.share([*range(8), 1]) == kept[:1]


def test_a_page_given_back_twice_is_noticed():
    blocks = BlockManager(5, 4)
    pages = fill(blocks, [1, 2, 3])
    twice = list(pages)
    blocks.release(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.release(twice)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_whatever_happens_shared_pages_hold_what_their_sequence_says(lookahead):
    """Random comings and goings against a memory that records what was written where."""
    rng = random.Random(lookahead)
    blocks = BlockManager(24, 3, lookahead=lookahead)
    memory, live = {}, []
    shared = 0
    for _ in range(600):
        if live and rng.random() < 0.45:
            blocks.release(live.pop(rng.randrange(len(live)))[0])
            continue
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 16))]
        pages = blocks.share(tokens)
        found = len(pages)
        shared += found
        if not blocks.extend(pages, blocks.pages_for(len(tokens))):
            blocks.release(pages)
            continue
        for index, page in enumerate(pages):
            content = tuple(tokens[: min((index + 1) * 3, len(tokens) - 1) + lookahead])
            if index < found:
                assert memory[page] == content
            memory[page] = content
        blocks.publish(pages, tokens, len(tokens) - 1)
        live.append((pages, tokens))
        holders = [page for pages, _ in live for page in pages]
        assert blocks.held == len(set(holders))
        assert blocks.free + blocks.held == 23
    assert shared > 100
    for pages, _ in live:
        blocks.release(pages)
    assert blocks.free == 23
