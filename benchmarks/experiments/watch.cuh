#pragma once
#ifdef ELMAN_TRACE
extern "C" __device__ long long elman_trace[4 * 8 * 4 * 32];
__device__ long long elman_trace[4 * 8 * 4 * 32];
// role 0,1 products, 2 loader, 3 cells
__device__ __forceinline__ void mark(int role, int step, int tile, int event) {
  if (blockIdx.x == 0 && step >= 100 && step < 108 && (threadIdx.x & 31) == 0)
    elman_trace[((role * 8 + step - 100) * 4 + tile) * 32 + event] = clock64();
}
#else
__device__ __forceinline__ void mark(int, int, int, int) {}
#endif
