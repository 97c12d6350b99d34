"""What is left of a run that is killed, whose files are damaged or whose disk is full? Tries it, and goes on with it.

    python -m benchmarks.nothing_lost [--kills 25] [--commit HASH]

Trains a tiny E1 on a CPU through ``elman train`` once undisturbed. Then, again and again, the same run is disturbed and
taken up by ``elman train --resume``, and its losses are compared with the undisturbed ones, all of them and bit for
bit. What is tried:

    SIGTERM, SIGINT    in start-up, in steps, when an evaluation is due and while a checkpoint is written: at moments
                       chosen at random, or when a file is there
    kill -9            at moments chosen at random, and while a checkpoint is written
    damage             to the newest checkpoint: a bit flipped, its end cut off, a file missing, its sums missing
    a full disk        a small file system in memory, where one may be mounted; else the process's limit on file sizes
    read-only          the run's folder, when the run is taken up: mounted so by root, whom permissions do not stop
    data gone          the file moved away before the run is taken up
    NaN                weights that grow until they overflow, behind a checkpoint; this run is not taken up, but must
                       name what is left

Each is a row: how the process ended, how long after the signal, at which step the newest whole checkpoint was, and
whether the losses came out the same. Rows are printed as they come; the table is written to benchmarks/results/. The
exit status is 1 where losses differ, or where a signal took more than 20 s to end a run or did not end in a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.machine import machine
from elman.errors import UsageError
from elman.training.checkpoint import list_checkpoints, load_checkpoint
from elman.training.run import RunFolder

RESULTS = Path(__file__).parent / "results"
_SIZE = ("--model", "e1", "--dim", "16", "--depth", "1", "--seq-len", "16", "--batch-size", "4")
_SECONDS_TO_END = 300.0
#: In which a signal ends a run.
_LONGEST = 20.0


@dataclass
class Options:
    """What to try."""

    kills: int = 25
    """Times that kill -9 is tried at a random moment, and a fifth as often while a checkpoint is written."""
    signals: int = 4
    """Times that each of SIGTERM and SIGINT is tried in start-up, in steps, when an evaluation is due and in saving."""
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
    seconds_to_start: float = 0.0
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
        row.same = process.returncode == 0 and losses(run) == self.losses
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


Moment = Literal["start-up", "step", "evaluation", "saving"]


def interrupt(trials: Trials, number: signal.Signals, moment: Moment, at: float) -> Row:
    """Send a signal at a moment, then go on; ``at`` is a step or, in start-up, the seconds from the process's start."""
    run = trials.new_run()
    process = trials.begin(run)
    if moment == "start-up":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(at)
        when = f"start-up, {at:.1f} s"
    else:
        when = str(trials.until(run, process, int(at)))
    if moment == "evaluation":
        when += ", evaluation due"
    if moment == "saving":
        while process.poll() is None and not any((run / "checkpoints").glob(".*")):
            time.sleep(0.0005)
        when = f"{last_step(run)}, saving"
    started = time.perf_counter()
    process.send_signal(number)
    said = finish(process)
    row = Row("kill -9" if number == signal.SIGKILL else number.name, when, process.returncode)
    row.seconds, row.said = time.perf_counter() - started, said
    if (run / "config.json").exists():
        row.kept = newest_whole(run)
        trials.resume(run, row)
    else:
        row.said = f"{said} (no run was begun)".strip()
    return row


def damage(trials: Trials, name: str, harm: Callable[[Path], object]) -> Row:
    """Stop a run in its midst, harm its newest checkpoint, and go on."""
    run = stopped_run(trials)
    row = Row(f"newest checkpoint: {name}", str(last_step(run)))
    harm(max(list_checkpoints(run / "checkpoints")))
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


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[bool]:
    """Something mounted, which only root may; whether it could be. The last argument is where."""
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", arguments[-1]], check=True)


def full_disk(trials: Trials) -> Iterator[Row]:
    """Have a checkpoint not fit; then make room, and go on."""
    small = trials.folder / "small"
    small.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)) as can_mount:
        if can_mount:
            yield no_room(
                trials,
                "a full disk (tmpfs of 160 kB)",
                small,
                make_room=lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True),
            )
    yield no_room(trials, "no file of more than 9 kB (RLIMIT_FSIZE)", trials.folder, limit=9000)


def no_room(
    trials: Trials, what: str, folder: Path, limit: int | None = None, make_room: Callable[[], object] = lambda: None
) -> Row:
    """A run in a folder that it does not fit into, or with a limit on its files, until room is made."""
    run = trials.new_run(folder)
    process = trials.begin(run, limit=limit)
    said = finish(process)
    row = Row(what, str(last_step(run)), process.returncode, kept=newest_whole(run), said=said)
    make_room()
    trials.resume(run, row)
    return row


