"""An Elman network whose output is gated without a squashing nonlinearity.

    u   = W_in x
    h_t = tanh(W_h h_{t-1} + W_x u_t + b)
    y   = h * f(W_g u)                    f: the identity (bilinear), or relu
    out = W_out y

Source of the gates: N. Shazeer, "GLU Variants Improve Transformer" (2020), arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import ExpandedConfig, Mixer, State, WeightInit
from elman.ops import recurrence


@dataclass(frozen=True)
class GLUConfig(ExpandedConfig):
    """Gated by a product alone: 2e + 3e² weights in units of D² (5 at e = 1)."""

    name: ClassVar[str] = "glu"
    equation: ClassVar[str] = "h = tanh(W_h h + W_x u + b); y = h * f(W_g u); u = W_in x"

    gate: Literal["bilinear", "relu"] = "bilinear"
    """f, what the output is multiplied by: W_g u itself, or relu of it."""

    def build(self, dim: int) -> GLU:
        return GLU(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        return 2 * dim * d + 3 * d * d + d

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        return 2 * (2 * dim * d + 3 * d * d)

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.inner_size(dim)


class GLU(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d)."""

    def __init__(self, dim: int, config: GLUConfig) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.relu = config.gate == "relu"
        self.in_proj = nn.Linear(dim, d, bias=False)
        self.input = nn.Linear(d, d)
        self.weight_h = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, dim, bias=False)

    def initialize(self, weight_init: WeightInit = "normal") -> None:
        super().initialize(weight_init)
        nn.init.orthogonal_(self.weight_h.weight)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        u = self.in_proj(x)
        h, h_last = recurrence(self.input(u), self.weight_h.weight, state, cell="tanh", reset=reset)
        z = self.gate(u)
        return self.out_proj(h * (F.relu(z) if self.relu else z)), h_last
