"""One page of what runs say, as HTML that needs no other file and as Markdown: from run folders alone.

Nothing else is read: a study's question and plan lie in the ``study.json`` of each of its folders. Runs that cannot be
compared are listed with the reason, and so is what was planned and is not there.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2

import elman
from elman.errors import UsageError
from elman.options import flag
from elman.studies import figures
from elman.studies.analysis import (
    Comparison,
    Difference,
    Group,
    PowerLaw,
    compare,
    law_sentences,
    power_laws,
    repeated,
    superseded,
    sweep_remarks,
    uneven_speeds,
    verdict,
)
from elman.studies.long_text import Line, read_evaluation, sentences, together
from elman.studies.records import Record, name_apart, read_run, run_folders
from elman.studies.study import Budget, slug
from elman.studies.task_grid import PLACES, Grid, Place, task_verdict
from elman.training.config import TrainConfig
from elman.units import bits, format_bytes, format_count

#: What env.json tells that decides what a run computes and how fast, in the order of the page.
_ENVIRONMENT = ("gpu", "device", "gpu_memory", "compute_capability", "driver", "cuda", "cudnn", "precision", "compiled",
                "captured", "parallel", "processes", "cpu_count", "cpu_threads", "python", "platform", "elman",
                "git_commit")  # fmt: skip


#: Above so many times the fewest tokens of a comparison's rows, losses at equal tokens are told.
_MORE_TOKENS = 1.02


@dataclass(frozen=True)
class Picture:
    """An SVG, what it is called, and what it shows; and the same as a PNG, where it may be wanted by itself."""

    name: str
    caption: str
    svg: str
    png: bytes | None = None

    @property
    def uri(self) -> str:
        """For a page that holds its pictures."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many words; and what it shows, where its section does not say."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A comparison as the page shows it."""

    title: str
    verdict: list[str]
    tables: list[Table]
    pictures: list[Picture]
    #: The pictures come before the tables, where these only say the same in numbers.
    pictures_first: bool = False


@dataclass
class Report:
    """All that a page shows, in words and pictures."""

    title: str
    question: str = ""
    scale: str = ""
    held_equal: list[str] = field(default_factory=list)
    varies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    across: list[Picture] = field(default_factory=list)
    laws: list[str] = field(default_factory=list)
    sweep: Table | None = None
    sweep_remarks: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    environment: list[tuple[str, list[str]]] = field(default_factory=list)
    runs: list[list[str]] = field(default_factory=list)
    is_of_tasks: bool = False
    version: str = elman.__version__

    @property
    def pictures(self) -> list[Picture]:
        """Of all sections."""
        return [*(picture for section in self.sections for picture in section.pictures), *self.across]

    def html(self) -> str:
        """One page that needs no other file."""
        return _render("report.html.j2", self, autoescape=True)

    def markdown(self) -> str:
        """The same, its pictures in files beside it."""
        return _render("report.md.j2", self, autoescape=False)

    def write(self, folder: Path) -> Path:
        """Write report.html, report.md and its pictures. Returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
            if picture.png is not None:
                (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self.html(), encoding="utf-8")
        return page


