"""What is left of a run that is killed, whose files are damaged or whose disk is full? Tries it, and goes on with it.

    python -m benchmarks.nothing_lost [--kills 12] [--commit HASH]

Trains a tiny E1 on a CPU through ``elman train`` once undisturbed. Then, again and again, the same run is disturbed and
taken up by ``elman train --resume``, and its losses are compared with the undisturbed ones, all of them and bit for
bit. What is tried:

    SIGTERM, SIGINT    in start-up, in steps, in an evaluation and while a checkpoint is written, these by waiting for
                       a file or by a moment chosen at random
    kill -9            at moments chosen at random
    damage             to the newest checkpoint: a bit flipped, its end cut off, a file missing, its sums missing
    a full disk        a small file system in memory, where one may be mounted; else the process's limit on file sizes
    read-only          the run's folder; only where this is not run as root, whom nothing keeps from writing
    data gone          the file moved away before the run is taken up
    NaN                a learning rate that no model survives; this run is not taken up, but must name what is left

Each is a row: how the process ended, how long after the signal, at which step the newest whole checkpoint was, and
whether the losses came out the same. Rows are printed as they come; the table is written to benchmarks/results/.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from benchmarks.machine import machine
from elman.errors import UsageError
from elman.training.checkpoint import list_checkpoints, load_checkpoint
from elman.training.run import RunFolder

RESULTS = Path(__file__).parent / "results"
_SIZE = ("--model", "e1", "--dim", "16", "--depth", "1", "--seq-len", "16", "--batch-size", "4")
_SECONDS_TO_END = 300.0


@dataclass
class Options:
    """What to try."""

    kills: int = 12
    """Times that kill -9 is tried."""
    signals: int = 4
    """Times that each of SIGTERM and SIGINT is tried at a random moment, beside start-up, evaluation and saving."""
    steps: int = 200
    """Of the run; a checkpoint every tenth of it, an evaluation every fifth."""
    seed: int = 0
    """Of the moments."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path = RESULTS
    """The folder of the table."""


@dataclass
class Row:
    """One disturbance and what came of it.

    Attributes:
        what: was done.
        when: it was done: the step that metrics.jsonl had come to, or in words.
        code: the process's exit status; negative, the signal that killed it.
        seconds: from the disturbance to its end.
        kept: step of the newest whole checkpoint, as it is found then; None where there is none yet.
        said: the last line that the process printed, or its error.
        same: whether the resumed run has the losses of the undisturbed one, each and bit for bit; None: not resumed.
    """

    what: str
    when: str
    code: int | None = None
    seconds: float | None = None
    kept: int | None = None
    said: str = ""
    same: bool | None = None

    def cells(self) -> list[str]:
        """Of a Markdown table."""
        code = "-" if self.code is None else str(self.code)
        seconds = "-" if self.seconds is None else f"{self.seconds:.1f}"
        same = {True: "yes", False: "NO", None: "-"}[self.same]
        return [self.what, self.when, code, seconds, "-" if self.kept is None else str(self.kept), same, self.said]


_COLUMNS = ("what", "at step", "exit status", "seconds to end", "newest whole checkpoint", "losses the same", "said")


@dataclass
class Trials:
    """Runs in a folder of their own, and what they are compared with."""

    folder: Path
    options: Options
    losses: dict[int, float] = field(default_factory=dict)
    _count: int = 0

    @property
    def data(self) -> Path:
        """What all runs read."""
        return self.folder / "text.bin"

    def new_run(self, parent: Path | None = None) -> Path:
        """A folder that no run has had."""
        self._count += 1
        return (parent or self.folder) / f"run-{self._count}"

    def start(self, *arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
        """``elman train`` with these arguments, as a process; ``limit`` is the largest file it may write, in bytes."""

        def confine() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background of a shell ignores
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, "-m", "elman", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
            preexec_fn=confine,
        )

    def begin(self, run: Path, *more: str, limit: int | None = None) -> subprocess.Popen[str]:
        """The run that is tried, with more arguments; ``limit`` as in ``start``."""
        steps = self.options.steps
        return self.start(
            *_SIZE, "--steps", str(steps), "--save-every", str(steps // 10), "--eval-every", str(steps // 5),
            "--eval-bytes", "10k", "--stats-every", "0", "--tensorboard", "off", "--device", "cpu",
            "--data", str(self.data), "--out", str(run), *more, limit=limit,
        )  # fmt: skip

    def resume(self, run: Path, row: Row) -> None:
        """Take a run up, to its end, and compare."""
        process = self.start("--resume", str(run))
        said = finish(process)
        found = losses(run)
        row.same = process.returncode == 0 and found == self.losses
        if process.returncode:
            row.said = f"resumed: {said}"

    def until(self, run: Path, process: subprocess.Popen[str], step: int) -> int:
        """Wait until metrics.jsonl has come to a step, or the process to its end; returns the step it has come to."""
        while process.poll() is None and last_step(run) < step:
            time.sleep(0.003)
        return last_step(run)


def losses(run: Path) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["loss"] for row in RunFolder(run).read_metrics() if "loss" in row}


