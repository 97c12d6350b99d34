"""Runs the kernels of the recurrence with a matrix state, ``cuda/matrix.cuh``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import aligned, launch
from elman.ops.persistent import chip_of

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
_CELLS = {"tanh": "Tanh", "softsign": "Softsign", "identity": "Identity"}
SIZES = (16, 32, 64, 128)
#: Steps from one state that the forward pass keeps to the next; these and the next ones are what matrix.cuh fixes.
INTERVAL = 11
_ROWS, _MOST_COLUMNS = 8, 4
_FORWARD_WARPS, _DEPTH = 4, 8
_SLOTS, _LONGEST, _TOGETHER = 4, 4, 2
_ALIGNMENT = 16
_OLDEST = (8, 0)
#: Warps of a backward block: more share sums over columns, fewer fit where shared memory is small.
_BACKWARD_WARPS = (4, 2, 1)


def filled(size: int) -> int:
    """The least size of a head, of those that there are kernels for, that holds ``size``."""
    return next(one for one in SIZES if one >= size)


def why_not(device: torch.device, dtype: torch.dtype, keys: int, values: int) -> str | None:
    """In words, why the kernels cannot run heads of this size there; None if they can."""
    if device.type != "cuda":
        return "it needs a CUDA device: use backend='loop'"
    if dtype not in _NUMBERS:
        return f"it takes bfloat16, float16 and float32, not {dtype}: use backend='loop'"
    if max(keys, values) > SIZES[-1]:
        return f"it takes K and V up to {SIZES[-1]}, not K = {keys} and V = {values}: use more heads, or backend='loop'"
    if not has_compiler():
        return "its kernels cannot be compiled here: see elman doctor, or use backend='loop'"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "it needs a GPU of compute capability 8.0 or newer: use backend='loop'"
    return None


def checkpoint_dtype(dtype: torch.dtype, cell: str) -> torch.dtype:
    """Of the states that the forward pass keeps, for q of ``dtype``; see ``Kept`` in matrix_state.cuh."""
    return torch.float16 if cell != "identity" and dtype.itemsize == 2 else torch.float32


@dataclass(frozen=True)
class _Heads:
    """How warps share heads of this size; see matrix.cuh."""

    keys: int
    values: int
    per_key: bool
    itemsize: int

    @property
    def width(self) -> int:
        """Columns of a warp."""
        lanes = 32 * _ROWS // self.keys
        return lanes * self.columns

    @property
    def columns(self) -> int:
        """Columns of a lane."""
        return min(_MOST_COLUMNS, self.values * self.keys // (32 * _ROWS))

    @property
    def warps(self) -> int:
        """Of a head."""
        return self.values // self.width

    @property
    def decays(self) -> int:
        """Numbers of a step that the state decays by."""
        return self.keys if self.per_key else 1

    def record(self, columns: int, with_gradient: bool) -> int:
        """Bytes of a step in shared memory."""
        numbers = 2 * self.keys + (2 if with_gradient else 1) * columns
        used = numbers * self.itemsize + 4 * (self.decays + 2)
        return (used + 15) // 16 * 16

    @property
    def forward_bytes(self) -> int:
        """Shared memory of a block."""
        return _FORWARD_WARPS * _DEPTH * self.record(self.width, False)

    def backward_bytes(self, warps: int) -> int:
        """Shared memory of a block of so many warps."""
        states = 4 * warps * _SLOTS * 32 * _ROWS * self.columns
        inputs = INTERVAL * self.record(warps * self.width, True)
        reads = 4 * _LONGEST * warps * self.width
        sums = 0 if warps == 1 else 4 * _TOGETHER * warps * (2 * self.keys + self.decays + 1)
        return states + inputs + reads + sums

    def backward_warps(self, shared_bytes: int) -> int:
        """Of a block, where one may have so much shared memory."""
        return next(n for n in _BACKWARD_WARPS if self.warps % n == 0 and self.backward_bytes(n) <= shared_bytes)


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
    heads = _heads(k, v, decay)
    state = (*k.shape[1:], v.shape[-1])
    y, s_last = torch.empty_like(v, memory_format=torch.contiguous_format), decay.new_empty(state)
    kept = checkpoint_dtype(q.dtype, cell)
    checkpoints = decay.new_empty(-(-len(q) // INTERVAL), *state, dtype=kept) if save else None
    module = _forward_module(heads, q.dtype, cell)
    pairs = q.shape[1] * q.shape[2]
    launch(
        module,
        module.kernels[0],
        -(-pairs * heads.warps // _FORWARD_WARPS),
        32 * _FORWARD_WARPS,
        (*_dense(q, k, v, decay, beta, s0), _numbers(reset), y, s_last, checkpoints, len(q), pairs, q.shape[2]),
        q.device,
        shared_bytes=heads.forward_bytes,
    )
    return y, s_last, decay.new_empty(0, dtype=kept) if checkpoints is None else checkpoints


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
    """All steps, the last one first, in one launch; what is summed over columns of several blocks, in one order."""
    heads = _heads(k, v, decay)
    warps = heads.backward_warps(_shared_bytes(q.device.index))
    parts = heads.warps // warps
    module = _backward_module(heads, q.dtype, cell, warps)
    of_sums = q.dtype if parts == 1 else torch.float32
    dq, dk = (q.new_empty(parts, *q.shape, dtype=of_sums) for _ in range(2))
    ddecay, dbeta = (x.new_empty(parts, *x.shape) for x in (decay, beta))
    dv, ds0 = torch.empty_like(v, memory_format=torch.contiguous_format), decay.new_empty(checkpoints.shape[1:])
    pairs = q.shape[1] * q.shape[2]
    given = _dense(dy, ds, q, k, v, decay, beta)
    launch(
        module,
        module.kernels[0],
        pairs * parts,
        32 * warps,
        (*given, _numbers(reset), checkpoints, dq, dk, dv, ddecay, dbeta, ds0, len(q), pairs, q.shape[2]),
        q.device,
        shared_bytes=heads.backward_bytes(warps),
    )
    if parts == 1:
        dq, dk, ddecay, dbeta = (x.squeeze(0) for x in (dq, dk, ddecay, dbeta))
    else:
        dq, dk, ddecay, dbeta = (
            x.sum(0).to(like.dtype) for x, like in ((dq, q), (dk, k), (ddecay, decay), (dbeta, beta))
        )
    return dq, dk, dv, ddecay, dbeta, ds0


def _heads(k: Tensor, v: Tensor, decay: Tensor) -> _Heads:
    return _Heads(k.shape[-1], v.shape[-1], decay.ndim == 4, k.itemsize)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels' wide loads read them."""
    return [None if x is None else aligned(x, _ALIGNMENT // x.itemsize) for x in tensors]


def _numbers(reset: Tensor | None) -> Tensor | None:
    """An int a row of the batch and step."""
    return None if reset is None else reset.to(torch.int32).contiguous()


def _shared_bytes(index: int) -> int:
    return chip_of(index).shared_bytes


@functools.cache
def _forward_module(heads: _Heads, dtype: torch.dtype, cell: str, architectures: tuple[str, ...] = ()) -> Module:
    name = f"matrix_forward<{_arguments(heads, dtype, cell)}>"
    return Module("matrix.cuh", (name,), architectures=architectures)


@functools.cache
def _backward_module(
    heads: _Heads, dtype: torch.dtype, cell: str, warps: int, architectures: tuple[str, ...] = ()
) -> Module:
    name = f"matrix_backward<{_arguments(heads, dtype, cell)}, {warps}>"
    return Module("matrix.cuh", (name,), architectures=architectures)


def _arguments(heads: _Heads, dtype: torch.dtype, cell: str) -> str:
    per_key = str(heads.per_key).lower()
    return f"{_NUMBERS[dtype]}, matrix::{_CELLS[cell]}, {heads.keys}, {heads.values}, {per_key}"


def shipped_modules() -> list[Module]:
    """Modules that stand for all: heads of one warp, of several and of several blocks, both decays, every cell."""
    cases = (
        (_Heads(32, 32, False, 2), torch.bfloat16, "tanh", 1, ("sm_80", "sm_86", "sm_89", "sm_90a")),
        (_Heads(64, 64, True, 2), torch.bfloat16, "softsign", 4, ("sm_90a",)),
        (_Heads(128, 128, False, 4), torch.float32, "identity", 4, ("sm_90a",)),
        (_Heads(16, 16, True, 2), torch.float16, "tanh", 1, ("sm_90a",)),
    )
    return [
        module
        for heads, dtype, cell, warps, architectures in cases
        for module in (
            _forward_module(heads, dtype, cell, architectures),
            _backward_module(heads, dtype, cell, warps, architectures),
        )
    ]
