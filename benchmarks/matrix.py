"""How fast is the recurrence with a matrix state, beside its floor and linear rivals? Prints a table; needs a GPU.

    python -m benchmarks.matrix [--commit HASH]

Heads of K × V with N · V = 1,280 in all, bf16, T = 512, every run in a CUDA graph but those of rivals, whose own
launches are part of what they cost. The floor of a forward step is the largest of three: the bytes of its inputs and
outputs at the memory's speed, four multiply-adds of every number of the state, and one tanh of each, at what a
multiprocessor does of them a clock (128 and 16). Of both passes it counts what the kernels do: the states made again
once and two thirds, and ten multiply-adds more.

Rivals, where their packages are installed: the gated delta rule of flash-linear-attention, in chunks and recurrent,
which the identity cell computes too; and Mamba2's scan with as many heads, values and a state of K.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.recurrence import Run, in_graph, median_ms
from benchmarks.steps import device_slug, write_json
from elman.ops import matrix_recurrence

RESULTS = Path(__file__).parent / "results"
_VALUES = 1280
#: Of an H100's memory, TB/s; of every number of the state: multiply-adds and hardware functions, of each pass alone.
_BANDWIDTH = 3.35
_AGAIN = 7 / 11  # of the steps are made again twice, the first time by the forward pass's tanh
_FMAS = {"forward": 4, "both": 4 + 4 * (1 + _AGAIN) + 10}
_FUNCTIONS = {"forward": 1, "both": 1 + _AGAIN + 2}
_CLOCK_MHZ = 1755


@dataclass
class Options:
    """What to measure."""

    batch_sizes: tuple[int, ...] = (64, 256)
    """B."""
    sizes: tuple[str, ...] = ("32x32", "64x64", "16x64")
    """K x V, of which V divides 1,280."""
    seq_len: int = 512
    """T."""
    rivals: Literal["on", "off"] = "on"
    """Their kernels take minutes to compile."""
    repeats: int = 10
    """Runs of which the median is taken."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""


@dataclass
class Row:
    """One implementation at one shape.

    Attributes:
        what: ran.
        forward: µs a step, without autograd.
        both: ms of both passes.
        floor, floor_both: the same, at least.
        note: why one of them was not measured.
    """

    what: str
    batch_size: int
    keys: int
    values: int
    forward: float | None = None
    both: float | None = None
    floor: float | None = None
    floor_both: float | None = None
    note: str = ""

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        shape = f"{self.batch_size}, {_VALUES // self.values} × {self.keys} × {self.values}"
        found = ["-" if x is None else f"{x:.2f}" for x in (self.forward, self.floor, self.both, self.floor_both)]
        return [shape, self.what, *found, self.note]


def floors(batch: int, keys: int, values: int, seq_len: int, cell: str) -> tuple[float, float]:
    """µs of a forward step, and ms of both passes."""
    properties = torch.cuda.get_device_properties(0)
    heads = _VALUES // values
    numbers, clocks = batch * _VALUES * keys, properties.multi_processor_count * _CLOCK_MHZ
    per_step = batch * heads * (4 * (keys + values) + 8)  # q, k, v, y in bf16, decay and beta
    found = []
    for which, moved in (("forward", per_step), ("both", 3 * per_step)):
        functions = _FUNCTIONS[which] if cell == "tanh" else 0
        times = (
            moved / _BANDWIDTH / 1e6,
            _FMAS[which] * numbers / (128 * clocks),
            functions * numbers / (16 * clocks),
        )
        found.append(max(times))
    return found[0], found[1] * seq_len / 1e3


