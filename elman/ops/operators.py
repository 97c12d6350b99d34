"""Operators: how the previous state becomes the recurrent products ``rec`` of a step.

The kind of operator is read from the weight's form, so that a structure of the recurrent matrix is only a different
weight. See ``cells.py`` for the other half of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        heads: into how many runs of H/heads units the state falls that do not see each other.
        rank: r, where every map is a product of two thin matrices, else 0.
    """

    name: ClassVar[str]

    @property
    def weights(self) -> list[Tensor]: ...

    @property
    def heads(self) -> int: ...

    @property
    def rank(self) -> int: ...

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
    heads: ClassVar[int] = 1
    rank: ClassVar[int] = 0

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
        return [sum_of_outer_products(drec, h).view(self.weight.shape)]


@dataclass(frozen=True)
class BlockDiagonal:
    """N heads that do not see each other: ``rec[p]`` of head n is ``h[n] @ weight[p, n].T``.

    The weight is (P, N, H/N, H/N), or (N, H/N, H/N) for P = 1, and head n has the units from n·H/N on.
    """

    weight: Tensor

    name: ClassVar[str] = "block_diagonal"
    rank: ClassVar[int] = 0

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    @property
    def heads(self) -> int:
        return self.weight.shape[-3]

    @property
    def _blocks(self) -> Tensor:
        """(P, N, H/N, H/N)."""
        return self.weight if self.weight.ndim == 4 else self.weight.unsqueeze(0)

    def _by_head(self, x: Tensor, values: int = 1) -> Tensor:
        """The values of one head after another: (rows, values·H) becomes (values, N, rows, H/N), a view."""
        return x.view(x.shape[0], values, *self.weight.shape[-3:-1]).permute(1, 2, 0, 3)

    def __call__(self, h: Tensor) -> Tensor:
        rec = self._by_head(h) @ self._blocks.mT
        return rec.permute(2, 0, 1, 3).flatten(1)

    def product_into(self, rec: Tensor) -> Callable[[Tensor], object]:
        products = list(zip(self._blocks.mT, self._by_head(rec, len(self._blocks)), strict=True))

        def multiply(h: Tensor) -> None:
            (of_heads,) = self._by_head(h)
            for transposed, out in products:
                torch.bmm(of_heads, transposed, out=out)

        return multiply

    def transposed_into(self, dh: Tensor) -> Callable[[Tensor], object]:
        (out,) = self._by_head(dh)
        # All products of a head are one, so that their sum is never rounded: (N, P·H/N, H/N).
        rows = self._blocks.transpose(0, 1).flatten(1, 2)

        def multiply(drec: Tensor) -> None:
            of_heads = self._by_head(drec, len(self._blocks)).permute(1, 2, 0, 3).flatten(2)
            torch.bmm(of_heads, rows, out=out)

        return multiply

    def weight_gradients(self, drec: Tensor, h: Tensor) -> list[Tensor]:
        (of_heads,) = self._by_head(h)
        of_products = self._by_head(drec, len(self._blocks))
        found = [sum_of_outer_products(of_product, of_heads) for of_product in of_products]
        return [torch.stack(found).view(self.weight.shape)]


@dataclass(frozen=True)
class Diagonal:
    """``rec[p] = h * weight[p]``; weight (P, H), or (H,) for P = 1: no unit sees another."""

    weight: Tensor

    name: ClassVar[str] = "diagonal"
    rank: ClassVar[int] = 0

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    @property
    def heads(self) -> int:
        return self.weight.shape[-1]

    @property
    def _rows(self) -> Tensor:
        """(P, H)."""
        return self.weight if self.weight.ndim == 2 else self.weight.unsqueeze(0)

    def __call__(self, h: Tensor) -> Tensor:
        return (h.unsqueeze(1) * self._rows).flatten(1)

    def product_into(self, rec: Tensor) -> Callable[[Tensor], object]:
        rows, out = self._rows, rec.view(rec.shape[0], *self._rows.shape)
        return lambda h: torch.mul(h.unsqueeze(1), rows, out=out)

    def transposed_into(self, dh: Tensor) -> Callable[[Tensor], object]:
        first, *others = self._rows

        def multiply(drec: Tensor) -> None:
            of_first, *of_others = drec.view(drec.shape[0], *self._rows.shape).unbind(1)
            torch.mul(of_first, first, out=dh)
            for row, of_product in zip(others, of_others, strict=True):
                dh.addcmul_(of_product, row)

        return multiply

    def weight_gradients(self, drec: Tensor, h: Tensor) -> list[Tensor]:
        products = drec.view(drec.shape[0], *self._rows.shape).to(real_of(h.dtype)) * h.unsqueeze(1)
        return [products.sum(0).view(self.weight.shape)]


