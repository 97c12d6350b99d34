"""Kernels as written, built for the host by its C++ compiler: what they compute, on a machine without a GPU.

What is PTX has stand-ins here; what the hardware's fast arithmetic errs is not seen.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elman.ops.cuda.compiler import flatten

_PRELUDE = """
#include <pthread.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
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
// A warp is 32 threads that meet at a barrier.
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
unsigned rounded(float x) {
  const unsigned bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
// An asynchronous copy happens when it is waited for, and not before.
struct Copy { void* to; const void* from; };
thread_local vector<vector<Copy>> copies(1);
uintptr_t host_shared_address(const void* pointer) { return (uintptr_t)pointer; }
void host_copy_async16(uintptr_t to, const void* from) { copies.back().push_back({(void*)to, from}); }
void host_commit_copies() { copies.emplace_back(); }
template <int kPending>
void host_wait_copies() {
  for (; copies.size() > kPending + 1; copies.erase(copies.begin()))
    for (const Copy& copy : copies.front()) memcpy(copy.to, copy.from, 16);
}
"""

_LAUNCH = """
template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), const long long* arguments, index_sequence<I...>) {
  kernel((Parameters)arguments[I]...);
}

// Threads of a block one after another, or, where they wait for each other, at once.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), int blocks, int threads, bool at_once, const long long* arguments) {
  const auto indices = make_index_sequence<sizeof...(Parameters)>();
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    prepare_block();
    if (!at_once) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call(kernel, arguments, indices);
      continue;
    }
    for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&meeting[warp], nullptr, 32);
    vector<thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([=] { threadIdx.x = i; call(kernel, arguments, indices); });
    for (thread& each : running) each.join();
  }
}
"""


class HostKernels:
    """Kernels of one source by name; ``shared`` is the C++ name of its dynamic shared memory, if it uses any."""

    def __init__(self, folder: Path, source: str, names: Sequence[str], shared: str | None = None) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("no g++")
        text = flatten(source)
        conversion = 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));'
        assert text.count(conversion) == 1
        text = text.replace(conversion, "word = rounded(lo) | rounded(hi) << 16;")
        first_use = text.index("template <class T>\nstruct Arithmetic")  # behind primitives.cuh
        kernels = text[first_use:]
        for name in ("shared_address", "copy_async16", "commit_copies", "wait_copies"):
            kernels = kernels.replace(f"{name}(", f"host_{name}(").replace(f"{name}<", f"host_{name}<")
        memory, prepare = "", ""
        if shared is not None:
            space, name = shared.split("::")
            memory = f"namespace {space} {{ alignas(16) Words4 {name}[48 * 1024 / 16]; }}\n"
            prepare = f"memset({shared}, 0xff, sizeof {shared});"
        exports = [
            f'extern "C" void kernel_{index}(int blocks, int threads, bool at_once, const long long* arguments) '
            f"{{ launch({name}, blocks, threads, at_once, arguments); }}"
            for index, name in enumerate(names)
        ]
        parts = [_PRELUDE, text[:first_use], memory, kernels, f"void prepare_block() {{ {prepare} }}", _LAUNCH]
        (folder / "kernels.cpp").write_text("\n".join([*parts, *exports]))
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-pthread", "kernels.cpp"]
        subprocess.run([*command, "-o", "kernels.so"], check=True, cwd=folder)
        self._library, self._names, self._at_once = ctypes.CDLL(str(folder / "kernels.so")), list(names), shared

    def launch(self, name: str, blocks: int, threads: int, arguments: Sequence[Tensor | int | None]) -> None:
        """Of tensors the kernel is given the addresses, as on a GPU."""
        values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
        kernel = getattr(self._library, f"kernel_{self._names.index(name)}")
        kernel(blocks, threads, self._at_once is not None, (ctypes.c_longlong * len(values))(*values))


def aligned(x: Tensor) -> Tensor:
    """A copy that begins at a multiple of 16 bytes."""
    size = x.numel() * x.itemsize
    place = torch.zeros(size + 16, dtype=torch.uint8)
    begin = -place.data_ptr() % 16
    return place[begin : begin + size].view(x.dtype).view(x.shape).copy_(x)
