"""Cells: the pointwise rule of one step, apart from the product that feeds it.

A step of a recurrence is two independent ideas: an *operator* turns the previous state into a recurrent product
(``operators.py``), and a *cell* turns that product, the input's part and the previous state into the next state.
Any cell runs with any operator; the loop over time is written once for all of them (``reference.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

StepFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """The function f of an additive cell, ``h = f(v)`` with ``v = pre + rec``, for backends that differentiate by hand.

    Attributes:
        value: f.
        derivative: f′ as a function of v. Not of h, which low precision rounds to where f′ is 0.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One pointwise rule.

    Attributes:
        name: what ``recurrence(cell=...)`` calls it.
        equation: the rule for readers, ``pre`` being the input's part and ``rec`` the operator's.
        step: ``(pre, rec, h) -> h``, each (B, H), in the dtype of ``pre``.
        activation: f where the rule is ``h = f(pre + rec)``; None for a cell of another form.
    """

    name: str
    equation: str
    step: StepFunction
    activation: Activation | None = None


def _additive(name: str, equation: str, activation: Activation) -> Cell:
    return Cell(name, equation, lambda pre, rec, h: activation.value(pre + rec), activation)


def _tanh_derivative(v: Tensor) -> Tensor:
    """sech²(v) without the cancellation of 1 − tanh²(v)."""
    e = torch.exp(-2 * v.abs())
    return 4 * e / (1 + e).square()


def _softsign_derivative(v: Tensor) -> Tensor:
    return (1 + v.abs()).square().reciprocal()


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _additive("tanh", "h = tanh(pre + rec)", Activation(torch.tanh, _tanh_derivative)),
        _additive("softsign", "h = v / (1 + |v|), v = pre + rec", Activation(F.softsign, _softsign_derivative)),
    )
}
