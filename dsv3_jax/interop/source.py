"""Where weights come from: rows of tensors in the published orientation, [out, in], whatever holds them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.block_fp8 import BF16, E4M3, scale_rows
from dsv3_jax.interop.names import IGNORED_ENDINGS, Tensor, scale_leaf
from dsv3_jax.interop.tensor_io import WeightsError, WeightsFolder
from dsv3_jax.orbax_store import ArraysReader

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
_READABLE = (F32, BF16, F16, E4M3)


@runtime_checkable
class Source(Protocol):
    """Rows of tensors, as stored."""

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The type a tensor is stored in."""
        ...

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [rows, in], in :meth:`dtype`."""
        ...

    def scales(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Scales of the blocks that these rows of an FP8 tensor belong to; ``start`` is a multiple of 128."""
        ...


class HFSource:
    """A Hugging Face folder, checked against the configuration before anything is read.

    Raises:
        WeightsError: tensors are missing, unexpected, or of another shape or type; names all of them.
    """

    def __init__(self, folder: WeightsFolder, wanted: Sequence[Tensor], config: ModelConfig):
        self._folder = folder
        self.wanted, self.skipped = _present(folder.tensors, wanted, config)
        """Tensors to read, and the MTP layers' that a folder without MTP does not have."""
        _check(folder.tensors, self.wanted, config)

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The type in the file."""
        return self._folder.tensors[tensor.name].dtype

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Read by offset."""
        return self._folder.read_rows(tensor.name, start, stop)

    def scales(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Rows of ``weight_scale_inv``."""
        return self._folder.read_rows(tensor.scale_name, *scale_rows(start, stop))

    def block(self, tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int] | None) -> np.ndarray:
        """Rows of a vector, or rows and columns of a matrix; nothing else is read."""
        if columns is None:
            return self._folder.read_rows(tensor.name, *rows)
        return self._folder.read_block(tensor.name, rows, columns)

    def scale_block(self, tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int] | None) -> np.ndarray:
        """Rows and columns of ``weight_scale_inv``, counted in blocks."""
        assert columns is not None
        return self._folder.read_block(tensor.scale_name, rows, columns)


def _present(
    there: Mapping[str, Any], wanted: Sequence[Tensor], config: ModelConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Without the copies that are not there, and without MTP layers of which nothing is."""
    prefixes = [f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)]
    absent = tuple(prefix for prefix in prefixes if not any(name.startswith(prefix) for name in there))
    skipped = [t for t in wanted if absent and t.name.startswith(absent)]
    gone = {t.name for t in skipped} | {t.name for t in wanted if t.copy and t.name not in there}
    return [t for t in wanted if t.name not in gone], skipped


def _check(there: Mapping[str, Any], wanted: Iterable[Tensor], config: ModelConfig) -> None:
    missing, shapes, types = [], [], []
    expected = set()
    for tensor in wanted:
        expected.add(tensor.name)
        entry = there.get(tensor.name)
        if entry is None:
            missing.append(tensor.name)
            continue
        if tuple(entry.shape) != tensor.shape:
            shapes.append(f"{tensor.name} is {list(entry.shape)}, config.json says {list(tensor.shape)}")
        if entry.dtype not in _READABLE:
            types.append(f"{tensor.name} is {entry.dtype}")
        if entry.dtype == E4M3:
            expected.add(tensor.scale_name)
            scale = there.get(tensor.scale_name)
            if len(tensor.shape) != 2:
                types.append(f"{tensor.name} is FP8, which only matrices may be")
            elif scale is None:
                missing.append(tensor.scale_name)
            elif tuple(scale.shape) != tensor.scale_shape:
                shapes.append(f"{tensor.scale_name} is {list(scale.shape)}, not {list(tensor.scale_shape)}")
            elif scale.dtype != F32:
                types.append(f"{tensor.scale_name} is {scale.dtype}, not float32")
    if config.tie_word_embeddings:
        expected.add("lm_head.weight")
    unexpected = [name for name in there if name not in expected and not name.endswith(IGNORED_ENDINGS)]
    faults = [
        f"{len(names)} {what}: {', '.join(collapse(names))}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of a type that is not read (float32, bfloat16, float16, float8_e4m3fn are)", types),
        )
        if names
    ]
    if faults:
        raise WeightsError(f"these weights are not those of their config.json; tensors {'; '.join(faults)}")


