"""How fast is the recurrence, beside PyTorch's own layers? Prints a table a cell and writes all to benchmarks/results/.

Every rival runs in this one process, on the same GPU, with T = 512 steps: our backends (the loop replayed as a CUDA
graph, since a graph is how a model would run it), and ``torch.nn.RNN``, ``LSTM`` or ``GRU`` with cuDNN, whose figures
include the input product because a user cannot leave it out. Times are medians of CUDA events over repeated, warmed-up
runs with the L2 cache flushed before each. A backend whose values err more than 1.5 times as much as plain PyTorch in
the same dtype gets no time. Needs a GPU; run it from the repository's root: ``python -m benchmarks.recurrence``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import machine
from elman.errors import UsageError
from elman.ops import BACKENDS, recurrence
from elman.ops.cells import CELLS

#: B × H by cell.
SHAPES = {
    "tanh": [
        (16, 512),
        (64, 512),
        (64, 1024),
        (64, 1280),
        (256, 1280),
        (512, 1280),
        (48, 1760),
        (256, 2048),
        (128, 3584),
    ],
    "lstm": [(64, 512), (64, 1024), (256, 1024)],
    "gru": [(64, 512), (64, 1024), (256, 1024)],
}
MODULES = {"tanh": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
RESULTS = Path(__file__).parent / "results"
#: Of 256 MB at 0.1 ms each.
_FLUSHES = 10

Run = Callable[[], object]


@dataclass
class Row:
    """One rival on one shape; a time that is None was not measured, and ``note`` says why."""

    cell: str
    batch: int
    hidden: int
    rival: str
    forward_us_per_step: float | None = None
    forward_backward_ms: float | None = None
    extra_memory: float | None = None  # both passes at their peak, beside inputs and results, in T × B × H elements
    note: str = ""


def median_ms(run: Run, repeats: int, flush: Tensor) -> float:
    """The median time of a run on the GPU, after three that are not counted.

    The cache is flushed, and often enough for the GPU to be busy while the host prepares the run: what a user's program
    has in flight hides that time too.
    """
    times = []
    for repeat in range(3 + repeats):
        for _ in range(_FLUSHES):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_graph(run: Run) -> Run:
    """The same work, captured once and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Case:
    """What all rivals compute: a cell at a batch size and a width."""

    cell: str
    batch: int
    hidden: int

    def inputs(self, seq_len: int, dtype: torch.dtype) -> list[Tensor]:
        """Random pre, weight and dh."""
        rule = CELLS[self.cell]
        gates = () if rule.gates == 1 else (rule.gates,)
        products = () if rule.products == 1 else (rule.products,)
        pre = torch.randn(seq_len, self.batch, *gates, self.hidden, device="cuda", dtype=dtype)
        weight = (torch.randn(*products, self.hidden, self.hidden, device="cuda") / self.hidden**0.5).to(dtype)
        dh = torch.randn(seq_len, self.batch, self.hidden, device="cuda", dtype=dtype)
        return [pre.requires_grad_(), weight.requires_grad_(), dh]

    def passes(self, backend: str, pre: Tensor, weight: Tensor, dh: Tensor) -> tuple[Run, Callable[[], list[Tensor]]]:
        """The forward pass without autograd, and both passes with it, which return every result."""

        @torch.no_grad()
        def forward() -> object:
            return recurrence(pre, weight, cell=self.cell, backend=backend)

        def both() -> list[Tensor]:
            h, _ = recurrence(pre, weight, cell=self.cell, backend=backend)
            return [h, *torch.autograd.grad(h, (pre, weight), dh)]

        return forward, both

    def row(self, rival: str, note: str = "") -> Row:
        return Row(self.cell, self.batch, self.hidden, rival, note=note)


