"""The benchmark of several GPUs, at toy sizes on two processes of a CPU."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import distributed
from benchmarks.distributed import Options, Row
from elman.errors import UsageError

TINY = {"cases": ("16x2x2",), "seq_len": 8, "steps": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(distributed, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_ranks_are_started_measured_and_written(results: Path, tmp_path: Path) -> None:
    rows = distributed.main(Options(gpus=(2,), parallel=("fsdp",), out=tmp_path / "out", **TINY))  # type: ignore[arg-type]
    assert [(row.gpus, row.parallel, row.note) for row in rows] == [(1, "none", ""), (2, "fsdp", ""), (1, "none", "")]
    for row in rows:
        assert row.ms_per_step is not None
        assert row.tokens_per_second == pytest.approx(row.gpus * 2 * 8 / row.ms_per_step * 1e3)
        assert row.peak_gib is not None
        assert row.peak_gib > 0
        assert (row.link_gb_per_second is not None) == (row.gpus > 1)
    assert rows[1].link_gb_per_second is not None
    assert rows[1].link_gb_per_second > 0
    (written,) = results.iterdir()
    assert written.read_text() == (tmp_path / "out" / written.name).read_text()
    found = json.loads(written.read_text())["rows"]
    assert found[1]["efficiency"] == pytest.approx(distributed.efficiency(rows[1], rows))


def test_what_fails_or_comes_too_late_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "plan", lambda options: [Row("100000x8x2", 1, "none")])
    (row,) = distributed.main(Options(**TINY))  # type: ignore[arg-type]
    assert "a model of" in row.note
    assert "give a smaller" in row.note
    (late,) = distributed.main(Options(time_limit=0.0, **TINY))  # type: ignore[arg-type]
    assert late.note == "not measured: out of time"
    with pytest.raises(UsageError, match="--cases '12x6' is no WIDTHxDEPTHxWINDOWS"):
        distributed.sizes("12x6")


def test_the_first_complaint_is_the_cause() -> None:
    torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert (
        distributed.complaint(f"[rank1]: Traceback\n[rank1]: ValueError: no\nelman: lost\n{torchrun}")
        == "ValueError: no"
    )
    assert (
        distributed.complaint(f"  x = 1\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n{torchrun}")
        == "out of memory"
    )
    assert distributed.complaint(torchrun) == ""


def test_the_plan_has_a_single_gpu_before_and_after() -> None:
    rows = [(row.case, row.gpus, row.parallel) for row in distributed.plan(Options(gpus=(1, 4), cases=("1x1x1",)))]
    both = [("1x1x1", gpus, parallel) for gpus in (1, 4) for parallel in ("ddp", "fsdp")]
    assert rows == [("1x1x1", 1, "none"), *both, ("1x1x1", 1, "none")]


def test_efficiency_is_of_as_many_single_gpus() -> None:
    rows = [Row("a", 1, "none", tokens_per_second=90.0), Row("a", 4, "ddp", tokens_per_second=380.0)]
    rows += [Row("a", 1, "none", tokens_per_second=110.0), Row("b", 4, "ddp", tokens_per_second=1.0)]
    assert distributed.efficiency(rows[1], rows) == pytest.approx(0.95)
    assert math.isnan(distributed.efficiency(rows[3], rows))
    for row in rows[:3]:
        row.ms_per_step = row.peak_gib = 1.0
    rows[1].link_gb_per_second = 123.4
    failed = Row("a", 2, "fsdp", note="out of memory")
    lines = distributed.table([*rows[:3], failed]).splitlines()
    assert lines[3] == "| a | 4 | ddp | 1.00 | 380 | 95.0% | 1.00 | 123 |"
    assert lines[5] == "| a | 2 | fsdp | out of memory |  |  |  |  |"
