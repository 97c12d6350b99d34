"""What the dense Elman variants share: an expanded inner width and the recurrence itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import MixerConfig
from elman.ops import recurrence


class ElmanRecurrence(nn.Module):
    """``h_t = f(W_h h_{t-1} + W_x u_t + b)`` on d units (Elman, 1990), the input's product done for all steps at once.

    W_h starts orthogonal, just inside the unit circle, so that neither states nor gradients grow or fade at first.
    """

    def __init__(self, size: int, cell: str) -> None:
        super().__init__()
        self.cell = cell
        self.input = nn.Linear(size, size)
        self.weight_h = nn.Parameter(torch.empty(size, size))
        nn.init.orthogonal_(self.weight_h, gain=0.999)

    def forward(self, u: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """U (T, B, d), h0 (B, d) or None, reset (T, B) -> h (T, B, d), h_last (B, d)."""
        return recurrence(self.input(u), self.weight_h, h0, cell=self.cell, reset=reset)

    @staticmethod
    def num_params(size: int) -> int:
        return 2 * size * size + size

    @staticmethod
    def flops_per_token(size: int) -> int:
        return 2 * 2 * size * size


@dataclass(frozen=True)
class ElmanConfig(MixerConfig):
    """Options that every dense Elman variant takes."""

    expansion: float = 1.0
    """Inner width as a multiple of the model width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.expansion <= 64:
            raise UsageError(f"--expansion {self.expansion} is out of range: give a number above 0 and up to 64")

    def inner_size(self, dim: int) -> int:
        """d, the number of recurrent units at model width ``dim``."""
        return max(1, round(self.expansion * dim))

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.inner_size(dim)
