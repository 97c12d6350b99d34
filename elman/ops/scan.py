"""The linear recurrence, which unlike the nonlinear ones need not run step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reset: Tensor | None = None) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` for every unit apart, by a parallel scan (Blelloch, 1990): log2(T) levels, O(T) work.

    Products and sums only, no logarithms: it errs no more than running step by step, whatever the signs of a and b, and
    zeros among the a cut it exactly. One step is the recurrence itself, so that streaming runs the same code. Every
    input is differentiable, any number of times.

    Args:
        a: (T, B, H).
        b: (T, B, H), of a's dtype; float32 or wider, since errors of a add up over a memory's length.
        h0: (B, H), the state before the first step; zeros if absent.
        reset: (T, B) bool; where true, that row's state is zeroed before that step.

    Returns:
        h (T, B, H), the state after every step.
    """
    if reset is not None:
        a = a.masked_fill(reset.unsqueeze(-1), 0.0)
    h: Tensor = torch.ops.elman.linear_scan(a, b, h0)
    return h


def _forward(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    if h0 is not None:
        b = torch.cat([torch.addcmul(b[:1], a[:1], h0), b[1:]])
    return _scan(a, b).clone() if len(b) == 1 else _scan(a, b)


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


def _fake_forward(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    return torch.empty_like(b)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    a, _, h0 = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(a, output, *((h0,) if h0 is not None else ()))


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same recurrence from the last step to the first."""
    a, h, *rest = ctx.saved_tensors
    h0 = rest[0] if ctx.has_h0 else torch.zeros_like(h[0])
    # What a step's state adds to the next is scaled by the next one's a; behind the last there is none.
    backwards = torch.cat([torch.zeros_like(a[:1]), a[1:].flip(0)])
    db = torch.ops.elman.linear_scan(backwards, dh.flip(0), None).flip(0)
    return db * torch.cat([h0.unsqueeze(0), h[:-1]]), db, db[0] * a[0] if ctx.has_h0 else None


# Not torch.library.custom_op: its first call imports torch._dynamo, which takes seconds.
torch.library.define("elman::linear_scan", torch.library.infer_schema(_forward, mutates_args=()))
torch.library.impl("elman::linear_scan", "default", _forward)
torch.library.register_fake("elman::linear_scan", _fake_forward)
torch.library.register_autograd("elman::linear_scan", _differentiate, setup_context=_setup_context)
