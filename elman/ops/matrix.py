"""The nonlinear recurrence whose state is a matrix a head, written by the delta rule and squashed at every step.

Heads and rows of the batch do not see each other, so that each (row, head) can live in one multiprocessor's registers
for all steps: ``cuda/matrix.cuh``. Three backends run it: the plain-PyTorch ``reference``; ``loop``, the same steps
with a backward pass by hand that keeps few states; and ``persistent``, the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.ops import matrix_kernels
from elman.ops.matrix_kernels import INTERVAL
from elman.ops.operators import as_tensors, real_of
from elman.ops.registration import register


@dataclass(frozen=True)
class MatrixCell:
    """What a step ends with: ``function`` of the updated state, and its slope, told by its value."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


#: The state is never of a half type, so that a value tells its slope as well as what it was made of: to the last place
#: of 1.
MATRIX_CELLS = {
    "tanh": MatrixCell(torch.tanh, lambda y: 1 - y.square()),
    "softsign": MatrixCell(F.softsign, lambda y: (1 - y.abs()).square()),
    "identity": MatrixCell(lambda x: x, torch.ones_like),
}
MATRIX_BACKENDS = ("reference", "loop", "persistent")


def matrix_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s0: Tensor | None = None,
    *,
    cell: str = "tanh",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``D = a_t S_{t-1}``, ``S_t = f(D + β_t k_t (v_t − Dᵀ k_t)ᵀ)``, ``y_t = S_tᵀ q_t``, T steps strictly in sequence.

    A head reads what it remembers under a key and writes the difference to what it should: the gated delta rule (Yang,
    Kautz and Hatamizadeh, "Gated Delta Networks", 2024, arXiv 2412.06464), which it is with f the identity and q not
    scaled. Any other f stands in the path of the recurrence, and no parallel or chunked form exists.

    Every floating-point input is differentiable, through both outputs; by ``loop`` and ``persistent`` once. The state
    is of float32 for half types, inside and out. Under autocast q, k and v are cast to its dtype.

    Args:
        q: (T, B, N, K) for N heads, T, B, N, K and V at least 1.
        k: (T, B, N, K), of q's dtype.
        v: (T, B, N, V), likewise.
        decay: a, (T, B, N), or (T, B, N, K) for one of each row of the state; of any floating-point dtype, better
            float32: bf16 rounds what is near 1 to 1.
        beta: β, (T, B, N), of any floating-point dtype.
        s0: (B, N, K, V), the state before the first step, of any floating-point dtype; zeros if absent.
        cell: f, one of ``tanh``, ``softsign`` and ``identity``.
        reset: (T, B) bool; where true, that row's state is zeroed before that step (s0 too, at step 0).
        backend: ``reference``, ``loop``, ``persistent``, or ``auto``: the last of these that can run the problem on a
            GPU, and on the CPU the reference, the only one that can be differentiated twice (when compiled, ``loop``).

    Returns:
        y (T, B, N, V) of q's dtype, and the last state (B, N, K, V).

    Raises:
        UsageError: (a ``ValueError``) wrong shape, dtype, device, cell or backend, or a backend that cannot run the
            problem; the message names it and the cure.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("decay", decay), ("beta", beta), ("s0", s0), ("reset", reset)):
        if x is not None or name not in ("s0", "reset"):
            as_tensors(name, x)
    # Tensors of shapes alone have no autocast.
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    _check(q, k, v, decay, beta, s0, cell, reset)
    chosen = choose(backend, q.device, q.dtype, q.shape[-1], v.shape[-1])
    real = real_of(q.dtype)
    decay, beta, s0 = decay.to(real), beta.to(real), None if s0 is None else s0.to(real)
    with contextlib.nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            y, s, _ = _steps(q, k, v, decay, beta, s0, reset, MATRIX_CELLS[cell].function)
            return y, s
        keys, values = k.shape[-1], v.shape[-1]
        if chosen == "persistent":
            # Rows of zeros are neither written nor read, and columns of zeros stay zero.
            more_k, more_v = (matrix_kernels.filled(size) - size for size in (keys, values))
            q, k, v = _padded(q, more_k), _padded(k, more_k), _padded(v, more_v)
            decay = _padded(decay, more_k) if decay.ndim == 4 else decay
            s0 = None if s0 is None else _padded(s0, more_v, more_k)
        inputs = (q, k, v, decay, beta, s0)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        y, s, _ = torch.ops.elman.matrix_recurrence(*inputs, reset, cell, chosen, save)
        # Slices of everything would cost a copy in the backward pass.
        return (y, s) if s.shape[-2:] == (keys, values) else (y[..., :values], s[..., :keys, :values])


