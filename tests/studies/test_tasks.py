"""Studies of tasks: what they declare, run, skip and report."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elman.cli import main
from elman.errors import UsageError
from elman.evaluation.tasks import find_task, task_names
from elman.studies import Run, Scale, Study, over_tasks
from elman.studies.find import find_study
from elman.studies.launch import Done, Job, Launcher
from elman.studies.plan import Plan, identity
from elman.studies.records import name_apart, read_run
from elman.studies.report import Report, make_report, task_sections
from elman.studies.runner import run_plan, show_plan
from elman.studies.task_grid import Cell, Grid, task_verdict
from elman.training.config import TaskConfig
from tests.endings import make_brief

MODELS = (Run("E1", "e1", dim=16, depth=1), Run("minGRU", "mingru", dim=16, depth=1))
TASKS = ("mqar", "parity")


def study(**more: Any) -> Study:
    train = {"batch_size": 4, "seq_len": 8, "warmup": 2, "eval_examples": 6, "eval_multiples": (3,)}
    given: dict[str, Any] = {
        "name": "toy", "question": "Which?", "runs": over_tasks(MODELS, TASKS), "budget": "tokens", "tokens": 128,
        "seeds": (0, 1), "learning_rates": (1e-3,), "train": train, "varies": ("task",),
    }  # fmt: skip
    return Study(**{**given, **more})


class Here(Launcher):
    """Runs jobs in this process."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        for job in jobs:
            self.ran.append(job.label)
            done(job, job(), "")


