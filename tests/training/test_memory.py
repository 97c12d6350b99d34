"""What training takes, and what it says where there is no more."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from elman.environment import total_memory
from elman.errors import TrainingError
from elman.mixers import mixer_config
from elman.sizing import size_model
from elman.training import memory
from elman.training.checks import fixed_memory
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.memory import free_memory, kept_bytes, window_bytes
from elman.units import format_bytes
from tests.training.runs import E1, start


def test_what_a_pass_keeps_is_counted_once_and_without_the_weights() -> None:
    """Of (64, 32) float32: what enters the first product, and tanh's result, which the second product keeps too."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
    x = torch.randn(64, 32)
    assert kept_bytes(lambda: model(x), model) == 2 * 64 * 32 * 4


def trainer(config: TrainConfig, mixers: Any = E1) -> Trainer:
    return Trainer(config, size_model(mixers, dim=config.dim, depth=config.depth), Console(quiet=True))


@pytest.mark.parametrize("mixer", [mixer_config("e1")(), mixer_config("transformer")(head_dim=8)], ids=str)
def test_a_window_is_what_a_pass_over_many_keeps_a_window(config: TrainConfig, mixer: Any) -> None:
    """Linear in the batch, so that what one window tells is true of all."""
    config = replace(config, dim=32, seq_len=64)
    made = trainer(config, (mixer,))
    one = window_bytes(made)
    tokens = made._batch().tokens
    many = kept_bytes(lambda: made._loss(made.model(tokens[:, :-1])[0], tokens[:, 1:]), made.model)
    assert one == pytest.approx(many / config.batch_size, rel=0.05)
    assert one > 2 * 64 * 32 * 4 * 4  # at the least, some tensors a layer


def test_running_out_of_memory_tells_what_took_it_and_what_to_lower(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(config)
    kept = window_bytes(made)
    fit = (total_memory(made.device) - fixed_memory(made.model_config, made.processes)) // kept
    monkeypatch.setattr(Trainer, "_train_step", lambda trainer: torch.empty(2**60))
    with pytest.raises(
        TrainingError, match=r"out of memory at step 0 .* optimiser take \d.*--batch-size.*--grad-accum"
    ) as caught:
        start(replace(config, grad_accum=2))
    message = str(caught.value)
    assert f"each of the 4 windows of 32 in a pass keeps {format_bytes(kept)} for the backward pass" in message
    assert f"{format_bytes(4 * kept)} in all" in message
    assert f"(at most {fit:,} could ever fit)" in message


def test_where_not_even_a_window_fits_no_number_is_made_up(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_train_step", lambda trainer: torch.empty(2**60))
    monkeypatch.setattr(memory, "window_bytes", lambda trainer: torch.empty(2**60))
    with pytest.raises(TrainingError, match=r"and the rest went to a pass over 8 windows of 32: give a smaller"):
        start(config)


def test_the_frames_of_an_error_let_go_of_their_tensors() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise RuntimeError("out of memory")

    try:
        fail()
    except RuntimeError as error:
        gc.collect()
        assert kept[0]() is not None
        free_memory(error)
        assert kept[0]() is None
