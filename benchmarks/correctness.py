"""Is the recurrence right on this GPU? Prints one table: every result's error beside that of plain PyTorch.

A number is the backend's error against float64, as a multiple of the error that the reference makes in the same dtype
(in the Frobenius norm; 1.5 is allowed). "bits" says whether three runs gave the same ones. Beside the persistent
kernels that the backend chooses for a shape, each of its designs is run that fits the GPU. The exit code is 1 if any
case fails. Needs a GPU; run it from the repository's root: ``python -m benchmarks.correctness``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.compiling import compile_ahead
from benchmarks.designs import EXCHANGES, LOW_RANK, SPLIT, WIDE, best_plan
from elman.errors import UsageError
from elman.ops import BACKENDS, diagonal, loop, low_rank, persistent
from elman.ops.cells import CELLS, FUSED_CELLS, Cell
from elman.ops.cuda.compiler import Module, architecture
from elman.ops.persistent import AnyPlan
from elman.ops.planning import Chip, Task
from tests.ops.problems import Answers, Problem, answers, draw, errors, low_rank_of, solve

NAMES = ["h", "h_last", "c_last", "dpre", "dweight", "du", "dv", "dbias", "dh0", "dc0"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALVES = tuple(persistent._NUMBERS)
LONG = 65_536


@dataclass(frozen=True)
class Case:
    """A problem that is yet to be drawn, and how the persistent kernels are to run it.

    Attributes:
        words: beside its sizes, for the table.
        options: of ``draw``.
        saturated: units at their limits.
        design: exchange, or one of ``WIDE`` or ``SPLIT``, and blocks of batch rows a tile; None: the backend chooses.
    """

    seq_len: int
    batch: int
    hidden: int
    words: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    saturated: bool = False
    design: tuple[str, int] | None = None

    def __str__(self) -> str:
        return f"{self.seq_len} × {self.batch} × {self.hidden}{self.words and ', '}{self.words}"

    def draw(self, dtype: torch.dtype) -> Problem:
        if not self.saturated:
            return draw(self.seq_len, self.batch, self.hidden, dtype=dtype, device="cuda", **self.options)
        problem = draw(self.seq_len, self.batch, self.hidden, dtype=dtype, device="cuda", scale=8.0)
        return replace(problem, weight=problem.weight * 3)

    @property
    def cell(self) -> Cell:
        return CELLS[self.options.get("cell", "tanh")]

    @property
    def operator(self) -> str:
        return str(self.options.get("operator", "dense"))

    @property
    def make_plan(self) -> Callable[..., AnyPlan]:
        return functools.partial(best_plan, *self.design) if self.design else persistent.make_plan

    def plans(self, chip: Chip) -> dict[Task, AnyPlan]:
        """What the persistent kernels run, the diagonal ones aside; empty where that does not fit the GPU."""
        heads = math.gcd(self.options["heads"], self.hidden) if self.operator == "block_diagonal" else 1
        width = persistent._Layout(heads, self.hidden // heads).width
        rank = low_rank.filled(low_rank_of(self.hidden)) if self.operator == "low_rank" else 0
        given = self.batch, width
        try:
            return {task: self.make_plan(chip, *given, task, heads, rank) for task in persistent._tasks(self.cell)}
        except ValueError:
            return {}

    def modules(self, dtype: torch.dtype, chip: Chip) -> list[Module]:
        """Of the kernels that the fused backends run it by."""
        found = [loop.step_module(self.cell.name, dtype)]
        if self.operator == "diagonal":
            found.append(diagonal.module(self.cell.name, dtype))
        elif dtype in HALVES:
            found += [persistent._module(task, dtype, plan) for task, plan in self.plans(chip).items()]
        return found


def cases(chip: Chip, small: bool) -> list[Case]:
    """All of them; of float32 those that ask for no design."""
    shapes = [(5, 3, 8), (4, 9, 72), (1, 1, 16)]
    if not small:
        shapes += [(64, 64, 512), (64, 64, 1024), (33, 250, 1280), (17, 48, 1760), (12, 256, 2048), (9, 128, 3584)]
    found = [Case(*shape) for shape in shapes]
    found.append(Case(7, 5, 64, "no h0, no resets", {"with_h0": False, "reset_rate": None}))
    shapes = [(7, 5, 64)] if small else [(7, 5, 64), (20, 64, 512), (10, 250, 1024)]
    for cell in FUSED_CELLS:
        if cell != "tanh":
            found += [Case(*shape, cell, {"cell": cell, "with_bias": True}) for shape in shapes]
    shapes = [(7, 5, 64)] if small else [(7, 5, 64), (6, 9, 101), (20, 64, 512), (10, 250, 1280)]
    for operator, heads in (("diagonal", 1), ("block_diagonal", 8), ("low_rank", 1)):
        found += [Case(*shape, operator, {"operator": operator, "heads": heads}) for shape in shapes]
    found.append(Case(16, 8, 64, "saturated", saturated=True))
    return found + ([] if small else designs(chip))


def designs(chip: Chip) -> list[Case]:
    """Those that fit: every exchange with one and two blocks a tile, the wide and split kernels with few and the most.

    All have several tiles a group, the staged exchanges many. With the most blocks, the wide kernels whose warp groups
    have tiles of their own give slots back and keep weights in shared memory.
    """
    wanted = [(cell, 256, design, blocks) for cell in ("tanh", "lstm") for design in EXCHANGES for blocks in (1, 2)]
    wanted += [("tanh", 640, design, blocks) for design in WIDE for blocks in (2, 8)]
    wanted += [
        ("tanh", 640, design, blocks) for design, most in zip(SPLIT, (6, 8), strict=True) for blocks in (2, most)
    ]
    found = []
    for cell, hidden, design, blocks in wanted:
        words = f"{cell}, {design}, {blocks} block{'s' * (blocks > 1)}"
        options = {"cell": cell, "with_bias": not CELLS[cell].additive}
        batch = 501 if CELLS[cell].reads_memory else 1001  # a memory takes shared memory of every tile
        case = Case(11, batch, hidden, words, options, design=(design, blocks))
        if case.plans(chip):
            found.append(case)
    for cell, blocks in (("tanh", 1), ("tanh", 2), ("delta", 1)):
        words = f"{cell}, {LOW_RANK}, {blocks} block{'s' * (blocks > 1)}"
        case = Case(11, 501, 640, words, {"cell": cell, "operator": "low_rank"}, design=(LOW_RANK, blocks))
        if case.plans(chip):
            found.append(case)
    return found


def table_row(case: Case, problem: Problem, known: Answers, backend: str) -> tuple[str, bool]:
    """A line of the table, and whether all of it is right."""
    try:
        with mock.patch.object(persistent, "make_plan", case.make_plan):
            runs = [solve(problem, backend) for _ in range(3)]
    except UsageError as error:
        return f"| {case} | {backend} |{' – |' * len(NAMES)} {error} |", True
    found = errors(problem, runs[0], known)
    same = all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in run)
    right = same and all(error.ours <= error.allowed for error in found.values())
    cells = [f"{found[name].ratio:.2f}" if name in found else "" for name in NAMES]
    return f"| {case} | {backend} | {' | '.join(cells)} | {'same' if same else 'DIFFER'} |", right


def rows(wanted: Iterable[Case], dtype: torch.dtype, backends: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The lines of the table. One problem is there at a time, and what its backends are judged by is found once."""

    def drawn(case: Case) -> tuple[object, ...]:
        return case.seq_len, case.batch, case.hidden, case.options, case.saturated

    for _, group in itertools.groupby(wanted, key=drawn):
        same = list(group)
        problem = same[0].draw(dtype)
        known = answers(problem)
        for case in same:
            for backend in ["persistent"] if case.design else backends:
                yield table_row(case, problem, known, backend)


