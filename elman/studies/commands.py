"""What ``elman study``, ``elman report`` and ``elman compare`` do."""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elman.environment import resolve_device
from elman.errors import UsageError
from elman.options import flag
from elman.sizing import num_params
from elman.studies.find import find_study, study_names
from elman.studies.launch import Launcher, LocalLauncher, SubmititLauncher, gpu_slots
from elman.studies.options import PackStudy, ReportStudy, RunStudy, ScaleName
from elman.studies.pack import pack, size_of
from elman.studies.plan import Plan
from elman.studies.report import make_report
from elman.studies.runner import run_plan, show_plan
from elman.studies.study import Budget, Scale, Study
from elman.training.display import say
from elman.training.start import demo_data
from elman.units import format_duration, parse_count, parse_duration

#: Minutes beside its training that a job of a cluster is given: to start, compile, evaluate and save.
_SPARE_MINUTES = 30.0
#: Minutes of a cluster's job whose budget is no time.
_MINUTES = 24 * 60.0


def run_study(options: RunStudy, console: Console) -> int:
    """Plan it, and run it or show the plan. Returns 0, or 1 where not all of it came to its end."""
    study = _changed(options, find_study(options.study, Scale(options.scale)))
    plan = _plan(options, study, console)
    device = resolve_device(options.device) if options.launcher == "local" else torch.device("cuda")
    if options.dry_run:
        jobs = len(_slots(options, device, study.is_of_tasks)) if options.launcher == "local" else options.jobs or 1
        show_plan(plan, jobs, device.type, console)
        return 0
    code = run_plan(plan, _launcher(options, plan, device), console, options.keep)
    say(console, f"report: {report_command(options)}")
    return code


def _changed(options: RunStudy, study: Study) -> Study:
    """The study with what the command line puts in place of its own."""
    if options.only:
        names = list(dict.fromkeys(name for run in study.runs for name in sorted(run.names)))
        for name in options.only:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=8, cutoff=0.3) or names
                raise UsageError(f"--only {name!r} is no run of {study.name}: choose among {', '.join(near)}")
    given: dict[str, Any] = {}
    if options.seeds:
        given["seeds"] = options.seeds
    if options.learning_rates:
        given["learning_rates"] = options.learning_rates
    if options.sweep:
        given["sweep"] = dict(_swept(word) for word in options.sweep)
    if options.sweep_part is not None:
        if not 0 < options.sweep_part <= 1:
            raise UsageError(f"--sweep-part {options.sweep_part} is out of range: give a number above 0 and up to 1")
        given["sweep_part"] = options.sweep_part
    if options.sweep_beyond is not None:
        given["sweep_beyond"] = options.sweep_beyond
    return replace(study, **given)


def _swept(word: str) -> tuple[str, tuple[Any, ...]]:
    """An option and its values, of ``NAME=VALUE,VALUE``; what is a number is read as one."""
    name, equals, values = word.partition("=")
    if not equals:
        raise UsageError(f"--sweep {word!r} has no values: give NAME=VALUE,VALUE, such as warmup=0.05,0.2")
    return name.replace("-", "_"), tuple(map(_number_or_word, values.split(",")))


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _plan(options: RunStudy, study: Study, console: Console) -> Plan:
    budget = _budget(options, study)
    if study.is_of_tasks and options.data is not None:
        raise UsageError(f"--data {options.data}: study {study.name} is of tasks, whose examples are drawn: drop it")
    data = options.data if options.data is not None or study.is_of_tasks else demo_data(console)
    folder = options.folder or default_folder(study.name, options.scale)
    device = options.device if options.launcher == "local" else None
    data = None if data is None else data.absolute()
    return Plan(study, Scale(options.scale), budget, folder, data, device, only=frozenset(options.only))


def _budget(options: RunStudy, study: Study) -> Budget:
    given: dict[str, Callable[[], float]] = {}
    if options.time_limit is not None:
        text = options.time_limit
        given["time"] = lambda: parse_duration(text, "--time-limit")
    if options.tokens is not None:
        count = options.tokens
        given["tokens"] = lambda: float(parse_count(count, "--tokens"))
    if options.flops is not None:
        flops = options.flops
        given["flops"] = lambda: flops
    kind: Any = options.equal or (next(iter(given)) if given else study.budget)
    if len(given) > 1 or (given and kind not in given):
        flags = {"time": "--time-limit", "tokens": "--tokens", "flops": "--flops"}
        raise UsageError(
            f"{' and '.join(flags[name] for name in given)} beside --equal {kind}: give the one amount that all runs "
            f"shall have the same of, {flags[kind]}"
        )
    return Budget(kind, given[kind]()) if given else study.budget_of(kind)


def _slots(options: RunStudy, device: torch.device, shared: bool) -> list[str | None]:
    """Where jobs run on this machine: a GPU each, unless one device is named, or they may share it."""
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs} is out of range: give a number of at least 1")
    every_gpu = device.type == "cuda" and device.index is None
    return gpu_slots(torch.cuda.device_count() if every_gpu else 0, options.jobs, shared=shared)


