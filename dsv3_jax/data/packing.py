"""Best-fit-decreasing packing of documents into rows (spec 9.1, 27.11; Ding et al. 2024, "fewer truncations")."""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which pieces share a bin: each piece, longest first, goes to the fullest bin that still has room for it.

    Args:
        lengths: of the pieces, each at most ``capacity``.
        capacity: of a bin.

    Returns:
        For each bin, in the order of opening, the positions in ``lengths`` of its pieces, in the order of filling.

    Raises:
        ValueError: a piece is longer than a bin.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []
    with_space: dict[int, list[int]] = {}
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        if length > capacity:
            raise ValueError(f"a piece of {length} does not fit in a bin of {capacity}")
        place = bisect.bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            chosen = with_space[space].pop(0)
            if not with_space[space]:
                del with_space[space], spaces[place]
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(piece)
        left = space - length
        if left:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(chosen)
    return bins


def pack(documents: Sequence[Int32[np.ndarray, " _"]], width: int, pad_id: int) -> Int32[np.ndarray, "rows {width}"]:
    """Documents as rows of ``width`` tokens.

    A document longer than a row is cut into rows and a shorter rest; rests and short documents are never cut, and
    share rows by best fit. No mask keeps documents of a row apart (V3 pre-trains without one). Places that stay empty,
    at the end of a row, hold ``pad_id``.
    """
    full, rests = [], []
    for ids in documents:
        whole = ids.size // width * width
        if whole:
            full.append(ids[:whole].reshape(-1, width))
        if ids.size > whole:
            rests.append(ids[whole:])
    shared = best_fit_decreasing([rest.size for rest in rests], width)
    rows = np.full((len(shared), width), pad_id, np.int32)
    for row, members in zip(rows, shared, strict=True):
        ids = np.concatenate([rests[i] for i in members])
        row[: ids.size] = ids
    return np.concatenate([*full, rows])