@dataclass(frozen=True)
class LowRank:
    """``rec[p] = (h @ v[p].T) @ u[p].T``, that is W = U V; u (P, H, r) and v (P, r, H), or 2-D both for P = 1."""

    u: Tensor
    v: Tensor

    name: ClassVar[str] = "low_rank"
    heads: ClassVar[int] = 1

    @property
    def weights(self) -> list[Tensor]:
        return [self.u, self.v]

    @property
    def rank(self) -> int:
        return self.u.shape[-1]

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(P, H, r) and (P, r, H)."""
        return (self.u, self.v) if self.u.ndim == 3 else (self.u.unsqueeze(0), self.v.unsqueeze(0))

    def __call__(self, h: Tensor) -> Tensor:
        us, vs = self._factors
        return torch.stack([F.linear(F.linear(h, v), u) for u, v in zip(us, vs, strict=True)], 1).flatten(1)

    def product_into(self, rec: Tensor) -> Callable[[Tensor], object]:
        if not self._pays(rec):
            return self.dense().product_into(rec)
        us, vs = self._factors
        inner, outs = self._inner(rec), rec.view(rec.shape[0], *us.shape[:2]).unbind(1)
        steps = list(zip(inner.unbind(1), us.mT, outs, strict=True))
        first = vs.flatten(0, 1).t()

        def multiply(h: Tensor) -> None:
            torch.mm(h, first, out=inner.flatten(1))
            for x, transposed, out in steps:
                torch.mm(x, transposed, out=out)

        return multiply

    def transposed_into(self, dh: Tensor) -> Callable[[Tensor], object]:
        if not self._pays(dh):
            return self.dense().transposed_into(dh)
        us, vs = self._factors
        inner = self._inner(dh)
        steps = list(zip(us, inner.unbind(1), strict=True))
        last = vs.flatten(0, 1)

        def multiply(drec: Tensor) -> None:
            for x, (u, out) in zip(drec.view(drec.shape[0], *us.shape[:2]).unbind(1), steps, strict=True):
                torch.mm(x, u, out=out)
            torch.mm(inner.flatten(1), last, out=dh)

        return multiply

    def weight_gradients(self, drec: Tensor, h: Tensor) -> list[Tensor]:
        """These are Σ drec (V h)ᵀ and Σ (Uᵀ drec) hᵀ, or dW Vᵀ and Uᵀ dW where dW = Σ drec hᵀ takes fewer products."""
        if 4 * self.rank >= h.shape[-1]:
            dweight = sum_of_outer_products(drec, h).view(*self.u.shape[:-1], -1)
            u, v = (x.to(dweight.dtype) for x in self.weights)
            return [dweight @ v.mT, u.mT @ dweight]
        us, vs = self._factors
        found = [
            (sum_of_outer_products(of_product, F.linear(h, v)), sum_of_outer_products(of_product @ u, h))
            for of_product, u, v in zip(drec.view(len(drec), *us.shape[:2]).unbind(1), us, vs, strict=True)
        ]
        return [torch.stack(x).view(like.shape) for x, like in zip(zip(*found, strict=True), self.weights, strict=True)]

    def dense(self) -> Dense:
        """The same maps by one product, its weight rounded once."""
        return Dense(sum_of_outer_products(self.u.mT, self.v).to(self.u.dtype))

    def _pays(self, like: Tensor) -> bool:
        """Whether a step is faster by two thin products a map than by one of the composed matrix.

        A half type's product is so fast on a GPU that it costs as much to launch one more, some 3 µs, as to multiply by
        2,100 more units (benchmarks/NOTES.md, sections 6 and 10).
        """
        launch = 2100 if like.is_cuda and like.dtype.itemsize == 2 else 0
        return self.u.shape[-2] - 2 * self.rank > launch

    def _inner(self, like: Tensor) -> Tensor:
        """Room for the product between the two, (B, P, r)."""
        us, _ = self._factors
        return like.new_empty(like.shape[0], us.shape[0], us.shape[-1])


OPERATORS: dict[str, Callable[..., Operator]] = {
    operator.name: operator for operator in (Dense, BlockDiagonal, Diagonal, LowRank)
}


def make_operator(weights: Sequence[Tensor], hidden_size: int, products: int) -> Operator:
    """The operator of ``products`` maps on ``hidden_size`` units that the weights stand for by their form.

    With P products every form below has P in front: (H, H) is dense, (N, H/N, H/N) block-diagonal, (H,) diagonal, and a
    pair of (H, r) and (r, H) of low rank.

    Raises:
        UsageError: no such operator has a weight of this form.
    """
    front = () if products == 1 else (products,)
    match [tuple(x.shape[len(front) :]) if x.shape[: len(front)] == front else () for x in weights]:
        case [(rows, columns)] if rows == columns == hidden_size:
            return Dense(weights[0])
        case [(heads, rows, columns)] if rows == columns and heads * rows == hidden_size:
            return BlockDiagonal(weights[0])
        case [(rows,)] if rows == hidden_size:
            return Diagonal(weights[0])
        case [(rows, rank), (of_rank, columns)] if rows == columns == hidden_size and rank == of_rank > 0:
            return LowRank(*weights)

    def form(*sizes: object) -> str:
        sizes = (*front, *sizes)
        return f"({', '.join(map(str, sizes))}{',' * (len(sizes) == 1)})"

    h, part = hidden_size, f"{hidden_size}/N"
    shapes = " and ".join(str(tuple(x.shape)) for x in weights)
    raise UsageError(
        f"weight has shape {shapes}, but pre has {h} hidden units and the cell takes {products} recurrent "
        f"product{'s' * (products > 1)}: give {form(h, h)}, {form('N', part, part)} for N heads, {form(h)} for a "
        f"diagonal, or a pair of {form(h, 'r')} and {form('r', h)}"
    )


def as_tensors(name: str, given: object, many: bool = False) -> tuple[Tensor, ...]:
    """What was given for an argument, as a tuple of tensors.

    Raises:
        UsageError: something else was given.
    """
    tensors = tuple(given) if many and isinstance(given, tuple | list) else (given,)
    for x in tensors:
        if not isinstance(x, Tensor):
            what = "is" if x is given else "holds"
            raise UsageError(
                f"{name} {what} a {type(x).__name__}: give {'one tensor or several' if many else 'a tensor'}"
            )
    return tensors


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are summed in: half types in float32."""
    return dtype if dtype.itemsize > 2 else torch.float32


def sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, or a batch of them, in float32 where the inputs are of a half type: its partial sums are never rounded."""
    if a.dtype.itemsize > 2:
        return a.mT @ b
    if a.is_cuda and a.numel():
        product = torch.mm if a.ndim == 2 else torch.bmm
        return product(a.mT, b, out_dtype=torch.float32)
    return a.mT.float() @ b.float()
