"""Plans of the persistent kernels of a design that is asked for, where the backend itself would take another."""

from __future__ import annotations

from collections.abc import Iterator

from elman.ops import low_rank, narrow, split, wide
from elman.ops.low_rank import LowRankPlan
from elman.ops.narrow import Plan
from elman.ops.planning import Chip, Task
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan

EXCHANGES = tuple(narrow.EXCHANGES)
#: The designs of the wide kernels, and their split.
WIDE = {"wide, own tiles": 1, "wide, shared tiles": 2}
#: Those that split the depth over a cluster, and its CTAs.
SPLIT = {f"split over {cluster}": cluster for cluster in split.CLUSTERS}
#: Of a weight of low rank, two thin products a step.
LOW_RANK = "low rank"


def plans(
    exchange: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[Plan]:
    """All that fit, those that are known to be slow too."""
    for row_tiles in range(1, narrow.MAX_ROW_TILES + 1):
        plan = narrow.fit(chip, batch, hidden, task, heads, exchange, row_tiles, blocks)
        if plan is not None:
            yield plan


def wide_plans(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[WidePlan]:
    """Those of ``WIDE``; none where the chip or the cell has none."""
    for plan in wide.plans(chip, batch, hidden, task, heads):
        if (plan.split, plan.blocks) == (WIDE[design], blocks):
            yield plan


def split_plans(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[SplitPlan]:
    """Those of ``SPLIT``; none where the chip or the cell has none."""
    for plan in split.plans(chip, batch, hidden, task, heads):
        if (plan.cluster, plan.blocks) == (SPLIT[design], blocks):
            yield plan


def hopper_plans(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1
) -> Iterator[WidePlan | SplitPlan]:
    """Those of ``WIDE`` or ``SPLIT``; none where the chip or the cell has none."""
    of_design = wide_plans if design in WIDE else split_plans
    yield from of_design(design, blocks, chip, batch, hidden, task, heads)


def low_rank_plans(blocks: int, chip: Chip, batch: int, hidden: int, task: Task, rank: int) -> Iterator[LowRankPlan]:
    """All of so many blocks a tile."""
    for plan in low_rank.plans(chip, batch, hidden, rank, task):
        if plan.blocks == blocks:
            yield plan


def best_plan(
    design: str, blocks: int, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1, rank: int = 0
) -> Plan | WidePlan | SplitPlan | LowRankPlan:
    """The one that the model of a step's time likes best, of an exchange, of ``WIDE``, ``SPLIT`` or ``LOW_RANK``.

    Raises:
        ValueError: none fits.
    """
    found: Iterator[Plan | WidePlan | SplitPlan | LowRankPlan]
    if design == LOW_RANK:
        found = low_rank_plans(blocks, chip, batch, hidden, task, rank)
    else:
        of_design = plans if design in EXCHANGES else hopper_plans
        found = of_design(design, blocks, chip, batch, hidden, task, heads)
    return min(found, key=lambda plan: plan.microseconds(task))
