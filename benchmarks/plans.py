"""What the model of a step's time says of a plan, and what the plan takes: what the choice of plans stands on.

For every shape, the best plans of each design by the model run forwards and backwards on the same tensors, T = 512 in
bf16; times are medians of CUDA events, the workspace's memset included. Prints a table of microseconds a step, what was
chosen marked, and writes all to benchmarks/results/. Needs a GPU: ``python -m benchmarks.plans``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compiling import compile_ahead
from benchmarks.machine import machine
from benchmarks.recurrence import RESULTS, SHAPES, median_ms
from elman.ops import persistent
from elman.ops.cells import CELLS
from elman.ops.cuda.compiler import architecture
from elman.ops.low_rank import LowRankPlan
from elman.ops.narrow import Plan
from elman.ops.operators import Dense, LowRank
from elman.ops.planning import Chip, Task
from elman.ops.wide import WidePlan


def best_of_each(chip: Chip, batch: int, hidden: int, task: Task, most: int, rank: int) -> list[persistent.AnyPlan]:
    """At most so many plans a design, the best of its kind by the model first."""
    found = sorted(persistent._plans(chip, batch, hidden, task, 1, rank), key=lambda plan: plan.microseconds(task))
    kinds = (Plan, WidePlan, LowRankPlan)
    return [plan for kind in kinds for plan in [p for p in found if isinstance(p, kind)][:most]]


def words(plan: persistent.AnyPlan) -> str:
    """A plan in short: its template's numbers, then groups × columns × tiles."""
    kind = (
        plan.kernel(Task("forward", CELLS["tanh"]), "bf16").split("Tanh, ")[1].rstrip(">").replace("persistent::", "")
    )
    return f"{kind} on {plan.groups}×{plan.columns}×{plan.tiles}"


def milliseconds(
    plan: persistent.AnyPlan, task: Task, batch: int, hidden: int, rank: int, repeats: int, flush: Tensor
) -> float:
    """One direction of 512 steps by this plan, without h0 or resets."""
    cell = task.cell
    pre = torch.randn(512, batch, cell.gates, hidden, device="cuda", dtype=torch.bfloat16)
    products = () if cell.products == 1 else (cell.products,)

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(*products, rows, columns, device="cuda") / columns**0.5).bfloat16()

    operator = LowRank(weight(hidden, rank), weight(rank, hidden)) if rank else Dense(weight(hidden, hidden))

    def forward() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return persistent.forward(pre, operator, None, [], None, cell, True)

    h, _, saved = forward()
    dh = torch.randn_like(h)

    def backward() -> object:
        return persistent.backward(dh, [], h, saved, operator, [], None, cell, False)

    with mock.patch.object(persistent, "make_plan", return_value=plan):
        return median_ms(forward if task.direction == "forward" else backward, repeats, flush)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default="tanh")
    parser.add_argument("--shapes", nargs="+", metavar="B×H", help="default: those of benchmarks.recurrence")
    parser.add_argument("--rank", type=int, default=0, help="of the weight, a multiple of 8; dense if absent")
    parser.add_argument("--most", type=int, default=2, help="plans a design")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", help="where the sources are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.replace("x", "×").split("×"))) for shape in args.shapes or []] or SHAPES[args.cell]
    cell, chip, bf16 = CELLS[args.cell], persistent.chip_of(0), torch.bfloat16
    cases = [
        (batch, hidden, task, plan)
        for batch, hidden in shapes
        for task in persistent._tasks(cell)
        for plan in best_of_each(chip, batch, hidden, task, args.most, args.rank)
    ]
    compile_ahead([persistent._module(task, bf16, plan) for *_, task, plan in cases], architecture(chip.capability))
    flush, rows = torch.empty(2**28, dtype=torch.uint8, device="cuda"), []
    print(f"| B × H | direction | plan | model | measured |\n{'|---' * 5}|", flush=True)
    for batch, hidden, task, plan in cases:
        ms = milliseconds(plan, task, batch, hidden, args.rank, args.repeats, flush)
        chosen = plan == persistent.make_plan(chip, batch, hidden, task, 1, args.rank)
        model, measured = plan.microseconds(task), ms * 1000 / 512
        rows.append((batch, hidden, task.direction, words(plan), chosen, model, measured))
        mark = " (chosen)" if chosen else ""
        print(
            f"| {batch} × {hidden} | {task.direction} | {words(plan)}{mark} | {model:.2f} | {measured:.2f} |",
            flush=True,
        )
    device = torch.device("cuda", 0)
    names = ("batch", "hidden", "direction", "plan", "chosen", "model_us_per_step", "measured_us_per_step")
    path = args.out / f"plans-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    facts = {
        "machine": machine(device, args.commit),
        "cell": args.cell,
        "rank": args.rank,
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
