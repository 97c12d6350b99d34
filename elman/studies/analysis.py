"""What runs say together: means over seeds, tests of their differences, power laws; and a verdict that says no more.

Two runs' held-out losses are compared by Welch's t-test, which takes no variances for equal (Welch, 1947). All pairs of
a comparison are tested, for the best is known only once all are seen, and p is adjusted for their number by Holm's
method (Holm, 1979). Loss against size is fitted as L = a N^-b, a line through the logarithms, by least squares, a point
a size: seeds of one size miss the line alike, and as points of their own would make b look surer than it is. A term
that no size removes could not be told from as few sizes as a study has, so b is that of the range measured.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from elman.options import flag
from elman.sizing import TOLERANCE
from elman.studies.records import Record, best_of_sweep
from elman.studies.study import Budget
from elman.units import bits, format_bytes, format_count

#: Adjusted p below which a difference is called one.
SIGNIFICANCE = 0.05
#: Sizes that a power law is fitted to at least: two fit any.
_LEAST_SIZES = 3
#: A run's end may miss the budget by so much: its last step is taken whole.
_BUDGET_SLACK = 0.05
#: Parts of a run's steps that warm-up may take, and of those of a sweep, before it is told.
_WARM_UP, _SWEEP_WARM_UP = 0.25, 0.5
#: Options of training that a ranking may be due to, where a study neither varies nor sweeps them.
_TRAINING = ("sampling", "grad_accum", "weight_init", "optimizer", "warmup", "schedule", "weight_decay", "grad_clip",
             "precision")  # fmt: skip
#: By how much one of two runs of the same work may be faster.
_SPEED_SLACK = 1.1


@dataclass(frozen=True)
class Group:
    """The runs of one row of a table: alike but for their seeds."""

    label: str
    records: tuple[Record, ...]

    @property
    def nats(self) -> list[float]:
        """Held-out losses, nats a byte, seed by seed."""
        return [record.nats for record in self.records]

    @property
    def mean(self) -> float:
        """Of the held-out losses."""
        return statistics.fmean(self.nats)

    @property
    def spread(self) -> float | None:
        """Their standard deviation; None of one seed."""
        return statistics.stdev(self.nats) if len(self.records) > 1 else None

    def average(self, value: Callable[[Record], float | None]) -> float | None:
        """Of any number over the seeds; None where a run lacks it."""
        values = [value(record) for record in self.records]
        known = [number for number in values if number is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    def of_summary(self, name: str) -> float | None:
        """The average of a number of summary.json; None where a run lacks it."""
        return self.average(lambda record: record.summary.get(name))


@dataclass(frozen=True)
class Difference:
    """How far apart two groups' held-out losses are: worse - better, in nats a byte.

    Attributes:
        low, high: its 95% interval, and ``p`` by Welch's test; None where seeds are too few or all alike.
        adjusted: p for the number of pairs tested.
    """

    better: Group
    worse: Group
    nats: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it is more than chance between seeds, by the adjusted p."""
        return self.adjusted is not None and self.adjusted < SIGNIFICANCE


