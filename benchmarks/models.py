"""How fast does every model train, what does it hold in memory, and what runs its recurrence?

    python -m benchmarks.models [--models e1 mamba2] [--batch-sizes 64 256] [--steps 12] [--compile auto|off]

Takes the steps that ``elman train`` takes (batch, both passes, clipping, AdamW) on random bytes, one model after the
other in one process on one GPU. Compiling and autotuning come before, and the first steps do not count; a step's time
is that between two CUDA events, the host being free to run ahead, and the median of them. Before that, ``--jobs``
processes compile one layer of every model, so that the compiler's caches are warm. One more step is profiled: its
kernels, their number, and what ``elman.ops`` says that it chose are the table of paths. Every row is printed and
written as soon as it is known, to benchmarks/results/ and to the folder ``--out``.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.cases import Case, choose_cases, first_line
from benchmarks.machine import machine
from benchmarks.steps import device_slug, forget, random_bytes, step_times, write_json
from elman.environment import is_out_of_memory, peak_memory, resolve_device
from elman.sizing import num_params, state_size
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.profile import RECURRENCES, classify, profile_steps

RESULTS = Path(__file__).parent / "results"
#: Slower steps than this, in ms, are neither warmed up at length nor profiled: they have 100,000 kernels.
_SLOW_STEP = 1000.0
#: Rungs whose W_h is a diagonal.
_DIAGONAL = ("ladder_3", "ladder_6", "log_0", "log_3")
#: What ``elman.ops`` calls a loop over time in Python: of PyTorch's operations, and of a product and one kernel a step.
_LOOPS = {"reference": "yes, of PyTorch's operations", "loop": "a product and a kernel a step"}


@dataclass
class Row:
    """One model at one batch size. What is None was not measured, and ``note`` says why.

    Attributes:
        model: as ``elman train --model`` takes it, options included.
        state: numbers carried a sequence.
        ms_per_step: the median of ``steps``.
        backends: what runs each mixer's recurrence, and how many of them.
        captured: whether a step is a CUDA graph, as ``--graph auto`` decides.
        launches: kernels that a step runs on the GPU.
        kernels: those of them that run recurrences.
    """

    model: str
    batch_size: int
    dim: int | None = None
    depth: int | None = None
    params: int | None = None
    state: int | None = None
    compiled: bool | None = None
    captured: bool = False
    start_up_seconds: float | None = None
    steps: int = 0
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    backends: dict[str, int] = field(default_factory=dict)
    launches: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    @property
    def runs(self) -> str:
        """What runs the recurrences, and whether whole steps are replayed."""
        return words(self.backends) + (", captured" if self.captured else "")

    @property
    def line(self) -> str:
        """The row in words, for the log."""
        head = f"{self.model}, B = {self.batch_size}: "
        if self.tokens_per_second is None or self.peak_gib is None:
            return head + self.note
        return head + (
            f"{self.tokens_per_second:,.0f} tokens/s, {self.ms_per_step:.1f} ms a step ({self.steps}), "
            f"{self.peak_gib:.2f} GiB, {self.runs}, start-up {self.start_up_seconds:.1f} s"
        )


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    models: tuple[str, ...] = ()
    """Variants or patterns; all if absent."""
    batch_sizes: tuple[int, ...] = (64, 256)
    """Windows a step."""
    params: int = 50_000_000
    """Of every model, within 2%."""
    seq_len: int = 512
    """T, bytes a window."""
    steps: int = 12
    """Timed steps of every model."""
    seconds: float = 3.0
    """That these may take: a slow model is timed over fewer of them, two at least."""
    compile: Literal["auto", "off"] = "auto"
    """As for elman train."""
    jobs: int = 6
    """Processes that compile ahead; 0 does without."""
    time_limit: float = 570.0
    """Seconds after which no other model is begun."""
    device: str = "auto"
    """A GPU, if the numbers are to mean anything."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""
    part: int | None = None
    """Compile this part of the models ahead, and measure nothing: how the benchmark calls itself."""


@dataclass(frozen=True)
class Setting:
    """What all models have in common."""

    data: Path
    options: Options

    def trainer(self, case: Case, batch_size: int, console: Console, layers: int | None = None) -> Trainer:
        """As ``elman train`` makes it, of the size asked for, or of so many layers of such a model."""
        options = self.options
        model = case.size(options.params)
        config = TrainConfig(
            model=case.pattern, seq_len=options.seq_len, batch_size=batch_size, steps=10**6, data=self.data,
            device=options.device, compile=options.compile,
        )  # fmt: skip
        return Trainer(config, model if layers is None else replace(model, depth=layers), console)