def plan(folder: Path, **more: Any) -> Plan:
    made = study(**more)
    return Plan(made, Scale(), made.budget_of("tokens"), folder, None, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has been run."""
    path = tmp_path_factory.mktemp("toy")
    launcher = Here()
    with pytest.MonkeyPatch.context() as patch:
        make_brief(patch.setattr)
        assert run_plan(plan(path), launcher, Console(quiet=True)) == 0
    assert len(launcher.ran) == 8
    return path


def test_every_run_is_done_once_by_every_model_task_and_seed(folder: Path) -> None:
    records = [read_run(path) for path in sorted((folder / "runs").iterdir())]
    assert not [record.problems for record in records if record.problems]
    found = sorted((record.series, str(record.task), record.seed) for record in records)
    assert found == [(model.name, task, seed) for model in MODELS for task in TASKS for seed in (0, 1)]
    for record in records:
        assert [accuracy.length for accuracy in record.accuracies] == [8, 24]
        assert record.facts["fingerprint"] == find_task(str(record.task)).fingerprint
    launcher, said = Here(), io.StringIO()
    assert run_plan(plan(folder), launcher, Console(file=said)) == 0
    assert launcher.ran == []
    assert "8 were done before" in said.getvalue()


def test_the_report_has_the_numbers_of_the_runs(folder: Path, tmp_path: Path) -> None:
    report = make_report([folder])
    (section,) = report.sections
    assert report.is_of_tasks
    assert section.tables[0].columns == ["", "parity", "mqar"]
    assert [row[0] for row in section.tables[0].rows] == ["E1", "minGRU", "chance"]
    for table, place in ((section.tables[1], 0), (section.tables[0], 1)):
        for row in table.rows[:-1]:
            for task, told in zip(table.columns[1:], row[1:], strict=True):
                paths = (folder / "runs").glob(f"{row[0].lower()}-on-{task}-*")
                found = [json.loads((path / "summary.json").read_text())["accuracies"][place] for path in paths]
                values = [100 * (values["beyond"] if place else values["accuracy"]) for values in found]
                assert len(values) == 2
                assert told.startswith(f"{sum(values) / 2:.1f} ± ")
    assert section.tables[0].rows[-1] == ["chance", "50.0", "3.1"]
    page = report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| E1 | " in text
    assert "(accuracy-longest-tokens128.svg)" in text
    assert "constant guess" in text
    for picture in section.pictures:
        assert picture.uri in page.read_text()
        assert (tmp_path / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert main(["compare", *(str(path) for path in sorted((folder / "runs").iterdir())[:2])]) == 0


def test_an_accuracy_that_was_edited_is_left_out(folder: Path) -> None:
    path = sorted((folder / "runs").iterdir())[0] / "summary.json"
    before = path.read_text()
    summary = json.loads(before)
    try:
        for change, message in (
            (lambda found: found[1].update(accuracy=1.0), "says accuracy_24 1, its other files"),
            (lambda found: found.pop(), "has not the accuracies of its lengths"),
        ):
            changed = json.loads(before)
            change(changed["accuracies"])
            path.write_text(json.dumps(changed))
            assert message in read_run(path.parent).problems[0]
        del summary["accuracies"][0]["nats"]
        path.write_text(json.dumps(summary))
        assert "not as elman wrote them" in read_run(path.parent).problems[0]
        report: Report = make_report([folder])
        assert len(report.left_out) == 1
    finally:
        path.write_text(before)


def test_runs_of_other_options_or_examples_are_no_seeds_of_a_cell(folder: Path) -> None:
    records = [record for path in sorted((folder / "runs").iterdir()) if (record := read_run(path)).task == "parity"]
    again = [read_run(record.path) for record in records]
    for record in again:
        assert record.config is not None
        record.config = replace(record.config, weight_decay=0.5)
    name_apart([*records, *again])
    (section,) = task_sections([*records, *again])
    rows = [row[0] for row in section.tables[0].rows]
    assert rows == [f"{name}, weight_decay {value}" for value in (0.01, 0.5) for name in ("E1", "minGRU")] + ["chance"]
    other = [read_run(record.path) for record in records]
    for record in other:
        record.facts = {**record.facts, "fingerprint": "as it drew them once"}
    assert len(task_sections([*map(read_run, [record.path for record in records]), *other])) == 2


def test_the_verdict_says_what_was_solved_by_every_seed_and_no_more() -> None:
    def cell(*values: float) -> Cell:
        return Cell(values, 0.5)

    cells: Any = {
        ("a", "parity", "trained"): cell(1.0, 0.995, 1.0), ("a", "parity", "longest"): cell(1.0, 0.99, 1.0),
        ("b", "parity", "trained"): cell(1.0, 1.0, 1.0), ("b", "parity", "longest"): cell(1.0, 0.6, 0.5),
        ("c", "parity", "trained"): cell(0.9, 1.0, 0.98), ("c", "parity", "longest"): cell(0.5, 0.5, 0.4),
    }  # fmt: skip
    grid = Grid(("a", "b", "c"), ("parity",), (8, 80), cells)
    (line,) = (line for line in task_verdict(grid) if line.startswith("parity"))
    assert line == (
        "parity: solved past the training length by a; at the training length alone by b; past it by some seeds alone "
        "of b."
    )
    assert not any("fewer than three" in line for line in task_verdict(grid))
    assert cell(0.4).above_chance == 0
    assert cell(0.75).above_chance == 0.5
    few = Grid(("a",), ("parity",), (8, 80), {key: cell(1.0, 1.0) for key in cells if key[0] == "a"})
    assert any("fewer than three" in line for line in task_verdict(few))


def test_a_dry_run_tells_what_is_left(folder: Path) -> None:
    said = io.StringIO()
    show_plan(plan(folder, seeds=(0, 1, 2)), 2, "cpu", Console(file=said, width=200))
    text = said.getvalue()
    assert "4 runs and 0 of the sweep to do: about" in text
    assert text.count(" 4/6 ") == 2
    assert "judged by: the same 6 examples of each length, 8, 24" in text


def test_a_run_is_asked_for_by_its_model_or_its_task() -> None:
    for only, count in ((("E1",), 2), (("parity",), 2), (("E1 on mqar", "minGRU"), 3), ((), 4)):
        assert len(replace(plan(Path("nowhere")), only=frozenset(only)).accepted) == count


def test_learning_rates_of_tasks_are_chosen_by_a_sweep(tmp_path: Path) -> None:
    made = plan(tmp_path, learning_rates=(1e-3, 1e-2), seeds=(0,), runs=over_tasks(MODELS[:1], TASKS[:1]))
    launcher = Here()
    assert run_plan(made, launcher, Console(quiet=True)) == 0
    assert len(launcher.ran) == 3
    assert make_report([tmp_path]).sweep is not None


def test_a_default_that_is_given_is_no_other_run() -> None:
    model = study().model(study().runs[0])
    plain = TaskConfig(task="parity", steps=3)
    same = TaskConfig(task="parity", steps=3, eval_multiples=(1, 2, 4, 10), seq_len=40)
    assert identity(plain, model, "") == identity(same, model, "")
    others = [replace(plain, task="mod_3"), replace(plain, eval_multiples=(1, 2)), replace(plain, seq_len=41)]
    assert len({identity(config, model, "") for config in (plain, *others)}) == 4


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "tasks not named": ({"varies": ()}, "name task among varies"),
    "a task and a text": ({"runs": (*over_tasks(MODELS, ("s3",)), *MODELS)}, "some of its runs learn a task"),
    "an unknown task": ({"runs": over_tasks(MODELS, ("s4",))}, "TASK 's4' is unknown: did you mean s"),
    "an option of a text": ({"train": {"heldout": 0.1}}, "option of train, 'heldout', that is unknown"),
    "memory": ({"memory": 2**30, "varies": ("task", "batch_size")}, "equal memory is for studies of a text"),
    "a length too short": ({"train": {"seq_len": 3}}, "--train-length 3 is out of range for task mqar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_study_does_not_load(name: str) -> None:
    change, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message):
        study(**change)


def test_the_study_that_ships_has_every_task_and_runs_anywhere(tmp_path: Path) -> None:
    for scale in (Scale("full"), Scale("tiny")):
        made = find_study("state_tracking", scale)
        there = Plan(made, scale, made.budget_of("tokens"), tmp_path, None, "cpu")
        assert [row.refused for row in there.rows if row.refused] == []
        assert {run.task for run in made.runs} <= set(task_names())
    full = find_study("state_tracking", Scale())
    assert [task for task in task_names() if all(run.task != task for run in full.runs)] == []
    assert full.budget_of("tokens").end(full.model(full.runs[0]), 40, 64)["steps"] == 2000
