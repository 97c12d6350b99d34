"""The public op: checks its inputs, chooses a backend, runs all steps strictly in sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.ops.backends import BACKENDS, Problem, choose
from elman.ops.cells import CELLS, Cell, Tensors
from elman.ops.log_space import as_joined, as_number
from elman.ops.operators import Operator, as_tensors, make_operator, real_of

_used: list[str] | None = None
#: Is given the operator, in the dtype that ran, and h (T, B, H).
Watcher = Callable[[Operator, Tensor], None]
_watcher: Watcher | None = None


@contextlib.contextmanager
def record_backends() -> Iterator[list[str]]:
    """What runs the mixers' steps inside the ``with`` block, in the order of the calls: ``recurrence``'s backends, and
    the names that ``note_backend`` is told.
    """
    global _used
    before, _used = _used, []
    try:
        yield _used
    finally:
        _used = before


def note_backend(name: str) -> None:
    """Tell ``record_backends`` what runs: of a mixer whose steps are not run by ``recurrence``."""
    if _used is not None:
        _used.append(name)


@contextlib.contextmanager
def watch_recurrences(watcher: Watcher) -> Iterator[None]:
    """Shows ``watcher`` every recurrence that runs inside the ``with`` block, not compiled, when it has run."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def note_recurrence(weights: Tensors, products: int, h: Tensor) -> None:
    """Show what ``watch_recurrences`` asks for: of a mixer whose steps are not run by ``recurrence``."""
    if _watcher is not None:
        _watcher(make_operator(weights, h.shape[-1], products), h)


