"""How much memory a run takes: told before it is trained, or measured to find the largest batch that fits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from elman.environment import peak_memory
from elman.errors import TrainingError, UsageError
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.text import one_line
from elman.training.checks import fixed_memory
from elman.training.config import RunConfig
from elman.training.loop import Trainer
from elman.training.memory import free_memory, kept_bytes, window_bytes
from elman.units import format_bytes

#: Batches are multiples of it, as fast kernels like them.
_MULTIPLE = 8
#: No batch is larger, however small the model.
_LARGEST = 4096
#: Steps after which a GPU has held at once what it will ever hold: the moments come with the first.
_STEPS = 2


def most_memory(model: ModelConfig, batch_size: int, seq_len: int, bf16: bool) -> int:
    """About the most that training takes, in bytes: 16 a parameter, and what plain PyTorch keeps for the backward pass.

    Fused kernels keep less, half as much or less. Told by a few tokens through one and through two turns of the model's
    pattern, and scaled up; no weight is drawn.
    """

    def a_token(turns: int) -> float:
        part = replace(model, depth=turns * len(model.mixers))
        with torch.device("meta"):
            plain = LanguageModel(part)
        plain = plain.to_empty(device="cpu").train()
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.detach().zero_()  # places in tables are read from some of them
        kept = []
        for steps in (4, 8):
            tokens = torch.zeros(2, steps + 1, dtype=torch.long)

            def pass_forward(tokens: torch.Tensor = tokens) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits, _ = plain(tokens[:, :-1])
                return next_token_loss(logits, tokens[:, 1:])

            kept.append(kept_bytes(pass_forward, plain))
        return (kept[1] - kept[0]) / 8

    one, two = a_token(1), a_token(2)
    turns = model.depth / len(model.mixers)
    return fixed_memory(model) + round(batch_size * seq_len * (one + (turns - 1) * (two - one)))


def measured_memory(config: RunConfig, model: ModelConfig) -> int:
    """Bytes that training holds at most: of a GPU, measured; of a CPU, weights, moments and what a pass keeps."""
    trainer = Trainer(config, model, Console(quiet=True))
    if trainer.device.type != "cuda":
        return fixed_memory(model) + trainer.rows * window_bytes(trainer)
    trainer.warm_up()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(_STEPS):
        trainer._train_step()
    torch.cuda.synchronize()
    return peak_memory(trainer.device)


def largest_batch(config: RunConfig, model: ModelConfig, memory: float) -> int:
    """The largest batch, a multiple of 8, whose training fits into so many bytes.

    Raises:
        UsageError: not even 8 windows do.
    """

    def needs(batch_size: int) -> int:
        used = measured_memory(replace(config, batch_size=batch_size), model)
        free_memory(MemoryError())
        return used

    few, more = needs(_MULTIPLE), needs(2 * _MULTIPLE)
    if few > memory:
        raise UsageError(
            f"{_MULTIPLE} windows need {format_bytes(few)}, and the study gives each run {format_bytes(memory)}: "
            f"give the study more memory, or a smaller model"
        )
    each = max(1.0, (more - few) / _MULTIPLE)
    multiples = min(_LARGEST, _MULTIPLE + (memory - few) / each) // _MULTIPLE
    batch_size = _MULTIPLE * int(multiples)
    # On a GPU memory is not quite a line.
    while batch_size > 2 * _MULTIPLE and needs(batch_size) > memory:
        batch_size -= _MULTIPLE
    return batch_size


@dataclass(frozen=True)
class ProbeJob:
    """Finds a run's largest batch and writes it to a file; a launcher runs it as it runs a training."""

    label: str
    name: str
    config: RunConfig
    model: ModelConfig
    memory: float
    out: Path

    def __call__(self) -> int:
        """Returns an exit code; a mistake is printed as ``elman train`` prints it."""
        try:
            batch_size = largest_batch(self.config, self.model, self.memory)
        except (UsageError, TrainingError) as error:
            print(f"elman: {one_line(str(error))}", flush=True)
            return 2
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps({"batch_size": batch_size}) + "\n", encoding="utf-8")
        partial.replace(self.out)
        return 0

    def found(self) -> int | None:
        """The batch, where it has been found already."""
        try:
            value = json.loads(self.out.read_text(encoding="utf-8"))["batch_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return value if isinstance(value, int) and value >= 1 else None
