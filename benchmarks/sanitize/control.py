"""Kernels of which it is known whether they race, so that a tool shows what it can tell (``control.cuh``)."""

from __future__ import annotations

from pathlib import Path

import torch

from elman.ops.cuda.compiler import Module
from elman.ops.cuda.launch import launch

#: Warps of either half of the block, and buffers. Of one buffer the barriers' numbers are constants.
SIZES = ((1, 1), (2, 2))
_ROUNDS = 6


def run(kind: str, warps: int, buffers: int, device: str) -> None:
    """``kind`` is ``control_handed_over`` or ``control_racing``, whose results nothing is to be compared with."""
    half = 32 * warps
    sums = torch.empty(half, dtype=torch.float32, device=device)
    if kind == "control_racing":
        sums = sums.view(torch.uint8)  # as a workspace
    arguments, shared_bytes = (sums, _ROUNDS), 4 * buffers * half
    name = f"control<{kind}, {warps}, {buffers}>"
    launch(_module(kind), name, 1, 2 * half, arguments, torch.device(device), shared_bytes=shared_bytes)


def _module(kind: str) -> Module:
    source = Path(__file__).with_name("control.cuh")  # from an absolute path; what it includes is found beside elman's
    return Module(str(source), tuple(f"control<{kind}, {warps}, {buffers}>" for warps, buffers in SIZES))
