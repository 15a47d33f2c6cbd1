"""Runs a plan on the device: rounds its shapes up to a few, so that a few programs serve all, and keeps the memory."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.inference import programs
from dsv3_jax.inference import sequence as requests
from dsv3_jax.inference.pages import empty_pages
from dsv3_jax.inference.programs import History, Rows, Written
from dsv3_jax.inference.sampler import Settings
from dsv3_jax.inference.scheduler import Chunk
from dsv3_jax.inference.speculation import no_drafts
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.mla import AttentionForm

_FEWEST_TOKENS = 32
_SHORT = 256
"""Tokens up to which all sequences are treated as equally long by the program that reads."""
_SHORT_WRITING = 1024
"""By the one that writes: it reads latents as they are, and on a GPU only those that there are."""
_STEP = 4
"""Each bucket is so many times the one below it."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What decides which programs there are."""

    least_batch: int
    max_batch: int
    max_pages: int
    """Pages of the longest sequence."""
    page_size: int
    chunk: int
    """Tokens of a prompt that are read at a time."""
    turns: int
    drafts: int
    form: AttentionForm
    dtype: np.dtype

    @property
    def batches(self) -> list[int]:
        """Sizes that a batch is rounded up to."""
        return buckets(self.least_batch, self.max_batch)

    @property
    def tables(self) -> list[int]:
        """Sizes that a table of pages is rounded up to for reading."""
        return buckets(max(1, _SHORT // self.page_size), self.max_pages)

    @property
    def writing_tables(self) -> list[int]:
        """Sizes that it is rounded up to for writing."""
        return buckets(max(1, _SHORT_WRITING // self.page_size), self.max_pages)

    @property
    def chunks(self) -> list[int]:
        """Sizes that a chunk is rounded up to."""
        return buckets(_FEWEST_TOKENS, self.chunk)


def buckets(least: int, most: int) -> list[int]:
    """``least``, four times that, and so on; ``most`` at the end."""
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(found[-1] * _STEP, most))
    return found


def fitting(sizes: Sequence[int], wanted: int) -> int:
    """The smallest of ``sizes`` that holds ``wanted``."""
    return next(size for size in sizes if size >= wanted)


class Runner:
    """A model on its device, the pages of its cache, and what was drafted for each slot."""

    def __init__(self, model: DeepSeekV3, shapes: Shapes, pages: int, *, fp8_cache: bool):
        self.config, self.shapes = model.config, shapes
        self.graph, self.state = nnx.split(model)
        self.pages = empty_pages(
            model.config, pages, shapes.page_size, shapes.dtype, fp8=fp8_cache, drafting=shapes.drafts > 0
        )
        # One more row than slots, for rows that pad a batch.
        self.drafts = no_drafts(shapes.max_batch + 1, shapes.drafts, model.config.vocab_size)

    def read(self, chunks: Iterable[Chunk]) -> None:
        """Read chunks of prompts into their pages, those of one size side by side."""
        by_size: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            by_size.setdefault(fitting(self.shapes.chunks, chunk.stop - chunk.start), []).append(chunk)
        for size, group in by_size.items():
            batch = fitting(self.shapes.batches, len(group))
            tokens = np.zeros((batch, size + 1), np.int32)
            start = np.zeros(batch, np.int32)
            for row, chunk in enumerate(group):
                piece = chunk.sequence.tokens[chunk.start : min(chunk.start + size, chunk.stop) + 1]
                tokens[row, : len(piece)] = piece
                start[row] = chunk.start
            table = _table([chunk.sequence for chunk in group], batch, self.shapes.tables)
            self._read(tokens, start, table)

    def write(self, sequences: Sequence[requests.Sequence], turns: int) -> Written:
        """Let every sequence write; arrays come back on the host, a row for each."""
        batch = fitting(self.shapes.batches, len(sequences))
        rows, settings = _rows(sequences, batch, self.shapes.max_batch)
        history = None
        if any(sequence.sampling.penalized for sequence in sequences):
            history = _history(sequences, batch, self.shapes)
        telling = any(sequence.sampling.logprobs is not None for sequence in sequences)
        table = _table(sequences, batch, self.shapes.writing_tables)
        return self._write(table, rows, settings, history, telling, turns)

    def compile(self) -> int:
        """Compile every program that requests without penalties and log-probabilities come to need; how many."""
        count = 0
        for batch in self.shapes.batches:
            rows, settings = _rows([], batch, self.shapes.max_batch)
            warm = settings._replace(temperature=settings.temperature + 1)
            for width in self.shapes.writing_tables:
                for chosen in (settings, warm):
                    self._write(np.zeros((batch, width), np.int32), rows, chosen, None, False, 0)
                    count += 1
            for width in self.shapes.tables:
                table = np.zeros((batch, width), np.int32)
                for size in self.shapes.chunks:
                    self._read(np.zeros((batch, size + 1), np.int32), np.zeros(batch, np.int32), table)
                    count += 1
        return count

    def save_drafts(self, slot: int) -> tuple[jax.Array, ...]:
        """What was drafted for a slot."""
        return _take(self.drafts, np.int32(slot))

    def restore_drafts(self, slot: int, saved: tuple[jax.Array, ...]) -> None:
        """Put it into another one."""
        self.drafts = _place(self.drafts, np.int32(slot), saved)

    def _read(self, tokens: np.ndarray, start: np.ndarray, table: np.ndarray) -> None:
        shapes = self.shapes
        self.pages = programs.read(
            self.state,
            self.pages,
            table,
            tokens,
            start,
            graph=self.graph,
            dtype=shapes.dtype,
            form="naive",
            drafting=shapes.drafts > 0,
        )

    def _write(
        self,
        table: np.ndarray,
        rows: Rows,
        settings: Settings,
        history: History | None,
        telling: bool,
        turns: int,
    ) -> Written:
        shapes = self.shapes
        self.pages, self.drafts, written = programs.write(
            self.state,
            self.pages,
            self.drafts,
            table,
            rows,
            settings,
            history,
            np.int32(turns),
            graph=self.graph,
            dtype=shapes.dtype,
            form=shapes.form,
            most=shapes.turns,
            drawing=bool(np.any(settings.temperature > 0)),
            telling=telling,
        )
        return cast(Written, jax.device_get(written))


def _table(sequences: Sequence[requests.Sequence], batch: int, sizes: Sequence[int]) -> np.ndarray:
    widest = max(len(sequence.pages) for sequence in sequences)
    table = np.zeros((batch, fitting(sizes, widest)), np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    return table


class _Row(NamedTuple):
    """One line of :class:`Rows` and of :class:`Settings`."""

    place: tuple[int, int, int, int, int, bool]
    stop: tuple[int, ...]
    chosen: tuple[float, float, int, float, int, int]


def _rows(sequences: Sequence[requests.Sequence], batch: int, spare_slot: int) -> tuple[Rows, Settings]:
    lines = []
    for item in sequences:
        how, length = item.sampling, len(item.tokens)
        place = (item.tokens[-1], length, item.end, length - len(item.prompt), item.slot, item.fresh)
        chosen = (how.temperature, how.top_p, how.top_k, how.min_p, how.seed, how.choice)
        lines.append(_Row(place, item.stop_tokens, chosen))
    lines += [_Row((0, 1, 1, 0, spare_slot, True), (), (0.0, 1.0, 0, 0.0, 0, 0))] * (batch - len(lines))
    stop = np.full((batch, requests.MOST_STOP_TOKENS), -1, np.int32)
    for row, line in enumerate(lines):
        stop[row, : len(line.stop)] = line.stop
    int32, float32 = np.int32, np.float32
    places = _columns([line.place for line in lines], (*(int32,) * 5, bool))
    chosen = _columns([line.chosen for line in lines], (float32, float32, int32, float32, np.uint32, int32))
    return Rows(*places, stop=cast(Any, stop)), Settings(*chosen)


def _columns(lines: Sequence[Sequence[Any]], kinds: Sequence[Any]) -> list[Any]:
    return [np.array(column, kind) for column, kind in zip(zip(*lines, strict=True), kinds, strict=True)]


def _history(sequences: Sequence[requests.Sequence], batch: int, shapes: Shapes) -> History:
    size = fitting(shapes.writing_tables, max(len(sequence.pages) for sequence in sequences)) * shapes.page_size
    tokens = np.zeros((batch, size), np.int32)
    prompt = np.zeros(batch, np.int32)
    chosen = np.tile(np.array([0, 0, 1], np.float32), (batch, 1))
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
        prompt[row] = len(sequence.prompt)
        how = sequence.sampling
        chosen[row] = how.presence_penalty, how.frequency_penalty, how.repetition_penalty
    return History(*cast(Any, (tokens, prompt, *chosen.T.copy())))


@jax.jit
def _take(drafts: programs.Drafts, slot: Int[Array, ""]) -> tuple[jax.Array, ...]:
    return tuple(leaf[slot] for leaf in drafts)


@functools.partial(jax.jit, donate_argnums=0)
def _place(drafts: programs.Drafts, slot: Int[Array, ""], saved: tuple[jax.Array, ...]) -> programs.Drafts:
    return programs.Drafts(*(leaf.at[slot].set(row) for leaf, row in zip(drafts, saved, strict=True)))
