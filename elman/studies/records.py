"""A run as a report sees it: read from its folder alone, checked against itself, nothing believed that does not add up.

A folder that is cut short, edited by hand or lacks a number is not passed over in silence: ``problems`` says why it
cannot be compared, ``remarks`` what a reader should know of one that can.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

from elman.errors import UsageError
from elman.evaluation.accuracy import Accuracy
from elman.model import ModelConfig
from elman.sizing import TOLERANCE, flops_per_token, num_params
from elman.studies.plan import settings, what_was_changed
from elman.studies.study import BudgetKind
from elman.training.config import RunConfig, TaskConfig, TrainConfig
from elman.training.run import RunFolder
from elman.units import bits, format_count, format_duration

#: What ran a mixer where it is plain PyTorch, and on a GPU no measure of that mixer's speed.
_SLOW = ("reference", "torch")
#: Numbers of a summary that a comparison cannot do without, and such as may be None where nobody knows them.
_NEEDED = ("params", "steps", "tokens", "train_seconds", "tokens_per_second", "last_100_loss", "batch_size", "seq_len",
           "flops_per_token", "peak_memory_bytes")  # fmt: skip
#: Of them, such as may be 0 or less.
_ANY_SIGN = ("last_100_loss", "peak_memory_bytes")
#: By how much what a file tells may differ from what it is worked out from: the last digits of a float.
_CLOSE = 1e-6
#: What of a study.json is a list, and the budgets that there are.
_LISTS = ("held_equal", "varies", "notes", "seeds", "learning_rates", "planned", "planned_series")
_KINDS = get_args(BudgetKind)


@dataclass
class Record:
    """One run.

    Attributes:
        path: its folder.
        label: what a table calls it: the study's name for it, or its model and size.
        problems: why it cannot be compared with others; empty for a whole run.
        remarks: what to know of it.
        config, model: as in config.json, where that can be read.
        facts: of study.json; empty for a run that is of no study.
        summary: of summary.json.
        sessions: of env.json, one each time the run was started.
        rows: of metrics.jsonl.
        apart: what its label tells beside, where runs of one label differ.
    """

    path: Path
    label: str
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    config: RunConfig | None = None
    model: ModelConfig | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    apart: str = ""

    @property
    def every_step(self) -> list[dict[str, Any]]:
        """The rows; one that stands for several steps (see elman/studies/pack.py) as many, spread over its time."""
        found: list[dict[str, Any]] = []
        before = 0.0
        for row in self.rows:
            steps = _steps_of(row)
            for i in range(1, steps):
                seconds = before + (row["seconds"] - before) * i / steps
                found.append({**row, "step": row["step"] - steps + i, "seconds": seconds})
            found.append(row)
            before = row["seconds"]
        return found

    @property
    def run(self) -> str:
        """The study's name for it."""
        return str(self.facts.get("run", self.label))

    @property
    def series(self) -> str:
        """What it is joined with where loss is drawn against a scale."""
        return str(self.facts.get("series") or self.label)

    @property
    def task(self) -> str | None:
        """The task that it learned; None where that was a text."""
        return self.config.task if isinstance(self.config, TaskConfig) else None

    @property
    def accuracies(self) -> list[Accuracy]:
        """In its task, that at the training length first; none where there are none."""
        found = self.summary.get("accuracies")
        return [Accuracy(**values) for values in found] if isinstance(found, list) else []

    @property
    def judged_by(self) -> tuple[object, ...]:
        """What its loss, or its accuracy, was measured on: alike only where that is."""
        told = [self.facts.get("fingerprint"), *(session.get("data") for session in self.sessions)]
        known = next((fingerprint for fingerprint in told if fingerprint), None)
        match self.config:
            case TrainConfig() as text:
                return known or str(text.data), text.heldout, text.eval_bytes
            case TaskConfig() as task:
                return task.task, known, task.lengths, task.eval_examples
        return (known,)

    @property
    def diverged(self) -> bool:
        """Whether it ended because its loss was no number any more: so many steps in a row were skipped."""
        if self.summary or self.config is None:
            return False
        last = [row for row in self.rows if "lr" in row][-self.config.max_skipped :]
        return len(last) == self.config.max_skipped and all("skipped" in row for row in last)

    @property
    def is_sweep(self) -> bool:
        """Whether it only tried a setting."""
        return self.facts.get("role") == "sweep"

    @property
    def seed(self) -> int:
        """Of its weights and data."""
        return -1 if self.config is None else self.config.seed

    @property
    def lr(self) -> float:
        """Its peak learning rate."""
        return math.nan if self.config is None else self.config.lr

    @property
    def swept(self) -> dict[str, Any]:
        """The options that the sweep chose beside the learning rate, or tried, with this run's values."""
        return {name: getattr(self.config, name, None) for name in self.facts.get("sweep", {})}

    @property
    def nats(self) -> float:
        """Held-out loss, nats a byte; NaN where there is none."""
        value = self.summary.get("heldout", {}).get("nats_per_byte")
        return float(value) if value is not None else math.nan

    @property
    def last_100(self) -> float:
        """Mean of the last 100 training losses, nats a token; NaN where there is none."""
        return float(self.summary.get("last_100_loss", math.nan))

    def loss_at(self, tokens: float) -> float | None:
        """Mean training loss of the last 100 steps before it had so many tokens, nats a token; None where unknown."""
        steps = int(tokens / (self.summary["batch_size"] * self.summary["seq_len"]))
        losses = [row["loss"] for row in self.every_step if "lr" in row and "loss" in row]
        return statistics.fmean(losses[:steps][-100:]) if 0 < steps <= len(losses) else None

    @property
    def train_flops(self) -> float:
        """Of all its tokens, three times forward."""
        return 3.0 * float(self.summary["flops_per_token"]) * float(self.summary["tokens"])

    @property
    def device(self) -> str:
        """The GPU's name, or the device's."""
        names = {str(session.get("gpu") or session.get("device")) for session in self.sessions}
        return ", ".join(sorted(names))

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` ran, every time it was started."""
        return all(session.get("compiled") for session in self.sessions)

    @property
    def start_up_seconds(self) -> float:
        """Compiling and warming up, every time it was started: no part of its training time."""
        return sum(float(session.get("start_up_seconds") or 0.0) for session in self.sessions)

    @property
    def budget(self) -> tuple[str, float]:
        """Where it was to end: the study's budget, or its own time or tokens."""
        if budget := self.facts.get("budget"):
            return str(budget["kind"]), float(budget["amount"])
        assert self.config is not None
        if self.config.time_limit_s is not None and self.config.steps is None:
            return "time", self.config.time_limit_s
        return "tokens", float((self.config.steps or 0) * self.config.batch_size * self.config.seq_len)


def best_of_sweep(tried: Iterable[Record]) -> Record | None:
    """By the last 100 losses; None of none. One with a step that was skipped is better than nothing."""
    good = [record for record in tried if not record.problems and math.isfinite(record.last_100)]
    clean = [record for record in good if not record.summary.get("skipped_steps")] or good
    return min(clean, key=lambda record: record.last_100, default=None)


def read_run(path: Path) -> Record:
    """Read a folder, and check what it tells of itself. Never raises for what is wrong with it."""
    record = Record(path, path.name)
    try:
        _read(record)
    except UsageError as error:
        record.problems.append(str(error))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        record.problems.append(f"its files are not as elman wrote them ({type(error).__name__}: {error})")
    return record


def _read(record: Record) -> None:
    run = RunFolder(record.path)
    if not record.path.is_dir():
        record.problems.append("there is no such folder")
        return
    facts = run.read_json("study.json")
    if facts is not None and not isinstance(facts, dict):
        record.problems.append("its study.json is not as elman wrote it")
    record.facts = facts if isinstance(facts, dict) else {}
    if odd := _odd_facts(record.facts):
        record.problems.append(f"its study.json is not as elman wrote it: {odd}")
        record.facts = {}
    if "run" in record.facts:
        record.label = str(record.facts["run"])
    if not (record.path / "config.json").is_file():
        record.problems.append("it has no config.json, so it is no run folder")
        return
    record.config, record.model = run.read_config()
    if "run" not in record.facts:
        record.label = f"{record.model.pattern} {record.model.dim} × {record.model.depth}"
    if record.facts:
        changed = what_was_changed(record.path, record.facts)
        if changed is not None:
            record.problems.append(changed)
    sessions = run.read_json("env.json")
    record.sessions = [s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else []
    if not record.sessions:
        record.problems.append("it has no env.json, so nobody knows what it ran on")
    if odd := next(filter(None, map(_odd_session, record.sessions)), ""):
        record.problems.append(f"its env.json is not as elman wrote it: {odd}")
        record.sessions = [session for session in record.sessions if not _odd_session(session)]
    record.rows = run.read_metrics()
    _check_lines(record, run)
    summary = run.read_json("summary.json")
    if not isinstance(summary, dict):
        last = max((row["step"] for row in record.rows), default=0)
        seconds = max((row["seconds"] for row in record.rows), default=0.0)
        how = "go on with it by `elman study run` or elman train --resume"
        if record.diverged:
            how = "its last steps were skipped, not being finite: it diverged"
        record.problems.append(f"it did not reach its end: {last:,} steps, {format_duration(seconds)}; {how}")
        return
    record.summary = summary
    _check_summary(record)
    _remark(record)


def _odd_facts(facts: dict[str, Any]) -> str:
    """In words, what of a study.json a report could not read; empty for nothing."""
    for name, value in facts.items():
        if name in _LISTS:
            fits = isinstance(value, list) and all(map(_is_plain, value))
        elif name in ("refused", "settings", "sweep"):
            fits = isinstance(value, dict)
        elif name == "budget":
            fits = isinstance(value, dict) and value.get("kind") in _KINDS and _is_number(value.get("amount"))
            fits = fits and value["amount"] > 0
        elif name in ("sweep_part", "target_params", "memory"):
            fits = _is_number(value) or (value is None and name != "sweep_part")
        else:
            fits = _is_plain(value)
        if not fits:
            return f"{name} is {_short(value)}"
    return "sweep_part is missing" if facts.get("role") == "sweep" and "sweep_part" not in facts else ""


def _odd_session(session: dict[str, Any]) -> str:
    """The same of an entry of env.json."""
    for name, value in session.items():
        if name == "backends":
            fits = isinstance(value, list) and all(isinstance(kernel, str) for kernel in value)
        elif name == "packages":
            fits = isinstance(value, dict)
        elif name in ("gpu_memory", "start_up_seconds"):
            fits = value is None or _is_number(value)
        else:
            fits = name == "command" or _is_plain(value)
        if not fits:
            return f"{name} is {_short(value)}"
    return ""


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _short(value: Any) -> str:
    return shorten(repr(value), 40, placeholder=" ...")


def _check_lines(record: Record, run: RunFolder) -> None:
    """What read_metrics left out, and steps that are not there."""
    if not run.metrics_file.exists():
        record.problems.append("it has no metrics.jsonl")
        return
    record.remarks += lost_lines(run, record.rows)


def lost_lines(run: RunFolder, rows: Sequence[dict[str, Any]]) -> list[str]:
    """In words, what of metrics.jsonl is not among the rows that were read of it, and what steps these lack."""
    found = []
    text = run.metrics_file.read_text(encoding="utf-8", errors="replace") if run.metrics_file.exists() else ""
    lost = sum(bool(line.strip()) for line in text.splitlines()) - len(rows)
    if lost:
        found.append(f"{lost} line(s) of its metrics.jsonl cannot be read and are left out")
    told = [row["step"] for row in rows if "lr" in row]
    steps = {row["step"]: _steps_of(row) for row in rows if "lr" in row}
    if len(told) > len(steps):
        found.append(f"{len(told) - len(steps)} step(s) are in its metrics.jsonl more than once")
    missing = max(steps, default=0) - sum(steps.values())
    if missing > 0:
        found.append(f"{missing} step(s) are missing from its metrics.jsonl")
    return found


def _steps_of(row: dict[str, Any]) -> int:
    steps = row.get("steps", 1)
    return steps if isinstance(steps, int) and 1 <= steps <= row["step"] else 1


def _check_summary(record: Record) -> None:
    """The summary has what is needed, and agrees with the other files."""
    summary, model, config = record.summary, record.model, record.config
    assert model is not None
    assert config is not None
    for name in _NEEDED:
        if not _is_number(summary.get(name)):
            record.problems.append(f"its summary.json has no number for {name}")
        elif name not in _ANY_SIGN and summary[name] <= 0:
            record.problems.append(f"its summary.json says {name} {summary[name]:.7g}, which cannot be")
    judged = _check_accuracies(record) if record.task is not None else _check_heldout(record)
    if record.problems:
        return
    losses = [row["loss"] for row in record.every_step if "loss" in row]
    tokens = summary["steps"] * config.batch_size * config.seq_len
    checks: list[tuple[str, float, float | None]] = [
        ("params", summary["params"], num_params(model)),
        ("flops_per_token", summary["flops_per_token"], flops_per_token(model, config.seq_len)),
        ("batch_size", summary["batch_size"], config.batch_size),
        ("tokens", summary["tokens"], tokens),
        ("seq_len", summary["seq_len"], config.seq_len),
        ("steps", summary["steps"], max((row["step"] for row in record.rows), default=None)),
        ("train_seconds", summary["train_seconds"], max((row["seconds"] for row in record.rows), default=None)),
        ("tokens_per_second", summary["tokens_per_second"], tokens / summary["train_seconds"]),
        ("last_100_loss", summary["last_100_loss"], statistics.fmean(losses[-100:]) if losses else None),
        *judged,
    ]
    if record.remarks:
        # Lines of the metrics are lost: what is worked out from them is not what it was, but for whole ends.
        lost = [] if _has_tail(record) else ["last_100_loss"]
        if not any(row["step"] == summary["steps"] and "lr" not in row for row in record.rows):
            lost += ["steps", "train_seconds", *(name for name, *_ in judged)]
        checks = [check for check in checks if check[0] not in lost]
    for name, told, found in checks:
        if found is None:
            record.problems.append(f"its metrics.jsonl has nothing to check its summary's {name} by")
        elif not math.isclose(told, found, rel_tol=_CLOSE):
            record.problems.append(
                f"its summary.json says {name} {told:.7g}, its other files {found:.7g}: one was edited"
            )
    target = record.facts.get("target_params")
    if target is not None and abs(summary["params"] - target) > TOLERANCE * target:
        record.problems.append(
            f"it has {format_count(summary['params'])} parameters, more than {TOLERANCE:.0%} off {format_count(target)}"
        )


def _has_tail(record: Record) -> bool:
    """Whether the steps that ``last_100_loss`` is the mean of are all there, none of them skipped."""
    ends: dict[int, int] = {row["step"]: _steps_of(row) for row in record.rows if "loss" in row and "lr" in row}
    last: int = record.summary["steps"]
    return sum(steps for end, steps in ends.items() if end > last - 100) == min(100, last)


def _check_heldout(record: Record) -> list[tuple[str, float, float | None]]:
    """The held-out loss, as the summary and as the metrics have it."""
    heldout = record.summary.get("heldout")
    if not isinstance(heldout, dict) or not _is_number(heldout.get("nats_per_byte")):
        record.problems.append("its summary.json has no held-out loss")
        return []
    return [("heldout", bits(heldout["nats_per_byte"]), _last(record, "heldout_bits_per_byte"))]


def _check_accuracies(record: Record) -> list[tuple[str, float, float | None]]:
    """The accuracies, likewise."""
    assert isinstance(record.config, TaskConfig)
    found = record.accuracies
    if tuple(accuracy.length for accuracy in found) != record.config.lengths:
        record.problems.append("its summary.json has not the accuracies of its lengths")
        return []
    return [
        (name, accuracy.accuracy, _last(record, name))
        for accuracy in found
        for name in (f"accuracy_{accuracy.length}",)
    ]


def _last(record: Record, name: str) -> float | None:
    """The last number of this name in the metrics."""
    return next((row[name] for row in reversed(record.rows) if _is_number(row.get(name))), None)


def _remark(record: Record) -> None:
    summary = record.summary
    if summary.get("skipped_steps"):
        record.remarks.append(f"{summary['skipped_steps']} of its steps were skipped, not being finite")
    if len(record.sessions) > 1:
        record.remarks.append(f"it was started {len(record.sessions)} times")
    if len({session.get("gpu") or session.get("device") for session in record.sessions}) > 1:
        _note_time(record, f"it ran on several kinds of device ({record.device}): its time is no measure")
    for session in record.sessions:
        slow = sorted(set(session.get("backends") or ()) & set(_SLOW))
        if session.get("gpu") and slow:
            _note_time(record, f"it ran on a slow path of that GPU ({', '.join(slow)}): its time is no measure")
            break


def _note_time(record: Record, what: str) -> None:
    """Whose time is no measure cannot be compared; but for tasks, which are judged by accuracy alone."""
    (record.problems if record.task is None else record.remarks).append(what)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders that paths stand for: they themselves, or where they are folders of runs, those in it.

    Raises:
        UsageError: a path is not there, or holds no runs.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"RUN {path}: no such folder; give run folders, or a study's folder")
        if any((path / name).exists() for name in ("config.json", "metrics.jsonl", "summary.json", "study.json")):
            found.append(path)
            continue
        inside = [path, path / "runs", path / "sweep"]
        runs = [
            run
            for folder in inside
            if folder.is_dir()
            for run in sorted(folder.iterdir())
            if run.is_dir() and run not in inside and _looks_like_run(run)
        ]
        if not runs:
            raise UsageError(f"RUN {path} holds no runs: give run folders, or the folder of a study that has been run")
        found += runs
    return list(dict.fromkeys(found))


def _looks_like_run(path: Path) -> bool:
    """Whether anything in a folder is a run's, however damaged."""
    names = ("config.json", "metrics.jsonl", "summary.json", "study.json", "env.json", "checkpoints")
    return any((path / name).exists() for name in names)


def name_apart(records: Sequence[Record]) -> None:
    """Give runs of one label, budget and task that differ in more than the seed labels that tell in what.

    Such are runs of no study; and those of a study that was run again after it was changed.
    """
    alike: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.config is not None and record.model is not None:
            alike.setdefault((record.label, record.budget, record.task), []).append(record)
    for same in alike.values():
        found = [options(record) for record in same]
        names = list(dict.fromkeys(name for values in found for name in values))
        telling = [name for name in names if len({str(values.get(name)) for values in found}) > 1]
        for record, values in zip(same, found, strict=True):
            record.apart = "".join(f", {name.rpartition('.')[2]} {values.get(name)}" for name in telling)
            record.label += record.apart


def options(record: Record) -> dict[str, Any]:
    """What a run computes, its seed left out: options of training, the model's size, and its mixers' (``0.gate``)."""
    assert record.config is not None
    assert record.model is not None
    found = settings(record.config, record.model)
    values = {name: value for name, value in found["train"].items() if name != "seed"}
    values |= {"width": record.model.dim, "depth": record.model.depth}
    for i, mixer in enumerate(found["model"]["mixers"]):
        # Of the hash of a text as much as tells two apart.
        values |= {f"{i}.{name}": value[:7] if name == "code" else value for name, value in mixer.items()}
    return values
