"""Random recurrences, and how far a backend's answers may lie from the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elman.ops import recurrence


@dataclass(frozen=True)
class Problem:
    """Inputs of ``recurrence``, and the gradients of its two outputs; None for what is absent."""

    pre: Tensor
    weight: Tensor
    h0: Tensor | None
    reset: Tensor | None
    dh: Tensor | None
    dh_last: Tensor | None
    cell: str = "tanh"

    def to(self, dtype: torch.dtype) -> Problem:
        names = ("pre", "weight", "h0", "dh", "dh_last")
        return replace(self, **{n: None if getattr(self, n) is None else getattr(self, n).to(dtype) for n in names})


def draw(
    seq_len: int,
    batch: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    with_h0: bool = True,
    reset_rate: float | None = 0.2,
    scale: float = 1.0,
    cell: str = "tanh",
) -> Problem:
    """Standard normal inputs times ``scale``, a weight of spectral radius near 1; ``reset_rate`` None: no resets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return Problem(
        pre=normal(seq_len, batch, hidden) * scale,
        weight=normal(hidden, hidden) / hidden**0.5,
        h0=normal(batch, hidden).tanh() if with_h0 else None,
        reset=None if reset_rate is None else (torch.rand(seq_len, batch, generator=generator) < reset_rate).to(device),
        dh=normal(seq_len, batch, hidden),
        dh_last=normal(batch, hidden),
        cell=cell,
    )


def solve(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input, by name."""
    inputs = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, value in (("pre", problem.pre), ("weight", problem.weight), ("h0", problem.h0))
        if value is not None
    }
    h, h_last = recurrence(**inputs, cell=problem.cell, reset=problem.reset, backend=backend)
    outputs = [(y, dy) for y, dy in ((h, problem.dh), (h_last, problem.dh_last)) if dy is not None]
    gradients = torch.autograd.grad(
        [y for y, _ in outputs], list(inputs.values()), [dy for _, dy in outputs], materialize_grads=True
    )
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"h": h.detach(), "h_last": h_last.detach(), **named}


@dataclass(frozen=True)
class Errors:
    """Errors of one result against float64, relative to its norm: the backend's and the reference's in its dtype."""

    ours: float
    reference: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.ours / self.reference if self.reference else float("nan")


def errors(problem: Problem, backend: str) -> dict[str, Errors]:
    """How far every output and gradient lies from the reference in float64, in the Frobenius norm.

    Allowed is 1.5 times the error of the reference in the same dtype, or one as small as that of a few roundings of
    float32 and one to the dtype; more on a tiny problem, where a sum may cancel and the reference may be right by luck.
    In float64 the truth itself is rounded: 1e-12 is allowed.
    """
    truth = solve(problem.to(torch.float64), "reference")
    reference = solve(problem, "reference")
    ours = solve(problem, backend)
    assert ours.keys() == truth.keys()
    dtype = problem.pre.dtype
    luck = 1e-5 if problem.pre[0].numel() < 64 else 5e-7
    rounding = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps / 2 + luck
    found = {}
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape
        assert ours[name].dtype == dtype
        norm = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
        of_ours, of_reference = (float((x[name].double() - exact).norm() / norm) for x in (ours, reference))
        found[name] = Errors(of_ours, of_reference, 1.5 * of_reference + rounding)
    return found


def assert_as_exact_as_reference(problem: Problem, backend: str) -> None:
    """No result errs more than ``errors`` allows."""
    for name, error in errors(problem, backend).items():
        assert error.ours <= error.allowed, f"{name}: {error}"
