"""Plans of the persistent kernels of a design that is asked for, where the backend itself would take another."""

from __future__ import annotations

from collections.abc import Iterator

from elman.ops import persistent
from elman.ops.persistent import Chip, Plan, Task

EXCHANGES = tuple(persistent._EXCHANGES)


def plans(
    exchange: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[Plan]:
    """All that fit, those that are known to be slow too."""
    for row_tiles in range(1, persistent._MAX_ROW_TILES + 1):
        plan = persistent._fit(chip, batch, hidden, task, heads, exchange, row_tiles, blocks)
        if plan is not None:
            yield plan


def best_plan(exchange: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1) -> Plan:
    """The one that the model of a step's time likes best; a ValueError where none fits."""
    found = plans(exchange, blocks, chip, batch, hidden, task, heads)
    return min(found, key=lambda plan: plan.microseconds(task))
