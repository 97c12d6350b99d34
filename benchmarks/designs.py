"""Plans of the persistent kernels of a design that is asked for, where the backend itself would take another."""

from __future__ import annotations

from collections.abc import Iterator

from elman.ops import persistent, wide
from elman.ops.persistent import Plan
from elman.ops.planning import Chip, Task
from elman.ops.wide import WidePlan

EXCHANGES = tuple(persistent._EXCHANGES)
#: The designs of the wide kernels, and their split.
WIDE = {"wide, own tiles": 1, "wide, shared tiles": 2}


def plans(
    exchange: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[Plan]:
    """All that fit, those that are known to be slow too."""
    for row_tiles in range(1, persistent._MAX_ROW_TILES + 1):
        plan = persistent._fit(chip, batch, hidden, task, heads, exchange, row_tiles, blocks)
        if plan is not None:
            yield plan


def wide_plans(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[WidePlan]:
    """Those of ``WIDE``; none where the chip or the cell has none."""
    for plan in wide.plans(chip, batch, hidden, task, heads):
        if (plan.split, plan.blocks) == (WIDE[design], blocks):
            yield plan


def best_plan(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Plan | WidePlan:
    """The one that the model of a step's time likes best, of an exchange or of ``WIDE``; a ValueError if none fits."""
    of_design = wide_plans if design in WIDE else plans
    found = of_design(design, blocks, chip, batch, hidden, task, heads)
    return min(found, key=lambda plan: plan.microseconds(task))
