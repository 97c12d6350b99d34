"""The cells of the CUDA source against their twins in Python, value by value, on a machine without a GPU.

cells.cuh is C++ but for a few names, so a host compiler builds it too. What the hardware's fast arithmetic errs is not
seen here: exp and log are the host's.
"""

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.ops.cells import FUSED_CELLS
from elman.ops.log_space import number

N = 5000
MATHS = {"Precise<double>": torch.float64, "Precise<float>": torch.float32, "Fast": torch.float32}
SOURCE = """
#include <cmath>
using namespace std;
#define __device__
#define __forceinline__ inline
#define __expf expf
#define __logf logf
#define __fdividef(x, y) ((x) / (y))
#include "cells.cuh"

template <class Cell, class Math>
void step(long n, const double* pre, const double* rec, const double* memory, const double* dh, const double* dmemory,
          double* h, double* after, double* dpre, double* drec, double* before) {
  using Real = typename Math::Real;
  for (long i = 0; i < n; ++i) {
    Real given[Cell::kGates], products[Cell::kProducts], saved[Cell::kSaved], slope[Cell::kSlopes];
    Real of_pre[Cell::kGates], of_rec[Cell::kProducts], state = memory[i], gradient = dmemory[i];
    for (int j = 0; j < Cell::kGates; ++j) given[j] = pre[i * Cell::kGates + j];
    for (int j = 0; j < Cell::kProducts; ++j) products[j] = rec[i * Cell::kProducts + j];
    h[i] = Cell::template forward<Math>(given, products, state, saved);
    after[i] = state;
    Cell::template slopes<Math>(saved, Real(memory[i]), slope);
    Cell::backward(slope, Real(dh[i]), gradient, of_pre, of_rec);
    for (int j = 0; j < Cell::kGates; ++j) dpre[i * Cell::kGates + j] = of_pre[j];
    for (int j = 0; j < Cell::kProducts; ++j) drec[i * Cell::kProducts + j] = of_rec[j];
    before[i] = gradient;
  }
}
"""
ARGUMENTS = ("pre", "rec", "memory", "dh", "dmemory", "h", "after", "dpre", "drec", "before")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("functors")
    pointers = ", ".join(f"{'const ' * (i < 5)}double* {name}" for i, name in enumerate(ARGUMENTS))
    exports = [
        f'extern "C" void {cell.functor}_{index}(long n, {pointers}) '
        f"{{ step<{cell.functor}, {math}>(n, {', '.join(ARGUMENTS)}); }}"
        for cell in FUSED_CELLS.values()
        for index, math in enumerate(MATHS)
    ]
    (folder / "functors.cpp").write_text(SOURCE + "\n".join(exports))
    include = Path(str(resources.files("elman.ops.cuda")))
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-w",
        f"-I{include}",
        "functors.cpp",
        "-o",
        "functors.so",
    ]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "functors.so"))


def run(library: ctypes.CDLL, cell: str, math: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    rule = FUSED_CELLS[cell]
    n = len(given["dh"])
    shapes = {"h": (n,), "after": (n,), "dpre": (n, rule.gates), "drec": (n, rule.products), "before": (n,)}
    made = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    arrays = [*(np.ascontiguousarray(given[name].double().numpy()) for name in ARGUMENTS[:5]), *made.values()]
    pointers = [x.ctypes.data_as(ctypes.POINTER(ctypes.c_double)) for x in arrays]
    getattr(library, f"{rule.functor}_{list(MATHS).index(math)}")(ctypes.c_long(n), *pointers)
    return {name: torch.from_numpy(x) for name, x in made.items()}


def draw(cell: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sizes from a thousandth to a dozen, exact zeros among them."""
    rule, generator = FUSED_CELLS[cell], torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        sizes = torch.tensor([1e-3, 0.3, 1.0, 4.0])[torch.randint(4, shape, generator=generator)]
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * sizes).to(dtype)

    given = {"pre": normal(N, rule.gates), "rec": normal(N, rule.products), "memory": normal(N)}
    given |= {"dh": normal(N), "dmemory": normal(N) if rule.reads_memory else torch.zeros(N, dtype=dtype)}
    if not rule.logarithmic:
        given["memory"] = given["memory"].tanh()
    given["memory"][::7] = 0
    given["pre"][::11, 0] = given["rec"][::11, 0] = 0
    return given


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_a_functor_is_its_twin(library: ctypes.CDLL, cell: str, math: str) -> None:
    rule, dtype = FUSED_CELLS[cell], MATHS[math]
    given = draw(cell, dtype)
    ours = run(library, cell, math, given)
    x = {name: value.double() for name, value in given.items()}
    states, saved = rule.forward(x["pre"].unbind(1), x["rec"].unbind(1), x["memory"])
    assert rule.backward is not None
    dpre, drec, before = rule.backward(saved, x["memory"], x["dh"], x["dmemory"])
    expected = {"h": states[0], "dpre": torch.stack(dpre, 1), "drec": torch.stack(drec, 1)}
    if rule.reads_memory:
        expected |= {"before": before, "after": states[-1]}
    if rule.logarithmic:
        for values in (ours, expected):
            values["after"] = number(values["after"])
    for name, value in expected.items():
        error = (ours[name] - value).abs() / (1 + value.abs())
        assert error.max() <= (1e-10 if dtype == torch.float64 else 2e-5), name


@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_a_nan_comes_out(library: ctypes.CDLL, cell: str) -> None:
    """Of any input, a memory of zero beside it."""
    rule = FUSED_CELLS[cell]
    for math, dtype in MATHS.items():
        rows = rule.gates + rule.reads_memory
        given = {"pre": torch.full((rows, rule.gates), 0.25), "rec": torch.full((rows, rule.products), 0.25)}
        given |= {name: torch.zeros(rows) for name in ("memory", "dh", "dmemory")}
        given = {name: x.to(dtype) for name, x in given.items()}
        given["pre"].diagonal()[:] = torch.nan
        if rule.reads_memory:
            given["memory"][-1] = torch.nan
        assert run(library, cell, math, given)["h"].isnan().all()
