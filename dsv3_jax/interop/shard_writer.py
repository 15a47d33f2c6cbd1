"""Writing a planned folder of weights: every file at its full size at once, then rows by offset in any order."""

import bisect
import json
import math
import os
import shutil
import threading
from pathlib import Path

import numpy as np

from dsv3_jax.chunks import Buffers
from dsv3_jax.interop.shard_plan import FileLayout, ShardPlan
from dsv3_jax.interop.tensor_io import (
    DIRECT,
    DIRECT_FROM,
    PAGE,
    FileHandles,
    TensorEntry,
    WeightsError,
    names_line,
    read_at,
    write_at,
)

_PIECE = 4 * 2**20
"""Bytes that are copied to whole pages and written at a time."""


class Coverage:
    """Which bytes of one tensor have been written, each run of them with its checksum where that is known."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._starts: list[int] = []
        self._runs: dict[int, tuple[int, int | None]] = {}

    def add(self, start: int, stop: int, crc: int | None) -> None:
        """Bytes ``start:stop`` now hold what ``crc`` is of; what they held before is forgotten."""
        if start >= stop:
            return
        low = bisect.bisect_left(self._starts, start)
        if low and self._runs[self._starts[low - 1]][0] > start:
            low -= 1
        high = bisect.bisect_left(self._starts, stop)
        new = {start: (stop, crc)}
        for old in self._starts[low:high]:
            end, _ = self._runs.pop(old)
            if old < start:
                new[old] = (start, None)
            if end > stop:
                new[stop] = (end, None)
        self._runs |= new
        self._starts[low:high] = sorted(new)

    def runs(self) -> list[tuple[int, int, int | None]]:
        """``(start, stop, crc)`` in order; they do not overlap."""
        return [(start, *self._runs[start]) for start in self._starts]

    def complete(self, nbytes: int) -> bool:
        """Whether bytes ``0:nbytes`` were all written."""
        end = 0
        for start, stop, _ in self.runs():
            if start > end:
                return False
            end = stop
        return end >= nbytes


class RowWriter:
    """Files of a plan, written by rows from any thread in any order; the index comes last, on :meth:`close`.

    A context manager: an exception inside leaves the files as they are, to be resumed, and writes no index.
    """

    def __init__(self, folder: Path, plan: ShardPlan, resume: bool = False, max_open_files: int = 64):
        """Creates ``folder`` and the files of ``plan``, or with ``resume`` goes on with what a killed writer left.

        What an earlier writer wrote counts as written only where :meth:`assume_written` says so.

        Raises:
            WeightsError: a file exists already; it is not what ``plan`` would have made (``resume``); the disk is too
                small; it cannot be written.
        """
        self.folder, self.plan = Path(folder), plan
        self._coverage = {name: Coverage() for name in plan.tensors}
        self._handles = FileHandles(os.O_RDWR, max_open_files)
        self._direct = FileHandles(os.O_WRONLY | DIRECT, max_open_files)
        self._buffers = Buffers(_PIECE, count=4)
        self._lock = threading.Lock()
        self._bytes_written = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space()
        except OSError as error:
            raise WeightsError(f"{folder}: cannot be written ({error.strerror})") from error
        try:
            for layout in plan.files:
                self._create(layout, resume)
        except BaseException:
            self._handles.close()
            raise

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors written so far, by all threads of this writer."""
        return self._bytes_written

    def write_rows(self, name: str, start: int, array: np.ndarray) -> None:
        """Rows of a tensor from ``start`` of its leading dimension on (a scalar is row 0); safe from many threads.

        Raises:
            WeightsError: no such tensor, another type or shape than planned, rows outside, or the disk is full.
        """
        entry = self._entry(name)
        shape = array.shape if entry.shape else (1, *array.shape)
        if array.dtype != entry.dtype or len(shape) != max(1, len(entry.shape)) or shape[1:] != entry.shape[1:]:
            planned = f"{entry.dtype}{list(entry.shape)}"
            raise WeightsError(f"{entry.file}: {name} is planned as {planned}; got {array.dtype}{list(array.shape)}")
        if start < 0 or start + shape[0] > entry.rows:
            raise WeightsError(f"{entry.file}: {name} has rows 0:{entry.rows}, not {start}:{start + shape[0]}")
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        begin = start * entry.row_bytes
        self._write(self.folder / entry.file, data, entry.offset + begin)
        crc = self._checksum(data)
        with self._lock:
            self._coverage[name].add(begin, begin + len(data), crc)
            self._bytes_written += len(data)

    def _write(self, path: Path, data: memoryview, offset: int) -> None:
        """Whole pages past the page cache, the edges, which neighbours share, through it."""
        first, last = -(-offset // PAGE) * PAGE, (offset + len(data)) // PAGE * PAGE
        if len(data) < DIRECT_FROM:
            first = last = offset + len(data)
        with self._handles.use(path) as fd:
            write_at(fd, data[: first - offset], offset, path)
            write_at(fd, data[last - offset :], last, path)
        for begin in range(first, last, self._buffers.nbytes):
            piece = data[begin - offset : min(begin + self._buffers.nbytes, last) - offset]
            with self._buffers.take() as buffer, memoryview(buffer) as view, self._direct.use(path) as fd:
                view[: len(piece)] = piece
                write_at(fd, view[: len(piece)], begin, path)

    def assume_written(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Declares rows ``start:stop`` to be on disk already, written by the one whose work is resumed."""
        entry = self._entry(name)
        stop = entry.rows if stop is None else stop
        if not 0 <= start <= stop <= entry.rows:
            raise WeightsError(f"{entry.file}: {name} has rows 0:{entry.rows}, not {start}:{stop}")
        with self._lock:
            self._coverage[name].add(start * entry.row_bytes, stop * entry.row_bytes, None)

    def close(self) -> None:
        """Finishes and syncs the files and writes the index.

        Raises:
            WeightsError: rows of some tensors were never written; all of those are named, and nothing is finished.
        """
        missing = [n for n, entry in self.plan.tensors.items() if not self._coverage[n].complete(entry.nbytes)]
        if missing:
            raise WeightsError(f"{self.folder}: not all rows were written of: {names_line(missing)}")
        for layout in self.plan.files:
            path = self.folder / layout.file
            with self._handles.use(path) as fd:
                self._finish(layout, fd)
                os.fsync(fd)
        self.abandon()
        if self.plan.index_file:
            hidden = self.folder / f".{self.plan.index_file}"
            try:
                with hidden.open("w", encoding="utf-8") as file:
                    json.dump(self.plan.index(), file, indent=2, ensure_ascii=False)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                hidden.replace(self.folder / self.plan.index_file)
            except OSError as error:
                raise WeightsError(f"{hidden}: cannot be written ({error.strerror})") from error

    def abandon(self) -> None:
        """Closes the files unfinished; a later writer can resume."""
        self._handles.close()
        self._direct.close()

    def __enter__[T](self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abandon()

    def _checksum(self, data: memoryview) -> int | None:
        """What to remember of rows just written."""
        return None

    def _finish(self, layout: FileLayout, fd: int) -> None:
        """Writes what a file needs once all its tensors are there."""

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.plan.tensors:
            raise WeightsError(f"{self.folder}: {names_line([name])} is not in the plan")
        return self.plan.tensors[name]

    def _check_space(self) -> None:
        paths = [self.folder / layout.file for layout in self.plan.files]
        present = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
        needed, free = sum(layout.size for layout in self.plan.files) - present, shutil.disk_usage(self.folder).free
        if needed > free:
            raise WeightsError(f"{self.folder}: needs {_gb(needed)} and the disk has {_gb(free)} free; make room")

    def _create(self, layout: FileLayout, resume: bool) -> None:
        path = self.folder / layout.file
        if path.exists() and not resume:
            raise WeightsError(f"{path}: exists already; resume it, or remove it")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o644)
            os.close(fd)
            size = path.stat().st_size
            if not size:  # new, or its maker was killed before it had a size
                os.truncate(path, layout.size)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be created at {_gb(layout.size)} ({error.strerror})") from error
        differs = size not in (0, layout.size)
        with self._handles.use(path) as fd:
            for offset, fixed in layout.fixed if not differs else ():
                found = bytearray(len(fixed))
                if size:
                    read_at(fd, memoryview(found), offset, path)
                if not any(found):  # new, or its maker was killed before this was written
                    write_at(fd, fixed, offset, path)
                elif found != fixed:
                    differs = True
        if differs:
            raise WeightsError(f"{path}: was begun for other tensors than now planned; remove it and start over")


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e7 else f"{math.ceil(count / 1e3)} kB"
