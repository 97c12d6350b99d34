"""Two runs in the terminal."""

from pathlib import Path

import pytest

from elman.cli import main
from tests.studies.made import change, make_run


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_two_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "x", "a", heldout=2.0).path
    b = make_run(tmp_path / "y", "b", heldout=2.5, lr=3e-3, speed=2000.0, session={"gpu": "NVIDIA L4"}).path
    assert main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]]
        for line in shown.splitlines()
        if "│" in line
    }
    assert rows["held out, nats/byte"] == ["2.0000", "2.5000", "+0.5000"]
    assert rows["tokens/s"] == ["1K", "2K", "× 2"]
    assert rows["lr"] == ["0.001", "0.003", ""]
    assert rows["gpu"] == ["NVIDIA H100 80GB HBM3", "NVIDIA L4", ""]
    assert "weight_decay" not in rows
    assert "unequal devices" in shown
    assert "one sample each" in shown


def test_what_looks_the_same_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "x", "a"), make_run(tmp_path / "y", "b")
    change(a, "env.json", start_up_seconds=1e-5)
    change(b, "env.json", start_up_seconds=3e-5)
    assert main(["compare", str(a.path), str(b.path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "start-up" in line]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["0.0", "0.0", ""]


def test_what_a_run_lacks_is_left_open_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "x", "a"), make_run(tmp_path / "y", "b")
    (b.path / "summary.json").unlink()
    change(a, "summary.json", mfu=None)
    assert main(["compare", str(a.path), str(b.path)]) == 0
    shown = capsys.readouterr().out
    assert "did not reach its end" in shown
    assert "What is left open cannot be compared." in shown
    assert main(["compare", str(a.path), str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_losses_of_unlike_tokens_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "x", "a"), make_run(tmp_path / "y", "b", train={"tokenizer": "gpt2"})
    assert main(["compare", str(a.path), str(b.path)]) == 0
    assert "losses a token do not compare" in capsys.readouterr().out


def test_a_run_from_anothers_weights_is_told_from_one_from_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its start is a path, which JSON has no word for."""
    a = make_run(tmp_path / "x", None)
    b = make_run(tmp_path / "y", None)
    train = {**b.read_json("config.json")["train"], "dim": None, "depth": None, "start_from": str(tmp_path / "x")}
    change(b, "config.json", train=train)
    assert main(["compare", str(a.path), str(b.path)]) == 0
    assert f"start_from {tmp_path / 'x'}" in " ".join(capsys.readouterr().out.split())
