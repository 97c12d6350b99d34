"""The op behind every backend with a backward pass written by hand, as PyTorch's compiler and autograd see it.

A backend brings two functions, ``forward`` and ``backward`` (see ``Walk``), which walk through time. What they share
is here: registration, what is saved, and the gradients of weights and bias, which need no walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from elman.ops import loop, persistent
from elman.ops.cells import CELLS, Cell, Tensors
from elman.ops.operators import OPERATORS, Operator, real_of
from elman.ops.registration import register


class Walk(Protocol):
    """Both directions of a backend, over tensors of one dtype on one device: pre (T, B, G, H), states (B, H) each.

    States are of ``Cell.dtypes``, and the gradients of a memory in log space those of the number it stands for.
    """

    def saves_pre(self, operator: str, cell: Cell) -> bool:
        """Whether pre itself stands for what the cell saves, and h for a memory in log space."""
        ...

    def forward(
        self,
        pre: Tensor,
        operator: Operator,
        bias: Tensor | None,
        states: Sequence[Tensor],
        reset: Tensor | None,
        cell: Cell,
        save: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """All steps, from ``states``, or from zeros if it is empty; ``bias`` (P, H) if the cell is not additive.

        Returns:
            h (T, B, H); the last states but h; and, where they are to be saved, what the cell saves (T, B, saved, H),
            or ``pre``, and then the states but h of every step (T, B, H), unless ``saves_pre`` does without.
        """
        ...

    def backward(
        self,
        dh: Tensor | None,
        dlast: Sequence[Tensor],
        h: Tensor,
        saved: Sequence[Tensor],
        operator: Operator,
        states: Sequence[Tensor],
        reset: Tensor | None,
        cell: Cell,
        need_states: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor] | None, list[Tensor]]:
        """All steps, the last one first. ``dh`` None is zero, so is an empty ``dlast``, but one of the two is there.

        Returns:
            dpre (T, B, G, H); drec (T, B, P, H), a part of dpre where the cell is additive; the gradients of the
            weights and behind them the sum of dpre over T and B, not of a half type, if these were summed on the way,
            else None; the gradients of the initial states if needed, else nothing.
        """
        ...


_WALKS: dict[str, Walk] = {"loop": loop, "persistent": persistent}


def run(
    backend: str,
    pre: Tensor,
    operator: Operator,
    bias: Tensor | None,
    states: Tensors | None,
    cell: Cell,
    reset: Tensor | None,
    pre_bias: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """All steps by the backend of this name. Arguments are as ``elman.ops.recurrence`` has checked them."""
    initial = list(states or ())
    inputs = [pre, *operator.weights, *initial, *(x for x in (bias, pre_bias) if x is not None)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, last, _ = torch.ops.elman.recurrence(
        pre, operator.weights, bias, initial, reset, cell.name, operator.name, backend, save, pre_bias
    )
    return h, tuple(last)


def _forward(
    pre: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    reset: Tensor | None,
    cell: str,
    operator: str,
    backend: str,
    save: bool,
    pre_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """H of every step, the last states, and what backward needs beside h, but for pre (nothing unless ``save``)."""
    with _on_device_of(pre), torch.autocast(pre.device.type, enabled=False):
        h, others, saved = _WALKS[backend].forward(
            pre, OPERATORS[operator](*weights), bias, states, reset, CELLS[cell], save
        )
        return h, [h[-1].clone(), *others], [x for x in saved if x is not pre]


def _fake_forward(
    pre: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    reset: Tensor | None,
    cell: str,
    operator: str,
    backend: str,
    save: bool,
    pre_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    seq_len, batch, _, hidden = pre.shape
    rule = CELLS[cell]
    dtypes = rule.dtypes(pre.dtype)
    last = [pre.new_empty(batch, hidden, dtype=dtype) for dtype in dtypes]
    saved = [pre.new_empty(seq_len, batch, hidden, dtype=dtype) for dtype in dtypes[1:]]
    if not _WALKS[backend].saves_pre(operator, rule):
        saved = [pre.new_empty(seq_len, batch, rule.saved, hidden), *saved]
    elif rule.logarithmic:
        saved = []
    return pre.new_empty(seq_len, batch, hidden), last, saved if save else []


def _backward(
    dh: Tensor | None,
    dlast: list[Tensor],
    h: Tensor,
    saved: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
    reset: Tensor | None,
    cell: str,
    operator: str,
    backend: str,
    need_weights: bool,
    need_bias: bool,
    need_states: bool,
    need_pre_bias: bool,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor]:
    """The gradients of pre, weights, bias, states and pre's bias; all but the first are empty unless needed."""
    with _on_device_of(h), torch.autocast(h.device.type, enabled=False):
        made = OPERATORS[operator](*weights)
        dpre, drec, dweights, dstates = _WALKS[backend].backward(
            dh, dlast, h, saved, made, states, reset, CELLS[cell], need_states
        )
        real = real_of(dpre.dtype)
        dpre_sum = None if dweights is None else dweights.pop()
        if dpre_sum is None and need_pre_bias:
            dpre_sum = dpre.sum((0, 1), dtype=real)
        if dweights is None and need_weights:
            dweights = _weight_gradients(made, drec, h, states[0] if states else None, reset)
        dbias = drec.sum((0, 1), dtype=real).to(drec.dtype) if need_bias else drec.new_empty(0)
        dpre_bias = dpre_sum if dpre_sum is not None and need_pre_bias else dpre.new_empty(0, dtype=real)
        return dpre, dweights if dweights and need_weights else [], dbias, dstates, dpre_bias