def make_report(paths: Sequence[Path]) -> Report:
    """The report of these run folders, or of the runs in these folders.

    Raises:
        UsageError: no such folder, no runs in it, or runs of several studies.
    """
    found = run_folders(paths)
    records = [read_run(path) for path in found]
    for record in superseded(records):
        record.problems.append("superseded: another setting has come out best in its sweep since, and has been run")
    name_apart([record for record in records if not record.is_sweep])
    for record, other in repeated(records):
        record.problems.append(f"it is of the same seed as {other.path.name}, and a seed counts once")
    studies = sorted({str(record.facts["study"]) for record in records if "study" in record.facts})
    if len(studies) > 1:
        raise UsageError(f"RUN: these runs are of several studies ({', '.join(studies)}): report one at a time")
    report = Report(title=studies[0] if studies else "Runs")
    newest = max((record for record in records if record.facts), key=_began, default=None)
    if newest is not None:
        _tell_study(report, newest.facts)
        if not set(found) & set(paths):
            # Of runs that were picked one by one, nobody misses the others.
            _tell_missing(report, newest.facts, records)
    finals = [record for record in records if not record.is_sweep]
    comparisons = compare(finals)
    good = [record for record in finals if not record.problems]
    planned = [] if newest is None else [str(label) for label in newest.facts.get("planned", [])]
    labels = [record.label for record in good]
    styles = figures.Styles([*(label for label in planned if label in labels), *labels])
    texts = _texts(comparisons)
    for number, comparison in enumerate(comparisons, 1):
        section = _section(comparison, number, styles, several=len(comparisons) > 1)
        report.sections.append(replace(section, title=section.title + _on(comparison, texts)))
    report.sections += task_sections(good) + long_text_sections(good, styles)
    report.is_of_tasks = bool(good) and all(record.task is not None for record in good)
    if newest is not None and newest.facts.get("axis"):
        _tell_axis(report, str(newest.facts["axis"]), comparisons, texts)
    _tell_sweep(report, [record for record in records if record.is_sweep], good)
    for record in records:
        report.left_out += [(_called(record), problem) for problem in record.problems]
        report.remarks += [(_called(record), remark) for remark in record.remarks]
    _tell_environment(report, good or records)
    report.runs = [
        [
            record.label,
            *(("–", "–") if record.config is None else (_rate(record.lr), str(record.seed))),
            str(record.path),
        ]
        for record in finals
    ]
    return report


def _began(record: Record) -> str:
    return str(record.sessions[0].get("time", "")) if record.sessions else ""


def _called(record: Record) -> str:
    return f"{record.label} ({record.path.name})"


def _tell_study(report: Report, facts: dict[str, Any]) -> None:
    report.question, report.scale = str(facts.get("question", "")), str(facts.get("scale", ""))
    report.held_equal = [str(line) for line in facts.get("held_equal", [])]
    report.varies = [str(name) for name in facts.get("varies", [])]
    report.notes = [str(note) for note in facts.get("notes", [])]
    report.left_out += [(str(label), f"refused: {why}") for label, why in facts.get("refused", {}).items()]


def _tell_missing(report: Report, facts: dict[str, Any], records: Sequence[Record]) -> None:
    budgets = {record.budget for record in records if record.facts.get("budget")}
    for budget in sorted(budgets):
        of_budget = [r for r in records if r.facts.get("budget") and r.budget == budget and not r.is_sweep]
        there = {(record.run, record.seed) for record in of_budget}
        behind = f" at equal {budget[0]}" if len(budgets) > 1 else ""
        for label in facts.get("planned", []):
            missing = [seed for seed in facts.get("seeds", []) if (label, seed) not in there]
            if missing and label not in facts.get("refused", {}):
                seeds = ", ".join(map(str, missing))
                report.left_out.append((str(label), f"planned{behind}, and not there: seed {seeds}"))


_SIZES = ["run", "width × depth", "parameters", "batch", "lr"]
_LOSSES = ["seeds", "last 100, nats/token", "held out, nats/byte", "bits/byte", "behind the best", "p"]
_COSTS = ["run", "steps", "tokens", "training FLOPs", "trained, s", "start-up, s", "tokens/s", "MFU", "peak memory",
          "state"]  # fmt: skip


def _section(comparison: Comparison, number: int, styles: figures.Styles, several: bool) -> Section:
    ranked = comparison.ranked
    from_best = {d.worse.label: d for d in comparison.differences() if d.better is ranked[0]}
    results = _results(ranked, from_best)
    costs = Table(_COSTS, [_cost(group) for group in ranked])
    title = f"At {comparison.budget} a run"
    if comparison.target is not None:
        title += f", {format_count(comparison.target)} parameters"
    units = {str(record.summary.get("unit", "token")) for group in ranked for record in group.records}
    unit = units.pop() if len(units) == 1 else "token"
    name = f"{slug(comparison.budget.short)}" + ("" if not several else f"-{number}")
    pictures = [
        Picture(f"heldout-{name}", "Held-out loss, every seed and the mean.", figures.losses(comparison, styles)),
        Picture(
            f"training-{name}",
            "Training loss, a running mean, a line a seed. Before its end a curve has its learning rate still up: only "
            "ends compare.",
            figures.curves(comparison, styles, unit),
        ),
    ]
    return Section(title, verdict(comparison), [results, costs, *_equal_tokens(comparison)], pictures)


