"""What ``elman eval`` leaves in its folder, made of one value: eval.json, eval.md, eval.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elman.evaluation.heldout import HeldoutLoss
from elman.evaluation.long_text import Bin, ContextLoss
from elman.units import bits, format_count


@dataclass
class Evaluation:
    """The outcome; what is None or empty was not measured, and ``notes`` say why where it was asked for.

    Attributes:
        run: what the run's config tells of the model.
        data: which file, and how much of it, and a hash of that.
        unit: what a token is called.
        windows: from a state at rest each, as in training.
        carried: with the state carried.
        positions: of the latter, by place in the document.
        contexts: the same tokens after contexts of several lengths.
        environment: of machine and versions.
        seconds: that it took.
    """

    run: dict[str, Any]
    data: dict[str, Any]
    unit: str
    environment: dict[str, Any]
    windows: HeldoutLoss | None = None
    carried: HeldoutLoss | None = None
    positions: Sequence[Bin] = ()
    contexts: Sequence[ContextLoss] = ()
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        values = asdict(self)
        for name, loss in (("windows", self.windows), ("carried", self.carried)):
            if loss is not None:
                values[name] |= {"nats_per_byte": loss.nats_per_byte, "bits_per_byte": loss.bits_per_byte}
        return values

    def totals(self) -> list[tuple[str, str]]:
        """In words, by mode: the losses of the whole text."""
        length = f"{self.run['seq_len']} {self.unit}s"
        given = ((f"windows of {length}, each from rest", self.windows), ("state carried through", self.carried))
        return [
            (name, f"{loss.nats_per_byte:.4f} nats/byte  {loss.bits_per_byte:.4f} bits/byte")
            for name, loss in given
            if loss is not None
        ]


def write(evaluation: Evaluation, folder: Path) -> None:
    """All three files."""
    text = json.dumps(evaluation.to_dict(), indent=2, default=str)
    (folder / "eval.json").write_text(text + "\n", encoding="utf-8")
    (folder / "eval.md").write_text(markdown(evaluation), encoding="utf-8")
    if evaluation.positions or evaluation.contexts:
        plot(evaluation, folder / "eval.png")


def _error(row: ContextLoss) -> str:
    return "–" if row.standard_error is None else f"{row.standard_error:.4f}"


def markdown(evaluation: Evaluation) -> str:
    """Tables for people."""
    run, data, unit = evaluation.run, evaluation.data, evaluation.unit
    lines = [
        f"# {run['model']}, {format_count(run['params'])} parameters, on {data['file']}",
        "",
        f"{data['bytes']:,} bytes; trained on windows of {run['seq_len']} {unit}s; {run['checkpoint']}.",
        "",
        "| reading | loss |",
        "|---|---|",
        *(f"| {name} | {loss} |" for name, loss in evaluation.totals()),
    ]
    if evaluation.contexts:
        lines += [
            "",
            f"The same {evaluation.contexts[0].tokens:,} {unit}s after contexts of several lengths, each from rest:",
            "",
            f"| context, {unit}s | nats/byte | ± standard error | bits/byte |",
            "|---|---|---|---|",
            *(
                f"| {row.context:,} | {row.nats_per_byte:.4f} | {_error(row)} | {bits(row.nats_per_byte):.4f} |"
                for row in evaluation.contexts
            ),
        ]
    if evaluation.positions:
        lines += [
            "",
            "By place in the document, the state carried:",
            "",
            f"| {unit}s before it | {unit}s | nats/byte | bits/byte |",
            "|---|---|---|---|",
            *(
                f"| {_range(row)} | {row.tokens:,} | {row.nats_per_byte:.4f} | {bits(row.nats_per_byte):.4f} |"
                for row in evaluation.positions
            ),
        ]
    lines += ["", *(f"- {note}" for note in evaluation.notes)] if evaluation.notes else []
    return "\n".join(lines).rstrip() + "\n"


def plot(evaluation: Evaluation, path: Path) -> None:
    """Loss against length of context, and against place in the document."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    run, unit = evaluation.run, evaluation.unit
    figure.suptitle(f"{run['model']}, {format_count(run['params'])} parameters")
    left, right = figure.subplots(1, 2, sharey=True)
    contexts, positions = evaluation.contexts, evaluation.positions
    left.errorbar(
        [row.context for row in contexts],
        [row.nats_per_byte for row in contexts],
        [math.nan if row.standard_error is None else row.standard_error for row in contexts],
        color="tab:blue", marker="o", markersize=4, capsize=2, label="each context from rest, the same targets",
    )  # fmt: skip
    left.set_xlabel(f"context, {unit}s")
    left.set_ylabel("nats per byte")
    right.plot(
        [max(0.5, (row.first + row.last) / 2) for row in positions],
        [row.nats_per_byte for row in positions],
        color="tab:orange", marker="o", markersize=4, label="state carried",
    )  # fmt: skip
    right.set_xlabel(f"{unit}s of the document before it")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.axvline(run["seq_len"], color="gray", linestyle=":", label="window in training")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _range(row: Bin) -> str:
    return f"{row.first:,}" if row.first == row.last else f"{row.first:,} to {row.last:,}"
