"""The ``loop`` backend: a matrix product of PyTorch's and one kernel of ours a step, forward and backward.

It runs every shape and floating-point dtype on every device, and is the yardstick of the faster backends. Where our
kernels cannot be compiled, on the CPU above all, plain PyTorch operations take their place.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Protocol

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
_PACK_BYTES = 16


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
    seq_len, *step_shape = pre.shape
    pre = _dense_rows(pre)
    h = pre.new_empty(pre.shape)
    v = pre.new_empty(pre.shape if save else 0)
    rec = pre.new_empty(step_shape)
    carry = pre.new_empty(step_shape) if reset is not None else None
    steps = _make_steps(pre, cell, h, v, pre)
    transposed = weight.t()

    pre_steps, h_steps = pre.unbind(0), h.unbind(0)
    v_steps = v.unbind(0) if save else [None] * seq_len
    reset_next = [None] * seq_len if reset is None else [*reset.contiguous()[1:].unbind(0), None]
    # None is the state zero, whose product is not computed.
    previous = h0 if h0 is None or reset is None else h0.masked_fill(reset[0, :, None], 0)
    for t in range(seq_len):
        if previous is not None:
            torch.mm(previous, transposed, out=rec)
        steps.forward(pre_steps[t], None if previous is None else rec, reset_next[t], v_steps[t], h_steps[t], carry)
        previous = h_steps[t] if carry is None else carry
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
    seq_len, *step_shape = v.shape
    dh = None if dh is None else _dense_rows(dh)
    dpre = v.new_empty(v.shape)
    buffer = v.new_empty(step_shape)
    steps = _make_steps(v, cell, dpre, v, *(() if dh is None else (dh,)))

    dh_steps = [None] * seq_len if dh is None else dh.unbind(0)
    v_steps, dpre_steps = v.unbind(0), dpre.unbind(0)
    reset_next = [None] * seq_len if reset is None else [*reset.contiguous()[1:].unbind(0), None]
    drec = None if dh_last is None else dh_last.clone(memory_format=torch.contiguous_format)
    for t in reversed(range(seq_len)):
        steps.backward(dh_steps[t], drec, reset_next[t], v_steps[t], dpre_steps[t])
        if t > 0 or need_h0:
            drec = torch.mm(dpre_steps[t], weight, out=buffer)
    if not need_h0:
        return dpre, None
    return dpre, buffer if reset is None else buffer.masked_fill(reset[0, :, None], 0)


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, so that a slice of a wider product needs no copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Steps(Protocol):
    """What a step does beside its product. Tensors are (B, H), ``reset_next`` (B,); see steps.cuh for the rules."""

    def forward(
        self,
        pre: Tensor,
        rec: Tensor | None,
        reset_next: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> None: ...

    def backward(
        self, dh: Tensor | None, drec: Tensor | None, reset_next: Tensor | None, v: Tensor, dpre: Tensor
    ) -> None: ...


class _TorchSteps:
    """In plain PyTorch; half types are computed in float32, as in the kernels."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        assert cell.activation is not None
        self.activation = cell.activation
        self.real = dtype if dtype == torch.float64 else torch.float32

    def forward(
        self,
        pre: Tensor,
        rec: Tensor | None,
        reset_next: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> None:
        total = pre.to(self.real)
        if rec is not None:
            total = total + rec
        if v is not None:
            v.copy_(total)
        h.copy_(self.activation.value(total))
        if carry is not None:
            carry.copy_(h if reset_next is None else h.masked_fill(reset_next[:, None], 0))

    def backward(
        self, dh: Tensor | None, drec: Tensor | None, reset_next: Tensor | None, v: Tensor, dpre: Tensor
    ) -> None:
        if drec is not None and reset_next is not None:
            drec = drec.masked_fill(reset_next[:, None], 0)
        gradient = sum(part.to(self.real) for part in (dh, drec) if part is not None)
        dpre.copy_(gradient * self.activation.derivative(v.to(self.real)))


class _KernelSteps:
    """In one kernel of steps.cuh, on the current stream of the tensors' device."""

    def __init__(self, cell: Cell, like: Tensor, strided: tuple[Tensor, ...]) -> None:
        from cuda.core import LaunchConfig, Stream, launch

        batch, hidden = like.shape[1:]
        found = kernels(step_module(cell.name, like.dtype), torch.cuda.get_device_capability(like.device))
        width = _PACK_BYTES // like.element_size()
        packed = hidden % width == 0 and all(_allows_packs(x, width) for x in strided)
        self.forward_kernel, self.backward_kernel = (
            found[_kernel_name(direction, cell.name, like.dtype, width if packed else 1)]
            for direction in ("forward", "backward")
        )
        columns = hidden // width if packed else hidden
        threads = min(_THREADS, -(-columns // 32) * 32)
        self.config = LaunchConfig(grid=(batch, -(-columns // threads)), block=threads)
        self.stream = Stream.from_handle(torch.cuda.current_stream(like.device).cuda_stream)
        self.hidden = hidden
        self.launch = launch

    def forward(
        self,
        pre: Tensor,
        rec: Tensor | None,
        reset_next: Tensor | None,
        v: Tensor | None,
        h: Tensor,
        carry: Tensor | None,
    ) -> None:
        self.launch(
            self.stream,
            self.config,
            self.forward_kernel,
            pre.data_ptr(),
            pre.stride(0),
            _pointer(rec),
            _pointer(reset_next),
            _pointer(v),
            h.data_ptr(),
            _pointer(carry),
            self.hidden,
        )

    def backward(
        self, dh: Tensor | None, drec: Tensor | None, reset_next: Tensor | None, v: Tensor, dpre: Tensor
    ) -> None:
        self.launch(
            self.stream,
            self.config,
            self.backward_kernel,
            _pointer(dh),
            0 if dh is None else dh.stride(0),
            _pointer(drec),
            _pointer(reset_next),
            v.data_ptr(),
            dpre.data_ptr(),
            self.hidden,
        )


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _allows_packs(x: Tensor, width: int) -> bool:
    return x.data_ptr() % _PACK_BYTES == 0 and x.stride(0) % width == 0 and x.stride(1) % width == 0


def _make_steps(like: Tensor, cell: Cell, *strided: Tensor) -> _Steps:
    if like.is_cuda:
        try:
            return _KernelSteps(cell, like, strided)
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
    """The kernels of this cell and dtype: forward and backward, for packs of 16 bytes and for single numbers."""
    widths = (_PACK_BYTES // dtype.itemsize, 1)
    names = tuple(_kernel_name(direction, cell, dtype, n) for direction in ("forward", "backward") for n in widths)
    return Module("steps.cuh", names)


def shipped_modules() -> list[Module]:
    """Every module that this backend may compile."""
    return [step_module(cell, dtype) for cell in _FUNCTORS for dtype in _NUMBERS]