def _texts(comparisons: Sequence[Comparison]) -> dict[tuple[object, ...], str]:
    """What each of the texts is called that losses were measured on; none where that was one."""
    found: dict[tuple[object, ...], str] = {}
    for comparison in comparisons:
        first = comparison.groups[0].records[0]
        assert isinstance(first.config, TrainConfig)
        known, heldout, eval_bytes = first.judged_by
        name = "" if first.config.data is None else f"{first.config.data.name} "
        found[first.judged_by] = f"{name}({str(known)[:8]}), --heldout {heldout}, --eval-bytes {eval_bytes}"
    return found if len(found) > 1 else {}


def _on(comparison: Comparison, texts: Mapping[tuple[object, ...], str]) -> str:
    text = texts.get(comparison.groups[0].records[0].judged_by)
    return "" if text is None else f", judged by {text}"


def _equal_tokens(comparison: Comparison) -> list[Table]:
    """Where the groups had unequal numbers of tokens: their training losses when all had as many as the slowest.

    None where tokens are not alike.
    """
    if len({getattr(record.config, "tokenizer", None) for group in comparison.groups for record in group.records}) > 1:
        return []
    ends = {group.label: group.of_summary("tokens") or 0.0 for group in comparison.groups}
    first = min(ends, key=lambda label: ends[label])
    least = ends[first]
    if max(ends.values()) <= _MORE_TOKENS * least:
        return []
    losses = {
        group.label: group.average(lambda record: record.loss_at(least))
        if group.label != first
        else group.average(lambda record: record.last_100)
        for group in comparison.groups
    }
    known = {label: loss for label, loss in losses.items() if loss is not None}
    ranked = sorted(known, key=lambda label: known[label])
    unknown = [[label, format_count(ends[label]), "–", "–"] for label in losses if label not in known]
    caption = (
        f"At equal tokens, from the same runs: the mean training loss of 100 steps up to {format_count(least)} tokens, "
        f"where {first} ended. Of the others the learning rate was not yet down there, which keeps their losses up."
    )
    rows = [
        [label, format_count(ends[label]), f"{known[label]:.3f}", f"{known[label] - known[ranked[0]]:.3f}" if i else ""]
        for i, label in enumerate(ranked)
    ]
    columns = ["run", "tokens in all", f"at {format_count(least)} tokens, nats/token", "behind the best"]
    return [Table(columns, rows + unknown, caption)]


def long_text_sections(records: Sequence[Record], styles: figures.Styles) -> list[Section]:
    """Of runs that ``elman eval`` has read: a section for each text, losses by length of context."""
    readings = []
    for record in records:
        reading, remarks = read_evaluation(record)
        record.remarks += remarks
        readings += [reading] if reading is not None else []
    sections = []
    for number, lines in enumerate(together(readings), 1):
        first = lines[0].readings[0]
        svg, png = figures.long_text(lines, styles)
        caption = "Held-out loss of the same targets by length of context; the dotted line is the window in training."
        sections.append(
            Section(
                f"Long text after {lines[0].budget}: {first.text[1]:,} bytes of {first.text[0]}",
                sentences(lines),
                [_context_table(lines, first.unit)],
                [Picture(f"contexts-{number}", caption, svg, png)],
                pictures_first=True,
            )
        )
    return sections


def _context_table(lines: Sequence[Line], unit: str) -> Table:
    lengths = sorted({context for line in lines for context in line.contexts})

    def show(loss: float | None) -> str:
        return "–" if loss is None else f"{loss:.4f}"

    rows = [
        [line.label, str(len(line.readings)), show(line.whole("windows")), show(line.whole("carried"))]
        + [show(line.at(length) if length in line.contexts else None) for length in lengths]
        for line in lines
    ]
    caption = (
        f"Nats a byte: of the whole text in windows and with the state carried, and of the targets by length of "
        f"context in {unit}s."
    )
    return Table(["run", "seeds", "windows", "carried", *(f"{length:,}" for length in lengths)], rows, caption)


