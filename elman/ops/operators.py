"""Operators: how the previous state becomes the recurrent products ``rec`` of a step.

The kind of operator is read from the weight's shape, so that a structure of the recurrent matrix is only a different
weight. See ``cells.py`` for the other half of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError


class Operator(Protocol):
    """P linear maps of the state h (B, H), whose results lie side by side: rec (B, P·H).

    Attributes:
        name: its name in ``OPERATORS``, which makes it again from its weights.
        weights: its tensors, all of them differentiable.
    """

    name: ClassVar[str]

    @property
    def weights(self) -> list[Tensor]: ...

    def __call__(self, h: Tensor) -> Tensor:
        """Rec, for autograd to differentiate."""
        ...

    def product_into(self, rec: Tensor) -> Callable[[Tensor], object]:
        """A function of h that overwrites ``rec``: what costs time and is the same at all steps is done once."""
        ...

    def transposed_into(self, dh: Tensor) -> Callable[[Tensor], object]:
        """A function of the gradient of rec that overwrites ``dh`` (B, H) with that of h."""
        ...

    def weight_gradients(self, drec: Tensor, h: Tensor) -> list[Tensor]:
        """The gradient of every weight, of half types in float32, summed over the N rows of drec (N, P·H), h (N, H)."""
        ...


@dataclass(frozen=True)
class Dense:
    """``rec[p] = h @ weight[p].T``; weight (P, H, H), or (H, H) for P = 1, laid out as PyTorch's ``weight_hh``."""

    weight: Tensor

    name: ClassVar[str] = "dense"

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    @property
    def _rows(self) -> Tensor:
        """(P·H, H)."""
        return self.weight.flatten(0, -2)

    def __call__(self, h: Tensor) -> Tensor:
        return F.linear(h, self._rows)

    def product_into(self, rec: Tensor) -> Callable[[Tensor], object]:
        transposed = self._rows.t()
        return lambda h: torch.mm(h, transposed, out=rec)

    def transposed_into(self, dh: Tensor) -> Callable[[Tensor], object]:
        rows = self._rows
        return lambda drec: torch.mm(drec, rows, out=dh)

    def weight_gradients(self, drec: Tensor, h: Tensor) -> list[Tensor]:
        return [_sum_of_outer_products(drec, h).view(self.weight.shape)]


OPERATORS: dict[str, type[Dense]] = {operator.name: operator for operator in (Dense,)}


def make_operator(weight: Tensor, hidden_size: int, products: int) -> Operator:
    """The operator of ``products`` maps on ``hidden_size`` units that ``weight`` stands for by its shape.

    Raises:
        UsageError: no such operator has a weight of this shape.
    """
    square = (hidden_size, hidden_size)
    dense = square if products == 1 else (products, *square)
    if weight.shape == dense:
        return Dense(weight)
    raise UsageError(
        f"weight has shape {tuple(weight.shape)}, but pre has {hidden_size} hidden units and the cell takes "
        f"{products} recurrent product{'s' * (products > 1)}: give a weight of shape {dense}"
    )


def _sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, the result in float32 where the inputs are of a half type: its partial sums are never rounded to that."""
    if a.dtype.itemsize > 2:
        return a.t() @ b
    if a.is_cuda and len(a):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()
