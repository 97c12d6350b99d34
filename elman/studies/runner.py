"""Runs a plan: finds batches where memory is held equal, chooses settings by a sweep, then trains what is compared.

What it knows it reads from the run folders each time, so it can be stopped and called again at any point.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from elman.sizing import flops_per_token, num_params
from elman.studies.job import TrainJob
from elman.studies.launch import Launcher
from elman.studies.memory import ProbeJob, most_memory
from elman.studies.plan import Plan, Row, job_state
from elman.studies.records import Record, best_of_sweep, read_run
from elman.studies.study import Setting, slug
from elman.training.display import say
from elman.training.run import RunFolder
from elman.units import format_bytes, format_count, format_duration

#: FLOP/s that training is taken to reach where nothing has been measured yet: of a GPU, and of a CPU. Rough.
_ASSUMED_FLOPS = {"cuda": 1e14, "cpu": 2e10}
#: Seconds of a run that are not training: starting, compiling, evaluation, saving. Rough.
_ASSUMED_START = {"cuda": 60.0, "cpu": 10.0}

#: Of a small model that learns a task: seconds a position and layer of a step, and of a run beside its training. Rough.
_ASSUMED_TASK_STEP = {"cuda": 25e-6, "cpu": 150e-6}
_ASSUMED_TASK_START = {"cuda": 3.0, "cpu": 3.0}

Keep = Literal["all", "finals", "none"]
J = TypeVar("J", TrainJob, ProbeJob)


@dataclass
class Tally:
    """What became of a study's jobs."""

    finished: int = 0
    done_before: int = 0
    complaints: list[str] = field(default_factory=list)


def run_plan(plan: Plan, launcher: Launcher, console: Console, keep: Keep = "finals") -> int:
    """Run what is not done yet. Returns 0, or 1 where a run was refused, failed or could not be touched.

    ``keep``: whose checkpoints stay once a run is finished.
    """
    tally = Tally()
    tally.complaints += [f"{row.run.name} is refused: {row.refused}" for row in plan.rows if row.refused is not None]
    if plan.study.memory is not None:
        plan = find_batches(plan, launcher, console, tally)
    given_up = _sweep(plan, launcher, console, tally, keep == "all")
    chosen = chosen_settings(plan, given_up)
    for row in plan.accepted:
        if row.run.name not in chosen:
            tally.complaints.append(
                f"{row.run.name} has no learning rate: its sweep has not ended; run the study again to go on"
            )
    for line in _overlooked(plan, chosen):
        say(console, line)
    _train(plan.final_jobs(chosen), launcher, console, tally, "runs", keep != "none")
    say(console, f"{tally.finished} finished, {tally.done_before} were done before")
    for complaint in tally.complaints:
        say(console, complaint)
    return 1 if tally.complaints else 0


def find_batches(plan: Plan, launcher: Launcher, console: Console, tally: Tally) -> Plan:
    """The plan with each run's largest batch that fits the study's memory; those without one are refused."""
    probes = {row.run.name: probe(plan, row) for row in plan.accepted}
    wanted = [job for job in probes.values() if job.found() is None]
    _launch(wanted, launcher, console, tally, "batches")
    return with_batches(plan, [name for name, job in probes.items() if job.found() is None])


def with_batches(plan: Plan, without: Sequence[str] = ()) -> Plan:
    """The plan with the batches that have been found; ``without`` are the runs of which none fits."""
    found = {row.run.name: probe(plan, row).found() for row in plan.accepted}
    batches = {name: batch for name, batch in found.items() if batch is not None}
    return replace(plan, batches=batches, refusals=dict.fromkeys(without, "no batch fits the study's memory"))


def probe(plan: Plan, row: Row) -> ProbeJob:
    """The job that finds a run's batch."""
    assert row.model is not None
    assert plan.study.memory is not None
    job = plan.job(row, "final", plan.study.settings[0], plan.study.seeds[0])
    name = f"batch-{job.name}-{plan.study.memory / 2**20:.0f}mib"
    config = replace(job.config, out=None)
    return ProbeJob(
        f"{row.run.name}, batch", name, config, row.model, plan.study.memory, plan.folder / "batches" / f"{name}.json"
    )


def chosen_settings(plan: Plan, given_up: Collection[Path] = ()) -> dict[str, Setting]:
    """Each run's setting, where it is chosen: that of the sweep's lowest last 100 losses without a bad step.

    The held-out text has no part in the choice. ``given_up``: see ``sweep_jobs``.
    """
    only = plan.study.settings[0]
    if len(plan.study.settings) == 1:
        return {row.run.name: only for row in plan.accepted}
    best = {row.run.name: _best(plan, sweep_jobs(plan, row, given_up)) for row in plan.accepted}
    return {name: setting for name, setting in best.items() if setting is not None}


