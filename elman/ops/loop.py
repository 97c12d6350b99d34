"""The ``loop`` backend: a matrix product of PyTorch's and one kernel of ours a step, forward and backward.

It runs every shape and floating-point dtype on every device, and is the yardstick of the faster backends. Where our
kernels cannot be compiled, on the CPU above all, plain PyTorch operations take their place.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from elman.ops.cells import Cell
from elman.ops.cuda.compiler import CompilerUnavailableError, Module, compiler_version, kernels
from elman.ops.operators import Dense

if TYPE_CHECKING:
    from elman.ops.backends import Problem

#: The names of dtypes and cells in the CUDA sources.
_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float", torch.float64: "double"}
_FUNCTORS = {"tanh": "Tanh", "softsign": "Softsign"}

_THREADS = 256  # kStepThreads of steps.cuh
#: Neighbouring columns a thread: a step is so short that more threads beat wider loads (measured, H200).
_WIDTH = 2


def why_not(problem: Problem) -> str | None:
    """In words, why this backend cannot run the problem; None if it can."""
    if problem.operator is not Dense:
        return "it runs dense weights (H, H) only: use backend='reference'"
    if problem.cell.name not in _FUNCTORS:
        return f"it does not run cell={problem.cell.name!r}: use backend='reference'"
    if problem.dtype not in _NUMBERS:
        return f"it does not run {problem.dtype}: cast to one of {', '.join(str(dtype) for dtype in _NUMBERS)}"
    return None


def status() -> tuple[bool, str]:
    """Whether ``auto`` would use it on this machine, and how or why not."""
    if not torch.cuda.is_available():
        return False, "no CUDA device; on the CPU it runs when asked for by name, in plain PyTorch"
    try:
        return True, f"every shape and dtype; its kernels are compiled by NVRTC {compiler_version()}"
    except CompilerUnavailableError as error:
        return True, f"every shape and dtype, in plain PyTorch and slower: {error}"


def forward(
    pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None, cell: Cell, save: bool
) -> tuple[Tensor, Tensor]:
    """All steps.

    Returns:
        The states h (T, B, H), and v = pre + rec (T, B, H) where it is to be saved, else an empty tensor.
    """
    pre = _dense_rows(pre)
    h = pre.new_empty(pre.shape)
    v = pre.new_empty(pre.shape if save else 0)
    reset = None if reset is None else reset.contiguous()
    # None is the state zero, whose product is not computed.
    previous = h0 if h0 is None or reset is None else h0.masked_fill(reset[0, :, None], 0)
    rec = pre.new_empty(pre.shape[1:])
    carry = None if reset is None else pre.new_empty(pre.shape[1:])
    step = _steps(cell, pre).forward(pre, rec, previous is not None, reset, v if save else None, h, carry)

    transposed = weight.t()
    for t, h_t in enumerate(h.unbind(0)):
        if previous is not None:
            torch.mm(previous, transposed, out=rec)
        step(t)
        previous = h_t if carry is None else carry
    return h, v


def backward(
    dh: Tensor | None,
    dh_last: Tensor | None,
    v: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    cell: Cell,
    need_h0: bool,
) -> tuple[Tensor, Tensor | None]:
    """All steps, the last one first. A gradient that is None is zero, but one of the two is there.

    Returns:
        dpre (T, B, H), and dh0 (B, H) where needed.
    """
    dh = None if dh is None else _dense_rows(dh)
    dpre = v.new_empty(v.shape)
    reset = None if reset is None else reset.contiguous()
    drec = v.new_empty(v.shape[1:])
    if dh_last is not None:
        drec.copy_(dh_last)
    step = _steps(cell, v).backward(dh, drec, dh_last is not None, reset, v, dpre)

    for t, dpre_t in reversed(list(enumerate(dpre.unbind(0)))):
        step(t)
        if t > 0 or need_h0:
            torch.mm(dpre_t, weight, out=drec)
    if not need_h0:
        return dpre, None
    return dpre, drec if reset is None else drec.masked_fill(reset[0, :, None], 0)


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, so that a slice of a wider product needs no copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Steps(Protocol):
    """What a step does beside its product (steps.cuh has the rules), as a function of t over whole tensors.

    ``rec``, ``carry`` and ``drec`` are (B, H) and shared by all steps; ``rec`` holds no product yet at step 0 unless
    ``first``, nor ``drec`` at step T − 1 unless ``last``. What is None is not there, or not wanted.
    """

    def forward(
        self,
        pre: Tensor,
        rec: Tensor,
        first: bool,
        reset: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> Callable[[int], object]: ...

    def backward(
        self, dh: Tensor | None, drec: Tensor, last: bool, reset: Tensor | None, v: Tensor, dpre: Tensor
    ) -> Callable[[int], object]: ...


class _TorchSteps:
    """In plain PyTorch; half types are computed in float32, as in the kernels."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        assert cell.activation is not None
        self.activation = cell.activation
        self.real = dtype if dtype == torch.float64 else torch.float32

    def forward(
        self,
        pre: Tensor,
        rec: Tensor,
        first: bool,
        reset: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> Callable[[int], object]:
        def step(t: int) -> None:
            total = pre[t].to(self.real)
            if t > 0 or first:
                total = total + rec
            if v is not None:
                v[t] = total
            h[t] = self.activation.value(total)
            if carry is not None and reset is not None and t + 1 < len(pre):
                carry.copy_(h[t].masked_fill(reset[t + 1, :, None], 0))

        return step

    def backward(
        self, dh: Tensor | None, drec: Tensor, last: bool, reset: Tensor | None, v: Tensor, dpre: Tensor
    ) -> Callable[[int], object]:
        def step(t: int) -> None:
            gradient = torch.zeros_like(drec, dtype=self.real) if dh is None else dh[t].to(self.real)
            if t + 1 < len(v):
                gradient = gradient + (drec if reset is None else drec.masked_fill(reset[t + 1, :, None], 0))
            elif last:
                gradient = gradient + drec
            dpre[t] = gradient * self.activation.derivative(v[t].to(self.real))

        return step


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

    def forward(
        self,
        pre: Tensor,
        rec: Tensor,
        first: bool,
        reset: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> Callable[[int], object]:
        recs = _repeat(rec, len(pre))
        if not first:
            recs[0] = 0
        arguments = [
            _each_step(pre),
            pre.stride(1),
            recs,
            _next_step(reset),
            _each_step(v),
            _each_step(h),
            _repeat(carry, len(pre)),
        ]
        return self._launcher("forward", arguments, (pre,))

    def backward(
        self, dh: Tensor | None, drec: Tensor, last: bool, reset: Tensor | None, v: Tensor, dpre: Tensor
    ) -> Callable[[int], object]:
        drecs = _repeat(drec, len(v))
        if not last:
            drecs[-1] = 0
        arguments = [
            _each_step(dh),
            0 if dh is None else dh.stride(1),
            drecs,
            _next_step(reset),
            _each_step(v),
            _each_step(dpre),
        ]
        return self._launcher("backward", arguments, () if dh is None else (dh,))

    def _launcher(
        self, direction: str, arguments: list[_Addresses | int], strided: tuple[Tensor, ...]
    ) -> Callable[[int], object]:
        """Launches the kernel of step t. ``strided`` are the tensors that are not ours, hence perhaps not aligned."""
        from cuda.bindings import driver

        seq_len, batch, hidden = self.like.shape
        width = _WIDTH if hidden % _WIDTH == 0 and all(map(_allows_packs, strided)) else 1
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

        def step(t: int, keep_alive: object = (table, pointers)) -> None:
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
    return x.data_ptr() % (_WIDTH * x.itemsize) == 0 and x.stride(0) % _WIDTH == 0 and x.stride(1) % _WIDTH == 0


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
    return f"step_{direction}<{_FUNCTORS[cell]}, {_NUMBERS[dtype]}, {width}>"


@functools.cache
def step_module(cell: str, dtype: torch.dtype) -> Module:
    """The kernels of this cell and dtype: forward and backward, for packs of columns and for single ones."""
    widths = (_WIDTH, 1)
    names = tuple(_kernel_name(direction, cell, dtype, n) for direction in ("forward", "backward") for n in widths)
    return Module("steps.cuh", names)


def shipped_modules() -> list[Module]:
    """Every module that this backend may compile."""
    return [step_module(cell, dtype) for cell in _FUNCTORS for dtype in _NUMBERS]
