"""The table of forward passes alone, for evaluation."""

import dataclasses

import numpy as np

from sharding.pipeline.actions import BACKWARD, backward, forward
from sharding.pipeline.schedule import make_schedule
from sharding.pipeline.table import Col, Table, table


def forward_table(ranks: int, micro_batches: int, *, twice: bool = False) -> Table:
    """Each micro-batch forward through all stages, every rank a chunk at a time.

    Args:
        ranks: of the pipeline.
        micro_batches: any number.
        twice: ranks hold two stages of a V, as with ``dualpipev``.
    """
    if twice:
        schedule = make_schedule("dualpipev", ranks, max(micro_batches, 2 * ranks))
        order = [forward(chunk, i) for chunk in (0, 1) for i in range(micro_batches)]
        order += [backward(chunk, i) for chunk in (1, 0) for i in range(micro_batches)]
        schedule = dataclasses.replace(schedule, micro_batches=micro_batches, actions=(tuple(order),) * ranks)
    else:
        schedule = make_schedule("gpipe", ranks, micro_batches)
    whole = table(schedule)
    end = int(np.argmax(np.isin(whole.rows[..., Col.KIND], BACKWARD).any(axis=1)))
    return dataclasses.replace(whole, rows=whole.rows[:end], arrivals=whole.arrivals[:end])
