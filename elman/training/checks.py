"""What must hold before a model is trained: each says in words what does not, and the cure."""

from __future__ import annotations

import torch
from torch import nn

from elman.environment import total_memory
from elman.errors import UsageError
from elman.model import ModelConfig
from elman.sizing import num_params
from elman.training.config import RunConfig
from elman.training.distributed import ALONE, Processes
from elman.units import format_bytes, format_count


def rows_a_pass(config: RunConfig, processes: Processes) -> int:
    """Windows that a rank's pass is over: its share of the batch, by parts.

    Raises:
        UsageError: the batch cannot be shared evenly.
    """
    parts = processes.size * config.grad_accum
    if config.batch_size % parts:
        raise UsageError(
            f"--batch-size {config.batch_size} is that of all processes, and {processes.size} of them with "
            f"--grad-accum {config.grad_accum} cannot share it evenly: give a multiple of {parts}"
        )
    return config.batch_size // parts


def fixed_memory(config: ModelConfig, processes: Processes = ALONE) -> int:
    """Bytes that training takes of a rank whatever the batch: weights, gradients and two moments, 4 a number."""
    return 16 * num_params(config) // (processes.size if processes.kind == "fsdp" else 1)


def check_memory(config: ModelConfig, device: torch.device, processes: Processes) -> None:
    """The model fits.

    Raises:
        UsageError: it does not.
    """
    needed, there = fixed_memory(config, processes), total_memory(device)
    if needed > there:
        raise UsageError(
            f"a model of {format_count(num_params(config))} parameters needs {format_bytes(needed)} for weights and "
            f"optimiser, but {device} has {format_bytes(there)}: give a smaller --params, --dim or --depth"
        )


def check_counts(config: ModelConfig, model: nn.Module) -> None:
    """What the formulas count, by which models are compared, is what is trained.

    Raises:
        UsageError: it is not: a variant's ``num_params`` is wrong.
    """
    counted, there = num_params(config), sum(parameter.numel() for parameter in model.parameters())
    if counted != there:
        raise UsageError(
            f"--model {config.pattern} has {there:,} parameters, but its formulas count {counted:,}: correct "
            f"num_params of the variant's config, or what the module has; elman check of the variant tells"
        )


def slow_option(model: ModelConfig, device: torch.device, precision: str) -> str | None:
    """What a mixer says of an option that is slow where tensor cores work, the first to say something; else None."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return next((complaint for mixer in model.mixers if (complaint := mixer.slow_option()) is not None), None)


def check_mixers(
    model: ModelConfig, config: RunConfig, resets: bool, carries_state: bool, device: torch.device
) -> None:
    """Every mixer can be trained by what the data's mode asks for.

    Raises:
        UsageError: one cannot.
    """
    for mixer in model.mixers:
        if resets:
            mixer.check_resets(device)
        sizes = [mixer.state_size(model.dim, seq_len) for seq_len in (config.seq_len, config.seq_len + 1)]
        if carries_state and sizes[0] != sizes[1]:
            raise UsageError(
                f"--sampling tbptt carries a model's state through the whole file, but that of {mixer.name} grows with "
                f"the text: give --sampling documents or windows, or another --model"
            )
