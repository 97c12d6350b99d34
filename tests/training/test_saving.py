"""Checkpoints are written while training goes on, and no error of writing them is lost."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from elman.errors import TrainingError
from elman.training import loop
from elman.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from elman.training.config import TrainConfig
from elman.training.distributed import ALONE
from elman.training.loop import Trainer
from elman.training.run import RunFolder
from elman.training.saving import Saver
from tests.training.runs import losses, start


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(replace(config, out=tmp_path / "plain"))
    went_on, train_step = threading.Event(), Trainer._train_step
    threads: list[str] = []

    def wait(folder: Path, checkpoint: Checkpoint) -> Path:
        if checkpoint.step == 4:
            # It never goes on if it waits for this.
            assert went_on.wait(60)
        threads.append(threading.current_thread().name)
        return save_checkpoint(folder, checkpoint)

    def step(trainer: Trainer) -> Any:
        if trainer.step == 6:
            went_on.set()
        return train_step(trainer)

    monkeypatch.setattr(loop, "save_checkpoint", wait)
    monkeypatch.setattr(Trainer, "_train_step", step)
    start(replace(config, steps=7))
    assert config.out is not None
    assert all(name.startswith("checkpoint") for name in threads)
    saved = load_checkpoint(config.out / "checkpoints" / "step-00000004")
    kept = load_checkpoint(config.out / "checkpoints" / "step-00000007")
    assert not torch.equal(saved.model["norm.weight"], kept.model["norm.weight"])
    monkeypatch.undo()
    start(replace(config, out=tmp_path / "four", steps=4, schedule="constant"))
    start(replace(config, out=tmp_path / "seven", steps=7, schedule="constant", save_every=4))
    four, seven = (load_checkpoint(tmp_path / name / "checkpoints" / "step-00000004") for name in ("four", "seven"))
    assert all(torch.equal(four.model[name], seven.model[name]) for name in four.model)
    assert max(losses(config.out)) == 7


def test_a_full_disk_ends_the_run_and_leaves_what_was_whole(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, file: IO[bytes]) -> None:
        if value["seconds"] and len(list(Path(file.name).parent.parent.glob("step-*"))) == 1:
            with open("/dev/full", "wb") as full_device:
                save(value, full_device)
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    message = r"checkpoint of step 8 cannot be written to .*\(\[Errno 28\] No space left on device\).*--resume"
    with pytest.raises(TrainingError, match=message):
        start(replace(config, steps=100))
    assert config.out is not None
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000004"]
    assert load_checkpoint(config.out / "checkpoints" / "step-00000004").step == 4
    assert max(losses(config.out)) <= 12


def test_errors_surface_once(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    with Saver(RunFolder(tmp_path), ALONE) as saver:
        saver.wait()
        saver.check()
        saver.start(3, fail)
        with pytest.raises(TrainingError, match=r"checkpoint of step 3 .*Input/output error"):
            saver.wait()
        saver.check()
        saver.start(5, lambda: None)
        saver.wait()


def test_what_is_being_written_becomes_whole_though_the_run_fails(tmp_path: Path) -> None:
    started = threading.Event()

    def write() -> None:
        started.set()
        (tmp_path / "written").touch()

    def fail_while_writing() -> None:
        with Saver(RunFolder(tmp_path), ALONE) as saver:
            saver.start(1, write)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_writing()
    assert started.is_set()
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_on_the_host_does_not_change_with_the_tensors(device: str) -> None:
    weight = torch.ones(1 << 20, device=device)
    copied = Checkpoint(1, {"w": weight}, {"a": [weight, 2], "b": (weight.view(2, -1).T,)}).on_host()
    weight.zero_()
    assert copied.trainer is not None
    for tensor in (copied.model["w"], copied.trainer["a"][0], copied.trainer["b"][0].T.reshape(-1)):
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, torch.ones(1 << 20))
    assert copied.trainer["a"][1] == 2
