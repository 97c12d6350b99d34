"""How fast does every model write, a token a step, and what does it hold in memory meanwhile?

    python -m benchmarks.decode [--models e1 mamba2] [--batch-sizes 1 64 1024] [--contexts 1024 16384 65536]

Takes the steps of ``elman generate`` (draw a token a row, read it) of random weights of about 50M parameters in bf16,
one model after the other in one process on one GPU, each step a CUDA graph where it can be captured. Recurrent models
take as long at any length of the text; the Transformer is measured with a full cache of so many tokens, filled with
random numbers, as far as the device's memory goes. A step's time is that between two CUDA events, the host being free
to run ahead, and the median of them. Every row is printed and written as soon as it is known, to benchmarks/results/
and to the folder ``--out``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.cases import Case, first_line
from benchmarks.machine import machine
from benchmarks.models import words
from benchmarks.steps import device_slug, forget, write_json
from elman.environment import is_out_of_memory, peak_memory, resolve_device, supports_bf16, total_memory
from elman.errors import UsageError
from elman.generation import Decoder, Sampling, as_bytes
from elman.inference import freeze
from elman.mixers.transformer import KeyValueCache
from elman.model import LanguageModel
from elman.ops import record_backends
from elman.sizing import num_params, state_size
from elman.writing import is_capturable

RESULTS = Path(__file__).parent / "results"
#: Mamba2 and the Transformer as they are commonly shaped at 50M parameters; the GRU by cuDNN, and by this package.
CASES = [
    *(Case(name) for name in ("e1", "e5", "e10", "matrix", "matrix,e1", "gru")),
    Case("gru", {"kernels": "elman"}),
    Case("mamba2", depth=12),
    Case("transformer", depth=10),
]
#: What the recurrent models have read: it makes no difference.
_PROMPT = b"import os\n"
#: Steps before those that are timed: plain ones, the capture, and one that is replayed.
_WARM_UP_STEPS = 6
#: Of the device's memory that states may take.
_SHARE = 0.85


@dataclass
class Row:
    """One model at one batch size. What is None was not measured, and ``note`` says why.

    Attributes:
        model: as ``elman train --model`` takes it, options included.
        context: tokens that the cache holds; None for a state of constant size.
        state: numbers carried a sequence.
        state_gib: those of the whole batch.
        captured: whether the step is a CUDA graph.
        ms_per_step: the median of ``steps``.
        backends: what runs each mixer's step, and how many of them.
    """

    model: str
    batch_size: int
    context: int | None = None
    dim: int | None = None
    depth: int | None = None
    params: int | None = None
    state: int | None = None
    state_gib: float | None = None
    captured: bool = False
    steps: int = 0
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    backends: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def line(self) -> str:
        """The row in words, for the log."""
        head = f"{self.model}, B = {self.batch_size}" + (f", {self.context:,} tokens" if self.context else "") + ": "
        if self.tokens_per_second is None or self.ms_per_step is None or self.peak_gib is None:
            return head + self.note
        how = words(self.backends) + (", captured" if self.captured else "")
        note = f" ({self.note})" if self.note else ""
        return head + (
            f"{self.tokens_per_second:,.0f} tokens/s, {1e3 * self.ms_per_step:,.0f} µs a step ({self.steps}), "
            f"{self.peak_gib:.2f} GiB, {how}{note}"
        )


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    models: tuple[str, ...] = ()
    """Variants among those measured; all if absent."""
    batch_sizes: tuple[int, ...] = (1, 64, 1024)
    """Texts that are written at a time."""
    contexts: tuple[int, ...] = (1024, 16384, 65536)
    """Tokens that the Transformer's cache holds."""
    params: int = 50_000_000
    """Of every model, within 2%."""
    steps: int = 64
    """Timed steps of every row."""
    seconds: float = 1.0
    """That these may take: a slow model is timed over fewer of them, three at least."""
    graph: bool = True
    """Capture the step, on a GPU."""
    time_limit: float = 110.0
    """Seconds after which no other row is begun."""
    device: str = "auto"
    """A GPU, if the numbers are to mean anything."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""


def measure(case: Case, batch_size: int, context: int | None, options: Options, device: torch.device) -> Row:
    """Write for a while; an error is a row that says so."""
    row = Row(case.label, batch_size, context)
    try:
        _fill(row, case, options, device)
    except Exception as error:
        row.note = "out of memory" if is_out_of_memory(error) else first_line(error)
        row.ms_per_step = row.tokens_per_second = None
    forget()
    return row


def _fill(row: Row, case: Case, options: Options, device: torch.device) -> None:
    config = case.size(options.params)
    row.dim, row.depth, row.params = config.dim, config.depth, num_params(config)
    row.state = state_size(config, row.context or 1)
    dtype = torch.bfloat16 if supports_bf16(device) else None
    if row.context is not None:
        room = row.batch_size * row.state * (torch.float32 if dtype is None else dtype).itemsize
        row.state_gib = room / 2**30
        if room > _SHARE * total_memory(device):
            row.note = f"its cache of {row.state_gib:.0f} GiB is more than the device holds"
            return
    torch.manual_seed(0)
    with device:
        model = freeze(LanguageModel(config).eval(), dtype)
    capture = options.graph and device.type == "cuda" and is_capturable(model)
    decoder = Decoder(model, row.batch_size, Sampling(), dtype=dtype, graph=capture)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    decoder.read([as_bytes(_PROMPT)] * row.batch_size)
    if row.context is not None:
        fill_caches(decoder, row.context, _WARM_UP_STEPS + options.steps)
    with record_backends() as used:
        decoder.step()
    row.backends = dict(Counter(used))
    step_times(decoder, _WARM_UP_STEPS - 4, device)
    row.captured = decoder.captured
    if decoder.not_captured is not None:
        row.note = f"not captured: {decoder.not_captured}"
    about = step_times(decoder, 3, device)[-1]
    row.steps = max(3, min(options.steps, int(1e3 * options.seconds / about)))
    row.ms_per_step = statistics.median(step_times(decoder, row.steps, device))
    row.tokens_per_second = row.batch_size / row.ms_per_step * 1e3
    row.peak_gib = peak_memory(device) / 2**30
    if row.state_gib is None:
        row.state_gib = decoder.state_bytes / 2**30


@torch.inference_mode()
def fill_caches(decoder: Decoder, context: int, steps: int) -> None:
    """Have attention believe that it read so many tokens that ``steps`` more fill a cache of ``context``."""
    if context <= steps:
        raise UsageError(f"--contexts {context} is too short for {steps} steps: give fewer --steps, or a longer one")

    def filled(state: Any) -> Any:
        if not isinstance(state, KeyValueCache):
            return state
        shape = (*state.keys.shape[:2], context, state.keys.shape[3])
        keys, values = (torch.randn(shape, dtype=state.keys.dtype, device=state.keys.device) for _ in range(2))
        return KeyValueCache.of(keys, values, state.start, context - steps)

    decoder.change_state(lambda state: tuple(filled(each) for each in decoder.model.reserve(state, 1)), steps)


def step_times(decoder: Decoder, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of the next steps: on a GPU between CUDA events, the host being free to run ahead."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(steps):
            decoder.step()
            clock.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        decoder.step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a model and context; tokens a second and microseconds a step by batch size."""
    sizes = sorted({row.batch_size for row in rows})
    columns = ["model", "width × depth", "parameters", "state a text"]
    for size in sizes:
        columns += [f"B = {size}: tokens/s", "µs a step", "GiB"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for model, context in dict.fromkeys((row.model, row.context) for row in rows):
        found = {row.batch_size: row for row in rows if (row.model, row.context) == (model, context)}
        known = next((row for row in found.values() if row.params is not None), None)
        name = f"{model}, {context:,} tokens" if context else model
        values = [name, "-", "-", "-"]
        if known is not None:
            values[1:] = [f"{known.dim} × {known.depth}", f"{known.params:,}", f"{known.state:,}"]
        for size in sizes:
            row = found.get(size)
            if row is None or row.tokens_per_second is None or row.ms_per_step is None or row.peak_gib is None:
                values += ["-" if row is None else row.note, "", ""]
                continue
            plain = "" if row.captured else " (plain)"
            values += [f"{row.tokens_per_second:,.0f}{plain}", f"{1e3 * row.ms_per_step:,.0f}", f"{row.peak_gib:.2f}"]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of these variants, or all.

    Raises:
        UsageError: there is none of a name.
    """
    known = {case.pattern for case in CASES}
    for name in names:
        if name not in known:
            raise UsageError(f"--models {name} is not among those measured: choose of {', '.join(sorted(known))}")
    return [case for case in CASES if not names or case.pattern in names]


def main(options: Options) -> list[Row]:
    """Measure, print and write."""
    started = time.perf_counter()
    console = Console(width=200, highlight=False, markup=False, soft_wrap=True)
    device = resolve_device(options.device)
    facts = {"machine": machine(device, options.commit), "params": options.params}
    rows: list[Row] = []
    for case in choose(options.models):
        contexts = options.contexts if case.pattern == "transformer" else (None,)
        for context, batch_size in itertools.product(contexts, options.batch_sizes):
            if time.perf_counter() - started < options.time_limit:
                row = measure(case, batch_size, context, options, device)
            else:
                row = Row(case.label, batch_size, context, note="not measured: out of time")
            rows.append(row)
            console.print(f"[{time.perf_counter() - started:.0f} s] {row.line}")
            value = {**facts, "rows": [asdict(row) for row in rows]}
            write_json(f"decode-{device_slug(device)}.json", value, RESULTS, options.out)
    console.print("\n" + table(rows))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,)))
