"""PyTorch's own files, written and read without PyTorch, whose wheels for some platforms are several gigabytes.

A file is a zip archive (:mod:`dsv3_jax.interop.torch_zip`) of one pickle (:mod:`dsv3_jax.interop.torch_pickle`, read by
:mod:`dsv3_jax.interop.torch_unpickle`) and the tensors' bytes.
``torch.load(path, weights_only=True)`` opens what is written; nothing in a file that is read is run.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.interop.crc32 import crc32_joined
from dsv3_jax.interop.folder_index import compare, weight_files
from dsv3_jax.interop.safetensors_file import PICKLES, HFFolder
from dsv3_jax.interop.safetensors_header import MAX_HEADER_BYTES
from dsv3_jax.interop.shard_plan import MAX_SHARD_BYTES, FileLayout, ShardPlan, nbytes
from dsv3_jax.interop.shard_writer import RowWriter
from dsv3_jax.interop.tensor_io import TensorEntry, WeightsError, WeightsFolder, names_line, read_at, write_at
from dsv3_jax.interop.torch_pickle import STORAGES, UNTYPED, dump_state_dict, strides
from dsv3_jax.interop.torch_unpickle import StoredTensor, load_state_dict
from dsv3_jax.interop.torch_zip import ALIGNMENT, Archive, Record, directory, place, read_archive

_IDENTITY_BYTES = 40
_READ_BACK_BYTES = 4 * 2**20


def open_weights(path: Path, allow_pickle: bool = False) -> WeightsFolder:
    """The folder's safetensors, or where it has none and ``allow_pickle`` says so its PyTorch files.

    Raises:
        WeightsError: as :class:`HFFolder` and :class:`TorchFolder` do.
    """
    path = Path(path)
    if allow_pickle and not any(path.glob("*.safetensors*")):
        return TorchFolder(path)
    return HFFolder(path)


class TorchFolder(WeightsFolder):
    """``pytorch_model.bin``, or its index with the shards, or the one ``.bin``, ``.pt`` or ``.pth`` file there is.

    Each file is a flat ``state_dict``; tensors may share storages and begin anywhere in them.
    """

    def __init__(self, path: Path, max_open_files: int = 64):
        """Opens the folder, or the single file, ``path``.

        Raises:
            WeightsError: nothing to read or several single files; index and shards do not fit together or lead outside
                the folder; a file is damaged, of PyTorch before 1.6, or asks for anything but tensors; tensors that
                are not contiguous (all are listed).
        """
        super().__init__(Path(path), max_open_files)
        files, weight_map = self._files()
        shards = {name: _entries(file) for name, file in files.items()}
        if weight_map is not None:
            compare(self.path, weight_map, shards)
        self.tensors = {name: entry for tensors in shards.values() for name, entry in tensors.items()}

    def _files(self) -> tuple[dict[str, Path], dict[str, str] | None]:
        if self.path.is_file():
            return {self.path.name: self.path}, None
        if found := weight_files(self.path, "pytorch_model", ".bin"):
            return found
        loose = sorted(path for pattern in PICKLES for path in self.path.glob(pattern))
        if len(loose) != 1:
            several = f"has several ({names_line(p.name for p in loose)}) and no index; name one file"
            nothing = f"has no PyTorch file ({', '.join(PICKLES)})"
            raise WeightsError(f"{self.path}: {several if loose else nothing}")
        return {loose[0].name: loose[0]}, None


@dataclasses.dataclass(frozen=True)
class ArchivePlan:
    """The records of one file."""

    records: list[Record]
    known: dict[str, bytes]
    """Record -> contents, where these are known beforehand."""
    tensors: dict[str, str]
    """Record -> tensor."""


class TorchPlan(ShardPlan):
    """As :class:`ShardPlan`, for ``pytorch_model.bin`` or ``pytorch_model-00001-of-000NN.bin`` with an index."""

    stem, suffix = "pytorch_model", ".bin"

    def __init__(self, tensors: Iterable[tuple[str, Any, Sequence[int]]], max_shard_bytes: int = MAX_SHARD_BYTES):
        """Of ``(name, dtype, shape)`` each; raises as :class:`ShardPlan` does."""
        self.archives: dict[str, ArchivePlan] = {}
        """By file."""
        super().__init__(tensors, max_shard_bytes)

    def _knows(self, dtype: np.dtype) -> bool:
        return dtype in STORAGES or dtype in UNTYPED

    def _layout(self, file: str, specs: list[tuple[str, np.dtype, tuple[int, ...]]]) -> FileLayout:
        root = file.removesuffix(self.suffix)
        head = [
            (f"{root}/data.pkl", dump_state_dict(specs)),
            (f"{root}/.format_version", b"1"),
            (f"{root}/.storage_alignment", str(ALIGNMENT).encode()),
            (f"{root}/byteorder", b"little"),
        ]
        version = (f"{root}/version", b"3\n")
        tensors = {f"{root}/data/{i}": name for i, (name, _, _) in enumerate(specs)}
        sizes = [(name, len(data)) for name, data in head]
        sizes += [(f"{root}/data/{i}", nbytes(dtype, shape)) for i, (_, dtype, shape) in enumerate(specs)]
        sizes += [(version[0], len(version[1])), (f"{root}/.data/serialization_id", _IDENTITY_BYTES)]
        archive = self.archives[file] = ArchivePlan(place(sizes), dict([*head, version]), tensors)
        fixed: list[tuple[int, bytes]] = []
        for record in archive.records:
            fixed.append((record.header_offset, record.header))
            if record.name in archive.known:
                fixed.append((record.offset, archive.known[record.name]))
        offsets = {tensors[record.name]: record.offset for record in archive.records if record.name in tensors}
        end = directory(archive.records, dict.fromkeys((record.name for record in archive.records), 0))
        return FileLayout(file, archive.records[-1].end + len(end), tuple(fixed), offsets)


class TorchWriter(RowWriter):
    """Writes the files of a :class:`TorchPlan`; see :class:`RowWriter`.

    An unfinished file has no directory and no loader opens it. Checksums are those of the rows, joined; only rows that
    an earlier writer wrote, or that were written over in part, are read back for theirs.
    """

    def __init__(self, folder: Path, plan: TorchPlan, resume: bool = False, max_open_files: int = 64):
        """As :class:`RowWriter`."""
        super().__init__(folder, plan, resume, max_open_files)
        self._archives = plan.archives

    def _checksum(self, data: memoryview) -> int:
        return zlib.crc32(data)

    def _finish(self, layout: FileLayout, fd: int) -> None:
        archive, path = self._archives[layout.file], self.folder / layout.file
        checksums = {name: zlib.crc32(data) for name, data in archive.known.items()}
        for record, tensor in archive.tensors.items():
            checksums[record] = self._tensor_checksum(tensor, fd, path)
        identity = archive.records[-1]
        parts = ("\n".join(checksums), repr(list(checksums.values())))
        text = "".join(f"{zlib.crc32(part.encode()):0{_IDENTITY_BYTES // 2}d}" for part in parts).encode()
        checksums[identity.name] = zlib.crc32(text)
        write_at(fd, text, identity.offset, path)
        for record in archive.records:
            write_at(fd, record.descriptor(checksums[record.name]), record.offset + record.size, path)
        write_at(fd, directory(archive.records, checksums), identity.end, path)

    def _tensor_checksum(self, name: str, fd: int, path: Path) -> int:
        """Of a tensor all of whose bytes are written; reads back those runs whose checksum is not known."""
        offset, joined = self.plan.tensors[name].offset, 0
        for start, stop, crc in self._coverage[name].runs():
            if crc is None:
                crc, buffer = 0, bytearray(min(_READ_BACK_BYTES, stop - start))
                for at in range(start, stop, len(buffer)):
                    piece = memoryview(buffer)[: stop - at]
                    read_at(fd, piece, offset + at, path)
                    crc = zlib.crc32(piece, crc)
            joined = crc32_joined(joined, crc, stop - start)
        return joined


def _entries(path: Path) -> dict[str, TensorEntry]:
    archive = read_archive(path, MAX_HEADER_BYTES)
    tensors = load_state_dict(archive.pickle, path)
    if gaps := [name for name, tensor in tensors.items() if not _contiguous(tensor)]:
        raise WeightsError(f"{path}: not contiguous: {names_line(gaps)}; save them after .contiguous()")
    return {name: _entry(name, tensor, archive, path) for name, tensor in tensors.items()}


def _contiguous(tensor: StoredTensor) -> bool:
    """Row-major without gaps; the stride of a dimension of one does not matter, nor any where there is no element."""
    if 0 in tensor.shape:
        return True
    both = zip(tensor.shape, tensor.stride, strides(tensor.shape), strict=True)
    return all(size == 1 or stride == expected for size, stride, expected in both)


def _entry(name: str, tensor: StoredTensor, archive: Archive, path: Path) -> TensorEntry:
    storage, label = tensor.storage, f"{path}: tensor {names_line([name])}"
    if storage.key not in archive.storages:
        raise WeightsError(f"{label} is in storage {names_line([storage.key])}, which is missing; get the file again")
    offset, size = archive.storages[storage.key]
    claimed = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
    if claimed != size:
        raise WeightsError(f"{label}: its storage has {size} bytes, not {claimed}; get the file again")
    begin, length = tensor.offset * tensor.dtype.itemsize, nbytes(tensor.dtype, tensor.shape)
    if length and begin + length > size:
        raise WeightsError(f"{label} goes beyond its storage of {size} bytes; get the file again")
    if math.prod(filter(None, tensor.shape)) >= 2**60:
        raise WeightsError(f"{label} has a shape that no array can have; get the file again")
    return TensorEntry(name, tensor.dtype, tensor.shape, offset + min(begin, size), length, path)
