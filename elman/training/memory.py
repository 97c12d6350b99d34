"""How much memory training takes, before it starts and where it did not suffice."""

from __future__ import annotations

import torch

from elman.environment import total_memory
from elman.errors import UsageError
from elman.model import ModelConfig
from elman.sizing import num_params
from elman.units import format_bytes, format_count


def fixed_memory(config: ModelConfig) -> int:
    """Bytes that training takes whatever the batch: weights, gradients and two moments, 4 a number."""
    return 16 * num_params(config)


def check_memory(config: ModelConfig, device: torch.device) -> None:
    """What training takes whatever the batch fits the device.

    Raises:
        UsageError: it does not.
    """
    needed, there = fixed_memory(config), total_memory(device)
    if needed > there:
        raise UsageError(
            f"a model of {format_count(num_params(config))} parameters needs {format_bytes(needed)} for weights and "
            f"optimiser, but {device} has {format_bytes(there)}: give a smaller --params, --dim or --depth"
        )
