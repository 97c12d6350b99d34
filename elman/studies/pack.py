"""A study's folder made small enough to commit or to send, with the same report but for the last digits of its curves.

Checkpoints, logs, what trackers wrote, and of the machine's absolute paths all but the names stay behind. Of
metrics.jsonl steps in a row are put together: such a line has the means of their losses and gradient norms, the rest as
of the last of them, and under ``steps`` how many they are. A mean over steps that begins or ends among these, as one of
the losses at equal tokens may, is near what it was.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elman.errors import UsageError
from elman.mixers import own
from elman.studies.long_text import EVALUATIONS
from elman.studies.records import lost_lines, run_folders
from elman.training.run import OWN_VARIANTS, RunFolder, check_free

#: What is copied as it is.
_FILES = ("study.json", "summary.json", "sample.txt")
#: Of the loss the mean over the last so many steps is told and checked, so that none is put together with one before.
_TAIL = 100
#: What a line that stands for several steps has of each, and of the last.
_MEANS, _LAST = ("loss", "grad_norm"), ("step", "lr", "seconds", "tokens", "tokens_per_second", "mfu")


def pack(folder: Path, out: Path, lines: int) -> list[Path]:
    """Copy a study's runs and those of its sweep to ``out``; returns the new run folders.

    Args:
        folder: the study's, or one run's.
        out: not there yet, or empty.
        lines: about as many each run's metrics.jsonl keeps of its steps; every evaluation is kept. One of which lines
            or steps are missing is copied whole, so that a report goes on saying so.

    Raises:
        UsageError: there are no runs, ``out`` has something in it, or ``lines`` is below 2.
    """
    if lines < 2:
        raise UsageError(f"--lines {lines} is out of range: give a number of at least 2")
    check_free(out)
    made = []
    for source in run_folders([folder]):
        to = out / source.relative_to(folder)
        to.mkdir(parents=True)
        for name in (*_FILES, *(file.name for file in source.glob(OWN_VARIANTS))):
            if (source / name).exists():
                shutil.copyfile(source / name, to / name)
        _copy_without_paths(source / "env.json", to / "env.json", _commands)
        _copy_without_paths(source / "config.json", to / "config.json", _places)
        for evaluation in source.glob(EVALUATIONS):
            (to / evaluation.parent.name).mkdir()
            _copy_without_paths(evaluation, to / evaluation.relative_to(source), _evaluation)
        run, rows = RunFolder(source), RunFolder(source).read_metrics()
        if lost_lines(run, rows):
            shutil.copyfile(run.metrics_file, RunFolder(to).metrics_file)
        elif run.metrics_file.exists():
            RunFolder(to).append_metrics(thin(rows, lines))
        made.append(to)
    return made


def _copy_without_paths(source: Path, to: Path, shorten: Callable[[Any], None]) -> None:
    """A JSON file whose value ``shorten`` changes; one that is damaged as it is."""
    if not source.exists():
        return
    text = source.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text)
        shorten(value)
        text = json.dumps(value, indent=2) + "\n"
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    to.write_text(text, encoding="utf-8")


def _commands(sessions: Any) -> None:
    """Those of env.json."""
    for session in sessions:
        session["command"] = [_name(word) for word in session.get("command", ())]


def _places(config: Any) -> None:
    """The run's own, its data's and its variants', of config.json."""
    train = config["train"]
    if isinstance(train.get("model"), str):
        train["model"] = ",".join(_name(name) if own.is_file(name) else name for name in train["model"].split(","))
    train |= {option: _name(train[option]) for option in ("out", "data") if isinstance(train.get(option), str)}


def _evaluation(found: Any) -> None:
    """The text that was read, and the command, of eval.json."""
    found["data"]["file"] = _name(found["data"]["file"])
    _commands([found["environment"]])


def _name(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def thin(rows: Sequence[dict[str, Any]], lines: int) -> list[dict[str, Any]]:
    """Put steps in a row together, where there are more than ``lines``: in about so many groups."""
    steps = sum("lr" in row for row in rows)
    if steps <= lines:
        return list(rows)
    size = -(-steps // (lines - 1))
    found: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    left = steps
    for row in rows:
        if not _is_plain(row):
            # An evaluation, or a step that was skipped: told as it was.
            found += [*_together(group), row]
            group = []
            left -= "lr" in row
            continue
        group.append(row)
        left -= 1
        if left == _TAIL or len(group) == size:
            found += _together(group)
            group = []
    return found + _together(group)


def _is_plain(row: dict[str, Any]) -> bool:
    return (
        "lr" in row
        and set(row) <= {*_MEANS, *_LAST, "stats"}
        and all(isinstance(row.get(name), float) for name in _MEANS)
    )


def _together(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(group) < 2:
        return list(group)
    means = {name: statistics.fmean(row[name] for row in group) for name in _MEANS}
    return [{**{name: group[-1][name] for name in _LAST if name in group[-1]}, **means, "steps": len(group)}]


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
