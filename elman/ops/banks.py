"""Banks: running means of a sequence at several rates, each shown through a gate of its own, and the sum of it all.

The recurrence is linear and diagonal, so a thread of the GPU owns a unit with all its banks for the whole sequence, and
they come and go without ever lying in memory (``cuda/banks.cuh``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.ops.cuda.compiler import Module, has_compiler
from elman.ops.cuda.launch import aligned, launch
from elman.ops.loop import NUMBERS
from elman.ops.operators import real_of
from elman.ops.registration import register

_THREADS = 64  # kThreads of diagonal.cuh
#: What a thread moves at once, where it owns several units: half types in pairs.
_PACK_BYTES = 4
#: A thread of more banks than these owns one unit: its registers hold no two.
_BANKS_OF_PAIRS = 8
#: A step of a tensor is addressed in 32 bits.
_STEP_BYTES = 2**32


def banks(
    h: Tensor, z: Tensor, decay: Tensor, m0: Tensor | None = None, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``m_t[i] = decay[i] m_{t-1}[i] + (1 − decay[i]) h_t`` and ``y = h silu(z[0]) + Σ_i m[i] silu(z[i + 1])``.

    Every floating-point input is differentiable, through both outputs; where the kernels or a compiler run, once. The
    banks themselves are of float32 for half types: bf16 would lose what a slow bank is given in a step.

    Args:
        h: (T, B, H), T ≥ 1.
        z: (T, B, k + 1, H), of h's dtype; both are cast to autocast's.
        decay: (k, H), in [0, 1], of any floating-point dtype.
        m0: (B, k, H), the banks before the first step, of any floating-point dtype; zeros if absent.
        reset: (T, B) bool; where true, that row's banks are zeroed before that step.

    Returns:
        y (T, B, H) of h's dtype, and the banks after the last step (B, k, H).

    Raises:
        UsageError: shapes or dtypes do not fit together.
    """
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, z = h.to(dtype), z.to(dtype)
    _check(h, z, decay, m0, reset)
    real = real_of(h.dtype)
    decay, m0 = decay.to(real), None if m0 is None else m0.to(real)
    with torch.autocast(h.device.type, enabled=False):
        if h.is_cuda or torch.compiler.is_compiling():
            save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, z, decay, m0))
            y, m_last, _ = torch.ops.elman.banks(h, z, decay, m0, reset, save)
            return y, m_last
        y, m_last, _ = _reference(h, z, decay, m0, reset)
        return y, m_last


def _check(h: Tensor, z: Tensor, decay: Tensor, m0: Tensor | None, reset: Tensor | None) -> None:
    if h.ndim != 3 or 0 in h.shape or not h.is_floating_point():
        raise UsageError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}: give floating-point (T, B, H), T at least 1"
        )
    if decay.ndim != 2 or decay.shape[0] == 0 or decay.shape[1] != h.shape[2]:
        raise UsageError(f"decay has shape {tuple(decay.shape)}: give (k, H), H being {h.shape[2]}")
    seq_len, batch, hidden = h.shape
    k = len(decay)
    for name, x, shape in (
        ("z", z, (seq_len, batch, k + 1, hidden)),
        ("m0", m0, (batch, k, hidden)),
        ("reset", reset, (seq_len, batch)),
    ):
        if x is not None and x.shape != shape:
            raise UsageError(f"{name} has shape {tuple(x.shape)}: give {shape}")
    if z.dtype != h.dtype:
        raise UsageError(f"z has dtype {z.dtype} but h has {h.dtype}: cast one to the other")
    if reset is not None and reset.dtype != torch.bool:
        raise UsageError(f"reset has dtype {reset.dtype}: give torch.bool")


def _reference(
    h: Tensor, z: Tensor, decay: Tensor, m: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """In plain PyTorch: y, the last banks, and those before every step, its reset done."""
    if m is None:
        m = decay.new_zeros(h.shape[1], *decay.shape)
    cuts = None if reset is None else reset[:, :, None, None].unbind(0)
    outputs, before = [], []
    for t, (h_t, z_t) in enumerate(zip(h.to(decay.dtype).unbind(0), z.unbind(0), strict=True)):
        if cuts is not None:
            m = m.masked_fill(cuts[t], 0)
        before.append(m)
        given = h_t.unsqueeze(1)
        m = given + decay * (m - given)
        shown = F.silu(z_t.to(decay.dtype))
        outputs.append((h_t * shown[:, 0] + (m * shown[:, 1:]).sum(1)).to(h.dtype))
    return torch.stack(outputs), m, before


def _interval(k: int) -> int:
    """Steps from one checkpoint of the banks to the next: as many as a thread's registers hold of k banks."""
    return 8 if k <= 2 else 4 if k <= 4 else 2


def _forward(
    h: Tensor, z: Tensor, decay: Tensor, m0: Tensor | None, reset: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, the last banks, and for the backward pass those before every ``_interval``-th step (none unless ``save``)."""
    every = _interval(len(decay))
    if not _has_kernel(h, decay):
        y, m, before = _reference(h, z, decay, m0, reset)
        return y, m, torch.stack(before[::every]) if save else decay.new_empty(0)
    y, m = torch.empty_like(h, memory_format=torch.contiguous_format), decay.new_empty(h.shape[1], *decay.shape)
    checkpoints = decay.new_empty(-(-len(h) // every), *m.shape) if save else None
    _launch("forward", h, decay, (h, z, decay, m0, reset, y, checkpoints, m))
    return y, m, decay.new_empty(0) if checkpoints is None else checkpoints


def _fake_forward(
    h: Tensor, z: Tensor, decay: Tensor, m0: Tensor | None, reset: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m = decay.new_empty(h.shape[1], *decay.shape)
    every = _interval(decay.shape[0])
    checkpoints = decay.new_empty(-(-h.shape[0] // every), *m.shape) if save else decay.new_empty(0)
    return h.new_empty(h.shape), m, checkpoints


def _backward(
    dy: Tensor, dm: Tensor | None, h: Tensor, z: Tensor, decay: Tensor, reset: Tensor | None, checkpoints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of h, z, decay and m0."""
    if not _has_kernel(h, decay):
        return _walk_back(dy, dm, h, z, decay, reset, checkpoints)
    dh, dz = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, z))
    dm0 = torch.empty_like(checkpoints[0])
    sums = torch.empty_like(dm0)  # a row of the batch each, so that no two threads add to the same number
    _launch("backward", h, decay, (dy, dm, h, z, decay, reset, checkpoints, dh, dz, sums, dm0))
    return dh, dz, sums.sum(0), dm0


