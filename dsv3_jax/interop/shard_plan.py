"""Which tensor goes into which file, and where: decided before anything is written."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.interop.safetensors_header import DTYPE_NAMES, build_header
from dsv3_jax.interop.tensor_io import TensorEntry, WeightsError, names_line

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in a file unless one tensor alone is larger, as the Hugging Face hub has it."""


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """One file: its size, the bytes known beforehand, and where each tensor begins."""

    file: str
    size: int
    fixed: tuple[tuple[int, bytes], ...]
    """Offset and bytes of everything but tensors that can be written at once."""
    offsets: dict[str, int]


class ShardPlan:
    """Safetensors files for tensors in a given order: a new file where the next tensor would not fit, none is split.

    One file is ``model.safetensors``; more are ``model-00001-of-000NN.safetensors`` with an index.
    """

    stem, suffix = "model", ".safetensors"

    def __init__(self, tensors: Iterable[tuple[str, Any, Sequence[int]]], max_shard_bytes: int = MAX_SHARD_BYTES):
        """Of ``(name, dtype, shape)`` each; ``max_shard_bytes`` counts the tensors of a file.

        Raises:
            WeightsError: names occurring twice or impossible in a file, types the format has not; all are listed.
        """
        specs = [(name, np.dtype(dtype), tuple(int(size) for size in shape)) for name, dtype, shape in tensors]
        self._refuse(specs, max_shard_bytes)
        groups: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
        filled = self.total_size = 0
        for spec in specs:
            size = nbytes(spec[1], spec[2])
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(spec)
            filled += size
            self.total_size += size
        single = len(groups) == 1
        names = [f"-{i:05d}-of-{len(groups):05d}" for i in range(1, len(groups) + 1)] if not single else [""]
        self.files: tuple[FileLayout, ...] = tuple(
            self._layout(f"{self.stem}{name}{self.suffix}", group) for name, group in zip(names, groups, strict=True)
        )
        self.index_file: str | None = None if single else f"{self.stem}{self.suffix}.index.json"
        """The name of the index; none where there is one file."""
        self.tensors: dict[str, TensorEntry] = {
            name: TensorEntry(name, dtype, shape, layout.offsets[name], nbytes(dtype, shape), Path(layout.file))
            for layout, group in zip(self.files, groups, strict=True)
            for name, dtype, shape in group
        }
        """In the given order; files are relative to the folder."""

    def index(self) -> dict[str, Any]:
        """What the index file says."""
        return {
            "metadata": {"total_size": self.total_size},
            "weight_map": {name: str(entry.file) for name, entry in self.tensors.items()},
        }

    def _layout(self, file: str, specs: list[tuple[str, np.dtype, tuple[int, ...]]]) -> FileLayout:
        """Larger element types first, so that every tensor is aligned to its own."""
        header, offsets = build_header(sorted(specs, key=lambda spec: -spec[1].itemsize))
        data = sum(nbytes(dtype, shape) for _, dtype, shape in specs)
        return FileLayout(file, len(header) + data, ((0, header),), offsets)

    def _refuse(self, specs: list[tuple[str, np.dtype, tuple[int, ...]]], max_shard_bytes: int) -> None:
        if max_shard_bytes <= 0:
            raise WeightsError(f"max_shard_bytes is {max_shard_bytes}; give a positive number of bytes")
        names = [name for name, _, _ in specs]
        if len(set(names)) != len(names):
            seen: set[str] = set()
            twice = dict.fromkeys(name for name in names if name in seen or seen.add(name))
            raise WeightsError(f"tensors planned twice: {names_line(twice)}")
        if bad := [name for name in names if name == "__metadata__" or not encodable(name)]:
            raise WeightsError(f"names that no file can hold: {names_line(bad)}")
        if bad := [f"{name} ({dtype})" for name, dtype, _ in specs if not self._knows(dtype)]:
            raise WeightsError(f"types that {self.suffix} files have not: {names_line(bad)}")
        if bad := [f"{name} {list(shape)}" for name, _, shape in specs if min(shape, default=0) < 0]:
            raise WeightsError(f"negative sizes: {names_line(bad)}")

    def _knows(self, dtype: np.dtype) -> bool:
        return dtype in DTYPE_NAMES


def nbytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def encodable(name: str) -> bool:
    """Whether UTF-8 has the name (lone surrogates it has not)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