def task_sections(records: Sequence[Record]) -> list[Section]:
    """Of runs of tasks: a section for all that had one budget, training length and examples, models by tasks."""
    found: dict[tuple[object, ...], list[Record]] = {}
    ways: dict[tuple[object, ...], list[object]] = {}
    for record in records:
        if record.task is not None:
            alike = (*record.budget, *((a.length, a.examples) for a in record.accuracies))
            # A task that draws its examples otherwise than it did is another.
            of_task = ways.setdefault((record.task, *alike), [])
            if record.judged_by not in of_task:
                of_task.append(record.judged_by)
            found.setdefault((of_task.index(record.judged_by), *alike), []).append(record)
    sections = []
    for number, same in enumerate(found.values(), 1):
        budget = Budget(*same[0].budget)  # type: ignore[arg-type]
        grid = Grid.of(same)
        name = slug(budget.short) + ("" if len(found) == 1 else f"-{number}")
        title = f"After {budget}, trained at length {grid.lengths[0]}"
        sections.append(
            Section(
                title,
                task_verdict(grid),
                [_grid_table(grid, "longest"), _grid_table(grid, "trained")],
                [_heat_map(grid, place, f"accuracy-{place}-{name}") for place in PLACES],
                pictures_first=True,
            )
        )
    return sections


_PLACES = {
    "trained": "Accuracy at the training length, {first}",
    "longest": "Accuracy past the training length, in examples of length {last}",
}


def _heat_map(grid: Grid, place: Place, name: str) -> Picture:
    caption = _PLACES[place].format(first=grid.lengths[0], last=grid.lengths[-1])
    svg, png = figures.heat_map(grid, place, caption)
    return Picture(name, f"{caption}: per cent, the mean over seeds. The colour goes from chance to all.", svg, png)


def _grid_table(grid: Grid, place: Place) -> Table:
    caption = _PLACES[place].format(first=grid.lengths[0], last=grid.lengths[-1])
    rows = []
    for model in grid.models:
        cells = [grid.cell(model, task, place) for task in grid.tasks]
        rows.append([model, *("–" if cell is None else cell.words for cell in cells)])
    chances = [f"{100 * grid.chance(task, place):.1f}" for task in grid.tasks]
    return Table(["", *grid.tasks], [*rows, ["chance", *chances]], f"{caption}, per cent: mean ± spread over seeds.")


def _results(ranked: Sequence[Group], from_best: Mapping[str, Difference]) -> Table:
    swept = _swept([record for group in ranked for record in group.records])
    rows = [_result(group, swept, from_best.get(group.label)) for group in ranked]
    return Table([*_SIZES, *map(flag, swept), *_LOSSES], rows)


def _swept(records: Sequence[Record]) -> list[str]:
    """The options that a sweep chose beside the learning rate."""
    return list(dict.fromkeys(name for record in records for name in record.swept))


def _result(group: Group, swept: Sequence[str], behind: Difference | None) -> list[str]:
    first = group.records[0]
    spread = group.spread
    assert first.model is not None
    return [
        group.label,
        f"{first.model.dim} × {first.model.depth}",
        f"{first.summary['params']:,}",
        str(first.summary["batch_size"]),
        ", ".join(_rate(rate) for rate in sorted({record.lr for record in group.records})),
        *(
            ", ".join(dict.fromkeys(str(getattr(record.config, name, "–")) for record in group.records))
            for name in swept
        ),
        str(len(group.records)),
        _mean(group, "last_100_loss", lambda value: f"{value:.4f}"),
        f"{group.mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}"),
        f"{bits(group.mean):.4f}" + ("" if spread is None else f" ± {bits(spread):.4f}"),
        "" if behind is None else f"{behind.nats:.4f}",
        "" if behind is None or behind.adjusted is None else _p(behind.adjusted),
    ]


def _cost(group: Group) -> list[str]:
    return [
        group.label,
        _mean(group, "steps", lambda value: f"{value:,.0f}"),
        _mean(group, "tokens", format_count),
        f"{group.average(lambda record: record.train_flops):.3g}",
        _mean(group, "train_seconds", lambda value: f"{value:,.1f}"),
        f"{group.average(lambda record: record.start_up_seconds):.1f}",
        _mean(group, "tokens_per_second", format_count),
        _mean(group, "mfu", lambda value: f"{value:.1%}"),
        _mean(group, "peak_memory_bytes", format_bytes),
        _mean(group, "state_size", format_count),
    ]