def inputs(batch: int, keys: int, values: int, seq_len: int, of_rival: bool = False) -> list[Tensor]:
    """q, k (T, B, N, K), v (T, B, N, V) bf16, decay, beta (T, B, N) float32; a rival's (B, T, …), and log decay."""
    torch.manual_seed(0)
    shape = (seq_len, batch, _VALUES // values)
    q, k, v = (torch.randn(*shape, size, device="cuda") for size in (keys, keys, values))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    decay, beta = 1 - 0.1 * torch.rand(shape, device="cuda"), torch.rand(shape, device="cuda")
    given = [*(x.bfloat16() for x in (q, k, v)), decay, beta]
    if of_rival:
        given = [x.transpose(0, 1).contiguous() for x in (*given[:3], decay.log(), beta)]
    return [x.requires_grad_() for x in given]


def passes(run: Callable[..., Tensor], given: list[Tensor]) -> tuple[Run, Run]:
    """The forward pass without autograd, and both."""

    @torch.no_grad()
    def forward() -> object:
        return run(*given)

    dy = torch.randn_like(forward())  # type: ignore[call-overload]

    def both() -> object:
        return torch.autograd.grad(run(*given), given, dy, allow_unused=True)

    return forward, both


def rivals(values: int) -> dict[str, Callable[..., Tensor] | str]:
    """By name; in words, why one cannot run. They take what ``inputs`` gives for a rival."""
    found: dict[str, Callable[..., Tensor] | str] = {}
    missing = "not installed"
    if importlib.util.find_spec("fla") is None:
        found["fla, gated delta rule, chunked"] = found["fla, gated delta rule, recurrent"] = missing
    else:
        from fla.ops.gated_delta_rule import (  # type: ignore[import-not-found, unused-ignore]
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )

        def of(rule: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
            return lambda q, k, v, gate, beta: rule(q, k, v, g=gate, beta=beta, scale=1.0)[0]

        found["fla, gated delta rule, chunked"] = of(chunk_gated_delta_rule)
        found["fla, gated delta rule, recurrent"] = of(fused_recurrent_gated_delta_rule)
    if importlib.util.find_spec("mamba_ssm") is None:
        found["Mamba2's scan"] = missing
    else:
        from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found, unused-ignore]
            mamba_chunk_scan_combined,
        )

        rates = -torch.ones(_VALUES // values, device="cuda")

        def scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
            y: Tensor = mamba_chunk_scan_combined(v, -gate, rates, k[:, :, :1], q[:, :, :1], chunk_size=256)
            return y

        found["Mamba2's scan"] = scan
    return found


def _size(text: str) -> tuple[int, int]:
    keys, _, values = text.partition("x")
    if not (keys.isdigit() and values.isdigit() and int(values) and not _VALUES % int(values)):
        raise SystemExit(f"--sizes {text}: give K x V as 32x32, V being a divisor of {_VALUES}")
    return int(keys), int(values)


def main(options: Options) -> list[Row]:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    rows: list[Row] = []
    print(f"T = {options.seq_len}, bf16; µs a step forward / ms both passes, medians of {options.repeats}\n")
    print("| B, N × K × V | what | forward | at least | both | at least | note |\n" + "|---" * 7 + "|", flush=True)

    def measure(row: Row, run: Callable[..., Tensor], ours: bool) -> None:
        try:
            both = passes(run, inputs(row.batch_size, row.keys, row.values, options.seq_len, of_rival=not ours))
            run_forward, run_both = (in_graph(one) if ours else one for one in both)
            row.forward = 1e3 * median_ms(run_forward, options.repeats, flush) / options.seq_len
            row.both = median_ms(run_both, options.repeats, flush)
        except Exception as error:
            row.note = f"{type(error).__name__}: {error}".splitlines()[0]

    name = f"matrix-{device_slug(torch.device('cuda'))}.json"
    facts = {"machine": machine(torch.device("cuda"), options.commit), "seq_len": options.seq_len}

    def keep(row: Row) -> None:
        rows.append(row)
        print(f"| {' | '.join(row.cells)} |", flush=True)
        write_json(name, {**facts, "rows": [asdict(row) for row in rows]}, RESULTS, options.out)

    shapes = [(batch, *_size(size)) for size in options.sizes for batch in options.batch_sizes]
    for batch, keys, values in shapes:
        for cell in ("tanh", "identity"):
            row = Row(f"elman, {cell}", batch, keys, values)
            row.floor, row.floor_both = floors(batch, keys, values, options.seq_len, cell)
            measure(row, lambda *given, cell=cell: matrix_recurrence(*given, cell=cell)[0], ours=True)
            keep(row)
    # Rivals last.
    for batch, keys, values in shapes if options.rivals == "on" else ():
        for what, rival in rivals(values).items():
            row = Row(what, batch, keys, values)
            if isinstance(rival, str):
                row.note = rival
            else:
                measure(row, rival, ours=False)
            keep(row)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
