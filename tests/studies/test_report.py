"""The report: everything on one page, from folders alone, and nothing dropped without a word."""

import re
import shutil
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elman.cli import main
from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.sizing import num_params, size_model
from elman.studies import figures
from elman.studies.report import make_report
from elman.training.run import RunFolder
from tests.studies.made import change, make_run, make_study

LOSSES = {"a": [2.0, 2.01, 2.02], "b": [2.5, 2.51, 2.53]}


def test_a_page_needs_no_other_file(tmp_path: Path) -> None:
    report = make_report([make_study(tmp_path / "toy", LOSSES)])
    page = report.write(tmp_path / "out")
    html = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in html
    assert "Which is it?" in html
    for value in ("2.0100 ± 0.0100", "25.0%", "1.0 GiB", "NVIDIA H100 80GB HBM3", "2.13.0"):
        assert value in html, value
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in re.findall(r"\]\(([^)]+\.svg)\)", markdown):
        assert (tmp_path / "out" / name).read_text().rstrip().endswith("</svg>")
    assert "| a | 16 × 2 |" in markdown


def test_it_is_the_same_again_from_a_copy_of_the_folders(tmp_path: Path) -> None:
    make_study(tmp_path / "toy", LOSSES)
    first = make_report([tmp_path / "toy"])
    shutil.copytree(tmp_path / "toy" / "runs", tmp_path / "copy" / "runs")
    again = make_report([tmp_path / "copy"])
    assert first.html().replace(str(tmp_path / "toy"), "") == again.html().replace(str(tmp_path / "copy"), "")


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", LOSSES, refused={"c": "no width fits"}, planned=["a", "b", "c", "d"])
    (study / "runs" / "a-seed0" / "summary.json").unlink()
    change_run = study / "runs" / "b-seed1"
    (change_run / "config.json").write_text("{")
    (study / "runs" / "nothing").mkdir()
    report = make_report([study])
    told = dict(report.left_out)
    assert told["c"] == "refused: no width fits"
    assert told["d"] == "planned, and not there: seed 0, 1, 2"
    assert "did not reach its end" in told["a (a-seed0)"]
    assert "config.json is not as elman train wrote it" in told["b (b-seed1)"]
    for text in (report.html(), report.markdown()):
        assert "no width fits" in text
        assert "planned, and not there" in text
    (section,) = report.sections
    assert [row[5] for row in section.tables[0].rows] == ["2", "2"]


def test_a_missing_number_that_is_not_needed_is_a_dash(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", {"a": [2.0]})
    change(RunFolder(study / "runs" / "a-seed0"), "summary.json", mfu=None)
    (section,) = make_report([study]).sections
    assert section.tables[1].rows[0][section.tables[1].columns.index("MFU")] == "–"


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    make_run(tmp_path / "toy" / "runs" / "1", "<b>a|b</b>")
    report = make_report([tmp_path / "toy"])
    assert "<b>a|b" not in report.html()
    assert "<b>a\\|b</b>" in report.markdown()


def test_sizes_are_compared_each_with_its_own_and_fitted_together(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    for dim in (16, 24, 32):
        for label, shift in (("a", 0.0), ("b", 0.1)):
            params = num_params(size_model((mixer_config("e1")(),), dim=dim, depth=2))
            make_run(
                folder / "runs" / f"{label}-{dim}", f"{label} {dim}", dim=dim, heldout=5 * params**-0.1 + shift,
                varies=["params"], axis="params", series=label, target_params=params,
            )  # fmt: skip
    report = make_report([folder])
    assert len(report.sections) == 3
    assert all(len(section.tables[0].rows) == 2 for section in report.sections)
    assert "a: loss goes as N^-0.100 ± 0.000" in report.laws[0]
    assert [picture.name for picture in report.across] == ["loss-tokens12800-params"]


def test_throughput_is_drawn_against_the_batch(tmp_path: Path) -> None:
    make_run(tmp_path / "toy" / "runs" / "1", "a", axis="batch_size", varies=["batch_size"])
    report = make_report([tmp_path / "toy"])
    assert [picture.name for picture in report.across] == [
        "loss-tokens12800-batch_size",
        "speed-tokens12800-batch_size",
    ]


def test_runs_of_several_studies_and_none_at_all_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "1", "a")
    make_run(tmp_path / "x" / "2", "a", study="other")
    with pytest.raises(UsageError, match=r"of several studies \(other, toy\)"):
        make_report([tmp_path / "x"])


def test_any_runs_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (make_run(tmp_path / name, None, lr=lr).path for name, lr in (("x", 1e-3), ("y", 2e-3)))
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    assert "e1 16 × 2, lr 0.001" in (tmp_path / "out" / "report.md").read_text()
    (first / "summary.json").unlink()
    (second / "summary.json").unlink()
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "out")]) == 1
    assert "No run can be compared" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "none")]) == 2
    assert "RUN is missing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    assert main(["report", str(first), "--out", str(tmp_path / "file")]) == 2
    assert "file is a file: give the name of a folder" in capsys.readouterr().err


