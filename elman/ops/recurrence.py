"""The public op: checks its inputs, chooses a backend, runs all steps strictly in sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops.backends import BACKENDS, Problem, choose
from elman.ops.cells import CELLS
from elman.ops.operators import make_operator

_used: list[str] | None = None


@contextlib.contextmanager
def record_backends() -> Iterator[list[str]]:
    """The backends that ``recurrence`` takes inside the ``with`` block, in the order of the calls."""
    global _used
    before, _used = _used, []
    try:
        yield _used
    finally:
        _used = before


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str = "tanh",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The nonlinear recurrence ``h_t = f(pre_t + W h_{t-1})``, T steps strictly in sequence (Elman, 1990).

    Every floating-point input is differentiable, and the gradients of both outputs are honoured, so truncated and
    full back-propagation through chunks work alike. Under autocast the inputs are cast to its dtype.

    Args:
        pre: (T, B, H), the input's part of every step, bias included: one product over all steps beforehand.
        weight: (H, H), laid out as PyTorch's ``weight_hh``, so that a step adds ``h @ weight.T``.
        h0: (B, H), the state before the first step; zeros if absent.
        cell: the pointwise rule f, one of ``elman.ops.cells.CELLS``.
        reset: (T, B) bool; where true, that row's state is zeroed *before* that step (h0 too, at step 0).
        backend: one of ``elman.ops.BACKENDS``, or ``auto``: the fastest that can run this problem, and on the CPU the
            reference, the only one that can be differentiated twice.

    Returns:
        ``h`` (T, B, H), the state after every step, and ``h_last`` (B, H), the state to carry on with.

    Raises:
        UsageError: (a ``ValueError``) wrong shape, dtype, device, cell or backend, or a backend that cannot run
            the problem; the message names it and the cure.
    """
    if cell not in CELLS:
        raise UsageError(f"cell={cell!r} is unknown: choose one of {', '.join(CELLS)}")
    if isinstance(pre, Tensor) and torch.is_autocast_enabled(pre.device.type):
        dtype = torch.get_autocast_dtype(pre.device.type)
        pre, weight = pre.to(dtype), weight.to(dtype)
        h0 = h0.to(dtype) if h0 is not None else None
    _check(pre, weight, h0, reset)
    operator = make_operator(weight, pre.shape[-1])
    seq_len, batch, hidden = pre.shape
    problem = Problem(seq_len, batch, hidden, pre.dtype, pre.device, type(operator), CELLS[cell])
    chosen = choose(backend, problem)
    if _used is not None:
        _used.append(chosen)
    with torch.autocast(pre.device.type, enabled=False):
        return BACKENDS[chosen].run(pre, operator, h0, CELLS[cell], reset)


def _check(pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None) -> None:
    if pre.ndim != 3 or 0 in pre.shape:
        raise UsageError(f"pre has shape {tuple(pre.shape)}: give (T, B, H) with T, B and H at least 1")
    if not pre.is_floating_point():
        raise UsageError(f"pre has dtype {pre.dtype}: give a floating-point tensor")
    _, batch, hidden = pre.shape
    if h0 is not None and h0.shape != (batch, hidden):
        raise UsageError(f"h0 has shape {tuple(h0.shape)}: give (B, H) = ({batch}, {hidden})")
    if reset is not None and (reset.shape != pre.shape[:2] or reset.dtype != torch.bool):
        raise UsageError(
            f"reset has shape {tuple(reset.shape)} and dtype {reset.dtype}: "
            f"give (T, B) = {tuple(pre.shape[:2])} of torch.bool"
        )
    for name, tensor in (("weight", weight), ("h0", h0)):
        if tensor is not None and tensor.dtype != pre.dtype:
            raise UsageError(f"{name} has dtype {tensor.dtype} but pre has {pre.dtype}: cast one to the other")
    for name, tensor in (("weight", weight), ("h0", h0), ("reset", reset)):
        if tensor is not None and tensor.device != pre.device:
            raise UsageError(f"{name} is on {tensor.device} but pre is on {pre.device}: move one to the other")
