"""Runs are read from their folders alone, and what does not add up is said, never believed and never dropped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elman.errors import UsageError
from elman.studies.compare import compare_runs
from elman.studies.records import name_apart, read_run, run_folders
from elman.studies.report import make_report
from elman.training.run import RunFolder
from tests.studies.made import change, diverge, make_run


def test_a_whole_run_has_no_problems(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", "a", heldout=2.5).path)
    assert record.problems == record.remarks == []
    assert (record.label, record.nats, record.seed, record.lr) == ("a", 2.5, 0, 1e-3)
    assert record.budget == ("tokens", 12_800.0)
    assert record.train_flops == 3 * record.summary["flops_per_token"] * 12_800
    assert record.device == "NVIDIA H100 80GB HBM3"
    assert record.start_up_seconds == 7.0


def _edit(name: str, **values: Any) -> Any:
    return lambda run: change(run, name, **values)


def _cut_summary(run: RunFolder) -> None:
    (run.path / "summary.json").unlink()


def _half_summary(run: RunFolder) -> None:
    (run.path / "summary.json").write_text((run.path / "summary.json").read_text()[:40])


def _cut_metrics(run: RunFolder) -> None:
    run.metrics_file.write_text("".join(run.metrics_file.read_text().splitlines(True)[:50]))


def _other_seed(run: RunFolder) -> None:
    config = run.read_json("config.json")
    config["train"]["seed"] = 7
    run.write_json("config.json", config)


def _other_width(run: RunFolder) -> None:
    config = run.read_json("config.json")
    config["model"]["dim"] = 24
    run.write_json("config.json", config)


def _folder_for(name: str) -> Any:
    def spoil(run: RunFolder) -> None:
        (run.path / name).unlink()
        (run.path / name).mkdir()

    return spoil


def _line(**values: Any) -> Any:
    """Edit the metrics of the sixth step."""

    def spoil(run: RunFolder) -> None:
        lines = run.metrics_file.read_text().splitlines()
        lines[5] = json.dumps({**json.loads(lines[5]), **values})
        run.metrics_file.write_text("\n".join(lines) + "\n")

    return spoil


DAMAGE = {
    "diverged": (diverge, "did not reach its end: 210 steps, 13s; its last steps were skipped.*: it diverged"),
    "cut after a skipped step": (lambda run: diverge(run, 1), "did not reach its end: 201 steps.*go on with it"),
    "no time at all": (_edit("summary.json", train_seconds=0), "says train_seconds 0, which cannot be"),
    "less than no time": (
        _edit("summary.json", train_seconds=-1.0, tokens_per_second=-12800.0),
        "says train_seconds -1, which cannot be",
    ),
    "less time, at a higher speed": (
        _edit("summary.json", train_seconds=1.28, tokens_per_second=10_000.0),
        "says train_seconds 1.28, its other files 12.8",
    ),
    "another window": (_edit("summary.json", seq_len=32), "says seq_len 32, its other files 16"),
    "a folder for a summary": (_folder_for("summary.json"), "not as elman wrote them .IsADirectoryError"),
    "a folder for metrics": (_folder_for("metrics.jsonl"), "not as elman wrote them .IsADirectoryError"),
    "not finished": (_cut_summary, "did not reach its end: 200 steps"),
    "half a summary": (_half_summary, "summary.json is damaged"),
    "a summary that is a list": (lambda run: run.write_json("summary.json", [1]), "did not reach its end"),
    "a better loss": (_edit("summary.json", last_100_loss=1.0), "says last_100_loss 1, its other files 2"),
    "a better held-out loss": (
        _edit("summary.json", heldout={"nats_per_byte": 1.0}),
        "says heldout 1.44.*, its other files 2.88.*: one was edited",
    ),
    "a higher speed": (_edit("summary.json", tokens_per_second=1e6), "says tokens_per_second 1000000, .*1000"),
    "fewer parameters": (_edit("summary.json", params=12), "says params 12"),
    "more tokens": (_edit("summary.json", tokens=10**9), "says tokens 1e.09"),
    "a missing number": (_edit("summary.json", peak_memory_bytes=...), "no number for peak_memory_bytes"),
    "a number that is none": (_edit("summary.json", last_100_loss=float("nan")), "no number for last_100_loss"),
    "no held-out loss": (_edit("summary.json", heldout=...), "no held-out loss"),
    "metrics cut short": (_cut_metrics, "summary.json says steps 200, its other files 50"),
    "no metrics": (lambda run: run.metrics_file.unlink(), "has no metrics.jsonl"),
    "another seed": (_other_seed, "config.json says seed 7, and it was begun with 0"),
    "another width": (_other_width, "config.json has another model than it was begun with"),
    "another text": (_edit("study.json", fingerprint="other"), "study.json was changed after it was written"),
    "another role": (_edit("study.json", role="sweep"), "study.json was changed after it was written"),
    "no config": (lambda run: (run.path / "config.json").unlink(), "no config.json"),
    "half a config": (lambda run: (run.path / "config.json").write_text("{"), "config.json is not as elman train"),
    "no environment": (lambda run: (run.path / "env.json").unlink(), "no env.json"),
    "an odd environment": (
        lambda run: run.write_json("env.json", [{"backends": 5}]),
        "env.json is not as elman wrote it: backends is 5",
    ),
    "odd packages": (_edit("env.json", packages=[1]), r"env.json is not as elman wrote it: packages is \[1\]"),
    "an odd budget": (_edit("study.json", budget={"kind": "x"}), "study.json is not as elman wrote it: budget is"),
    "odd lines of a study": (_edit("study.json", held_equal=None), "not as elman wrote it: held_equal is None"),
    "an odd loss": (_edit("summary.json", heldout=["a"]), "no held-out loss"),
    "a slow path": (_edit("env.json", backends=["torch"]), r"slow path of that GPU \(torch\)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    spoil, message = DAMAGE[name]
    run = make_run(tmp_path / "run")
    spoil(run)
    record = read_run(run.path)
    assert record.problems
    assert re.search(message, "; ".join(record.problems)), record.problems
    # Nor does what is read of it stop what puts it beside a whole one.
    other = make_run(tmp_path / "other", seed=1)
    assert compare_runs(run.path, other.path, Console(quiet=True)) == 0
    assert make_report([run.path, other.path]).sections


def test_lost_lines_are_remarked_and_what_is_left_still_compares(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = run.metrics_file.read_text().splitlines(True)
    lines[20] = lines[20][:9] + "\n"
    run.metrics_file.write_text("".join(lines))
    record = read_run(run.path)
    assert record.problems == []
    assert record.remarks == [
        "1 line(s) of its metrics.jsonl cannot be read and are left out",
        "1 step(s) are missing from its metrics.jsonl",
    ]


@pytest.mark.parametrize(
    "values", [{"loss": "low"}, {"loss": [1]}, {"loss": float("nan")}, {"seconds": float("inf")}, {"step": 10**400}]
)
def test_a_line_whose_numbers_are_none_is_left_out(values: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _line(**values)(run)
    assert read_run(run.path).remarks[0] == "1 line(s) of its metrics.jsonl cannot be read and are left out"
    assert make_report([run.path]).sections


def test_a_lost_line_is_no_excuse_for_an_edited_summary(tmp_path: Path) -> None:
    for name, values in (("loss", {"heldout": {"nats_per_byte": 1.0}}), ("last", {"last_100_loss": 1.0})):
        run = make_run(tmp_path / name)
        _line(seconds=None)(run)
        change(run, "summary.json", **values)
        assert "one was edited" in read_run(run.path).problems[0]


def test_steps_that_are_there_twice_are_remarked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = run.metrics_file.read_text().splitlines(True)
    run.metrics_file.write_text("".join(lines[:50] + lines))
    assert read_run(run.path).remarks == ["50 step(s) are in its metrics.jsonl more than once"]


def test_a_run_off_its_size_is_not_compared(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", target_params=10_000).path)
    assert "more than 2% off 10K" in record.problems[0]


def test_options_that_elman_gains_later_are_no_change(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = run.read_json("config.json")
    del config["train"]["wandb"]  # as an elman that knew of none wrote it, but for this
    config["train"]["profile"] = True
    run.write_json("config.json", config)
    assert read_run(run.path).problems == []


def test_skipped_steps_and_new_starts_are_remarked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change(run, "summary.json", skipped_steps=3)
    run.write_json("env.json", run.read_json("env.json") * 2)
    assert read_run(run.path).remarks == ["3 of its steps were skipped, not being finite", "it was started 2 times"]
    assert read_run(run.path).start_up_seconds == 14.0


def test_two_kinds_of_device_are_no_measure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (session,) = run.read_json("env.json")
    run.write_json("env.json", [session, {**session, "gpu": "NVIDIA L4"}])
    assert "several kinds of device (NVIDIA H100 80GB HBM3, NVIDIA L4)" in read_run(run.path).problems[0]


def test_a_study_stands_for_its_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "study" / "runs" / "a").path
    second = make_run(tmp_path / "study" / "sweep" / "b").path
    (tmp_path / "study" / "logs").mkdir()
    assert run_folders([tmp_path / "study"]) == [first, second]
    assert run_folders([first, tmp_path / "study"]) == [first, second]
    with pytest.raises(UsageError, match=r"nowhere: no such folder"):
        run_folders([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="holds no runs"):
        run_folders([tmp_path / "study" / "logs"])


def test_runs_of_no_study_are_told_apart_by_their_options(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{lr}-{seed}", None, lr=lr, seed=seed).path for lr in (1e-3, 3e-3) for seed in (0, 1)]
    records = [read_run(path) for path in runs]
    name_apart(records)
    assert [record.label for record in records] == ["e1 16 × 2, lr 0.001"] * 2 + ["e1 16 × 2, lr 0.003"] * 2
