"""How well does training scale over the GPUs of a machine, by DDP and by FSDP2?

    python -m benchmarks.distributed [--gpus 2 4] [--cases 1280x6x256 1760x26x48] [--parallel ddp fsdp]

Weak scaling of E1: every GPU has the same number of windows, and torchrun is started for each number of GPUs. Takes the
steps that ``elman train`` takes (batch, both passes, clipping, AdamW, and the ranks' agreement on whether to go on) on
random bytes; compiling and the first steps do not count. A step's time is that between two CUDA events, the host being
free to run ahead: the median of ``--steps`` of them on each rank, of which the slowest rank's is taken. Efficiency is
tokens a second over those of as many times one GPU without ``--parallel``, measured in the same call before and after
the others: the mean of both. What the link between the GPUs gives is measured by gathering, before the model is there:
GB/s into each. Every row is printed and written as soon as it is known, to benchmarks/results/ and to the
folder ``--out``.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console

from benchmarks.cases import first_line
from benchmarks.machine import machine
from benchmarks.models import write_json
from benchmarks.steps import device_slug, step_times
from elman.environment import peak_memory, resolve_device
from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.model import ModelConfig
from elman.sizing import num_params
from elman.training.config import TrainConfig
from elman.training.distributed import Processes, process_group
from elman.training.loop import Trainer

RESULTS = Path(__file__).parent / "results"
_DATA_BYTES = 1 << 24
_WARM_UP_STEPS = 10
_GATHERED_BYTES, _GATHERS = 1 << 28, 50  # as the weights of some layers

Kind = Literal["none", "ddp", "fsdp"]


@dataclass
class Row:
    """One case on so many GPUs. What is None was not measured, and ``note`` says why.

    Attributes:
        case: width x depth x windows a GPU.
        parallel: how the ranks share the model; ``none`` is one process by itself.
        ms_per_step: the slowest rank's median.
        tokens_per_second: of all GPUs.
        peak_gib: of the GPU that holds most.
        link_gb_per_second: into each GPU, while all gather what the others have.
    """

    case: str
    gpus: int
    parallel: Kind
    params: int | None = None
    compiled: bool | None = None
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    link_gb_per_second: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    gpus: tuple[int, ...] = (2, 4)
    """Numbers of GPUs, beside one without --parallel; 1 measures what --parallel costs there."""
    cases: tuple[str, ...] = ("1280x6x256", "1760x26x48")
    """E1 of WIDTHxDEPTHxWINDOWS, windows being those of each GPU."""
    parallel: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    """How ranks share the model."""
    seq_len: int = 512
    """T, bytes a window."""
    steps: int = 30
    """Timed steps."""
    compile: Literal["auto", "off"] = "auto"
    """As for elman train."""
    time_limit: float = 570.0
    """Seconds after which no other measurement is begun; one that is running is stopped half as long after that."""
    device: str = "auto"
    """GPUs, if the numbers are to mean anything."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""
    row: Annotated[str | None, tyro.conf.arg(help="How the benchmark tells the processes it starts what to do.")] = None


