"""Cells: the pointwise rule of one step and its derivative, apart from the product that feeds it.

A step of a recurrence is two independent ideas: an *operator* turns the previous state into recurrent products
(``operators.py``), and a *cell* turns those, the input's part and the previous state into the next state. Any cell runs
with any operator; the loop over time is written once for all of them. Each cell's twin on the GPU is in
``cuda/cells.cuh``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.ops.log_space import join, number, signed_logaddexp, split, to_log_space, with_slope_of
from elman.ops.operators import real_of

Tensors = tuple[Tensor, ...]
Forward = Callable[[Sequence[Tensor], Sequence[Tensor], Any], tuple[Tensors, Tensors]]
Backward = Callable[[Sequence[Tensor], Tensor, Tensor, Tensor], tuple[Tensors, Tensors, Tensor]]


@dataclass(frozen=True)
class Cell:
    """One pointwise rule. Every tensor of ``forward`` and ``backward`` is one value a unit, (B, H).

    The first state, h, is what the products see and what is returned for every step. A cell may read one state itself,
    its *memory*: the last one, which is h where there is no other.

    Attributes:
        name: what ``recurrence(cell=...)`` calls it.
        equation: the rule for readers, ``pre`` being the input's part and ``rec`` the operator's.
        functor: its twin's name in ``cuda/cells.cuh``; None if it has none, and then no ``backward`` either: only the
            reference runs it.
        forward: ``(pre, rec, memory) -> (states, saved)``, G and P tensors to S and those that backward needs.
        backward: ``(saved, memory, dh, dmemory) -> (dpre, drec, dmemory)`` of one step: the memory before it; the
            gradients of h and of the memory after it, ``dmemory`` being what the next step's cell made of the latter;
            the gradient of the memory before it. Derivatives are functions of what enters the activations, never of
            what comes out, which low precision rounds to where they are 0.
        gates: G, the input's values a unit.
        products: P, the operator's values a unit.
        saved: how many values a unit forward saves.
        states: S.
        reads_memory: false where neither function looks at its memory; ``dmemory`` is then of no meaning.
        additive: ``rec`` enters only as ``pre[i] + rec[i]``, so that its gradient is that of the first P of ``pre``.
        logarithmic: the memory stands for h by its logarithm and sign, as ``log_space.join`` makes it. It is never of a
            half type, and its gradients, by ``backward`` as by autograd, are those of the number it stands for.
    """

    name: str
    equation: str
    functor: str | None
    forward: Forward
    backward: Backward | None
    gates: int = 1
    products: int = 1
    saved: int = 1
    states: int = 1
    reads_memory: bool = False
    additive: bool = True
    logarithmic: bool = False

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of the states, h first, beside tensors of this one."""
        return (*[dtype] * (self.states - 1), real_of(dtype) if self.logarithmic else dtype)


def _activation(
    name: str, functor: str, equation: str, f: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
) -> Cell:
    """The cell h = f(pre + rec)."""

    def forward(pre: Sequence[Tensor], rec: Sequence[Tensor], memory: Tensor) -> tuple[Tensors, Tensors]:
        v = pre[0] + rec[0]
        return (f(v),), (v,)

    def backward(
        saved: Sequence[Tensor], memory: Tensor, dh: Tensor, dmemory: Tensor
    ) -> tuple[Tensors, Tensors, Tensor]:
        dv = dh * derivative(saved[0])
        return (dv,), (dv,), dmemory

    return Cell(name, equation, functor, forward, backward)


def _tanh_derivative(v: Tensor) -> Tensor:
    """sech²(v) without the cancellation of 1 − tanh²(v)."""
    e = torch.exp(-2 * v.abs())
    return 4 * e / (1 + e).square()


def _softsign_derivative(v: Tensor) -> Tensor:
    return (1 + v.abs()).square().reciprocal()


def _relu_derivative(v: Tensor) -> Tensor:
    """0 at 0, as PyTorch has it."""
    return torch.where(v.isnan(), v, (v > 0).to(v.dtype))


def _sigmoid_derivative(v: Tensor) -> Tensor:
    """σ(v) σ(−v), without the rounding of 1 − σ(v)."""
    return torch.sigmoid(v) * torch.sigmoid(-v)


def _sums(pre: Sequence[Tensor], rec: Sequence[Tensor]) -> Tensors:
    """Pre-activations of an additive cell."""
    return (*(x + r for x, r in zip(pre, rec, strict=False)), *pre[len(rec) :])


def _delta_forward(pre: Sequence[Tensor], rec: Sequence[Tensor], h: Tensor) -> tuple[Tensors, Tensors]:
    a, d = _sums(pre, rec)
    return (torch.sigmoid(-d) * h + torch.sigmoid(d) * torch.tanh(a),), (a, d)


