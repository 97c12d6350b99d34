"""Variants of the wgmma kernels, timed side by side and traced: ``python -m benchmarks.experiments.hopper_lab``.

A plan's last template number carries a code beside the split or the cluster, of what is left out: + 10 weights in
registers and in shared memory take turns at every wgmma, + 100 all chunks of a tile are looked at together, + 1000 the
room for sums is waited for while the product goes on, + 10000 loaders poll before slots are free; and + 100000 one room
alone. For every shape: error and bits as in ``benchmarks.split``, then us a step.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from typing import Any

import torch

from benchmarks.compiling import compile_ahead
from benchmarks.split import TASKS, check, microseconds, using, walks
from elman.ops import persistent, split, wide
from elman.ops.cuda.compiler import architecture
from elman.ops.planning import Chip, Task

#: All that a CTA may have: more than any variant takes, so that none has to be summed up here.
_SHARED_BYTES = 227 * 1024

Plans = dict[str, Any]


def with_code(plan: Any, code: int, **changes: Any) -> Any:
    """The plan with a code, and other numbers changed."""
    base = type(plan)

    def kernel(self: Any, task: Task, number: str) -> str:
        return re.sub(r"(\d+)>$", lambda found: f"{int(found[1]) + code}>", base.kernel(self, task, number))

    kind = type(f"{base.__name__}{code}", (base,), {"kernel": kernel})
    values = {field.name: getattr(plan, field.name) for field in fields(base)}
    return kind(**{**values, "shared_bytes": _SHARED_BYTES, **changes})


class Shapes:
    """Collects variants of one shape."""

    def __init__(self, chip: Chip, batch: int, hidden: int) -> None:
        self.chip, self.batch, self.hidden = chip, batch, hidden
        self.found: list[Plans] = []

    def _add(self, module: Any, kind: str, number: int, blocks: int, code: int, changes: dict[str, Any]) -> None:
        plans = {}
        for direction, task in TASKS.items():
            fitting = module.plans(self.chip, self.batch, self.hidden, task, 1)
            found = [plan for plan in fitting if (getattr(plan, kind), plan.blocks) == (number, blocks)]
            if not found:
                print(f"{self.batch} x {self.hidden}: no {kind} {number} of {blocks} blocks {direction}")
                return
            plans[direction] = with_code(found[0], code, **changes)
        self.found.append(plans)

    def wide(self, number: int, blocks: int, *codes: int, **changes: Any) -> None:
        for code in codes or (0,):
            self._add(wide, "split", number, blocks, code, changes)

    def split(self, number: int, blocks: int, *codes: int, **changes: Any) -> None:
        for code in codes or (0,):
            self._add(split, "cluster", number, blocks, code, changes)


def variants(chip: Chip, batch: int, hidden: int) -> list[Plans]:
    """What is to be timed of a shape, the plan of today first."""
    s = Shapes(chip, batch, hidden)
    if (batch, hidden) == (256, 1280):
        s.wide(1, 3, 11110, 0, 10, 100, 10000)
        s.wide(3, 3, 0)
        s.split(4, 4, 0)
    elif (batch, hidden) == (512, 1280):
        s.split(2, 4, 11110, 0, 10, 100, 1000, 10000)
        s.split(2, 4, 0, 10000, slots=15)
        s.split(2, 3, 0, slots=20)
        s.wide(3, 3, 0)
    elif (batch, hidden) == (256, 2048):
        s.wide(2, 4, 11110, 0, 10, 100)
        s.split(2, 4, 0, 1000)
    elif (batch, hidden) == (128, 3584):
        s.split(4, 6, 11110, 0, 10, 100, 1000)
        s.split(4, 6, 100000, 101000, slots=8)
        s.split(4, 4, 0)
    elif (batch, hidden) == (1024, 1024):
        s.split(2, 6, 11110, 0)
        s.wide(3, 4, 0)
        s.wide(3, 8, 0)
        s.wide(1, 8, 0)
    elif hidden == 1024:
        s.wide(1, 4, 11110, 0)
        s.wide(2, 4, 11110, 0)
        s.wide(3, 2, 11110, 0)
        s.wide(3, 4, 11110, 0)
    else:
        for plans in (wide.plans, split.plans):
            found = list(plans(chip, batch, hidden, TASKS["forward"], 1))
            found.sort(key=lambda plan: plan.microseconds(TASKS["forward"]))
            for plan in found[:3]:
                if isinstance(plan, wide.WidePlan):
                    s.wide(plan.split, plan.blocks)
                else:
                    s.split(plan.cluster, plan.blocks)
    return s.found


SHAPES = [
    "256x1280",
    "512x1280",
    "128x3584",
    "256x2048",
    "256x1024",
    "512x1024",
    "1024x1024",
    "32x2816",
    "384x2048",
    "256x768",
    "256x2816",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", action="store_true", help="in this process: a kernel that traps ends it")
    args = parser.parse_args()
    if not args.one:
        for shape in args.shapes:
            command = [sys.executable, "-m", __spec__.name if __spec__ else "", "--one", "--shapes", shape]
            subprocess.run([*command, "--repeats", str(args.repeats)], check=False, timeout=150)
        return
    (shape,) = args.shapes
    batch, hidden = map(int, shape.split("x"))
    chip, started = persistent.chip_of(0), time.perf_counter()
    module = persistent._module.__wrapped__
    persistent._module = functools.cache(  # type: ignore[misc]
        lambda *given: replace(module(*given), spill_limit=10**6)
    )
    found = variants(chip, batch, hidden)
    modules = [persistent._module(TASKS[d], torch.bfloat16, plan) for plans in found for d, plan in plans.items()]
    compile_ahead(modules, architecture(chip.capability))
    print(f"{shape}: compiled after {time.perf_counter() - started:.0f} s", flush=True)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for plans in found:
        ((ratio, right, same),) = check(batch, hidden, [plans])
        with using(plans):
            us = microseconds(walks(batch, hidden, persistent), args.repeats, flush)
        plan = plans["forward"]
        name = plan.kernel(TASKS["forward"], "bf16").replace("_forward<bf16, Tanh,", "").rstrip(">")
        wrong = "" if right and same else " WRONG" if not right else " BITS DIFFER"
        print(f"{shape} | {name} on {plan.groups}x{plan.columns}x{plan.tiles} | {us} | {ratio:.2f}{wrong}", flush=True)
    print(f"{shape}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