def last_step(run: Path) -> int:
    """That the metrics have come to; 0 before the first."""
    return max(losses(run), default=0)


def newest_whole(run: Path) -> int | None:
    """Step of the newest checkpoint that is whole by its sums."""
    for path in sorted(list_checkpoints(run / "checkpoints"), reverse=True):
        with contextlib.suppress(UsageError):
            return load_checkpoint(path).step
    return None


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; returns the last line printed that is part of no box."""
    try:
        output, _ = process.communicate(timeout=_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return "did not end"
    lines = [line.strip() for line in output.splitlines() if line.strip(" │╭╰─╯╮")]
    return lines[-1] if lines else ""


def interrupt(trials: Trials, number: signal.Signals, moment: str, step: int) -> Row:
    """Send a signal when the run has come to a moment, or in words to one that a file tells of."""
    run = trials.new_run()
    process = trials.begin(run)
    if moment == "start-up":
        while process.poll() is None and not run.exists():
            time.sleep(0.003)
        when = "start-up"
    elif moment == "saving":
        trials.until(run, process, step)
        while process.poll() is None and not any((run / "checkpoints").glob(".*")):
            time.sleep(0.0005)
        when = f"{last_step(run)}, a checkpoint half written" if process.poll() is None else "missed"
    else:
        when = str(trials.until(run, process, step))
        if moment == "evaluation":
            when += ", evaluation due"
    started = time.perf_counter()
    process.send_signal(number)
    said = finish(process)
    row = Row(number.name if number != signal.SIGKILL else "kill -9", when, process.returncode)
    row.seconds, row.said = time.perf_counter() - started, said if number != signal.SIGKILL else ""
    if not (run / "config.json").exists():
        row.said += " (no run was begun)"
        return row
    row.kept = newest_whole(run)
    trials.resume(run, row)
    return row


def damage(trials: Trials, name: str, harm: Callable[[Path], None]) -> Row:
    """Stop a run in its midst, harm its newest checkpoint, and go on."""
    run = trials.new_run()
    process = trials.begin(run)
    trials.until(run, process, trials.options.steps // 2)
    process.send_signal(signal.SIGTERM)
    finish(process)
    newest = max(list_checkpoints(run / "checkpoints"))
    row = Row(f"newest checkpoint: {name}", str(last_step(run)), process.returncode)
    harm(newest)
    row.kept = newest_whole(run)
    trials.resume(run, row)
    return row


def flip(checkpoint: Path) -> None:
    """One bit, in the midst of the weights."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(checkpoint: Path) -> None:
    """The last byte of the optimiser's state."""
    path = checkpoint / "trainer.pt"
    path.write_bytes(path.read_bytes()[:-1])


def full_disk(trials: Trials) -> list[Row]:
    """Have a checkpoint not fit; then make room, and go on."""
    room = trials.folder / "small"
    room.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(room)], capture_output=True, check=False
    )
    rows = []
    if mounted.returncode == 0:
        try:
            run = trials.new_run(room)
            started = time.perf_counter()
            process = trials.begin(run)
            row = Row("a full disk (file system of 160 kB)", "-", said=finish(process))
            row.code, row.seconds = process.returncode, time.perf_counter() - started
            row.when, row.kept = str(last_step(run)), newest_whole(run) if run.exists() else None
            if run.exists() and (run / "config.json").exists():
                subprocess.run(["mount", "-o", "remount,size=64m", str(room)], check=True)
                said = row.said
                trials.resume(run, row)
                row.said = said if row.same else row.said
            rows.append(row)
        finally:
            subprocess.run(["umount", "-l", str(room)], check=False)
    run = trials.new_run()
    process = trials.begin(run, limit=9000)
    row = Row("no file may be larger than 9 kB", "-", said=finish(process))
    row.code, row.when, row.kept = process.returncode, str(last_step(run)), newest_whole(run)
    said = row.said
    trials.resume(run, row)
    row.said = said if row.same else row.said
    return [*rows, row]