@dataclass(frozen=True)
class PowerLaw:
    """L = a N^-b."""

    series: str
    a: float
    b: float
    #: Standard error of b.
    error: float
    sizes: int

    def at(self, size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The losses that it tells of sizes, any shape."""
        losses: npt.NDArray[np.float64] = self.a * size**-self.b
        return losses


@dataclass(frozen=True)
class Comparison:
    """Groups that may be compared: of one budget, one text, and one size where the study does not vary it.

    ``diverged``: how many runs of a label did, of those that would be here; they are in no group.
    """

    budget: Budget
    target: int | None
    groups: tuple[Group, ...]
    diverged: Mapping[str, int] = field(default_factory=dict)

    @property
    def ranked(self) -> list[Group]:
        """The lowest held-out loss first."""
        return sorted(self.groups, key=lambda group: group.mean)

    def differences(self) -> list[Difference]:
        """Of all pairs."""
        return differences(self.ranked)


def group(records: Sequence[Record]) -> list[Group]:
    """Runs by label, in the order of the first of each."""
    by_label: dict[str, list[Record]] = {}
    for record in records:
        by_label.setdefault(record.label, []).append(record)
    return [
        Group(label, tuple(sorted(same, key=lambda record: record.seed))) for label, same in by_label.items()
    ]  # fmt: skip


def compare(records: Sequence[Record]) -> list[Comparison]:
    """The comparisons that these runs allow; sweeps, runs with problems and those of tasks are none of them."""
    found: dict[tuple[object, ...], list[Record]] = {}
    diverged: dict[tuple[object, ...], dict[str, int]] = {}
    for record in records:
        if record.is_sweep or record.task is not None or (record.problems and not record.diverged):
            continue
        target = record.facts.get("target_params") if "params" in record.facts.get("varies", ()) else None
        key = (*record.budget, target, *record.judged_by)
        if record.problems:
            of_key = diverged.setdefault(key, {})
            of_key[record.label] = of_key.get(record.label, 0) + 1
        else:
            found.setdefault(key, []).append(record)
    return [
        Comparison(Budget(*key[:2]), key[2], tuple(group(same)), diverged.get(key, {}))  # type: ignore[arg-type]
        for key, same in found.items()
    ]


def repeated(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Runs of a seed that another, which is told too, has given already: no second sample of its row."""
    first: dict[tuple[object, ...], Record] = {}
    found = []
    for record in records:
        if record.problems or record.is_sweep:
            continue
        other = first.setdefault((record.label, record.budget, record.seed, *record.judged_by), record)
        if other is not record:
            found.append((record, other))
    return found


def differences(ranked: Sequence[Group]) -> list[Difference]:
    """Of all pairs of groups, the better one first."""
    found = []
    for better, worse in itertools.combinations(ranked, 2):
        nats = worse.mean - better.mean
        found.append(Difference(better, worse, nats, *_welch(worse.nats, better.nats)))
    adjusted = holm([difference.p for difference in found])
    return [
        Difference(d.better, d.worse, d.nats, d.low, d.high, d.p, p) for d, p in zip(found, adjusted, strict=True)
    ]  # fmt: skip


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The 95% interval of mean(a) - mean(b), and p that it is zero."""
    if min(len(a), len(b)) < 2 or statistics.pvariance(a) + statistics.pvariance(b) == 0:
        return None, None, None
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Values of p, adjusted for their number so that all claims together are wrong as rarely as one alone would be."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted


def power_law(series: str, points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """Through (size, loss), the mean over seeds; None of fewer than three sizes."""
    by_size: dict[float, list[float]] = {}
    for size, loss in points:
        by_size.setdefault(size, []).append(math.log(loss))
    if len(by_size) < _LEAST_SIZES:
        return None
    line = stats.linregress([math.log(size) for size in by_size], [statistics.fmean(of) for of in by_size.values()])
    return PowerLaw(series, math.exp(line.intercept), -float(line.slope), float(line.stderr), len(by_size))


def power_laws(records: Sequence[Record]) -> list[PowerLaw]:
    """Of held-out loss against parameters, a series each."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        points.setdefault(record.series, []).append((record.summary["params"], record.nats))
    laws = (power_law(series, of_series) for series, of_series in points.items())
    return [law for law in laws if law is not None]


def verdict(comparison: Comparison) -> list[str]:
    """What the comparison supports, in sentences; what it cannot tell, and why, behind that."""
    ranked = comparison.ranked
    records = [record for group in ranked for record in group.records]
    lines = []
    blocked = _what_forbids_ranking(comparison, records)
    if blocked:
        lines.append(blocked)
    elif len(ranked) == 1:
        lines.append(f"There is one row, {ranked[0].label}, and nothing to compare it with.")
    else:
        lines += _ranking(comparison)
    return lines + _caveats(comparison, records)


def _what_forbids_ranking(comparison: Comparison, records: Sequence[Record]) -> str | None:
    devices = sorted({record.device for record in records})
    if comparison.budget.kind == "time" and len(devices) > 1:
        return (
            f"No ranking: the runs had equal wall-clock on unequal devices ({'; '.join(devices)}), so their losses "
            f"measure the devices."
        )
    plain = sorted({record.label for record in records if not record.compiled})
    if comparison.budget.kind == "time" and plain and any(record.compiled for record in records):
        return (
            f"No ranking: at equal wall-clock, torch.compile sped up some runs and not others ({', '.join(plain)}), so "
            f"their losses measure that."
        )
    return None


def _ranking(comparison: Comparison) -> list[str]:
    ranked = comparison.ranked
    best, others = ranked[0], ranked[1:]
    of_best = {d.worse.label: d for d in comparison.differences() if d.better is best}
    seeds = f"over {len(best.records)} seeds" if len(best.records) > 1 else "of its one seed"
    lines = [
        f"After {comparison.budget}, the lowest held-out loss is that of {best.label}: {best.mean:.4f} nats "
        f"({bits(best.mean):.4f} bits) a byte {seeds}."
    ]
    pairs = len(ranked) * (len(ranked) - 1) // 2
    supported = [other for other in others if of_best[other.label].significant]
    unclear = [other for other in others if of_best[other.label].p is not None and other not in supported]
    untested = [other for other in others if of_best[other.label].p is None]

    def by_how_much(other: Group) -> str:
        found = of_best[other.label]
        interval = f"{found.low:.4f} to {found.high:.4f}"
        return f"{other.label} ({found.nats:.4f} nats behind, 95% interval {interval}, p {_p(found.adjusted)})"

    if supported:
        lines.append(f"More than chance between seeds can explain, it is below {_words(map(by_how_much, supported))}.")
    if unclear:
        lines.append(
            f"The seeds do not tell it apart from {_words(map(by_how_much, unclear))}: no claim is made there, one way "
            f"or the other."
        )
    if pairs > 1 and (supported or unclear):
        lines.append(f"Each p is adjusted for the {pairs} pairs of rows, the intervals are those of a pair alone.")
    if untested:
        gaps = _words(f"{other.label} ({of_best[other.label].nats:.4f} nats behind)" for other in untested)
        lines.append(
            f"It is below {gaps} in these runs alone: with one seed a row, or seeds that all gave the same, no test "
            f"can say whether other seeds would agree."
        )
    return lines


def _caveats(comparison: Comparison, records: Sequence[Record]) -> list[str]:
    lines = []
    facts = records[0].facts
    varies = facts.get("varies", ())
    kind = comparison.budget.kind
    if kind == "time":
        lines.append(
            "This is a statement about equal wall-clock on this hardware and with these kernels; it says nothing of "
            "equal tokens."
        )
    else:
        lines.append(f"This is a statement about equal {_KINDS[kind]}; it says nothing of equal wall-clock.")
    if comparison.diverged:
        whole = {group.label: len(group.records) for group in comparison.groups}
        told = _words(f"{label} ({of} of {of + whole.get(label, 0)})" for label, of in comparison.diverged.items())
        lines.append(f"Runs that diverged are left out, of {told}: a mean is that of those which did not.")
    devices = sorted({record.device for record in records})
    if kind != "time" and len(devices) > 1:
        lines.append(f"The runs are of unequal devices ({'; '.join(devices)}): their speeds do not compare.")
    for what, of in (("commits of elman", "git_commit"), ("versions of torch", "torch")):
        values = {
            re.sub(
                r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", str(session.get(of) or (session.get("packages") or {}).get(of))
            )
            for record in records
            for session in record.sessions
        }
        if len(values) > 1:
            lines.append(f"The runs are of several {what} ({', '.join(sorted(values))}), which may compute otherwise.")
    if any(not session.get("gpu") for record in records for session in record.sessions):
        lines.append(
            "The runs are of a CPU, where every model runs in plain PyTorch: their speed, and so what they reach in a "
            "given time, says nothing of a GPU."
        )
    elif not all(record.compiled for record in records):
        lines.append("torch.compile did not run for all of them: speeds are not what they could be.")
    lines += _unequal_options(records)
    if "batch_size" not in varies and len({record.summary["batch_size"] for record in records}) > 1:
        lines.append(
            "The runs had unequal batches, which moves speed and loss: the ranking may be that of the batches."
        )
    sizes = [record.summary["params"] for record in records]
    if "params" not in varies and max(sizes) > (1 + 2 * TOLERANCE) * min(sizes):
        lines.append(
            f"The runs are of unequal size ({format_count(min(sizes))} to {format_count(max(sizes))} parameters): the "
            f"ranking may be that of their sizes."
        )
    if len({record.summary["seq_len"] for record in records}) > 1:
        # Of a study that is about them too: the longer ones would do better with the same weights.
        lines.append("The runs had unequal windows, and so unequal context in the held-out text as well.")
    slow = {
        group.label: f"{share:.0%}"
        for group in comparison.groups
        if (share := _warm_up([record for record in group.records if "warmup" not in record.swept])) > _WARM_UP
    }
    if slow:
        told = _words(f"{label} ({share} of its steps)" for label, share in slow.items())
        lines.append(
            f"The learning rate warmed up for long beside the steps of {told}, which may have cost what it is."
        )
    if memory := facts.get("memory"):
        peaks = [record.summary["peak_memory_bytes"] for record in records]
        if max(peaks) > 1.1 * memory:
            lines.append(
                f"Memory was meant to be {format_bytes(memory)} and peaked at {format_bytes(min(peaks))} to "
                f"{format_bytes(max(peaks))} (on a CPU the whole process is counted)."
            )
    lines += uneven_speeds(records)
    missed = [record.label for record in records if _misses(record, comparison.budget)]
    if missed:
        lines.append(f"The budget was not met by {_words(sorted(set(missed)))}.")
    return lines


def _unequal_options(records: Sequence[Record]) -> list[str]:
    """Tokens that are not alike; and options that a study, changed in between, or runs of none did not hold equal."""
    lines = []

    def values(name: str) -> list[str]:
        return sorted({str(getattr(record.config, name, None)) for record in records})

    if len(tokens := values("tokenizer")) > 1:
        lines.append(
            f"Their tokens are not alike ({', '.join(tokens).replace('None', 'bytes')}): as many of them are not as "
            f"much text, losses a token do not compare, and those a byte are of windows cut at other places."
        )
    own = {name for record in records for name in (*record.facts.get("varies", ()), *record.swept)}
    unequal = [name for name in _TRAINING if name not in own and len(values(name)) > 1]
    if unequal:
        told = _words(f"{flag(name)} ({', '.join(values(name))})" for name in unequal)
        lines.append(f"Beside their models the runs differ in {told}: the ranking may be that of these.")
    return lines


def uneven_speeds(records: Sequence[Record]) -> list[str]:
    """Rows whose runs, alike but for seed or learning rate, were not equally fast: something else used the machine."""
    found = {}
    for alike in group(records):
        speeds = [record.summary["tokens_per_second"] for record in alike.records]
        if max(speeds) > _SPEED_SLACK * min(speeds):
            found[alike.label] = max(speeds) / min(speeds)
    if not found:
        return []
    which = _words(f"{label} (× {by:.2f})" for label, by in found.items())
    return [
        f"Runs of the same work were not equally fast: {which}. Something else used the machine, so these times are no "
        f"measure."
    ]


def _misses(record: Record, budget: Budget) -> bool:
    used = {
        "time": record.summary["train_seconds"],
        "tokens": record.summary["tokens"],
        "flops": record.train_flops,
    }[budget.kind]
    # A step may be a large part of a short run.
    step = used / max(1, record.summary["steps"])
    return bool(abs(used - budget.amount) > _BUDGET_SLACK * budget.amount + 2 * step)


_KINDS = {"time": "wall-clock", "tokens": "tokens", "flops": "training FLOPs"}


def law_sentences(laws: Sequence[PowerLaw]) -> list[str]:
    """What the fits say."""
    return [
        f"{law.series}: loss goes as N^{-law.b:.3f} ± {law.error:.3f} (standard error) over the {law.sizes} sizes "
        f"measured; beyond them this is a guess."
        for law in laws
    ]


def superseded(records: Iterable[Record]) -> list[Record]:
    """Runs whose setting was their sweep's best once, where it has gone on since and its best has been run too."""
    of_run: dict[Any, list[Record]] = {}
    for record in records:
        if not record.problems and record.facts.get("budget"):
            of_run.setdefault((record.run, record.budget), []).append(record)
    found = []
    for group in of_run.values():
        tried = [record for record in group if record.is_sweep]
        finals = [record for record in group if not record.is_sweep]
        best = best_of_sweep(tried)
        if best is not None and any(_setting(record) == _setting(best) for record in finals):
            others = [_setting(record) for record in tried if _setting(record) != _setting(best)]
            found += [record for record in finals if _setting(record) in others]
    return found


def _setting(record: Record) -> tuple[Any, ...]:
    return record.lr, record.swept


def sweep_remarks(sweep: Sequence[Record], finals: Sequence[Record]) -> list[str]:
    """Rows whose choice of a learning rate, or of what else was swept, is to be doubted.

    It was the lowest or highest of the sweep, beyond which a better one may lie; the sweep was mostly warm-up; or its
    runs were shorter than those whose rate they chose.
    """
    tried: dict[str, list[Record]] = {}
    for record in sweep:
        tried.setdefault(record.run, []).append(record)
    lines = []
    parts = {record.facts["sweep_part"] for record in sweep if not record.problems}
    if parts and min(parts) < 1:
        lines.append(
            f"The sweep's runs had {min(parts):.0%} of the budget. A shorter run does best at a higher rate than a "
            f"whole one, so the rates chosen may be too high (--sweep-part 1 sweeps at full length)."
        )
    for label in dict.fromkeys(record.run for record in finals):
        of_row = tried.get(label, [])
        rates = {record.lr for record in of_row}
        share = _warm_up([record for record in of_row if not record.problems and "warmup" not in record.swept])
        if len(rates) > 1 and share > _SWEEP_WARM_UP:
            lines.append(
                f"{label}: warm-up was {share:.0%} of the sweep's steps, so that no rate was seen for long, and high "
                f"ones look better than they are."
            )
        chosen = [record for record in finals if record.run == label]
        lines += _at_the_end(label, "the learning rate", rates, {record.lr for record in chosen}, "--sweep-beyond")
        for name in dict.fromkeys(name for record in of_row for name in record.swept):
            values = {record.swept.get(name) for record in of_row}
            if all(isinstance(value, int | float) for value in values):
                lines += _at_the_end(label, flag(name), values, {record.swept.get(name) for record in chosen})
    return lines


def _at_the_end(label: str, what: str, tried: Collection[Any], chosen: Iterable[Any], cure: str = "") -> list[str]:
    """A sentence for each number chosen that is the lowest or highest of those tried; ``cure`` goes further."""
    ends = {min(tried): "lowest", max(tried): "highest"} if len(tried) > 1 else {}
    more = f" ({cure} goes further)" if cure else ""
    return [
        f"{label}: {what} {value:g} is the {ends[value]} that was tried; one beyond it may be better{more}."
        for value in sorted(value for value in chosen if value in ends)
    ]


def _warm_up(records: Iterable[Record]) -> float:
    """The largest part of a run's steps that its learning rate rose for; 0 of none."""
    return max(
        (
            warmup if 0 < (warmup := record.config.warmup) < 1 else min(1.0, warmup / max(1, record.summary["steps"]))
            for record in records
            if record.config
        ),
        default=0.0,
    )


def _p(value: float | None) -> str:
    assert value is not None
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _words(parts: Iterable[str]) -> str:
    """A, B and C."""
    known = list(parts)
    return ", ".join(known[:-1]) + " and " + known[-1] if len(known) > 1 else known[0]