def sweep_jobs(plan: Plan, row: Row, given_up: Collection[Path] = ()) -> list[TrainJob]:
    """All of a run's sweep as far as it is known: what is declared, and what the best so far asks for beyond that.

    ``given_up``: folders of jobs beyond it that failed; the choice is among the others.
    """
    jobs = plan.declared_sweep(row)
    for _ in range(plan.study.sweep_beyond):
        best = _best(plan, jobs)
        beyond = None if best is None else plan.study.setting_beyond(best, [job.config.lr for job in jobs])
        if beyond is None or (job := plan.sweep_job(row, beyond)).folder in given_up:
            break
        jobs.append(job)
    return jobs


def _sweep(plan: Plan, launcher: Launcher, console: Console, tally: Tally, keep: bool) -> set[Path]:
    """The declared sweep, and then, of all models together, one rate beyond it after another.

    Returns the folders of jobs beyond it that failed.
    """
    declared = {job.folder for row in plan.accepted for job in plan.declared_sweep(row)}
    seen: set[Path] = set()
    given_up: set[Path] = set()
    for _ in range(1 + plan.study.sweep_beyond):
        jobs = [job for row in plan.accepted for job in sweep_jobs(plan, row, given_up) if job.folder not in seen]
        if not jobs:
            break
        seen.update(job.folder for job in jobs)
        _train([job for job in jobs if job.folder in declared], launcher, console, tally, "sweep", keep)
        beyond = [job for job in jobs if job.folder not in declared]
        failed = _train(beyond, launcher, console, tally, "sweep, beyond its rates", keep)
        given_up.update(job.folder for job in failed)
    return given_up


def _best(plan: Plan, jobs: Sequence[TrainJob]) -> Setting | None:
    """The best one's setting; None while one may still be better, or if none is any good."""
    tried = [read_run(job.folder) for job in jobs]
    if any(_may_go_on(record) for record in tried) or (best := best_of_sweep(tried)) is None:
        return None
    assert best.config is not None
    return plan.study.setting_of(best.config)


def _overlooked(plan: Plan, chosen: Mapping[str, Setting]) -> list[str]:
    """Of models that did better in an earlier sweep here, at a rate that is not offered now, what to do about it."""
    own = {"lr", *plan.study.sweep}

    def alike(facts: Mapping[str, Any]) -> tuple[Any, ...]:
        begun = facts.get("settings") or {"train": {}, "model": None}  # as an elman before it wrote them had none
        train = {name: value for name, value in begun["train"].items() if name not in own}
        return train, begun["model"], facts.get("fingerprint")

    lines = []
    for row in plan.accepted:
        jobs = sweep_jobs(plan, row)
        taken = next((job for job in jobs if plan.study.setting_of(job.config) == chosen.get(row.run.name)), None)
        if taken is None:
            continue
        offered = {job.folder for job in jobs}
        earlier = [
            record
            for path in sorted(taken.folder.parent.glob(f"{slug(row.run.name)}-*"))
            if path not in offered
            and not (record := read_run(path)).problems
            and alike(record.facts) == alike(taken.facts)
        ]
        best = best_of_sweep([read_run(taken.folder), *earlier])
        if best is not None and best.path != taken.folder and best.config is not None:
            lines.append(
                f"{row.run.name}: an earlier sweep here had {plan.study.setting_of(best.config)}, which is better than "
                f"what is chosen and not offered now: --learning-rates and --sweep-beyond decide what is"
            )
    return lines


def _may_go_on(record: Record) -> bool:
    """Whether a run of a sweep was not begun, or merely cut, so that its setting cannot be judged yet.

    One that failed, its loss being no number, has been judged: its last step was skipped.
    """
    return not record.summary and not record.diverged


def _train(
    jobs: Sequence[TrainJob], launcher: Launcher, console: Console, tally: Tally, what: str, keep: bool
) -> list[TrainJob]:
    """Those of the jobs that are new or were cut. Returns those that failed."""
    wanted = []
    for job in jobs:
        state, why = job_state(job)
        # A run of the sweep whose loss is no number any more has been judged, and would fail again.
        if state == "done" or (
            state == "cut" and job.facts["role"] == "sweep" and not _may_go_on(read_run(job.folder))
        ):
            tally.done_before += 1
            if not keep:
                _forget_checkpoints(job)
        elif state in ("new", "cut"):
            if state == "cut":
                say(console, f"{job.label}: going on with {job.folder}")
            wanted.append(job)
        else:
            tally.complaints.append(f"{job.label} is left alone: {why}")
    before = len(tally.complaints)
    failed = _launch(wanted, launcher, console, tally, what, _nothing if keep else _forget_checkpoints)
    tally.finished += len(wanted) - (len(tally.complaints) - before)
    return failed


def _nothing(job: object) -> None:
    pass


