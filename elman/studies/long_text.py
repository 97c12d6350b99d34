"""What ``elman eval`` found of the runs of a report, put side by side: loss against length of context."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elman.studies.records import Record
from elman.studies.study import Budget

#: Folders of ``elman eval`` in a run's, whose names sort by time, and the file in each that a report reads.
EVALUATIONS = "eval-*/eval.json"


@dataclass(frozen=True)
class Reading:
    """One run's newest evaluation that has contexts; losses are nats a byte.

    Attributes:
        record: the run.
        seq_len: its windows in training, tokens.
        unit: what a token is called.
        text: name of the file that was read, how many bytes of it, and their hash, "" where an older elman took none:
            readings of two are not compared.
        tokens: whose loss was taken, the same after every context.
        windows, carried: over the whole text; None where it was not measured.
        contexts: loss by length of context.
    """

    record: Record
    seq_len: int
    unit: str
    text: tuple[str, int, str]
    tokens: int
    windows: float | None
    carried: float | None
    contexts: dict[int, float]


@dataclass(frozen=True)
class Line:
    """The readings of all seeds of one label."""

    label: str
    readings: tuple[Reading, ...]

    @property
    def contexts(self) -> list[int]:
        """Lengths that every seed has, rising."""
        return sorted(set.intersection(*(set(reading.contexts) for reading in self.readings)))

    def at(self, context: int) -> float:
        """The mean over seeds."""
        return statistics.fmean(reading.contexts[context] for reading in self.readings)

    @property
    def budget(self) -> Budget:
        """Of its runs."""
        kind, amount = self.readings[0].record.budget
        return Budget(kind, amount)  # type: ignore[arg-type]

    def whole(self, name: str) -> float | None:
        """That of ``windows`` or ``carried``; None where a seed lacks it."""
        values = [getattr(reading, name) for reading in self.readings]
        return None if None in values else statistics.fmean(values)


def read_evaluation(record: Record) -> tuple[Reading | None, list[str]]:
    """The newest of a run's evaluations that has contexts, if any, and remarks on those that cannot be read."""
    remarks = []
    for path in sorted(record.path.glob(EVALUATIONS), reverse=True):
        try:
            reading = _reading(record, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            remarks.append(f"its {path.parent.name}/{path.name} is not as elman wrote it, and is left out ({error!r})")
            continue
        if reading is not None:
            return reading, remarks
    return None, remarks


def _reading(record: Record, found: dict[str, Any]) -> Reading | None:
    rows = found["contexts"]
    if not rows:
        return None
    whole = {name: found[name] and _number(found[name]["nats_per_byte"]) for name in ("windows", "carried")}
    return Reading(
        record,
        int(found["run"]["seq_len"]),
        str(found["unit"]),
        (Path(found["data"]["file"]).name, int(found["data"]["bytes"]), str(found["data"].get("sha256", ""))),
        int(rows[0]["tokens"]),
        whole["windows"],
        whole["carried"],
        {int(row["context"]): _number(row["nats_per_byte"]) for row in rows},
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no loss")
    return float(value)


def together(readings: Sequence[Reading]) -> list[list[Line]]:
    """Lines that may be compared: of one budget, text, kind of token and length of training windows, and of one longest
    context, for it is behind that that ``elman eval`` takes its targets.
    """
    found: dict[tuple[object, ...], dict[str, list[Reading]]] = {}
    for reading in readings:
        of_text = reading.text, reading.unit, reading.tokens, max(reading.contexts)
        alike = found.setdefault((reading.record.budget, reading.seq_len, *of_text), {})
        alike.setdefault(reading.record.label, []).append(reading)
    return [[Line(label, tuple(same)) for label, same in alike.items()] for alike in found.values()]


def sentences(lines: Sequence[Line]) -> list[str]:
    """What the losses say: of each line from the shortest context to the longest that it has, and of its best."""
    first = lines[0].readings[0]
    told = [
        f"The models, trained on windows of {first.seq_len:,} {first.unit}s, predict the same {first.tokens:,} "
        f"{first.unit}s of {first.text[0]} after contexts of several lengths, each read from a state at rest."
    ]
    for line in lines:
        lengths = line.contexts
        if len(lengths) < 2:
            continue
        shortest, longest = lengths[0], lengths[-1]
        best = min(lengths, key=line.at)
        told.append(
            f"{line.label}: {line.at(shortest):.4f} nats a byte after {shortest:,}, {line.at(longest):.4f} after "
            f"{longest:,} ({line.at(longest) - line.at(shortest):+.4f}); lowest after {best:,}, {line.at(best):.4f}."
        )
    return told
