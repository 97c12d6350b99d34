"""The op behind every backend with a backward pass written by hand, as PyTorch's compiler and autograd see it.

A backend brings two functions, ``forward`` and ``backward`` (see ``loop.py``), which walk through time. What they
share is here: registration, what is saved, and the weight's gradient, which needs no walk.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import loop, persistent
from elman.ops.cells import CELLS, Cell
from elman.ops.operators import Dense, Operator


class Walk(Protocol):
    """Both directions of a backend, as ``loop`` documents them."""

    def forward(
        self, pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None, cell: Cell, save: bool
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dh: Tensor | None,
        dh_last: Tensor | None,
        v: Tensor,
        weight: Tensor,
        reset: Tensor | None,
        cell: Cell,
        need_h0: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


_WALKS: dict[str, Walk] = {"loop": loop, "persistent": persistent}


def run(
    backend: str, pre: Tensor, operator: Operator, h0: Tensor | None, cell: Cell, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All steps by the backend of this name. Arguments are as ``elman.ops.recurrence`` has checked them."""
    assert isinstance(operator, Dense)
    inputs = (pre, operator.weight) if h0 is None else (pre, operator.weight, h0)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, h_last, _ = torch.ops.elman.recurrence(pre, operator.weight, h0, reset, cell.name, backend, save)
    return h, h_last


def _forward(
    pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None, cell: str, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The states, the last one once more, and v = pre + rec for the backward pass (empty unless ``save``)."""
    with _on_device_of(pre), torch.autocast(pre.device.type, enabled=False):
        h, v = _WALKS[backend].forward(pre, weight, h0, reset, CELLS[cell], save)
        return h, h[-1].clone(), v


def _fake_forward(
    pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None, cell: str, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[1:]), pre.new_empty(pre.shape if save else 0)


def _backward(
    dh: Tensor | None,
    dh_last: Tensor | None,
    h: Tensor,
    v: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    cell: str,
    backend: str,
    need_weight: bool,
    need_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of pre, weight and h0; the last two are empty unless needed."""
    with _on_device_of(v), torch.autocast(v.device.type, enabled=False):
        dpre, dh0 = _WALKS[backend].backward(dh, dh_last, v, weight, reset, CELLS[cell], need_h0)
        dweight = _weight_gradient(dpre, h, h0, reset) if need_weight else v.new_empty(0)
        return dpre, dweight, v.new_empty(0) if dh0 is None else dh0


def _fake_backward(
    dh: Tensor | None,
    dh_last: Tensor | None,
    h: Tensor,
    v: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    cell: str,
    backend: str,
    need_weight: bool,
    need_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        v.new_empty(v.shape),
        v.new_empty(weight.shape if need_weight else 0),
        v.new_empty(v.shape[1:] if need_h0 else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, h0, reset, ctx.cell, ctx.backend, _ = inputs
    h, _, v = output
    ctx.mark_non_differentiable(v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, v, weight, h0, reset)


def _differentiate(ctx: Any, dh: Tensor | None, dh_last: Tensor | None, dv: None) -> tuple[Tensor | None, ...]:
    h, v, weight, h0, reset = ctx.saved_tensors
    if dh is None and dh_last is None:
        return (None,) * 7
    _, need_weight, need_h0, *_ = ctx.needs_input_grad
    dpre, dweight, dh0 = torch.ops.elman.recurrence_backward(
        dh, dh_last, h, v, weight, h0, reset, ctx.cell, ctx.backend, need_weight, need_h0
    )
    return dpre, dweight if need_weight else None, dh0 if need_h0 else None, None, None, None, None


def _refuse_to_differentiate_twice(ctx: Any, *gradients: Tensor | None) -> None:
    raise UsageError("this backend's backward pass cannot be differentiated itself: use backend='reference'")


# Not torch.library.custom_op: its first call imports torch._dynamo, which takes seconds.
for _name, _implementation, _fake in (
    ("elman::recurrence", _forward, _fake_forward),
    ("elman::recurrence_backward", _backward, _fake_backward),
):
    torch.library.define(_name, torch.library.infer_schema(_implementation, mutates_args=()))
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd("elman::recurrence", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("elman::recurrence_backward", _refuse_to_differentiate_twice)


def _weight_gradient(dpre: Tensor, h: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
    """Σ_t dpre_tᵀ h_{t-1}, h_{t-1} being zero where a reset precedes step t: one product over all T·B rows.

    The first step has its own, because h0 does not lie before h in memory and moving either would cost more.
    """
    previous = h[:-1]
    if reset is not None:
        previous = previous.masked_fill(reset[1:, :, None], 0)
        h0 = None if h0 is None else h0.masked_fill(reset[0, :, None], 0)
    total = _product(dpre[1:].flatten(0, 1), previous.flatten(0, 1))
    if h0 is not None:
        total += _product(dpre[0], h0)
    return total.to(dpre.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, the result in float32 where the inputs are of a half type: its partial sums are never rounded to that."""
    if a.dtype.itemsize > 2:
        return a.t() @ b
    if a.is_cuda and len(a):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()


def _on_device_of(x: Tensor) -> torch.cuda.device:
    """Kernels are launched on the current device, which need not be the tensors'; -1 leaves it alone."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