def _delta_backward(
    saved: Sequence[Tensor], h: Tensor, dh: Tensor, dmemory: Tensor, products: int
) -> tuple[Tensors, Tensors, Tensor]:
    a, d = saved
    dh = dh + dmemory
    dpre = dh * torch.sigmoid(d) * _tanh_derivative(a), dh * (torch.tanh(a) - h) * _sigmoid_derivative(d)
    return dpre, dpre[:products], dh * torch.sigmoid(-d)


def _delta(name: str, functor: str, equation: str, products: int) -> Cell:
    """A leaky unit whose rate δ is learned; the second product, where there is one, is the rate's."""
    backward = functools.partial(_delta_backward, products=products)
    forward = _delta_forward
    return Cell(name, equation, functor, forward, backward, gates=2, products=products, saved=2, reads_memory=True)


def _lstm_forward(pre: Sequence[Tensor], rec: Sequence[Tensor], c: Tensor) -> tuple[Tensors, Tensors]:
    i, f, g, o = v = _sums(pre, rec)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c), c), v


def _lstm_backward(saved: Sequence[Tensor], c: Tensor, dh: Tensor, dmemory: Tensor) -> tuple[Tensors, Tensors, Tensor]:
    i, f, g, o = saved
    after = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    dc = dmemory + dh * torch.sigmoid(o) * _tanh_derivative(after)
    dv = (
        dc * torch.tanh(g) * _sigmoid_derivative(i),
        dc * c * _sigmoid_derivative(f),
        dc * torch.sigmoid(i) * _tanh_derivative(g),
        dh * torch.tanh(after) * _sigmoid_derivative(o),
    )
    return dv, dv, dc * torch.sigmoid(f)


def _gru_forward(pre: Sequence[Tensor], rec: Sequence[Tensor], h: Tensor) -> tuple[Tensors, Tensors]:
    r, z, q = pre[0] + rec[0], pre[1] + rec[1], rec[2]
    n = pre[2] + torch.sigmoid(r) * q
    return (torch.sigmoid(-z) * torch.tanh(n) + torch.sigmoid(z) * h,), (r, z, n, q)


def _gru_backward(saved: Sequence[Tensor], h: Tensor, dh: Tensor, dmemory: Tensor) -> tuple[Tensors, Tensors, Tensor]:
    r, z, n, q = saved
    dh = dh + dmemory
    dn = dh * torch.sigmoid(-z) * _tanh_derivative(n)
    dr = dn * q * _sigmoid_derivative(r)
    dz = dh * (h - torch.tanh(n)) * _sigmoid_derivative(z)
    return (dr, dz, dn), (dr, dz, dn * torch.sigmoid(r)), dh * torch.sigmoid(z)


def _power(v: Tensor, exponent: Tensor) -> Tensor:
    """sign(c) e (|c| / e)^α, c = v clamped to [−1, 1], α = 1 + softplus(exponent).

    Its slope, α (|c| / e)^(α − 1), is at most α e^(1 − α), so at most 1 whatever α is.
    """
    c = v.clamp(-1, 1)
    return math.e * c.sgn() * (c.abs() / math.e).pow(1 + F.softplus(exponent))


def _polynomial_forward(pre: Sequence[Tensor], rec: Sequence[Tensor], h: Tensor) -> tuple[Tensors, Tensors]:
    v, d, exponent = _sums(pre, rec)
    return (torch.sigmoid(-d) * h + torch.sigmoid(d) * _power(v, exponent),), (v, d, exponent)


def _polynomial_backward(
    saved: Sequence[Tensor], h: Tensor, dh: Tensor, dmemory: Tensor
) -> tuple[Tensors, Tensors, Tensor]:
    v, d, exponent = saved
    dh = dh + dmemory
    dcandidate = dh * torch.sigmoid(d)
    candidate, more = _power(v, exponent), F.softplus(exponent)
    # At 0 the power and its slopes are 0, where the formulas' are 0 times infinity.
    part = torch.where(v == 0, 1, v.abs().clamp(max=1)) / math.e
    dv = torch.where((v == 0) | (v.abs() > 1), 0, dcandidate * (1 + more) * part.pow(more))
    dexponent = dcandidate * candidate * part.log() * torch.sigmoid(exponent)
    dd = dh * (candidate - h) * _sigmoid_derivative(d)
    return (dv, dd, dexponent), (dv,), dh * torch.sigmoid(-d)


