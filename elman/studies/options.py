"""The options of ``elman study``, ``elman report`` and ``elman compare``: parsed here, done in ``commands.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from elman.options import OptionalFloat, OptionalInt, OptionalPath, OptionalStr

ScaleName = Literal["full", "tiny"]


@dataclass(frozen=True)
class RunStudy:
    """Run a study: choose learning rates, and what else it sweeps, then train each model with each seed.

    What is done is skipped, and what was cut goes on.
    """

    study: tyro.conf.Positional[str]
    """Name of a study, or its file."""
    scale: ScaleName = "full"
    """full, or tiny: to try it on two CPU cores in minutes."""
    equal: Literal["time", "tokens", "flops"] | None = None
    """What all runs have the same of; the study's own choice if absent, or what the next three say."""
    time_limit: OptionalStr = None
    """Training time of every run, such as 10m; compiling, evaluation and saving do not count."""
    tokens: OptionalStr = None
    """Tokens of every run, such as 250m."""
    flops: OptionalFloat = None
    """Training FLOPs of every run, such as 1e17: three times those of the forward pass."""
    seeds: tuple[int, ...] = ()
    """In place of the study's own."""
    learning_rates: tuple[float, ...] = ()
    """In place of those that the study's sweep tries; one alone is taken without a sweep."""
    sweep: tuple[str, ...] = ()
    """Options of elman train that the sweep chooses beside the learning rate, in place of the study's own, such as
    warmup=0.05,0.2 weight_init=normal,fan_in: every value is tried with every rate."""
    sweep_part: OptionalFloat = None
    """Part of the budget that a run of the sweep has, the study's own if absent, which is all of it at full scale:
    shorter runs do best at higher rates than whole ones."""
    sweep_beyond: OptionalInt = None
    """How many rates the sweep may try beyond the lowest or highest, one after another, while a model's best lies
    there; the study's own if absent, which is none."""
    only: tuple[str, ...] = ()
    """Names of the runs to train now, or of their series or tasks; all if absent."""
    data: OptionalPath = None
    """Raw text file, documents ended by 0x1e; Python's standard library if absent."""
    folder: OptionalPath = None
    """Folder of the study; runs/NAME, or runs/NAME-tiny, if absent."""
    device: str = "auto"
    """cpu or cuda; auto takes GPUs where there are some."""
    jobs: OptionalInt = None
    """Runs at a time: one a GPU if absent, and one where there is none, for runs that share cores slow each other.
    Those of a study of tasks, whose speed is not asked for, may share a GPU."""
    launcher: Literal["local", "slurm"] = "local"
    """This machine, or a Slurm cluster by submitit (pip install submitit)."""
    slurm: tuple[str, ...] = ()
    """Parameters of submitit, such as slurm_partition=gpu slurm_account=me."""
    keep: Literal["all", "finals", "none"] = "finals"
    """Whose checkpoints stay once a run is finished: finals leaves out the sweep's, which take as much room."""
    dry_run: bool = False
    """Show the plan with its sizes, times and memory, and run nothing."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import run_study

        return run_study(self, console)


@dataclass(frozen=True)
class ReportStudy:
    """Make a study's report from its run folders: one HTML page, and Markdown with pictures beside it."""

    study: tyro.conf.Positional[str]
    """Name of a study, or its file."""
    scale: ScaleName = "full"
    """Scale that it was run at."""
    folder: OptionalPath = None
    """Folder of the study; runs/NAME, or runs/NAME-tiny, if absent."""
    out: OptionalPath = None
    """Folder to write to; report in the study's folder if absent."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import report_study

        return report_study(self, console)


@dataclass(frozen=True)
class PackStudy:
    """Copy a study's runs, small enough to commit or send, and report these: no checkpoints, few lines of metrics."""

    study: tyro.conf.Positional[str]
    """Name of a study, or its file."""
    out: Path
    """Folder to make."""
    scale: ScaleName = "full"
    """Scale that it was run at."""
    folder: OptionalPath = None
    """Folder of the study; runs/NAME, or runs/NAME-tiny, if absent."""
    lines: int = 200
    """About as many lines of metrics each run keeps: a line for several steps has the means of their losses."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import pack_study

        return pack_study(self, console)


@dataclass(frozen=True)
class ListStudies:
    """The studies that ship with elman, and what each asks."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import list_studies

        return list_studies(console)


@dataclass(frozen=True)
class ShowStudy:
    """What a study asks, what it holds equal, and its runs."""

    study: tyro.conf.Positional[str]
    """Name of a study, or its file."""
    scale: ScaleName = "full"
    """full or tiny."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import show_study

        return show_study(self.study, self.scale, console)


@dataclass(frozen=True)
class Studies:
    """Declared comparisons: list them, show one, run it, report it, pack its results."""

    command: Annotated[
        Annotated[ListStudies, tyro.conf.subcommand("list")]
        | Annotated[ShowStudy, tyro.conf.subcommand("show")]
        | Annotated[RunStudy, tyro.conf.subcommand("run")]
        | Annotated[ReportStudy, tyro.conf.subcommand("report")]
        | Annotated[PackStudy, tyro.conf.subcommand("pack")],
        tyro.conf.arg(name=""),
    ]

    def run_command(self, console: Console) -> int:
        return self.command.run_command(console)


@dataclass(frozen=True)
class ReportRuns:
    """Report any runs, by their folders: one HTML page, and Markdown with pictures beside it."""

    runs: tyro.conf.Positional[list[Path]]
    """Run folders, or folders that hold some."""
    out: Path = Path("report")
    """Folder to write to."""

    def run_command(self, console: Console) -> int:
        from elman.studies.commands import write_report

        return write_report(self.runs, self.out, console)


@dataclass(frozen=True)
class CompareRuns:
    """Two runs side by side: what came out, and in what they differ."""

    a: tyro.conf.Positional[Path]
    """Run folder."""
    b: tyro.conf.Positional[Path]
    """Another."""

    def run_command(self, console: Console) -> int:
        from elman.studies.compare import compare_runs

        return compare_runs(self.a, self.b, console)
