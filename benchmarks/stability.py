"""Which models train stably, and how far do they get? Each by ``elman train``, at one size, from one seed.

    python -m benchmarks.stability --data bench.txt [--models e1 mamba2] [--steps 1000] [--jobs 6]

Several runs share the GPU at a time, so their speed says nothing; their losses are what they would be alone. What is
told of a run is read from its folder: the mean of its last 100 losses, the held-out loss, the largest norm of the
gradient (as it was before clipping), steps skipped, whose loss or gradient was no finite number, and spikes: steps
behind the warm-up whose loss is more than half a nat above the median of the 50 before. Every row is printed and
written as soon as it is known, to benchmarks/results/ and to the folder ``--out``.
"""

from __future__ import annotations

import lzma
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from benchmarks.cases import Case, choose_cases
from benchmarks.machine import machine
from benchmarks.models import words
from benchmarks.steps import device_slug, write_json
from elman.environment import resolve_device
from elman.sizing import num_params
from elman.training.run import RunFolder

RESULTS = Path(__file__).parent / "results"
_SPIKE_NATS = 0.5
_SPIKE_WINDOW = 50
#: To save and say so, once it is stopped.
_SECONDS_TO_STOP = 30


@dataclass(frozen=True)
class Options:
    """What is trained, and how."""

    data: Path
    """Raw text, documents ended by 0x1e; it may be compressed by xz."""
    models: tuple[str, ...] = ()
    """Variants or patterns; all if absent."""
    params: str = "10m"
    """Of every model, within 2%."""
    steps: int = 1000
    """Of every run."""
    seq_len: int = 256
    """Bytes a training window."""
    batch_size: int = 32
    """Windows a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    jobs: int = 6
    """Runs at a time."""
    time_limit: float = 540.0
    """Seconds after which runs that go on are stopped and no other is begun."""
    device: str = "auto"
    """As for elman train."""
    compile: str = "auto"
    """As for elman train."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""


@dataclass
class Row:
    """One run.

    Attributes:
        model: as ``elman train --model`` takes it, options included.
        outcome: ``finished``, or how it ended.
        steps: whose loss was a finite number.
        last_100: mean of the last 100 losses, nats a byte.
        heldout: held-out loss, nats a byte.
        max_norm: largest norm of the gradient.
        max_norm_later: the same, behind the warm-up.
        spikes: see the top of this file.
        skipped: steps without an update, because their loss or gradient was no finite number.
        backends: what ran each mixer's recurrence, and how many of them.
    """

    model: str
    outcome: str
    dim: int | None = None
    depth: int | None = None
    params: int | None = None
    steps: int = 0
    last_100: float | None = None
    heldout: float | None = None
    max_norm: float | None = None
    max_norm_later: float | None = None
    spikes: int = 0
    skipped: int = 0
    train_seconds: float | None = None
    backends: dict[str, int] = field(default_factory=dict)

    @property
    def stable(self) -> bool:
        """It came to its end, skipped no step, its loss never jumped, and it knows more than the byte's range."""
        learned = self.last_100 is not None and self.last_100 < math.log(256)
        return self.outcome == "finished" and self.spikes == self.skipped == 0 and learned


def command(case: Case, data: Path, run: Path, options: Options) -> list[str]:
    """The run's command line: evaluation and checkpoint at its end alone."""
    given = {
        "params": options.params, "data": data, "steps": options.steps, "seq-len": options.seq_len,
        "batch-size": options.batch_size, "lr": options.lr, "warmup": options.warmup, "seed": options.seed,
        "device": options.device, "compile": options.compile, "eval-every": 0, "save-every": 0, "out": run,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "elman", "train", "--model", case.pattern, *words, *case.arguments]


