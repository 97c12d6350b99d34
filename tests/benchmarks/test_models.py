"""The benchmark of all models, at toy sizes: its rows, its tables, and what it does when a model fails."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.cases import all_cases, choose_cases
from benchmarks.models import Options, Row
from elman.errors import UsageError
from elman.mixers import mixer_config, mixer_names
from elman.training.loop import Trainer

TINY = {"batch_sizes": (1, 2), "params": 100_000, "seq_len": 4, "steps": 2, "jobs": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_every_variant_is_a_case_and_can_be_sized() -> None:
    assert set(mixer_names()) <= {case.pattern for case in all_cases()}
    for case in all_cases():
        assert case.size(50_000_000).depth == (case.depth or 6)
    assert not any("--kernels" in case.label for case in all_cases(speed=False))


def test_cases_are_chosen_by_pattern() -> None:
    labels = ["e4", "e4 --expansion 1.0", "e4 --expansion 4.0", "e0,e1", "rnn", "rnn --kernels elman"]
    assert [case.label for case in choose_cases(["4", "e0,1", "rnn"])] == labels
    (case,) = choose_cases(["elman"])
    assert (case.label, case.mixers()[0]) == ("elman", mixer_config("matrix")(conv=4, bound=4.0))
    assert [case.label for case in choose_cases(["matrix,1"])] == ["matrix,e1"]
    with pytest.raises(UsageError, match="e99"):
        choose_cases(["e99"])


def test_a_run_measures_what_it_can_and_says_what_it_cannot(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up = Trainer.warm_up

    def fail(trainer: Trainer) -> None:
        if trainer.model_config.pattern == "e15":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        warm_up(trainer)

    monkeypatch.setattr(Trainer, "warm_up", fail)
    options = Options(models=("e15", "e0", "e0,mingru"), out=tmp_path / "out", **TINY)
    rows = models.main(options)
    assert [(row.model, row.batch_size) for row in rows] == [
        (model, size) for model in ("e15", "e0", "e0,mingru") for size in (1, 2)
    ]
    assert [row.note for row in rows] == ["out of memory"] * 2 + [""] * 4
    for row in rows[2:]:
        assert row.steps == 2
        assert row.params == pytest.approx(100_000, rel=0.02)
        assert row.tokens_per_second == pytest.approx(row.batch_size * 4 / row.ms_per_step * 1e3)
        assert row.peak_gib is not None
        assert row.peak_gib > 0
    assert rows[2].backends == {"reference": 6}
    assert rows[4].backends == {"reference": 3, "scan": 3}
    (written,) = results.iterdir()
    assert written.read_text() == (tmp_path / "out" / written.name).read_text()
    found = json.loads(written.read_text())
    assert [Row(**row) for row in found["rows"]] == rows
    assert found["seq_len"] == 4


def test_a_run_out_of_time_says_so() -> None:
    rows = models.main(Options(models=("e0",), time_limit=0.0, **TINY))
    assert [row.note for row in rows] == ["not measured: out of time"] * 2


def row(model: str, tokens_per_second: float | None, **more: object) -> Row:
    given = {"ms_per_step": 1.0, "peak_gib": 2.0, "dim": 64, "depth": 6, "params": 10, "state": 3}
    return Row(model, 64, tokens_per_second=tokens_per_second, **{**given, **more})


def test_the_tables_tell_ratios_failures_and_loops() -> None:
    rows = [
        row("e1", 100.0, backends={"persistent": 6}, launches=90),
        row("log_1", 2.0, backends={"reference": 6}),
        row("e4", None, ms_per_step=None, note="out of memory"),
        row("rnn", 50.0, backends={"loop": 6}, kernels=[{"name": "void step_forward<Tanh, bf16, 2>(x)", "calls": 9}]),
    ]
    speeds = models.speed_table(rows).splitlines()
    assert speeds[2] == "| e1 | 64 × 6 | 10 | 3 | 100 | 1.00 | 2.0 |"
    assert speeds[4] == "| e4 | 64 × 6 | 10 | 3 | out of memory |  |  |"
    assert "| 50 | 0.50 |" in speeds[5]
    paths = models.path_table(rows).splitlines()
    assert paths[2:] == [
        "| e1 | 64 | 6 × persistent | 90 | - | no |",
        "| log_1 | 64 | 6 × reference | not profiled | - | yes, of PyTorch's operations |",
        "| rnn | 64 | 6 × loop | not profiled | 9 × step_forward | a product and a kernel a step |",
    ]


def test_aims_are_met_or_missed_or_left_out() -> None:
    rows = [row("e1", 100.0), row("e10", 70.0), row("e15", 98.0), row("ladder_3", 120.0), row("mamba2", 75.0)]
    lines = models.aims(rows)
    assert "MISSED: e10, B = 64: 0.700 × e1, aim at least 0.75" in lines
    assert "met: e15, B = 64: 0.980 × e1, aim 0.97 to 1.03" in lines
    assert "met: ladder_3, B = 64: 1.200 × e1, aim at least 1.0" in lines
    assert "MISSED: e10, B = 64: 0.933 × mamba2, aim at least 1.0" in lines
    assert not any("e4" in line or "ladder_6" in line for line in lines)
