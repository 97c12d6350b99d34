"""Runs the kernels of the recurrence with a matrix state, ``cuda/matrix.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

#: Steps from one state that the forward pass keeps to the next.
INTERVAL = 16
SIZES = (16, 32, 64, 128)


def filled(size: int) -> int:
    """The least size of a head, of those that there are kernels for, that holds ``size``."""
    return next(one for one in SIZES if one >= size)


def why_not(device: torch.device, dtype: torch.dtype, keys: int, values: int) -> str | None:
    """In words, why the kernels cannot run heads of this size there; None if they can."""
    if device.type != "cuda":
        return "it needs a CUDA device: use backend='loop'"
    return "there are no kernels for it yet: use backend='loop'"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cell: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps in one launch; see ``elman.ops.matrix``."""
    raise NotImplementedError


def backward(
    dy: Tensor,
    ds: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps, the last one first, in one launch."""
    raise NotImplementedError