def train(case: Case, data: Path, folder: Path, options: Options, deadline: float) -> Row:
    """Run it in a process of its own, and read its folder."""
    left = deadline - time.monotonic()
    if left <= 0:
        return Row(case.label, "not run: out of time")
    run = folder / re.sub(r"\W+", "-", case.label)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    with (folder / f"{run.name}.log").open("w+") as log:
        process = subprocess.Popen(
            command(case, data, run, options), stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        in_time = True
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            in_time = False
            process.terminate()  # it saves, and ends
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    last_line = (lines[-1] if lines else "").replace(str(run), run.name) if in_time else "stopped: out of time"
    row = read_run(case.label, RunFolder(run), last_line, options.warmup)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return row


def read_run(label: str, run: RunFolder, last_line: str, warmup: int) -> Row:
    """A run's row from its folder; ``last_line`` of what it printed says why it ended before its end."""
    summary, env = run.read_json("summary.json"), run.read_json("env.json")
    rows = run.read_metrics()
    steps = [row for row in rows if "loss" in row]
    row = Row(label, "finished" if summary else last_line or "ended without a word", steps=len(steps))
    if run.path.joinpath("config.json").exists():
        _, model = run.read_config()
        row.dim, row.depth, row.params = model.dim, model.depth, num_params(model)
    if env:
        row.backends = dict(Counter(env[-1]["backends"]))
    if summary:
        row.train_seconds, row.heldout = summary["train_seconds"], summary["heldout"]["nats_per_byte"]
    if steps:
        row.last_100 = statistics.fmean(row["loss"] for row in steps[-100:])
        # Of a step that was skipped the norm may be no number, and is not told.
        norms = {row["step"]: row["grad_norm"] for row in steps if "grad_norm" in row}
        row.max_norm = max(norms.values(), default=None)
        row.max_norm_later = max((norm for step, norm in norms.items() if step > warmup), default=None)
        row.skipped = max((row["skipped"] for row in rows if "skipped" in row), default=0)
        row.spikes = spikes([row["loss"] for row in steps], warmup)
    return row


def spikes(losses: Sequence[float], warmup: int) -> int:
    """Steps behind the warm-up whose loss is far above the median of those before."""
    first = max(warmup, _SPIKE_WINDOW)
    return sum(
        losses[i] > statistics.median(losses[i - _SPIKE_WINDOW : i]) + _SPIKE_NATS for i in range(first, len(losses))
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a model, the lowest held-out loss first."""
    columns = ["model", "width × depth", "last 100", "held out", "largest norm", "behind warm-up", "spikes", "skipped"]
    columns += ["stable", "recurrence", "steps, outcome"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: (row.heldout is None, row.heldout or row.last_100 or 99.0)):
        size = "-" if row.dim is None else f"{row.dim} × {row.depth}"
        numbers = [_number(row.last_100, 4), _number(row.heldout, 4), _number(row.max_norm, 2)]
        numbers += [_number(row.max_norm_later, 2), str(row.spikes), str(row.skipped), "yes" if row.stable else "NO"]
        values = [row.model, size, *numbers, words(row.backends), f"{row.steps}, {row.outcome}"]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if value < 1e4 else f"{value:.2g}"


def unpacked(path: Path, folder: Path) -> Path:
    """The file itself, or what xz packed into it."""
    if path.suffix != ".xz":
        return path
    plain = folder / path.stem
    with lzma.open(path) as packed, plain.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 24)
    return plain


def main(options: Options) -> list[Row]:
    """Train, print and write."""
    started = time.monotonic()
    device = resolve_device(options.device)
    named = ("params", "steps", "seq_len", "batch_size", "lr", "warmup", "seed")
    facts = {"machine": machine(device, options.commit), **{name: getattr(options, name) for name in named}}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        data = unpacked(options.data, folder).absolute()
        deadline = started + options.time_limit
        cases = choose_cases(options.models, speed=False)
        tasks = [pool.submit(train, case, data, folder, options, deadline) for case in cases]
        for task in as_completed(tasks):
            row = task.result()
            rows.append(row)
            seconds = time.monotonic() - started
            print(
                f"{seconds:4.0f} s  {row.model}: last 100 {_number(row.last_100, 4)}, "
                f"held out {_number(row.heldout, 4)}, largest norm {_number(row.max_norm, 2)}, "
                f"{row.steps} steps, {row.outcome}",
                flush=True,
            )
            written = {**facts, "seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
            write_json(f"stability-{device_slug(device)}.json", written, RESULTS, options.out)
    print(f"\n{table(rows)}")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
