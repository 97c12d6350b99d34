"""The ``loop`` backend: a matrix product of PyTorch's and one kernel of ours a step, forward and backward.

It runs every shape and floating-point dtype on every device, and is the yardstick of the faster backends. Where our
kernels cannot be compiled, on the CPU above all, plain PyTorch operations take their place.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from elman.ops.cells import CELLS, FUSED_CELLS, Cell
from elman.ops.cuda.compiler import CompilerUnavailableError, Module, compiler_version, kernels
from elman.ops.operators import Operator, real_of

if TYPE_CHECKING:
    from elman.ops.backends import Problem

#: The names of dtypes in the CUDA sources.
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float", torch.float64: "double"}

_THREADS = 256  # kStepThreads of steps.cuh
#: Neighbouring columns a thread: a step is so short that more threads beat wider loads (measured, H200).
_WIDTH = 2


def why_not(problem: Problem) -> str | None:
    """In words, why this backend cannot run the problem; None if it can."""
    if problem.cell.functor is None:
        return f"it does not run cell={problem.cell.name!r}: use backend='reference'"
    if problem.dtype not in NUMBERS:
        return f"it does not run {problem.dtype}: cast to one of {', '.join(str(dtype) for dtype in NUMBERS)}"
    return None


def status() -> tuple[bool, str]:
    """Whether ``auto`` would use it on this machine, and how or why not."""
    if not torch.cuda.is_available():
        return False, "no CUDA device; on the CPU it runs when asked for by name, in plain PyTorch"
    try:
        return True, f"every shape and dtype; its kernels are compiled by NVRTC {compiler_version()}"
    except CompilerUnavailableError as error:
        return True, f"every shape and dtype, in plain PyTorch and slower: {error}"


def saves_pre(operator: str, cell: Cell) -> bool:
    """See ``fused.Walk``."""
    return False


def forward(
    pre: Tensor,
    operator: Operator,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All steps; see ``fused.Walk``."""
    pre = _dense_rows(pre)
    seq_len, batch, _, hidden = pre.shape
    h = pre.new_empty(seq_len, batch, hidden)
    # A state that nobody will ask for has one place for all steps.
    dtypes = cell.dtypes(pre.dtype)
    others = [pre.new_empty(seq_len if save else 1, batch, hidden, dtype=dtype).expand_as(h) for dtype in dtypes[1:]]
    saved = pre.new_empty(seq_len, batch, cell.saved, hidden) if save else None
    reset = None if reset is None else reset.contiguous()
    rec = pre.new_empty(batch, cell.products * hidden)
    carry = None if reset is None else torch.empty_like(h[0])
    memory = states[-1].contiguous() if states and cell.reads_memory else None
    step = _steps(cell, h).forward(Forward(pre, rec, bool(states), bias, reset, memory, saved, [h, *others], carry))

    # None is the state zero, whose product is not computed.
    previous = states[0] if states else None
    if previous is not None and reset is not None:
        previous = previous.masked_fill(reset[0, :, None], 0)
    multiply = operator.product_into(rec)
    for t, h_t in enumerate(h.unbind(0)):
        if previous is not None:
            multiply(previous)
        step(t)
        previous = h_t if carry is None else carry
    last = [sequence[-1].clone() if save else sequence[-1] for sequence in others]
    return h, last, [] if saved is None else [saved, *others]