def measure(case: Case, batch_size: int, setting: Setting, console: Console) -> Row:
    """Train for a while; an error is a row that says so."""
    row = Row(case.label, batch_size)
    try:
        _fill(row, case, batch_size, setting, console)
    except Exception as error:
        no_memory = is_out_of_memory(error) or "out of memory" in str(error).lower()
        row.note = "out of memory" if no_memory else first_line(error)
    forget()
    return row


def _fill(row: Row, case: Case, batch_size: int, setting: Setting, console: Console) -> None:
    options = setting.options
    model = case.size(options.params)
    row.dim, row.depth = model.dim, model.depth
    row.params, row.state = num_params(model), state_size(model, options.seq_len)
    trainer = setting.trainer(case, batch_size, console)
    trainer.warm_up()
    row.compiled = trainer.compiled
    row.backends = dict(Counter(trainer.backends(options.seq_len)))
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # before the steps that are not replayed, which alone are counted
    (first,) = step_times(trainer, 1)
    about = first if first > _SLOW_STEP else step_times(trainer, 4)[-1]
    trainer.capture()
    row.captured, row.start_up_seconds = trainer.graph is not None, trainer.start_up_seconds
    if row.captured:
        about = step_times(trainer, 2)[-1]
    row.steps = max(2, min(options.steps, int(1e3 * options.seconds / about)))
    ms = statistics.median(step_times(trainer, row.steps))
    row.peak_gib = peak_memory(trainer.device) / 2**30
    row.ms_per_step, row.tokens_per_second = ms, batch_size * options.seq_len / ms * 1e3
    if trainer.device.type == "cuda" and ms <= _SLOW_STEP:
        kernels = profile_steps(trainer._train_step, trainer.device, 1).kernels
        row.launches = sum(int(kernel["calls"]) for kernel in kernels if not kernel["name"].startswith("Mem"))
        row.kernels = [kernel for kernel in kernels if classify(kernel["name"]) == RECURRENCES]


def prepare(case: Case, batch_size: int, setting: Setting) -> str:
    """Compile what a step needs, a layer of each kind, so that the caches on disk hold it. Returns what went wrong."""
    complaint, trainer = "", None
    try:
        trainer = setting.trainer(case, batch_size, Console(quiet=True), layers=len(case.mixers()))
        # Of a loop in Python there is nothing to compile, and its many tensors would take others' memory.
        if "reference" not in trainer.backends():
            trainer.warm_up()
    except Exception as error:
        complaint = first_line(error)
    trainer = None
    forget()
    return complaint


def prepare_part(cases: Sequence[Case], setting: Setting, part: int) -> None:
    """The part-th of ``--jobs`` parts of the models. Says what went wrong: nothing depends on it."""
    options = setting.options
    for case, batch_size in itertools.product(cases[part :: options.jobs], options.batch_sizes):
        complaint = prepare(case, batch_size, setting)
        if complaint:
            print(f"{case.label}, B = {batch_size} not prepared: {complaint}", flush=True)


def prepare_all(options: Options) -> None:
    """Prepare every model, in processes of their own.

    Not by multiprocessing: in its processes this file is a module named ``__mp_main__``, which gets into the keys by
    which the compiler's caches are asked.
    """
    # Each would start as many compilers as there are cores.
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    command = [sys.executable, "-m", "benchmarks.models", *sys.argv[1:], "--part"]
    processes = [subprocess.Popen([*command, str(part)], env=environment) for part in range(options.jobs)]
    for process in processes:
        process.wait()


def words(backends: dict[str, int]) -> str:
    """What runs, in a few words: ``6 × persistent``."""
    return ", ".join(f"{count} × {name}" for name, count in backends.items()) or "-"


