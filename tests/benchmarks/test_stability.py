"""The benchmark of stability: what it reads from a run's folder, and one run of it at a toy size."""

import json
import lzma
import random
from pathlib import Path

import pytest

from benchmarks import stability
from benchmarks.cases import Case
from benchmarks.stability import Options, Row
from elman.training.run import RunFolder


def write_run(path: Path, losses: list[float], finished: bool = True) -> RunFolder:
    run = RunFolder(path)
    path.mkdir()
    run.append_metrics(
        [{"step": i + 1, "seconds": 0.1, "loss": loss, "grad_norm": 9.0 / (i + 1)} for i, loss in enumerate(losses)]
    )
    run.append_metrics([{"step": len(losses), "seconds": 0.1, "heldout_loss": 2.5}])
    run.write_json("env.json", [{"backends": ["persistent", "persistent", "official"]}])
    if finished:
        run.write_json("summary.json", {"train_seconds": 3.0, "heldout": {"nats_per_byte": 2.5}})
    return run


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    losses = [5.0 - 0.01 * i for i in range(200)]
    row = stability.read_run("e1", write_run(tmp_path / "good", losses), "results in good", warmup=9)
    assert row.outcome == "finished"
    assert row.stable
    assert row.steps == 200
    assert row.last_100 == pytest.approx(sum(losses[100:]) / 100)
    assert row.heldout == 2.5
    assert row.max_norm == 9.0
    assert row.max_norm_later == pytest.approx(9.0 / 10)
    assert row.backends == {"persistent": 2, "official": 1}


def test_spikes_and_runs_that_end_early_are_not_stable(tmp_path: Path) -> None:
    losses = [3.0] * 150
    losses[120] = 3.6
    row = stability.read_run("e1", write_run(tmp_path / "spiked", losses), "", warmup=9)
    assert (row.spikes, row.stable) == (1, False)
    complaint = "elman: the loss is nan and its gradient's norm nan at step 31: try a lower --lr"
    row = stability.read_run("e1", write_run(tmp_path / "failed", [3.0] * 30, finished=False), complaint, warmup=9)
    assert (row.outcome, row.steps, row.heldout, row.stable) == (complaint, 30, None, False)
    row = stability.read_run("e1", RunFolder(tmp_path / "nothing"), "elman: no GPU", warmup=9)
    assert row == Row("e1", "elman: no GPU")
    row = stability.read_run("e1", write_run(tmp_path / "lost", [6.0] * 150), "", warmup=9)
    assert (row.outcome, row.spikes, row.stable) == ("finished", 0, False)


def test_skipped_steps_are_counted_and_their_norms_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "skipped", [5.0 - 0.01 * i for i in range(200)])
    run.append_metrics(
        [{"step": 201 + i, "seconds": 0.1, "skipped": 1 + i} | ({} if i else {"loss": 3.0}) for i in (0, 1)]
    )
    row = stability.read_run("ladder_6", run, "", warmup=9)
    assert (row.steps, row.skipped, row.max_norm, row.stable) == (201, 2, 9.0, False)


def test_spikes_are_told_from_slopes() -> None:
    assert stability.spikes([6.0 - 0.02 * i for i in range(200)], warmup=10) == 0
    assert stability.spikes([2.0] * 60 + [9.0] + [2.0] * 60, warmup=10) == 1
    assert stability.spikes([9.0] * 40 + [2.0] * 5 + [9.0] * 5, warmup=10) == 0
    assert stability.spikes([], warmup=10) == 0


def test_the_command_line_carries_the_options_of_the_case() -> None:
    words = stability.command(Case("e4", {"expansion": 4.0}), Path("a.txt"), Path("run"), Options(Path("a.txt")))
    assert " ".join(words[1:6]) == "-m elman train --model e4"
    assert " ".join(words).endswith("--out run --expansion 4.0")


def test_runs_are_trained_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "RESULTS", tmp_path / "results")
    drawn = random.Random(0)
    text = bytes(drawn.choice(b"abcd ") for _ in range(40_000))
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress(text))
    options = Options(
        tmp_path / "text.txt.xz", models=("e0", "mingru"), params="100k", steps=3, seq_len=8, batch_size=2, warmup=1,
        jobs=2, device="cpu", out=tmp_path / "out",
    )  # fmt: skip
    rows = stability.main(options)
    assert {row.model: (row.outcome, row.steps) for row in rows} == {"e0": ("finished", 3), "mingru": ("finished", 3)}
    assert all(row.heldout is not None and row.params is not None for row in rows)
    (written,) = (tmp_path / "results").iterdir()
    found = json.loads(written.read_text())
    assert found == json.loads((tmp_path / "out" / written.name).read_text())
    assert [Row(**row) for row in found["rows"]] == rows
    late = stability.train(Case("e0"), tmp_path / "text.txt", tmp_path, options, deadline=0.0)
    assert late.outcome == "not run: out of time"
