"""The linear recurrence, which unlike the nonlinear ones need not run step by step.

On a GPU it does all the same, in a thread a unit (``cuda/scan.cuh``): one pass over memory, where the levels of a
parallel scan are several. Elsewhere it is a parallel scan in plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import aligned, launch
from elman.ops.loop import NUMBERS
from elman.ops.operators import as_tensors, real_of
from elman.ops.registration import register

_THREADS = 64  # kThreads of diagonal.cuh
#: What a thread moves at once, where it owns several units: half types in pairs.
_PACK_BYTES = 4
#: A step of a tensor is addressed in 32 bits.
_STEP_BYTES = 2**32


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reset: Tensor | None = None) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` for every unit apart; in plain PyTorch by a parallel scan (Blelloch, 1990).

    Products and sums only, no logarithms: it errs no more than running step by step, whatever the signs of a and b, and
    zeros among the a cut it exactly. One step is the recurrence itself, so that streaming runs the same code. Every
    input is differentiable, any number of times.

    Args:
        a: (T, B, H).
        b: (T, B, H), of a's dtype; better float32 or wider: half types are computed in float32, but an a near 1 is
            rounded to 1.
        h0: (B, H), the state before the first step; zeros if absent.
        reset: (T, B) bool; where true, that row's state is zeroed before that step.

    Returns:
        h (T, B, H), the state after every step.

    Raises:
        UsageError: shapes, dtypes or devices do not fit together: none is broadcast or cast, for the kernels read
            every number where it lies.
    """
    for name, x in (("a", a), ("b", b), ("h0", h0), ("reset", reset)):
        if x is not None or name not in ("h0", "reset"):
            as_tensors(name, x)
    _check(a, b, h0, reset)
    h: Tensor = torch.ops.elman.linear_scan(a, b, h0, reset)
    return h


def _check(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> None:
    if b.ndim != 3 or 0 in b.shape or not b.is_floating_point():
        raise UsageError(
            f"b has shape {tuple(b.shape)} and dtype {b.dtype}: give floating-point (T, B, H), T at least 1"
        )
    for name, x, shape, dtype in (
        ("a", a, b.shape, b.dtype),
        ("h0", h0, b.shape[1:], b.dtype),
        ("reset", reset, b.shape[:2], torch.bool),
    ):
        if x is None:
            continue
        if x.shape != shape:
            cure = ", by expand where it is the same for all" if name == "a" else ""
            raise UsageError(f"{name} has shape {tuple(x.shape)}: give {tuple(shape)}{cure}")
        if x.dtype != dtype:
            cure = "give torch.bool" if name == "reset" else f"b has {b.dtype}, so cast one to the other"
            raise UsageError(f"{name} has dtype {x.dtype}: {cure}")
        if x.device != b.device:
            raise UsageError(f"{name} is on {x.device} but b is on {b.device}: move one to the other")


def scan_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What runs it there: ``scan``, in plain PyTorch, or ``scan_kernel``."""
    return "scan_kernel" if device.type == "cuda" and dtype in NUMBERS and has_compiler() else "scan"


def _forward(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
    if _has_kernel(b):
        h = torch.empty_like(b, memory_format=torch.contiguous_format)
        _launch("forward", h, (a, b, h0, reset, h))
        return h
    dtype, real = b.dtype, real_of(b.dtype)
    a, b = _cut(a, reset).to(real), b.to(real)
    if h0 is not None:
        b = torch.cat([torch.addcmul(b[:1], a[:1], h0.to(real)), b[1:]])
    return (_scan(a, b).clone() if len(b) == 1 else _scan(a, b)).to(dtype)


def _cut(a: Tensor, reset: Tensor | None) -> Tensor:
    return a if reset is None else a.masked_fill(reset.unsqueeze(-1), 0.0)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """Pairs of steps are steps of a recurrence half as long, whose states are every second one of this."""
    if len(b) == 1:
        return b
    even, odd = slice(0, len(b) // 2 * 2, 2), slice(1, None, 2)
    later = slice(2, None, 2)
    h = torch.empty_like(b)
    h[odd] = _scan(a[even] * a[odd], torch.addcmul(b[odd], a[odd], b[even]))
    h[0] = b[0]
    h[later] = torch.addcmul(b[later], a[later], h[odd][: len(b[later])])
    return h


def _fake_forward(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
    return b.new_empty(b.shape)


def _backward(
    dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and h0, the last being there whether h0 is or not."""
    if not _has_kernel(h):
        return _composed_backward(dh, a, h, h0, reset)
    da, db = (torch.empty_like(h) for _ in range(2))
    dh0 = torch.empty_like(h[0])
    _launch("backward", h, (dh, a, h, h0, reset, da, db, dh0))
    return da, db, dh0


def _composed_backward(
    dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same recurrence from the last step to the first, of operations that can be differentiated themselves."""
    kept = _cut(a, reset)
    # What a step's state adds to the next is scaled by the next one's a; behind the last there is none.
    backwards = torch.cat([torch.zeros_like(kept[:1]), kept[1:].flip(0)])
    db = torch.ops.elman.linear_scan(backwards, dh.flip(0), None, None).flip(0)
    before = torch.cat([(torch.zeros_like(h[0]) if h0 is None else h0).unsqueeze(0), h[:-1]])
    return _cut(db * before, reset), db, db[0] * kept[0]


def _fake_backward(
    dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    a, _, h0, reset = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(a, output, h0, reset)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    # Under create_graph, by what can be differentiated again.
    backward = _composed_backward if torch.is_grad_enabled() else torch.ops.elman.linear_scan_backward
    da, db, dh0 = backward(dh, *ctx.saved_tensors)
    return da, db, dh0 if ctx.has_h0 else None, None


register("linear_scan", (_forward, _fake_forward), (_backward, _fake_backward), _setup_context, _differentiate)


def _has_kernel(h: Tensor) -> bool:
    if not h.is_cuda or h.dtype not in NUMBERS or h[0].numel() * h.itemsize >= _STEP_BYTES:
        return False
    return h.numel() > 0 and has_compiler()


def _launch(direction: str, h: Tensor, arguments: tuple[Tensor | None, ...]) -> None:
    width = _width(h)
    given = [None if x is None else aligned(x, width) for x in arguments]
    blocks = -(-h[0].numel() // (width * _THREADS))
    launch(_module(h.dtype), _kernel_name(direction, h.dtype, width), blocks, _THREADS, (*given, *h.shape), h.device)


def _width(h: Tensor) -> int:
    """Neighbouring units a thread."""
    width = max(1, _PACK_BYTES // h.itemsize)
    return width if h.shape[-1] % width == 0 else 1


def _kernel_name(direction: str, dtype: torch.dtype, width: int) -> str:
    return f"scan_{direction}<{NUMBERS[dtype]}, {width}>"


@functools.cache
def _module(dtype: torch.dtype) -> Module:
    """The kernels of this dtype: both directions, for packs of units and for single ones."""
    widths = sorted({max(1, _PACK_BYTES // dtype.itemsize), 1})
    return Module("scan.cuh", tuple(_kernel_name(d, dtype, n) for d in ("forward", "backward") for n in widths))


def shipped_modules() -> list[Module]:
    """Every module that may be compiled."""
    return [_module(dtype) for dtype in NUMBERS]