def collapse(names: Iterable[str]) -> list[str]:
    """Names with the numbers of experts that differ in nothing else drawn together: ``experts.{0-255}.down_proj``."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.match(r"(.*\bexperts\.)(\d+)(\..*)$", name)
        key, number = ((found[1], found[3]), int(found[2])) if found else ((name, ""), -1)
        grouped.setdefault(key, []).append(number)
    return [
        before + ("" if numbers == [-1] else _ranges(numbers)) + after for (before, after), numbers in grouped.items()
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


class OrbaxSource:
    """One of our checkpoints' arrays; ``ema`` reads the moving average in place of the parameters.

    Raises:
        WeightsError: arrays are missing or of another shape; names all of them.
    """

    def __init__(self, arrays: ArraysReader, shapes: Mapping[str, tuple[int, ...]], *, ema: bool = False):
        self._arrays, self._root = arrays, "ema" if ema else "params"
        faults = []
        for leaf, shape in shapes.items():
            found = arrays.arrays.get(self.place(leaf))
            if found is None or tuple(found[0]) != shape:
                faults.append(f"{self.place(leaf)} {'missing' if found is None else list(found[0])}")
        if faults:
            raise WeightsError(f"the checkpoint does not hold what its config.toml says: {', '.join(faults)}")

    def place(self, leaf: str) -> str:
        """The array that a leaf is read from."""
        return leaf.replace("params/", f"{self._root}/", 1) if leaf.startswith("params/") else leaf

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The array's type."""
        return np.dtype(self._arrays.arrays[self.place(tensor.leaf)][1])

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """A slice of the array, turned to [rows, in]."""
        found = self._arrays.read(self.place(tensor.leaf), leaf_index(tensor, start, stop))
        return np.ascontiguousarray(found.T) if tensor.transposed else found

    def scales(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """A slice of the scales' array, turned to [row blocks, in blocks]."""
        return np.ascontiguousarray(self._arrays.read(scale_leaf(tensor.leaf), scale_index(tensor, start, stop)).T)


class TreeSource:
    """Arrays in memory, by path; slices are brought to the host one at a time."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The array's type."""
        return np.dtype(self._leaves[tensor.leaf].dtype)

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """A slice of the array, turned to [rows, in]."""
        found = np.asarray(self._leaves[tensor.leaf][leaf_index(tensor, start, stop)])
        return np.ascontiguousarray(found.T) if tensor.transposed else found

    def scales(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """A slice of the scales' array, turned to [row blocks, in blocks]."""
        return np.ascontiguousarray(
            np.asarray(self._leaves[scale_leaf(tensor.leaf)][scale_index(tensor, start, stop)]).T
        )


def leaf_index(tensor: Tensor, start: int, stop: int) -> tuple[int | slice, ...]:
    """Where rows of a tensor are in our array."""
    if not tensor.transposed:
        return (*tensor.index, slice(start, stop))
    first = tensor.columns[0]
    return (*tensor.index, slice(None), slice(first + start, first + stop))


def scale_index(tensor: Tensor, start: int, stop: int) -> tuple[int | slice, ...]:
    """Where the scales of these rows are in our scales' array: blocks of gate before blocks of up."""
    before = tensor.part * tensor.scale_shape[0]
    first, last = scale_rows(start, stop)
    return (*tensor.index, slice(None), slice(before + first, before + last))


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type that holds all of these exactly."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return BF16 if found <= {BF16, E4M3} and E4M3 not in found else F32
