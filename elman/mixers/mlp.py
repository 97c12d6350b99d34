"""The position-wise SwiGLU network, which mixes nothing over time: for patterns such as ``matrix,mlp``.

    y = W_down (silu(W_gate x) * W_up x)

Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import Mixer, MixerConfig, State, round_width

#: With which the three products have the weights of two without a gate, of four times the width.
HIDDEN = 8 / 3


@dataclass(frozen=True)
class MLPConfig(MixerConfig):
    """SwiGLU alone, without a state: 3 m weights in units of D² (8 at m = 8/3)."""

    name: ClassVar[str] = "mlp"
    equation: ClassVar[str] = "y = W_d (silu(W_g x) * W_u x)"

    hidden: float = HIDDEN
    """Hidden width as a multiple of the model width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hidden("--hidden", self.hidden)

    def build(self, dim: int) -> SwiGLU:
        return SwiGLU(dim, round_width(self.hidden * dim))

    def num_params(self, dim: int) -> int:
        return 3 * dim * round_width(self.hidden * dim)

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        return 2 * self.num_params(dim)

    def state_size(self, dim: int, seq_len: int) -> int:
        return 0


class SwiGLU(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being empty."""

    outputs = frozenset({"down_proj"})

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, size, bias=False)
        self.up_proj = nn.Linear(dim, size, bias=False)
        self.down_proj = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), ()


def check_hidden(option: str, hidden: float) -> None:
    """A hidden width as a multiple of the model's.

    Raises:
        UsageError: it is none; the option and the value are named.
    """
    if not 0 < hidden <= 64:
        raise UsageError(f"{option} {hidden} is out of range: give a number above 0 and up to 64")
