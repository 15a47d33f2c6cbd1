"""An array in chunks, and which of them a slice touches."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

type Index = tuple[slice | int, ...]
"""As in NumPy, without steps and negative numbers; missing entries at the end mean all."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What an array is, and how it is cut."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's file; chunks at the edge have as many."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def numbers(self, ranges: list[range]) -> Iterator[tuple[int, ...]]:
        """The chunks that a region touches, by their numbers along each dim."""
        spans = (
            range(r.start // size, -(-r.stop // size)) if r else range(0)
            for r, size in zip(ranges, self.chunks, strict=True)
        )
        return itertools.product(*spans)

    def region(self, number: tuple[int, ...], ranges: list[range]) -> list[tuple[int, int, int]]:
        """Along each dim, where that which a chunk and a region share begins and ends, and where the chunk begins."""
        return [
            (max(r.start, n * size), min(r.stop, (n + 1) * size), n * size)
            for n, r, size in zip(number, ranges, self.chunks, strict=True)
        ]

    def ranges(self, index: Index) -> list[range]:
        """The region that an index names.

        Raises:
            IndexError: it leaves the array, or has a step.
        """
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} indices for shape {self.shape}")
        found = []
        for size, part in zip(self.shape, (*index, *[slice(None)] * (len(self.shape) - len(index))), strict=True):
            if isinstance(part, slice):
                start, stop = part.start or 0, size if part.stop is None else part.stop
            else:
                start, stop = part, part + 1
            if not 0 <= start <= stop <= size or (isinstance(part, slice) and part.step not in (None, 1)):
                raise IndexError(f"index {index} does not fit shape {self.shape}")
            found.append(range(start, stop))
        return found


def file_name(number: tuple[int, ...]) -> str:
    """A chunk's file, as zarr 2 calls it."""
    return ".".join(map(str, number)) or "0"


def with_all_dims(array: np.ndarray, index: Index) -> np.ndarray:
    """A view of what a slice gives, in which the dims that the index names by number are back, of length 1."""
    return array[(*(slice(None) if isinstance(part, slice) else None for part in index), ...)]
