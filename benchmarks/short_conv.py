"""How fast is the short convolution, beside what its bytes take and its rivals? Prints a table; needs a GPU.

    python -m benchmarks.short_conv [--commit HASH]

Four taps and silu, bf16, T = 512. The floor is u read and v written, and both passes' five tensors, at the memory's
speed. Rivals, each in the layout that it likes: the same sums compiled by torch.compile (before there was a kernel, a
model ran these), PyTorch's conv1d of as many groups as channels, and the package causal-conv1d where it is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.matrix import passes
from benchmarks.recurrence import in_graph, median_ms
from benchmarks.steps import device_slug, write_json
from elman.ops import short_conv

RESULTS = Path(__file__).parent / "results"
_TAPS = 4
#: Of an H100's memory, TB/s.
_BANDWIDTH = 3.35


@dataclass
class Options:
    """What to measure."""

    batch_sizes: tuple[int, ...] = (64, 128, 256)
    """B."""
    hidden: int = 1280
    """H."""
    seq_len: int = 512
    """T."""
    repeats: int = 20
    """Runs of which the median is taken."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""


@dataclass
class Row:
    """One implementation at one batch: ms without autograd and of both passes; why one was not measured."""

    what: str
    batch_size: int
    forward: float | None = None
    both: float | None = None
    note: str = ""


def candidates() -> dict[str, tuple[Callable[..., Tensor] | str, bool]]:
    """By name: what takes u and weight, or in words why it cannot run; and whether u is (B, T, H), not (T, B, H)."""
    reference = sys.modules["elman.ops.short_conv"]._reference

    def ours(u: Tensor, weight: Tensor) -> Tensor:
        return short_conv(u, weight, activation="silu")[0]

    def compiled(u: Tensor, weight: Tensor) -> Tensor:
        v: Tensor = reference(u, weight, None, None, True)[0]
        return v

    def conv1d(u: Tensor, weight: Tensor) -> Tensor:
        taps = weight.flip(0).t().unsqueeze(1).to(u.dtype)
        v = F.conv1d(F.pad(u.transpose(1, 2), (_TAPS - 1, 0)), taps, groups=u.shape[2])
        return F.silu(v).transpose(1, 2)

    found: dict[str, tuple[Callable[..., Tensor] | str, bool]] = {
        "elman": (ours, False),
        "torch.compile of the sums": (torch.compile(compiled), False),
        "conv1d and silu": (conv1d, True),
        "causal-conv1d": ("not installed", True),
    }
    if importlib.util.find_spec("causal_conv1d") is not None:
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found, unused-ignore]

        def official(u: Tensor, weight: Tensor) -> Tensor:
            taps = weight.flip(0).t().contiguous()
            v: Tensor = causal_conv1d_fn(u.transpose(1, 2), taps, activation="silu").transpose(1, 2)
            return v

        found["causal-conv1d"] = (official, True)
    return found


def main(options: Options) -> list[Row]:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    rows: list[Row] = []
    print(f"T = {options.seq_len}, H = {options.hidden}, bf16; ms forward / both, medians of {options.repeats}\n")
    print("| B | what | forward | at least | both | at least | note |\n" + "|---" * 7 + "|", flush=True)
    name = f"short_conv-{device_slug(torch.device('cuda'))}.json"
    facts = {"machine": machine(torch.device("cuda"), options.commit), "seq_len": options.seq_len}
    facts |= {"hidden": options.hidden, "taps": _TAPS}
    for batch in options.batch_sizes:
        tensor_ms = options.seq_len * batch * options.hidden * 2 / _BANDWIDTH / 1e9
        for what, (run, batch_first) in candidates().items():
            row = Row(what, batch)
            try:
                if isinstance(run, str):
                    raise RuntimeError(run)
                torch.manual_seed(0)
                shape = (batch, options.seq_len) if batch_first else (options.seq_len, batch)
                u = torch.randn(*shape, options.hidden, device="cuda").bfloat16().requires_grad_()
                weight = torch.randn(_TAPS, options.hidden, device="cuda").requires_grad_()
                forward, both = (in_graph(one) for one in passes(run, [u, weight]))
                row.forward, row.both = (median_ms(one, options.repeats, flush) for one in (forward, both))
            except Exception as error:
                row.note = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            times = ["-" if x is None else f"{x:.3f}" for x in (row.forward, row.both)]
            cells = [str(batch), what, times[0], f"{2 * tensor_ms:.3f}", times[1], f"{5 * tensor_ms:.3f}", row.note]
            print(f"| {' | '.join(cells)} |", flush=True)
            write_json(name, {**facts, "rows": [asdict(row) for row in rows]}, RESULTS, options.out)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
