"""E5, the pure low-rank Elman network: every matrix is one of rank r, and there are no projections around it.

h_t = tanh(U_h V_h h_{t-1} + U_x V_x x_t + b)     d = D, all U (D, r), all V (r, D)
y   = h * silu(U_z V_z x)                         gate = input
y   = h                                           gate = none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import Mixer, State
from elman.mixers.recurrent_weight import WeightConfig, WeightOptions, slow_rank
from elman.ops import recurrence
from elman.options import OptionalInt, check_at_least


@dataclass(frozen=True)
class E5Config(WeightOptions):
    """Pure low-rank Elman: 6 D r weights, 4 D r without the gate."""

    name: ClassVar[str] = "e5"
    equation: ClassVar[str] = "h = tanh(U_h V_h h + U_x V_x x + b); y = h * silu(U_z V_z x)"

    gate: Literal["input", "none"] = "input"
    """What the output is multiplied by: silu(U_z V_z x), or nothing."""
    constraint: Literal["free", "spectral_norm"] = "free"
    """What holds U_h V_h: nothing, or a bound of 0.99 on its largest singular value."""
    rank: OptionalInt = None
    """Of every matrix; if absent 0.176 D, at least 16, and a multiple of 8, as tensor cores read rows (272 at a model
    width of 1536, where the seeds had 270)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, rank=1)

    def recurrent_weight(self, dim: int) -> WeightConfig:
        """U_h V_h at model width ``dim``."""
        rank = self.rank or min(dim, max(16, 8 * round(dim * 270 / 1536 / 8)))
        return WeightConfig(dim, self, "low_rank", rank=rank)

    def slow_option(self) -> str | None:
        return slow_rank(self.rank)

    def build(self, dim: int) -> E5:
        return E5(dim, self)

    def num_params(self, dim: int) -> int:
        weight = self.recurrent_weight(dim)
        return weight.num_params() * self._matrices + dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        return self.recurrent_weight(dim).flops_per_token() * self._matrices

    def state_size(self, dim: int, seq_len: int) -> int:
        return dim

    @property
    def _matrices(self) -> int:
        return 3 if self.gate == "input" else 2


class E5(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, D)."""

    outputs = frozenset()

    def __init__(self, dim: int, config: E5Config) -> None:
        super().__init__()
        weight = config.recurrent_weight(dim)
        self.weight_h = weight.build()
        self.input = _low_rank_linear(dim, weight.rank, bias=True)
        self.gate_proj = _low_rank_linear(dim, weight.rank, bias=False) if config.gate == "input" else None

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        h, h_last = recurrence(self.input(x), self.weight_h(), state, cell="tanh", reset=reset)
        return h if self.gate_proj is None else h * F.silu(self.gate_proj(x)), h_last


def _low_rank_linear(size: int, rank: int, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=bias))
