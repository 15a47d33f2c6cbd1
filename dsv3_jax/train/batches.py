"""A run's batches, sent to the devices a step ahead."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import Config
from dsv3_jax.data import RowStream
from dsv3_jax.train import schedule
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import Batch, TrainStep


class Batches:
    """Takes a stream's rows for one step after the other; while a step runs, the next one's are on the devices.

    Args:
        config: the run.
        stream: where the run goes on.
        step: places the rows.
        pad_id: of the tokenizer.
    """

    def __init__(self, config: Config, stream: RowStream, step: TrainStep, pad_id: int):
        self._config, self._stream, self._step, self._pad_id = config, stream, step, pad_id
        self._ahead: Batch | None = None
        self._position: dict[str, Any] | None = None

    def take(self, state: TrainState, *, last: bool) -> Batch:
        """The batch of the step after ``state``; unless it is the ``last``, the next one's is sent, too.

        Raises:
            ConfigError: as :meth:`~dsv3_jax.train.step.TrainStep.place`.
        """
        batch = self._ahead or self._placed(state.step + 1, state.tokens)
        self._position, self._ahead = None, None
        if not last:
            self._position = self._stream.state()
            self._ahead = self._placed(batch.step + 1, batch.seen)
        return batch

    def position(self) -> dict[str, Any]:
        """The stream's state behind the last batch that was taken: one that waits on the devices does not count."""
        return self._stream.state() if self._position is None else self._position

    def _placed(self, step: int, tokens: int) -> Batch:
        rows = self._stream.take(schedule.batch_size(self._config, tokens))
        return self._step.place(without_padding(rows, self._pad_id), step, tokens)


def without_padding(rows: Int32[np.ndarray, "n T1"], pad_id: int) -> Int32[np.ndarray, "n T1"]:
    """Rows as the step takes them: padding is negative, so that no token of the vocabulary stands for it."""
    return np.where(rows == pad_id, np.int32(-1), rows)
