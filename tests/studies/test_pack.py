"""A packed study is small, and its report is that of the whole one."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from elman.cli import main
from elman.errors import UsageError
from elman.studies.pack import pack, thin
from elman.studies.report import make_report
from elman.training.run import RunFolder
from tests.studies.made import change, make_run, make_study


def rows_of(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "lr": 1e-3, "seconds": float(i), "loss": 1 / (i + 1), "grad_norm": float(i), "tokens": 4 * i}
        for i in range(steps)
    ]


def steps_of(rows: list[dict[str, Any]]) -> int:
    return sum(row.get("steps", 1) for row in rows if "lr" in row)


@pytest.mark.parametrize("steps", [0, 1, 12, 13, 99, 100, 101, 112, 113, 1000])
def test_lines_stand_for_all_steps_and_for_their_means(steps: int) -> None:
    rows = rows_of(steps)
    found = thin(rows, 12)
    assert len(found) <= 12
    assert steps_of(found) == steps
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    assert math.isclose(
        sum(row["loss"] * row.get("steps", 1) for row in found), sum(row["loss"] for row in rows), rel_tol=1e-12
    )
    # Of the last 100 none is put together with one before.
    tail = [row for row in found if row["step"] > max(0, steps - 100)]
    assert steps_of(tail) == min(steps, 100)
    assert math.isclose(
        sum(row["loss"] * row.get("steps", 1) for row in tail), sum(row["loss"] for row in rows[-100:]), rel_tol=1e-12
    )
    if steps > 12:
        last = {**found[-1], "loss": 0, "grad_norm": 0}
        last.pop("steps", None)
        assert last == {**rows[-1], "loss": 0, "grad_norm": 0}


def test_evaluations_and_skipped_steps_are_kept() -> None:
    rows = rows_of(400)
    rows[210] = {"step": 211, "lr": 1e-3, "seconds": 210.0, "loss": None, "skipped": 1}
    rows.insert(150, {"step": 150, "seconds": 149.0, "heldout_loss": 2.0})
    rows[5]["stats"] = {"layers": [1, 2, 3]}
    found = thin(rows, 20)
    assert len(found) < 30
    assert steps_of(found) == 400
    assert [row for row in found if "skipped" in row or "heldout_loss" in row] == [rows[150], rows[211]]
    assert not any("stats" in row for row in found)


def test_the_report_of_a_packed_study_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path / "toy", {"a": [2.0, 2.1], "b": [1.5, 1.6]}, steps=700)
    make_run(study / "sweep" / "a-lr", "a", steps=700, role="sweep")
    session = {"command": ["/home/somebody/elman/__main__.py", "train", "--data", "text"]}
    place = study / "runs" / "b-seed2"
    make_run(place, "b", seed=2, heldout=1.4, steps=700, session=session, train={"out": place})
    for run in (study / "runs").iterdir():
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "step-00000700").write_bytes(b"x" * 10**6)
    out = tmp_path / "packed"
    assert main(["study", "pack", "ladder_50m", "--folder", str(study), "--out", str(out), "--lines", "30"]) == 0
    assert f"6 runs in {out}, 0.0 MiB" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["report", "runs", "sweep"]
    assert len((out / "runs" / "a-seed0" / "metrics.jsonl").read_text().splitlines()) < 40
    before, after = (
        re.sub(
            r"!\[[^\n]*|<svg.*?</svg>", "", make_report([folder]).markdown().replace(str(folder), ""), flags=re.DOTALL
        )
        for folder in (study, out)
    )
    assert after == before
    assert "nats" in after
    (environment,) = json.loads((out / "runs" / "b-seed2" / "env.json").read_text())
    assert environment["command"] == ["__main__.py", "train", "--data", "text"]
    saved = json.loads((study / "runs" / "b-seed2" / "config.json").read_text())
    assert Path(saved["train"]["out"]).is_absolute()
    saved["train"] |= {"out": "b-seed2", "data": "text"}
    assert json.loads((out / "runs" / "b-seed2" / "config.json").read_text()) == saved
    # Packing what is packed changes nothing.
    pack(out, tmp_path / "again", 40)
    name = Path("runs") / "a-seed0" / "metrics.jsonl"
    assert (tmp_path / "again" / name).read_text() == (out / name).read_text()


def test_what_is_wrong_with_a_run_is_still_told(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", {"a": [2.0], "b": [1.5], "c": [1.4], "d": [1.3]}, steps=300)
    runs = {name: RunFolder(study / "runs" / f"{name}-seed0") for name in "abcd"}
    lines = runs["a"].metrics_file.read_text().splitlines(keepends=True)
    runs["a"].metrics_file.write_text("".join(lines[:50] + lines[60:]) + '{"step": 3')
    runs["b"].metrics_file.unlink()
    (runs["b"].path / "env.json").write_text("[{")
    change(runs["c"], "summary.json", last_100_loss=0.1)
    (runs["d"].path / "summary.json").unlink()
    pack(study, tmp_path / "packed", 20)
    told, again = (
        {name: why.replace(str(folder), "") for name, why in make_report([folder]).left_out}
        for folder in (study, tmp_path / "packed")
    )
    assert told == again
    assert {"b (b-seed0)", "c (c-seed0)", "d (d-seed0)"} <= set(told)
    whole = (tmp_path / "packed" / "runs" / "a-seed0" / "metrics.jsonl").read_text()
    assert whole == runs["a"].metrics_file.read_text()
    assert "10 step(s) are missing" in make_report([tmp_path / "packed"]).markdown()


def test_the_code_of_ones_own_variant_goes_along(tmp_path: Path) -> None:
    run = make_run(tmp_path / "whole/runs/a", "a")
    (run.path / "variant-mine.py").write_text("x = 1\n")
    change(run, "config.json", train={**run.read_json("config.json")["train"], "model": "e1,/my own/mine.py"})
    (made,) = pack(tmp_path / "whole", tmp_path / "packed", 12)
    assert (made / "variant-mine.py").read_text() == "x = 1\n"
    assert json.loads((made / "config.json").read_text())["train"]["model"] == "e1,mine.py"


def test_a_line_cannot_stand_for_more_steps_than_there_were(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", steps=20)
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    rows[3]["steps"] = 10**12
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_report([tmp_path])


def test_bad_input(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", {"a": [2.0]})
    with pytest.raises(UsageError, match="--lines 1 is out of range"):
        pack(study, tmp_path / "out", 1)
    with pytest.raises(UsageError, match="is not empty and is left as it is"):
        pack(study, study, 10)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="holds no runs"):
        pack(tmp_path / "nothing", tmp_path / "out", 10)
    assert not (tmp_path / "out").exists()
