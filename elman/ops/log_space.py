"""Signed numbers by the logarithm of their magnitude and their sign: products are sums, and nothing underflows.

A zero has sign 0, whatever its logarithm says: so tensors of zeros are zeros here too, and no infinity is needed.
Gradients are those of the functions themselves; where one has none, at a zero, it is taken to be 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Signed = tuple[Tensor, Tensor]


def to_log_space(x: Tensor) -> Signed:
    """``(log |x|, sign of x)``, both of x's shape and dtype; (0, 0) for zeros."""
    sign = _sign(x)
    return torch.where(sign == 0, 1, x.abs()).log(), sign


def from_log_space(log: Tensor, sign: Tensor) -> Tensor:
    """The number itself, ``sign · exp(log)``."""
    return sign * torch.where(sign == 0, 0, log).exp()


def signed_logaddexp(x: Signed, y: Signed) -> Signed:
    """The sum of two numbers, exact to rounding wherever theirs are. Where they cancel the sum is a zero."""
    (a, sign_a), (b, sign_b) = x, y
    first = (sign_b == 0) | ((sign_a != 0) & (a >= b))
    larger, smaller = torch.where(first, a, b), torch.where(first, b, a)
    sign, other = torch.where(first, sign_a, sign_b), torch.where(first, sign_b, sign_a)
    agree = sign * other
    cancel = (agree < 0) & (smaller == larger)
    # Each branch is given numbers that it is right for: elsewhere its gradient would be a NaN, which no zero removes.
    gap = smaller - larger
    near = gap > -math.log(2)

    def where(right: Tensor) -> Tensor:
        return torch.where(right, gap, -1)

    opposed = (agree < 0) & ~cancel
    log = larger + torch.where(
        opposed,
        torch.where(near, where(opposed & near).expm1().neg().log(), where(opposed & ~near).exp().neg().log1p()),
        torch.where(agree > 0, where(agree > 0).exp().log1p(), 0),
    )
    return torch.where(cancel | (sign == 0), 0, log), torch.where(cancel, 0, sign)


def join(log: Tensor, sign: Tensor) -> Tensor:
    """A number of magnitude at most 1 as one that holds both: −log |x| with the sign of x, and 0 for a zero.

    The logarithm of ±1, which is 0, becomes the smallest normal number; so does that of what rounding has made larger.
    """
    tiny = torch.finfo(log.dtype).tiny
    return sign * torch.where(-log <= tiny, tiny, -log)


def split(joined: Tensor) -> Signed:
    """``(log |x|, sign of x)`` of what ``join`` has made, or of any numbers: each stands for an x."""
    return -joined.abs(), _sign(joined)


def number(joined: Tensor) -> Tensor:
    """What it stands for."""
    return from_log_space(*split(joined))


def with_slope_of(x: Tensor, value: Tensor) -> Tensor:
    """``value`` exactly, and as a function x: two forms of the same, or of what stands for each other."""
    return value.detach() + (x - x.detach()) if x.requires_grad else value.detach()


def as_number(joined: Tensor) -> Tensor:
    """The same, but that its gradients are to be those of the number it stands for."""
    same: Tensor = _AsNumber.apply(joined)  # type: ignore[no-untyped-call]
    return same


def as_joined(held: Tensor) -> Tensor:
    """What ``as_number`` makes of it, undone; where the number is 0, the gradient is taken to be 0."""
    same: Tensor = _AsJoined.apply(held)  # type: ignore[no-untyped-call]
    return same


class _AsNumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (joined,) = ctx.saved_tensors
        return -gradient * number(joined).abs()


class _AsJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor) -> Tensor:
        ctx.save_for_backward(held)
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (held,) = ctx.saved_tensors
        size = with_slope_of(held, number(held)).abs()
        return torch.where(size == 0, 0, -gradient / torch.where(size == 0, 1, size))


def _sign(x: Tensor) -> Tensor:
    """Of a NaN too, which is no zero."""
    x = x.detach()
    return torch.where(x == 0, 0, torch.ones_like(x).copysign(x))
