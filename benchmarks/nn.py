"""How fast are ``elman.nn``'s modules beside those of ``torch.nn`` that they replace? Prints a table a module.

Both run in this one process on the same GPU, with T = 512 steps of as many inputs as units, whose product is included:
as they are called, and captured in a CUDA graph and replayed. Times are taken as in ``benchmarks.recurrence``, forward
without autograd and both passes with it. Ours has no time where a result errs more than 1.5 times as much against
float64 as PyTorch's does in the same dtype. Writes all to benchmarks/results/. Needs a GPU; run it from the
repository's root: ``python -m benchmarks.nn``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import elman.nn
from benchmarks.machine import machine
from benchmarks.recurrence import RESULTS, Run, in_graph, median_ms, name_of
from elman.ops import record_backends

#: B × H.
SHAPES = [(16, 512), (64, 512), (64, 1024), (256, 1024)]
DTYPES = (torch.bfloat16, torch.float16)
PACKAGES = {"elman.nn": elman.nn, "torch.nn": torch.nn}


@dataclass
class Row:
    """One module; times are None where they were not measured, and ``note`` says why."""

    module: str
    layers: int
    batch: int
    hidden: int
    dtype: str
    package: str
    captured: bool
    forward_us_per_step: float | None = None
    forward_backward_ms: float | None = None
    note: str = ""


def passes(rnn: torch.nn.RNNBase, x: Tensor, dy: Tensor) -> tuple[Run, Run]:
    """The forward pass without autograd, and both passes with it, which return every result."""

    @torch.no_grad()
    def forward() -> object:
        return rnn(x)

    def both() -> list[Tensor]:
        y, _ = rnn(x)
        return [y, *torch.autograd.grad(y, (x, *rnn.parameters()), dy)]

    return forward, both


def inputs(seq_len: int, batch: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random x and dy."""
    x, dy = (torch.randn(seq_len, batch, hidden, device="cuda", dtype=dtype) for _ in range(2))
    return x.requires_grad_(), dy


def error_ratio(ours: torch.nn.RNNBase, theirs: torch.nn.RNNBase, x: Tensor, dy: Tensor) -> float:
    """The largest of our errors against float64, each as a multiple of PyTorch's; NaN where one is no number."""
    exact = copy.deepcopy(theirs).double()
    given = [(ours, x, dy), (theirs, x, dy), (exact, x.detach().double().requires_grad_(), dy.double())]
    found, plain, truth = ([y.detach().double() for y in passes(*one)[1]()] for one in given)  # type: ignore[attr-defined]
    ratios = [float((a - t).norm() / (p - t).norm()) for a, p, t in zip(found, plain, truth, strict=True)]
    return max(ratios) if all(ratio == ratio for ratio in ratios) else float("nan")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for name, layers, (batch, hidden), dtype in itertools.product(args.modules, (1, 2), SHAPES, DTYPES):
        options = {"num_layers": layers, "device": "cuda", "dtype": dtype}
        made = {package: getattr(source, name)(hidden, hidden, **options) for package, source in PACKAGES.items()}
        made["elman.nn"].load_state_dict(made["torch.nn"].state_dict())
        ratio = error_ratio(made["elman.nn"], made["torch.nn"], *inputs(32, batch, hidden, dtype))
        given = inputs(args.seq_len, batch, hidden, dtype)
        for (package, rnn), captured in itertools.product(made.items(), (False, True)):
            row = Row(name, layers, batch, hidden, name_of(dtype), package, captured)
            if package == "torch.nn" or ratio <= 1.5:
                with record_backends() as used:
                    measure(row, *passes(rnn, *given), args)
                row.note = f"{' and '.join(dict.fromkeys(used))}, error {ratio:.2f} × PyTorch's" if used else ""
            else:
                row.note = f"WRONG: {ratio:.2f} times the error of PyTorch's"
            yield row


def measure(row: Row, forward: Run, both: Run, args: argparse.Namespace) -> None:
    """Fill in the times."""
    if row.captured:
        forward, both = in_graph(forward), in_graph(both)
    row.forward_us_per_step = median_ms(forward, args.repeats, args.flush) * 1000 / args.seq_len
    row.forward_backward_ms = median_ms(both, args.repeats, args.flush)


def table(found: list[Row]) -> str:
    """Markdown: a line a shape, layers and dtype, a column a package and way to queue; "µs a step / ms both passes"."""
    columns = list(dict.fromkeys((row.package, row.captured) for row in found))
    heads = [f"{package}{', captured' * captured}" for package, captured in columns]
    lines = ["| module, layers, B × H | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    keys = dict.fromkeys((row.module, row.layers, row.batch, row.hidden, row.dtype) for row in found)
    for key in keys:
        of_key = {
            (row.package, row.captured): row
            for row in found
            if (row.module, row.layers, row.batch, row.hidden, row.dtype) == key
        }
        texts = [
            f"{row.forward_us_per_step:.2f} / {row.forward_backward_ms:.2f}" if row.forward_us_per_step else "–"
            for row in (of_key[column] for column in columns)
        ]
        module, layers, batch, hidden, dtype = key
        lines.append(f"| {module}, {layers}, {batch} × {hidden}, {dtype} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seq-len", type=int, default=512, help="steps of every run (default 512)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the median is taken (default 10)")
    parser.add_argument(
        "--modules", nargs="+", choices=elman.nn.__all__, default=elman.nn.__all__, help="modules (default all of them)"
    )
    parser.add_argument("--commit", help="commit to record, where the sources are not a git checkout")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the JSON file (default benchmarks/results)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    args.flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    started = time.perf_counter()
    torch.manual_seed(0)
    found = list(rows(args))
    print(f"T = {args.seq_len}; µs a step forward / ms forward and backward, medians of {args.repeats}\n")
    print(table(found))
    for row in found:
        if row.package == "elman.nn":
            way = ", captured" * row.captured
            print(f"{row.module}, {row.layers}, {row.batch} × {row.hidden}, {row.dtype}{way}: {row.note}")
    result = {
        "machine": machine(torch.device("cuda"), args.commit),
        "seq_len": args.seq_len,
        "repeats": args.repeats,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in found],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    path = args.out / f"nn-{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
