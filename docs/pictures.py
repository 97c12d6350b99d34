"""The pictures of the concepts, drawn anew at every build: ``draw(folder)``."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

_INK, _STATE, _INPUT, _OUTPUT, _CHIP = "#333333", "#c6dbef", "#e5f5e0", "#fdd0a2", "#f2f2f2"


def _box(
    axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.2, height: float = 0.7, size: float = 10
) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.03", fc=color, ec=_INK, lw=1))
    axes.text(x, y, text, ha="center", va="center", color=_INK, size=size)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", **style: object) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 12, "color": _INK, "shrinkA": 0, "shrinkB": 0} | style
    axes.add_patch(FancyArrowPatch(start, end, **look))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", va="bottom", color=_INK)


def recurrence(axes: Axes) -> None:
    """Steps one behind another, each waiting for the one before; the inputs' product is made for all at once."""
    for step in range(4):
        x = 2.6 * step
        _box(axes, x, 0, f"pre$_{step + 1}$", _INPUT)
        _box(axes, x, 1.6, f"h$_{step + 1}$", _STATE)
        _arrow(axes, (x, 0.4), (x, 1.2))
        _arrow(axes, (x, 2.0), (x, 2.6))
        axes.text(x, 2.7, f"y$_{step + 1}$", ha="center", va="bottom", color=_INK)
        _arrow(axes, (x - 1.95, 1.6), (x - 0.65, 1.6), "W$_h$" if step else "h$_0$")
    _arrow(axes, (8.45, 1.6), (9.4, 1.6), "state")
    _box(axes, 3.9, -1.2, "pre = W$_x$ x + b for all steps: one product", _INPUT, 9.2)
    for step in range(4):
        _arrow(axes, (2.6 * step, -0.82), (2.6 * step, -0.38))
    axes.set(xlim=(-2.2, 9.7), ylim=(-1.7, 3.2))


def persistent(axes: Axes) -> None:
    """A launch a step reads W from memory T times; a persistent kernel reads it once and only exchanges h."""
    axes.text(1.9, 5.0, "a launch a step", ha="center", weight="bold", color=_INK)
    axes.text(9.0, 5.0, "persistent: one launch", ha="center", weight="bold", color=_INK)
    _box(axes, 1.9, 0.2, "memory of the GPU: W, h", _CHIP, 4.6)
    for step in range(3):
        x = 0.4 + 1.5 * step
        _box(axes, x, 3.6, f"step {step + 1}", _STATE, 1.15)
        _arrow(axes, (x - 0.2, 0.6), (x - 0.2, 3.2), color="#cb181d", lw=2.5)
        _arrow(axes, (x + 0.25, 3.2), (x + 0.25, 0.6))
    axes.text(1.9, 1.9, "W is read in every step", ha="center", color="#cb181d", bbox={"fc": "white", "ec": "none"})
    _box(axes, 9.0, 0.2, "memory of the GPU: W once, pre, h", _CHIP, 6.4)
    for block in range(3):
        x = 6.9 + 2.1 * block
        _box(axes, x, 3.6, f"SM {block + 1}\nrows of W", _STATE, 1.5, 1.1)
        _arrow(axes, (x, 0.6), (x, 3.0), color="#cb181d", lw=1)
    for block in range(2):
        x = 7.95 + 2.1 * block
        _arrow(axes, (x - 0.3, 3.6), (x + 0.3, 3.6), arrowstyle="<|-|>")
    axes.text(
        9.0,
        1.9,
        "W is read once, and stays in registers",
        ha="center",
        color="#cb181d",
        bbox={"fc": "white", "ec": "none"},
    )
    axes.text(9.0, 4.4, "a step exchanges its part of h, nothing else", ha="center", color=_INK, size=10)
    axes.set(xlim=(-1.0, 12.4), ylim=(-0.4, 5.4))


def streams(axes: Axes) -> None:
    """Rows of the batch are streams; a step reads a window of each, and hands its states to the next step."""
    ends = {0: (3, 7), 1: (5,), 2: (1, 6)}
    for row in range(3):
        for part in range(3):
            x, y = 1.6 + 3.6 * part, 2.2 - 1.1 * row
            _box(axes, x, y, "", _INPUT, 3.0, 0.6)
            if part < 2:
                _arrow(axes, (x + 1.55, y), (x + 2.05, y), color="#2171b5", lw=2)
        for place in ends[row]:
            x = 0.25 + 3.6 * (place // 3) + (place % 3 + 0.5)
            axes.plot([x, x], [1.9 - 1.1 * row, 2.5 - 1.1 * row], color="#cb181d", lw=3)
        axes.text(-0.1, 2.2 - 1.1 * row, f"stream {row + 1}", ha="right", va="center", color=_INK)
    for part in range(3):
        axes.text(1.6 + 3.6 * part, 2.8, f"step {part + 1}", ha="center", color=_INK)
    axes.text(5.2, -0.85, "blue: the state is handed on, gradients are not", ha="center", color="#2171b5")
    axes.text(5.2, -1.3, "red: a document starts, so that stream's state is zeroed there", ha="center", color="#cb181d")
    axes.set(xlim=(-1.6, 10.6), ylim=(-1.6, 3.2))


def comparison(axes: Axes) -> None:
    """What a study holds equal, what it lets vary, and what it only reports."""
    columns = (
        (
            "held equal, or it does not load",
            _STATE,
            ("parameters, within 2%", "one budget: time, tokens or FLOPs", "text, batch, window, optimiser"),
        ),
        (
            "chosen for each model alike",
            _INPUT,
            ("learning rate: the best of a sweep", "judged by training loss", "of shorter runs, another seed"),
        ),
        (
            "reported",
            _OUTPUT,
            ("held-out loss, every seed", "spread, test, power laws", "tokens/s, memory, state, start-up"),
        ),
    )
    for column, (title, color, entries) in enumerate(columns):
        x = 6.2 * column
        axes.text(x, 3.2, title, ha="center", weight="bold", color=_INK, size=9)
        for row, entry in enumerate(entries):
            _box(axes, x, 2.4 - row, entry, color, 5.6, size=8)
        if column:
            _arrow(axes, (x - 3.42, 1.4), (x - 2.78, 1.4))
    axes.set(xlim=(-2.9, 15.3), ylim=(-0.2, 3.6))


PICTURES = {each.__name__: each for each in (recurrence, persistent, streams, comparison)}


def draw(folder: Path) -> None:
    """Draw every picture as SVG, the same bytes at every build."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        figure = Figure(figsize=(9, 3.6))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal")
        picture(axes)
        with rc_context({"svg.hashsalt": "elman"}):
            figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
