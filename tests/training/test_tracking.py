"""Trackers are shown what metrics.jsonl holds, and go on with a run that goes on."""

import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elman.errors import UsageError
from elman.training import loop
from elman.training.config import TrainConfig
from elman.training.run import RunFolder
from elman.training.tracking import flatten
from tests.training.runs import resume, start

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")


def scalars(path: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def numbers(path: Path | None) -> dict[str, dict[int, float]]:
    """What metrics.jsonl holds, in the same form."""
    assert path is not None
    found: dict[str, dict[int, float]] = {}
    for row in RunFolder(path).read_metrics():
        for name, value in flatten({name: value for name, value in row.items() if name != "step"}):
            found.setdefault(name, {})[row["step"]] = value
    return found


def assert_same(shown: dict[str, dict[int, float]], known: dict[str, dict[int, float]]) -> None:
    assert shown.keys() == known.keys()
    for name, values in known.items():
        assert shown[name] == pytest.approx(values, rel=1e-6), name


def test_a_row_becomes_numbers_with_paths() -> None:
    row = {"loss": 1.5, "tokens": 3, "note": "no number", "good": True, "stats": {"rms": [0.5, None, 2.0], "one": 7}}
    assert dict(flatten(row)) == {"loss": 1.5, "tokens": 3, "stats/rms/0": 0.5, "stats/rms/2": 2.0, "stats/one": 7}


@needs_tensorboard
def test_tensorboard_shows_metrics_jsonl_and_nothing_twice_after_a_resume(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends at step 10, two behind its checkpoint, as after kill -9; what it does again is shown once."""
    real = loop.save_checkpoint

    def save(folder: Path, checkpoint: Any) -> None:
        if checkpoint.step == 10:
            raise RuntimeError("no room")
        real(folder, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with pytest.raises(Exception, match="no room"):
            start(replace(config, steps=10))
    assert config.out is not None
    assert_same(scalars(config.out), numbers(config.out))
    assert resume(config, steps=12)[0] == 0
    assert_same(scalars(config.out), numbers(config.out))
    assert sorted(scalars(config.out)["loss"]) == list(range(1, 13))
    assert sorted(scalars(config.out)["heldout_loss"]) == [5, 10, 12]


def test_tensorboard_is_left_out_where_it_is_off_or_absent(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(replace(config, out=tmp_path / "off", tensorboard="off"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find_spec(name, *more)
    )
    start(config)
    for path in (tmp_path / "off", config.out):
        assert not (path / "tensorboard").exists()  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"--tensorboard on needs its package: pip install tensorboard"):
        start(replace(config, out=tmp_path / "on", tensorboard="on"))
    assert not (tmp_path / "on").exists()


class Room:
    """A stand-in for the package wandb: what was asked of it."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.rows: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        return types.SimpleNamespace(
            define_metric=lambda name, step_metric: self.axes.append((name, step_metric)),
            log=lambda row: self.rows.append(row),
            finish=self._finish,
        )

    def _finish(self) -> None:
        self.finished += 1


def test_wandb_is_given_every_row_and_the_same_run_again(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room()
    monkeypatch.setitem(sys.modules, "wandb", room)
    start(replace(config, wandb="elmans"))
    assert resume(config, steps=14)[0] == 0
    assert room.finished == 2
    assert room.axes == [("*", "step")] * 2
    assert [options["project"] for options in room.opened] == ["elmans"] * 2
    assert len({options["id"] for options in room.opened}) == 1
    assert {options["resume"] for options in room.opened} == {"allow"}
    assert config.out is not None
    assert room.opened[0]["config"] == {
        **json.loads((config.out / "config.json").read_text()),
        "train": {**room.opened[1]["config"]["train"], "steps": 12},
    }
    shown: dict[str, dict[int, float]] = {}
    for row in room.rows:
        for name, value in row.items():
            if name != "step":
                shown.setdefault(name, {})[int(row["step"])] = value
    assert shown == numbers(config.out)


def test_another_project_is_another_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room()
    monkeypatch.setitem(sys.modules, "wandb", room)
    start(replace(config, wandb="elmans"))
    resume(config, steps=14, wandb="others")
    assert [options["project"] for options in room.opened] == ["elmans", "others"]
    assert len({options["id"] for options in room.opened}) == 2


def test_wandb_without_its_package_is_a_users_mistake(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--wandb elmans needs its package .*: pip install wandb, or drop --wandb"):
        start(replace(config, wandb="elmans"))
    assert not config.out.exists()  # type: ignore[union-attr]
