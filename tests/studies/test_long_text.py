"""Long text in a report: each run's newest evaluation, only what was read alike, nothing dropped without a word."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from elman.studies import figures
from elman.studies.pack import pack
from elman.studies.report import make_report
from elman.training.run import RunFolder
from tests.studies.made import make_evaluation, make_run


def test_seeds_are_put_together_and_labels_side_by_side(tmp_path: Path) -> None:
    for seed, losses in enumerate([{64: 2.0, 4096: 3.0}, {64: 2.2, 1024: 9.0, 4096: 3.4}]):
        make_evaluation(make_run(tmp_path / "toy" / "runs" / f"a{seed}", "a", seed=seed), losses)
    make_evaluation(make_run(tmp_path / "toy" / "runs" / "b", "b"), {64: 1.9, 4096: 1.8}, carried=None)
    report = make_report([tmp_path / "toy"])
    comparison, section = report.sections
    assert comparison.title.startswith("At ")
    assert section.title == "Long text after 12.8K tokens: 5,000 bytes of text"
    (table,) = section.tables
    assert table.columns == ["run", "seeds", "windows", "carried", "64", "4,096"]
    assert table.rows == [
        ["a", "2", "1.5000", "1.5000", "2.1000", "3.2000"],
        ["b", "1", "1.5000", "–", "1.9000", "1.8000"],
    ]
    assert "the same 512 bytes of text" in section.verdict[0]
    assert (
        section.verdict[1] == "a: 2.1000 nats a byte after 64, 3.2000 after 4,096 (+1.1000); lowest after 64, 2.1000."
    )
    report.write(tmp_path / "out")
    assert (tmp_path / "out" / "contexts-1.png").read_bytes().startswith(b"\x89PNG")
    assert "](contexts-1.svg)" in (tmp_path / "out" / "report.md").read_text()


def test_the_newest_with_contexts_counts_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "toy" / "runs" / "a", "a")
    make_evaluation(run, {64: 2.0}, "20260101-000000")
    make_evaluation(run, {64: 1.0}, "20260102-000000")
    make_evaluation(run, {}, "20260103-000000")
    make_evaluation(run, {64: 0.5}, "20260104-000000").write_text('{"contexts": [{"context": 64, "tok')
    make_evaluation(run, {64: float("nan")}, "20260105-000000")
    report = make_report([tmp_path / "toy"])
    assert report.sections[-1].tables[0].rows == [["a", "1", "1.5000", "1.5000", "1.0000"]]
    told = [remark for _, remark in report.remarks]
    assert len(told) == 2
    assert "its eval-20260105-000000/eval.json is not as elman wrote it, and is left out" in told[0]
    assert "its eval-20260104-000000/eval.json" in told[1]


def test_what_is_rounding_looks_like_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that zooms in on the last bits shows a model that forgets, where context does nothing at all."""
    drawn: list[Figure] = []
    both = figures._both
    monkeypatch.setattr(figures, "_both", lambda figure: (drawn.append(figure), both(figure))[1])
    make_evaluation(make_run(tmp_path / "toy" / "runs" / "a", "a"), {64: 2.0, 128: 2.000001})
    make_report([tmp_path / "toy"])
    low, high = drawn[-1].axes[0].get_ylim()
    assert 1.019 < high / low < 1.021
    assert low < 2.0 < high
    make_evaluation(make_run(tmp_path / "other" / "runs" / "a", "a"), {64: 2.0, 128: 3.0})
    make_report([tmp_path / "other"])
    low, high = drawn[-1].axes[0].get_ylim()
    assert 1.9 < low < 2.0 < 3.0 < high < 3.1


def test_other_budgets_and_other_targets_are_not_compared(tmp_path: Path) -> None:
    """Which tokens are predicted depends on the longest context."""
    runs = {
        "a": ({64: 2.0, 128: 2.0}, 12_800),
        "b": ({64: 2.0, 256: 2.0}, 12_800),
        "c": ({32: 2.0, 128: 2.0}, 12_800),
        "d": ({64: 2.0, 128: 2.0}, 25_600),
    }
    for name, (contexts, amount) in runs.items():
        budget = {"kind": "tokens", "amount": amount}
        make_evaluation(make_run(tmp_path / "toy" / "runs" / name, name, budget=budget), contexts)
    sections = [s for s in make_report([tmp_path / "toy"]).sections if s.title.startswith("Long text")]
    assert [[row[0] for row in section.tables[0].rows] for section in sections] == [["a", "c"], ["b"], ["d"]]


