"""A short causal depthwise convolution along time, in one kernel each way (``cuda/short_conv.cuh``).

    v_t = f(Σ_j w_j ⊙ u_{t-j}),  j = 0 … taps − 1,  f the identity or silu

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import aligned, launch
from elman.ops.loop import NUMBERS
from elman.ops.operators import as_tensors, real_of
from elman.ops.registration import register

Activation = Literal["identity", "silu"]

_THREADS = 128  # kThreads of short_conv.cuh
#: What a thread moves at once.
_PACK_BYTES = 8
#: Beyond so many taps a thread's registers do not hold what it needs.
_MOST_TAPS = 8
#: Threads that keep a large GPU's memory busy, and the fewest steps of one, the borders of whose piece are read twice.
_ENOUGH_THREADS = 1 << 19
_LEAST_STEPS = 32


def short_conv(
    u: Tensor,
    weight: Tensor,
    last: Tensor | None = None,
    *,
    activation: Activation = "identity",
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``v_t = f(Σ_j weight[j] ⊙ u_{t-j})``; sums are of float32 for half types.

    Every floating-point input is differentiable, through both outputs; where the kernels or a compiler run, once.

    Args:
        u: (T, B, H), T ≥ 1; cast to autocast's dtype.
        weight: (taps, H), of any floating-point dtype; weight[0] is that of the step itself.
        last: (B, taps − 1, H), the inputs before the first step, the oldest first, of any floating-point dtype; zeros
            if absent.
        activation: f.
        reset: (T, B) bool; where true, inputs from before that step count as zero from it on.

    Returns:
        v (T, B, H) of u's dtype, and the inputs that a step after the last would see, (B, taps − 1, H), of the same.

    Raises:
        UsageError: shapes, dtypes or devices do not fit together, or there is no such activation.
    """
    for name, x in (("u", u), ("weight", weight), ("last", last), ("reset", reset)):
        if x is not None or name not in ("last", "reset"):
            as_tensors(name, x)
    # Tensors of shapes alone have no autocast.
    if not u.is_meta and torch.is_autocast_enabled(u.device.type):
        u = u.to(torch.get_autocast_dtype(u.device.type))
    _check(u, weight, last, activation, reset)
    weight = weight.to(real_of(u.dtype))
    last = None if last is None else last.to(u.dtype)
    silu = activation == "silu"
    with contextlib.nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False):
        if u.is_cuda or torch.compiler.is_compiling():
            v, left = torch.ops.elman.short_conv(u, weight, last, reset, silu)
            return v, left
        return _reference(u, weight, last, reset, silu)


def _check(u: Tensor, weight: Tensor, last: Tensor | None, activation: str, reset: Tensor | None) -> None:
    if u.ndim != 3 or 0 in u.shape or not u.is_floating_point():
        raise UsageError(
            f"u has shape {tuple(u.shape)} and dtype {u.dtype}: give floating-point (T, B, H), T at least 1"
        )
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != u.shape[2]:
        raise UsageError(f"weight has shape {tuple(weight.shape)}: give (taps, H), H being {u.shape[2]}")
    seq_len, batch, hidden = u.shape
    for name, x, shape in (("last", last, (batch, len(weight) - 1, hidden)), ("reset", reset, (seq_len, batch))):
        if x is not None and x.shape != shape:
            raise UsageError(f"{name} has shape {tuple(x.shape)}: give {shape}")
    if reset is not None and reset.dtype != torch.bool:
        raise UsageError(f"reset has dtype {reset.dtype}: give torch.bool")
    for name, x in (("weight", weight), ("last", last), ("reset", reset)):
        if x is not None and x.device != u.device:
            raise UsageError(f"{name} is on {x.device} but u is on {u.device}: move one to the other")
        if x is not None and name != "reset" and not x.is_floating_point():
            raise UsageError(f"{name} has dtype {x.dtype}: give floating point")
    if activation not in ("identity", "silu"):
        raise UsageError(f"activation={activation!r} is unknown: choose identity or silu")