def test_a_study_that_was_changed_and_run_again_mixes_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", {"a": [2.0, 2.1]})
    for seed in (0, 1):
        make_run(study / "runs" / f"again-{seed}", "a", seed=seed, lr=3e-3, heldout=1.9 + seed / 10)
    (section,) = make_report([study]).sections
    assert [(row[0], row[5]) for row in section.tables[0].rows] == [("a, lr 0.003", "2"), ("a, lr 0.001", "2")]


def test_of_runs_that_were_picked_nobody_misses_the_others(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", LOSSES, planned=["a", "b", "c"])
    picked = [study / "runs" / name for name in ("a-seed0", "b-seed0")]
    assert make_report(picked).left_out == []
    assert [label for label, _ in make_report([study]).left_out] == ["c"]
    (picked[0] / "config.json").unlink()
    report = make_report(picked)
    assert report.runs[0][1:3] == ["–", "–"]
    assert "no config.json" in dict(report.left_out)["a (a-seed0)"]


def test_a_swept_option_that_no_run_has_stops_no_report(tmp_path: Path) -> None:
    make_study(tmp_path / "toy", LOSSES, sweep={"warmup": [20, 40], "nonsense": [1]})
    (section,) = make_report([tmp_path / "toy"]).sections
    assert section.tables[0].columns[5:7] == ["--warmup", "--nonsense"]
    assert [row[5:7] for row in section.tables[0].rows] == [["20", "–"]] * 2


def test_a_seed_counts_once(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", LOSSES)
    shutil.copytree(study / "runs" / "a-seed0", study / "runs" / "a-seed0-copy")
    make_run(study / "runs" / "b-seed1-again", "b", seed=1, heldout=2.4)
    report = make_report([study])
    assert [row[5] for row in report.sections[0].tables[0].rows] == ["3", "3"]
    assert report.left_out == [
        ("a (a-seed0-copy)", "it is of the same seed as a-seed0, and a seed counts once"),
        ("b (b-seed1-again)", "it is of the same seed as b-seed1, and a seed counts once"),
    ]


def test_losses_on_several_texts_are_not_fitted_together(tmp_path: Path) -> None:
    for text, shift in (("one", 0.0), ("two", 1.0)):
        for dim in (16, 24, 32):
            params = num_params(size_model((mixer_config("e1")(),), dim=dim, depth=2))
            make_run(
                tmp_path / "toy" / "runs" / f"{text}-{dim}", f"a {dim}", dim=dim, heldout=5 * params**-0.1 + shift,
                varies=["params"], axis="params", fingerprint=text,
            )  # fmt: skip
    report = make_report([tmp_path / "toy"])
    assert len(report.laws) == 2
    assert "N^-0.100 ± 0.000" in report.laws[0]
    assert [section.title.partition(", judged by ")[2] for section in report.sections] == [
        f"text ({name}), --heldout 0.05, --eval-bytes 1m" for name in ("one", "two")
    ]
    names = [picture.name for picture in report.across]
    assert names == ["loss-tokens12800-params-1", "loss-tokens12800-params-2"]


def test_losses_of_unlike_tokens_are_not_put_beside_each_other(tmp_path: Path) -> None:
    for name, tokenizer in (("a", None), ("b", "gpt2")):
        make_run(
            tmp_path / name, name, speed=1000.0 if tokenizer else 500.0, steps=400 if tokenizer else 200,
            budget={"kind": "time", "amount": 25.6}, train={"tokenizer": tokenizer}, varies=["tokenizer"],
        )  # fmt: skip
    (section,) = make_report([tmp_path]).sections
    assert len(section.tables) == 2


def test_long_names_are_whole_in_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "_svg", lambda figure: drawn.append(figure) or "")
    make_study(tmp_path / "toy", {f"a rather long name of a run, number {i}, with options": [2.0] for i in range(6)})
    make_report([tmp_path / "toy"])
    assert len(drawn) == 2
    for figure in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        for text in (*legends, *(axes.xaxis.label for axes in figure.axes)):
            box = text.get_window_extent(canvas.get_renderer())
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text.get_text()