def _forget_checkpoints(job: TrainJob) -> None:
    shutil.rmtree(RunFolder(job.folder).checkpoints, ignore_errors=True)


def _launch(
    jobs: Sequence[J],
    launcher: Launcher,
    console: Console,
    tally: Tally,
    what: str,
    finished: Callable[[J], None] = _nothing,
) -> list[J]:
    """Run jobs, a line for each that ends, ``finished`` for each that ends well, a complaint for each that does not.

    Returns those that failed; one that was stopped and saved is none of them.
    """
    failed: list[J] = []
    if not jobs:
        return failed
    say(console, f"{what}: {len(jobs)} to do, {launcher.jobs} at a time")
    started, ended = time.monotonic(), 0

    def done(job: J, code: int, line: str) -> None:
        nonlocal ended
        ended += 1
        left = (time.monotonic() - started) / ended * (len(jobs) - ended)
        head = f"[{ended}/{len(jobs)}, {format_duration(left)} left] {job.label}: "
        if code == 0:
            say(console, head + _outcome(job))
            finished(job)
            return
        how = "was stopped and saved; run the study again to go on" if code == 130 else f"failed: {line}"
        say(console, head + how)
        tally.complaints.append(f"{job.label} {how}")
        if code != 130:
            failed.append(job)

    launcher.run(jobs, done)
    return failed


def _outcome(job: TrainJob | ProbeJob) -> str:
    if isinstance(job, ProbeJob):
        return f"{job.found()} windows"
    record = read_run(job.folder)
    if record.problems:
        return record.problems[0]
    if record.accuracies:
        told = ", ".join(f"{found.accuracy:.1%} at {found.length}" for found in record.accuracies)
        return f"{told} (chance {record.accuracies[0].chance:.1%})"
    speed = format_count(record.summary["tokens_per_second"])
    return f"last 100 {record.last_100:.4f}, held out {record.nats:.4f} nats/byte, {speed} tokens/s"


def show_plan(plan: Plan, launcher_jobs: int, device_type: str, console: Console) -> None:
    """The table of a dry run: every row with its size, its end, and about how long and how much memory."""
    study = plan.study
    if study.is_of_tasks:
        _show_task_plan(plan, launcher_jobs, device_type, console)
        return
    if study.memory is not None:
        plan = with_batches(plan)
    table = Table(title=f"{study.name}: {plan.budget} a run", title_justify="left")
    table.add_column("run", min_width=min(16, max(len(row.run.name) for row in plan.rows)))
    for column in ("model", "batch", "each", "memory", "done"):
        table.add_column(column, justify="right", no_wrap=column in ("model", "done"))
    finals = plan.final_jobs(chosen_settings(plan))
    total = 0.0
    for row in plan.accepted:
        assert row.model is not None
        config = plan.config(row, study.settings[0], study.seeds[0])
        params, target = num_params(row.model), study.target(row.run)
        measured = _measured(plan, row)
        seconds = _seconds(plan, row, device_type, measured)
        sweeps = len(sweep_jobs(plan, row))
        total += seconds * (len(study.seeds) + study.sweep_part * sweeps)
        total += _ASSUMED_START[device_type] * (len(study.seeds) + sweeps)
        if study.memory is not None and row.run.name not in plan.batches:
            batch, memory = "to find", format_bytes(study.memory)
        else:
            batch = str(config.batch_size)
            memory = _memory(row, config.batch_size, config.seq_len, device_type, measured)
        states = [job_state(job)[0] for job in finals if job.facts["run"] == row.run.name]
        off = "" if target is None else f" ({params / target - 1:+.1%})"
        each = format_duration(seconds)
        if config.steps is not None:
            each = f"{config.steps:,} steps, {'~' if measured is None else ''}{each}"
        table.add_row(
            row.run.name,
            f"{row.model.dim} × {row.model.depth}\n{format_count(params)}{off}",
            batch,
            each,
            memory,
            f"{states.count('done')}/{len(study.seeds)}",
        )
    console.print(table)
    _tell_plan(plan, console)
    whole = total / max(1, launcher_jobs)
    say(
        console,
        f"about {format_duration(whole)} in all, {launcher_jobs} at a time, sweep and start-up included; ~ is a guess "
        f"by FLOPs, ≤ what plain PyTorch would keep, where nothing has been measured yet"
        + (
            f"; up to {study.sweep_beyond} runs a model more where its best rate is at an end"
            if study.sweep_beyond
            else ""
        ),
    )
    say(console, f"runs lie in {plan.folder}")


def _tell_plan(plan: Plan, console: Console) -> None:
    for row in plan.rows:
        if row.refused is not None:
            say(console, f"{row.run.name} is refused: {row.refused}")
    say(console, "held equal:")
    for line in plan.study.held_equal(plan.budget):
        say(console, f"  {line}")


