"""The endless stream of training rows: a grain pipeline whose state is saved and restored exactly.

Documents are dealt into a fixed number of shards. Each shard is a grain pipeline of its own: shuffle with another seed
every epoch, take windows of documents, repeat, make the rows of a window (in threads, ahead of need), hand them out one
by one. Row k of the global stream is the next row of shard ``k % shards``, so the stream is the same for any number of
processes; process p of P owns the rows ``k % P == p``, which are those of the shards ``s % P == p``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Int64

from dsv3_jax.config import ConfigError
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.rows import RowMaker


class _RowsOfWindows(grain.IterDataset):
    """Hands out the rows of a parent's windows one by one."""

    def __iter__(self) -> "_RowIterator":
        return _RowIterator(self._parent.__iter__())


class _RowIterator(grain.DatasetIterator):
    """Its state is the parent's before the current window, and the next row's place in that window."""

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._window: np.ndarray | None = None
        self._row = 0
        self._before = parent.get_state()

    def __next__(self) -> np.ndarray:
        window = self._window
        if window is None:
            self._before = self._parent.get_state()
            self._window = window = next(self._parent)
        row = window[self._row]
        self._row += 1
        if self._row == len(window):
            self._window, self._row, self._before = None, 0, self._parent.get_state()
        return row

    def get_state(self) -> dict[str, Any]:
        return {"windows": self._before, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before, self._row, self._window = state["windows"], state["row"], None
        self._parent.set_state(state["windows"])


def shard_dataset(
    corpus: Corpus,
    documents: Int64[np.ndarray, " documents"],
    maker: RowMaker,
    shard: int,
    window: int,
    workers: int,
    windows_ahead: int,
) -> grain.IterDataset:
    """Endless rows, int32 [width], of one shard's documents.

    Args:
        corpus: where texts are read.
        documents: of this shard, by their number in the corpus.
        maker: turns texts into rows.
        shard: number of the shard, which seeds its order.
        window: documents packed together.
        workers: threads; 0 makes windows when they are asked for. Rows do not depend on it.
        windows_ahead: windows kept ready.
    """
    windows = math.ceil(len(documents) / window)
    order_seed = int(np.random.SeedSequence([maker.seed, shard]).generate_state(1)[0])

    def make(index: int, chosen: Sequence[int]) -> Int32[np.ndarray, "rows width"]:
        epoch, place = divmod(int(index), windows)
        numbers = [int(documents[position]) for position in chosen]
        return maker.rows(corpus.texts(numbers), numbers, epoch, place, shard)

    return _RowsOfWindows(
        grain.MapDataset.range(len(documents))
        .shuffle(seed=order_seed)
        .batch(window, batch_fn=list)
        .repeat()
        .map_with_index(make)
        .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=windows_ahead if workers else 0))
    )


class RowStream:
    """Training rows of this process, from where ``state`` left off. Not to be shared by threads."""

    def __init__(
        self,
        datasets: Mapping[int, grain.IterDataset],
        shards: int,
        width: int,
        process_index: int,
        process_count: int,
        fingerprint: str,
        state: Mapping[str, Any] | None = None,
    ):
        """From the datasets of this process's shards; see :meth:`dsv3_jax.data.loader.Data.train_rows`."""
        self._shards, self._width = shards, width
        self._index, self._count = process_index, process_count
        self._fingerprint = fingerprint
        self._position = 0
        self._iterators: dict[int, Any] = {shard: iter(dataset) for shard, dataset in datasets.items()}
        if state is not None:
            self._restore(state)
        for iterator in self._iterators.values():
            iterator.start_prefetch()

    def take(self, n: int) -> Int32[np.ndarray, "share {self._width}"]:
        """This process's share of the next ``n`` rows of the global stream, in order.

        Raises:
            ValueError: ``n`` is not a multiple of the process count.
        """
        if n % self._count:
            raise ValueError(f"{n} rows cannot be shared evenly by {self._count} processes")
        first = self._position + (self._index - self._position) % self._count
        places = range(first, self._position + n, self._count)
        rows = np.empty((len(places), self._width), np.int32)
        for row, place in zip(rows, places, strict=True):
            row[:] = next(self._iterators[place % self._shards])
        self._position += n
        return rows

    def state(self) -> dict[str, Any]:
        """What :meth:`Data.train_rows` needs to go on with exactly the following rows; JSON can hold it.

        With several processes each has the state of its own shards; :func:`merge_states` joins them.
        """
        return {
            "fingerprint": self._fingerprint,
            "position": self._position,
            "shards": {str(shard): iterator.get_state() for shard, iterator in self._iterators.items()},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self._fingerprint:
            raise ConfigError(
                "data.source: its documents, the tokenizer or a [data] setting are not those that the saved state was "
                "made with; put them back, or start in another folder"
            )
        missing = [shard for shard in self._iterators if str(shard) not in state["shards"]]
        if missing:
            raise ConfigError(
                f"the saved data state lacks shards {', '.join(map(str, missing))}: it is one process's own; resume "
                "with as many processes as saved it"
            )
        self._position = int(state["position"])
        for shard, iterator in self._iterators.items():
            iterator.set_state(state["shards"][str(shard)])

    def close(self) -> None:
        """Stop the threads. No rows can be taken afterwards."""
        for iterator in self._iterators.values():
            iterator.close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of every process's, from which any number of processes that divides the shards can go on.

    Raises:
        ValueError: the states are of different moments or different data.
    """
    if len({(state["fingerprint"], state["position"]) for state in states}) != 1:
        raise ValueError("data states of different moments or different data cannot be merged")
    merged = dict(states[0])
    merged["shards"] = {shard: value for state in states for shard, value in state["shards"].items()}
    return merged
