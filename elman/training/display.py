"""What a person sees of a run while it goes, and at its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from elman.training.profile import PROFILED_AT, Profile
from elman.units import bits, format_bytes, format_count, format_duration

#: Seconds between lines where there is no terminal to redraw.
_LINE_EVERY = 10.0


class RunConsole(Console):
    """A console whose reader may go away, as in ``elman train | head``: the run goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _TwoLines(Progress):
    """The numbers above the bar, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield Text(task.fields["status"])
        yield self.make_tasks_table(self.tasks)


class TrainingDisplay:
    """A live bar on a terminal; a line every ten seconds elsewhere, as in a log file."""

    def __init__(self, console: Console, unit: str = "byte") -> None:
        self.console = console
        self.unit = unit
        self._progress = _TwoLines(
            TextColumn("{task.fields[head]}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("[cyan]ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=1.0, head="step 0", status="")
        self._last_line = -_LINE_EVERY

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self,
        *,
        step: int,
        steps: int | None,
        progress: float,
        loss: float,
        mean: float,
        tokens_per_second: float,
        mfu: float | None,
        seconds: float,
        memory: int,
    ) -> None:
        """Show where the run stands. ``mean`` is that of the last 100 losses; ``progress`` and ``mfu`` go to 1."""
        head = f"step {step}" + (f"/{steps}" if steps else "")
        used = "" if mfu is None else f"MFU {mfu:.1%}  "
        status = (
            f"loss {loss:.3f}  mean {mean:.3f}  {bits(mean):.3f} bits/{self.unit}  "
            f"{format_count(tokens_per_second)} tok/s  {used}{format_bytes(memory)}"
        )
        self._progress.update(self._task, completed=min(progress, 1.0), head=head, status=status)
        if not self.console.is_terminal and time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            eta = format_duration(seconds * (1 - progress) / progress) if 0 < progress < 1 else "0s"
            self.say(f"{head}  {min(progress, 1):.0%}  {status}  ETA {eta}")

    def show(self, what: RenderableType) -> None:
        """What stays as well, such as a table."""
        self._progress.console.print(what)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._progress.console.print(Text(line), soft_wrap=True)


def show_profile(display: TrainingDisplay, profile: Profile | None, path: Path) -> None:
    """Where a step's time goes, and where its trace lies."""
    if profile is None:
        display.say(f"--profile: no steps were profiled, for the run was shorter than {PROFILED_AT} steps")
        return
    display.show(profile.table())
    display.say(f"trace of {profile.steps} steps in {path}: open it at ui.perfetto.dev")


def say(console: Console, line: str) -> None:
    """A line as it is, wrapped by nobody but the terminal."""
    console.print(Text(line), soft_wrap=True)


def print_summary(
    console: Console, summary: dict[str, Any], facts: list[tuple[str, str]], shown: list[RenderableType]
) -> None:
    """What a run has to show, and then the table that it ends with, whose last rows are ``facts``."""
    table = Table(title=f"{summary['model']}: {summary['steps']} steps", show_header=False, title_justify="left")
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_row("parameters", f"{summary['params']:,}")
    table.add_row("tokens", f"{summary['tokens']:,}")
    table.add_row("training time", format_duration(summary["train_seconds"]))
    if summary["compiled"]:
        table.add_row("compiling, beside that", format_duration(summary["start_up_seconds"]))
    table.add_row("speed", f"{format_count(summary['tokens_per_second'])} tokens/s")
    if summary["mfu"] is not None:
        table.add_row("MFU", f"{summary['mfu']:.1%}")
    table.add_row("peak memory", format_bytes(summary["peak_memory_bytes"]))
    if summary["skipped_steps"]:
        table.add_row("steps skipped", f"{summary['skipped_steps']:,}")
    table.add_row("loss, mean of the last 100 steps", f"{summary['last_100_loss']:.4f} nats/{summary['unit']}")
    for fact in facts:
        table.add_row(*fact)
    for what in shown:
        console.print(what)
    console.print(table)
