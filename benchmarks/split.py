"""Are the kernels that split the depth over a cluster right on this GPU, and how fast?

For each shape the best plans of ``cuda/split.cuh`` on paper are checked against the reference in float64 (every
result's error over that of plain PyTorch in bf16, of which 1.5 and some is allowed; three runs bit for bit the same)
and timed beside the best of the backend's other kernels and the loop in a CUDA graph: forward that saves, and
backward, T = 512 in bf16, medians of CUDA events. The table is printed last; the exit code is 1 if any check fails.
Needs Hopper, and less than 90 s: ``python -m benchmarks.split``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compiling import compile_ahead
from benchmarks.plans import words
from benchmarks.recurrence import in_graph, median_ms
from elman.ops import loop, persistent, split
from elman.ops.cells import CELLS
from elman.ops.cuda.compiler import architecture
from elman.ops.operators import Dense
from elman.ops.persistent import AnyPlan
from elman.ops.planning import DIRECTIONS, Chip, Task
from tests.ops.problems import answers, draw, errors, solve

#: B × H.
SHAPES = [(128, 3584), (256, 2048), (512, 1280), (256, 1280)]
TASKS = {direction: Task(direction, CELLS["tanh"]) for direction in DIRECTIONS}
_STEPS, _RUNS = 512, 3

#: By direction.
Plans = dict[str, AnyPlan]


def best_plans(chip: Chip, batch: int, hidden: int, most: int, tasks: dict[str, Task] = TASKS) -> list[Plans]:
    """At most so many, by the model of a step's time; both directions of one have the same clusters and tiles."""
    found: dict[tuple[int, int], Plans] = {}
    for direction, task in tasks.items():
        for plan in split.plans(chip, batch, hidden, task, 1):
            found.setdefault((plan.cluster, plan.blocks), {})[direction] = plan
    both = [plans for plans in found.values() if len(plans) == len(tasks)]
    return sorted(both, key=lambda plans: sum(plans[d].microseconds(task) for d, task in tasks.items()))[:most]


def other_plan(chip: Chip, batch: int, hidden: int, task: Task) -> AnyPlan:
    """What the backend would take without these kernels."""
    others = [plan for plan in persistent._plans(chip, batch, hidden, task, 1) if not isinstance(plan, split.SplitPlan)]
    return min(others, key=lambda plan: plan.microseconds(task))


def using(plans: Plans) -> Any:
    """Inside the ``with`` block the persistent backend takes these."""
    return mock.patch.object(persistent, "make_plan", lambda chip, batch, hidden, task, *sizes: plans[task.direction])


def check(batch: int, hidden: int, all_plans: Iterable[Plans]) -> list[tuple[float, bool, bool]]:
    """Of each: the largest error over the reference's, whether all are small enough, and whether bits stay the same.

    Twenty steps with h0 and resets, and one step of an odd batch without.
    """
    results = [(0.0, True, True) for _ in all_plans]
    bare = {"with_h0": False, "reset_rate": None}
    for rows, steps, options in ((batch, 20, {}), (batch - 1, 1, bare)):
        problem = draw(steps, rows, hidden, dtype=torch.bfloat16, device="cuda", **options)  # type: ignore[arg-type]
        known = answers(problem)
        for i, plans in enumerate(all_plans):
            with using(plans):
                first, *others = (solve(problem, "persistent") for _ in range(_RUNS))
            found = errors(problem, first, known).values()
            ratio, right, same = results[i]
            ratio = max(ratio, *(error.ratio for error in found if error.reference))
            right &= all(error.ours <= error.allowed for error in found)
            same &= all(torch.equal(value, other[name]) for other in others for name, value in first.items())
            results[i] = ratio, right, same
    return results


def walks(batch: int, hidden: int, backend: Any) -> dict[str, Callable[[], object]]:
    """Both directions by a backend's functions, without h0 or resets."""
    cell, bf16 = CELLS["tanh"], torch.bfloat16
    pre = torch.randn(_STEPS, batch, 1, hidden, device="cuda", dtype=bf16)
    operator = Dense((torch.randn(hidden, hidden, device="cuda") / hidden**0.5).to(bf16))
    h, _, saved = backend.forward(pre, operator, None, [], None, cell, True)
    dh = torch.randn_like(h)
    return {
        "forward": lambda: backend.forward(pre, operator, None, [], None, cell, True),
        "backward": lambda: backend.backward(dh, [], h, saved, operator, [], None, cell, False),
    }


def microseconds(runs: dict[str, Callable[[], object]], repeats: int, flush: Tensor) -> str:
    """A step, forward and backward."""
    return " / ".join(f"{median_ms(runs[d], repeats, flush) * 1000 / _STEPS:.2f}" for d in DIRECTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="B×H", help="default: those that large batches have plans for")
    parser.add_argument("--most", type=int, default=2, help="plans a shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-loop", action="store_true", help="leave out the loop in a CUDA graph")
    args = parser.parse_args()
    started, chip, bf16 = time.perf_counter(), persistent.chip_of(0), torch.bfloat16
    shapes = [tuple(map(int, shape.replace("x", "×").split("×"))) for shape in args.shapes or []] or SHAPES
    cases = [
        (
            *(batch, hidden, best_plans(chip, batch, hidden, args.most)),
            {d: other_plan(chip, batch, hidden, task) for d, task in TASKS.items()},
        )
        for batch, hidden in shapes
    ]
    wanted = [plans for *_, ours, others in cases for plans in (*ours, others)]
    modules = [persistent._module(TASKS[d], bf16, plan) for plans in wanted for d, plan in plans.items()]
    compile_ahead(modules, architecture(chip.capability))
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)

    flush, lines, wrong = torch.empty(2**28, dtype=torch.uint8, device="cuda"), [], False
    for batch, hidden, ours, others in cases:
        checks = check(batch, hidden, ours)
        print(f"{batch} × {hidden}: checked after {time.perf_counter() - started:.0f} s", flush=True)
        with using(others):
            of_others = microseconds(walks(batch, hidden, persistent), args.repeats, flush)
        of_loop = "–"
        if not args.no_loop:
            runs = {d: in_graph(run) for d, run in walks(batch, hidden, loop).items()}
            of_loop = microseconds(runs, args.repeats, flush)
        for plans, (ratio, right, same) in zip(ours, checks, strict=True):
            wrong |= not (right and same)
            with using(plans):
                measured = microseconds(walks(batch, hidden, persistent), args.repeats, flush)
            model = plans["forward"].microseconds(TASKS["forward"])
            error, bits = f"{ratio:.2f}{'' if right else ' WRONG'}", "same" if same else "DIFFER"
            columns = (words(plans["forward"]), error, bits, f"{model:.2f}", measured, of_others, of_loop)
            lines.append(f"| {batch} × {hidden} | {' | '.join(columns)} |")
        print(f"{batch} × {hidden}: timed after {time.perf_counter() - started:.0f} s", flush=True)

    print(f"\n{torch.cuda.get_device_name()}; µs a step forward / backward")
    print("| B × H | plan | error | bits | on paper | split | other kernels | loop in a graph |\n" + "|---" * 8 + "|")
    print("\n".join(lines))
    print("WRONG" if wrong else f"all right, {time.perf_counter() - started:.0f} s")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