def sizes(case: str) -> tuple[int, int, int]:
    """Width, depth and windows a GPU.

    Raises:
        UsageError: these are no three numbers.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", case)
    if found is None:
        raise UsageError(f"--cases {case!r} is no WIDTHxDEPTHxWINDOWS: give for example 1280x6x256")
    width, depth, windows = map(int, found.groups())
    return width, depth, windows


def plan(options: Options) -> Iterator[Row]:
    """What to measure: one process before and after the others of its case."""
    for case in options.cases:
        yield Row(case, 1, "none")
        for gpus in options.gpus:
            for parallel in options.parallel:
                yield Row(case, gpus, parallel)
        yield Row(case, 1, "none")


def work(row: Row, data: Path, options: Options) -> Row | None:
    """Train for a while as one of the ranks. Returns the row on the first of them."""
    width, depth, windows = sizes(row.case)
    model = ModelConfig(width, depth, (mixer_config("e1")(),))
    config = TrainConfig(
        data=data, seq_len=options.seq_len, batch_size=windows * row.gpus, steps=10**6, device=options.device,
        compile=options.compile, parallel=row.parallel,
    )  # fmt: skip
    with process_group(config) as processes:
        if processes.size > 1:
            row.link_gb_per_second = link_bandwidth(processes, processes.device(options.device))
        trainer = Trainer(config, model, Console(quiet=True), processes)
        trainer.warm_up()
        step_times(trainer, min(_WARM_UP_STEPS, options.steps))
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = statistics.median(step_times(trainer, options.steps))
        ms, peak = processes.largest(ms, peak_memory(trainer.device) / 2**30)
        row.params, row.compiled, row.ms_per_step, row.peak_gib = num_params(model), trainer.compiled, ms, peak
        row.tokens_per_second = config.batch_size * options.seq_len / ms * 1e3
        return row if processes.is_main else None


def link_bandwidth(processes: Processes, device: torch.device) -> float:
    """GB/s that come in on each rank while all gather each other's parts of a tensor, many times; the slowest's."""
    on_gpu = device.type == "cuda"
    size = (_GATHERED_BYTES if on_gpu else _GATHERED_BYTES >> 8) // processes.size
    part = torch.zeros(size, device=device, dtype=torch.uint8)
    whole = part.new_empty(processes.size * size)
    seconds = 0.0
    for times in (_WARM_UP_STEPS, _GATHERS):
        if on_gpu:
            torch.cuda.synchronize()
        processes.largest(0.0)  # all begin
        started = time.perf_counter()
        for _ in range(times):
            dist.all_gather_into_tensor(whole, part)
        if on_gpu:
            torch.cuda.synchronize()
        (seconds,) = processes.largest(time.perf_counter() - started)
    return _GATHERS * (whole.numel() - size) / seconds / 1e9


def measure(row: Row, data: Path, options: Options, patience: float) -> Row:
    """Have torchrun start the ranks; an error is a row that says so."""
    told = {**asdict(options), "out": None}
    question = json.dumps({"row": asdict(row), "data": str(data), "options": told})
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.gpus}"),
            *("-m", "benchmarks.distributed", "--row", question),
        ]
        environment = {**os.environ, _ANSWER: str(answer)}
        torchrun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = torchrun.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            # Told to end, and not killed, it ends its ranks.
            torchrun.terminate()
            torchrun.communicate()
            row.note = f"no answer within {patience:.0f} s"
            return row
        if answer.exists():
            return Row(**json.loads(answer.read_text()))
    row.note = complaint(errors) or f"exit code {torchrun.returncode}"
    return row


def complaint(errors: str) -> str:
    """What went wrong first, from what the ranks and torchrun wrote; empty where nothing says it."""
    if "out of memory" in errors.lower():
        return "out of memory"
    found = re.findall(
        r"^(?:\[rank\d+\]: )?(?!torch\.distributed\.elastic)(\S*(?:Error|elman): .*)$", errors, re.MULTILINE
    )
    return found[0] if found else ""


#: The file that the first rank answers in.
_ANSWER = "ELMAN_BENCHMARK_ANSWER"


def answer(question: str) -> None:
    """As a rank: measure what is asked for."""
    asked = json.loads(question)
    lists = {name: tuple(value) for name, value in asked["options"].items() if isinstance(value, list)}
    row = work(Row(**asked["row"]), Path(asked["data"]), Options(**{**asked["options"], **lists}))
    if row is not None:
        path = Path(os.environ[_ANSWER])
        path.with_suffix(".partial").write_text(json.dumps(asdict(row)))
        path.with_suffix(".partial").rename(path)


def efficiency(row: Row, rows: Sequence[Row]) -> float:
    """Tokens a second over those of as many single GPUs; NaN where one of the two is missing."""
    alone = [
        other.tokens_per_second
        for other in rows
        if (other.case, other.parallel) == (row.case, "none") and other.tokens_per_second is not None
    ]
    if row.tokens_per_second is None or not alone:
        return math.nan
    return row.tokens_per_second / (row.gpus * statistics.mean(alone))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a row."""
    lines = [
        "| width x depth x windows a GPU | GPUs | parallel | ms a step | tokens/s | efficiency | peak GiB | link GB/s |"
    ]
    lines.append("|---" * 8 + "|")
    for row in rows:
        values = [row.case, str(row.gpus), row.parallel]
        if row.tokens_per_second is None:
            values += [row.note, "", "", "", ""]
        else:
            share = efficiency(row, rows)
            values += [f"{row.ms_per_step:.2f}", f"{row.tokens_per_second:,.0f}"]
            values += ["-" if math.isnan(share) else f"{share:.1%}", f"{row.peak_gib:.2f}"]
            values.append("-" if row.link_gb_per_second is None else f"{row.link_gb_per_second:.3g}")
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def main(options: Options) -> list[Row]:
    """Measure, print and write."""
    started = time.perf_counter()
    console = Console(width=200, highlight=False, markup=False, soft_wrap=True)
    device = resolve_device(options.device)
    facts = {"machine": machine(device, options.commit), "seq_len": options.seq_len, "compile": options.compile}
    rows: list[Row] = []
    planned = list(plan(options))
    for row in planned:
        sizes(row.case)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.bin"
        data.write_bytes(np.random.default_rng(0).integers(256, size=_DATA_BYTES, dtype=np.uint8).tobytes())
        for row in planned:
            left = options.time_limit - (time.perf_counter() - started)
            if left <= 0:
                row.note = "not measured: out of time"
            elif device.type == "cuda" and row.gpus > torch.cuda.device_count():
                row.note = f"not measured: {torch.cuda.device_count()} GPU(s) here"
            else:
                row = measure(row, data, options, left + options.time_limit / 2)
            rows.append(row)
            seconds = time.perf_counter() - started
            told = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f} tokens/s"
            console.print(f"{seconds:4.0f} s  {row.case}, {row.gpus} x {row.parallel}: {told} {row.note}")
            written = [{**asdict(row), "efficiency": _or_none(efficiency(row, rows))} for row in rows]
            value = {**facts, "seconds": round(seconds, 1), "rows": written}
            write_json(f"distributed-{device_slug(device)}.json", value, RESULTS, options.out)
    console.print(f"\n{table(rows)}")
    return rows


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


if __name__ == "__main__":
    given = tyro.cli(Options, description=__doc__)
    try:
        main(given) if given.row is None else answer(given.row)
    except UsageError as error:
        sys.exit(f"elman: {first_line(error)}")
