"""How fast are the operators beside dense? Prints one table: our kernels and our loop in a CUDA graph, bf16, tanh.

For the diagonal, whose steps cost what their numbers cost to move, the rate is given too: forwards a step reads pre and
writes h (4 bytes a unit); backwards it reads dh, pre and h and writes dpre (12 bytes a unit in all). A copy on an H200
runs at 4.25 TB/s. Cells in log space stand beside their linear twins.

A second table is of the linear recurrence in float32, our kernel and PyTorch's operations, both in a CUDA graph: 12
bytes a unit forwards, 32 with the backward pass. Needs a GPU: ``python -m benchmarks.operators``.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from benchmarks.machine import machine
from benchmarks.recurrence import Run, in_graph, median_ms
from elman.ops import linear_scan, scan
from tests.ops.problems import Problem, answers, draw, errors, parts, solve

#: Operator, B, H, heads or rank where it has them, and the cell. Of low rank the last two are E5's at 50M parameters.
CASES = [
    ("diagonal", 64, 512, 0, "tanh"),
    ("diagonal", 256, 1280, 0, "tanh"),
    ("diagonal", 256, 2048, 0, "tanh"),
    ("block_diagonal", 64, 1024, 8, "tanh"),
    ("block_diagonal", 256, 1280, 8, "tanh"),
    ("low_rank", 64, 1280, 320, "tanh"),
    ("low_rank", 64, 2816, 495, "tanh"),
    ("low_rank", 256, 2816, 495, "tanh"),
    *(
        (operator, batch, hidden, 0, cell)
        for operator, batch, hidden in (("dense", 64, 1024), ("dense", 256, 1280), ("diagonal", 256, 1280))
        for cell in ("delta", "log_delta", "polynomial", "log_polynomial")
    ),
]
#: B and H of the linear recurrence.
SCANS = [(16, 512), (64, 512), (64, 1280), (256, 1280)]


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
    parser.add_argument("--only", metavar="OPERATOR", choices=sorted({case[0] for case in CASES}), help="default: all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    args.flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    print(machine(torch.device("cuda"), None))
    print(f"T = {args.seq_len}; µs a step forward / ms both passes, medians of {args.repeats}\n")
    print("| weight | cell | B × H | persistent | TB/s | loop | worst error, persistent |\n" + "|---" * 7 + "|")
    for operator, batch, hidden, part, cell in CASES:
        if args.only not in (None, operator):
            continue
        given = {"dtype": torch.bfloat16, "device": "cuda", "operator": operator, "cell": cell}
        given["rank" if operator == "low_rank" else "heads"] = part
        short = draw(32, batch, hidden, reset_rate=None, with_h0=False, **given)
        worst = max(error.ratio for error in errors(short, solve(short, "persistent"), answers(short)).values())
        problem = draw(args.seq_len, batch, hidden, reset_rate=None, with_h0=False, **given)
        (forward, both), loop = (times(problem, backend, args) for backend in ("persistent", "loop"))
        units = args.seq_len * batch * hidden / 1e12
        rate = (
            f"{4 * units / forward:.2f} / {12 * units / both:.2f}" if (operator, cell) == ("diagonal", "tanh") else ""
        )
        shape = " and ".join(str(tuple(x.shape)) for x in parts(problem.weight))
        columns = [
            f"{operator} {shape}",
            cell,
            f"{batch} × {hidden}",
            f"{forward * 1e6 / args.seq_len:.3f} / {both * 1e3:.3f}",
            rate,
            f"{loop[0] * 1e6 / args.seq_len:.2f} / {loop[1] * 1e3:.2f}",
            f"{worst:.2f} × plain bf16's",
        ]
        print(f"| {' | '.join(columns)} |")

    if args.only is None:
        linear_recurrences(args)


def linear_recurrences(args: argparse.Namespace) -> None:
    """The second table."""
    print("\nThe linear recurrence, float32: ms forward / ms both passes\n")
    print("| B × H | kernel | TB/s | PyTorch's operations |\n" + "|---" * 4 + "|")
    for batch, hidden in SCANS:
        a, b, dh = torch.rand(3, args.seq_len, batch, hidden, device="cuda").unbind(0)
        leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        runs: tuple[Run, Run] = (
            torch.no_grad()(lambda a=a, b=b: linear_scan(a, b)),
            lambda leaves=leaves, dh=dh: torch.autograd.grad(linear_scan(*leaves), leaves, dh),
        )
        forward, both = (median_ms(in_graph(run), args.repeats, args.flush) for run in runs)
        with mock.patch.object(scan, "_has_kernel", return_value=False):
            plain = [median_ms(in_graph(run), args.repeats, args.flush) for run in runs]
        units = a.numel() / 1e9
        rate = f"{12 * units / forward:.2f} / {32 * units / both:.2f}"
        columns = [f"{batch} × {hidden}", f"{forward:.3f} / {both:.3f}", rate, f"{plain[0]:.3f} / {plain[1]:.3f}"]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