def _fake_backward(
    dh: Tensor | None,
    dlast: list[Tensor],
    h: Tensor,
    saved: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
    reset: Tensor | None,
    cell: str,
    operator: str,
    backend: str,
    need_weights: bool,
    need_bias: bool,
    need_states: bool,
    need_pre_bias: bool,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor]:
    seq_len, batch, hidden = h.shape
    rule = CELLS[cell]
    return (
        h.new_empty(seq_len, batch, rule.gates, hidden),
        [weight.new_empty(weight.shape) for weight in weights] if need_weights else [],
        h.new_empty((rule.products, hidden) if need_bias else 0),
        [state.new_empty(state.shape) for state in states] if need_states else [],
        h.new_empty((rule.gates, hidden) if need_pre_bias else 0, dtype=real_of(h.dtype)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    pre, weights, _, states, reset, ctx.cell, ctx.operator, ctx.backend, save, _ = inputs
    h, _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    if save and _WALKS[ctx.backend].saves_pre(ctx.operator, CELLS[ctx.cell]):
        saved = [pre, *saved]
    ctx.counts = len(saved), len(weights), len(states)
    ctx.save_for_backward(h, reset, *saved, *weights, *states)


def _differentiate(
    ctx: Any, dh: Tensor | None, dlast: list[Tensor | None], dsaved: list[None]
) -> tuple[Tensor | list[Tensor] | list[None] | None, ...]:
    num_saved, num_weights, num_states = ctx.counts
    nothing = (None, [None] * num_weights, None, [None] * num_states, *[None] * 6)
    h, reset, *rest = ctx.saved_tensors
    if dh is None and all(gradient is None for gradient in dlast):
        return nothing
    saved, weights = rest[:num_saved], rest[num_saved : num_saved + num_weights]
    dtypes = CELLS[ctx.cell].dtypes(h.dtype)
    given = [
        h.new_zeros(h.shape[1:], dtype=dtype) if gradient is None else gradient
        for gradient, dtype in zip(dlast, dtypes, strict=True)
    ]
    _, need_weights, need_bias, need_states, *_, need_pre_bias = ctx.needs_input_grad
    dpre, dweights, dbias, dstates, dpre_bias = torch.ops.elman.recurrence_backward(
        dh,
        [] if all(gradient is None for gradient in dlast) else given,
        h,
        saved,
        weights,
        rest[num_saved + num_weights :],
        reset,
        ctx.cell,
        ctx.operator,
        ctx.backend,
        any(need_weights),
        need_bias,
        any(need_states),
        need_pre_bias,
    )
    return (
        dpre,
        dweights or nothing[1],
        dbias if need_bias else None,
        dstates or nothing[3],
        *nothing[4:-1],
        dpre_bias if need_pre_bias else None,
    )


register(
    "recurrence",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "this backend's backward pass cannot be differentiated itself: use backend='reference'",
)


def _weight_gradients(
    operator: Operator, drec: Tensor, h: Tensor, h0: Tensor | None, reset: Tensor | None
) -> list[Tensor]:
    """Of all steps at once, by products over T·B rows; h_{t-1} is zero where a reset precedes step t.

    The first step has its own, because h0 does not lie before h in memory and moving either would cost more.
    """
    previous = h[:-1]
    if reset is not None:
        previous = previous.masked_fill(reset[1:, :, None], 0)
        h0 = None if h0 is None else h0.masked_fill(reset[0, :, None], 0)
    drec = drec.flatten(2)
    totals = operator.weight_gradients(drec[1:].flatten(0, 1), previous.flatten(0, 1))
    if h0 is not None:
        for total, first in zip(totals, operator.weight_gradients(drec[0], h0), strict=True):
            total += first
    return [total.to(drec.dtype) for total in totals]


def _on_device_of(x: Tensor) -> torch.cuda.device:
    """Kernels are launched on the current device, which need not be the tensors'; -1 leaves it alone."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
