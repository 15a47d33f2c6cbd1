"""Weights from a source to a sink by row slices: bounded memory, several threads, and a journal to go on from."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from dsv3_jax.interop.block_fp8 import E4M3, dequantize, quantize
from dsv3_jax.interop.names import BLOCK, Tensor
from dsv3_jax.interop.sink import CHUNK_ELEMENTS, ArraySink, Sink
from dsv3_jax.interop.source import Source
from dsv3_jax.interop.tensor_io import WeightsError

_BYTES_ON_THE_WAY = 12
"""What one element of a slice needs at most: as read, in float32, as written, and once more turned."""

Progress = Callable[[int, int], None]
"""Bytes of the source done, and of all."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rows of a tensor that travel together."""

    tensor: Tensor
    start: int
    stop: int
    nbytes: int
    """Bytes in the source."""


def slices_at_a_time(buffer_bytes: int, threads: int) -> int:
    """How many slices may be on their way: ``threads``, or as many as the buffer holds, and one at least."""
    return max(1, min(threads, buffer_bytes // (CHUNK_ELEMENTS * _BYTES_ON_THE_WAY)))


def plan_units(
    tensors: Sequence[Tensor], source: Source, *, chunk_rows: Mapping[str, int], whole_chunks: bool
) -> list[Unit]:
    """Cut tensors into slices of at most ``CHUNK_ELEMENTS`` numbers, and at least one block of rows.

    Args:
        tensors: in the order in which they are read.
        source: names the types.
        chunk_rows: rows that our arrays hold in one chunk, by leaf, where one side is a checkpoint of ours.
        whole_chunks: slices must be whole chunks; otherwise they are so only where chunks are whole blocks.
    """
    units = []
    for tensor in tensors:
        rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
        limit = max(1, CHUNK_ELEMENTS // width)
        step = max(BLOCK, limit // BLOCK * BLOCK)
        chunk = chunk_rows.get(tensor.leaf, step)
        if whole_chunks or (chunk <= limit and chunk % BLOCK == 0):
            step = chunk * max(1, limit // chunk)
        size = source.dtype(tensor).itemsize * width
        units += [
            Unit(tensor, start, min(start + step, rows), (min(start + step, rows) - start) * size)
            for start in range(0, rows, step)
        ]
    return units


def cast(
    rows: np.ndarray, scales: np.ndarray | None, want: np.dtype, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows in another type: bit for bit where it is the same, through float32 to and from FP8.

    Raises:
        WeightsError: a value that FP8 cannot hold.
    """
    if rows.dtype == want:
        return rows, scales
    if rows.dtype == E4M3:
        assert scales is not None
        return dequantize(rows, scales, want), None
    if want != E4M3:
        return rows.astype(want), None
    try:
        return quantize(rows)
    except ValueError as error:
        raise WeightsError(f"{name} cannot be written in FP8: {error}") from error


class Journal:
    """What is done, one line a slice, so that a killed conversion goes on from there.

    Line k: number of the slice, checksum of its values in the sink's type.
    """

    def __init__(self, file: Path):
        self.done: dict[int, int] = {}
        if file.exists():
            *whole, _ = file.read_text(encoding="ascii").split("\n")
            self.done = {int(number): int(check) for number, check in (line.split() for line in whole)}
        self._stream = file.open("a", encoding="ascii")
        self._stream.truncate(0)
        for number, check in self.done.items():
            self.add(number, check)

    def add(self, number: int, check: int) -> None:
        """Slice ``number`` is written."""
        self.done[number] = check
        self._stream.write(f"{number} {check}\n")
        self._stream.flush()

    def close(self) -> None:
        """Stop writing."""
        self._stream.close()


def transfer(
    units: Sequence[Unit], source: Source, sink: Sink, journal: Journal, *, threads: int, progress: Progress
) -> None:
    """Bring every slice that the journal does not name to the sink.

    Raises:
        WeightsError: a slice cannot be read or written, or a copy differs from what it is a copy of.
    """
    originals = {unit.tensor.leaf: unit.tensor for unit in units if not unit.tensor.copy}

    def move(unit: Unit) -> int:
        if _only_compared(unit, sink):
            _compare_copy(unit, originals[unit.tensor.leaf], source)
            return 0
        rows, scales = _converted(unit, source, sink)
        sink.write(unit.tensor, unit.start, rows, scales)
        return _checksum(rows)

    total = sum(unit.nbytes for unit in units)
    moved = sum(units[number].nbytes for number in journal.done)
    progress(moved, total)
    for number in journal.done:
        if not _only_compared(units[number], sink):
            sink.assume(units[number].tensor, units[number].start, units[number].stop)
    left = [number for number in range(len(units)) if number not in journal.done]
    for number, check in _in_parallel(lambda number: move(units[number]), left, threads):
        journal.add(number, check)
        moved += units[number].nbytes
        progress(moved, total)


def compare(
    units: Sequence[Unit], source: Source, sink: Sink, written: Source, *, threads: int, progress: Progress
) -> None:
    """Read every tensor back and compare it with what it should be, bit for bit.

    Raises:
        WeightsError: tensors differ; names all of them.
    """

    def same(unit: Unit) -> bool:
        rows, scales = _converted(unit, source, sink)
        good = _equal(rows, written.rows(unit.tensor, unit.start, unit.stop))
        if scales is not None:
            good = good and _equal(scales, written.scales(unit.tensor, unit.start, unit.stop))
        return good

    mine = [unit for unit in units if not _only_compared(unit, sink)]
    total, done, bad = sum(unit.nbytes for unit in mine), 0, {}
    progress(0, total)
    for number, good in _in_parallel(lambda number: same(mine[number]), range(len(mine)), threads):
        if not good:
            bad[mine[number].tensor.name] = None
        done += mine[number].nbytes
        progress(done, total)
    if bad:
        raise WeightsError(f"read back and different: {', '.join(bad)}; convert again, and check the disk")


def checksums(units: Sequence[Unit], journal: Journal) -> dict[str, list[int]]:
    """CRC-32 of each tensor's slices, by name, in order."""
    found: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        found.setdefault(unit.tensor.name, []).append(journal.done[number])
    return found


def _only_compared(unit: Unit, sink: Sink) -> bool:
    """Our checkpoints have one array where the published layout has copies."""
    return unit.tensor.copy and isinstance(sink, ArraySink)


def _converted(unit: Unit, source: Source, sink: Sink) -> tuple[np.ndarray, np.ndarray | None]:
    tensor, want = unit.tensor, sink.dtype(unit.tensor)
    if source.dtype(tensor) != E4M3:
        return cast(source.rows(tensor, unit.start, unit.stop), None, want, tensor.name)
    first = unit.start // BLOCK * BLOCK
    scales = source.scales(tensor, first, unit.stop)
    rows, scales = cast(source.rows(tensor, first, unit.stop), scales, want, tensor.name)
    return rows[unit.start - first :], scales


def _compare_copy(unit: Unit, original: Tensor, source: Source) -> None:
    if not _equal(source.rows(unit.tensor, unit.start, unit.stop), source.rows(original, unit.start, unit.stop)):
        raise WeightsError(
            f"{unit.tensor.name} differs from {original.name}: this model has one array for both, and cannot hold two"
        )


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _checksum(rows: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))


def _in_parallel[T](work: Callable[[int], T], numbers: Sequence[int], threads: int) -> Iterator[tuple[int, T]]:
    """Results as they come; no more than ``threads`` pieces of work are begun ahead."""
    pending: dict[Future[T], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
        for number in numbers:
            pending[pool.submit(work, number)] = number
            if len(pending) >= threads:
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield pending.pop(future), future.result()
        for future in list(pending):
            yield pending[future], future.result()
