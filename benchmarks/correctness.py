"""Is the recurrence right on this GPU? Prints one table: every result's error beside that of plain PyTorch.

A number is the backend's error against float64, as a multiple of the error that the reference makes in the same dtype
(in the Frobenius norm; 1.5 is allowed). "bits" says whether three runs gave the same ones. The exit code is 1 if any
case fails. Needs a GPU; run it from the repository's root: ``python -m benchmarks.correctness``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from elman.errors import UsageError
from elman.ops import BACKENDS
from elman.ops.cells import FUSED_CELLS
from tests.ops.problems import Problem, draw, errors, solve

NAMES = ["h", "h_last", "c_last", "dpre", "dweight", "du", "dv", "dbias", "dh0", "dc0"]
LONG = 65_536


def cases(dtype: torch.dtype, small: bool) -> Iterator[tuple[str, Problem]]:
    """The problems, each with its words for the table."""
    shapes = [(5, 3, 8), (4, 9, 72), (1, 1, 16)]
    if not small:
        shapes += [(64, 64, 512), (64, 64, 1024), (33, 250, 1280), (17, 48, 1760), (12, 256, 2048), (9, 128, 3584)]
    for seq_len, batch, hidden in shapes:
        yield f"{seq_len} × {batch} × {hidden}", draw(seq_len, batch, hidden, dtype=dtype, device="cuda")
    bare = draw(7, 5, 64, dtype=dtype, device="cuda", with_h0=False, reset_rate=None)
    yield "7 × 5 × 64, no h0, no resets", bare
    for cell in FUSED_CELLS:
        if cell != "tanh":
            for seq_len, batch, hidden in [(7, 5, 64)] if small else [(7, 5, 64), (20, 64, 512), (10, 250, 1024)]:
                problem = draw(seq_len, batch, hidden, dtype=dtype, device="cuda", cell=cell, with_bias=True)
                yield f"{seq_len} × {batch} × {hidden}, {cell}", problem
    for operator, heads in (("diagonal", 1), ("block_diagonal", 8), ("low_rank", 1)):
        for seq_len, batch, hidden in (
            [(7, 5, 64)] if small else [(7, 5, 64), (6, 9, 101), (20, 64, 512), (10, 250, 1280)]
        ):
            problem = draw(seq_len, batch, hidden, dtype=dtype, device="cuda", operator=operator, heads=heads)
            yield f"{seq_len} × {batch} × {hidden}, {operator}", problem
    saturated = draw(16, 8, 64, dtype=dtype, device="cuda", scale=8.0)
    yield "16 × 8 × 64, saturated", replace(saturated, weight=saturated.weight * 3)


def table_row(words: str, problem: Problem, backend: str) -> tuple[str, bool]:
    """A line of the table, and whether all of it is right."""
    try:
        found = errors(problem, backend)
    except UsageError as error:
        return f"| {words} | {backend} |{' – |' * len(NAMES)} {error} |", True
    runs = [solve(problem, backend) for _ in range(3)]
    same = all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in run)
    right = same and all(error.ours <= error.allowed for error in found.values())
    cells = [f"{found[name].ratio:.2f}" if name in found else "" for name in NAMES]
    return f"| {words} | {backend} | {' | '.join(cells)} | {'same' if same else 'DIFFER'} |", right


@torch.no_grad()
def long_row(backend: str) -> tuple[str, bool]:
    """65,536 steps forward: the error of the last hundred, which drift would enlarge."""
    problem = draw(LONG, 4, 64, dtype=torch.bfloat16, device="cuda", reset_rate=None)
    last = [
        p.run(name)[0][-100:].double()
        for p, name in ((problem.to(torch.float64), "reference"), (problem, "reference"), (problem, backend))
    ]
    reference, ours = ((x - last[0]).norm() for x in last[1:])
    ratio = float(ours / reference)
    return f"| {LONG} × 4 × 64, the last 100 steps | {backend} | {ratio:.2f} |{'  |' * len(NAMES)}", ratio <= 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small cases only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    backends = [name for name in BACKENDS if name != "reference"]
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        print(f"\n{dtype}\n\n| T × B × H | backend | {' | '.join(NAMES)} | bits |\n{'|---' * (len(NAMES) + 3)}|")
        rows = [table_row(words, problem, name) for words, problem in cases(dtype, args.small) for name in backends]
        if dtype == torch.bfloat16 and not args.small:
            rows += [long_row(name) for name in backends]
        for line, right in rows:
            print(line + ("" if right else "  ← WRONG"))
            wrong += not right
    print(f"\n{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
