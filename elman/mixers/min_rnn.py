"""minGRU and minLSTM: gates that see the input alone make the recurrence linear, and so a scan.

    minGRU    h_t = (1 - z_t) h_{t-1} + z_t g(W_h x),                z = sigmoid(W_z x + b_z)
    minLSTM   h_t = (f_t h_{t-1} + i_t g(W_h x)) / (f_t + i_t),      f, i = sigmoid(W x + b)
    g(v)      = v + 1/2 where v >= 0, sigmoid(v) elsewhere: continuous, and always positive
    out       = W_out h

Source: Feng et al., "Were RNNs All We Needed?" (2024), arXiv 2410.01201, as in its appendix B but for the scan, which
needs no logarithms here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import ExpandedConfig, Mixer, State
from elman.ops import linear_scan, note_backend
from elman.ops.scan import scan_backend


@dataclass(frozen=True)
class MinRNNConfig(ExpandedConfig):
    """P products of the input and one of the output: (P + 1) e weights in units of D²."""

    products: ClassVar[int]

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        return self.products * (dim * d + d) + d * dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        return 2 * (self.products + 1) * dim * self.inner_size(dim)

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.inner_size(dim)


@dataclass(frozen=True)
class MinGRUConfig(MinRNNConfig):
    """minGRU: 3e weights in units of D²."""

    name: ClassVar[str] = "mingru"
    equation: ClassVar[str] = "y = (1 − z) y + z g(W_h x); z = σ(W_z x + b)"
    products: ClassVar[int] = 2

    def build(self, dim: int) -> MinGRU:
        return MinGRU(dim, self)


@dataclass(frozen=True)
class MinLSTMConfig(MinRNNConfig):
    """minLSTM: 4e weights in units of D²."""

    name: ClassVar[str] = "minlstm"
    equation: ClassVar[str] = "y = (f y + i g(W_h x)) / (f + i); f, i = σ(W x + b)"
    products: ClassVar[int] = 3

    def build(self, dim: int) -> MinLSTM:
        return MinLSTM(dim, self)


class MinRNN(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d), never of a half type."""

    def __init__(self, dim: int, config: MinRNNConfig) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.products = config.products
        self.in_proj = nn.Linear(dim, config.products * d)
        self.out_proj = nn.Linear(d, dim, bias=False)

    @abstractmethod
    def gates(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of the state and what is taken of the candidate, of gates before their activation."""

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        weights, biases = self.in_proj.weight.chunk(self.products), self.in_proj.bias.chunk(self.products)
        *gates, candidate = (_at_least_float32(F.linear(x, w, b)) for w, b in zip(weights, biases, strict=True))
        keep, take = self.gates(*gates)
        # The branch not taken is bounded, so that its gradient is no number times zero but zero.
        positive = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        note_backend(scan_backend(keep.device, keep.dtype))
        h = linear_scan(keep, take * positive, state, reset=reset)
        return self.out_proj(h.to(x.dtype)), h[-1]


class MinGRU(MinRNN):
    def gates(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = gates
        return torch.sigmoid(-z), torch.sigmoid(z)


class MinLSTM(MinRNN):
    def gates(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        # f / (f + i) of their logarithms: both may be too small to divide.
        difference = F.logsigmoid(gates[0]) - F.logsigmoid(gates[1])
        return torch.sigmoid(difference), torch.sigmoid(-difference)


def _at_least_float32(x: Tensor) -> Tensor:
    """Half types round a gate near 1 to 1: what is kept would be kept for ever."""
    return x.float() if x.dtype.itemsize < 4 else x
