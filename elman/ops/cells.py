"""Cells: the pointwise rule of one step and its derivative, apart from the product that feeds it.

A step of a recurrence is two independent ideas: an *operator* turns the previous state into recurrent products
(``operators.py``), and a *cell* turns those, the input's part and the previous state into the next state. Any cell runs
with any operator; the loop over time is written once for all of them. Each cell's twin on the GPU is in
``cuda/cells.cuh``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]
Forward = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], tuple[Tensors, Tensors]]
Backward = Callable[[Sequence[Tensor], Tensor, Tensor, Tensor], tuple[Tensors, Tensors, Tensor]]


@dataclass(frozen=True)
class Cell:
    """One pointwise rule. Every tensor of ``forward`` and ``backward`` is one value a unit, (B, H).

    The first state, h, is what the products see and what is returned for every step. A cell may read one state itself,
    its *memory*: the last one, which is h where there is no other.

    Attributes:
        name: what ``recurrence(cell=...)`` calls it.
        equation: the rule for readers, ``pre`` being the input's part and ``rec`` the operator's.
        forward: ``(pre, rec, memory) -> (states, saved)``, G and P tensors to S and those that backward needs.
        backward: ``(saved, memory, dh, dmemory) -> (dpre, drec, dmemory)`` of one step: the memory before it; the
            gradients of h and of the memory after it, ``dmemory`` being what the next step's cell made of the latter;
            the gradient of the memory before it. Derivatives are functions of what enters the activations, never of
            what comes out, which low precision rounds to where they are 0.
        gates: G, the input's values a unit.
        products: P, the operator's values a unit.
        saved: how many values a unit forward saves.
        states: S.
        reads_memory: false where neither function looks at its memory; ``dmemory`` is then of no meaning.
        additive: ``rec`` enters only as ``pre[i] + rec[i]``, so that its gradient is that of the first P of ``pre``.
    """

    name: str
    equation: str
    forward: Forward
    backward: Backward
    gates: int = 1
    products: int = 1
    saved: int = 1
    states: int = 1
    reads_memory: bool = False
    additive: bool = True


def _activation(
    name: str, equation: str, f: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
) -> Cell:
    """The cell h = f(pre + rec)."""

    def forward(pre: Sequence[Tensor], rec: Sequence[Tensor], memory: Tensor) -> tuple[Tensors, Tensors]:
        v = pre[0] + rec[0]
        return (f(v),), (v,)

    def backward(
        saved: Sequence[Tensor], memory: Tensor, dh: Tensor, dmemory: Tensor
    ) -> tuple[Tensors, Tensors, Tensor]:
        dv = dh * derivative(saved[0])
        return (dv,), (dv,), dmemory

    return Cell(name, equation, forward, backward)


def _tanh_derivative(v: Tensor) -> Tensor:
    """sech²(v) without the cancellation of 1 − tanh²(v)."""
    e = torch.exp(-2 * v.abs())
    return 4 * e / (1 + e).square()


def _softsign_derivative(v: Tensor) -> Tensor:
    return (1 + v.abs()).square().reciprocal()


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _activation("tanh", "h = tanh(pre + rec)", torch.tanh, _tanh_derivative),
        _activation("softsign", "h = v / (1 + |v|), v = pre + rec", F.softsign, _softsign_derivative),
    )
}
