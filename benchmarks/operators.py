"""How fast are the operators beside dense? Prints one table: our kernels and our loop in a CUDA graph, bf16, tanh.

For the diagonal, whose steps cost what their numbers cost to move, the rate is given too: forwards a step reads pre and
writes h (4 bytes a unit); with its backward pass it writes v as well, and then reads dh, v and h and writes dpre (14
bytes a unit in all). A copy on an H200 runs at 4.25 TB/s. Needs a GPU: ``python -m benchmarks.operators``.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.machine import machine
from benchmarks.recurrence import Run, in_graph, median_ms
from tests.ops.problems import Problem, answers, draw, errors, parts, solve

#: Operator, B, H, and heads where it has them.
CASES = [
    ("diagonal", 64, 512, 1),
    ("diagonal", 256, 1280, 1),
    ("diagonal", 256, 2048, 1),
    ("block_diagonal", 64, 1024, 8),
    ("block_diagonal", 256, 1280, 8),
    ("low_rank", 64, 1280, 1),
]


def passes(problem: Problem, backend: str) -> tuple[Run, Run]:
    """The forward pass without autograd, and both passes."""

    @torch.no_grad()
    def forward() -> object:
        return problem.run(backend)

    inputs = {name: x.requires_grad_() for name, x in problem.inputs().items()}

    def both() -> object:
        return torch.autograd.grad(problem.run(backend, inputs)[0], list(inputs.values()), problem.dh)

    return forward, both


def times(problem: Problem, backend: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the forward pass and of both."""
    forward, both = (median_ms(in_graph(run), args.repeats, args.flush) / 1000 for run in passes(problem, backend))
    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seq-len", type=int, default=512, help="steps of every run (default 512)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the median is taken (default 10)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    args.flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    print(machine(torch.device("cuda"), None))
    print(f"T = {args.seq_len}; µs a step forward / ms both passes, medians of {args.repeats}\n")
    print("| weight | B × H | persistent | TB/s | loop | worst error, persistent |\n" + "|---" * 6 + "|")
    for operator, batch, hidden, heads in CASES:
        given = {"dtype": torch.bfloat16, "device": "cuda", "operator": operator, "heads": heads}
        short = draw(32, batch, hidden, reset_rate=None, with_h0=False, **given)
        worst = max(error.ratio for error in errors(short, solve(short, "persistent"), answers(short)).values())
        problem = draw(args.seq_len, batch, hidden, reset_rate=None, with_h0=False, **given)
        (forward, both), loop = (times(problem, backend, args) for backend in ("persistent", "loop"))
        units = args.seq_len * batch * hidden / 1e12
        rate = f"{4 * units / forward:.2f} / {14 * units / both:.2f}" if operator == "diagonal" else ""
        shape = " and ".join(str(tuple(x.shape)) for x in parts(problem.weight))
        columns = [
            f"{operator} {shape}",
            f"{batch} × {hidden}",
            f"{forward * 1e6 / args.seq_len:.3f} / {both * 1e3:.3f}",
            rate,
            f"{loop[0] * 1e6 / args.seq_len:.2f} / {loop[1] * 1e3:.2f}",
            f"{worst:.2f} × plain bf16's",
        ]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
