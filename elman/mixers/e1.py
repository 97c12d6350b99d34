"""E1, the gated Elman network: a second branch decides how much of each unit is shown.

    u, z = W_in x                         u = silu(u)
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

from elman.mixers.base import Mixer, State
from elman.mixers.elman_recurrence import ElmanConfig, ElmanRecurrence


@dataclass(frozen=True)
class E1Config(ElmanConfig):
    """Gated Elman: 3e + 2e² weights in units of D² (5 at e = 1), 2e + 4e² with the hx gate."""

    name: ClassVar[str] = "e1"
    equation: ClassVar[str] = "h = tanh(W_h h + W_x silu(u) + b); y = h * silu(z); u, z = W_in x"

    gate: Literal["split", "hx", "sigmoid"] = "split"
    """What the output is multiplied by: silu(z), silu(W_g [h, u] + b_g), or sigmoid(z)."""

    def build(self, dim: int) -> E1:
        return E1(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        gate = 2 * d * d + d if self.gate == "hx" else dim * d
        return 2 * dim * d + ElmanRecurrence.num_params(self.recurrent_weight(dim)) + gate

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        gate = 2 * 2 * d * d if self.gate == "hx" else 2 * dim * d
        return 2 * 2 * dim * d + ElmanRecurrence.flops_per_token(self.recurrent_weight(dim)) + gate


class E1(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d)."""

    def __init__(self, dim: int, config: E1Config) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.gate = config.gate
        self.in_proj = nn.Linear(dim, d if config.gate == "hx" else 2 * d, bias=False)
        self.recurrence = ElmanRecurrence(config.recurrent_weight(dim), cell="tanh")
        self.gate_proj = nn.Linear(2 * d, d) if config.gate == "hx" else None
        self.out_proj = nn.Linear(d, dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        if self.gate_proj is None:
            # Two products, since the halves of one of both would have to be cut apart, and their gradients joined.
            u, z = (F.linear(x, weight) for weight in self.in_proj.weight.chunk(2))
            u = F.silu(u)
            h, h_last = self.recurrence(u, state, reset)
        else:
            u = F.silu(self.in_proj(x))
            h, h_last = self.recurrence(u, state, reset)
            weight_h, weight_u = self.gate_proj.weight.chunk(2, dim=1)
            z = F.linear(h, weight_h) + F.linear(u, weight_u, self.gate_proj.bias)
        y = h * (z.sigmoid() if self.gate == "sigmoid" else F.silu(z))
        return self.out_proj(y), h_last
