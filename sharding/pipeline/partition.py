"""Which layers each stage of a pipeline has, and where a rank keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Partition:
    """Layers dealt out to stages, in order. A rank's slots are [chunks, slots]; an empty slot's layer is -1."""

    counts: tuple[int, ...]
    """Layers of each stage."""
    stage_of: tuple[tuple[int, ...], ...]
    """The stage of each chunk, by rank: see :class:`~sharding.pipeline.schedule.Schedule`."""

    @property
    def slots(self) -> int:
        """Layers of the largest stage."""
        return max(self.counts)

    @property
    def stored(self) -> int:
        """Chunks that a rank keeps: of stages that two ranks hold, each rank keeps the one of its own number."""
        return len(self.counts) // len(self.stage_of)

    @property
    def held(self) -> np.ndarray:
        """int32 [ranks, chunks, slots]: the layer in each slot that a rank computes with."""
        first = np.cumsum((0, *self.counts))
        found = np.full((len(self.stage_of), len(self.stage_of[0]), self.slots), -1, np.int32)
        for rank, stages in enumerate(self.stage_of):
            for chunk, stage in enumerate(stages):
                found[rank, chunk, : self.counts[stage]] = first[stage] + np.arange(self.counts[stage])
        return found

    @property
    def kept(self) -> np.ndarray:
        """int32 [ranks * stored * slots]: the layer in each slot of the stored state."""
        return self.held[:, : self.stored].reshape(-1)


def deal(layers: int, stages: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """How many of ``layers`` each stage has: as even as whole layers allow, and none more than that.

    Args:
        layers: of one kind, in one cost.
        stages: of the pipeline.
        first: what else the first stage computes, in layers.
        last: what else the last stage computes, in layers.
    """
    most = -(-layers // stages)
    counts, load = [0] * stages, [0.0] * stages
    load[0], load[-1] = load[0] + first, load[-1] + last
    for _ in range(layers):
        stage = min((load[i], i) for i in range(stages) if counts[i] < most)[1]
        counts[stage], load[stage] = counts[stage] + 1, load[stage] + 1
    return tuple(counts)


def make_partition(counts: Sequence[int], ranks: int, *, chunks: int) -> Partition:
    """A partition for schedules with that many chunks a rank: the second chunk mirrors the first.

    Raises:
        ValueError: the stages are neither as many as ranks nor twice as many.
    """
    stages = len(counts)
    if stages not in (ranks, 2 * ranks) or (chunks == 1 and stages != ranks):
        raise ValueError(f"{stages} stages do not lie on {ranks} ranks with {chunks} chunks each")
    return Partition(tuple(counts), tuple((rank, stages - 1 - rank)[:chunks] for rank in range(ranks)))
