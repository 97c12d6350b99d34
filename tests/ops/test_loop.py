"""What the loop backend hands to the driver, checked without a GPU: a stand-in for the driver runs the launches."""

import ctypes
import types
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.ops import loop
from elman.ops.cells import CELLS
from elman.ops.cuda import compiler
from elman.ops.cuda.compiler import CompilerUnavailableError
from tests.ops.problems import Problem, draw

cuda_core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")

Launch = Callable[..., tuple[int]]


def array(address: int, *shape: int, dtype: type = np.float64) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def strided(address: int, batch: int, stride: int, hidden: int) -> np.ndarray:
    flat = array(address, (batch - 1) * stride + hidden)
    return np.lib.stride_tricks.as_strided(flat, (batch, hidden), (8 * stride, 8))


def run_like_the_kernels(names: dict[int, str]) -> Launch:
    """cuLaunchKernel for tanh in float64 on the CPU's memory: steps.cuh in NumPy."""

    def launch(function: object, x: int, y: int, z: int, threads: int, *rest: object) -> tuple[int]:
        name = names[int(function)]
        count = 8 if "forward" in name else 7
        table, extra = rest[-2:]
        arguments = [int(array(int(at), 1, dtype=np.int64)[0]) for at in array(table, count, dtype=np.int64)]
        first, stride, product, reset_next, *outputs, hidden = arguments
        width = int(name.removesuffix(">").split(", ")[-1])
        assert (z, rest[:4], extra) == (1, (1, 1, 0, 0), 0)
        assert y * threads * width >= hidden > (y - 1) * threads * width
        assert threads % 32 == 0
        assert threads <= loop._THREADS
        assert all(at % (8 * width) == 0 for at in (first, product, *outputs))
        total = strided(first, x, stride, hidden) if first else np.zeros((x, hidden))
        reset = array(reset_next, x, dtype=np.bool_) if reset_next else np.zeros(x, np.bool_)
        if "forward" in name:
            v, h, carry = outputs
            total = total + (array(product, x, hidden) if product else 0)
            if v:
                array(v, x, hidden)[:] = total
            array(h, x, hidden)[:] = np.tanh(total)
            if carry:
                array(carry, x, hidden)[:] = np.where(reset[:, None], 0, np.tanh(total))
        else:
            v, dpre = outputs
            if product:
                total = total + np.where(reset[:, None], 0, array(product, x, hidden))
            array(dpre, x, hidden)[:] = total / np.cosh(array(v, x, hidden)) ** 2
        return (0,)

    return launch


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loop.step_module("tanh", torch.float64)
    names = dict(enumerate(module.kernels, 1))
    found = {name: types.SimpleNamespace(handle=number) for number, name in names.items()}
    monkeypatch.setattr(loop, "kernels", lambda module, capability: found)
    monkeypatch.setattr(loop, "_steps", loop._KernelSteps)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda_core, "Device", lambda index: types.SimpleNamespace(set_current=lambda: None))
    monkeypatch.setattr(driver, "cuLaunchKernel", run_like_the_kernels(names))


def both_passes(p: Problem) -> list[Tensor | None]:
    h, v = loop.forward(p.pre, p.weight, p.h0, p.reset, CELLS["tanh"], save=True)
    unsaved, _ = loop.forward(p.pre, p.weight, p.h0, p.reset, CELLS["tanh"], save=False)
    assert torch.equal(h, unsaved)
    return [h, v, *loop.backward(p.dh, p.dh_last, v, p.weight, p.reset, CELLS["tanh"], p.h0 is not None)]


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


@pytest.mark.parametrize("name", PROBLEMS)
def test_launches_compute_the_recurrence(simulated_gpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    p = PROBLEMS[name]
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
    assert len(modules) == len(set(modules)) == len(CELLS) * 4
    assert all(isinstance(module, compiler.Module) and len(module.kernels) == 4 for module in modules)
