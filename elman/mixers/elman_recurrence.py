"""What the dense Elman variants share: an expanded inner width, any recurrent matrix, and the recurrence itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import ExpandedConfig
from elman.mixers.recurrent_weight import Structure, WeightConfig, WeightOptions, slow_rank
from elman.ops import recurrence
from elman.options import OptionalFloat, OptionalInt, check_at_least, flag

#: Which structures take which of the options that say how large their parts are.
_TAKEN_BY: dict[str, tuple[Structure, ...]] = {
    "heads": ("block_diagonal", "monarch"),
    "rank": ("low_rank", "sparse_low_rank", "random_projection"),
    "density": ("sparse_low_rank",),
}
_HEADS = 8
_DENSITY = 0.1


class ElmanRecurrence(nn.Module):
    """``h_t = f(W_h h_{t-1} + W_x u_t + b)`` on d units (Elman, 1990), the input's product done for all steps at once.

    W_h starts as ``--init`` says, by default orthogonal, just inside the unit circle. With a bound R it is ``h_t = R
    f((W_h h_{t-1} + W_x u_t + b) / R)``; the state is then h / R.
    """

    def __init__(self, weight: WeightConfig, cell: str, bound: float = 1.0) -> None:
        super().__init__()
        self.cell, self.bound = cell, bound
        self.input = nn.Linear(weight.size, weight.size)
        self.weight_h = weight.build()

    def forward(self, u: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """U (T, B, d), h0 (B, d) or None, reset (T, B) -> h (T, B, d), h_last (B, d)."""
        if self.bound == 1.0:
            return recurrence(self.input(u), self.weight_h(), h0, cell=self.cell, reset=reset)
        # By the small weights, not by all the steps' sums.
        pre = F.linear(u, self.input.weight / self.bound, self.input.bias / self.bound)
        h, h_last = recurrence(pre, self.weight_h(), h0, cell=self.cell, reset=reset)
        return h * self.bound, h_last

    @staticmethod
    def num_params(weight: WeightConfig) -> int:
        return weight.size * weight.size + weight.size + weight.num_params()

    @staticmethod
    def flops_per_token(weight: WeightConfig) -> int:
        return 2 * weight.size * weight.size + weight.flops_per_token()


@dataclass(frozen=True)
class ElmanConfig(ExpandedConfig, WeightOptions):
    """Options that every dense Elman variant takes."""

    structure: Structure = "dense"
    """Form of W_h: dense; blocks on the diagonal (heads); a diagonal; U V of low rank; monarch (two block-diagonal
    factors and a permutation); sparse plus low rank; or a learned core between fixed random projections."""
    heads: OptionalInt = None
    """Blocks of block_diagonal (8 if absent; the inner width becomes a multiple) or of monarch's first factor (near the
    square root of the inner width if absent)."""
    rank: OptionalInt = None
    """Of low_rank, sparse_low_rank and random_projection; max(16, D/(2e)) if absent, at model width D and expansion e:
    then U V has as many weights as a dense W_h at e = 1."""
    density: OptionalFloat = None
    """Part of each unit's connections that sparse_low_rank keeps beside U V; 0.1 if absent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, structures in _TAKEN_BY.items():
            if getattr(self, name) is not None and self.structure not in structures:
                raise UsageError(
                    f"{flag(name)} {getattr(self, name)} means nothing to --structure {self.structure}: "
                    f"drop it, or give --structure {' or '.join(structures)}"
                )
        check_at_least(self, heads=1, rank=1)
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density} is out of range: give a number above 0 and up to 1")
        if self.constraint == "scaled_orthogonal" and self.structure not in ("dense", "block_diagonal"):
            raise UsageError(
                f"--constraint scaled_orthogonal does not go with --structure {self.structure}, of which nothing "
                f"would be learned: give --structure dense or block_diagonal, or --constraint spectral_norm or free"
            )

    def slow_option(self) -> str | None:
        return slow_rank(self.rank)

    def inner_size(self, dim: int) -> int:
        """d, the number of recurrent units at model width ``dim``: a multiple of the heads."""
        heads = _HEADS if self.heads is None and self.structure == "block_diagonal" else self.heads or 1
        return heads * max(1, round(self.expansion * dim / heads))

    def recurrent_weight(self, dim: int, products: int = 1) -> WeightConfig:
        """W_h at model width ``dim``, for a cell of so many recurrent products."""
        d, heads, rank, row_entries = self.inner_size(dim), 1, 0, 0
        match self.structure:
            case "block_diagonal":
                heads = self.heads or _HEADS
            case "diagonal":
                heads = d
            case "monarch":
                heads = self.heads or max(a for a in range(1, math.isqrt(d) + 1) if d % a == 0)
            case "low_rank" | "sparse_low_rank" | "random_projection":
                rank = self.rank or min(d, max(16, round(dim / (2 * self.expansion))))
        if self.structure == "sparse_low_rank":
            row_entries = max(1, round((self.density or _DENSITY) * d))
        return WeightConfig(d, self, self.structure, heads, rank, row_entries, products)

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.inner_size(dim)
