"""Steps whose loss or gradient is not finite, and the scale that fp16 needs."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.errors import TrainingError
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.run import RunFolder, load_model
from tests.training.runs import losses, resume, start
from tests.training.test_optim import OPTIMIZERS


def spoil(monkeypatch: pytest.MonkeyPatch, where: str, steps: range) -> None:
    """Make the loss or one gradient of these steps infinite or no number."""
    accumulate = Trainer._accumulate_gradients

    def poison(trainer: Trainer) -> torch.Tensor:
        loss = accumulate(trainer)
        if trainer.step + 1 in steps:
            loss = loss * torch.nan if where == "loss" else loss
            gradient = next(trainer.model.parameters()).grad
            assert gradient is not None
            gradient[0, 0].fill_(torch.nan if where == "loss" else torch.inf)  # an assignment would wait for the GPU
        return loss

    monkeypatch.setattr(Trainer, "_accumulate_gradients", poison)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, where: str, optimizer: Any
) -> None:
    spoil(monkeypatch, where, range(5, 9))
    code, output = start(replace(config, steps=120, seq_len=16, max_skipped=5, optimizer=optimizer))
    assert code == 0
    rows = [row for row in RunFolder(config.out).read_metrics() if "lr" in row]  # type: ignore[arg-type]
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {5: 1, 6: 2, 7: 3, 8: 4}
    assert [row["step"] for row in rows if "grad_norm" not in row] == [5, 6, 7, 8]
    assert [row["step"] for row in rows if "loss" not in row] == ([5, 6, 7, 8] if where == "loss" else [])
    assert "step 7 is skipped: its loss is" in output
    assert re.search(r"steps skipped +│ +4 ", output)
    assert RunFolder(config.out).read_json("summary.json")["skipped_steps"] == 4  # type: ignore[arg-type]
    assert rows[-1]["loss"] < 2.5


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_too_many_in_a_row_stop_the_run_and_its_last_checkpoint_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spoil(monkeypatch, where, range(7, 13))
    message = r"step 9 is skipped: its loss is .*(nan|inf).*the last 3 .*lower --lr.*checkpoint is .*step-00000008"
    with pytest.raises(TrainingError, match=message):
        start(replace(config, max_skipped=3))
    assert all(tensor.isfinite().all() for tensor in load_model(config.out).state_dict().values())  # type: ignore[arg-type]
    # They are counted on over a resume: the second in a row was the one that was saved.
    with pytest.raises(TrainingError, match=r"step 9 is skipped.*the last 3 "):
        resume(config)
    with pytest.raises(TrainingError, match=r"step 11 is skipped.*the last 5 "):
        resume(config, max_skipped=5)


def test_fp16_scales_the_loss_until_gradients_fit(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    start(replace(config, steps=150, precision="fp16", max_skipped=50, eval_every=0, save_every=0))
    rows = [row for row in RunFolder(config.out).read_metrics() if "loss" in row]  # type: ignore[arg-type]
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert skipped[:15] == list(range(1, 16))
    assert len(skipped) < 35
    assert max(row["grad_norm"] for row in rows if "grad_norm" in row) < 100  # of the loss, not of what was scaled
    assert rows[-1]["loss"] < 1.7


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_on_the_gpu_waits_for_nothing_skips_and_resumes_bit_for_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, precision: Any
) -> None:
    """Its first steps are not watched: they make what later ones use, and fp16 finds its scale."""
    spoil(monkeypatch, "loss", range(33, 36))
    step = Trainer._train_step

    def watched(trainer: Trainer) -> Any:
        torch.cuda.set_sync_debug_mode("error" if trainer.step - trainer._first_step >= 5 else "default")
        try:
            return step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", watched)
    # What is spoilt and watched is in Python, which a captured step does not run again.
    config = replace(
        config,
        device="cuda",
        steps=80,
        schedule="constant",
        save_every=50,
        optimizer=optimizer,
        precision=precision,
        graph="off",
    )
    assert start(replace(config, out=tmp_path / "whole"))[0] == 0
    assert start(replace(config, steps=50))[0] == 0
    assert resume(config, steps=80)[0] == 0
    whole = losses(tmp_path / "whole")
    assert losses(config.out) == whole
    assert whole[80] < 0.8 * whole[1]
    summaries = [RunFolder(out).read_json("summary.json") for out in (config.out, tmp_path / "whole")]  # type: ignore[arg-type]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]
    assert summaries[0]["skipped_steps"] == summaries[1]["skipped_steps"] >= 3