def recurrence(
    pre: Tensor,
    weight: Tensor | tuple[Tensor, Tensor],
    h0: Tensor | Tensors | None = None,
    *,
    cell: str = "tanh",
    bias: Tensor | None = None,
    pre_bias: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """The nonlinear recurrence ``h_t = f(pre_t, W h_{t-1}, h_{t-1})``, T steps strictly in sequence (Elman, 1990).

    Every floating-point input is differentiable, and the gradients of all outputs are honoured, so truncated and
    full back-propagation through chunks work alike. Under autocast the inputs are cast to its dtype. All states are
    rounded after every step to their dtype, the inputs' but for what ``h0`` says, so a sequence in chunks gives the
    same values as in one piece.

    Args:
        pre: (T, B, G, H) for a cell of G gates, or (T, B, H) for one of a single gate: the input's part of every step,
            bias included, made by one product over all steps beforehand.
        weight: (P, H, H) for a cell of P recurrent products, or (H, H) for one of a single product: the memory of
            PyTorch's ``weight_hh`` viewed so. A step computes ``rec[p] = h @ weight[p].T``. Its form names the
            operator: (N, H/N, H/N) is block-diagonal, N heads that do not see each other; (H,) is diagonal; and a pair
            of u (H, r) and v (r, H) is of low rank, W = U V. Of these too there are P where the cell has P products.
        h0: (B, H), the state before the first step; for a cell of several states a tuple of them, h first; zeros if
            absent. The memory of a cell in log space is of float32 beside half types.
        cell: the pointwise rule f, one of ``elman.ops.cells.CELLS``, where its equation is.
        bias: (P, H), added to the recurrent products, as PyTorch's ``bias_hh``. Most cells only ever add those to
            ``pre``, where the bias costs less.
        pre_bias: (G, H), of any floating-point dtype: a bias that ``pre`` holds already, as a constant. Its gradient,
            the sum of that of ``pre``, is made here, because a backward pass may have it almost for nothing.
        reset: (T, B) bool; where true, that row's states are zeroed *before* that step (h0 too, at step 0).
        backend: one of ``elman.ops.BACKENDS``, or ``auto``: the fastest that can run this problem, and on the CPU the
            reference, the only one that can be differentiated twice.

    Returns:
        ``h`` (T, B, H), the state h after every step, and the last state, to carry on with, in the form of ``h0``.

    Raises:
        UsageError: (a ``ValueError``) wrong shape, dtype, device, cell or backend, or a backend that cannot run
            the problem; the message names it and the cure.
    """
    if cell not in CELLS:
        raise UsageError(f"cell={cell!r} is unknown: choose one of {', '.join(CELLS)}")
    rule = CELLS[cell]
    (pre,), weights = as_tensors("pre", pre), as_tensors("weight", weight, many=True)
    states = None if h0 is None else as_tensors("h0", h0, many=True)
    for name, optional in (("bias", bias), ("pre_bias", pre_bias), ("reset", reset)):
        if optional is not None:
            as_tensors(name, optional)
    # Tensors of shapes alone have no autocast.
    if not pre.is_meta and torch.is_autocast_enabled(pre.device.type):
        dtype = torch.get_autocast_dtype(pre.device.type)
        pre, weights = pre.to(dtype), tuple(x.to(dtype) for x in weights)
        bias = None if bias is None else bias.to(dtype)
        if states is not None:
            dtypes = [*rule.dtypes(dtype), *[dtype] * len(states)]  # too many states are _check's business
            states = tuple(state.to(kind) for state, kind in zip(states, dtypes, strict=False))
    _check(pre, weights, bias, states, reset, rule)
    if pre_bias is not None and (pre_bias.shape, pre_bias.device) != ((rule.gates, pre.shape[-1]), pre.device):
        raise UsageError(
            f"pre_bias has shape {tuple(pre_bias.shape)} on {pre_bias.device}: "
            f"give (G, H) = ({rule.gates}, {pre.shape[-1]}) on {pre.device}"
        )
    operator = make_operator(weights, pre.shape[-1], rule.products)
    if pre.ndim == 3:
        pre = pre.unsqueeze(2)
    seq_len, batch, gates, hidden = pre.shape
    kind, heads, rank = type(operator), operator.heads, operator.rank
    problem = Problem(seq_len, batch, hidden, pre.dtype, pre.device, kind, rule, heads, rank)
    chosen = choose(backend, problem)
    note_backend(chosen)
    with contextlib.nullcontext() if pre.is_meta else torch.autocast(pre.device.type, enabled=False):
        if bias is not None and rule.additive:
            pre, bias = pre + F.pad(bias, (0, 0, 0, gates - rule.products)), None
        if rule.logarithmic and states is not None:
            states = (*states[:-1], as_number(states[-1]))
        pre_bias = None if pre_bias is None else pre_bias.to(real_of(pre.dtype))
        h, last = BACKENDS[chosen].run(pre, operator, bias, states, rule, reset, pre_bias)
        if _watcher is not None:
            _watcher(operator, h)
        if rule.logarithmic:
            last = (*last[:-1], as_joined(last[-1]))
        return h, last[0] if rule.states == 1 else last


def _check(
    pre: Tensor,
    weights: Tensors,
    bias: Tensor | None,
    states: Tensors | None,
    reset: Tensor | None,
    cell: Cell,
) -> None:
    form = "(T, B, H)" if cell.gates == 1 else f"(T, B, {cell.gates}, H)"
    right = (pre.ndim == 3 and cell.gates == 1) or (pre.ndim == 4 and pre.shape[2] == cell.gates)
    if not right or 0 in pre.shape:
        raise UsageError(
            f"pre has shape {tuple(pre.shape)}: give {form} for cell={cell.name!r}, with T, B and H at least 1"
        )
    if not pre.is_floating_point():
        raise UsageError(f"pre has dtype {pre.dtype}: give a floating-point tensor")
    seq_len, batch, hidden = pre.shape[0], pre.shape[1], pre.shape[-1]
    named = _named("weight", weights)
    if states is not None:
        if len(states) != cell.states:
            form = "one" if cell.states == 1 else f"a tuple of {cell.states}, h first,"
            raise UsageError(
                f"h0 has {len(states)} tensor{'s' * (len(states) != 1)}: give {form} for cell={cell.name!r}"
            )
        for name, state in _named("h0", states).items():
            named[name] = state
            if state.shape != (batch, hidden):
                raise UsageError(f"{name} has shape {tuple(state.shape)}: give (B, H) = ({batch}, {hidden})")
    if bias is not None:
        named["bias"] = bias
        if bias.shape != (cell.products, hidden):
            raise UsageError(f"bias has shape {tuple(bias.shape)}: give (P, H) = ({cell.products}, {hidden})")
    if reset is not None and (reset.shape != (seq_len, batch) or reset.dtype != torch.bool):
        raise UsageError(
            f"reset has shape {tuple(reset.shape)} and dtype {reset.dtype}: "
            f"give (T, B) = ({seq_len}, {batch}) of torch.bool"
        )
    kinds = dict(zip(_named("h0", states or ()), cell.dtypes(pre.dtype), strict=True)) if states else {}
    for name, tensor in named.items():
        kind = kinds.get(name, pre.dtype)
        if tensor.dtype != kind:
            cure = "cast one to the other" if kind == pre.dtype else f"cell={cell.name!r} wants {kind} for it"
            raise UsageError(f"{name} has dtype {tensor.dtype} but pre has {pre.dtype}: {cure}")
    for name, tensor in (named if reset is None else {**named, "reset": reset}).items():
        if tensor.device != pre.device:
            raise UsageError(f"{name} is on {tensor.device} but pre is on {pre.device}: move one to the other")


def _named(name: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one argument, each by what a user would call it."""
    return {name: tensors[0]} if len(tensors) == 1 else {f"{name}[{i}]": x for i, x in enumerate(tensors)}