def _show_task_plan(plan: Plan, launcher_jobs: int, device_type: str, console: Console) -> None:
    """Of a study of tasks: a line a model, over all of its tasks, and about how long what is left to do takes."""
    study = plan.study
    table = Table(title=f"{study.name}: {plan.budget} a run", title_justify="left")
    for column in ("model", "widths × depth", "parameters", "tasks", "a run", "runs done"):
        table.add_column(column, justify="left" if column == "model" else "right")
    sweeps = [job for row in plan.accepted for job in sweep_jobs(plan, row)]
    finals = plan.final_jobs(chosen_settings(plan))
    places = {row.run.name: row for row in plan.accepted}
    seconds = {name: _task_seconds(plan, row, device_type) for name, row in places.items()}
    left = sum(study.sweep_part * seconds[job.facts["run"]] for job in sweeps if job_state(job)[0] != "done")
    done: dict[str, int] = dict.fromkeys(places, 0)
    for job in finals:
        done[job.facts["run"]] += job_state(job)[0] == "done"
    by_series: dict[str, list[Row]] = {}
    for row in places.values():
        by_series.setdefault(row.run.series or row.run.name, []).append(row)
    for series, rows in by_series.items():
        models = [row.model for row in rows if row.model is not None]
        widths, sizes = ({model.dim for model in models}, [num_params(model) for model in models])
        names = [row.run.name for row in rows]
        each = sum(seconds[name] for name in names) / len(names)
        of = len(names) * len(study.seeds)
        left += sum(seconds[name] * (len(study.seeds) - done[name]) for name in names)
        table.add_row(
            series,
            f"{_range(widths, str)} × {_range({model.depth for model in models}, str)}",
            _range(set(sizes), format_count),
            str(len(names)),
            f"~{format_duration(each)}",
            f"{sum(done[name] for name in names)}/{of}",
        )
    console.print(table)
    _tell_plan(plan, console)
    runs, sweep = (
        len(places) * len(study.seeds) - sum(done.values()),
        sum(job_state(job)[0] != "done" for job in sweeps),
    )
    say(
        console,
        f"{runs} runs and {sweep} of the sweep to do: about {format_duration(left / max(1, launcher_jobs))}, "
        f"{launcher_jobs} at a time if they did not slow each other; where nothing has been measured yet, a guess",
    )
    say(console, f"runs lie in {plan.folder}")


def _range(values: set[int], show: Callable[[int], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _task_seconds(plan: Plan, row: Row, device_type: str) -> float:
    """Of one run of a small model, start and evaluation included, about."""
    measured = _measured(plan, row)
    if measured is not None:
        spent = float(measured.summary["train_seconds"]) + measured.start_up_seconds
        return spent + _ASSUMED_TASK_START[device_type]
    assert row.model is not None
    config = plan.config(row, plan.study.settings[0], plan.study.seeds[0])
    if config.steps is None:
        return plan.budget.amount + _ASSUMED_TASK_START[device_type]
    # Small models are bound by the number of steps in sequence, not by FLOPs.
    each = config.seq_len * row.model.depth * _ASSUMED_TASK_STEP[device_type]
    return config.steps * each + _ASSUMED_TASK_START[device_type]


def _measured(plan: Plan, row: Row) -> Record | None:
    """A finished run of the row, which tells its speed and memory."""
    for place in ("runs", "sweep"):
        folder = plan.folder / place
        # By what its name begins with first, for a study may have hundreds.
        for path in sorted(folder.glob(f"{slug(row.run.name)}-*")):
            facts = _facts(path)
            if facts.get("run") == row.run.name and facts.get("fingerprint") == plan.fingerprint(row.run):
                record = read_run(path)
                if not record.problems and record.model == row.model:
                    return record
    return None


def _facts(path: Path) -> dict[str, object]:
    try:
        facts = RunFolder(path).read_json("study.json")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _seconds(plan: Plan, row: Row, device_type: str, measured: Record | None) -> float:
    """Of training, about."""
    if plan.budget.kind == "time":
        return plan.budget.amount
    assert row.model is not None
    config = plan.config(row, plan.study.settings[0], plan.study.seeds[0])
    assert config.steps is not None
    tokens = config.steps * config.batch_size * config.seq_len
    if measured is not None:
        return float(tokens / measured.summary["tokens_per_second"])
    return 3 * flops_per_token(row.model, config.seq_len) * tokens / _ASSUMED_FLOPS[device_type]


def _memory(row: Row, batch_size: int, seq_len: int, device_type: str, measured: Record | None) -> str:
    assert row.model is not None
    if measured is not None and measured.summary["batch_size"] == batch_size:
        return format_bytes(measured.summary["peak_memory_bytes"])
    return f"≤ {format_bytes(most_memory(row.model, batch_size, seq_len, bf16=device_type == 'cuda'))}"