def _padded(x: Tensor, *more: int) -> Tensor:
    """With so many zeros behind the last dimension, the one before it; x itself, and no copy, without any."""
    return F.pad(x, [each for number in more for each in (0, number)]) if any(more) else x


def choose(backend: str, device: torch.device, dtype: torch.dtype, keys: int, values: int) -> str:
    """The backend itself if it can run heads of this size there; for ``auto``, see ``matrix_recurrence``.

    Raises:
        UsageError: there is no such backend, or it cannot.
    """
    if backend == "auto":
        if device.type != "cuda":
            # A compiler would unroll the reference's loop over time.
            return "loop" if torch.compiler.is_compiling() else "reference"
        return "loop" if matrix_kernels.why_not(device, dtype, keys, values) else "persistent"
    if backend not in MATRIX_BACKENDS:
        raise UsageError(f"backend={backend!r} is unknown: choose auto or one of {', '.join(MATRIX_BACKENDS)}")
    reason = matrix_kernels.why_not(device, dtype, keys, values) if backend == "persistent" else None
    if reason is not None:
        raise UsageError(f"backend={backend!r} cannot run this problem: {reason}")
    return backend


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s0: Tensor | None,
    cell: str,
    reset: Tensor | None,
) -> None:
    if cell not in MATRIX_CELLS:
        raise UsageError(f"cell={cell!r} is unknown: choose one of {', '.join(MATRIX_CELLS)}")
    if q.ndim != 4 or 0 in q.shape or not q.is_floating_point():
        raise UsageError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}: give floating-point (T, B, N, K), each at least 1"
        )
    seq_len, batch, heads, keys = q.shape
    values = v.shape[-1] if v.ndim == 4 else 0
    steps = (seq_len, batch, heads)
    for name, x, shapes in (
        ("k", k, [(*steps, keys)]),
        ("v", v, [(*steps, max(values, 1))]),
        ("decay", decay, [steps, (*steps, keys)]),
        ("beta", beta, [steps]),
        ("s0", s0, [(batch, heads, keys, values)]),
        ("reset", reset, [(seq_len, batch)]),
    ):
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            wanted = " or ".join("(T, B, N, V)" if name == "v" else str(shape) for shape in shapes)
            raise UsageError(f"{name} has shape {tuple(x.shape)} beside q of {tuple(q.shape)}: give {wanted}")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise UsageError(f"{name} has dtype {x.dtype} but q has {q.dtype}: cast one to the other")
        if (x.dtype != torch.bool) if name == "reset" else not x.is_floating_point():
            raise UsageError(
                f"{name} has dtype {x.dtype}: give {'torch.bool' if name == 'reset' else 'floating point'}"
            )
        if x.device != q.device:
            raise UsageError(f"{name} is on {x.device} but q is on {q.device}: move one to the other")


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s: Tensor | None,
    reset: Tensor | None,
    function: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """In plain PyTorch: y, the last state, and the one before every step, its reset not yet done."""
    if s is None:
        s = decay.new_zeros(*k.shape[1:], v.shape[-1])
    # Unbinding once keeps the backward pass linear in T.
    cuts = None if reset is None else reset[:, :, None, None, None].unbind(0)
    queries, keys, values = (x.to(decay.dtype).unbind(0) for x in (q, k, v))
    decays = (decay.unsqueeze(-1) if decay.ndim == 4 else decay[..., None, None]).unbind(0)
    shares = beta[..., None, None].unbind(0)
    outputs, before = [], []
    for t in range(len(q)):
        before.append(s)
        if cuts is not None:
            s = s.masked_fill(cuts[t], 0)
        row, column = keys[t].unsqueeze(-2), keys[t].unsqueeze(-1)
        decayed = decays[t] * s
        s = function(decayed + column @ (shares[t] * (values[t].unsqueeze(-2) - row @ decayed)))
        outputs.append((queries[t].unsqueeze(-2) @ s).squeeze(-2).to(q.dtype))
    return torch.stack(outputs), s, before


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cell: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, the last state, and for the backward pass those before every ``INTERVAL``-th step (none unless ``save``)."""
    if backend == "persistent":
        return matrix_kernels.forward(q, k, v, decay, beta, s0, reset, cell, save)
    y, s, before = _steps(q, k, v, decay, beta, s0, reset, MATRIX_CELLS[cell].function)
    checkpoints = torch.stack(before[::INTERVAL]) if save else decay.new_empty(0)
    return y, s.clone() if s is s0 else s, checkpoints


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cell: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = (*k.shape[1:], v.shape[-1])
    kept = matrix_kernels.checkpoint_dtype(q.dtype, cell) if backend == "persistent" else decay.dtype
    checkpoints = decay.new_empty(*((-(-q.shape[0] // INTERVAL), *state) if save else (0,)), dtype=kept)
    return v.new_empty(v.shape), decay.new_empty(state), checkpoints


def _backward(
    dy: Tensor | None,
    ds: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay, beta and s0; of dy and ds, those of the outputs, one at least is there."""
    if backend == "persistent":
        dy = torch.zeros_like(v) if dy is None else dy
        return matrix_kernels.backward(dy, ds, q, k, v, decay, beta, reset, checkpoints, cell)
    return _walk_back(dy, ds, q, k, v, decay, beta, reset, checkpoints, MATRIX_CELLS[cell])


