"""The report's pictures, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from elman.studies.analysis import Comparison, Group, PowerLaw
from elman.studies.long_text import Line
from elman.studies.records import Record
from elman.studies.task_grid import Grid, Place
from elman.training.plot import running_mean
from elman.units import format_count

#: Inches that a letter of a legend takes, about.
_LETTER = 0.06
#: Points that a curve is drawn by at most.
_POINTS = 250
_COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#555555",
)
_DASHES = ("-", "--", ":")
_AXES = {"params": "parameters", "depth": "depth", "batch_size": "batch, windows a step",
         "peak_memory_bytes": "peak memory, bytes"}  # fmt: skip


class Styles:
    """A colour and a dash for each label, the same in every picture."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._places = {label: i for i, label in enumerate(dict.fromkeys(labels))}

    def __call__(self, label: str) -> dict[str, Any]:
        place = self._places[label]
        dash = _DASHES[place // len(_COLOURS) % len(_DASHES)]
        return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": dash}


def curves(comparison: Comparison, styles: Styles, unit: str) -> str:
    """Training loss against wall-clock, tokens and FLOPs, a line a seed."""
    figure = _figure(3.9)
    panels = figure.subplots(1, 3, sharey=True)
    lowest, highest = np.inf, -np.inf
    for group in comparison.ranked:
        for i, record in enumerate(group.records):
            rows = [row for row in record.every_step if "loss" in row]
            losses = np.array([row["loss"] for row in rows], dtype=np.float64)
            if not len(losses):
                continue
            means = running_mean(losses, max(1, min(100, len(losses) // 10)))
            chosen = np.unique(np.linspace(0, len(rows) - 1, _POINTS).astype(int))
            tokens = (
                np.array([rows[j]["step"] for j in chosen]) * record.summary["batch_size"] * record.summary["seq_len"]
            )
            xs = ([rows[j]["seconds"] for j in chosen], tokens, 3 * record.summary["flops_per_token"] * tokens)
            for axes, x in zip(panels, xs, strict=True):
                label = group.label if i == 0 else None
                axes.plot(x, means[chosen], label=label, linewidth=1.1, alpha=0.85, **styles(group.label))
            lowest = min(lowest, float(means.min()))
            highest = max(highest, float(means[len(means) // 20 :].max()))
    for axes, label in zip(panels, ("training time, s", "tokens", "training FLOPs"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    for axes in panels[1:]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # between the tens they would run into each other
    panels[0].set_ylabel(f"training loss, nats a {unit}")
    if lowest < highest:
        margin = 0.05 * (highest - lowest)
        panels[0].set_ylim(lowest - margin, highest + margin)
    _legend(figure, panels[0])
    return _svg(figure)


def losses(comparison: Comparison, styles: Styles) -> str:
    """Held-out loss, a row a group: a dot a seed, and the mean."""
    ranked = comparison.ranked
    longest = max(len(group.label) for group in ranked)
    figure = _figure(0.9 + 0.34 * len(ranked), width=max(7.6, 5.2 + 1.2 * _LETTER * longest))
    axes = figure.subplots()
    for y, group in enumerate(ranked):
        colour = styles(group.label)["color"]
        axes.plot(group.nats, [y] * len(group.nats), "o", color=colour, markersize=5, alpha=0.6)
        axes.plot([group.mean], [y], "|", color=colour, markersize=17, markeredgewidth=2)
    axes.set_yticks(range(len(ranked)), [group.label for group in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, nats a byte (dots: seeds; bar: their mean)")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25, axis="x")
    return _svg(figure)


def against(
    axis: str,
    groups: Sequence[Group],
    laws: Sequence[PowerLaw],
    styles: Styles,
    value: Literal["loss", "speed"] = "loss",
) -> str:
    """Held-out loss, or tokens a second, against what a study varies; with power laws, both scales are logarithmic."""
    figure = _figure(3.9, width=7.6)
    axes = figure.subplots()
    of: Callable[[Record], float] = (
        (lambda record: record.nats) if value == "loss" else (lambda record: float(record.summary["tokens_per_second"]))
    )
    by_series: dict[str, list[Record]] = {}
    for group in groups:
        for record in group.records:
            by_series.setdefault(record.series, []).append(record)
    fitted = {law.series: law for law in laws} if value == "loss" else {}
    for series, records in by_series.items():
        style = styles(series)
        xs = sorted({float(_at(record, axis)) for record in records})
        means = [float(np.mean([of(record) for record in records if _at(record, axis) == x])) for x in xs]
        axes.plot(
            [_at(r, axis) for r in records],
            [of(r) for r in records],
            "o",
            color=style["color"],
            markersize=4,
            alpha=0.6,
        )
        law = fitted.get(series)
        if law is not None:
            line = np.geomspace(xs[0], xs[-1], 50)
            label = f"{series}: N^{-law.b:.3f}"
            axes.plot(line, law.at(line), label=label, linewidth=1.2, **style)
        else:
            axes.plot(xs, means, label=series, linewidth=1.2, **style)
    if axis in ("params", "batch_size"):
        axes.set_xscale("log")
        ticks = sorted({float(_at(record, axis)) for records in by_series.values() for record in records})
        ticks = [x for i, x in enumerate(ticks) if i == 0 or x > 1.3 * ticks[i - 1]]
        axes.set_xticks(ticks, [format_count(x) for x in ticks])
        axes.minorticks_off()
    if fitted:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_xlabel(_AXES.get(axis, axis))
    axes.set_ylabel("held-out loss, nats a byte" if value == "loss" else "tokens a second")
    if value != "loss":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda x, _: format_count(x))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def heat_map(grid: Grid, place: Place, title: str) -> tuple[str, bytes]:
    """Accuracies of models (rows) in tasks (columns), as an SVG and as a PNG."""
    shape = len(grid.models), len(grid.tasks)
    cells = [[grid.cell(model, task, place) for task in grid.tasks] for model in grid.models]
    above = np.array([[np.nan if cell is None else cell.above_chance for cell in row] for row in cells])
    figure = _figure(1.9 + 0.36 * shape[0], width=max(5.0, 2.3 + 0.62 * shape[1]))
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    shown = axes.imshow(above, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for y, x in np.ndindex(*shape):
        cell = cells[y][x]
        text = "–" if cell is None else f"{100 * cell.mean:.0f}"
        dark = cell is not None and cell.above_chance > 0.55
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "#1c1f24")
    labels = [f"{task}\n({100 * grid.chance(task, place):.2g})" for task in grid.tasks]
    axes.set_xticks(range(shape[1]), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(shape[0]), grid.models, fontsize=9)
    axes.set_xticks(np.arange(shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("task (chance, per cent)", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, ticks=[0, 1], pad=0.015, aspect=30)
    bar.ax.set_yticklabels(["chance", "all right"], fontsize=8)
    bar.outline.set_visible(False)
    return _both(figure)


def long_text(lines: Sequence[Line], styles: Styles) -> tuple[str, bytes]:
    """Loss against length of context, dots the seeds, as an SVG and as a PNG."""
    first = lines[0].readings[0]
    figure = _figure(3.9, width=7.6)
    axes = figure.subplots()
    for line in lines:
        style = styles(line.label)
        axes.plot(line.contexts, [line.at(context) for context in line.contexts], linewidth=1.3, **style)
        axes.plot([], [], marker="o", markersize=4, label=line.label, **style)
        for reading in line.readings:
            axes.plot(*zip(*sorted(reading.contexts.items()), strict=True), "o", color=style["color"], markersize=4)
    axes.axvline(first.seq_len, color="gray", linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    ticks = sorted({context for line in lines for context in line.contexts})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if (widen := 1.02 / (high / low)) > 1:
        # Where context does nothing, what is left is rounding: it shall look like nothing.
        axes.set_ylim(low / widen**0.5, high * widen**0.5)
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_xlabel(f"context, {first.unit}s")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return _both(figure)


def _at(record: Record, axis: str) -> float:
    # A series' sizes differ by the part of two percent that widths leave: those of one target are one size.
    if axis == "params" and record.facts.get("target_params"):
        return float(record.facts["target_params"])
    return float(record.summary[axis])


def _figure(height: float, width: float = 11.0) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # As many columns as there is room for: what does not fit is cut off.
        widest = _LETTER * max(map(len, labels)) + 0.65
        columns = max(1, min(4, len(labels), int(figure.get_figwidth() / widest)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _both(figure: Figure) -> tuple[str, bytes]:
    """As an SVG and as a PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return _svg(figure), sink.getvalue()


def _svg(figure: Figure) -> str:
    """The same text every time for the same runs."""
    sink = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "elman", "svg.fonttype": "path"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()
