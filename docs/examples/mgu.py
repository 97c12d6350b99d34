"""The minimal gated unit, two products a step, the second of what the first one's gate lets through.

    f_t = σ(W_f x_t + U_f h_{t-1} + b_f)
    c_t = tanh(W_c x_t + U_c (f_t ⊙ h_{t-1}) + b_c)
    h_t = (1 − f_t) ⊙ h_{t-1} + f_t ⊙ c_t
    out = W_out h

Source: G.-B. Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks" (2016), arXiv 1603.09420.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from elman.mixers.base import ExpandedConfig, Mixer, State
from elman.ops import note_backend


@dataclass(frozen=True)
class MGUConfig(ExpandedConfig):
    """A gate and a candidate: 3e + 2e² weights in units of D² (5 at e = 1)."""

    name: ClassVar[str] = "mgu"
    equation: ClassVar[str] = "h = (1 − f) h + f tanh(W_c x + U_c (f h) + b); f = σ(W_f x + U_f h + b)"

    def build(self, dim: int) -> MGU:
        return MGU(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        return 3 * dim * d + 2 * d * d + 2 * d

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        return 2 * (3 * dim * d + 2 * d * d)

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.inner_size(dim)


class MGU(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d)."""

    def __init__(self, dim: int, config: MGUConfig) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.in_proj = nn.Linear(dim, 2 * d)
        self.gate = nn.Linear(d, d, bias=False)
        self.candidate = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, dim, bias=False)

    @property
    def compiles(self) -> bool:
        return False  # a compiler would unroll all steps

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        note_backend("torch")
        pre_f, pre_c = self.in_proj(x).chunk(2, dim=-1)
        h = torch.zeros_like(pre_f[0]) if state is None else state
        outputs = []
        for t in range(len(x)):
            if reset is not None:
                h = h.masked_fill(reset[t].unsqueeze(-1), 0.0)
            f = torch.sigmoid(pre_f[t] + self.gate(h))
            h = torch.lerp(h, torch.tanh(pre_c[t] + self.candidate(f * h)), f)
            outputs.append(h)
        return self.out_proj(torch.stack(outputs)), h
