"""The backends: how each runs the recurrence, and in words what it cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import banks, fused, gated_softmax, loop, matrix_kernels, norm, persistent, reference, scan, short_conv
from elman.ops.cells import Cell, Tensors
from elman.ops.cuda.compiler import Module
from elman.ops.operators import Operator


@dataclass(frozen=True)
class Problem:
    """What decides whether a backend can run a recurrence; ``heads`` and ``rank`` are its operator's."""

    seq_len: int
    batch_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    operator: type[Operator]
    cell: Cell
    heads: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Backend:
    """One way to run the recurrence.

    Attributes:
        run: all steps, of arguments that have been checked: ``(pre, operator, bias, states, cell, reset, pre_bias)`` to
            ``(h, last)``, pre being (T, B, G, H), the first and the last states tuples, and the bias there only where
            it cannot be added to pre.
        why_not: in words, why it cannot run a problem, the cure included; None if it can.
        status: whether ``auto`` may use it on this machine, and how or why not.
        pays: whether it is likely to beat the slower backends on a problem that it can run; ``auto`` asks.
    """

    run: Callable[
        [Tensor, Operator, Tensor | None, Tensors | None, Cell, Tensor | None, Tensor | None],
        tuple[Tensor, Tensors],
    ]
    why_not: Callable[[Problem], str | None]
    status: Callable[[], tuple[bool, str]]
    pays: Callable[[Problem], bool] = lambda problem: True


#: Every backend by name, from the plainest to the fastest.
BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        reference.run, lambda problem: None, lambda: (True, "every cell, operator, dtype and device, in plain PyTorch")
    ),
    "loop": Backend(functools.partial(fused.run, "loop"), loop.why_not, loop.status),
    "persistent": Backend(
        functools.partial(fused.run, "persistent"), persistent.why_not, persistent.status, persistent.pays
    ),
}


def choose(name: str, problem: Problem) -> str:
    """The name itself where that backend can run the problem; for ``auto`` the fastest that can, reference on the CPU.

    Raises:
        UsageError: there is no such backend, or it cannot run the problem; the message says why.
    """
    if name == "auto":
        if problem.device.type != "cuda":
            # A compiler unrolls the reference's loop over time, and so would never end.
            compiles = torch.compiler.is_compiling() and problem.cell.backward is not None
            return "loop" if compiles else "reference"
        able = (name for name, backend in reversed(BACKENDS.items()) if backend.why_not(problem) is None)
        return next(name for name in able if BACKENDS[name].pays(problem))
    if name not in BACKENDS:
        raise UsageError(f"backend={name!r} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not(problem)
    if reason is not None:
        raise UsageError(f"backend={name!r} cannot run this problem: {reason}")
    return name


def backend_status() -> list[tuple[str, bool, str]]:
    """Every backend of this machine, as (name, whether ``auto`` may use it, how or why not)."""
    return [(name, *backend.status()) for name, backend in BACKENDS.items()]


def shipped_modules() -> list[Module]:
    """Every module of CUDA kernels that may be compiled, for tests without a GPU and for compiling ahead."""
    parts = (loop, persistent, norm, banks, scan, gated_softmax, matrix_kernels, short_conv)
    return [module for part in parts for module in part.shipped_modules()]
