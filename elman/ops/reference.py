"""The plain-PyTorch recurrence: any device, any dtype, differentiated by autograd. The truth for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from elman.ops.cells import Cell
from elman.ops.operators import Operator


def run(pre: Tensor, operator: Operator, h0: Tensor | None, cell: Cell, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """All steps, one after the other. Arguments are as ``elman.ops.recurrence`` has checked them."""
    # Unbinding once keeps the backward pass linear in T: indexing pre[t] would make a gradient of pre's size a step.
    pre_steps = pre.unbind(0)
    reset_steps = reset.unsqueeze(-1).unbind(0) if reset is not None else None
    h = h0 if h0 is not None else pre.new_zeros(pre.shape[1:])
    states = []
    for t, pre_t in enumerate(pre_steps):
        if reset_steps is not None:
            h = h.masked_fill(reset_steps[t], 0.0)
        h = cell.step(pre_t, operator(h), h)
        states.append(h)
    return torch.stack(states), h
