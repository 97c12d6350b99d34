"""Two runs side by side in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elman.errors import UsageError
from elman.studies.records import Record, name_apart, options, read_run
from elman.training.config import TrainConfig
from elman.training.display import say
from elman.units import bits, format_bytes, format_count

#: Rows of the table: what it is, of a run, and how it is shown.
_ROWS: tuple[tuple[str, Callable[[Record], Any], Callable[[float], str]], ...] = (
    ("parameters", lambda r: r.summary.get("params"), lambda x: f"{x:,.0f}"),
    ("batch", lambda r: r.summary.get("batch_size"), lambda x: f"{x:.0f}"),
    ("window", lambda r: r.summary.get("seq_len"), lambda x: f"{x:.0f}"),
    ("steps", lambda r: r.summary.get("steps"), lambda x: f"{x:,.0f}"),
    ("tokens", lambda r: r.summary.get("tokens"), format_count),
    ("training FLOPs", lambda r: r.train_flops, lambda x: f"{x:.3g}"),
    ("training time, s", lambda r: r.summary.get("train_seconds"), lambda x: f"{x:,.1f}"),
    ("start-up, s", lambda r: r.start_up_seconds, lambda x: f"{x:.1f}"),
    ("last 100, nats/token", lambda r: r.summary.get("last_100_loss"), lambda x: f"{x:.4f}"),
    ("held out, nats/byte", lambda r: r.nats, lambda x: f"{x:.4f}"),
    ("held out, bits/byte", lambda r: bits(r.nats), lambda x: f"{x:.4f}"),
    ("accuracy, training length", lambda r: _accuracy(r, 0), lambda x: f"{x:.1%}"),
    ("accuracy, longest", lambda r: _accuracy(r, -1), lambda x: f"{x:.1%}"),
    ("tokens/s", lambda r: r.summary.get("tokens_per_second"), format_count),
    ("MFU", lambda r: r.summary.get("mfu"), lambda x: f"{x:.1%}"),
    ("peak memory", lambda r: r.summary.get("peak_memory_bytes"), format_bytes),
    ("state, numbers", lambda r: r.summary.get("state_size"), format_count),
    ("steps skipped", lambda r: r.summary.get("skipped_steps"), lambda x: f"{x:.0f}"),
)
_LOSSES = ("last 100, nats/token", "held out, nats/byte", "held out, bits/byte")


def _accuracy(record: Record, place: int) -> float | None:
    return record.accuracies[place].accuracy if record.accuracies else None


def compare_runs(a: Path, b: Path, console: Console) -> int:
    """Print them. What is wrong with a run is told, and what it lacks is left open.

    Raises:
        UsageError: one is not there.
    """
    for path in (a, b):
        if not path.is_dir():
            raise UsageError(f"RUN {path}: no such folder; give the run folder that elman train printed")
    records = [read_run(a), read_run(b)]
    name_apart(records)
    table = Table()
    table.add_column("", style="cyan")
    names = [record.label for record in records]
    for record in records:
        # Two seeds of a study's run have one name.
        table.add_column(record.label if names[0] != names[1] else record.path.name, justify="right")
    table.add_column("B against A", justify="right")
    for name, of, show in _ROWS:
        values = [_value(of, record) for record in records]
        if any(value is not None for value in values):
            shown = ["–" if value is None else show(value) for value in values]
            # What shows no difference is not told to have one: a start-up of microseconds has no ratio worth a look.
            table.add_row(name, *shown, "" if shown[0] == shown[1] else _relation(name, values))
    for name, settings_of in _settings(records):
        table.add_row(name, *settings_of, "")
    console.print(table)
    for letter, record in zip("AB", records, strict=True):
        for line in (*record.problems, *record.remarks):
            say(console, f"{letter} ({record.path}): {line}")
    for line in _caveats(records):
        say(console, line)
    return 0


def _value(of: Callable[[Record], Any], record: Record) -> float | None:
    if not record.summary:
        return None
    try:
        value = of(record)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None


def _relation(name: str, values: list[float | None]) -> str:
    a, b = values
    if a is None or b is None or a == b:
        return ""
    if name in _LOSSES:
        return f"{b - a:+.4f}"
    return f"× {b / a:.3g}" if a else ""


def _settings(records: list[Record]) -> list[tuple[str, list[str]]]:
    """Options, machine and versions in which the runs differ."""
    found = [_facts(record) for record in records]
    names = list(dict.fromkeys(name for facts in found for name in facts))
    rows = [(name, [facts.get(name, "–") for facts in found]) for name in names]
    return [(name, values) for name, values in rows if values[0] != values[1]]


def _facts(record: Record) -> dict[str, str]:
    facts: dict[str, str] = {}
    if record.config is not None and record.model is not None:
        facts = {
            "model": record.model.pattern,
        }
        facts |= {name: str(value) for name, value in options(record).items()}
        facts["seed"] = str(record.config.seed)
        if isinstance(record.config, TrainConfig):
            facts["data"] = str(record.config.data)
    for session in record.sessions[-1:]:
        for name in ("gpu", "device", "driver", "precision", "compiled", "git_commit"):
            if name in session:
                facts[name] = str(session[name])
        facts["kernels"] = ", ".join(sorted(set(session.get("backends") or ())))
        facts |= {name: str(version) for name, version in (session.get("packages") or {}).items()}
    return facts


def _caveats(records: list[Record]) -> list[str]:
    """Why the two losses may not be comparable."""
    if any(record.problems or record.config is None for record in records):
        return ["What is left open cannot be compared."]
    lines = ["Two runs are one sample each: what other seeds would give, they do not tell."]
    a, b = records
    if a.judged_by != b.judged_by:
        what = "text: their losses do" if a.task is None and b.task is None else "examples: they do"
        lines.append(f"They were evaluated on unequal held-out {what} not compare.")
    if getattr(a.config, "tokenizer", None) != getattr(b.config, "tokenizer", None):
        lines.append("Their tokens are not alike: losses a token do not compare, nor do tokens, as amounts of text.")
    if a.budget != b.budget:
        lines.append("They had unequal budgets.")
    if a.device != b.device:
        lines.append(f"They ran on unequal devices ({a.device}; {b.device}): their speeds do not compare.")
    return lines