def worst_error_ratio(backend: str, case: Case, dtype: torch.dtype) -> float:
    """The backend's error against float64, as a multiple of the reference's in the same dtype; T = 32."""
    given = case.inputs(32, dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    truth, plain, ours = (
        [y.detach() for y in case.passes(name, *x)[1]()]
        for name, x in (("reference", exact), ("reference", given), (backend, given))
    )
    ratios = [float((a - t).norm() / (p - t).norm()) for a, p, t in zip(ours, plain, truth, strict=True)]
    return max(ratios) if all(ratio == ratio for ratio in ratios) else float("nan")


def our_row(backend: str, case: Case, dtype: torch.dtype, args: argparse.Namespace) -> Row:
    graphed = backend == "loop"
    row = case.row(f"elman {backend}{' in a CUDA graph' if graphed else ''}, {name_of(dtype)}")
    try:
        ratio = worst_error_ratio(backend, case, dtype)
    except UsageError as error:
        row.note = str(error)
        return row
    if not ratio <= 1.5:
        row.note = f"WRONG: {ratio:.2f} times the error of the reference"
        return row
    row.note = f"error {ratio:.2f} × the reference's"
    forward, both = case.passes(backend, *case.inputs(args.seq_len, dtype))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = sum(x.numel() * x.itemsize for x in both())
    extra = torch.cuda.max_memory_allocated() - before - made
    row.extra_memory = round(extra / (args.seq_len * case.batch * case.hidden * dtype.itemsize), 2)
    time_both(row, *((in_graph(forward), in_graph(both)) if graphed else (forward, both)), args)
    return row


def cudnn_row(case: Case, dtype: torch.dtype, args: argparse.Namespace) -> Row:
    module = MODULES[case.cell]
    rnn = module(case.hidden, case.hidden, device="cuda", dtype=dtype)
    x = torch.randn(args.seq_len, case.batch, case.hidden, device="cuda", dtype=dtype, requires_grad=True)
    dh = torch.randn_like(x)

    @torch.no_grad()
    def forward() -> object:
        return rnn(x)

    def both() -> object:
        return torch.autograd.grad(rnn(x)[0], (x, *rnn.parameters()), dh)

    row = case.row(f"torch.nn.{module.__name__}, {name_of(dtype)}", "with its input product")
    time_both(row, forward, both, args)
    return row


def time_both(row: Row, forward: Run, both: Run, args: argparse.Namespace) -> None:
    row.forward_us_per_step = median_ms(forward, args.repeats, args.flush) * 1000 / args.seq_len
    row.forward_backward_ms = median_ms(both, args.repeats, args.flush)


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for case in (Case(cell, *shape) for cell in args.cells for shape in SHAPES[cell]):
        for backend in reversed(BACKENDS):
            if backend != "reference":
                yield our_row(backend, case, torch.bfloat16, args)
        for dtype in (torch.bfloat16, torch.float16):
            yield cudnn_row(case, dtype, args)


def start_up_seconds() -> dict[str, float]:
    """From an idle GPU to the end of the first forward and backward pass, in fresh processes: cold cache, then warm."""
    code = (
        "import time, torch; from elman.ops import recurrence\n"
        "pre = torch.randn(4, 64, 1024, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "weight = torch.randn(1024, 1024, device='cuda', dtype=torch.bfloat16); weight @ weight\n"
        "torch.cuda.synchronize(); start = time.perf_counter()\n"
        "recurrence(pre, weight)[0].sum().backward(); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ELMAN_CACHE": folder}
        seconds = [
            float(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout)
            for _ in range(2)
        ]
    return dict(zip(("cold", "warm"), seconds, strict=True))


def table(found: list[Row]) -> str:
    """Markdown: a line a shape, a column a rival, "µs a step forward / ms both passes" in each cell; a table a cell."""
    tables = []
    for cell in dict.fromkeys(row.cell for row in found):
        of_cell = [row for row in found if row.cell == cell]
        rivals = list(dict.fromkeys(row.rival for row in of_cell))
        lines = [f"| {cell}, B × H | " + " | ".join(rivals) + " |", "|---" * (len(rivals) + 1) + "|"]
        for shape in dict.fromkeys((row.batch, row.hidden) for row in of_cell):
            by_rival = {row.rival: row for row in of_cell if (row.batch, row.hidden) == shape}
            texts = [
                f"{row.forward_us_per_step:.2f} / {row.forward_backward_ms:.2f}" if row.forward_us_per_step else "–"
                for row in (by_rival[rival] for rival in rivals)
            ]
            lines.append(f"| {shape[0]} × {shape[1]} | " + " | ".join(texts) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seq-len", type=int, default=512, help="steps of every run (default 512)")
    parser.add_argument("--repeats", type=int, default=20, help="runs of which the median is taken (default 20)")
    parser.add_argument(
        "--cells", nargs="+", choices=SHAPES, default=list(SHAPES), help="cells to measure (default all of them)"
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
        if row.forward_us_per_step is None:
            print(f"{row.cell}, {row.batch} × {row.hidden}, {row.rival}: {row.note}")
    print("\nMemory of both passes at most, beside inputs and results, in T × B × H elements:")
    for cell in dict.fromkeys(row.cell for row in found):
        extras = [row.extra_memory for row in found if row.cell == cell and row.extra_memory is not None]
        print(f"{cell}: {max(extras, default=0)}")
    start_up = start_up_seconds()
    print(
        f"\nfirst call of a process: {start_up['cold']:.2f} s cold, {start_up['warm']:.2f} s with kernels in the cache"
    )

    result = {
        "machine": machine(torch.device("cuda"), args.commit),
        "seq_len": args.seq_len,
        "repeats": args.repeats,
        "start_up_seconds": start_up,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in found],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    path = args.out / f"recurrence-{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
