"""The kernels of the gated softmax as written, run by a host's threads: their tiles, copies and lanes, with no GPU.

A warp is 32 threads that meet at barriers. Copies that are asynchronous happen when they are waited for and not before,
and shared memory starts full of NaN. What the hardware's fast arithmetic errs is not seen here.
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

from elman.ops import gated_softmax as op
from tests.ops.test_gated_softmax import SIZES, definition

SOURCE = """
#include <pthread.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
using namespace std;
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Index { int x; };
thread_local Index threadIdx;
Index blockIdx, blockDim;
float exchanged[8][32];
pthread_barrier_t meeting[8];
void __syncwarp() { pthread_barrier_wait(&meeting[threadIdx.x / 32]); }
float __shfl_xor_sync(unsigned, float x, int with) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  exchanged[warp][lane] = x;
  __syncwarp();
  const float y = exchanged[warp][lane ^ with];
  __syncwarp();
  return y;
}
unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
float __int_as_float(int x) { return __uint_as_float(x); }
size_t __cvta_generic_to_shared(const void* x) { return (size_t)x; }
// What is PTX in primitives.cuh.
#define shared_address ptx_shared_address
#define copy_async16 ptx_copy_async16
#define commit_copies ptx_commit_copies
#define wait_copies ptx_wait_copies
#include "numbers.cuh"
#undef shared_address
#undef copy_async16
#undef commit_copies
#undef wait_copies
struct Copy { void* to; const void* from; };
thread_local vector<vector<Copy>> copies(1);
uintptr_t shared_address(const void* pointer) { return (uintptr_t)pointer; }
void copy_async16(uintptr_t to, const void* from) { copies.back().push_back({(void*)to, from}); }
void commit_copies() { copies.emplace_back(); }
template <int kPending>
void wait_copies() {
  for (; copies.size() > kPending + 1; copies.erase(copies.begin()))
    for (const Copy& copy : copies.front()) memcpy(copy.to, copy.from, 16);
}
namespace gated_softmax { alignas(16) Words4 memory[48 * 1024 / 16]; }
#include "gated_softmax.cuh"

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int blocks, int warps, Arguments... arguments) {
  blockDim.x = 32 * warps;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    memset(gated_softmax::memory, 0xff, sizeof gated_softmax::memory);
    for (int warp = 0; warp < warps; ++warp) pthread_barrier_init(&meeting[warp], nullptr, 32);
    vector<thread> threads;
    for (int i = 0; i < blockDim.x; ++i)
      threads.emplace_back([=] { threadIdx.x = i; kernel(arguments...); });
    for (thread& each : threads) each.join();
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("kernels")
    exports = []
    for number, dtype in (("float", torch.float32), ("bf16", torch.bfloat16)):
        plans = {op._plan(size, dtype.itemsize, 3) for size in SIZES}
        for lanes, values in sorted({(plan.lanes, plan.values) for plan in plans if plan is not None}):
            for direction, tensors in (("forward", 3), ("backward", 5)):
                pointers = [f"{number}* p{i}" for i in range(tensors)]
                names = ", ".join(f"p{i}" for i in range(tensors))
                exports.append(
                    f'extern "C" void {direction}_{number}_{lanes}_{values}(int blocks, int warps, '
                    f"{', '.join(pointers)}, long long groups, "
                    f"int size, int tile, int pitch, int inverse, int turns) {{\n"
                    f"  launch(gated_softmax_{direction}<{number}, {lanes}, {values}>, blocks, warps, {names}, "
                    f"groups, size, tile, pitch, inverse, turns);\n}}"
                )
    (folder / "kernels.cpp").write_text(SOURCE + "\n".join(exports))
    include = Path(str(resources.files("elman.ops.cuda")))
    command = [compiler, *["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-pthread"], f"-I{include}", "kernels.cpp"]
    subprocess.run([*command, "-o", "kernels.so"], check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(
    library: ctypes.CDLL, direction: str, inputs: list[Tensor], outputs: int, size: int, turns: int
) -> list[Tensor]:
    """On two warps a block, whatever the plan has: enough to see that they do not mix."""
    like = inputs[0]
    plan = op._plan(size, like.itemsize, len(inputs))
    assert plan is not None
    warps = min(plan.warps, 2)
    groups = like.numel() // size
    blocks = -(-groups // (plan.tile * turns * warps))
    number = "float" if like.dtype == torch.float32 else "bf16"

    def aligned(x: Tensor) -> Tensor:
        place = torch.zeros(x.numel() * x.itemsize + 16, dtype=torch.uint8)
        begin = -place.data_ptr() % 16
        return place[begin : begin + x.numel() * x.itemsize].view(x.dtype).view(x.shape).copy_(x)

    given = [aligned(x) for x in inputs]
    made = [aligned(torch.full_like(like, torch.nan)) for _ in range(outputs)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*given, *made)]
    kernel = getattr(library, f"{direction}_{number}_{plan.lanes}_{plan.values}")
    kernel(
        *(blocks, warps, *pointers, ctypes.c_longlong(groups)),
        *(size, plan.tile, plan.pitch, plan.inverse, turns),
    )
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_compute_the_definition(library: ctypes.CDLL, size: int, dtype: torch.dtype) -> None:
    """Of more tiles than warps, the last one not whole."""
    plan = op._plan(size, dtype.itemsize, 3)
    if plan is None:
        pytest.skip("plain PyTorch runs these")
    generator = torch.Generator().manual_seed(0)
    groups = 7 * plan.tile + max(1, plan.tile // 3)
    x, s, dy = (2 * torch.randn(groups, size, generator=generator).to(dtype) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (x, s)]
    y = definition(*exact, 1)
    expected = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    ours = run(library, "forward", [x, s], 1, size, 2) + run(library, "backward", [x, s, dy], 2, size, 2)
    for name, a, b in zip(("y", "dx", "ds"), ours, expected, strict=True):
        np.testing.assert_allclose(
            a.double().numpy(), b.numpy(), rtol=1.01 * torch.finfo(dtype).eps / 2 + 1e-5, atol=3e-6, err_msg=name
        )
