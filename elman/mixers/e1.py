"""E1, the gated Elman network: a second branch decides how much of each unit is shown.

    u, z = W_in x                         u = silu(u), convolved before if so asked (short_conv.py)
    h_t  = tanh(W_h h_{t-1} + W_x u_t + b)
    y    = h * silu(z)                    gate = split
    y    = h * sigmoid(z)                 gate = sigmoid
    y    = h * silu(W_g [h, u] + b_g)     gate = hx, where W_in makes u alone
    out  = W_out y

W_g h is one product over all steps after the recurrence, not a part of a step.
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
class E1Config(ConvElmanConfig):
    """Gated Elman: 3e + 2e² weights in units of D² (5 at e = 1), 2e + 4e² with the hx gate."""

    name: ClassVar[str] = "e1"
    equation: ClassVar[str] = "h = tanh(W_h h + W_x silu(u) + b); y = h * silu(z); u, z = W_in x"

    cell: ClassVar[str] = "tanh"

    gate: Literal["split", "hx", "sigmoid"] = "split"
    """What the output is multiplied by: silu(z), silu(W_g [h, u] + b_g), or sigmoid(z)."""

    def build(self, dim: int) -> E1:
        return E1(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        gate = 2 * d * d + d if self.gate == "hx" else dim * d
        return 2 * dim * d + ElmanRecurrence.num_params(self.recurrent_weight(dim)) + gate + self.conv_params(dim)

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        gate = 2 * 2 * d * d if self.gate == "hx" else 2 * dim * d
        return 2 * 2 * dim * d + ElmanRecurrence.flops_per_token(self.recurrent_weight(dim)) + gate


class E1(ConvMixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d)."""

    def __init__(self, dim: int, config: E1Config) -> None:
        super().__init__(dim, config)
        d = config.inner_size(dim)
        self.gate = config.gate
        self.in_proj = nn.Linear(dim, d if config.gate == "hx" else 2 * d, bias=False)
        self.recurrence = ElmanRecurrence(config.recurrent_weight(dim), config.cell, config.bound)
        self.gate_proj = nn.Linear(2 * d, d) if config.gate == "hx" else None
        self.out_proj = nn.Linear(d, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        # Several products, since the parts of one of all would have to be cut apart, and their gradients joined.
        weights = (self.in_proj.weight,) if self.gate == "hx" else self.in_proj.weight.chunk(2)
        return tuple(F.linear(x, weight) for weight in weights)

    def mix(self, state: State, reset: Tensor | None, u: Tensor, *branches: Tensor) -> tuple[Tensor, State]:
        u = F.silu(u)
        h, h_last = self.recurrence(u, state, reset)
        if self.gate_proj is None:
            (z,) = branches
        else:
            weight_h, weight_u = self.gate_proj.weight.chunk(2, dim=1)
            z = F.linear(h, weight_h) + F.linear(u, weight_u, self.gate_proj.bias)
        y = h * (z.sigmoid() if self.gate == "sigmoid" else F.silu(z))
        return self.out_proj(y), h_last
