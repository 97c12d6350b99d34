"""A short causal depthwise convolution before the recurrence, and what the variants that offer it share.

    v_t = Σ_j w_j ⊙ u_{t-j},  j = 0 … width − 1

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import Mixer, State
from elman.mixers.elman_recurrence import ElmanConfig


class ShortConv(nn.Module):
    """See the top of this file. It starts as the identity: the model with it begins where the one without it does."""

    no_matrix = frozenset({"weight"})

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size))
        nn.init.ones_(self.weight[0])

    def forward(self, u: Tensor, last: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """U (T, B, d), the inputs before it (B, width − 1, d) or None, reset (T, B) -> v and the last inputs.

        Inputs from before a reset count as zero after it, in what is returned too.
        """
        seq_len, before = len(u), len(self.weight) - 1
        if last is None:
            last = u.new_zeros(u.shape[1], before, u.shape[2])
        inputs = torch.cat([last.to(u.dtype).transpose(0, 1), u])
        weight = self.weight.to(u.dtype)
        # Which sequence of its row an input belongs to: resets count it up.
        sequence = None if reset is None else F.pad(reset.cumsum(0), (0, 0, before, 0)).unsqueeze(-1)
        v = weight[0] * u
        for lag in range(1, before + 1):
            start = before - lag
            earlier = inputs[start : start + seq_len]
            if sequence is not None:
                earlier = earlier.masked_fill(sequence[start : start + seq_len] != sequence[before:], 0)
            v = v + weight[lag] * earlier
        last = inputs[seq_len:]
        if sequence is not None:
            last = last.masked_fill(sequence[seq_len:] != sequence[-1:], 0)
        return v, last.transpose(0, 1)


@dataclass(frozen=True)
class ConvElmanConfig(ElmanConfig):
    """Options of an Elman variant whose recurrent input may be convolved first."""

    conv: int = 0
    """Width of a short causal depthwise convolution of u, such as 4; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv != 0 and not 2 <= self.conv <= 64:
            raise UsageError(f"--conv {self.conv} is out of range: give 0 for none, or a width from 2 to 64")

    def conv_params(self, dim: int) -> int:
        """Learned numbers of the convolution, whose products are pointwise."""
        return self.conv * self.inner_size(dim)

    def state_size(self, dim: int, seq_len: int) -> int:
        return super().state_size(dim, seq_len) + max(0, self.conv - 1) * self.inner_size(dim)


class ConvMixer(Mixer):
    """A mixer in two parts, between which u may be convolved: then its state is a pair, of its own and those inputs."""

    def __init__(self, dim: int, config: ConvElmanConfig) -> None:
        super().__init__()
        self.conv = ShortConv(config.inner_size(dim), config.conv) if config.conv else None

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """X (T, B, D) -> u (T, B, d), and what else ``mix`` takes."""

    @abstractmethod
    def mix(self, state: State, reset: Tensor | None, u: Tensor, *branches: Tensor) -> tuple[Tensor, State]:
        """What ``project`` returned, u perhaps convolved -> y (T, B, D), the state."""

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        u, *branches = self.project(x)
        if self.conv is None:
            return self.mix(state, reset, u, *branches)
        state, last = (None, None) if state is None else state
        u, last = self.conv(u, last, reset)
        y, state = self.mix(state, reset, u, *branches)
        return y, (state, last)
