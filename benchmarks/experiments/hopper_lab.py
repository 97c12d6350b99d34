"""Variants of the wgmma kernels, timed side by side and traced: ``python -m benchmarks.experiments.hopper_lab``.

A plan's last template number carries a code beside the split or the rooms: + 10 whether the next chunk has come is
looked at while this one's last wgmma go, + 20 each chunk is waited for; without, all are looked at together where
every chunk has a slot of its own; + 100 loaders ask for flags before slots are free; + 1000 warp groups take no turns
(split); + 10000 clocks are written at sixteen places; + 100000 nobody looks for late words (wrong now and then: only to
see what it costs). For every shape: error and bits as in ``benchmarks.split``, then us a step.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
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
        s.wide(1, 3, 0, 10, 20, 100, 110, 100000)
    elif (batch, hidden) == (512, 1280):
        s.split(2, 4, 0, 10, 20, 100, 110, 1000, 1010, 100000)
        s.split(2, 4, 10, 1010, slots=15)
        s.split(2, 6, 10, 1010)
    elif (batch, hidden) == (256, 2048):
        s.wide(2, 4, 0, 10)
        s.split(2, 4, 0, 10, 1010)
    elif (batch, hidden) == (128, 3584):
        s.split(4, 6, 0, 10, 1000, 1010, 100000)
        s.split(4, 6, 0, 10, slots=6, rooms=2)
        s.split(4, 4, 0, 10)
    elif hidden == 1024:
        s.wide(1, 4, 0, 10)
        s.wide(2, 4, 0, 10)
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


SHAPES = ["256x1280", "512x1280", "128x3584", "256x2048", "256x1024", "512x1024"]
#: By shape: the kernels, their split or cluster, blocks, code.
TRACED = {
    "256x1280": [("wide", 1, 3, 0)],
    "512x1280": [("split", 2, 4, 0)],
    "128x3584": [("split", 4, 6, 0)],
}
_EVENTS = {
    "products": "before turn, turn, first chunk, last chunk, multiplied, voted, sent",
    "cells": "begins, ready, sums in, added, told, published, stored",
    "loader": "begins, armed, first copy, last copy",
    "both": "begins, turn, first chunk, last chunk, multiplied, voted, published, stored",
}
_WARPS = {
    "split": {0: "products", 4: "products", 8: "cells", 12: "loader"},
    "wide": {0: "both", 4: "both", 8: "loader", 10: "loader"},
}


def trace(batch: int, hidden: int, plans: Plans) -> None:
    """Prints the median clock of every place, over CTAs and two steps, from the first tile's product on."""
    clocks = torch.zeros(132, 4, 4, 16, 8, dtype=torch.int32, device="cuda")
    launch = persistent.launch

    def traced(module: Any, kernel: Any, blocks: int, threads: int, arguments: Any, *rest: Any, **options: Any) -> Any:
        arguments = (*arguments[:2], clocks, *arguments[3:])
        return launch(module, kernel, blocks, threads, arguments, *rest, **options)

    with using(plans):
        run = walks(batch, hidden, persistent)["forward"]
        run()
        persistent.launch = traced
        try:
            run(), torch.cuda.synchronize()
        finally:
            persistent.launch = launch
    plan = plans["forward"]
    ctas, tiles = plan.groups * plan.columns, plan.tiles
    seen = clocks[:ctas].long().cpu()
    print(
        f"{batch} x {hidden} {plan.kernel(TASKS['forward'], 'bf16')}: clocks after the first tile's turn, steps 1 and 2"
    )
    wide_one = isinstance(plan, wide.WidePlan)
    for warp, name in _WARPS["wide" if wide_one else "split"].items():
        # Of wide tiles each warp group, and its loaders, have every other one.
        own = [tile for tile in range(tiles) if not wide_one or tile % 2 == (warp // 4 if warp < 8 else (warp - 8) // 2)]
        for event, label in enumerate(_EVENTS[name].split(", ")):
            line = []
            for tile in own:
                values = [
                    int((seen[c, step, tile, warp, event] - seen[c, step, 0, 0, 1] + 2**31) % 2**32 - 2**31)
                    for c in range(ctas)
                    for step in (1, 2)
                ]
                spread = statistics.quantiles(values, n=10)
                line.append(f"{statistics.median(values):7.0f} ({spread[0]:6.0f} {spread[-1]:6.0f})")
            print(f"  {warp:2} {name:9} {label:12} {' '.join(line)}")
    period = [int((seen[c, 2, 0, 0, 1] - seen[c, 1, 0, 0, 1]) % 2**32) for c in range(ctas)]
    print(f"  a step: {statistics.median(period):.0f} clocks", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", action="store_true", help="in this process: a kernel that traps ends it")
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    if not args.one:
        for shape in args.shapes:
            command = [sys.executable, "-m", __spec__.name if __spec__ else "", "--one", "--shapes", shape]
            for more in ([], ["--trace"]) if args.trace and shape in TRACED else ([],):
                subprocess.run([*command, "--repeats", str(args.repeats), *more], check=False, timeout=150)
        return
    (shape,) = args.shapes
    batch, hidden = map(int, shape.split("x"))
    chip, started = persistent.chip_of(0), time.perf_counter()
    module = persistent._module.__wrapped__
    persistent._module = functools.cache(  # type: ignore[misc]
        lambda *given: replace(module(*given), spill_limit=10**6)
    )
    if args.trace:
        for kernels, number, blocks, code in TRACED[shape]:
            s = Shapes(chip, batch, hidden)
            (s.wide if kernels == "wide" else s.split)(number, blocks, code + 10000)
            trace(batch, hidden, s.found[0])
        return
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
