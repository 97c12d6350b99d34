"""What the loop backend hands to the driver, checked without a GPU: a stand-in for the driver runs the launches."""

import ctypes
import re
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.ops import loop
from elman.ops.cells import CELLS, FUSED_CELLS
from elman.ops.cuda import compiler
from elman.ops.cuda.compiler import CompilerUnavailableError
from elman.ops.operators import Dense
from tests.ops.problems import Problem, draw, parts

cuda_core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")

Launch = Callable[..., tuple[int]]


def array(address: int, *shape: int, dtype: type = np.float64, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """What lies at an address, in the machine's memory; strides count elements."""
    contiguous = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    strides = contiguous if strides is None else strides
    item = np.dtype(dtype).itemsize
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    flat = np.frombuffer((ctypes.c_char * (count * item)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [item * stride for stride in strides])


def tensor(address: int, *shape: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """A copy of it as a tensor, zeros where there is none."""
    if not address:
        return torch.zeros(shape, dtype=torch.float64)
    return torch.from_numpy(array(address, *shape, strides=strides).copy())


def flags(address: int, batch: int) -> Tensor:
    return torch.from_numpy(array(address, batch, dtype=np.bool_).copy()) if address else torch.zeros(batch).bool()


def run_like_the_kernels(names: dict[int, str]) -> Launch:
    """cuLaunchKernel in float64 on the CPU's memory: steps.cuh with the cells in PyTorch."""

    def launch(function: object, batch: int, y: int, z: int, threads: int, *rest: object) -> tuple[int]:
        direction, functor, _, width = re.fullmatch(r"step_(\w+)<(\w+), (\w+), (\d)>", names[int(function)]).groups()
        cell = next(cell for cell in FUSED_CELLS.values() if cell.functor == functor)
        count = {"forward": 13, "backward": 11}[direction]
        table, extra = rest[-2:]
        arguments = [int(array(int(at), 1, dtype=np.int64)[0]) for at in array(table, count, dtype=np.int64)]
        hidden = arguments.pop()
        columns = threads * int(width)
        assert (z, rest[:4], extra) == (1, (1, 1, 0, 0), 0)
        assert y * columns >= hidden > (y - 1) * columns
        assert threads % 32 == 0
        assert threads <= loop._THREADS
        one, many = (batch, hidden), lambda n: (batch, n, hidden)
        results: list[tuple[int, Sequence[Tensor]]]
        if direction == "forward":
            pre, row, gate, rec, bias, reset, reset_next, memory, saved, h, state, carry = arguments
            tensors = [pre, rec, bias, memory, saved, h, state, carry]
            given = tensor(pre, *many(cell.gates), strides=(row, gate, 1)).unbind(1)
            total = tensor(rec, *many(cell.products)) + tensor(bias, cell.products, hidden)
            remembered = tensor(memory, *one).masked_fill(flags(reset, batch)[:, None], 0)
            states, kept = cell.forward(given, total.unbind(1), remembered)
            results = [(saved, kept), (h, states[:1]), (state, states[1:])]
            results += [(carry, [states[0].masked_fill(flags(reset_next, batch)[:, None], 0)])]
        else:
            dh, row, dh_next, dmemory, reset, reset_next, saved, memory, dpre, drec = arguments
            tensors = [dh, dh_next, dmemory, saved, memory, dpre, drec]
            stops = flags(reset_next, batch)[:, None]
            gradient = tensor(dh, *one, strides=(row, 1)) + tensor(dh_next, *one).masked_fill(stops, 0)
            remembered = tensor(memory, *one).masked_fill(flags(reset, batch)[:, None], 0)
            later = tensor(dmemory, *one).masked_fill(stops, 0)
            kept = tensor(saved, *many(cell.saved)).unbind(1)
            of_pre, of_rec, earlier = cell.backward(kept, remembered, gradient, later)
            results = [(dpre, of_pre), (drec, of_rec), (dmemory, [earlier])]
        assert all(at % (8 * int(width)) == 0 for at in tensors)
        for at, values in results:
            if at:
                array(at, batch, len(values), hidden)[:] = torch.stack(list(values), 1).numpy()
        return (0,)

    return launch


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(enumerate((name for cell in FUSED_CELLS for name in loop.step_module(cell, torch.float64).kernels), 1))
    found = {name: types.SimpleNamespace(handle=number) for number, name in names.items()}
    monkeypatch.setattr(loop, "kernels", lambda module, capability: found)
    monkeypatch.setattr(loop, "_steps", loop._KernelSteps)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda_core, "Device", lambda index: types.SimpleNamespace(set_current=lambda: None))
    monkeypatch.setattr(driver, "cuLaunchKernel", run_like_the_kernels(names))


def both_passes(p: Problem) -> list[Tensor]:
    cell, states = CELLS[p.cell], parts(p.h0)
    pre = p.pre.unsqueeze(2) if p.pre.ndim == 3 else p.pre
    given = (pre, Dense(p.weight), p.bias, states, p.reset, cell)
    h, last, saved = loop.forward(*given, save=True)
    unsaved, last_unsaved, nothing = loop.forward(*given, save=False)
    assert nothing == []
    assert all(torch.equal(a, b) for a, b in zip((h, *last), (unsaved, *last_unsaved), strict=True))
    walked = (p.dh, parts(p.dh_last), h, saved, Dense(p.weight), states, p.reset, cell)
    dpre, drec, _, dstates = loop.backward(*walked, need_states=p.h0 is not None)
    return [h, *last, *saved, dpre, drec, *dstates]


PROBLEMS = {
    "even": draw(5, 3, 8),
    "odd": draw(5, 3, 7),
    "wide": draw(3, 2, 600),
    "one step": draw(1, 1, 1),
    "no resets": draw(4, 3, 8, reset_rate=None),
    "no h0": draw(4, 3, 8, with_h0=False),
    "bare": draw(4, 3, 6, with_h0=False, reset_rate=None),
    "dh alone": replace(draw(4, 3, 8), dh_last=None),
    "dh_last alone": replace(draw(4, 3, 8), dh=None),
    "slices": replace(draw(4, 3, 8), pre=draw(4, 3, 24).pre[..., 8:16], dh=draw(4, 6, 8).dh[:, ::2]),
    "slices off the grid": replace(draw(4, 3, 8), pre=draw(4, 3, 23).pre[..., 7:15]),
    "transposed": replace(draw(4, 3, 8), pre=draw(3, 4, 8).pre.transpose(0, 1), dh=draw(8, 3, 4).dh.transpose(0, 2)),
    "expanded": replace(draw(4, 3, 8), dh=torch.ones((), dtype=torch.float64).expand(4, 3, 8)),
}


GATED = {
    f"{cell}, {words}": draw(4, 3, hidden, cell=cell, with_bias=not CELLS[cell].additive, **options)
    for cell in FUSED_CELLS
    for words, hidden, options in (("even", 8, {}), ("odd", 7, {}), ("bare", 6, {"with_h0": False, "reset_rate": None}))
}


@pytest.mark.parametrize("name", PROBLEMS | GATED)
def test_launches_compute_the_recurrence(simulated_gpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    p = (PROBLEMS | GATED)[name]
    ours = both_passes(p)
    monkeypatch.setattr(loop, "_steps", lambda cell, like: loop._TorchSteps(cell, like.dtype))
    for got, expected in zip(ours, both_passes(p), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_failed_launch_is_an_error(simulated_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *args: (driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,))
    with pytest.raises(RuntimeError, match=r"cannot launch the forward kernel .* CUDA_ERROR_LAUNCH_FAILED"):
        both_passes(draw(2, 2, 2))


def test_without_nvrtc_it_warns_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise CompilerUnavailableError("no NVRTC")

    monkeypatch.setattr(loop, "_KernelSteps", refuse)
    loop._warn_of_slow_steps.cache_clear()
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="runs in plain PyTorch, slower: no NVRTC"):
        assert isinstance(loop._steps(CELLS["tanh"], on_gpu), loop._TorchSteps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop._steps(CELLS["tanh"], on_gpu)


def test_the_table_of_kernels_is_complete() -> None:
    modules = loop.shipped_modules()
    assert len(modules) == len(set(modules)) == len(FUSED_CELLS) * 4
    assert all(isinstance(module, compiler.Module) and len(module.kernels) == 4 for module in modules)
