"""A short causal depthwise convolution before the recurrence, and what the variants that offer it share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import Mixer, State, check_bound
from elman.mixers.elman_recurrence import ElmanConfig
from elman.ops import short_conv
from elman.ops.short_conv import Activation


class ShortConv(nn.Module):
    """``elman.ops.short_conv`` with weights of its own, of which each of several tensors takes its part.

    It starts as the identity: the model with it, and no activation, begins where the one without it does.
    """

    no_matrix = frozenset({"weight"})

    def __init__(self, sizes: Sequence[int], width: int, activation: Activation = "identity") -> None:
        super().__init__()
        self.sizes, self.activation = list(sizes), activation
        self.weight = nn.Parameter(torch.zeros(width, sum(sizes)))
        nn.init.ones_(self.weight[0])

    def forward(
        self, parts: Sequence[Tensor], last: Tensor | None, reset: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Tensors (T, B, size), the inputs before them (B, width − 1, all sizes) or None -> the same, convolved."""
        weights = self.weight.split_with_sizes(self.sizes, dim=1)
        lasts = [None] * len(parts) if last is None else last.split_with_sizes(self.sizes, dim=2)
        found = [
            short_conv(part, weight, before, activation=self.activation, reset=reset)
            for part, weight, before in zip(parts, weights, lasts, strict=True)
        ]
        left = [after for _, after in found]
        return [v for v, _ in found], left[0] if len(left) == 1 else torch.cat(left, dim=2)


@dataclass(frozen=True)
class ConvElmanConfig(ElmanConfig):
    """Options of an Elman variant whose recurrent input may be convolved first."""

    bound: float = 1.0
    """What the state stays within: h = bound f((W_h h + W_x u + b) / bound). The larger, the nearer f is to linear."""
    conv: int = 0
    """Width of a short causal depthwise convolution of u, such as 4; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bound(self.bound)
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
        self.conv = ShortConv([config.inner_size(dim)], config.conv) if config.conv else None

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
        (u,), last = self.conv([u], last, reset)
        y, state = self.mix(state, reset, u, *branches)
        return y, (state, last)
