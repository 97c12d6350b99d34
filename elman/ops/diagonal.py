"""How the ``persistent`` backend runs a diagonal operator: all steps in one launch, every thread on its own units.

The kernels are in ``cuda/diagonal.cuh``. Nothing is exchanged and no weight is large, so any H, any B and every dtype
will do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elman.ops.cells import CELLS, Cell
from elman.ops.cuda.compiler import Module
from elman.ops.cuda.launch import launch
from elman.ops.loop import NUMBERS
from elman.ops.operators import Diagonal, real_of

if TYPE_CHECKING:
    from elman.ops.backends import Problem

_DIRECTIONS = ("forward", "backward")
_THREADS = 64  # kThreads of diagonal.cuh
#: What a thread moves at once, where it owns several units: half types in pairs.
_PACK_BYTES = 4
#: A step of a tensor is addressed in 32 bits.
_STEP_BYTES = 2**32


def why_not(problem: Problem) -> str | None:
    """In words, why these kernels cannot run a problem on a GPU; None if they can."""
    cell, batch, hidden = problem.cell, problem.batch_size, problem.hidden_size
    if cell.functor is None:
        return f"it does not run cell={cell.name!r}: use backend='auto'"
    if problem.dtype not in NUMBERS:
        return f"it does not run {problem.dtype}: cast to one of {', '.join(str(dtype) for dtype in NUMBERS)}"
    values = max(
        cell.gates, cell.saved, cell.products, cell.dtypes(problem.dtype)[-1].itemsize // problem.dtype.itemsize
    )
    if batch * hidden * values * problem.dtype.itemsize >= _STEP_BYTES:
        return f"a step of B × H = {batch} × {hidden} has 4 GB or more: split the batch"
    return None


def saves_pre(cell: Cell) -> bool:
    """Whether backward wants pre in place of what the cell saves, which then is pre + w ⊙ h or pre.

    It then takes h for the number that a memory in log space stands for, too.
    """
    return cell.additive


def forward(
    pre: Tensor,
    operator: Diagonal,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All steps; see ``fused.Walk``."""
    kept, pre = pre, _strided(pre)
    seq_len, batch, _, hidden = pre.shape
    h = pre.new_empty(seq_len, batch, hidden)
    saved = pre.new_empty(seq_len, batch, cell.saved, hidden) if save and not saves_pre(cell) else None
    dtypes = cell.dtypes(h.dtype)[1:]
    others = [torch.empty_like(h, dtype=dtype) for dtype in dtypes] if save and not cell.logarithmic else []
    last = [torch.empty_like(h[0], dtype=dtype) for dtype in dtypes]
    arguments = (
        *(pre, pre.stride(0), pre.stride(1), pre.stride(2)),
        *(operator.weight, bias, *_pair(states), reset),
        *(h, saved, _only(others), _only(last)),
    )
    _launch("forward", cell, h, [pre], arguments)
    return h, last, [kept if saved is None else saved, *others] if save else []


def backward(
    dh: Tensor | None,
    dlast: Sequence[Tensor],
    h: Tensor,
    saved: Sequence[Tensor],
    operator: Diagonal,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    need_states: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """All steps, the last one first; see ``fused.Walk``."""
    dh, kept = torch.zeros_like(h) if dh is None else _strided(dh), _strided(saved[0])
    seq_len, batch, hidden = h.shape
    dpre = h.new_empty(seq_len, batch, cell.gates, hidden)
    drec = dpre[:, :, : cell.products] if cell.additive else h.new_empty(seq_len, batch, cell.products, hidden)
    dstates = [torch.empty_like(h[0], dtype=dtype) for dtype in cell.dtypes(h.dtype)] if need_states else []
    real = real_of(h.dtype)
    dweight, dpre_sum = (h.new_empty(batch, n, hidden, dtype=real) for n in (cell.products, cell.gates))
    arguments = (
        *(dh, dh.stride(0), dh.stride(1)),
        *(kept, kept.stride(0), kept.stride(1), kept.stride(2)),
        *(operator.weight, *_pair(states), *_pair(dlast), reset),
        *(h, _only(saved[1:])),
        *(dpre, None if cell.additive else drec, *_pair(dstates), dweight, dpre_sum),
    )
    _launch("backward", cell, h, [dh, kept], arguments)
    return dpre, drec, [dweight.sum(0).to(h.dtype).view(operator.weight.shape), dpre_sum.sum(0)], dstates


def _pair(states: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """H and the other state, as far as they are there."""
    return (states[0] if states else None, _only(states[1:]))


def _only(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _strided(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it as it lies, as a slice of a wider product does."""
    return x if x.stride(-1) == 1 and x.stride(0) * x.itemsize < _STEP_BYTES else x.contiguous()


def _launch(
    direction: str, cell: Cell, h: Tensor, strided: Sequence[Tensor], arguments: Sequence[Tensor | int | None]
) -> None:
    """Of the arguments, ``strided`` tensors may have rows that lie apart; the others are made contiguous."""
    given = [x.contiguous() if isinstance(x, Tensor) and not any(x is y for y in strided) else x for x in arguments]
    width = _width(h, strided, given)
    threads = h[0].numel() // width
    name = _name(direction, cell.name, h.dtype, width)
    arguments = (*given, *h.shape)
    launch(module(cell.name, h.dtype), name, -(-threads // _THREADS), _THREADS, arguments, h.device)


def _width(h: Tensor, strided: Sequence[Tensor], given: Sequence[Tensor | int | None]) -> int:
    """Neighbouring units a thread: as many as fill a pack, where every row begins at one."""
    width = max(1, _PACK_BYTES // h.itemsize)
    strides = [h.shape[-1], *(stride for x in strided for stride in x.stride()[:-1])]
    tensors = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    whole = all(n % width == 0 for n in strides) and all(x.data_ptr() % (width * x.itemsize) == 0 for x in tensors)
    return width if whole else 1


def _name(direction: str, cell: str, dtype: torch.dtype, width: int) -> str:
    return f"diagonal_{direction}<{CELLS[cell].functor}, {NUMBERS[dtype]}, {width}>"


@functools.cache
def module(cell: str, dtype: torch.dtype) -> Module:
    """The kernels of this cell and dtype: forward and backward, for packs of units and for single ones."""
    widths = sorted({max(1, _PACK_BYTES // dtype.itemsize), 1})
    return Module("diagonal.cuh", tuple(_name(d, cell, dtype, n) for d in _DIRECTIONS for n in widths))


def shipped_modules() -> list[Module]:
    """Modules that stand for all: every size of number, and cells that read most, publish most and compute most."""
    return [module("tanh", dtype) for dtype in NUMBERS] + [
        module(cell, torch.bfloat16) for cell in ("lstm", "gru", "polynomial", "log_triple_r", "log_polynomial")
    ]
