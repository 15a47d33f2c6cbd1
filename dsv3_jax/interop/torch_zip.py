"""The zip archive that ``torch.save`` writes: stored records, their data aligned to 64 bytes, sizes of 64 bits.

Every record but an empty one is followed by a descriptor with its checksum, so local headers are known before the data.
Our archives have PyTorch's own layout record for record (its newer loaders compute offsets instead of reading them).
"""

import dataclasses
import functools
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv3_jax.interop.tensor_io import WeightsError, names_line, read_at

ALIGNMENT = 64
_WIDE = 0xFFFFFFFF  # from here on sizes and offsets take 64 bits
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")


@dataclasses.dataclass(frozen=True)
class Record:
    """One file of the archive at its place."""

    name: str
    size: int
    header_offset: int

    @property
    def _flags(self) -> int:
        """UTF-8 name, and a descriptor where there are data."""
        return 0x808 if self.size else 0x800

    def _wide_extra(self, packed: int) -> bytes:
        fields = [self.size, packed] if self.size >= _WIDE else []
        if self.header_offset >= _WIDE:
            fields.append(self.header_offset)
        return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""

    @functools.cached_property
    def header(self) -> bytes:
        """What precedes the data: the local header, padded by an extra field; the packed size is not known yet."""
        name, wide = self.name.encode(), self._wide_extra(packed=0)
        begin = self.header_offset + _LOCAL.size + len(name) + len(wide) + 4
        padding = -begin % ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return _LOCAL.pack(b"PK\3\4", 0, self._flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra

    @property
    def offset(self) -> int:
        """Where the data begin."""
        return self.header_offset + len(self.header)

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + self.size + len(self.descriptor(0))

    def descriptor(self, crc: int) -> bytes:
        """What follows the data."""
        if not self.size:
            return b""
        return struct.pack("<4sIQQ" if self._wide_extra(0) else "<4sIII", b"PK\7\x08", crc, self.size, self.size)

    def central(self, crc: int) -> bytes:
        """Its entry of the directory at the archive's end."""
        name, extra = self.name.encode(), self._wide_extra(self.size)
        size, offset = min(self.size, _WIDE), min(self.header_offset, _WIDE)
        fields = (0, 0, self._flags, 0, 0, 0, crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset)
        return _CENTRAL.pack(b"PK\1\2", *fields) + name + extra


def place(sizes: Sequence[tuple[str, int]]) -> list[Record]:
    """Records of these names and sizes, one after another."""
    records, cursor = [], 0
    for name, size in sizes:
        records.append(Record(name, size, cursor))
        cursor = records[-1].end
    return records


def directory(records: Sequence[Record], checksums: Mapping[str, int]) -> bytes:
    """The end of the archive; its length does not depend on the checksums."""
    entries = b"".join(record.central(checksums[record.name]) for record in records)
    begin, count = records[-1].end, len(records)
    wide_end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(entries), begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(entries), 1)
    short, size, offset = min(count, 0xFFFF), min(len(entries), _WIDE), min(begin, _WIDE)
    return entries + wide_end + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, size, offset, 0)


@dataclasses.dataclass(frozen=True)
class Archive:
    """What a reader needs of an archive: the pickle, and where each storage lies."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]
    """Key of a storage -> offset in the file and bytes."""


def read_archive(path: Path, max_pickle_bytes: int) -> Archive:
    """The checked directory of a file that ``torch.save`` wrote.

    Raises:
        WeightsError: it is no such archive, or truncated; records are compressed or overlap; its pickle fails its
            checksum; its numbers are big-endian.
    """
    again = "get the file again, or save it anew with torch.save"
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise WeightsError(f"{path}: its archive names records twice; {again}")
            roots = [name.removesuffix("data.pkl") for name in infos if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise WeightsError(f"{path}: is a zip archive without the one data.pkl that torch.save writes")
            root = roots[0]
            small = [f"{root}data.pkl", f"{root}byteorder"]
            if any(infos[name].file_size > max_pickle_bytes for name in small if name in infos):
                raise WeightsError(f"{path}: claims a pickle above {max_pickle_bytes} bytes; {again}")
            places = _places(path, infos)
            pickle, order = (archive.read(name) if name in infos else b"little" for name in small)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path}: is no whole zip archive as torch.save writes it ({error}); {again}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, struct.error, RuntimeError, EOFError, IndexError, OverflowError, LookupError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: its archive is damaged ({error}); {again}") from error
    if order != b"little":
        raise WeightsError(f"{path}: was saved on a big-endian machine, which is not read")
    storages = {name.removeprefix(f"{root}data/"): value for name, value in places.items() if name.startswith(root)}
    return Archive(pickle, storages)


def _places(path: Path, infos: Mapping[str, zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Offset and size of each record's data, from the local headers; records must follow one another."""
    places: dict[str, tuple[int, int]] = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        before, end = "", 0
        for info in sorted(infos.values(), key=lambda info: info.header_offset):
            if info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise WeightsError(f"{path}: {names_line([info.filename])} is compressed; save it anew with torch.save")
            if not 0 <= info.header_offset - end <= 24:
                raise WeightsError(
                    f"{path}: {names_line([info.filename])} does not follow {before}; get the file again"
                )
            header = bytearray(_LOCAL.size)
            read_at(fd, memoryview(header), info.header_offset, path)
            signature, *_, name, extra = _LOCAL.unpack(header)
            if signature != b"PK\3\4" or name != len(info.orig_filename.encode()):
                raise WeightsError(f"{path}: {names_line([info.filename])} has a broken header; get the file again")
            begin = info.header_offset + len(header) + name + extra
            before, end = names_line([info.filename]), begin + info.file_size
            places[info.filename] = (begin, info.file_size)
        if end > os.fstat(fd).st_size:
            raise WeightsError(f"{path}: is truncated in {before}; get the file again")
    finally:
        os.close(fd)
    return places
