"""Slices out of any Orbax checkpoint of arrays."""

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsv3_jax.checkpoint import CheckpointError
from dsv3_jax.chunks import Buffers, copy_into, read_file
from dsv3_jax.orbax_store.array_spec import ArraySpec, Index, file_name, with_all_dims


class ArraysReader:
    """The arrays of an Orbax PyTree checkpoint, by slice. Threads may read at the same time.

    Uncompressed chunks that are files of their own are read past the page cache through ``threads`` buffers of a chunk
    each; anything else through tensorstore, which holds a few copies of a chunk for each read under way and
    ``cache_bytes`` of those before.

    Raises:
        CheckpointError: there is no such checkpoint, or an array of it cannot be opened.
    """

    def __init__(self, state_dir: Path, *, threads: int = 2, cache_bytes: int = 0):
        self._folder = state_dir.resolve()
        try:
            told = json.loads((self._folder / "_METADATA").read_text(encoding="utf-8"))
            tree = told["tree_metadata"].values()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{state_dir} is not an Orbax checkpoint of arrays: no _METADATA in it") from error
        self._ocdbt = (self._folder / "manifest.ocdbt").exists()
        self._complete = told.get("store_array_data_equal_to_fill_value", False)
        self._driver = "zarr3" if told.get("use_zarr3") else "zarr"
        limit = {"limit": threads}
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "file_io_concurrency": limit,
                "data_copy_concurrency": limit,
            }
        )
        self._stored, opening = {}, {}
        for leaf in tree:
            value = leaf["value_metadata"]
            keys = [str(entry["key"]) for entry in leaf["key_metadata"]]
            if not value.get("skip_deserialize") and value["value_type"] != "string":
                name, stored = "/".join(keys), ".".join(keys)
                self._stored[name], opening[name] = stored, ts.open(self._spec(stored), context=context, read=True)
        self._stores: dict[str, ts.TensorStore] = {}
        for name, future in opening.items():
            with self._faults(name):
                self._stores[name] = future.result()
        self._specs = {
            name: ArraySpec(
                store.shape,
                store.dtype.numpy_dtype,
                tuple(size or 1 for size in store.chunk_layout.read_chunk.shape or ()),
            )
            for name, store in self._stores.items()
        }
        self._plain = {name for name, store in self._stores.items() if self._complete and self._is_plain(store)}
        largest = max((self._specs[name].chunk_bytes for name in self._plain), default=0)
        self._buffers = Buffers(largest, threads)
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Bytes of arrays handed out."""

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each array, by its keys joined by "/"."""
        return {name: (spec.shape, spec.dtype) for name, spec in self._specs.items()}

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """What a read of any element of a chunk may decode at once; slices of whole chunks cost least."""
        return self._specs[name].chunks

    def read(self, name: str, index: Index = (), out: np.ndarray | None = None) -> np.ndarray:
        """A slice of an array, into ``out`` where given: of the slice's shape and type, strided in any way.

        Raises:
            CheckpointError: a chunk is missing or of the wrong size; names the array and the chunk.
            KeyError, IndexError: no such array, or outside it.
            ValueError: ``out`` has another shape or type.
        """
        spec = self._specs[name]
        ranges = spec.ranges(index)
        shape = tuple(len(r) for i, r in enumerate(ranges) if i >= len(index) or isinstance(index[i], slice))
        result = np.empty(shape, spec.dtype) if out is None else out
        if result.shape != shape or result.dtype != spec.dtype:
            raise ValueError(f"{name}: out is {result.dtype}{list(result.shape)}, not {spec.dtype}{list(shape)}")
        whole = with_all_dims(result, index)
        with self._faults(name):
            read_chunk = self._read_file if name in self._plain else self._read_decoded
            for number in spec.numbers(ranges):
                shared = spec.region(number, ranges)
                into = tuple(
                    slice(low - r.start, high - r.start) for (low, high, _), r in zip(shared, ranges, strict=True)
                )
                read_chunk(name, spec, number, shared, whole[(*into, ...)])
        with self._lock:
            self.bytes_read += result.nbytes
        return result

    def _read_decoded(
        self, name: str, spec: ArraySpec, number: tuple[int, ...], shared: list[tuple[int, int, int]], into: np.ndarray
    ) -> None:
        domain = tuple(slice(low, high) for low, high, _ in shared)
        copy_into(into, np.asarray(self._stores[name][domain].read().result()))

    def _read_file(
        self, name: str, spec: ArraySpec, number: tuple[int, ...], shared: list[tuple[int, int, int]], into: np.ndarray
    ) -> None:
        path = self._folder / self._stored[name] / file_name(number)
        if path.stat().st_size != spec.chunk_bytes:
            raise OSError(f"chunk {path.name} has {path.stat().st_size} bytes where {spec.chunk_bytes} belong")
        strides = [math.prod(spec.chunks[i + 1 :]) * spec.dtype.itemsize for i in range(len(spec.chunks))]
        start = sum((low - base) * stride for (low, _, base), stride in zip(shared, strides, strict=True))
        last = sum((high - 1 - base) * stride for (_, high, base), stride in zip(shared, strides, strict=True))
        with self._buffers.take() as buffer:
            offset = read_file(path, buffer, start, last + spec.dtype.itemsize)
            found = np.ndarray([high - low for low, high, _ in shared], spec.dtype, buffer, offset, strides)
            copy_into(into, found)
            del found

    def _spec(self, stored: str) -> dict[str, Any]:
        files = {"driver": "file", "path": str(self._folder)}
        where = (
            {"driver": "ocdbt", "base": files, "path": stored}
            if self._ocdbt
            else files | {"path": str(self._folder / stored)}
        )
        return {
            "driver": self._driver,
            "kvstore": where,
            "fill_missing_data_reads": not self._complete,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }

    def _is_plain(self, store: ts.TensorStore) -> bool:
        """Whether each chunk is a file that holds just its elements, in C order, under our own name for it."""
        if self._ocdbt or self._driver != "zarr":
            return False
        told = store.spec().to_json()["metadata"]
        return (
            (told["compressor"], told["filters"], told["order"]) == (None, None, "C")
            and told.get("dimension_separator", ".") == "."
            and not str(told["dtype"]).startswith(">")
        )

    @contextlib.contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            chunk = Path(error.filename or "").name
            raise CheckpointError(f"{self._folder} is damaged: array {name} lacks its chunk {chunk}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._folder} is damaged: array {name}: {str(error).split(' [')[0]}") from error
