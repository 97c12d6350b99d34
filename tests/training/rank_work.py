"""What the ranks of tests/training/test_distributed.py do: trainings in which something happens to one of them."""

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from elman.evaluation import heldout
from elman.mixers import MixerConfig
from elman.model import next_token_loss
from elman.training import checkpoint
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from tests.data.tiny_encoding import NAME, constructor, tiktoken
from tests.training.runs import CAPPED, resume, start


def watched(config: TrainConfig) -> tuple[int, str]:
    """Copies do not wait for the GPU; of shards PyTorch itself does."""
    train_step = Trainer._train_step

    def step(trainer: Trainer) -> Any:
        watch = trainer.processes.kind == "ddp" and trainer.step >= 5
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        try:
            return train_step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Trainer, "_train_step", step):
        return start(config, CAPPED)


def goes_on(config: TrainConfig) -> tuple[int, str]:
    return resume(config, steps=config.steps, parallel=config.parallel)


def start_tiny(config: TrainConfig) -> tuple[int, str]:
    tiktoken.list_encoding_names()
    with mock.patch.dict(tiktoken.registry.ENCODING_CONSTRUCTORS, {NAME: constructor}):
        return start(config)


def with_weights(config: TrainConfig) -> tuple[int, str, float]:
    """As ``start``; and a sum of the weights when they were last saved, of which two that differ at all differ."""
    weights: list[float] = []
    save = Trainer._save

    def summed(trainer: Trainer) -> None:
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
        weights.append(sum(p.detach().double().abs().sum().item() for p in whole))
        save(trainer)

    with mock.patch.object(Trainer, "_save", summed):
        return *start(config), weights[-1]


def spoilt(config: TrainConfig, steps: range) -> tuple[int, str, float]:
    """Rank 1 has no loss at some steps."""
    accumulate = Trainer._accumulate_gradients

    def without_loss(trainer: Trainer) -> torch.Tensor:
        bad = trainer.processes.rank == 1 and trainer.step + 1 in steps
        factor = torch.nan if bad else 1.0
        trainer._loss = lambda logits, targets: next_token_loss(logits, targets) * factor
        return accumulate(trainer)

    with mock.patch.object(Trainer, "_accumulate_gradients", without_loss):
        return with_weights(config)


def at_step(rank: int, step: int, do: Any) -> Any:
    """Have a rank do something behind a step."""
    train_step = Trainer._train_step

    def then_do(trainer: Trainer) -> Any:
        result = train_step(trainer)
        if (trainer.processes.rank, trainer.step) == (rank, step):
            do()
        return result

    return mock.patch.object(Trainer, "_train_step", then_do)


def signalled(config: TrainConfig, mixers: tuple[MixerConfig, ...], rank: int, step: int) -> tuple[int, str]:
    with at_step(rank, step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        return start(config, mixers)


def signalled_in_evaluation(config: TrainConfig, rank: int) -> tuple[int, str]:
    gather = heldout.gather

    def kill(*arguments: Any) -> Any:
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return gather(*arguments)

    with mock.patch.object(heldout, "gather", kill):
        return start(config)


def slowed(config: TrainConfig, rank: int) -> tuple[int, str, float]:
    with contextlib.ExitStack() as stack:
        for step in range(1, 4):
            stack.enter_context(at_step(rank, step, lambda: time.sleep(0.05)))
        return with_weights(config)


def broken(config: TrainConfig, rank: int) -> tuple[int, str]:
    def divide() -> None:
        raise ZeroDivisionError

    with at_step(rank, 3, divide):
        return start(config)


def without_compiler(config: TrainConfig) -> tuple[int, str]:
    """Compiling is tried, and fails in the first layer."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no C compiler found")

    with mock.patch.object(torch, "compile", return_value=fail), mock.patch.object(Trainer, "will_compile", True):
        return start(config)


def without_data(config: TrainConfig, rank: int) -> tuple[int, str]:
    nowhere = Path("nowhere") if os.environ["RANK"] == str(rank) else config.data
    return start(replace(config, data=nowhere))


@dataclass(frozen=True)
class Reading:
    """What a rank did to go back to a checkpoint: the files that it checked, the numbers that it had read of the
    weights and moments, and the bytes of memory that the optimiser holds beside the moments in it."""

    checked: list[str]
    numbers: int
    surplus: int


def reads(config: TrainConfig, machine: str = "here", damaged: str = "") -> tuple[int, str, Reading]:
    """As ``goes_on``. Rank R is on ``machine``, with R for {}; rank 1 sees a file otherwise than it was written."""
    rank = int(os.environ["RANK"])
    checked: list[str] = []
    seen: list[Reading] = []
    fingerprint, go_back_to = checkpoint._fingerprint, Trainer._go_back_to

    def watched(path: Path) -> Any:
        checked.append(path.name)
        return None if rank == 1 and path.name == damaged else fingerprint(path)

    def counted(trainer: Trainer, path: Path, found: checkpoint.Checkpoint) -> None:
        assert found.trainer is not None
        numbers = sum(local(leaf).numel() for leaf in tree_leaves((found.model, found.trainer["optimizer"])))
        files = list(checked)
        go_back_to(trainer, path, found)
        moments = [local(leaf) for leaf in tree_leaves(trainer.optimizer.state_dict())]
        seen.append(Reading(files, numbers, sum(m.untyped_storage().nbytes() - m.nbytes for m in moments)))

    with (
        mock.patch.object(socket, "gethostname", return_value=machine.format(rank)),
        mock.patch.object(checkpoint, "_fingerprint", watched),
        mock.patch.object(Trainer, "_go_back_to", counted),
    ):
        return *goes_on(config), *seen  # type: ignore[return-value]


def local(leaf: Any) -> torch.Tensor:
    """What this rank has of a tensor; nothing of single numbers."""
    if isinstance(leaf, DTensor):
        return leaf.to_local()
    return leaf if isinstance(leaf, torch.Tensor) and leaf.ndim else torch.empty(0)


def with_full_disk(config: TrainConfig, what: str) -> tuple[int, str]:
    """Rank 0 cannot write what the trainer keeps, or rank 1 its shards."""
    write = HuggingFaceStorageWriter.write_data

    def full(*arguments: Any) -> Any:
        if what == "shards" and os.environ["RANK"] == "0":
            return write(*arguments)
        raise OSError(28, "No space left on device")

    where = (torch, "save") if what == "trainer" else (HuggingFaceStorageWriter, "write_data")
    with mock.patch.object(*where, full):
        return start(config)
