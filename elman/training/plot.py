"""The pictures of a run: loss.png, its training curve against steps and against time, and of a task accuracy.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elman.evaluation.accuracy import Accuracy


def running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Of (N,) values: the mean of each and those before it, ``window`` of them or as many as there are."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    first = np.maximum(0, np.arange(1, len(values) + 1) - window)
    means: npt.NDArray[np.float64] = (sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first)
    return means


def plot_losses(rows: list[dict[str, Any]], title: str, path: Path, unit: str = "byte") -> None:
    """Draw the losses in ``rows``, the lines of a metrics.jsonl, into a PNG; nothing where there are none."""
    training = [row for row in rows if "loss" in row]
    heldout = [row for row in rows if "heldout_loss" in row]
    losses = np.array([row["loss"] for row in training], dtype=np.float64)
    if not len(losses):
        return
    means = running_mean(losses, 100)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in ((panels[0], "step", "step"), (panels[1], "seconds", "training time, s")):
        x = [row[key] for row in training]
        axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training loss")
        axes.plot(x, means, color="tab:blue", label="mean of the last 100")
        axes.plot(
            [row[key] for row in heldout],
            [row["heldout_loss"] for row in heldout],
            color="tab:orange", marker="o", markersize=4, label="held-out loss",
        )  # fmt: skip
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"nats per {unit}")
    panels[1].legend()
    # The first steps fall from the logarithm of the vocabulary; the interesting part is what follows.
    panels[0].set_ylim(max(0.0, float(losses.min()) - 0.15), min(float(losses.max()), float(means[-1]) * 2) + 0.15)
    figure.savefig(path, dpi=120)


def plot_accuracies(accuracies: Sequence[Accuracy], train_length: int, title: str, path: Path) -> None:
    """Draw accuracy against length, that of training being marked, into a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots()
    lengths = [found.length for found in accuracies]
    axes.plot(lengths, [found.accuracy for found in accuracies], marker="o", label="accuracy")
    beyond = [(found.length, found.beyond) for found in accuracies if found.beyond is not None]
    if beyond:
        axes.plot(*zip(*beyond, strict=True), marker="s", label="past the training length")
    axes.plot(lengths, [found.whole for found in accuracies], marker="^", label="whole examples")
    axes.plot(lengths, [found.chance for found in accuracies], color="gray", linestyle="--", label="chance")
    axes.axvline(train_length, color="gray", linewidth=0.8, linestyle=":", label="training length")
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("length")
    axes.set_ylabel("part that is right")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
