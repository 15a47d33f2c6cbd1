"""Where weights go: the counterpart of :mod:`dsv3_jax.interop.source`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dsv3_jax.chunks import chunk_shape_for
from dsv3_jax.config import ConfigError
from dsv3_jax.interop.block_fp8 import BF16, E4M3, scale_rows
from dsv3_jax.interop.names import BLOCK, Tensor, scale_leaf
from dsv3_jax.interop.shard_writer import RowWriter
from dsv3_jax.interop.source import F16, F32, leaf_index, scale_index, widest
from dsv3_jax.orbax_store import ArraysWriter

Dtype = Literal["keep", "fp32", "bf16", "fp8"]
CHUNK_ELEMENTS = 2**23
"""Numbers in one chunk of our arrays, at most."""


@runtime_checkable
class Sink(Protocol):
    """Takes rows of tensors, in any order and from any thread."""

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The type it stores a tensor in."""
        ...

    def write(self, tensor: Tensor, start: int, rows: np.ndarray, scales: np.ndarray | None) -> None:
        """Store rows from ``start`` on, and of an FP8 tensor their blocks' scales."""
        ...

    def assume(self, tensor: Tensor, start: int, stop: int) -> None:
        """Rows that a stopped conversion has stored."""
        ...


def stored_dtype(tensor: Tensor, have: np.dtype, dtype: Dtype) -> np.dtype:
    """The type a tensor gets in a checkpoint of ``dtype``: matrices of FP8 Linears in FP8, the rest in bfloat16,
    selection biases in float32 whatever is asked for (spec 15.2)."""
    if dtype == "keep":
        return F32 if have == F16 else have
    if dtype == "fp32" or tensor.float32:
        return F32
    return E4M3 if dtype == "fp8" and tensor.fp8 else BF16


DtypeOf = Callable[[Tensor], np.dtype]
"""The type that a source has a tensor in."""


def file_entries(
    tensors: Sequence[Tensor], have: DtypeOf, dtype: Dtype
) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    """Name, type and shape of every tensor of a Hugging Face folder, each FP8 tensor followed by its scales."""
    for tensor in tensors:
        kind = stored_dtype(tensor, have(tensor), dtype)
        yield tensor.name, kind, tensor.shape
        if kind == E4M3:
            yield tensor.scale_name, F32, tensor.scale_shape


class FileSink:
    """A Hugging Face folder, of safetensors or of PyTorch's files."""

    def __init__(self, file: RowWriter, have: DtypeOf, dtype: Dtype):
        self._file, self._have = file, have
        self._dtype: Dtype = dtype

    def dtype(self, tensor: Tensor) -> np.dtype:
        """By :func:`stored_dtype`."""
        return stored_dtype(tensor, self._have(tensor), self._dtype)

    def write(self, tensor: Tensor, start: int, rows: np.ndarray, scales: np.ndarray | None) -> None:
        """By offset."""
        self._file.write_rows(tensor.name, start, rows)
        if scales is not None:
            self._file.write_rows(tensor.scale_name, start // BLOCK, scales)

    def assume(self, tensor: Tensor, start: int, stop: int) -> None:
        """The file then counts them as there."""
        self._file.assume_written(tensor.name, start, stop)
        if self.dtype(tensor) == E4M3:
            self._file.assume_written(tensor.scale_name, *scale_rows(start, stop))


def array_dtypes(tensors: Sequence[Tensor], have: DtypeOf, dtype: Dtype) -> dict[str, np.dtype]:
    """Type of each of our arrays: the narrowest that holds what its tensors are stored as.

    Raises:
        ConfigError: an array would be FP8 in part.
    """
    kinds: dict[str, set[np.dtype]] = {}
    for tensor in tensors:
        if not tensor.copy:
            kinds.setdefault(tensor.leaf, set()).add(stored_dtype(tensor, have(tensor), dtype))
    mixed = [leaf for leaf, found in kinds.items() if E4M3 in found and len(found) > 1]
    if mixed:
        raise ConfigError(f"--dtype keep: FP8 in part of the layers of {', '.join(mixed)}; choose --dtype bf16 or fp8")
    return {leaf: widest(found) for leaf, found in kinds.items()}


def array_layout(
    tensors: Sequence[Tensor],
    dtypes: Mapping[str, np.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    scale_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]]:
    """Shape, type and chunks of each array of a checkpoint, scales of FP8 arrays among them.

    A chunk is rows of one tensor of the published layout, so each slice of it is written as whole chunks; in FP8 whole
    blocks of them, so that their scales are whole chunks too.
    """
    layout: dict[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]] = {}
    for tensor in tensors:
        leaf = tensor.leaf
        if tensor.copy or leaf in layout:
            continue
        shape, kind, stacked = shapes[leaf], dtypes[leaf], len(tensor.index)
        width = tensor.columns[1] - tensor.columns[0]
        parts = shape[-1] // width if tensor.transposed else 1
        cut = -1 if tensor.transposed else stacked - len(shape)
        limit = CHUNK_ELEMENTS * kind.itemsize
        chunk = chunk_shape_for(shape, kind, stacked=stacked, cut=cut, parts=parts, limit_bytes=limit)
        if kind == E4M3:
            if chunk[-1] % BLOCK:
                chunk = (*chunk[:-1], width)
            scales = scale_shapes[scale_leaf(leaf)]
            piece = (*chunk[:stacked], scales[-2], math.ceil(chunk[-1] / BLOCK))
            layout[scale_leaf(leaf)] = (scales, F32, piece)
        layout[leaf] = (shape, kind, chunk)
    return layout


class ArraySink:
    """The arrays of one of our checkpoints."""

    def __init__(self, arrays: ArraysWriter, dtypes: Mapping[str, np.dtype]):
        self._arrays, self._dtypes = arrays, dtypes

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The array's type."""
        return self._dtypes[tensor.leaf]

    def write(self, tensor: Tensor, start: int, rows: np.ndarray, scales: np.ndarray | None) -> None:
        """As columns of the array, or as rows of what is not transposed."""
        stop = start + rows.shape[0]
        value = rows.T if tensor.transposed else rows
        self._arrays.write(tensor.leaf, leaf_index(tensor, start, stop), value)
        if scales is not None:
            self._arrays.write(scale_leaf(tensor.leaf), scale_index(tensor, start, stop), scales.T)

    def assume(self, tensor: Tensor, start: int, stop: int) -> None:
        """Nothing to do: the chunks themselves tell."""
