"""Timelines as pictures: ranks down, time to the right, as in the figures of the papers.

Matplotlib is imported when the first picture is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sharding.pipeline.actions import BACKWARD, DEFERRING, FORWARD, Kind
from sharding.pipeline.simulate import Event, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"gpipe": "GPipe", "1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe", "dualpipev": "DualPipeV"}
"""Names of schedules as people write them."""

_COLORS = {
    Kind.F: ("#f3b944", "#fae3ae"),
    Kind.B: ("#57a773", "#b4dcc0"),
    Kind.BX: ("#3f9fa8", "#a9dadd"),
    Kind.W: ("#6f86c6", "#c3cdea"),
}
"""Of chunk 0 and chunk 1."""
_INK, _IDLE, _EDGE = "#2b2b2b", "#f1f1ef", "#ffffff"
_LABELS = {
    Kind.F: "forward (F)",
    Kind.B: "backward (B)",
    Kind.BX: "backward for input",
    Kind.W: "backward for weights (W)",
}
_ROW, _GAP = 0.86, 0.07
_INCHES = (12.2, 26.0)
"""Width of the time axis."""


class _Cell(NamedTuple):
    """A rectangle of a rank's row, in units of time and of rows; the number is of its micro-batch."""

    start: float
    width: float
    bottom: float
    height: float
    color: str
    micro: int


def write_timelines(path: Path, timelines: Sequence[Timeline], unit: str = "one forward pass = 1") -> None:
    """Draw schedules one below the other, with one scale of time.

    An action is a box with its micro-batch's number; of an overlapped pair the forward pass is the upper half and the
    backward pass the lower. The second chunk of a rank has the lighter shade.

    Args:
        path: of the PNG file.
        timelines: one or more.
        unit: of time, for the axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    longest = max(timeline.makespan for timeline in timelines)
    cells = [[_cells(events) for events in timeline.events] for timeline in timelines]
    shortest = min(cell.width for ranks in cells for rank in ranks for cell in rank)
    width = min(max(longest / shortest * 0.21, _INCHES[0]), _INCHES[1])
    heights = [0.36 * timeline.schedule.ranks for timeline in timelines]
    paired = any(event.action.kind in (Kind.FB, Kind.FBX) for one in timelines for rank in one.events for event in rank)
    with rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        top, bottom, between = 0.66, 0.55, 0.5
        height = top + bottom + between * (len(timelines) - 1) + sum(heights)
        figure = Figure(figsize=(width + 1.2, height), dpi=110)
        upper = height - top
        for i, (timeline, ranks, tall) in enumerate(zip(timelines, cells, heights, strict=True)):
            box = (0.95 / (width + 1.2), (upper - tall) / height, width / (width + 1.2), tall / height)
            axes = figure.add_axes(box)
            _draw(axes, timeline, ranks, longest, width / longest)
            last = i == len(timelines) - 1
            axes.tick_params(bottom=last, labelbottom=last)
            if last:
                axes.set_xlabel(f"time ({unit})", color=_INK)
            upper -= tall + between
        _legend(figure, (0.95 / (width + 1.2), 1 - 0.12 / height), timelines, paired)
        figure.savefig(path, facecolor="white")


def _cells(events: Sequence[Event]) -> list[_Cell]:
    found = []
    for action, start, end in events:
        halves = action.kind in FORWARD and action.kind in BACKWARD
        if action.kind in FORWARD:
            bottom, height = (0.5, 0.5) if halves else (0.0, 1.0)
            found.append(_Cell(start, end - start, bottom, height, _COLORS[Kind.F][action.f_chunk], action.f_micro))
        if action.b_chunk >= 0:
            kind = Kind.W if action.kind == Kind.W else Kind.BX if action.kind in DEFERRING else Kind.B
            height = 0.5 if halves else 1.0
            found.append(_Cell(start, end - start, 0.0, height, _COLORS[kind][action.b_chunk], action.b_micro))
    return found


def _draw(axes: "Axes", timeline: Timeline, ranks: Sequence[Sequence[_Cell]], longest: float, scale: float) -> None:
    """``scale`` is inches per unit of time."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    schedule = timeline.schedule
    boxes, colors = [], []
    digits = len(str(schedule.micro_batches - 1))
    for rank, cells in enumerate(ranks):
        floor = schedule.ranks - 1 - rank + _GAP
        boxes.append(Rectangle((0, floor), timeline.makespan, _ROW))
        colors.append(_IDLE)
        for cell in cells:
            boxes.append(Rectangle((cell.start, floor + _ROW * cell.bottom), cell.width, _ROW * cell.height))
            colors.append(cell.color)
            size = min(9.0, 72 * cell.width * scale / (0.68 * digits + 0.2), 14.0 * cell.height + 0.5)
            if size >= 4:
                axes.text(
                    cell.start + cell.width / 2, floor + _ROW * (cell.bottom + cell.height / 2 - 0.02), str(cell.micro),
                    ha="center", va="center_baseline", fontsize=size, color=_INK,
                )  # fmt: skip
    line = min(0.8, 5 * scale * min(cell.width for cells in ranks for cell in cells))
    axes.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors=_EDGE, linewidths=line))
    axes.set_xlim(0, longest)
    axes.set_ylim(0, schedule.ranks)
    axes.set_yticks([schedule.ranks - 0.5 - rank for rank in range(schedule.ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(schedule.ranks)])
    axes.tick_params(length=0, colors=_INK)
    axes.tick_params(axis="x", length=3, color="#888888")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#888888")
    axes.set_title(_title(timeline), loc="left", fontsize=10.5, color=_INK, pad=5)


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return (
        rf"$\bf{{{TITLES[schedule.name]}}}$   {schedule.ranks} ranks, {schedule.micro_batches} micro-batches, "
        f"{schedule.n_stages} stages: time {timeline.makespan:.4g}, bubble {timeline.bubble:.1%}, "
        f"at most {max(timeline.held)} passes under way on a rank"
    )


def _legend(figure: Any, place: tuple[float, float], timelines: Sequence[Timeline], paired: bool) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    there = {event.action.kind for one in timelines for rank in one.events for event in rank}
    two = any(one.schedule.chunks == 2 for one in timelines)
    shown = {Kind.F: True, Kind.B: bool(there & {Kind.B, Kind.FB}), Kind.BX: bool(there & set(DEFERRING))}
    kinds = [kind for kind in _COLORS if shown.get(kind, kind in there)]
    handles: list[Any] = [tuple(Patch(color=color) for color in _COLORS[kind][: 1 + two]) for kind in kinds]
    labels = [_LABELS[kind] for kind in kinds]
    if paired:
        handles.append((Patch(color=_COLORS[Kind.F][0]), Patch(color=_COLORS[Kind.B][1])))
        labels.append("stacked: overlapped pair (F&B)")
    handles.append((Patch(facecolor=_IDLE, edgecolor="#cccccc"),))
    labels.append("bubble")
    if two:
        handles.append((Patch(facecolor="#8a8a8a"), Patch(facecolor="#d6d6d6")))
        labels.append("first chunk of a rank, second")
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=place, ncols=len(labels), frameon=False, fontsize=9,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, handlelength=1.8, columnspacing=1.4, borderaxespad=0,
        borderpad=0,
    )  # fmt: skip