def test_other_texts_are_not_compared(tmp_path: Path) -> None:
    for name, file in (("a", "/some/text"), ("b", "/other/text"), ("c", "/some/prose")):
        make_evaluation(make_run(tmp_path / "toy" / "runs" / name, name), {64: 2.0}, file=file)
    sections = make_report([tmp_path / "toy"]).sections[1:]
    assert [[row[0] for row in section.tables[0].rows] for section in sections] == [["a", "b"], ["c"]]
    assert [section.pictures[0].name for section in sections] == ["contexts-1", "contexts-2"]


def test_two_texts_of_one_name_and_size_are_not_compared(tmp_path: Path) -> None:
    for name, told in (("a", "0123"), ("b", "4567"), ("c", "0123")):
        path = make_evaluation(make_run(tmp_path / "toy" / "runs" / name, name), {64: 2.0})
        found = json.loads(path.read_text())
        found["data"]["sha256"] = told
        path.write_text(json.dumps(found))
    sections = make_report([tmp_path / "toy"]).sections[1:]
    assert [[row[0] for row in section.tables[0].rows] for section in sections] == [["a", "c"], ["b"]]


def test_it_is_packed_without_the_machine_s_paths(tmp_path: Path) -> None:
    path = make_evaluation(make_run(tmp_path / "toy" / "runs" / "a", "a"), {64: 2.0})
    pack(tmp_path / "toy", tmp_path / "packed", 20)
    packed = tmp_path / "packed" / path.relative_to(tmp_path / "toy")
    found, saved = (json.loads(there.read_text()) for there in (packed, path))
    assert found["environment"]["command"] == ["elman", "eval", "a"]
    assert found["data"]["file"] == "text"
    assert found["contexts"] == saved["contexts"]
    before, after = (make_report([tmp_path / name]).sections[-1] for name in ("toy", "packed"))
    assert after.tables == before.tables


@pytest.mark.parametrize("lines", [30, 1000])
def test_equal_tokens_of_runs_that_had_unequal_numbers(tmp_path: Path, lines: int) -> None:
    budget = {"kind": "time", "amount": 10}
    runs = [
        make_run(tmp_path / "toy" / "runs" / name, name, steps=steps, heldout=loss, budget=budget, speed=speed)
        for name, steps, loss, speed in (("slow", 300, 2.0, 1920.0), ("fast", 900, 1.0, 5760.0))
    ]
    pack(tmp_path / "toy", tmp_path / "packed", lines)
    (section,) = make_report([tmp_path / "packed"]).sections
    _, _, table = section.tables
    assert "19.2K tokens, where slow ended" in table.caption
    losses = [[row["loss"] for row in RunFolder(run.path).read_metrics() if "loss" in row] for run in runs]
    slow, fast = (sum(found[200:300]) / 100 for found in losses)
    assert table.rows == [["fast", "57.6K", f"{fast:.3f}", ""], ["slow", "19.2K", f"{slow:.3f}", f"{slow - fast:.3f}"]]


def test_a_row_whose_loss_there_is_unknown_is_shown_without_it(tmp_path: Path) -> None:
    budget = {"kind": "time", "amount": 10}
    a, b = (
        make_run(tmp_path / "toy" / "runs" / name, name, steps=n, budget=budget) for name, n in (("a", 300), ("b", 400))
    )
    lines = b.metrics_file.read_text().splitlines(keepends=True)
    b.metrics_file.write_text("".join(lines[200:]))
    (section,) = make_report([tmp_path / "toy"]).sections
    assert section.tables[2].rows == [["a", "19.2K", f"{a.read_json('summary.json')['last_100_loss']:.3f}", ""],
                                      ["b", "25.6K", "–", "–"]]  # fmt: skip


def test_equal_tokens_are_no_news_of_runs_that_had_as_many(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / "toy" / "runs" / name, name)
    (section,) = make_report([tmp_path / "toy"]).sections
    assert len(section.tables) == 2