def _log_leaky(
    name: str,
    functor: str,
    equation: str,
    candidate: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
    linear: Backward,
    gates: int = 2,
    products: int = 1,
) -> Cell:
    """A leaky unit as ``_delta``, whose memory is the logarithm of h with its sign, and is mixed as such.

    The number is the same, and so is its derivative, that of the ``linear`` unit: where the number or a part of it is 0
    that of logarithms would be 0 times infinity. ``candidate`` gives c and log |c|.
    """

    def forward(pre: Sequence[Tensor], rec: Sequence[Tensor], memory: Tensor) -> tuple[Tensors, Tensors]:
        # A half type would round a logarithm of −20, and so h, by 6%.
        saved = tuple(v.to(memory.dtype) for v in _sums(pre, rec))
        rate, (c, log_c) = saved[1], candidate(saved)
        h = torch.sigmoid(-rate) * with_slope_of(memory, number(memory)) + torch.sigmoid(rate) * c
        with torch.no_grad():
            log, sign = split(memory)
            kept, taken = (log + F.logsigmoid(-rate), sign), (log_c + F.logsigmoid(rate), to_log_space(c)[1])
            joined = join(*signed_logaddexp(kept, taken))
        return (with_slope_of(h, number(joined)), with_slope_of(h, joined)), saved

    def backward(
        saved: Sequence[Tensor], memory: Tensor, dh: Tensor, dmemory: Tensor
    ) -> tuple[Tensors, Tensors, Tensor]:
        return linear(saved, number(memory), dh, dmemory)

    return Cell(
        name,
        equation,
        functor,
        forward,
        backward,
        gates=gates,
        products=products,
        saved=gates,
        states=2,
        reads_memory=True,
        logarithmic=True,
    )


def _log_tanh(v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    c = torch.tanh(v[0])
    return c, to_log_space(c)[0]


def _log_power(v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """sign(v) σ(α log |v|), a power for small v that never passes 1, by its logarithm −softplus(−α log |v|)."""
    log, sign = to_log_space(v[0])
    power = (1 + F.softplus(v[2])) * log
    return sign * torch.sigmoid(power), F.logsigmoid(power)


def _bounded_power_backward(
    saved: Sequence[Tensor], h: Tensor, dh: Tensor, dmemory: Tensor
) -> tuple[Tensors, Tensors, Tensor]:
    v, d, exponent = saved
    dh = dh + dmemory
    dcandidate = dh * torch.sigmoid(d)
    alpha, log = 1 + F.softplus(exponent), torch.where(v == 0, 1, v.abs()).log()
    power = alpha * log
    # σ'(power) and that over |v|, of which neither factor may overflow; at 0 all slopes are 0.
    high = torch.sigmoid(power.abs()).square()
    slope, steep = high * torch.exp(-power.abs()), high * torch.exp(-power.abs() - log)
    candidate = v.sgn() * torch.sigmoid(power)
    dv = torch.where(v == 0, 0, dcandidate * alpha * steep)
    dexponent = dcandidate * v.sgn() * slope * log * torch.sigmoid(exponent)
    dd = dh * (candidate - h) * _sigmoid_derivative(d)
    return (dv, dd, dexponent), (dv,), dh * torch.sigmoid(-d)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _activation("tanh", "Tanh", "h = tanh(pre + rec)", torch.tanh, _tanh_derivative),
        _activation("relu", "Relu", "h = max(pre + rec, 0)", torch.relu, _relu_derivative),
        _activation("softsign", "Softsign", "h = v / (1 + |v|), v = pre + rec", F.softsign, _softsign_derivative),
        _delta("delta", "Delta", "h = (1 − δ) h + δ tanh(pre₀ + rec), δ = σ(pre₁)", products=1),
        _delta("triple_r", "TripleR", "h = (1 − δ) h + δ tanh(pre₀ + rec₀), δ = σ(pre₁ + rec₁)", products=2),
        Cell(
            "lstm",
            "c = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c), (i, f, g, o) = pre + rec",
            "Lstm",
            _lstm_forward,
            _lstm_backward,
            gates=4,
            products=4,
            saved=4,
            states=2,
            reads_memory=True,
        ),
        Cell(
            "gru",
            "h = (1 − z) n + z h, n = tanh(pre₂ + r rec₂), (r, z) = σ(pre₀₁ + rec₀₁)",
            "Gru",
            _gru_forward,
            _gru_backward,
            gates=3,
            products=3,
            saved=4,
            reads_memory=True,
            additive=False,
        ),
        Cell(
            "polynomial",
            "h = (1 − δ) h + δ sign(c) e (|c| / e)^α, c = clamp(pre₀ + rec, ±1), δ = σ(pre₁), α = 1 + softplus(pre₂)",
            "Polynomial",
            _polynomial_forward,
            _polynomial_backward,
            gates=3,
            saved=3,
            reads_memory=True,
        ),
        _log_leaky(
            "log_delta",
            "LogDelta",
            "delta, its memory (log |h|, sign h)",
            _log_tanh,
            functools.partial(_delta_backward, products=1),
        ),
        _log_leaky(
            "log_triple_r",
            "LogTripleR",
            "triple_r, its memory (log |h|, sign h)",
            _log_tanh,
            functools.partial(_delta_backward, products=2),
            products=2,
        ),
        _log_leaky(
            "log_polynomial",
            "LogPolynomial",
            "h = (1 − δ) h + δ sign(v) σ(α log |v|), v = pre₀ + rec, δ, α as polynomial, memory (log |h|, sign h)",
            _log_power,
            _bounded_power_backward,
            gates=3,
        ),
    )
}

#: Cells that every backend runs; the others are the reference's alone.
FUSED_CELLS = {name: cell for name, cell in CELLS.items() if cell.functor is not None}