def others(trials: Trials) -> Iterator[Row]:
    """What is found when a stopped run is to be taken up."""
    run = trials.new_run()
    process = trials.begin(run)
    trials.until(run, process, trials.options.steps // 2)
    process.send_signal(signal.SIGTERM)
    finish(process)
    kept = newest_whole(run)

    moved = trials.data.rename(trials.data.with_suffix(".moved"))
    process = trials.start("--resume", str(run))
    row = Row("the data file is gone", str(last_step(run)), said=finish(process), kept=newest_whole(run))
    row.code = process.returncode
    moved.rename(trials.data)
    said = row.said
    copy = run.with_name(run.name + "-copy")
    shutil.copytree(run, copy)
    trials.resume(copy, row)
    row.said = said if row.same else row.said
    yield row

    row = Row("the run's folder is read-only", str(last_step(run)), kept=kept)
    if os.geteuid() == 0:
        row.said = "not tried: nothing keeps root from writing"
    else:
        for path in (run, run / "checkpoints"):
            path.chmod(0o555)
        process = trials.start("--resume", str(run))
        row.said, row.code = finish(process), None
        row.code = process.returncode
        for path in (run, run / "checkpoints"):
            path.chmod(0o755)
        trials.resume(run, row)
    yield row


def nan(trials: Trials) -> Row:
    """The losses become NaN a few steps behind a checkpoint."""
    run = trials.new_run()
    started = time.perf_counter()
    process = trials.begin(run, "--lr", "1e18", "--warmup", "0", "--grad-clip", "0", "--max-skipped", "10")
    row = Row("a learning rate of 1e18", "1", said=finish(process))
    row.code, row.seconds, row.kept = process.returncode, time.perf_counter() - started, newest_whole(run)
    return row


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.cells()) + " |" for row in rows])


def main(options: Options) -> list[Row]:
    """Try, print and write."""
    moments = random.Random(options.seed)
    rows: list[Row] = []

    def tell(row: Row) -> None:
        row.said = row.said.replace(str(trials.folder), "…")
        rows.append(row)
        print(" | ".join(row.cells()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), options)
        trials.data.write_bytes(bytes(moments.choices(b"abcdefgh \n", k=200_000)))
        whole = trials.new_run()
        process = trials.begin(whole)
        said = finish(process)
        trials.losses = losses(whole)
        if process.returncode or len(trials.losses) != options.steps:
            raise SystemExit(f"the undisturbed run failed: {said}")
        for number in (signal.SIGTERM, signal.SIGINT):
            steps = options.steps
            tell(interrupt(trials, number, "start-up", 0))
            tell(interrupt(trials, number, "evaluation", steps // 5))
            tell(interrupt(trials, number, "saving", steps // 10 * 2 - 5))
            for _ in range(options.signals):
                tell(interrupt(trials, number, "step", moments.randrange(1, steps)))
        for _ in range(options.kills):
            tell(interrupt(trials, signal.SIGKILL, "step", moments.randrange(0, options.steps)))
        for name, harm in (
            ("a bit flipped", flip),
            ("its end cut off", cut),
            ("a file missing", lambda checkpoint: (checkpoint / "trainer.pt").unlink()),
            ("its sums missing", lambda checkpoint: (checkpoint / "manifest.json").unlink()),
        ):
            tell(damage(trials, name, harm))
        for row in full_disk(trials):
            tell(row)
        for row in others(trials):
            tell(row)
        tell(nan(trials))
    facts = machine(torch.device("cpu"), options.commit)
    bad = sum(row.same is False for row in rows)
    slowest = max((row.seconds for row in rows if row.what.startswith("SIG") and row.seconds is not None), default=0.0)
    text = (
        f"# What is left of a disturbed run\n\n`python -m benchmarks.nothing_lost` at {facts['git_commit']}, "
        f"elman {facts['elman']}, torch {facts['packages']['torch']}, on a CPU. {len(rows)} disturbances; "
        f"{sum(row.same is True for row in rows)} runs went on with the losses of the undisturbed one, bit for bit, "
        f"{bad} did not. Longest time from SIGTERM or SIGINT to the end: {slowest:.1f} s.\n\n{markdown(rows)}\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "nothing_lost-cpu.md"
    path.write_text(text, encoding="utf-8")
    print(f"\n{markdown(rows)}\n\nwritten to {path}")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