def backward(
    dh: Tensor | None,
    dlast: Sequence[Tensor],
    h: Tensor,
    saved: Sequence[Tensor],
    operator: Operator,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    need_states: bool,
) -> tuple[Tensor, Tensor, None, list[Tensor]]:
    """All steps, the last one first; see ``fused.Walk``."""
    dh = None if dh is None else _dense_rows(dh)
    seq_len, batch, hidden = h.shape
    dpre = h.new_empty(seq_len, batch, cell.gates, hidden)
    drec = dpre[:, :, : cell.products] if cell.additive else h.new_empty(seq_len, batch, cell.products, hidden)
    reset = None if reset is None else reset.contiguous()
    dh_next = torch.empty_like(h[0])
    if dlast:
        dh_next.copy_(dlast[0])
    dmemory = None
    if cell.reads_memory:
        dmemory = torch.zeros_like(h[0], dtype=real_of(h.dtype))
        if dlast and cell.states > 1:
            dmemory.copy_(dlast[-1])
    memory = states[-1].contiguous() if states and cell.reads_memory else None
    step = _steps(cell, h).backward(
        Backward(dh, dh_next, bool(dlast), dmemory, reset, saved[0], memory, [h, *saved[1:]], dpre, drec)
    )

    multiply = operator.transposed_into(dh_next)
    for t, drec_t in reversed(list(enumerate(drec.flatten(2).unbind(0)))):
        step(t)
        if t > 0 or need_states:
            multiply(drec_t)
    if not need_states:
        return dpre, drec, None, []
    dstates = [dh_next] if dmemory is None or cell.states > 1 else [dh_next + dmemory]
    if dmemory is not None and cell.states > 1:
        dstates.append(dmemory)
    if reset is not None:
        dstates = [dstate.masked_fill(reset[0, :, None], 0) for dstate in dstates]
    return dpre, drec, None, [x.to(dtype) for x, dtype in zip(dstates, cell.dtypes(h.dtype), strict=True)]


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, so that a slice of a wider product needs no copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Forward:
    """What the steps forward read and write, beside their products; None where it is not there, or not wanted.

    Attributes:
        pre: (T, B, G, H).
        rec: (B, P·H), shared by all steps, holding no product yet at step 0 unless ``first``.
        bias: (P, H).
        reset: (T, B).
        memory: (B, H), the memory before step 0, if the cell reads it.
        saved: (T, B, saved, H).
        states: (T, B, H) each, of ``Cell.dtypes``, all written.
        carry: (B, H), h after a step as the next one's product shall see it, where there are resets.
    """

    pre: Tensor
    rec: Tensor
    first: bool
    bias: Tensor | None
    reset: Tensor | None
    memory: Tensor | None
    saved: Tensor | None
    states: Sequence[Tensor]
    carry: Tensor | None


@dataclass(frozen=True)
class Backward:
    """What the steps backward read and write, beside their products; None where it is not there, or not wanted.

    Attributes:
        dh: (T, B, H).
        dh_next: (B, H), what the next step's products gave to h, holding nothing yet at step T − 1 unless ``last``.
        dmemory: (B, H) of ``real_of``, what the next step's cell gave to the memory, and this step's puts its own.
        reset, saved, memory, states: as in ``Forward``.
        dpre: (T, B, G, H), written.
        drec: (T, B, P, H), written where it is no part of dpre.
    """

    dh: Tensor | None
    dh_next: Tensor
    last: bool
    dmemory: Tensor | None
    reset: Tensor | None
    saved: Tensor
    memory: Tensor | None
    states: Sequence[Tensor]
    dpre: Tensor
    drec: Tensor


class _Steps(Protocol):
    """What a step does beside its product (steps.cuh has the rules), as a function of t over whole tensors."""

    def forward(self, x: Forward) -> Callable[[int], object]: ...

    def backward(self, x: Backward) -> Callable[[int], object]: ...


