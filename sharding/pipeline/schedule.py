"""Schedules: for each rank the ordered list of what it does in one optimizer step, made by pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from sharding.pipeline.actions import Action, Kind
from sharding.pipeline.one_way import gpipe, one_f_one_b, zb1p
from sharding.pipeline.two_way import dualpipe, dualpipev
from sharding.pipeline.waiting import UNBOUNDED, bounded

__all__ = ["NAMES", "Action", "Kind", "Name", "Schedule", "make_schedule", "supported"]

Name = Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]
NAMES: tuple[Name, ...] = get_args(Name)

_ORDERS: dict[str, Callable[[int, int, int], list[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.

    Chunk 0 of the ranks passes activations to the next rank and gradients to the previous one; chunk 1, where there is
    one, the other way round. Micro-batches are numbered over the whole step: with ``dualpipe`` those from
    ``micro_batches // 2`` on go through chunk 1 of every rank, the others through chunk 0; with ``dualpipev`` each goes
    through both.
    """

    name: Name
    ranks: int
    micro_batches: int
    chunks: int
    """Model chunks that a rank holds."""
    stage_of: tuple[tuple[int, ...], ...]
    """The stage of the model that a chunk is, by rank and chunk. ``dualpipe`` has every stage twice."""
    n_stages: int
    actions: tuple[tuple[Action, ...], ...]
    """By rank."""
    waiting: int = UNBOUNDED
    """Most passes of a rank whose weight gradients may wait at one time; see :func:`bounded`."""

    def chunk_of(self, stage: int, micro: int) -> tuple[int, int]:
        """Rank and chunk that a micro-batch meets a stage on."""
        chunk = 0
        if self.name == "dualpipe":
            chunk = int(micro >= self.micro_batches // 2)
        elif self.name == "dualpipev":
            chunk = int(stage >= self.ranks)
        return (stage if chunk == 0 else self.stage_of[0][1] - stage), chunk


def supported(name: str, ranks: int, micro_batches: int, waiting: int = UNBOUNDED) -> str:
    """Why a schedule cannot be made, in one line; empty where it can."""
    if name not in NAMES:
        return f"schedule {name!r} is not known; there is {', '.join(NAMES)}"
    if ranks < 1 or micro_batches < 1:
        return f"{name} needs one rank and one micro-batch at least, not {ranks} and {micro_batches}"
    if name == "dualpipe" and ranks % 2:
        return f"dualpipe needs an even number of ranks, not {ranks}: micro-batches enter at both ends"
    if name == "dualpipe" and micro_batches % 2:
        return f"dualpipe needs an even number of micro-batches, not {micro_batches}: half of them from each end"
    if name in ("dualpipe", "dualpipev") and micro_batches < 2 * ranks:
        return f"{name} on {ranks} ranks needs {2 * ranks} micro-batches at least, not {micro_batches}"
    if waiting < UNBOUNDED:
        return f"waiting = {waiting} must be -1 (as many weight gradients as {name} puts off), 0 or more"
    return ""


def make_schedule(name: str, ranks: int, micro_batches: int, waiting: int = UNBOUNDED) -> Schedule:
    """The schedule of that name (spec 13.1).

    Args:
        name: one of :data:`NAMES`.
        ranks: of the pipeline.
        micro_batches: of one optimizer step on one lane of the pipeline.
        waiting: most passes of a rank whose weight gradients may wait at one time; -1: as many as the schedule puts
            off. ``gpipe`` and ``1f1b`` put off none.

    Raises:
        ValueError: what :func:`supported` says, one line.
    """
    reason = supported(name, ranks, micro_batches, waiting)
    if reason:
        raise ValueError(reason)
    stages = 2 * ranks if name == "dualpipev" else ranks
    two = name in ("dualpipe", "dualpipev")
    return Schedule(
        name=NAMES[NAMES.index(name)],  # pyright: ignore[reportArgumentType]
        ranks=ranks,
        micro_batches=micro_batches,
        chunks=2 if two else 1,
        stage_of=tuple((rank, stages - 1 - rank) if two else (rank,) for rank in range(ranks)),
        n_stages=stages,
        actions=tuple(tuple(bounded(_ORDERS[name](rank, ranks, micro_batches), waiting)) for rank in range(ranks)),
        waiting=waiting,
    )
