"""Operators: how the previous state becomes the recurrent product ``rec`` of a step.

The kind of operator is read from the weight's shape, so that a structure of the recurrent matrix is only a different
weight. See ``cells.py`` for the other half of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError


class Operator(Protocol):
    """``operator(h)`` is the recurrent product of the state h (B, H), of the same shape."""

    def __call__(self, h: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """``rec = h @ weight.T`` with weight (H, H), laid out as PyTorch's ``weight_hh``."""

    weight: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)


def make_operator(weight: Tensor, hidden_size: int) -> Operator:
    """The operator on ``hidden_size`` units that ``weight`` stands for by its shape: (H, H) is dense.

    Raises:
        UsageError: no operator on H units has a weight of this shape.
    """
    if weight.shape == (hidden_size, hidden_size):
        return Dense(weight)
    raise UsageError(
        f"weight has shape {tuple(weight.shape)}, but pre has {hidden_size} hidden units: "
        f"give a weight of shape ({hidden_size}, {hidden_size})"
    )
