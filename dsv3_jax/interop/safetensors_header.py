"""The beginning of a safetensors file: eight bytes of length, then JSON that says where each tensor lies."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.interop.tensor_io import TensorEntry, WeightsError, names_line, read_at

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts."""

DTYPES: dict[str, np.dtype] = {
    name: jnp.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
        "C64": np.complex64,
    }.items()
}
"""The format's names of element types; its types below a byte are not read."""

DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything a file's header says."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def build_header(specs: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a file with these tensors one after another, and each one's offset in the file.

    Padded with spaces so that the data begin at a multiple of eight bytes, as the library does it.

    Raises:
        WeightsError: more tensors than a header can hold.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, relative = 0, {}
    for name, dtype, shape in specs:
        end = position + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        relative[name], position = position, end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise WeightsError(f"{len(specs)} tensors need a header of {len(text)} bytes; make shards smaller")
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + offset for name, offset in relative.items()}


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        WeightsError: the file is missing, truncated or longer than its header says; the header is no such JSON; a type
            is unknown; a tensor's size is not that of its shape; tensors overlap, leave holes or occur twice.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise WeightsError(f"{path}: {size} bytes are no safetensors file; get the file again")
        prefix = bytearray(8)
        read_at(fd, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise WeightsError(f"{path}: claims a header of {length} bytes; this is no safetensors file")
        if 8 + length > size:
            raise WeightsError(f"{path}: has {size} bytes and its header alone {8 + length}; get the file again")
        text = bytearray(length)
        read_at(fd, memoryview(text), 8, path)
    finally:
        os.close(fd)
    return _checked(path, _parsed(path, bytes(text)), 8 + length, size)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                twice.append(key)
            table[key] = value
        return table

    try:
        table = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its header is not JSON ({error}); get the file again") from error
    if twice:
        raise WeightsError(f"{path}: its header names twice: {names_line(twice)}; get the file again")
    if not isinstance(table, dict):
        raise WeightsError(f"{path}: its header is not a table of tensors; get the file again")
    return table


def _checked(path: Path, table: dict[str, Any], begin: int, size: int) -> Header:
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ of its header is not a table of strings; get the file again")
    entries = [_entry(path, name, value, begin) for name, value in table.items()]
    end, last = begin, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            fault = "overlaps" if entry.offset < end else "leaves a hole after"
            raise WeightsError(f"{path}: tensor {names_line([entry.name])} {fault} {last}; get the file again")
        end, last = entry.offset + entry.nbytes, names_line([entry.name])
    if end != size:
        how = "is truncated" if end > size else "has bytes that no tensor claims"
        lost = [entry.name for entry in entries if entry.offset + entry.nbytes > size]
        named = f" (not whole: {names_line(lost)})" if lost else ""
        raise WeightsError(f"{path}: {how}: {size} bytes, its header says {end}{named}; get the file again")
    return Header(path, {entry.name: entry for entry in entries}, metadata)


def _entry(path: Path, name: str, value: Any, begin: int) -> TensorEntry:
    label = f"{path}: tensor {names_line([name])}"
    try:
        name.encode()
        kind, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{label} has no proper dtype, shape and data_offsets; get the file again") from error
    if not isinstance(kind, str) or kind not in DTYPES:
        raise WeightsError(f"{label} has the unknown type {kind!r:.40}; known are {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise WeightsError(f"{label} has sizes or offsets that are no counts; get the file again")
    if math.prod(filter(None, shape)) >= 2**60 or stop >= 2**63 or len(shape) > 32:
        raise WeightsError(f"{label} has a shape that no array can have; get the file again")
    dtype = DTYPES[kind]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{label}: {kind}{list(shape)} does not fill its {stop - start} bytes; get the file again")
    return TensorEntry(name, dtype, shape, begin + start, stop - start, path)
