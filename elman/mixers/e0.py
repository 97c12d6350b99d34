"""E0, the stock Elman network of 1990, with an optional input gate.

    u   = W_in x                          convolved over a few steps if so asked (short_conv.py)
    h_t = tanh(W_h h_{t-1} + W_x u_t + b)
    y   = h                               gate = none
    y   = h * silu(W_g u + b_g)           gate = input
    out = W_out y

Source: J. L. Elman, "Finding Structure in Time", Cognitive Science 14 (1990).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import State
from elman.mixers.elman_recurrence import ElmanRecurrence
from elman.mixers.short_conv import ConvElmanConfig, ConvMixer


@dataclass(frozen=True)
class E0Config(ConvElmanConfig):
    """Stock Elman: 2e + 2e² weights in units of D² (4 at e = 1), 2e + 3e² with the input gate."""

    name: ClassVar[str] = "e0"
    equation: ClassVar[str] = "h = tanh(W_h h + W_x W_in x + b); y = h"

    gate: Literal["none", "input"] = "none"
    """What the output is multiplied by: nothing, or silu(W_g u + b_g)."""

    def build(self, dim: int) -> E0:
        return E0(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        gate = d * d + d if self.gate == "input" else 0
        return 2 * dim * d + ElmanRecurrence.num_params(self.recurrent_weight(dim)) + gate + self.conv_params(dim)

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        gate = 2 * d * d if self.gate == "input" else 0
        return 2 * 2 * dim * d + ElmanRecurrence.flops_per_token(self.recurrent_weight(dim)) + gate


class E0(ConvMixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d)."""

    def __init__(self, dim: int, config: E0Config) -> None:
        super().__init__(dim, config)
        d = config.inner_size(dim)
        self.in_proj = nn.Linear(dim, d, bias=False)
        self.recurrence = ElmanRecurrence(config.recurrent_weight(dim), "tanh", config.bound)
        self.gate_proj = nn.Linear(d, d) if config.gate == "input" else None
        self.out_proj = nn.Linear(d, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.in_proj(x),)

    def mix(self, state: State, reset: Tensor | None, u: Tensor, *branches: Tensor) -> tuple[Tensor, State]:
        h, h_last = self.recurrence(u, state, reset)
        y = h if self.gate_proj is None else h * F.silu(self.gate_proj(u))
        return self.out_proj(y), h_last
