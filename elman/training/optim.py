"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from elman.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), fused; matrices decay, vectors (norms, biases) do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of a step.

    Args:
        config: peak rate, warm-up and schedule.
        step: steps done before this one.
        progress: the part of the run that is done, 0 to 1, by steps or by time.
    """
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    decay = 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warmup * decay
