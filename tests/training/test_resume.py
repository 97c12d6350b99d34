"""Runs that stop, by a signal, a crash or damage, and what going on with them gives or refuses."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.errors import UsageError
from elman.evaluation import heldout
from elman.mixers import MixerConfig
from elman.training import finish
from elman.training.checkpoint import load_checkpoint, save_checkpoint
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.run import RunFolder, load_model, newest_checkpoint, open_run
from tests.training.runs import CAPPED, E1, losses, resume, start
from tests.training.test_optim import OPTIMIZERS, needs_schedulefree


@pytest.mark.parametrize(
    ("mixers", "stop_at", "optimizer", "precision"),
    [
        (E1, 8, "adamw", "fp32"),
        (E1, 9, "adamw", "fp32"),
        pytest.param(CAPPED, 9, "schedulefree", "fp32", marks=needs_schedulefree),
        (CAPPED, 9, "muon", "fp32"),
        (E1, 9, "adamw", "bf16"),
        (E1, 9, "adamw", "fp16"),
        pytest.param(E1, 9, "schedulefree", "fp16", marks=needs_schedulefree),
        (E1, 9, "muon", "fp16"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixers: tuple[MixerConfig, ...],
    stop_at: int,
    optimizer: Any,
    precision: Any,
) -> None:
    """It evaluates at step 5, saves at step 8, and is resumed from there or later."""
    if precision == "fp16":
        # So large a scale overflows at first, and grows again within the run.
        scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40, growth_interval=2)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        config = replace(config, steps=40, max_skipped=40)
        stop_at += 23
    config = replace(config, optimizer=optimizer, precision=precision)
    start(replace(config, out=tmp_path / "whole"), mixers)
    train_step = Trainer._train_step

    def step_then_signal(trainer: Trainer) -> Any:
        result = train_step(trainer)
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step_then_signal)
        code, output = start(config, mixers)
    assert code == 130
    assert f"stopped at step {stop_at}" in output
    assert f"elman train --resume {config.out}" in output
    code, output = resume(config)
    assert code == 0
    assert f"going on from step {stop_at}" in output
    assert losses(config.out) == losses(tmp_path / "whole")
    assert len(RunFolder(config.out).read_json("env.json")) == 2  # type: ignore[arg-type]
    run, whole = RunFolder(config.out), RunFolder(tmp_path / "whole")  # type: ignore[arg-type]
    keys = ("skipped_steps", "heldout", "last_100_loss")
    summaries = [[folder.read_json("summary.json")[key] for key in keys] for folder in (run, whole)]
    assert summaries[0] == summaries[1]
    assert (summaries[0][0] > 0) == (precision == "fp16")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_the_last_save_are_done_again(config: TrainConfig, tmp_path: Path, optimizer: Any) -> None:
    """As after kill -9: metrics ahead of the checkpoint, their last line cut short."""
    config = replace(config, optimizer=optimizer)
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    assert config.out is not None
    for path in (config.out / "checkpoints" / "step-00000012").iterdir():
        path.unlink()
    (config.out / "checkpoints" / "step-00000012").rmdir()
    (config.out / "summary.json").unlink()
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(config: TrainConfig, tmp_path: Path) -> None:
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    assert config.out is not None
    newest = config.out / "checkpoints" / "step-00000012"
    damage(newest)
    with pytest.warns(UserWarning, match=r"step-00000012 is damaged: model.safetensors .*; going by step-00000008"):
        model = load_model(config.out)
    before = load_checkpoint(config.out / "checkpoints" / "step-00000008").model
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert newest.exists()  # who only reads changes nothing
    code, output = resume(config)
    assert code == 0
    assert "step-00000012 is damaged: model.safetensors was cut short or changed; going by step-00000008" in output
    assert "going on from step 8" in output
    assert losses(config.out) == losses(tmp_path / "whole")
    names = [path.name for path in sorted((config.out / "checkpoints").iterdir())]
    assert names == ["damaged-step-00000012", "step-00000008", "step-00000012"]
    assert load_checkpoint(newest).step == 12


def test_without_a_whole_checkpoint_nothing_is_overwritten(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    for path in (config.out / "checkpoints").iterdir():
        damage(path, "trainer.pt")
    before = sorted((path, path.stat().st_mtime_ns) for path in (config.out / "checkpoints").rglob("*"))
    with pytest.raises(UsageError, match=r"step-00000012 is damaged: trainer.pt .*no whole one before it"):
        resume(config, steps=20)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (config.out / "checkpoints").rglob("*"))


def test_a_finished_run_goes_on_only_with_more_steps(config: TrainConfig) -> None:
    start(config)
    with pytest.raises(UsageError, match=r"has reached its end \(step 12, \d+s\): give more --steps"):
        resume(config)
    assert resume(config, steps=15)[0] == 0
    assert max(losses(config.out)) == 15  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--lr cannot change when a run goes on"):
        resume(config, lr=0.5)


def test_a_changed_data_file_is_refused_on_resume(config: TrainConfig) -> None:
    start(config)
    with config.data.open("ab") as file:  # type: ignore[union-attr]
        file.write(b"more\x1e")
    with pytest.raises(UsageError, match=r"--data .* is not the file that the run began with"):
        resume(config, steps=20)


def test_data_may_move_but_not_change(config: TrainConfig, tmp_path: Path) -> None:
    start(config)
    moved = config.data.rename(tmp_path / "moved")  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="no such file"):
        resume(config, steps=20)
    assert resume(config, steps=20, data=moved)[0] == 0
    content = bytearray(moved.read_bytes())
    content[5] ^= 1
    moved.write_bytes(content)
    with pytest.raises(UsageError, match="is not the file that the run began with"):
        resume(config, steps=30, data=moved)


def test_a_new_end_replaces_the_old_one(config: TrainConfig) -> None:
    start(replace(config, steps=None, time_limit="0.3s"))
    done = max(losses(config.out))  # type: ignore[arg-type]
    assert resume(config, steps=done + 3)[0] == 0
    assert max(losses(config.out)) == done + 3  # type: ignore[arg-type]


def test_a_run_without_a_checkpoint_starts_over_on_resume(config: TrainConfig, tmp_path: Path) -> None:
    """As after kill -9 before the first save."""
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    shutil.rmtree(config.out / "checkpoints")  # type: ignore[operator]
    (config.out / "summary.json").unlink()  # type: ignore[operator]
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")


def test_a_run_cut_short_while_finishing_can_be_finished(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "plot_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(config)
    assert not (config.out / "summary.json").exists()  # type: ignore[operator]
    assert resume(config)[0] == 0
    assert (config.out / "loss.png").exists()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", "summary.json", "config.json"])
@pytest.mark.parametrize("content", [b"\xff\x00", b"7", b'{"step": "x"}\n', b"[" * 100000])
def test_damaged_run_files_never_end_in_a_traceback(config: TrainConfig, name: str, content: bytes) -> None:
    start(config)
    (config.out / name).write_bytes(content)  # type: ignore[operator]
    try:
        code, message = resume(config, steps=14)
    except UsageError as error:
        code, message = 0, str(error)
    assert code == 0
    assert name in message or "14 steps" in message


def test_two_processes_cannot_write_to_one_run(config: TrainConfig) -> None:
    start(config)
    with open_run(config.out).lock(), pytest.raises(UsageError, match="being written by another process"):  # type: ignore[arg-type]
        resume(config, steps=20)


def test_another_models_checkpoint_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    start(config)
    start(replace(config, out=tmp_path / "wide", dim=24))
    (config.out / "config.json").write_text((tmp_path / "wide" / "config.json").read_text())  # type: ignore[operator]
    with pytest.raises(
        UsageError, match=r"belongs to another model: .*\(256, 16\) but config.json asks for \(256, 24\)"
    ):
        load_model(config.out)  # type: ignore[arg-type]


def test_another_versions_checkpoint_is_refused_in_words(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    newest = config.out / "checkpoints" / "step-00000012"
    old = load_checkpoint(newest)
    assert old.trainer is not None
    del old.trainer["scaler"]
    shutil.rmtree(newest)
    save_checkpoint(newest.parent, old)
    with pytest.raises(
        UsageError, match=r"step-00000012 was written by another version of elman \(it has no scaler\): "
    ):
        resume(config, steps=20)
    assert load_model(config.out) is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["evaluation", "saving", "the last evaluation"])
def test_a_signal_in_evaluation_or_saving_ends_in_a_whole_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, number: int
) -> None:
    start(replace(config, out=tmp_path / "whole"))
    module, name = (torch, "save") if during == "saving" else (heldout, "gather")
    at = {"evaluation": 5, "saving": 4, "the last evaluation": 12}[during]
    function, report = getattr(module, name), Trainer._report
    step, sent = 0, False

    def watch(trainer: Trainer, taken: Any, display: Any) -> None:
        nonlocal step
        step = trainer.step
        report(trainer, taken, display)

    def signalled(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        if not sent and (step == at or during == "saving"):
            sent = True
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_report", watch)
        patch.setattr(module, name, signalled)
        if during != "saving":
            # More than one batch, between which it listens.
            config = replace(config, batch_size=8, eval_bytes="1m")
        code, output = start(config)
    assert code == 130
    # While one checkpoint is being written, training goes on, so it is a later one that the run ends with.
    stopped = re.search(r"stopped at step (\d+), saved in", output)
    assert stopped is not None
    end = int(stopped[1])
    assert end == at if during != "saving" else at <= end <= 8
    assert newest_checkpoint(RunFolder(config.out)).name == f"step-{end:08d}"  # type: ignore[arg-type, union-attr]
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")


def test_sigterm_to_a_real_process_ends_in_a_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "elman", "train", "--data", config.data, "--out", config.out, "--dim", "16",
        "--depth", "2", "--seq-len", "32", "--batch-size", "8", "--steps", "1000000",
        "--eval-bytes", "500", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = config.out / "metrics.jsonl"  # type: ignore[operator]
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "go on with: elman train --resume" in output
    assert load_model(config.out) is not None  # type: ignore[arg-type]
