"""E10, multi-scale: beside E1's state, k banks remember it for k different spans of time.

    u, z_0 … z_k = W_in x                 u = silu(u), convolved before if so asked (short_conv.py)
    h_t   = tanh(W_h h_{t-1} + W_x u_t + b)
    m_i,t = a_i ⊙ m_i,t-1 + (1 − a_i) ⊙ h_t,  a_i = sigmoid(learned), i = 1 … k
    y     = h ⊙ silu(z_0) + Σ_i m_i ⊙ silu(z_i)
    out   = W_out y

The decays start evenly spaced in [0.8, 0.99]: spans of 5 to 100 steps. The banks are linear in h, and come with the sum
of the outputs in one op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import State
from elman.mixers.elman_recurrence import ElmanRecurrence
from elman.mixers.short_conv import ConvElmanConfig, ConvMixer
from elman.ops import banks


@dataclass(frozen=True)
class E10Config(ConvElmanConfig):
    """Multi-scale Elman: (3 + k)e + 2e² weights in units of D², 9 at e = 1 with four banks."""

    name: ClassVar[str] = "e10"
    equation: ClassVar[str] = "h as E1; m_i = a_i m_i + (1 - a_i) h; y = h * silu(z_0) + Σ m_i * silu(z_i)"

    banks: int = 4
    """k, the running means of h."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.banks <= 16:
            raise UsageError(f"--banks {self.banks} is out of range: give 1 to 16")

    def build(self, dim: int) -> E10:
        return E10(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        recurrence = ElmanRecurrence.num_params(self.recurrent_weight(dim))
        return (3 + self.banks) * dim * d + self.banks * d + recurrence + self.conv_params(dim)

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        return 2 * (3 + self.banks) * dim * d + ElmanRecurrence.flops_per_token(self.recurrent_weight(dim))

    def state_size(self, dim: int, seq_len: int) -> int:
        return super().state_size(dim, seq_len) + self.banks * self.inner_size(dim)


class E10(ConvMixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d) and m (B, k, d)."""

    # Weight decay would draw every decay to a half.
    no_decay = frozenset({"decay_logits"})

    def __init__(self, dim: int, config: E10Config) -> None:
        super().__init__(dim, config)
        d, k = config.inner_size(dim), config.banks
        self.in_proj = nn.Linear(dim, (2 + k) * d, bias=False)
        self.recurrence = ElmanRecurrence(config.recurrent_weight(dim), "tanh", config.bound)
        self.banks = k
        self.decay_logits = nn.Parameter(torch.linspace(0.8, 0.99, k).logit().repeat_interleave(d))
        self.out_proj = nn.Linear(d, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        k, d = self.banks, len(self.decay_logits) // self.banks
        # Two products, as in E1.
        z = F.linear(x, self.in_proj.weight[d:])
        return F.linear(x, self.in_proj.weight[:d]), z.view(*z.shape[:-1], 1 + k, d)

    def mix(self, state: State, reset: Tensor | None, u: Tensor, *branches: Tensor) -> tuple[Tensor, State]:
        (z,) = branches
        h0, m0 = (None, None) if state is None else state
        h, h_last = self.recurrence(F.silu(u), h0, reset)
        decay = self.decay_logits.sigmoid().view(self.banks, -1)
        y, m_last = banks(h, z, decay, m0, reset=reset)
        return self.out_proj(y), (h_last, m_last)