@torch.no_grad()
def long_rows(backends: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """65,536 steps forward: the error of the last hundred, which drift would enlarge."""
    problem = draw(LONG, 4, 64, dtype=torch.bfloat16, device="cuda", reset_rate=None)

    def last(p: Problem, backend: str) -> torch.Tensor:
        return p.run(backend)[0][-100:].double()

    truth = last(problem.to(torch.float64), "reference")
    reference = (last(problem, "reference") - truth).norm()
    for backend in backends:
        ratio = float((last(problem, backend) - truth).norm() / reference)
        yield f"| {LONG} × 4 × 64, the last 100 steps | {backend} | {ratio:.2f} |{'  |' * len(NAMES)}", ratio <= 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small cases only")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="in this order")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    start = time.perf_counter()
    chip, dtypes = persistent.chip_of(torch.cuda.current_device()), [DTYPES[name] for name in args.dtypes]
    every = cases(chip, args.small)
    wanted = {dtype: [case for case in every if dtype in HALVES or not case.design] for dtype in dtypes}
    modules = [module for dtype, some in wanted.items() for case in some for module in case.modules(dtype, chip)]
    compiled = compile_ahead(modules, architecture(chip.capability))
    print(f"{compiled} modules compiled in {time.perf_counter() - start:.1f} s")

    backends = [name for name in BACKENDS if name != "reference"]
    wrong = 0
    for dtype in dtypes:
        print(f"\n{dtype}\n\n| T × B × H | backend | {' | '.join(NAMES)} | bits |\n{'|---' * (len(NAMES) + 3)}|")
        for line, right in rows(wanted[dtype], dtype, backends):
            print(line + ("" if right else "  ← WRONG"), flush=True)
            wrong += not right
    if torch.bfloat16 in dtypes and not args.small:
        print(
            f"\n{torch.bfloat16}, long\n\n| T × B × H | backend | h |{'  |' * len(NAMES)}\n{'|---' * (len(NAMES) + 3)}|"
        )
        for line, right in long_rows(backends):
            print(line + ("" if right else "  ← WRONG"), flush=True)
            wrong += not right
    print(f"\n{wrong} wrong; {time.perf_counter() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
