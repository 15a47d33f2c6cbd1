"""One reader for each kind of file: it walks through all documents once, and reads any one of them again.

A place in a file is two integers whose meaning is the reader's own, so that an index of many documents is two arrays.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dsv3_jax.config import ConfigError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".array_record")


@runtime_checkable
class Reader(Protocol):
    """Documents of one source."""

    name: str

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Every document with its place.

        Raises:
            ConfigError: one line with the file, and the line or record, that cannot be read.
        """
        ...

    def read(self, start: int, length: int) -> str:
        """The document at a place that :meth:`scan` named."""
        ...


class TextReader:
    """A text file: one document, or with ``section`` > 0 one for each part of about that many bytes."""

    def __init__(self, path: Path, section: int = 0):
        """Of ``path``; ``section`` in bytes."""
        self.name = str(path)
        self.path, self.section = path, section

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Whole, or in sections that end at a blank line if one is near, else at a line, else between characters."""
        with _opened(self.path) as file:
            start = 0
            while True:
                raw = file.read(2 * self.section) if self.section else file.read()
                if not raw:
                    return
                if self.section and len(raw) == 2 * self.section:
                    raw = raw[: _end_of_section(raw, self.section)]
                yield start, len(raw), _text(raw, self.name, start)
                start += len(raw)
                file.seek(start)

    def read(self, start: int, length: int) -> str:
        """The section that starts at byte ``start``."""
        with _opened(self.path) as file:
            file.seek(start)
            return _text(file.read(length), self.name, start)


def _end_of_section(raw: bytes, least: int) -> int:
    for border in (b"\n\n", b"\n"):
        found = raw.rfind(border, least)
        if found >= 0:
            return found + len(border)
    end = len(raw) - 1
    while end > least and raw[end] & 0xC0 == 0x80:
        end -= 1
    return end


class JsonlReader:
    """A JSONL file: one document a line, under one key."""

    def __init__(self, path: Path, field: str):
        """Of ``path``, text under ``field``."""
        self.name = str(path)
        self.path, self.field = path, field

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Every line that is not blank, with its offset and length in bytes."""
        start = 0
        with _opened(self.path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield start, len(line), self._parse(line, f"{self.name} line {number}")
                start += len(line)

    def read(self, start: int, length: int) -> str:
        """The line at byte ``start``."""
        with _opened(self.path) as file:
            file.seek(start)
            return self._parse(file.read(length), f"{self.name} at byte {start}")

    def _parse(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON: {_reason(error)}; repair or remove the line") from error
        return _field_of(record, self.field, where)


class ArrayRecordReader:
    """An ArrayRecord file: records are UTF-8 text, or JSON objects with the text under one key.

    The first record says which: a JSON object that holds the key makes the file JSON.
    """

    def __init__(self, path: Path, field: str):
        """Of ``path``, text under ``field`` where records are JSON."""
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        self.name = str(path)
        self.field = field
        with _opened(path):
            self._file = array_record_module.ArrayRecordReader(
                str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
            )
        if not self._file.ok():
            raise ConfigError(f"{self.name} is not an ArrayRecord file, or is damaged; write it again")
        self._json = self._file.num_records() > 0 and self._is_json(self._record(0))

    def _record(self, number: int) -> bytes:
        try:
            return self._file.read([number])[0]
        except Exception as error:  # the library names no exception of its own
            raise ConfigError(f"{self.name} record {number} cannot be read: {_reason(error)}") from error

    def _is_json(self, raw: bytes) -> bool:
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            return False
        return isinstance(record, dict) and self.field in record

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Every record, with its number."""
        for number in range(self._file.num_records()):
            yield number, 1, self.read(number, 1)

    def read(self, start: int, length: int) -> str:
        """Record ``start``."""
        raw, where = self._record(start), f"{self.name} record {start}"
        if not self._json:
            return _text(raw, where, 0)
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON as the first one is: {_reason(error)}") from error
        return _field_of(record, self.field, where)


class MemoryReader:
    """Documents that were made, not read."""

    def __init__(self, name: str, documents: list[str]):
        """Of ``documents``."""
        self.name = name
        self.documents = documents

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Every document, with its position."""
        for position, text in enumerate(self.documents):
            yield position, 1, text

    def read(self, start: int, length: int) -> str:
        """Document ``start``."""
        return self.documents[start]


def find_readers(source: str, field: str) -> list[Reader]:
    """Readers of a file, or of every file of a known suffix in a folder and its folders, in the order of their paths.

    Names that start with a dot are passed over. A text file that is the only file is read in sections, about 256 of
    them and 1 to 64 KiB each, because one document could not be split into train and validation.

    Raises:
        ConfigError: no such file, an unknown suffix, or a folder without a file of a known one.
    """
    path = Path(source)
    if path.is_dir():
        paths = _files_below(path)
        if not paths:
            raise ConfigError(f"data.source = {source!r} holds no file that ends in {', '.join(SUFFIXES)}")
    elif path.exists():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"data.source = {source!r} must end in one of {', '.join(SUFFIXES)}, or be a folder")
        paths = [path]
    else:
        raise ConfigError(f"data.source = {source!r} does not exist: name a file or folder, or 'python'")
    if len(paths) == 1 and paths[0].suffix in TEXT_SUFFIXES:
        section = min(max(paths[0].stat().st_size // 256, 1 << 10), 1 << 16)
        return [TextReader(paths[0], section)]
    return [_reader(path, field) for path in paths]


def _files_below(root: Path) -> list[Path]:
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths += [Path(folder, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(paths)


def _reader(path: Path, field: str) -> Reader:
    if path.suffix == ".jsonl":
        return JsonlReader(path, field)
    if path.suffix == ".array_record":
        return ArrayRecordReader(path, field)
    return TextReader(path)


def _opened(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _text(raw: bytes, where: str, offset: int) -> str:
    zero = raw.find(b"\0")
    if zero >= 0:
        raise ConfigError(
            f"{where} is not text: a zero byte at {offset + zero}; remove the file or convert it to UTF-8"
        )
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 text: byte {raw[error.start]:#04x} at {offset + error.start}; "
            "remove the file or convert it to UTF-8"
        ) from error


def _field_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ConfigError(f"{where} must be a JSON object, not {type(record).__name__}")
    if field not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ConfigError(f"{where} has no field {field!r} (data.text_field); its fields: {keys}")
    text = record[field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: field {field!r} must hold a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: field {field!r} holds half a surrogate pair at character {error.start}") from error
    return text


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
