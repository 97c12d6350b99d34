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
class Cell:
    """One pointwise rule.

    Attributes:
        name: what ``recurrence(cell=...)`` calls it.
        equation: the rule for readers, ``pre`` being the input's part and ``rec`` the operator's.
        step: ``(pre, rec, h) -> h``, each (B, H), in the dtype of ``pre``.
    """

    name: str
    equation: str
    step: StepFunction


def _tanh(pre: Tensor, rec: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(pre + rec)


def _softsign(pre: Tensor, rec: Tensor, h: Tensor) -> Tensor:
    return F.softsign(pre + rec)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("tanh", "h = tanh(pre + rec)", _tanh),
        Cell("softsign", "h = v / (1 + |v|), v = pre + rec", _softsign),
    )
}