class _TorchSteps:
    """In plain PyTorch; half types are computed in float32, as in the kernels."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        self.cell, self.real = cell, real_of(dtype)

    def forward(self, x: Forward) -> Callable[[int], object]:
        def step(t: int) -> None:
            pre = x.pre[t].to(self.real)
            rec = x.rec.to(self.real).view(len(x.rec), self.cell.products, -1)
            rec = rec if t > 0 or x.first else torch.zeros_like(rec)
            if x.bias is not None:
                rec = rec + x.bias
            values, saved = self.cell.forward(pre.unbind(1), rec.unbind(1), self._memory(x, t))
            for state, value in zip(x.states, values, strict=True):
                state[t] = value
            if x.saved is not None:
                x.saved[t] = torch.stack(saved, 1)
            if x.carry is not None and x.reset is not None and t + 1 < len(x.pre):
                x.carry.copy_(x.states[0][t].masked_fill(x.reset[t + 1, :, None], 0))

        return step

    def backward(self, x: Backward) -> Callable[[int], object]:
        def step(t: int) -> None:
            dh = torch.zeros_like(x.dh_next, dtype=self.real) if x.dh is None else x.dh[t].to(self.real)
            dmemory = torch.zeros_like(dh) if x.dmemory is None else x.dmemory
            if t + 1 < len(x.saved):
                dh = dh + self._before_reset(x, t, x.dh_next)
                dmemory = self._before_reset(x, t, dmemory)
            elif x.last:
                dh = dh + x.dh_next
            saved = x.saved[t].to(self.real).unbind(1)
            assert self.cell.backward is not None
            dpre, drec, dmemory = self.cell.backward(saved, self._memory(x, t), dh, dmemory)
            x.dpre[t] = torch.stack(dpre, 1)
            if not self.cell.additive:
                x.drec[t] = torch.stack(drec, 1)
            if x.dmemory is not None:
                x.dmemory.copy_(dmemory)

        return step

    def _memory(self, x: Forward | Backward, t: int) -> Tensor:
        """The cell's memory before step t, a reset's zeros included."""
        memory = x.states[-1][t - 1] if t > 0 else x.memory
        if memory is None:
            return torch.zeros_like(x.states[0][0], dtype=self.real)
        return (memory if x.reset is None else memory.masked_fill(x.reset[t, :, None], 0)).to(self.real)

    def _before_reset(self, x: Backward, t: int, gradient: Tensor) -> Tensor:
        return gradient if x.reset is None else gradient.masked_fill(x.reset[t + 1, :, None], 0)


class _KernelSteps:
    """In one kernel of steps.cuh, on the current stream of the tensors' device.

    Every argument of a kernel has 8 bytes, so the arguments of all steps are one table, made at once: a launch then
    costs the host no more than a product's.
    """

    def __init__(self, cell: Cell, like: Tensor) -> None:
        from cuda.core import Device

        self.cell, self.like = cell, like
        self.kernels = kernels(step_module(cell.name, like.dtype), torch.cuda.get_device_capability(like.device))
        # A thread of autograd's that has not run a kernel yet has no CUDA context.
        Device(like.device.index).set_current()

    def forward(self, x: Forward) -> Callable[[int], object]:
        recs = _repeat(x.rec, len(x.pre))
        if not x.first:
            recs[0] = 0
        bias = None if x.bias is None else x.bias.contiguous()
        arguments = [
            _each_step(x.pre),
            x.pre.stride(1),
            x.pre.stride(2),
            recs,
            _repeat(bias, len(x.pre)),
            _each_step(x.reset),
            _next_step(x.reset),
            self._memories(x),
            _each_step(x.saved),
            _each_step(x.states[0]),
            _each_step(x.states[1]) if len(x.states) > 1 else 0,
            _repeat(x.carry, len(x.pre)),
        ]
        return self._launcher("forward", arguments, (x.pre, bias, x.memory))

    def backward(self, x: Backward) -> Callable[[int], object]:
        dh_nexts = _repeat(x.dh_next, len(x.saved))
        if not x.last:
            dh_nexts[-1] = 0
        arguments = [
            _each_step(x.dh),
            0 if x.dh is None else x.dh.stride(1),
            dh_nexts,
            _repeat(x.dmemory, len(x.saved)),
            _each_step(x.reset),
            _next_step(x.reset),
            _each_step(x.saved),
            self._memories(x),
            _each_step(x.dpre),
            0 if self.cell.additive else _each_step(x.drec),
        ]
        return self._launcher("backward", arguments, (x.dh, x.memory))

    def _memories(self, x: Forward | Backward) -> _Addresses | int:
        """The addresses of the cell's memory before each step."""
        if not self.cell.reads_memory:
            return 0
        sequence = x.states[-1]
        addresses = _repeat(x.memory, len(sequence))
        addresses[1:] = sequence.data_ptr() + np.arange(len(sequence) - 1) * (sequence.stride(0) * sequence.itemsize)
        return addresses

    def _launcher(
        self, direction: str, arguments: list[_Addresses | int], given: tuple[Tensor | None, ...]
    ) -> Callable[[int], object]:
        """Launches the kernel of step t. ``given`` are the tensors that are not ours, hence perhaps not aligned."""
        from cuda.bindings import driver

        seq_len, batch, hidden = self.like.shape
        aligned = all(_allows_packs(x) for x in given if x is not None)
        width = _WIDTH if hidden % _WIDTH == 0 and aligned else 1
        kernel = self.kernels[_kernel_name(direction, self.cell.name, self.like.dtype, width)]
        columns = hidden // width
        threads = min(_THREADS, -(-columns // 32) * 32)
        grid = (batch, -(-columns // threads), 1)

        table = np.empty((seq_len, len(arguments) + 1), np.int64)
        for column, argument in enumerate([*arguments, hidden]):
            table[:, column] = argument
        # What the driver takes is an array of pointers to the arguments.
        pointers = table.ctypes.data + 8 * np.arange(table.size).reshape(table.shape)
        addresses = (pointers.ctypes.data + pointers.strides[0] * np.arange(seq_len)).tolist()
        function = driver.CUfunction(int(kernel.handle))
        stream = torch.cuda.current_stream(self.like.device).cuda_stream

        def step(t: int, keep_alive: object = (table, pointers, given)) -> None:
            (status,) = driver.cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, addresses[t], 0)
            if status:
                raise RuntimeError(f"cannot launch the {direction} kernel of the loop backend: {status.name}")

        return step


_Addresses = np.ndarray[tuple[int], np.dtype[np.int64]]


def _repeat(x: Tensor | None, seq_len: int) -> _Addresses:
    return np.full(seq_len, 0 if x is None else x.data_ptr(), np.int64)


def _each_step(x: Tensor | None) -> _Addresses | int:
    """The addresses of x[0], x[1], …; 0 where there is no x."""
    return 0 if x is None else x.data_ptr() + np.arange(len(x)) * (x.stride(0) * x.itemsize)


def _next_step(reset: Tensor | None) -> _Addresses | int:
    """The addresses of reset[1], reset[2], …; none follows the last."""
    if reset is None:
        return 0
    addresses = reset.data_ptr() + np.arange(1, len(reset) + 1) * reset.stride(0)
    addresses[-1] = 0
    return addresses


def _allows_packs(x: Tensor) -> bool:
    return x.data_ptr() % (_WIDTH * x.itemsize) == 0 and all(stride % _WIDTH == 0 for stride in x.stride()[:-1])


def _steps(cell: Cell, like: Tensor) -> _Steps:
    if like.is_cuda:
        try:
            return _KernelSteps(cell, like)
        except CompilerUnavailableError as error:
            _warn_of_slow_steps(str(error))
    return _TorchSteps(cell, like.dtype)


@functools.cache
def _warn_of_slow_steps(reason: str) -> None:
    warnings.warn(f"the loop backend runs in plain PyTorch, slower: {reason}", RuntimeWarning, stacklevel=2)


def _kernel_name(direction: str, cell: str, dtype: torch.dtype, width: int) -> str:
    return f"step_{direction}<{CELLS[cell].functor}, {NUMBERS[dtype]}, {width}>"


@functools.cache
def step_module(cell: str, dtype: torch.dtype) -> Module:
    """The kernels of this cell and dtype: forward and backward, for packs of columns and for single ones."""
    widths = (_WIDTH, 1)
    names = tuple(_kernel_name(direction, cell, dtype, n) for direction in ("forward", "backward") for n in widths)
    return Module("steps.cuh", names)


def shipped_modules() -> list[Module]:
    """Every module that this backend may compile."""
    return [step_module(cell, dtype) for cell in FUSED_CELLS for dtype in NUMBERS]
