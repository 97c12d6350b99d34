"""The older ladder: rungs that each add one idea to the stock network, to see what each is worth.

    u   = W_in x
    h_t = (1 − δ_t) ⊙ h_{t-1} + δ_t ⊙ c_t,  δ = σ(W_δ u + b_δ),  c = tanh(W_h h_{t-1} + W_x u + b)
    y   = softmax(h in g groups) ⊙ silu(W_o h)
    out = W_out y

    ladder_0    E0
    ladder_1    the δ-gate: a rate for every unit, from the input; y = h
    ladder_2    y as above: units of a group compete, and a second branch decides what is shown
    ladder_3    ladder_2 with W_h a diagonal
    ladder_4    ladder_2 with W_h held by a constraint
    ladder_5    ladder_2 with δ = σ(W_δ u + R_δ h_{t-1} + b_δ)
    ladder_6    ladder_3 with c = sign(v) e (|v| / e)^α in place of tanh(v), α = 1 + softplus(W_α u + b_α), v clamped

b_δ starts at −2, so that a unit at first forgets over eight steps. g is ``--groups``, or the next number below it that
divides the units.

v is clamped to [−1, 1], within which c and so h stay whatever the weights, and the e's hold the slope to at most 1
whatever α: without both, v ↦ |v|^α stretches, by α at 1, and a diagonal near 1 feeds it back to itself. With neither, a
small ladder_6 ends in NaN within 200 steps of AdamW on text at a learning rate of 1e-2. With the clamp alone, one of
10M parameters at 1e-3 meets gradients of a norm of 1e19, skips 12 of 1,000 steps as not finite and ends at 1.90 nats a
byte; with both, no norm passes 10 and it ends at 1.82. The other rungs need nothing: their states are means of what a
tanh bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import Mixer, State, WeightInit
from elman.mixers.e0 import E0Config
from elman.mixers.elman_recurrence import ElmanConfig
from elman.mixers.recurrent_weight import Structure, WeightConfig
from elman.ops import recurrence
from elman.ops.cells import CELLS, Cell
from elman.ops.gated_softmax import gated_softmax
from elman.options import check_at_least

_DELTA_BIAS = -2.0


@dataclass(frozen=True)
class Ladder0Config(E0Config):
    """As E0."""

    name: ClassVar[str] = "ladder_0"


@dataclass(frozen=True)
class Ladder1Config(ElmanConfig):
    """The δ-gate: 2e + 3e² weights in units of D² (5 at e = 1)."""

    name: ClassVar[str] = "ladder_1"
    equation: ClassVar[str] = "h = (1 - δ) h + δ tanh(W_h h + W_x u + b), δ = sigmoid(W_δ u + b_δ); y = h"
    cell: ClassVar[str] = "delta"

    def build(self, dim: int) -> Rung:
        return Rung(dim, self)

    def rule(self) -> Cell:
        return CELLS[self.cell]

    def weight_h(self, dim: int) -> WeightConfig:
        """Of all the cell's products."""
        return self.recurrent_weight(dim, self.rule().products)

    def groups_of(self, size: int) -> int:
        """In how many groups the softmax takes that many units; 0 for none."""
        return 0

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        shown = d * d if self.groups_of(d) else 0
        return 2 * dim * d + self.rule().gates * (d * d + d) + self.weight_h(dim).num_params() + shown

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        products = 2 * dim * d + (self.rule().gates + bool(self.groups_of(d))) * d * d
        return 2 * products + self.weight_h(dim).flops_per_token()


@dataclass(frozen=True)
class Ladder2Config(Ladder1Config):
    """Selective output: 2e + 4e² weights in units of D² (6 at e = 1)."""

    name: ClassVar[str] = "ladder_2"
    equation: ClassVar[str] = "ladder_1 with y = softmax(h in g groups) * silu(W_o h)"

    groups: int = 32
    """g, the groups of the softmax; fewer where so many do not divide the units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, groups=1)

    def groups_of(self, size: int) -> int:
        return next(n for n in range(min(self.groups, size), 0, -1) if size % n == 0)


@dataclass(frozen=True)
class Ladder3Config(Ladder2Config):
    """Diagonal: 2e + 3e² weights in units of D², and a vector (5 at e = 1)."""

    name: ClassVar[str] = "ladder_3"
    equation: ClassVar[str] = "ladder_2 with W_h a diagonal"

    structure: Structure = "diagonal"


@dataclass(frozen=True)
class Ladder4Config(Ladder2Config):
    """Full recurrence: 2e + 4e² weights in units of D² (6 at e = 1)."""

    name: ClassVar[str] = "ladder_4"
    equation: ClassVar[str] = "ladder_2 with W_h free, of bounded norm or scaled orthogonal"

    constraint: Literal["free", "spectral_norm", "scaled_orthogonal"] = "spectral_norm"


@dataclass(frozen=True)
class Ladder5Config(Ladder2Config):
    """Triple R: 2e + 5e² weights in units of D² (7 at e = 1)."""

    name: ClassVar[str] = "ladder_5"
    equation: ClassVar[str] = "ladder_2 with δ = sigmoid(W_δ u + R_δ h + b_δ)"
    cell: ClassVar[str] = "triple_r"


@dataclass(frozen=True)
class Ladder6Config(Ladder3Config):
    """Polynomial: 2e + 4e² weights in units of D², and a vector (6 at e = 1)."""

    name: ClassVar[str] = "ladder_6"
    equation: ClassVar[str] = "ladder_3 with sign(v) e (|v| / e)^α in place of tanh(v), α = 1 + softplus(W_α u + b_α)"
    cell: ClassVar[str] = "polynomial"


class Rung(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d), or what the cell has."""

    def __init__(self, dim: int, config: Ladder1Config) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.cell, self.gates, self.groups = config.cell, config.rule().gates, config.groups_of(d)
        self.in_proj = nn.Linear(dim, d, bias=False)
        # What the gates see of the input, by the cell's order: the candidate, δ, and α where there is one.
        self.input = nn.Linear(d, self.gates * d)
        self.weight_h = config.weight_h(dim).build()
        self.show_proj = nn.Linear(d, d, bias=False) if self.groups else None
        self.out_proj = nn.Linear(d, dim, bias=False)

    def initialize(self, weight_init: WeightInit = "normal") -> None:
        super().initialize(weight_init)
        nn.init.constant_(self.input.bias.chunk(self.gates)[1], _DELTA_BIAS)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        u = self.in_proj(x)
        pre = F.linear(u, self.input.weight, self.input.bias.detach())
        pre, bias = pre.view(*pre.shape[:-1], self.gates, -1), self.input.bias.view(self.gates, -1)
        h, state = recurrence(pre, self.weight_h(), state, cell=self.cell, pre_bias=bias, reset=reset)
        if self.show_proj is None:
            return self.out_proj(h), state
        return self.out_proj(gated_softmax(h, self.show_proj(h), self.groups)), state
