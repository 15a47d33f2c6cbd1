"""An Orbax checkpoint made slice by slice, in any order, going on after a kill."""

import json
import os
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

from dsv3_jax.checkpoint import CheckpointError
from dsv3_jax.chunks import Buffers, copy_into, write_file
from dsv3_jax.orbax_store.array_spec import ArraySpec, Index, file_name, with_all_dims

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_TOLD_FAULTS = 5


class ArraysWriter:
    """Creates a checkpoint of a flat dict of arrays, as Orbax writes it without OCDBT and uncompressed.

    Each write is whole chunks, so none is ever read back or left half written, and threads may write at the same time
    and in any order. Not an Orbax checkpoint until :meth:`finish`.

    Args:
        state_dir: the folder to make; it may exist if it is empty.
        arrays: shape, type and chunk shape by name, such as ``params/trunk/norm/scale``; no array without elements.
        resume: go on in the folder of a writer of the same arrays that did not finish.
        threads: how many chunks are in memory at a time; more threads wait.
        checksums: collect ``checksums``.

    Raises:
        CheckpointError: the folder is not empty, or (``resume``) has one of the arrays in another form.
        ValueError: a name or shape that cannot be written.
    """

    def __init__(
        self,
        state_dir: Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype | type, tuple[int, ...]]],
        *,
        resume: bool = False,
        threads: int = 2,
        checksums: bool = False,
    ):
        self._folder = state_dir.resolve()
        self._specs = {
            name: ArraySpec(tuple(shape), np.dtype(dtype), tuple(chunks))
            for name, (shape, dtype, chunks) in arrays.items()
        }
        _check_names(self._specs)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(self._folder.iterdir()):
            raise CheckpointError(f"{state_dir} is not empty: delete it, or go on with what is in it")
        context = ts.Context({"file_io_sync": False})
        opening = {
            name: ts.open(self._tensorstore(name, spec), context=context, open=resume, create=True)
            for name, spec in self._specs.items()
        }
        for name, future in opening.items():
            try:
                future.result()
            except (ValueError, OSError) as error:
                reason = str(error).split(" [")[0]
                raise CheckpointError(f"{state_dir} holds {name} in another form ({reason}): delete it") from error
        self._started = time.time_ns()
        self._buffers = Buffers(max(spec.chunk_bytes for spec in self._specs.values()), threads)
        self._keep_checksums = checksums
        self.checksums: dict[str, int] = {}
        """CRC-32 of each file of a chunk that this writer wrote, by its path in ``state_dir``."""
        self._lock = threading.Lock()
        self.bytes_written = 0
        """Bytes of arrays written."""

    def write(self, name: str, index: Index, value: np.ndarray) -> None:
        """Write a slice of whole chunks.

        Args:
            name: the array's.
            index: the slice: begins with a chunk, and ends with one or with the array.
            value: of the slice's shape and the array's type; strided in any way (a transpose is copied in tiles).

        Raises:
            KeyError, IndexError: no such array, or outside it.
            ValueError: part of a chunk, or another shape or type.
            OSError: the disk is full.
        """
        spec = self._specs[name]
        ranges = spec.ranges(index)
        for r, size, chunk in zip(ranges, spec.shape, spec.chunks, strict=True):
            if r.start % chunk or (r.stop % chunk and r.stop != size):
                raise ValueError(f"{name}: {index} is not whole chunks of {spec.chunks}")
        whole = with_all_dims(value, index)
        if whole.shape != tuple(map(len, ranges)) or value.dtype != spec.dtype:
            raise ValueError(f"{name}: {value.dtype}{list(value.shape)} given for {spec.dtype} at {index}")
        for number in spec.numbers(ranges):
            shared = spec.region(number, ranges)
            part = tuple(slice(low - r.start, high - r.start) for (low, high, _), r in zip(shared, ranges, strict=True))
            self._write_chunk(name, spec, number, whole[(*part, ...)])

    def _write_chunk(self, name: str, spec: ArraySpec, number: tuple[int, ...], value: np.ndarray) -> None:
        path = self._folder / name / file_name(number)
        with self._buffers.take() as buffer:
            chunk = np.ndarray(spec.chunks, spec.dtype, buffer)
            if value.shape != spec.chunks:
                chunk.view(np.uint8)[...] = 0
            copy_into(chunk[(*(slice(size) for size in value.shape), ...)], value)
            if self._keep_checksums:
                total = zlib.crc32(chunk.reshape(-1).view(np.uint8))
                with self._lock:
                    self.checksums[f"{name}/{path.name}"] = total
            del chunk
            write_file(path, buffer, spec.chunk_bytes)
        with self._lock:
            self.bytes_written += value.nbytes

    def has(self, name: str, index: Index = ()) -> bool:
        """Whether every chunk of a slice is there, from this writer or the one before a kill."""
        spec = self._specs[name]
        return all(self._is_there(name, spec, number) for number in spec.numbers(spec.ranges(index)))

    def finish(self) -> None:
        """Check that every chunk is there, sync the disk, and write what makes the folder an Orbax checkpoint.

        Raises:
            CheckpointError: chunks are missing or of the wrong size; tells how many, and names the first.
        """
        missing = [
            f"{name}/{file_name(number)}"
            for name, spec in self._specs.items()
            for number in spec.numbers(spec.ranges(()))
            if not self._is_there(name, spec, number)
        ]
        if missing:
            told = ", ".join(missing[:_TOLD_FAULTS]) + (", ..." if len(missing) > _TOLD_FAULTS else "")
            raise CheckpointError(f"{self._folder} lacks {len(missing)} chunks: {told}; write them first")
        for name in self._specs:
            for left_over in (self._folder / name).glob(".*.partial"):
                left_over.unlink()
        os.sync()
        (self._folder / "array_metadatas").mkdir(exist_ok=True)
        self._write_json("array_metadatas/process_0", {"array_metadatas": [*map(_array_metadata, *self._columns())]})
        self._write_json(
            "_METADATA",
            {
                "tree_metadata": {repr((name,)): _leaf(name, spec) for name, spec in self._specs.items()},
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
        )
        self._write_json(
            "_CHECKPOINT_METADATA",
            {
                "item_handlers": _HANDLER,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": self._started,
                "commit_timestamp_nsecs": time.time_ns(),
                "custom_metadata": {},
            },
        )
        os.sync()

    def _columns(self) -> tuple[list[str], list[ArraySpec]]:
        return list(self._specs), list(self._specs.values())

    def _is_there(self, name: str, spec: ArraySpec, number: tuple[int, ...]) -> bool:
        try:
            return (self._folder / name / file_name(number)).stat().st_size == spec.chunk_bytes
        except FileNotFoundError:
            return False

    def _write_json(self, name: str, content: dict) -> None:
        (self._folder / name).write_text(json.dumps(content), encoding="utf-8")

    def _tensorstore(self, name: str, spec: ArraySpec) -> dict:
        return {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self._folder / name)},
            "dtype": spec.dtype.name,
            "metadata": {"shape": spec.shape, "chunks": spec.chunks, "compressor": None, "order": "C"},
        }


def _leaf(name: str, spec: ArraySpec) -> dict:
    # As NumPy arrays, so that plain Orbax restores them on any devices without being told shardings.
    return {
        "key_metadata": [{"key": name, "key_type": 2}],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(spec.chunks)},
    }


def _array_metadata(name: str, spec: ArraySpec) -> dict:
    chunks = list(spec.chunks)
    told = {"param_name": name, "write_shape": chunks, "chunk_shape": chunks, "ext_metadata": None}
    return {"array_metadata": told}


def _check_names(specs: Mapping[str, ArraySpec]) -> None:
    folders = {name[:i] for name in specs for i, letter in enumerate(name) if letter == "/"}
    for name, spec in specs.items():
        if name in folders or name.startswith("_") or any(p == "" or p.startswith(".") for p in name.split("/")):
            raise ValueError(f"an array cannot be called {name!r}: it would stand in another's way")
        if 0 in spec.shape or 0 in spec.chunks or len(spec.shape) != len(spec.chunks):
            raise ValueError(f"{name}: shape {spec.shape} in chunks of {spec.chunks}")
    if not specs:
        raise ValueError("no arrays")
