"""The benchmark of the training step, at toy sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from benchmarks.cases import Case
from benchmarks.train_step import SETTINGS, Options, Row, Setting
from elman.sizing import num_params
from elman.training.loop import Trainer

TINY = Options(seq_len=8, steps=3, loop_steps=100, device="cpu")
E1 = Setting("50m", Case("e1", depth=2), 2, dim=16, taken_apart=True)
MAMBA = Setting("50m", Case("mamba2", {"d_state": 8}, depth=1), 2, dim=16)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(train_step, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_every_setting_has_the_size_that_it_is_named_after() -> None:
    sizes = {"50m": 50e6, "launches": 50e6, "400m": 400e6}
    for setting in SETTINGS:
        # Mamba2 of 400M has the width and depth that others measured it at.
        assert num_params(setting.model()) == pytest.approx(sizes[setting.group], rel=0.04)
    models = {setting.label: setting.model() for setting in SETTINGS if setting.group != "launches"}
    assert (models["e1"].dim, models["e1"].depth) == (1280, 6)
    assert (models["e1 --depth 26"].dim, models["e1 --depth 26"].depth) == (1760, 26)
    assert num_params(models["e1 --depth 26"]) == pytest.approx(400e6, rel=0.02)
    with pytest.raises(AssertionError, match=r"not 400,000,000 within 2%"):
        replace(next(s for s in SETTINGS if s.wanted), dim=1664).model()


def test_rows_are_measured_taken_apart_and_written_as_soon_as_they_are_known(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []
    write = train_step.write_json

    def watch(name: str, value: dict[str, list[object]], *folders: Path | None) -> None:
        written.append(len(value["rows"]))
        write(name, value, *folders)

    monkeypatch.setattr(train_step, "write_json", watch)
    rows = train_step.main(TINY, [E1, MAMBA])
    assert written == [1, 1, 1, 2]
    e1, mamba2 = rows
    assert [row.note for row in rows] == ["", ""]
    for row in rows:
        assert row.tokens_per_second == pytest.approx(2 * 8 / row.ms_per_step * 1e3)
        assert row.captured is False
    assert e1.backends == {"reference": 2}
    assert {"products", "optimiser", "between operators"} <= {share["name"] for share in e1.shares}
    assert sum(share["part"] for share in e1.shares) == pytest.approx(1, abs=0.02)
    parts = {part["what"]: part["ms"] for part in e1.overheads}
    assert [*parts] == [
        *("data", "metrics", "statistics, every 100 steps", "checkpoint, every 1000 steps"),
        *("all of the loop but checkpoints", "a run's first checkpoint, once"),
    ]
    # The others are differences of two times.
    assert all(parts[name] > 0 for name in parts if name not in ("data", "all of the loop but checkpoints"))
    assert mamba2.shares == mamba2.overheads == []
    (file,) = results.iterdir()
    assert [Row(**row) for row in json.loads(file.read_text())["rows"]] == rows
    shown = capsys.readouterr().out
    assert shown.index("| model |") < shown.index("| part |") < shown.index("| beside the step |")


def test_failures_and_lack_of_time_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainer: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "warm_up", fail)
    assert [row.note for row in train_step.main(TINY, [E1])] == ["out of memory"]
    assert [row.note for row in train_step.main(replace(TINY, time_limit=0), [E1])] == ["not measured: out of time"]
    assert train_step.main(replace(TINY, groups=("400m",)), [E1]) == []
    (row,) = train_step.main(TINY, [replace(E1, graph="on")])
    assert row.note.startswith("--graph on: a CUDA graph needs an NVIDIA GPU")


def test_tables_and_aims() -> None:
    def row(model: str, group: str, speed: float, **more: object) -> Row:
        known = {"dim": 64, "depth": 6, "params": 10, "ms_per_step": 2.0, "peak_gib": 3.0, "start_up_seconds": 4.0}
        return Row(model, group, 256, tokens_per_second=speed, **{**known, **more})  # type: ignore[arg-type]

    rows = [
        row("e1", "50m", 1.9e6, mfu=0.4, backends={"persistent": 6}, compiled=True, captured=True),
        row("e1 --compile off", "50m", 1e6),
        row("mamba2 --depth 12", "50m", 0.3e6),
        row("transformer --depth 10", "50m", 1.5e6),
        row("e1 --depth 26", "400m", 1e5, overheads=[{"what": "data", "ms": 0.1, "part": 0.05}]),
        Row("e5", "launches", 256, note="out of memory"),
    ]
    table = train_step.speed_table(rows).splitlines()
    assert (
        table[2]
        == "| e1 | 64 × 6 | 10 | 256 | 2.00 | 1,900,000 | 40.0% | 3.0 | 4 | 6 × persistent, compiled, captured |"
    )
    assert table[-1] == "| e5 | - | - | 256 | out of memory |  |  |  |  |  |"
    assert train_step.aims(rows) == [
        "met: e1, 50m: 1,900,000 tokens/s, aim 1,800,000",
        "met: e1, 50m: 6.33 × mamba2, aim 6.0",
        "MISSED: e1, 50m: 1.27 × transformer, aim 1.5",
        "MISSED: e1, 400m: 100,000 tokens/s, aim 170,000",
        "MISSED: e1 --depth 26, 400m: data 5.00%, aim < 1%",
    ]
    assert "| data | 0.100 | 5.00% |" in train_step.overhead_table(rows)