def stopped_run(trials: Trials) -> Path:
    """One that was stopped in its midst."""
    run = trials.new_run()
    process = trials.begin(run)
    trials.until(run, process, trials.options.steps // 2)
    process.send_signal(signal.SIGTERM)
    finish(process)
    return run


def no_data(trials: Trials) -> Row:
    """Go on without the data file; then with it."""
    run = stopped_run(trials)
    moved = trials.data.rename(trials.data.with_suffix(".moved"))
    process = trials.start("--resume", str(run))
    row = Row("the data file is gone, at resuming", str(last_step(run)), said=finish(process), kept=newest_whole(run))
    row.code = process.returncode
    moved.rename(trials.data)
    trials.resume(run, row)
    return row


def read_only(trials: Trials) -> Row:
    """Go on in a folder that cannot be written; then in one that can."""
    run = stopped_run(trials)
    row = Row("the run's folder is read-only, at resuming", str(last_step(run)), kept=newest_whole(run))
    with mounted("--bind", str(run), str(run)) as can_mount:
        if can_mount:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
        elif os.geteuid() == 0:
            row.said = "not tried: permissions do not stop root, who cannot mount here"
            return row
        else:
            run.chmod(0o555)
        process = trials.start("--resume", str(run))
        row.said = finish(process)
        row.code = process.returncode
        if not can_mount:
            run.chmod(0o755)
    trials.resume(run, row)
    return row


def nan(trials: Trials) -> Row:
    """Weights that the decay makes grow, faster every step, until the loss is NaN."""
    run, every = trials.new_run(), trials.options.steps // 10
    process = trials.begin(
        run, "--lr", "1", "--warmup", str(10 * every), "--schedule", "constant", "--weight-decay", str(1600 / every)
    )
    said = finish(process)
    return Row("a loss of NaN", str(last_step(run)), process.returncode, kept=newest_whole(run), said=said)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.cells()) + " |" for row in rows])


def disturbances(trials: Trials, moments: random.Random) -> Iterator[Row]:
    """Each, tried."""
    steps, every = trials.options.steps, trials.options.steps // 10

    def some_save() -> int:
        return every * moments.randrange(1, 9) + every // 2

    for number in (signal.SIGTERM, signal.SIGINT):
        for _ in range(trials.options.signals):
            yield interrupt(trials, number, "start-up", moments.uniform(0, trials.seconds_to_start))
        for _ in range(trials.options.signals):
            yield interrupt(trials, number, "step", moments.randrange(1, steps))
        for _ in range(trials.options.signals):
            yield interrupt(trials, number, "evaluation", 2 * every * moments.randrange(1, 5))
        for _ in range(trials.options.signals):
            yield interrupt(trials, number, "saving", some_save())
    for _ in range(trials.options.kills):
        yield interrupt(trials, signal.SIGKILL, "step", moments.randrange(0, steps))
    for _ in range(trials.options.kills // 5):
        yield interrupt(trials, signal.SIGKILL, "saving", some_save())
    yield damage(trials, "a bit flipped", flip)
    yield damage(trials, "its end cut off", cut)
    yield damage(trials, "a file missing", lambda checkpoint: (checkpoint / "trainer.pt").unlink())
    yield damage(trials, "its sums missing", lambda checkpoint: (checkpoint / "manifest.json").unlink())
    yield from full_disk(trials)
    yield no_data(trials)
    yield read_only(trials)
    yield nan(trials)


def undisturbed(trials: Trials) -> None:
    """The run that the others are compared with."""
    run, started = trials.new_run(), time.perf_counter()
    process = trials.begin(run)
    trials.until(run, process, 1)
    trials.seconds_to_start = time.perf_counter() - started
    said = finish(process)
    trials.losses = losses(run)
    if process.returncode or len(trials.losses) != trials.options.steps:
        raise SystemExit(f"the undisturbed run failed: {said}")


def is_bad(row: Row) -> bool:
    """Something was lost, or a signal ended the run too late or in no checkpoint."""
    if row.same is False:
        return True
    if not row.what.startswith("SIG"):
        return False
    begun = row.same is not None
    return row.seconds is None or row.seconds > _LONGEST or (begun and row.kept is None)


def main(options: Options) -> list[Row]:
    """Try, print and write."""
    moments = random.Random(options.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), options)
        trials.data.write_bytes(bytes(moments.choices(b"abcdefgh \n", k=200_000)))
        undisturbed(trials)
        for row in disturbances(trials, moments):
            row.said = row.said.replace(str(trials.folder), "…")
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "nothing_lost-cpu.md"
    path.write_text(report(rows, options), encoding="utf-8")
    print(f"written to {path}")
    return rows


def report(rows: Sequence[Row], options: Options) -> str:
    """The table under what it depends on and comes to."""
    facts = machine(torch.device("cpu"), options.commit)
    slowest = max((row.seconds for row in rows if row.what.startswith("SIG") and row.seconds is not None), default=0.0)
    return (
        f"# What is left of a disturbed run\n\n`python -m benchmarks.nothing_lost` at {facts['git_commit']}, "
        f"elman {facts['elman']}, torch {facts['packages']['torch']}, on a CPU. {len(rows)} disturbances; "
        f"{sum(row.same is True for row in rows)} runs went on with the losses of the undisturbed one "
        f"({options.steps} steps), bit for bit, {sum(row.same is False for row in rows)} did not. "
        f"Longest time from SIGTERM or SIGINT to the end: {slowest:.1f} s.\n\n{markdown(rows)}\n"
    )


if __name__ == "__main__":
    raise SystemExit(1 if any(map(is_bad, main(tyro.cli(Options, description=__doc__)))) else 0)
