"""The plain-PyTorch recurrence: any device, any dtype, differentiated by autograd. The truth for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from elman.ops.cells import Cell, Tensors
from elman.ops.operators import Operator


def run(
    pre: Tensor,
    operator: Operator,
    bias: Tensor | None,
    states: Tensors | None,
    cell: Cell,
    reset: Tensor | None,
    pre_bias: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """All steps, one after the other. Arguments are as ``elman.ops.recurrence`` has checked them, pre (T, B, G, H)."""
    if pre_bias is not None:
        pre = pre + (pre_bias - pre_bias.detach()).to(pre.dtype)  # 0, but for its gradient
    # Unbinding once keeps the backward pass linear in T: indexing pre[t] would make a gradient of pre's size a step.
    reset_steps = reset.unsqueeze(-1).unbind(0) if reset is not None else None
    dtypes = cell.dtypes(pre.dtype)
    if states is None:
        states = tuple(pre.new_zeros(pre.shape[1], pre.shape[-1], dtype=dtype) for dtype in dtypes)
    outputs = []
    for t, pre_t in enumerate(pre.unbind(0)):
        if reset_steps is not None:
            states = tuple(state.masked_fill(reset_steps[t], 0.0) for state in states)
        rec = operator(states[0]).view(len(pre_t), cell.products, -1)
        if bias is not None:
            rec = rec + bias
        states, _ = cell.forward(pre_t.unbind(1), rec.unbind(1), states[-1])
        states = tuple(state.to(dtype) for state, dtype in zip(states, dtypes, strict=True))
        outputs.append(states[0])
    return torch.stack(outputs), states
