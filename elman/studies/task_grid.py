"""What runs of tasks say together: models by tasks, each cell the accuracies of its seeds; and what is solved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from elman.evaluation.accuracy import Accuracy
from elman.evaluation.tasks import task_names
from elman.studies.records import Record

#: At the training length; or in the longest examples, over the positions past it.
Place = Literal["trained", "longest"]
PLACES: tuple[Place, ...] = get_args(Place)

#: Accuracy from which on a task is called solved.
SOLVED = 0.99


@dataclass(frozen=True)
class Cell:
    """The accuracies of a model's seeds in a task, and what guessing has."""

    values: tuple[float, ...]
    chance: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def above_chance(self) -> float:
        """0 at chance or below, 1 where all is right."""
        return max(0.0, (self.mean - self.chance) / (1 - self.chance))

    @property
    def solved(self) -> int:
        """By how many seeds."""
        return sum(value >= SOLVED for value in self.values)

    @property
    def words(self) -> str:
        """The mean and, of several seeds, their standard deviation, in per cent."""
        spread = f" ± {100 * statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Grid:
    """Runs of one budget and training length.

    Attributes:
        models: rows, in the order of their first runs.
        tasks: columns, in the order of the registry.
        lengths: of training, and the longer ones.
        cells: by model, task and place.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    cells: dict[tuple[str, str, Place], Cell]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Grid:
        """The grid of whole runs of tasks, at least one."""
        found: dict[tuple[str, str, Place], list[Accuracy]] = {}
        for record in records:
            assert record.task is not None
            for place, accuracy in zip(PLACES, (record.accuracies[0], record.accuracies[-1]), strict=True):
                found.setdefault((_row(record), record.task, place), []).append(accuracy)
        there = {record.task for record in records}
        planned = [str(name) for record in records for name in record.facts.get("planned_series", ())]
        rows = [_row(record) for record in records]
        models = [*(name for name in planned if name in rows), *rows]
        return cls(
            tuple(dict.fromkeys(models)),
            tuple(name for name in task_names() if name in there),
            tuple(accuracy.length for accuracy in records[0].accuracies),
            {key: _cell(key[2], values) for key, values in found.items()},
        )

    def cell(self, model: str, task: str, place: Place) -> Cell | None:
        """None where there is no such run."""
        return self.cells.get((model, task, place))

    def chance(self, task: str, place: Place) -> float:
        """Of a task, which some model has learned."""
        return next(cell.chance for key, cell in self.cells.items() if key[1:] == (task, place))


def _row(record: Record) -> str:
    """The row of its series in a study; elsewhere that of its label, which tells the model."""
    return f"{record.facts['series']}{record.apart}" if record.facts.get("series") else record.label


def _cell(place: Place, accuracies: Sequence[Accuracy]) -> Cell:
    values = tuple(
        found.beyond if place == "longest" and found.beyond is not None else found.accuracy for found in accuracies
    )
    return Cell(values, accuracies[0].chance)


def task_verdict(grid: Grid) -> list[str]:
    """Which models solve which task, at the training length and past it, in sentences."""
    lines = [
        f"A task counts as solved from {SOLVED:.0%} of its answers on, by every seed. At the training length "
        f"({grid.lengths[0]}) that says that it was learned; past it, in examples of length {grid.lengths[-1]}, that "
        f"what was learned holds where it was not trained."
    ]
    for task in grid.tasks:
        solvers = {place: _solvers(grid, task, place) for place in PLACES}
        some = [model for model in grid.models if _partly(grid.cell(model, task, "longest"))]
        line = f"{task}: solved past the training length by {_list(solvers['longest'])}"
        only = [model for model in solvers["trained"] if model not in solvers["longest"]]
        if only:
            line += f"; at the training length alone by {_list(only)}"
        if some:
            line += f"; past it by some seeds alone of {_list(some)}"
        lines.append(line + ".")
    seeds = {len(cell.values) for cell in grid.cells.values()}
    if min(seeds) < 3:
        lines.append("Some cells have fewer than three seeds: what others would give, they do not tell.")
    lines.append(
        "That a model did not solve a task in this time, with this rate and size, does not prove that it cannot."
    )
    return lines


def _solvers(grid: Grid, task: str, place: Place) -> list[str]:
    return [
        model
        for model in grid.models
        if (cell := grid.cell(model, task, place)) is not None and cell.solved == len(cell.values)
    ]


def _partly(cell: Cell | None) -> bool:
    return cell is not None and 0 < cell.solved < len(cell.values)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
