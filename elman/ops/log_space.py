"""Signed numbers by the logarithm of their magnitude and their sign: products are sums, and nothing underflows.

A zero has sign 0, whatever its logarithm says: so tensors of zeros are zeros here too, and no infinity is needed.
Gradients are those of the functions themselves; where one has none, at a zero, it is taken to be 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Signed = tuple[Tensor, Tensor]


def to_log_space(x: Tensor) -> Signed:
    """``(log |x|, sign of x)``, both of x's shape and dtype; (0, 0) for zeros."""
    sign = torch.sgn(x.detach())
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
