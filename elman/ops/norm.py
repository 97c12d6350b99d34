"""The root-mean-square norm of a sum: what stands between two layers, in one pass over memory each way."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import launch
from elman.ops.registration import register

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
# What norm.cuh fixes.
_PACK = 4
_MOST_THREADS = 512
#: Packs a thread, the fewest that suffice; two or more keep enough loads on their way.
_PACKS = (2, 4)
_WIDEST = _PACKS[-1] * _PACK * _MOST_THREADS
#: Threads a multiprocessor in all its blocks, as many as its registers hold at a width of 1280; fastest there (H200).
_RESIDENT_THREADS = {"forward": 1280, "backward": 960}


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, *, eps: float | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``s = x + y`` and ``n = s / sqrt(mean(s²) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    On a GPU a float32 stream takes one kernel forward and one backward; anything else is plain PyTorch. Every
    floating-point input is differentiable; the kernels' backward pass is not.

    Args:
        x: (..., D), the residual stream.
        y: (..., D), the branch that joins it, or None for nothing: then s is x.
        weight: (D,).
        eps: float32's machine epsilon if absent, whatever the dtypes: what was trained in one is the same in another.
        dtype: of n, that of x if absent. The norm itself is computed in that of s.

    Returns:
        s (..., D) in the dtype that x + y promotes to, and n (..., D).
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    dtype = x.dtype if dtype is None else dtype
    if _has_kernel(x, y, weight, dtype):
        s, n, _ = torch.ops.elman.add_norm(x, y, weight, eps, dtype)
        return x if y is None else s, n
    s = x if y is None else x + y
    return s, F.rms_norm(s, weight.shape, weight, eps).to(dtype)


def _has_kernel(x: Tensor, y: Tensor | None, weight: Tensor, dtype: torch.dtype) -> bool:
    width = x.shape[-1]
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.float32
        and dtype in _NUMBERS
        and (y is None or (y.dtype == dtype and y.shape == x.shape))
        and width % _PACK == 0
        and width <= _WIDEST
        and has_compiler()
    )


def _forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum s (empty where it is x), n, and 1 / sqrt(mean(s²) + eps) (...) for the backward pass."""
    x, y, weight = _dense(x), None if y is None else _dense(y), _dense(weight)
    s = None if y is None else torch.empty_like(x)
    n = torch.empty_like(x, dtype=dtype)
    r = x.new_empty(x.shape[:-1])
    _launch("forward", dtype, x, (x, y, weight, s, n, r, eps))
    return x.new_empty(0) if s is None else s, n, r


def _fake_forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0 if y is None else x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1])


def _backward(
    dn: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, r: Tensor, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of y in the dtype of dn (empty unless needed), and of weight."""
    dn, ds, s, weight = _dense(dn), None if ds is None else _dense(ds), _dense(s), _dense(weight)
    dx = torch.empty_like(s)
    dy = torch.empty_like(dn) if need_y else None
    parts = s.new_empty(_blocks("backward", s), s.shape[-1])  # a row a block, so that no two add to the same number
    _launch("backward", dn.dtype, s, (dn, ds, s, weight, r, dx, dy, parts))
    return dx, dn.new_empty(0) if dy is None else dy, parts.sum(0)


def _fake_backward(
    dn: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, r: Tensor, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), dn.new_empty(dn.shape if need_y else 0), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight, _, ctx.dtype = inputs
    s, _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.has_y = y is not None
    ctx.save_for_backward(s if ctx.has_y else x, weight, r)


def _differentiate(ctx: Any, ds: Tensor | None, dn: Tensor | None, dr: None) -> tuple[Tensor | None, ...]:
    s, weight, r = ctx.saved_tensors
    if not ctx.has_y:
        ds = None  # of the empty tensor
    _, need_y, need_weight, *_ = ctx.needs_input_grad
    if dn is None:
        return ds, ds.to(ctx.dtype) if need_y and ds is not None else None, None, None, None
    rounds = need_y and dn.dtype != s.dtype
    dx, dy, dweight = torch.ops.elman.add_norm_backward(dn, ds, s, weight, r, rounds)
    return dx, (dy if rounds else dx) if need_y else None, dweight if need_weight else None, None, None


register(
    "add_norm",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "the norm's backward pass on a GPU cannot be differentiated itself: use float64, or the CPU",
)


def _dense(x: Tensor) -> Tensor:
    """A tensor that the kernels' wide loads can read: contiguous and aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % (_PACK * x.itemsize) == 0 else x.clone()


def _packs(width: int) -> int:
    return next(packs for packs in _PACKS if packs * _PACK * _MOST_THREADS >= width)


def _threads(width: int) -> int:
    return 32 * -(-width // (32 * _PACK * _packs(width)))


def _blocks(direction: str, x: Tensor) -> int:
    """Of the grid: as many as run at once, each with rows of its own."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    width = x.shape[-1]
    return min(x.numel() // width, multiprocessors * max(1, _RESIDENT_THREADS[direction] // _threads(width)))


def _launch(direction: str, dtype: torch.dtype, like: Tensor, arguments: tuple[Tensor | float | None, ...]) -> None:
    width = like.shape[-1]
    if not like.numel():
        return
    name = _kernel_name(direction, dtype, _packs(width))
    given = (*arguments, like.numel() // width, width)
    launch(_module(dtype), name, _blocks(direction, like), _threads(width), given, like.device)


def _kernel_name(direction: str, dtype: torch.dtype, packs: int) -> str:
    return f"norm_{direction}<{_NUMBERS[dtype]}, {packs}>"


@functools.cache
def _module(dtype: torch.dtype) -> Module:
    directions = ("forward", "backward")
    return Module(
        "norm.cuh", tuple(_kernel_name(direction, dtype, packs) for direction in directions for packs in _PACKS)
    )


def shipped_modules() -> list[Module]:
    """Every module of kernels that this op may compile."""
    return [_module(dtype) for dtype in _NUMBERS]
