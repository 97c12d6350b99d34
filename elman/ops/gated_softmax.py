"""A grouped softmax beside a gate, ``softmax(x in groups) ⊙ silu(s)``, in one pass over memory each way.

Units of a group compete for what is shown, and the gate decides how much and with what sign: the ladder's selective
output. The kernels are in ``cuda/gated_softmax.cuh``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import aligned, launch
from elman.ops.operators import real_of
from elman.ops.registration import register

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
# What gated_softmax.cuh fixes.
_VECTOR_BYTES = 16
_MOST_THREADS = 128
_INPUTS = {"forward": 2, "backward": 3}
#: Numbers of a group that a lane should hold, and the most that its registers do.
_VALUES, _MOST_VALUES = 24, 64
#: Every warp's next tile is on its way: less would not fill the memory's pipeline.
_LEAST_TILE_BYTES = 512
#: What every launch may have without asking; a group of which a block cannot hold a few is for plain PyTorch.
_SHARED_BYTES = 48 * 1024
#: Tiles that a warp takes in turn where there are many, and warps a multiprocessor below which it takes fewer.
_MOST_TURNS, _RESIDENT_WARPS = 8, 64


def gated_softmax(x: Tensor, s: Tensor, groups: int) -> Tensor:
    """``softmax(x) * silu(s)``, the softmax over each of ``groups`` equal parts of the last dimension.

    Computed in float32 or, of float64, in that, and rounded once. On a GPU one kernel each way, whose backward pass is
    not differentiable; anywhere else plain PyTorch.

    Args:
        x: (..., D), floating point.
        s: (..., D), of any floating-point dtype.
        groups: a divisor of D.

    Returns:
        (..., D), of the dtype that both promote to, under autocast too.

    Raises:
        UsageError: the shapes differ, or the groups do not divide D.
    """
    if x.shape != s.shape or x.ndim == 0:
        raise UsageError(f"x has shape {tuple(x.shape)} and s {tuple(s.shape)}: give both (..., D)")
    if groups < 1 or x.shape[-1] % groups:
        raise UsageError(f"groups={groups} do not divide the {x.shape[-1]} units: give a divisor of that")
    if _has_kernel(x, s, groups):
        y: Tensor = torch.ops.elman.gated_softmax(x, s, groups)
        return y
    dtype = torch.promote_types(x.dtype, s.dtype)
    real = real_of(dtype)
    of_groups = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    shares = of_groups.softmax(-1, dtype=real).reshape(x.shape)
    return (shares * F.silu(s.to(real))).to(dtype)


@dataclass(frozen=True)
class _Plan:
    """How warps share groups of this many numbers; see gated_softmax.cuh."""

    lanes: int
    values: int
    tile: int
    pitch: int
    inverse: int
    warps: int
    shared_bytes: int


@functools.cache
def _plan(size: int, itemsize: int, inputs: int) -> _Plan | None:
    """None where no plan is a good one."""
    lanes = next((n for n in (1, 2, 4, 8, 16) if n * _VALUES >= size), 32)
    values = -(-size // lanes)
    vector = _VECTOR_BYTES // itemsize
    pitch, inverse, tile = size, 0, 32 // lanes
    if size % vector:
        while tile * size % vector:
            tile *= 2
    elif size // vector % 2 == 0:
        # An odd number of 16 bytes, so that neighbours in a warp begin at banks of their own.
        pitch, inverse = size + vector, -(-(2**20) // (size // vector))
    while tile * pitch * itemsize < _LEAST_TILE_BYTES:
        tile *= 2
    a_warp = 2 * inputs * tile * pitch * itemsize
    warps = next((n for n in (4, 2, 1) if n * a_warp <= _SHARED_BYTES), 0)
    if values > _MOST_VALUES or not warps:
        return None
    return _Plan(lanes, values, tile, pitch, inverse, warps, warps * a_warp)


def _has_kernel(x: Tensor, s: Tensor, groups: int) -> bool:
    return (
        x.is_cuda
        and s.device == x.device
        and x.dtype == s.dtype
        and x.dtype in _NUMBERS
        and x.shape[-1] > 0
        and all(_plan(x.shape[-1] // groups, x.itemsize, inputs) is not None for inputs in _INPUTS.values())
        and has_compiler()
    )


def _forward(x: Tensor, s: Tensor, groups: int) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch("forward", groups, (x, s), (y,))
    return y


def _fake_forward(x: Tensor, s: Tensor, groups: int) -> Tensor:
    return x.new_empty(x.shape)


def _backward(dy: Tensor, x: Tensor, s: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and s."""
    dx, ds = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch("backward", groups, (x, s, dy), (dx, ds))
    return dx, ds


def _fake_backward(dy: Tensor, x: Tensor, s: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, s, ctx.groups = inputs
    ctx.save_for_backward(x, s)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    dx, ds = torch.ops.elman.gated_softmax_backward(dy, *ctx.saved_tensors, ctx.groups)
    need_x, need_s, _ = ctx.needs_input_grad
    return dx if need_x else None, ds if need_s else None, None


register(
    "gated_softmax",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "the gated softmax's backward pass on a GPU cannot be differentiated itself: use float64, or the CPU",
)


def _launch(direction: str, groups: int, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    like = outputs[0]
    if not like.numel():
        return
    size = like.shape[-1] // groups
    plan = _plan(size, like.itemsize, len(inputs))
    assert plan is not None
    given = [aligned(x, _VECTOR_BYTES // x.itemsize) for x in inputs]
    total = like.numel() // size
    tiles = -(-total // plan.tile)
    turns = _turns(tiles, like.device)
    launch(
        _module(like.dtype, plan.lanes, plan.values),
        _name(direction, like.dtype, plan.lanes, plan.values),
        -(-tiles // (turns * plan.warps)),
        32 * plan.warps,
        (*given, *outputs, total, size, plan.tile, plan.pitch, plan.inverse, turns),
        like.device,
        shared_bytes=plan.shared_bytes,
    )


def _turns(tiles: int, device: torch.device) -> int:
    """Tiles that each warp takes one behind the other."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(_MOST_TURNS, tiles // (multiprocessors * _RESIDENT_WARPS)))


def _name(direction: str, dtype: torch.dtype, lanes: int, values: int) -> str:
    return f"gated_softmax_{direction}<{_NUMBERS[dtype]}, {lanes}, {values}>"


@functools.cache
def _module(dtype: torch.dtype, lanes: int, values: int) -> Module:
    return Module("gated_softmax.cuh", tuple(_name(direction, dtype, lanes, values) for direction in _INPUTS))


def shipped_modules() -> list[Module]:
    """Modules that stand for all: the least, a usual and the most numbers a lane, of every dtype."""
    return [_module(dtype, *shape) for dtype in _NUMBERS for shape in ((1, 1), (2, 19), (32, _MOST_VALUES))]