def speed_table(rows: Sequence[Row]) -> str:
    """Markdown: a line a model; tokens a second, speed over E1's, and peak memory by batch size."""
    sizes = sorted({row.batch_size for row in rows})
    found = {(row.model, row.batch_size): row for row in rows}
    columns = ["model", "width × depth", "parameters", "state"]
    for size in sizes:
        columns += [f"B = {size}: tokens/s", "× e1", "GiB"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [found[model, size] for size in sizes if (model, size) in found]
        known = next((row for row in of_model if row.params is not None), None)
        values = [model, "-", "-", "-"]
        if known is not None:
            values[1:] = [f"{known.dim} × {known.depth}", f"{known.params:,}", f"{known.state:,}"]
        for size in sizes:
            row = found.get((model, size))
            if row is None or row.tokens_per_second is None:
                values += ["-" if row is None else row.note, "", ""]
                continue
            ratio = speed(rows, model, size) / speed(rows, "e1", size)
            values += [f"{row.tokens_per_second:,.0f}", "-" if math.isnan(ratio) else f"{ratio:.2f}"]
            values += [f"{row.peak_gib:.1f}"]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def path_table(rows: Sequence[Row]) -> str:
    """Markdown: what ran each model's recurrence, and whether Python loops over time."""
    columns = ["model", "B", "chosen", "kernels a step", "of them, of recurrences", "loop over T in Python"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if row.ms_per_step is not None:
            kernels = ", ".join(f"{kernel['calls']} × {short(kernel['name'])}" for kernel in row.kernels)
            launches = "not profiled" if row.launches is None else f"{row.launches:,}"
            values = [row.model, str(row.batch_size), row.runs, launches, kernels or "-", loops(row)]
            lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def loops(row: Row) -> str:
    """Whether Python loops over time, by what ``elman.ops`` says that it chose."""
    return "; ".join(_LOOPS[name] for name in _LOOPS if name in row.backends) or "no"


def short(kernel: str) -> str:
    """A kernel's name without its types and namespaces."""
    name = re.sub(r"^void |\(.*$|<.*$", "", kernel).split("::")[-1].strip()
    return name or kernel[:40]


def speed(rows: Sequence[Row], model: str, batch_size: int) -> float:
    """Tokens a second; NaN where there are none."""
    given = [row.tokens_per_second for row in rows if (row.model, row.batch_size) == (model, batch_size)]
    return given[0] if given and given[0] is not None else float("nan")


def aims(rows: Sequence[Row]) -> list[str]:
    """What was aimed for, what came out, and whether that is enough; left out where a part was not measured."""
    wanted = [
        ("e15", "e1", 0.97, 1.03),
        ("e10", "e1", 0.75, math.inf),
        ("e4", "e1", 0.8, math.inf),
        *((name, "e1", 1.0, math.inf) for name in _DIAGONAL),
    ]
    ours = [row.model for row in rows if re.fullmatch(r"(e\d+|ladder_\d|log_\d)( .*)?", row.model)]
    wanted += [(name, "mamba2", 1.0, math.inf) for name in dict.fromkeys(ours)]
    lines = []
    for size, (model, other, least, most) in itertools.product(sorted({row.batch_size for row in rows}), wanted):
        ratio = speed(rows, model, size) / speed(rows, other, size)
        if not math.isnan(ratio):
            bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
            met = "met" if least <= ratio <= most else "MISSED"
            lines.append(f"{met}: {model}, B = {size}: {ratio:.3f} × {other}, aim {bounds}")
    return lines


def main(options: Options) -> list[Row]:
    """Measure, print and write."""
    started = time.perf_counter()
    console = Console(width=200, highlight=False, markup=False, soft_wrap=True)
    device = resolve_device(options.device)
    cases = choose_cases(options.models)
    rows: list[Row] = []
    facts = {
        "machine": machine(device, options.commit),
        "params": options.params,
        "seq_len": options.seq_len,
        "compile": options.compile,
    }
    with random_bytes() as data:
        setting = Setting(data, options)
        if options.part is not None:
            prepare_part(cases, setting, options.part)
            return rows
        if options.jobs and device.type == "cuda":
            prepare_all(options)
            console.print(f"prepared in {time.perf_counter() - started:.0f} s")
        for case, batch_size in itertools.product(cases, options.batch_sizes):
            if time.perf_counter() - started < options.time_limit:
                row = measure(case, batch_size, setting, console)
            else:
                row = Row(case.label, batch_size, note="not measured: out of time")
            rows.append(row)
            seconds = time.perf_counter() - started
            console.print(f"{seconds:4.0f} s  {row.line}")
            written = {**facts, "seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
            write_json(f"models-{device_slug(device)}.json", written, RESULTS, options.out)
    console.print(f"\nT = {options.seq_len}, medians of up to {options.steps} steps\n")
    console.print(f"{speed_table(rows)}\n\n{path_table(rows)}\n")
    for line in aims(rows):
        console.print(line)
    looping = dict.fromkeys(row.model for row in rows if "reference" in row.backends)
    console.print(f"loop over T in Python, of PyTorch's operations: {', '.join(looping) or 'none'}")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
