"""What all folders of weights share: named tensors at known offsets, read and written by rows without mapping files.

Mapped pages count as resident memory, so everything goes through ``pread`` and ``pwrite`` into buffers of the caller's
size; both are safe from any number of threads.
"""

import contextlib
import dataclasses
import errno
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.config import ConfigError

DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag of :func:`os.open` that goes past the page cache, whose fresh pages cost several times what the disk does."""
PAGE = 4096
DIRECT_FROM = 2**20
"""Bytes from which direct access pays."""


class WeightsError(ConfigError):
    """Weights that cannot be read or written, told in one line: the file, the tensors, and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor and where its bytes lie: row-major, little-endian, without gaps."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int
    file: Path

    @property
    def rows(self) -> int:
        """The leading dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the leading dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def names_line(names: Iterable[str]) -> str:
    """Every name, quoted where it would break the line, for a message."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)


class FileHandles:
    """Open files by path, at most ``limit`` of them, the one unused longest closed first; safe from many threads."""

    def __init__(self, flags: int, limit: int = 64):
        """``flags`` of :func:`os.open`; a file in use is never closed, so more threads than ``limit`` exceed it."""
        self._flags, self._limit = flags, limit
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, users]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """The descriptor of ``path``, open until the block ends.

        Raises:
            WeightsError: the file cannot be opened.
        """
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [_open(path, self._flags), 0]
            entry[1] += 1
            self._open.move_to_end(path)
            self._evict()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                self._evict()

    def _evict(self) -> None:
        idle = [path for path, (_, users) in self._open.items() if not users]
        for path in idle[: max(0, len(self._open) - self._limit)]:
            os.close(self._open.pop(path)[0])

    def close(self) -> None:
        """Closes all of them."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1][0])


def _open(path: Path, flags: int) -> int:
    try:
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            if not flags & DIRECT or error.errno != errno.EINVAL:
                raise
            return os.open(path, (flags & ~DIRECT) | os.O_CLOEXEC)  # this file system has no direct access
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror})") from error


def read_direct(fd: int, offset: int, nbytes: int, path: Path) -> np.ndarray:
    """Bytes of a file opened with :data:`DIRECT`, as uint8, past the page cache into pages of their own.

    Raises:
        WeightsError: as :func:`read_at`.
    """
    first = offset % PAGE
    padded = -(-(first + nbytes) // PAGE) * PAGE
    memory = np.empty(padded + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    pages, done = memory[start : start + padded], 0
    while done < first + nbytes:
        try:
            count = os.preadv(fd, [memoryview(pages)[done:]], offset - first + done)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read at byte {offset} ({error.strerror})") from error
        if not count:
            raise WeightsError(f"{path}: ends at byte {os.fstat(fd).st_size}, inside its data; get the file again")
        done += count
    return pages[first : first + nbytes]


def read_at(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills ``buffer`` from ``offset``.

    Raises:
        WeightsError: the file ends before, or the device fails.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if not count:
            raise WeightsError(f"{path}: ends at byte {os.fstat(fd).st_size}, inside its data; get the file again")
        done += count


def write_at(fd: int, data: memoryview | bytes, offset: int, path: Path) -> None:
    """Writes all of ``data`` at ``offset``.

    Raises:
        WeightsError: the disk is full or fails.
    """
    data, done = memoryview(data), 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "the disk is full; free some space and resume" if full else error.strerror
            raise WeightsError(f"{path}: cannot be written at byte {offset + done}: {remedy}") from error


class WeightsFolder:
    """Tensors of one folder by name; a reader fills :attr:`tensors`. A context manager."""

    def __init__(self, path: Path, max_open_files: int = 64):
        """Of the folder ``path``; at most ``max_open_files`` descriptors are kept."""
        self.path = path
        self.tensors: dict[str, TensorEntry] = {}
        self._handles = FileHandles(os.O_RDONLY, max_open_files)
        self._direct = FileHandles(os.O_RDONLY | DIRECT, max_open_files)
        self._bytes_read, self._lock = 0, threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, by all threads."""
        return self._bytes_read

    def read_rows(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows ``start:stop`` of a tensor's leading dimension, into ``out`` where given; safe from many threads.

        A scalar has one row and comes back with shape ``()``.

        Raises:
            WeightsError: no such tensor or rows, ``out`` of another shape or type or not contiguous, or the file is
                shorter than it was.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise WeightsError(f"{self.path}: has no tensor {names_line([name])}")
        stop = entry.rows if stop is None else stop
        if not 0 <= start <= stop <= entry.rows:
            raise WeightsError(f"{entry.file}: {name} has rows 0:{entry.rows}, not {start}:{stop}")
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        if not entry.shape and stop == start:
            raise WeightsError(f"{entry.file}: {name} is a scalar; read it as row 0:1")
        offset, nbytes = entry.offset + start * entry.row_bytes, (stop - start) * entry.row_bytes
        if out is None and nbytes >= DIRECT_FROM:
            with self._direct.use(entry.file) as fd:
                found = read_direct(fd, offset, nbytes, entry.file)
            self._count(nbytes)
            return found.view(entry.dtype).reshape(shape)
        if out is None:
            out = np.empty(shape, entry.dtype)
        elif out.shape != shape or out.dtype != entry.dtype or not out.flags.c_contiguous:
            found = f"{out.dtype}{list(out.shape)}{'' if out.flags.c_contiguous else ', not contiguous'}"
            raise WeightsError(f"{entry.file}: {start}:{stop} of {name} are {entry.dtype}{list(shape)}; out is {found}")
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        if len(buffer):
            with self._handles.use(entry.file) as fd:
                read_at(fd, buffer, offset, entry.file)
        self._count(len(buffer))
        return out

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_read += nbytes

    def read_block(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Rows and columns, each from start to stop, of a matrix; nothing else of those rows is read.

        Raises:
            WeightsError: no such matrix, rows or columns, or the file is shorter than it was.
        """
        entry = self.tensors.get(name)
        if entry is None or len(entry.shape) != 2:
            raise WeightsError(f"{self.path}: has no matrix {names_line([name])}")
        first, last = columns
        if (first, last) == (0, entry.shape[1]):
            return self.read_rows(name, *rows)
        if not (0 <= rows[0] <= rows[1] <= entry.rows and 0 <= first <= last <= entry.shape[1]):
            raise WeightsError(f"{entry.file}: {name} is {list(entry.shape)} and has no {rows} x {columns}")
        out = np.empty((rows[1] - rows[0], last - first), entry.dtype)
        with self._handles.use(entry.file) as fd:
            for row, values in enumerate(out.view(np.uint8), start=rows[0]):
                offset = entry.offset + row * entry.row_bytes + first * entry.dtype.itemsize
                read_at(fd, memoryview(values), offset, entry.file)
        with self._lock:
            self._bytes_read += out.nbytes
        return out

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._handles.close()
        self._direct.close()

    def __enter__[T](self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