def _walk_back(
    dy: Tensor, dm: Tensor | None, h: Tensor, z: Tensor, decay: Tensor, reset: Tensor | None, checkpoints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the kernel does it: from the last checkpoint to the first, the banks after each made again."""
    every = _interval(len(decay))
    dh, dz, ddecay = torch.empty_like(h), torch.empty_like(z), torch.zeros_like(decay)
    dm = torch.zeros_like(checkpoints[0]) if dm is None else dm
    for index, start in reversed(list(enumerate(range(0, len(h), every)))):
        steps = slice(start, start + every)
        cut = None if reset is None else reset[steps]
        _, _, before = _reference(h[steps], z[steps], decay, checkpoints[index], cut)
        for t, m in reversed(list(enumerate(before, start))):
            given, through = h[t].to(decay.dtype).unsqueeze(1), dy[t].to(decay.dtype).unsqueeze(1)
            x = z[t].to(decay.dtype)
            gate = torch.sigmoid(x)
            shown, slope = x * gate, gate * (1 + x * torch.sigmoid(-x))
            dm = dm + through * shown[:, 1:]
            dh[t] = (through * shown[:, :1] + ((1 - decay) * dm).sum(1, keepdim=True)).squeeze(1)
            dz[t] = through * slope * torch.cat([given, given + decay * (m - given)], 1)
            ddecay += (dm * (m - given)).sum(0)
            dm = decay * dm
            if reset is not None:
                dm = dm.masked_fill(reset[t, :, None, None], 0)
    return dh, dz, ddecay, dm


def _fake_backward(
    dy: Tensor, dm: Tensor | None, h: Tensor, z: Tensor, decay: Tensor, reset: Tensor | None, checkpoints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dm0 = checkpoints.new_empty(checkpoints.shape[1:])
    return h.new_empty(h.shape), z.new_empty(z.shape), decay.new_empty(decay.shape), dm0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, z, decay, _, reset, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, z, decay, reset, output[2])


def _differentiate(ctx: Any, dy: Tensor | None, dm: Tensor | None, dcheckpoints: None) -> tuple[Tensor | None, ...]:
    h, z, decay, reset, checkpoints = ctx.saved_tensors
    if dy is None and dm is None:
        return (None,) * 6
    dy = torch.zeros_like(h) if dy is None else dy
    given = torch.ops.elman.banks_backward(dy, dm, h, z, decay, reset, checkpoints)
    return (*(x if need else None for x, need in zip(given, ctx.needs_input_grad, strict=False)), None, None)


register(
    "banks",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    "the backward pass of the banks cannot be differentiated itself: use the CPU, not compiled",
)


def _has_kernel(h: Tensor, decay: Tensor) -> bool:
    if not h.is_cuda or h.dtype not in NUMBERS or h[0].numel() * (len(decay) + 1) * decay.itemsize >= _STEP_BYTES:
        return False
    return has_compiler()


def _launch(direction: str, h: Tensor, decay: Tensor, arguments: tuple[Tensor | None, ...]) -> None:
    k, width = len(decay), _width(h, len(decay))
    given = [None if x is None else aligned(x, width) for x in arguments]
    name = _kernel_name(direction, k, h.dtype, width)
    blocks = -(-h[0].numel() // (width * _THREADS))
    launch(_module(k, h.dtype), name, blocks, _THREADS, (*given, *h.shape), h.device)


def _width(h: Tensor, k: int) -> int:
    """Neighbouring units a thread."""
    width = max(1, _PACK_BYTES // h.itemsize)
    return width if h.shape[-1] % width == 0 and k <= _BANKS_OF_PAIRS else 1


def _kernel_name(direction: str, k: int, dtype: torch.dtype, width: int) -> str:
    return f"banks_{direction}<{NUMBERS[dtype]}, {width}, {k}, {_interval(k)}>"


@functools.cache
def _module(k: int, dtype: torch.dtype) -> Module:
    """The kernels of k banks and this dtype: both directions, for packs of units and for single ones."""
    widths = sorted({max(1, _PACK_BYTES // dtype.itemsize) if k <= _BANKS_OF_PAIRS else 1, 1})
    return Module("banks.cuh", tuple(_kernel_name(d, k, dtype, n) for d in ("forward", "backward") for n in widths))


def shipped_modules() -> list[Module]:
    """Modules that stand for all: every size of number, and more and fewer banks."""
    return [_module(4, dtype) for dtype in NUMBERS] + [_module(k, torch.bfloat16) for k in (1, 2, 8, 16)]