def _launcher(options: RunStudy, plan: Plan, device: torch.device) -> Launcher:
    logs = (plan.folder / "logs").absolute()
    if options.launcher == "local":
        if options.slurm:
            raise UsageError("--slurm is of no use to --launcher local: drop it, or give --launcher slurm")
        is_of_tasks = plan.study.is_of_tasks
        # A process's peak memory on a CPU is that of all that it ever did.
        keep = is_of_tasks or device.type == "cuda"
        return LocalLauncher(_slots(options, device, is_of_tasks), logs, keep=keep)
    parameters: dict[str, Any] = {}
    for word in options.slurm:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--slurm {word!r} has no value: give NAME=VALUE, such as slurm_partition=gpu")
        parameters[name] = int(value) if value.isdigit() else value
    minutes = plan.budget.amount / 60 if plan.budget.kind == "time" else _MINUTES
    return SubmititLauncher(logs, minutes + _SPARE_MINUTES, parameters, jobs=options.jobs)


def report_command(options: RunStudy) -> str:
    """What a shell takes to report the study that was run."""
    command = ["elman", "study", "report", options.study]
    if options.folder is not None:
        command += ["--folder", str(options.folder)]
    elif options.scale != "full":
        command += ["--scale", options.scale]
    return shlex.join(command)


def report_study(options: ReportStudy, console: Console) -> int:
    """Report the runs of a study's folder."""
    folder = _folder_of(options)
    return write_report([folder], options.out or folder / "report", console)


def pack_study(options: PackStudy, console: Console) -> int:
    """Copy them, small, and report the copy."""
    folder = _folder_of(options)
    made = pack(folder, options.out, options.lines)
    size = sum(size_of(run) for run in made)
    say(console, f"{len(made)} runs in {options.out}, {size / 2**20:.1f} MiB")
    return write_report([options.out], options.out / "report", console)


def _folder_of(options: ReportStudy | PackStudy) -> Path:
    """Where the study's runs lie.

    Raises:
        UsageError: nowhere.
    """
    if options.folder is not None:
        return options.folder
    folder = default_folder(find_study(options.study, Scale(options.scale)).name, options.scale)
    if not folder.is_dir():
        scale = "" if options.scale == "full" else f" --scale {options.scale}"
        raise UsageError(
            f"STUDY {options.study}: there is no folder {folder}: run it first, by elman study run "
            f"{options.study}{scale}, or name its folder by --folder"
        )
    return folder


def list_studies(console: Console) -> int:
    """Print the catalogue."""
    table = Table()
    for column in ("study", "question", "runs"):
        table.add_column(column, justify="right" if column == "runs" else "left")
    for name in study_names():
        study = find_study(name, Scale())
        table.add_row(name, study.question, str(len(study.runs)))
    console.print(table)
    say(console, "elman study show NAME tells what a study holds equal; elman study run NAME --dry-run plans it.")
    return 0


def show_study(name: str, scale: ScaleName, console: Console) -> int:
    """Print a study's declaration."""
    study = find_study(name, Scale(scale))
    say(console, f"{study.name}: {study.question}")
    say(console, "held equal:")
    for line in study.held_equal(study.budget_of(study.budget)):
        say(console, f"  {line}")
    if study.varies:
        say(console, f"about: {', '.join(study.varies)}, in which runs may differ")
    for note in study.notes:
        say(console, note)
    table = Table()
    for column in ("run", "model", "options", "width × depth", "parameters"):
        table.add_column(column, justify="right" if column in ("width × depth", "parameters") else "left")
    # Of a study of tasks each model once: that of another task has other tokens, and so about the same width.
    for run in [run for run in study.runs if run.task == study.runs[0].task]:
        options = ", ".join(f"{key} {value}" for key, value in {**run.options, **run.train}.items())
        try:
            model = study.model(run)
            table.add_row(run.name, run.model, options, f"{model.dim} × {model.depth}", f"{num_params(model):,}")
        except UsageError as error:
            table.add_row(run.name, run.model, options, "refused", str(error))
    console.print(table)
    if study.is_of_tasks:
        tasks = list(dict.fromkeys(str(run.task) for run in study.runs))
        say(console, f"and so for each of its tasks: {', '.join(tasks)}")
    runs = len(study.runs) * len(study.seeds)
    sweep = len(study.runs) * len(study.settings) if len(study.settings) > 1 else 0
    line = f"{runs} runs, and {sweep} more to choose {' and '.join(('learning rates', *map(flag, study.sweep)))}"
    if study.budget == "time":
        budget = study.budget_of("time").amount
        line += f": {format_duration(budget * (runs + sweep * study.sweep_part))} of training"
    if study.sweep_beyond:
        line += f"; up to {study.sweep_beyond} a model more where its best rate is at an end"
    say(console, line)
    return 0


def default_folder(name: str, scale: str) -> Path:
    """Where a study's runs lie if nobody says."""
    return Path("runs") / (name if scale == "full" else f"{name}-{scale}")


def write_report(paths: list[Path], out: Path, console: Console) -> int:
    """Write the report and print its verdict. Returns 0, or 1 where no run could be compared.

    Raises:
        UsageError: no paths, ``out`` is a file, or as ``make_report``.
    """
    if not paths:
        raise UsageError("RUN is missing: give run folders, or folders that hold some")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give the name of a folder to make")
    report = make_report(paths)
    page = report.write(out)
    for section in report.sections:
        say(console, f"{section.title}:")
        for line in section.verdict:
            say(console, f"  {line}")
    for name, why in report.left_out:
        say(console, f"left out: {name}: {why}")
    say(console, f"report in {page} and {page.with_suffix('.md')}")
    return 0 if report.sections else 1