def _mean(group: Group, name: str, show: Any) -> str:
    value = group.of_summary(name)
    return "–" if value is None else str(show(value))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _rate(rate: float) -> str:
    return f"{rate:g}"


def _tell_axis(
    report: Report, axis: str, comparisons: Sequence[Comparison], texts: Mapping[tuple[object, ...], str]
) -> None:
    """Losses, and their power laws, of all that had one budget and were judged by one text."""
    alike: dict[tuple[object, ...], list[Comparison]] = {}
    for comparison in comparisons:
        judged_by = comparison.groups[0].records[0].judged_by
        alike.setdefault((comparison.budget, *judged_by), []).append(comparison)
    for number, same in enumerate(alike.values(), 1):
        budget, groups = same[0].budget, [group for comparison in same for group in comparison.groups]
        several = sum(other[0].budget == budget for other in alike.values()) > 1
        name = f"{slug(budget.short)}-{axis}" + (f"-{number}" if several else "")
        records = [record for group in groups for record in group.records]
        styles = figures.Styles([record.series for record in records])
        laws: list[PowerLaw] = power_laws(records) if axis == "params" else []
        after = f"{budget}{_on(same[0], texts)}"
        caption = f"Held-out loss after {after}" + (", and fitted power laws." if laws else ".")
        report.across.append(Picture(f"loss-{name}", caption, figures.against(axis, groups, laws, styles)))
        if axis == "batch_size":
            svg = figures.against(axis, groups, [], styles, value="speed")
            report.across.append(Picture(f"speed-{name}", "Throughput against the batch.", svg))
        report.laws += [f"After {after}, {sentence}" for sentence in law_sentences(laws)]
        if axis == "params" and not laws:
            report.laws.append(f"After {after}: fewer than three sizes a series, so no power law is fitted.")


def _tell_sweep(report: Report, sweep: Sequence[Record], finals: Sequence[Record]) -> None:
    if not sweep:
        return
    swept = _swept(sweep)

    def setting(record: Record) -> tuple[str, ...]:
        return (_rate(record.lr), *(str(getattr(record.config, name, "")) for name in swept))

    chosen = {(record.run, setting(record)) for record in finals if not record.problems}
    columns = ["run", "learning rate", *map(flag, swept), "budget", "last 100, nats/token", "steps skipped", ""]
    report.sweep = Table(columns, [])
    whole = [record for record in sweep if not record.problems]
    for record in sorted(whole, key=lambda record: (record.label, record.budget, setting(record)[1:], record.lr)):
        budget = Budget(record.budget[0], record.budget[1]).part(record.facts["sweep_part"])  # type: ignore[arg-type]
        used = "chosen" if (record.run, setting(record)) in chosen else ""
        loss, skipped = f"{record.last_100:.4f}", str(record.summary.get("skipped_steps", 0))
        report.sweep.rows.append([record.label, *setting(record), str(budget), loss, skipped, used])
    report.sweep_remarks = sweep_remarks(sweep, finals)
    report.sweep_remarks += uneven_speeds(whole)


def _tell_environment(report: Report, records: Sequence[Record]) -> None:
    """Every fact with all its values: one where the runs agree."""
    sessions = [session for record in records for session in record.sessions]
    facts: dict[str, list[str]] = {}

    def note(name: str, value: Any) -> None:
        values = facts.setdefault(name, [])
        if str(value) not in values:
            values.append(str(value))

    for name in _ENVIRONMENT:
        for session in sessions:
            if session.get(name) is not None:
                note(name, format_bytes(session[name]) if name == "gpu_memory" else session[name])
    for session in sessions:
        for package, version in (session.get("packages") or {}).items():
            if version is not None:
                note(package, version)
    for record in records:
        for session in record.sessions:
            kernels = ", ".join(sorted(set(session.get("backends") or ["none of ours"])))
            note("kernels", f"{record.label if record.task is None else record.series}: {kernels}")
    report.environment = list(facts.items())


def _render(template: str, report: Report, autoescape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("elman.studies"), autoescape=autoescape, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(report=report)
