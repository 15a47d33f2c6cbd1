"""Pictures of a run, made from what it wrote down: loss and learning rate, expert load, MaxVio."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dsv3_jax.train.metrics import LOAD_FILE, read_expert_load, read_metrics

_INK, _MAIN, _SECOND, _THIRD, _GOOD = "#333333", "#1f5fa8", "#d9822b", "#7a4fa3", "#2a8f5b"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.dpi": 130,
    "lines.linewidth": 1.6,
}


def write_plots(
    folder: Path, routers: Sequence[str], baselines: Mapping[str, float | None] | None = None
) -> list[Path]:
    """Draw a run folder's pictures into ``plots/``.

    Args:
        folder: the run's, with ``metrics.jsonl`` and, for a mixture of experts, ``expert_load.bin``.
        routers: a name for each router, in the order of the recorded loads.
        baselines: bits per byte to draw as lines into the validation plot, by their label.

    Returns:
        The files written.
    """
    records = read_metrics(folder)
    if not records:
        return []
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    figures: dict[str, Figure] = {}
    with mpl.rc_context(_STYLE):
        figures["loss"] = _loss_figure(records, baselines or {})
        steps, loads = read_expert_load(folder / LOAD_FILE)
        if loads.size:
            figures["expert_load"] = _load_figure(steps, loads, routers)
        if any(record.get("max_vio") is not None for record in records):
            figures["max_vio"] = _violation_figure(records, steps, loads, routers)
        for name, figure in figures.items():
            figure.savefig(target / f"{name}.png", bbox_inches="tight", facecolor="white")
    return [target / f"{name}.png" for name in figures]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite ``key``."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the run around each point, narrower at both ends."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, color: str, label: str) -> None:
    """Every step faint, their moving mean strong."""
    steps, values = _column(records, key)
    if len(steps):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=color, label=label)


def _steps_axis(axes: Axes, last: int) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, last * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _loss_figure(records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float | None]) -> Figure:
    has_validation = any(record.get("val_bpb") is not None for record in records)
    heights = [3.2, 2.6, 1.5] if has_validation else [3.2, 1.5]
    figure = Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    last = records[-1]["step"]
    _draw_losses(axes[0], records)
    if has_validation:
        _draw_validation(axes[1], records, baselines, last)
    _draw_rate(axes[-1], records)
    for each in axes:
        _steps_axis(each, last)
    return figure


def _draw_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Training loss")
    _curve(axes, records, "loss", _MAIN, "next token (main head)")
    if any(record.get("mtp_loss") for record in records):
        _curve(axes, records, "mtp_loss", _SECOND, "token after next (MTP)")
    skipped = [record["step"] for record in records if record.get("skipped")]
    if skipped:
        axes.plot(
            skipped, np.full(len(skipped), 0.02), "x", color="#c0392b", transform=axes.get_xaxis_transform(),
            label=f"skipped, not finite ({len(skipped)})",
        )  # fmt: skip
    axes.set_ylabel("cross entropy (nats per token)")
    axes.legend()


def _draw_validation(
    axes: Axes, records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float | None], last: int
) -> None:
    axes.set_title("Validation")
    steps, values = _column(records, "val_bpb")
    axes.plot(steps, values, color=_GOOD, marker="o", markersize=4, label="model")
    axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(-4, 7), textcoords="offset points", ha="right")
    for (label, level), style in zip(baselines.items(), ("--", "-.", ":"), strict=False):
        if level is not None:
            axes.axhline(level, color="#777777", linestyle=style, linewidth=1.2, label=f"{label}: {level:.3f}")
    axes.set_ylabel("bits per byte")
    axes.legend()


def _draw_rate(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Learning rate")
    steps, values = _column(records, "lr")
    axes.plot(steps, values, color=_THIRD)
    axes.set_ylim(0, values.max() * 1.08)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylabel("rate")


def _load_norm(top: float) -> TwoSlopeNorm:
    return TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, top))


def _load_figure(
    steps: Int64[np.ndarray, " points"], loads: Float[np.ndarray, "points routers E"], routers: Sequence[str]
) -> Figure:
    """On the left the mean of the last tenth, router by expert; on the right each router's experts over time."""
    count, experts = loads.shape[1:]
    last = max(1, len(loads) // 10)
    late = loads[-last:].mean(axis=0)
    when = f"at step {steps[-1]}" if last == 1 else f"mean of steps {steps[-last]} to {steps[-1]}"
    norm = _load_norm(float(np.quantile(loads, 0.995)))
    height = 1.8 + min(0.42 * count, 8)
    figure = Figure(figsize=(11, max(3.6, height)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    image = left.imshow(late, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    left.set_title(f"Load by expert, {when}")
    left.set_xlabel("expert")
    if late.size <= 160:
        for (i, j), value in np.ndenumerate(late):
            left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=_readable_on(norm(value)))
    _router_ticks(left, routers, count)
    left.xaxis.set_major_locator(MaxNLocator(min(experts, 9), integer=True))
    # Each router's band holds its experts from top to bottom, time runs to the right.
    over_time = loads.transpose(1, 2, 0).reshape(count * experts, len(steps))
    right.imshow(
        over_time, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest",
        extent=(float(steps[0]), float(max(steps[-1], steps[0] + 1)), count - 0.5, -0.5),
    )  # fmt: skip
    for border in range(1, count):
        right.axhline(border - 0.5, color="black", linewidth=0.8)
    right.set_title("Every expert over the run (each band: one router)")
    right.set_xlabel("optimizer step")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    _router_ticks(right, routers, count)
    for axes in (left, right):
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=[left, right], pad=0.015, aspect=30)
    bar.set_label("load / balanced load (1 = balance)")
    bar.outline.set_visible(False)
    return figure


def _readable_on(shade: float) -> str:
    """Ink for a cell: both ends of the colors are dark."""
    return "white" if abs(shade - 0.5) > 0.33 else _INK


def _router_ticks(axes: Axes, routers: Sequence[str], count: int) -> None:
    step = -(-count // 20)
    axes.set_yticks(range(0, count, step), [routers[i] for i in range(0, count, step)])
    axes.tick_params(length=0)


def _violation_figure(
    records: Sequence[Mapping[str, Any]], steps: np.ndarray, loads: np.ndarray, routers: Sequence[str]
) -> Figure:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots()
    if loads.size:
        colors = mpl.colormaps["viridis"](np.linspace(0.1, 0.9, loads.shape[1]))
        named = loads.shape[1] <= 8
        for i, color in enumerate(colors):
            each = loads[:, i].max(axis=-1) - 1
            axes.plot(steps, _smooth(each), color=color, linewidth=0.9, alpha=0.7, label=routers[i] if named else None)
    _curve(axes, records, "max_vio", _INK, "mean of all routers")
    axes.set_title("MaxVio: excess load of the busiest expert, a training batch each")
    axes.set_ylabel("(max load - mean load) / mean load")
    axes.set_ylim(bottom=0)
    _steps_axis(axes, records[-1]["step"])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def write_precision_plot(
    path: Path,
    curves: Mapping[str, Float[np.ndarray, " _"]],
    relative: Mapping[str, Float[np.ndarray, "_ _"]],
    limit: float,
) -> None:
    """Smoothed losses of runs that differ in precision, and how far each is from the first.

    With several seeds the mean of their differences is drawn, and each of them thin. Precisions may have as many seeds
    and steps as they like.

    Args:
        path: of the PNG file.
        curves: smoothed loss of each step by precision, mean over seeds.
        relative: relative difference of each but the first from the first, ``[seeds, steps]``.
        limit: the largest that is wanted, drawn as a band.
    """
    colors = dict(zip(curves, (_INK, _SECOND, _MAIN, _THIRD), strict=False))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
        for name, line in curves.items():
            upper.plot(range(1, len(line) + 1), line, color=colors[name], linewidth=1.2, label=name)
        upper.set_title("Training loss by precision, same seed and data, EMA(0.9)")
        upper.set_ylabel("nats per token")
        upper.legend()
        for name, lines in relative.items():
            seeds, steps = lines.shape
            for line in lines if seeds > 1 else ():
                lower.plot(range(1, steps + 1), 100 * line, color=colors[name], linewidth=0.6, alpha=0.35)
            label = f"{name}, mean of {seeds} seeds" if seeds > 1 else name
            lower.plot(range(1, steps + 1), 100 * lines.mean(axis=0), color=colors[name], linewidth=1.2, label=label)
        lower.axhspan(-100 * limit, 100 * limit, color=_GOOD, alpha=0.15, linewidth=0, label=f"{100 * limit:g}%")
        half = np.abs(
            np.concatenate(
                [100 * lines[:, len(lines[0]) // 2 :].ravel() for lines in relative.values()] or [np.zeros(1)]
            )
        )
        reach = 1.5 * max(float(half.max()), 100 * limit)
        lower.set_ylim(-reach, reach)
        steps = max(map(len, curves.values()))
        lower.axvline(steps / 2, color="#888888", linewidth=0.8, linestyle=":")
        thin = ", each seed thin" if max(map(len, relative.values()), default=1) > 1 else ""
        lower.set_title(f"Difference from {next(iter(curves))}{thin}; the last half counts")
        lower.set_ylabel("%")
        lower.legend(loc="lower left", ncols=len(curves))
        _steps_axis(lower, steps)
        figure.savefig(path, bbox_inches="tight", facecolor="white")