def _inputs(u: Tensor, taps: int, last: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All inputs (taps − 1 + T, B, H), and which sequence of its row each belongs to, where resets begin new ones."""
    before = taps - 1
    if last is None:
        last = u.new_zeros(u.shape[1], before, u.shape[2])
    sequence = None if reset is None else F.pad(reset.cumsum(0), (0, 0, before, 0)).unsqueeze(-1)
    return torch.cat([last.transpose(0, 1), u]), sequence


def _seen(x: Tensor, sequence: Tensor | None, start: int, length: int, by: slice) -> Tensor:
    """Of x from ``start`` on, what the steps ``by`` see: zero where a reset lies between."""
    part = x[start : start + length]
    if sequence is None:
        return part
    return part.masked_fill(sequence[start : start + length] != sequence[by], 0)


def _sums(inputs: Tensor, sequence: Tensor | None, weight: Tensor, seq_len: int) -> Tensor:
    before = len(weight) - 1
    steps = slice(before, None)
    inputs = inputs.to(weight.dtype)
    terms = [weight[lag] * _seen(inputs, sequence, before - lag, seq_len, steps) for lag in range(len(weight))]
    return functools.reduce(torch.add, terms)


def _reference(
    u: Tensor, weight: Tensor, last: Tensor | None, reset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """In plain PyTorch."""
    inputs, sequence = _inputs(u, len(weight), last, reset)
    v = _sums(inputs, sequence, weight, len(u))
    left = _seen(inputs, sequence, len(u), len(weight) - 1, slice(-1, None))
    return (F.silu(v) if silu else v).to(u.dtype), left.transpose(0, 1)


def _forward(u: Tensor, weight: Tensor, last: Tensor | None, reset: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    if not _has_kernel(u, weight):
        v, left = _reference(u, weight, last, reset, silu)
        return v, left.clone(memory_format=torch.contiguous_format)
    v, left = _fake_forward(u, weight, last, reset, silu)
    _launch("forward", u, weight, silu, (u, weight, last, reset, v, left))
    return v, left


def _fake_forward(
    u: Tensor, weight: Tensor, last: Tensor | None, reset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[1], weight.shape[0] - 1, u.shape[2])


def _backward(
    dv: Tensor,
    dleft: Tensor | None,
    u: Tensor,
    weight: Tensor,
    last: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, weight and last."""
    if not _has_kernel(u, weight):
        return _differentiate_by_hand(dv, dleft, u, weight, last, reset, silu)
    du, _, dlast = _fake_backward(dv, dleft, u, weight, last, reset, silu)
    # A part of each piece of each row, so that no two threads add to the same number.
    parts = weight.new_empty(-(-len(u) // _piece(u)), u.shape[1], *weight.shape)
    _launch("backward", u, weight, silu, (dv, dleft, u, weight, last, reset, du, parts, dlast))
    return du, parts.sum((0, 1)), dlast


def _differentiate_by_hand(
    dv: Tensor,
    dleft: Tensor | None,
    u: Tensor,
    weight: Tensor,
    last: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, sequence = _inputs(u, len(weight), last, reset)
    seq_len, before = len(u), len(weight) - 1
    steps = slice(before, None)
    g = dv.to(weight.dtype)
    if silu:
        s = _sums(inputs, sequence, weight, seq_len)
        gate = torch.sigmoid(s)
        g = g * gate * (1 + s * torch.sigmoid(-s))
    gradient, dweight = torch.zeros_like(inputs, dtype=weight.dtype), torch.empty_like(weight)
    for lag in range(before + 1):
        start = before - lag
        alive = _seen(torch.ones_like(gradient[..., :1]), sequence, start, seq_len, steps)
        gradient[start : start + seq_len] += weight[lag] * g * alive
        dweight[lag] = (g * alive * inputs[start : start + seq_len]).sum((0, 1))
    if dleft is not None:
        alive = _seen(torch.ones_like(gradient[..., :1]), sequence, seq_len, before, slice(-1, None))
        gradient[seq_len:] += dleft.transpose(0, 1) * alive
    gradient = gradient.to(u.dtype)
    dlast = gradient[:before].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return gradient[before:].clone(), dweight, dlast


def _fake_backward(
    dv: Tensor,
    dleft: Tensor | None,
    u: Tensor,
    weight: Tensor,
    last: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dlast = u.new_empty(u.shape[1], weight.shape[0] - 1, u.shape[2])
    return u.new_empty(u.shape), weight.new_empty(weight.shape), dlast


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dv: Tensor | None, dleft: Tensor | None) -> tuple[Tensor | None, ...]:
    u, weight, last, reset = ctx.saved_tensors
    if dv is None and dleft is None:
        return (None,) * 5
    dv = torch.zeros_like(u) if dv is None else dv
    given = torch.ops.elman.short_conv_backward(dv, dleft, u, weight, last, reset, ctx.silu)
    return (*(x if need else None for x, need in zip(given, ctx.needs_input_grad, strict=False)), None, None)


register(
    "short_conv",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "the backward pass of the short convolution cannot be differentiated itself: use the CPU, not compiled",
)


def _has_kernel(u: Tensor, weight: Tensor) -> bool:
    return u.is_cuda and u.dtype in NUMBERS and 2 <= len(weight) <= _MOST_TAPS and has_compiler()


def _launch(direction: str, u: Tensor, weight: Tensor, silu: bool, arguments: tuple[Tensor | None, ...]) -> None:
    width, piece = _width(u), _piece(u)
    given = [None if x is None else aligned(x, width) for x in arguments]
    name = _kernel_name(direction, u.dtype, width, len(weight), silu)
    threads = u[0].numel() // width * -(-len(u) // piece)
    module = _module(u.dtype, len(weight), silu)
    launch(module, name, -(-threads // _THREADS), _THREADS, (*given, *u.shape, piece), u.device)


def _width(u: Tensor) -> int:
    """Neighbouring units a thread."""
    width = _PACK_BYTES // u.itemsize
    return width if u.shape[-1] % width == 0 else 1


def _piece(u: Tensor) -> int:
    """Steps a thread: few enough that threads are many."""
    pieces = -(-_ENOUGH_THREADS * _width(u) // u[0].numel())
    return max(_LEAST_STEPS, -(-len(u) // pieces))


def _kernel_name(direction: str, dtype: torch.dtype, width: int, taps: int, silu: bool) -> str:
    return f"short_conv_{direction}<{NUMBERS[dtype]}, {width}, {taps}, {str(silu).lower()}>"


@functools.cache
def _module(dtype: torch.dtype, taps: int, silu: bool) -> Module:
    """The kernels of this dtype and so many taps: both directions, for packs of units and for single ones."""
    widths = sorted({_PACK_BYTES // dtype.itemsize, 1})
    names = [_kernel_name(d, dtype, n, taps, silu) for d in ("forward", "backward") for n in widths]
    return Module("short_conv.cuh", tuple(names))


def shipped_modules() -> list[Module]:
    """Modules that stand for all: every size of number, fewer and more taps, with and without silu."""
    of_all = [_module(dtype, 4, True) for dtype in NUMBERS]
    return [*of_all, _module(torch.bfloat16, 2, False), _module(torch.bfloat16, 8, True)]