def _walk_back(
    dy: Tensor | None,
    ds: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
    cell: MatrixCell,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the kernel does it: from the last checkpoint to the first, the states after each made again."""
    real = decay.dtype
    dq, dk, dv, ddecay, dbeta = (torch.empty_like(x) for x in (q, k, v, decay, beta))
    ds = torch.zeros_like(checkpoints[0]) if ds is None else ds
    for index, start in reversed(list(enumerate(range(0, len(q), INTERVAL)))):
        part = slice(start, start + INTERVAL)
        cut = None if reset is None else reset[part]
        given = (q[part], k[part], v[part], decay[part], beta[part], checkpoints[index], cut, cell.function)
        _, after, before = _steps(*given)
        for t, s in reversed(list(enumerate(before, start))):
            last, after = after, s
            gone = None if reset is None else reset[t, :, None, None, None]
            s = s if gone is None else s.masked_fill(gone, 0)
            a = decay[t].unsqueeze(-1) if decay.ndim == 4 else decay[t, ..., None, None]
            share, column, row = beta[t, ..., None, None], k[t].to(real).unsqueeze(-1), k[t].to(real).unsqueeze(-2)
            decayed = a * s
            missed = v[t].to(real).unsqueeze(-2) - row @ decayed
            if dy is None:
                dq[t] = 0
            else:
                shown = dy[t].to(real).unsqueeze(-1)
                ds = ds + q[t].to(real).unsqueeze(-1) @ shown.mT
                dq[t] = (last @ shown).squeeze(-1)
            dpre = ds * cell.slope(last)
            through = row @ dpre  # of β (v − Dᵀ k)
            read = -share * through  # of Dᵀ k
            dk[t] = (dpre @ (share * missed).mT + decayed @ read.mT).squeeze(-1)
            dv[t] = (share * through).squeeze(-2)
            dbeta[t] = (through * missed).sum((-2, -1))
            dpre = dpre + column @ read
            ddecay[t] = (dpre * s).sum(-1 if decay.ndim == 4 else (-2, -1))
            ds = a * dpre if gone is None else (a * dpre).masked_fill(gone, 0)
    return dq, dk, dv, ddecay, dbeta, ds


def _fake_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, ddecay, dbeta = (x.new_empty(x.shape) for x in (q, k, v, decay, beta))
    return dq, dk, dv, ddecay, dbeta, decay.new_empty(checkpoints.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, decay, beta, s0, reset, ctx.cell, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.has_s0 = s0 is not None
    ctx.save_for_backward(q, k, v, decay, beta, reset, output[2])


def _differentiate(ctx: Any, dy: Tensor | None, ds: Tensor | None, dcheckpoints: None) -> tuple[Tensor | None, ...]:
    if dy is None and ds is None:
        return (None,) * 10
    *gradients, ds0 = torch.ops.elman.matrix_recurrence_backward(dy, ds, *ctx.saved_tensors, ctx.cell, ctx.backend)
    gradients = [x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*gradients, ds0 if ctx.has_s0 else None, None, None, None, None)


register(
    "matrix_recurrence",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "this backend's backward pass cannot be differentiated itself: use backend='reference'",
)
