"""Where memory did not suffice: what took it, and what to lower."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elman.environment import total_memory
from elman.model import next_token_loss
from elman.training.checks import fixed_memory
from elman.units import format_bytes

if TYPE_CHECKING:
    from elman.training.loop import Trainer


def kept_bytes(pass_forward: Callable[[], object], model: nn.Module) -> int:
    """What a forward pass keeps for its backward pass, in bytes, the model's own tensors left out."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held to the end: memory that were free again could be counted twice, or not at all.
        _result = pass_forward()
    return total


def window_bytes(trainer: Trainer) -> int:
    """What a window's forward pass keeps for its backward pass, in bytes: told by a plain one over one window."""
    trainer.model.compile_training(lambda call: call)
    tokens = torch.zeros(1, trainer.config.seq_len + 1, dtype=torch.long, device=trainer.device)
    reset = torch.zeros_like(tokens[:, 1:], dtype=torch.bool) if trainer.sampler.resets else None

    def pass_forward() -> Tensor:
        with trainer.autocast():
            logits, _ = trainer.model(tokens[:, :-1], None, reset)
        return next_token_loss(logits, tokens[:, 1:])

    return kept_bytes(pass_forward, trainer.model)


def free_memory(error: BaseException) -> None:
    """Let go of what the frames that an error went through still hold."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def advice(trainer: Trainer, error: BaseException) -> str:
    """What took the memory, and what to lower, where training ran out of it with ``error``."""
    config, there, fixed = (
        trainer.config,
        total_memory(trainer.device),
        fixed_memory(trainer.model_config, trainer.processes),
    )
    first, *_ = str(error).splitlines() or ["no message"]
    windows = trainer.rows
    trainer.optimizer.zero_grad()
    free_memory(error)
    try:
        kept = window_bytes(trainer)
    except Exception:
        # Not even one window fits, or the device is past answering.
        took = f"the rest went to a pass over {windows} windows of {config.seq_len}"
    else:
        most = max(0, (there - fixed) // kept)
        took = (
            f"each of the {windows} windows of {config.seq_len} in a pass keeps {format_bytes(kept)} for the backward "
            f"pass, {format_bytes(windows * kept)} in all (at most {most:,} could ever fit)"
        )
    return (
        f"out of memory at step {trainer.step} ({first}): of the {format_bytes(there)} of {trainer.device}, weights, "
        f"gradients and optimiser take {format_bytes(fixed)}, and {took}: give a smaller --batch-size, --seq-len or "
        f"--params, or a larger --grad-accum, which splits a step's batch into parts"
    )
