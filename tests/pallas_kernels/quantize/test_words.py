"""Layouts whose registers are taken apart and joined by hand."""

import numpy as np
import pytest

from pallas_kernels.quantize import words
from pallas_kernels.quantize.pallas_sm90 import COLUMNS, LAYOUT_OF_CODES, ROWS

SHAPE = (128, 128)


def numbers_of_threads(layout):
    """``[rows of a thread, threads, numbers]``: which of an array's numbers registers hold, row by row."""
    tiled = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for tile in layout.tiling.tiles:
        lead = tiled.ndim - len(tile)
        cut = [part for size, of in zip(tiled.shape[lead:], tile, strict=True) for part in (size // of, of)]
        order = [*range(lead), *range(lead, lead + len(cut), 2), *range(lead + 1, lead + len(cut), 2)]
        tiled = tiled.reshape(*tiled.shape[:lead], *cut).transpose(order)
    thread_dims = [dim + tiled.ndim for dim in (*layout.warp_dims, *layout.lane_dims)]
    threads_first = np.moveaxis(tiled, thread_dims, range(len(thread_dims)))
    of_threads = threads_first.reshape(128, *threads_first.shape[len(thread_dims) :])
    of_threads = np.expand_dims(of_threads, tuple(dim + 1 for dim in thread_dims))
    registers = np.moveaxis(of_threads, [0, layout.vector_dim], [-2, -1])
    vector_dim = layout.vector_dim + tiled.ndim
    rows = words._row_indices(layout, layout.registers_shape(SHAPE))
    at = [[index[:vector_dim] + index[vector_dim + 1 :] for index in row] for row in rows]
    return np.array([np.concatenate([registers[index] for index in row], axis=-1) for row in at])


@pytest.mark.parametrize("layout", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_codes_are_in_the_threads_and_the_order_of_their_numbers(layout):
    of_numbers, of_codes = (numbers_of_threads(each.to_mgpu()) for each in (layout, LAYOUT_OF_CODES[layout]))
    np.testing.assert_array_equal(of_numbers, of_codes)
    assert sorted(of_codes.ravel()) == list(range(128 * 128))
    assert (of_codes // 128 == of_codes[:, :, :1] // 128).all(), "a row's registers hold numbers of one row"


@pytest.mark.parametrize("layout", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_lanes_that_share_a_row_are_those_that_exchange(layout):
    layout = layout.to_mgpu()
    first = numbers_of_threads(layout)[0, :32, 0] // 128
    of_row = set(np.nonzero(first == first[0])[0])
    reached = {0}
    for distance in words._distances(layout):
        reached |= {lane ^ distance for lane in reached}
    assert reached == of_row
