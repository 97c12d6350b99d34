// Data as its own flag: consumers poll the exchanged words themselves until no sentinel is left in them.
// Each warp of a CTA polls its own share; one CTA barrier a step; an extra warp clears used slots.
// Build: nvcc -O3 -gencode=arch=compute_90a,code=sm_90a poll_probe.cu -o poll_probe
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <vector>
#include <algorithm>
typedef unsigned int u32;
#define DEV __device__ __forceinline__
enum { RELAXED, WEAK_CG, VOLATILE, CPASYNC, RAW_RELAXED, RAW_WEAK_CG, RAW_CPASYNC, RELAXED_B128 };
DEV u32 s2u(const void* p) { return (u32)__cvta_generic_to_shared(p); }
template <int M> DEV uint4 ld4(const void* p) {
  uint4 v;
  if (M == RELAXED || M == RAW_RELAXED) asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  else if (M == VOLATILE) asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  else if (M == RELAXED_B128) asm volatile("{.reg .b128 q; .reg .b64 a,b; ld.relaxed.gpu.global.b128 q,[%4]; mov.b128 {a,b},q; mov.b64 {%0,%1},a; mov.b64 {%2,%3},b;}" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  else asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEV uint4 lds4(u32 p) { uint4 v; asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p) : "memory"); return v; }
DEV void st4(void* p, uint4 v) { asm volatile("st.relaxed.gpu.global.v4.u32 [%0],{%1,%2,%3,%4};" :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
DEV void cpa(u32 d, const void* s) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(d), "l"(s) : "memory"); }
DEV bool stale(uint4 v) { return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u; }
extern __shared__ __align__(1024) char smem[];
struct P { char* x; u32* bad; int Pm, Pn, Bt, T, NW; };
template <int M> __global__ void __launch_bounds__(544, 1) probe(P p) {
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = blockIdx.x / p.Pn, j = blockIdx.x % p.Pn;
  const int slice = p.Bt * 128, units = p.Bt * 8, total = units * p.Pn;
  const size_t slot = (size_t)p.Pm * p.Pn * slice;
  char* xg = p.x + (size_t)g * p.Pn * slice;
  const u32 sb = s2u(smem);
  constexpr bool RAW = M == RAW_RELAXED || M == RAW_WEAK_CG || M == RAW_CPASYNC;
  u32 wrong = 0;
  if (!RAW) for (int i = tid; i < units; i += blockDim.x) st4(xg + slot + (size_t)j * slice + i * 16, make_uint4(1, j, i, 0));
  for (int t = 1; t <= p.T; ++t) {
    const char* src = xg + (size_t)(t & 3) * slot;
    if (w < p.NW) {
      if (M == CPASYNC || M == RAW_CPASYNC) {
        for (int i = w * 32 + lane; i < total; i += p.NW * 32) cpa(sb + i * 16, src + (size_t)i * 16);
        asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
        for (int i = w * 32 + lane; i < total; i += p.NW * 32) {
          uint4 v = lds4(sb + i * 16);
          if (!RAW) {
            for (int it = 0; stale(v); ++it) { cpa(sb + i * 16, src + (size_t)i * 16); asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory"); v = lds4(sb + i * 16); if (it > (1 << 20)) __trap(); }
            if (v.x != (u32)t || v.y != (u32)(i / units) || v.z != (u32)(i % units)) ++wrong;
          } else wrong += v.x;
        }
      } else {
        constexpr int U = 8;
        for (int i0 = w * 32 + lane; i0 < total; i0 += p.NW * 32 * U) {
          uint4 v[U];
          #pragma unroll
          for (int u = 0; u < U; ++u) { int i = i0 + u * p.NW * 32; if (i < total) v[u] = ld4<M>(src + (size_t)i * 16); }
          #pragma unroll
          for (int u = 0; u < U; ++u) {
            int i = i0 + u * p.NW * 32;
            if (i < total) {
              if (!RAW) {
                for (int it = 0; stale(v[u]); ++it) { v[u] = ld4<M>(src + (size_t)i * 16); if (it > (1 << 20)) __trap(); }
                if (v[u].x != (u32)t || v[u].y != (u32)(i / units) || v[u].z != (u32)(i % units)) ++wrong;
              } else wrong += v[u].x;
            }
          }
        }
      }
    } else if (!RAW && t > 2) {
      char* old = xg + (size_t)((t + 2) & 3) * slot + (size_t)j * slice;
      for (int i = lane; i < units; i += 32) st4(old + i * 16, make_uint4(~0u, ~0u, ~0u, ~0u));
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncthreads();
    if (!RAW) { char* mine = xg + (size_t)((t + 1) & 3) * slot + (size_t)j * slice;
      for (int i = tid; i < units; i += p.NW * 32) if (w < p.NW) st4(mine + i * 16, make_uint4(t + 1, j, i, 0)); }
  }
  if (wrong && (!RAW || wrong == 12345)) atomicAdd(p.bad, wrong);
}
template <int M> void go(const char* name, int Pm, int Pn, int Bt, int NW) {
  P p{nullptr, nullptr, Pm, Pn, Bt, 2000, NW};
  size_t slot = (size_t)Pm * Pn * Bt * 128;
  cudaMalloc(&p.x, slot * 4); cudaMalloc(&p.bad, 4); cudaMemset(p.bad, 0, 4);
  int sm = 8 * 1024 + Pn * Bt * 128;
  cudaFuncSetAttribute(probe<M>, cudaFuncAttributeMaxDynamicSharedMemorySize, sm);
  cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1);
  std::vector<float> ms;
  for (int r = 0; r < 4; ++r) {
    cudaMemset(p.x, 0xff, slot * 4);
    void* a[] = {&p};
    cudaEventRecord(e0); cudaLaunchCooperativeKernel((void*)probe<M>, dim3(Pm * Pn), dim3(NW * 32 + 32), a, sm, 0); cudaEventRecord(e1);
    cudaError_t e = cudaDeviceSynchronize(); if (e == cudaSuccess) e = cudaGetLastError();
    if (e != cudaSuccess) { printf("%-14s %3dx%2d Bt %3d: %s\n", name, Pm, Pn, Bt, cudaGetErrorString(e)); fflush(stdout); exit(1); }
    float x; cudaEventElapsedTime(&x, e0, e1); if (r) ms.push_back(x);
  }
  std::sort(ms.begin(), ms.end());
  u32 bad; cudaMemcpy(&bad, p.bad, 4, cudaMemcpyDeviceToHost);
  printf("%-14s %3dx%2d Bt %3d NW %2d ingest %6.1f KB: %6.3f us/step wrong %u\n", name, Pm, Pn, Bt, NW, Pn * Bt / 8.0, ms[1] * 1e3 / p.T, bad); fflush(stdout);
  cudaFree(p.x); cudaFree(p.bad);
}
int main(int argc, char** argv) {
  int which = atoi(argv[1]);
  struct S { int Pm, Pn, Bt; } s[] = {{8, 2, 8}, {8, 8, 8}, {8, 16, 8}, {8, 16, 16}, {3, 28, 16}, {6, 20, 24}, {6, 20, 48}, {8, 16, 40}, {4, 32, 52}};
  for (auto& q : s) for (int NW : {8, 16}) {
    if (which == 0) go<RELAXED>("relaxed", q.Pm, q.Pn, q.Bt, NW);
    if (which == 1) go<WEAK_CG>("weak.cg", q.Pm, q.Pn, q.Bt, NW);
    if (which == 2) go<VOLATILE>("volatile", q.Pm, q.Pn, q.Bt, NW);
    if (which == 3) go<CPASYNC>("cp.async", q.Pm, q.Pn, q.Bt, NW);
    if (which == 4) { go<RAW_RELAXED>("raw relaxed", q.Pm, q.Pn, q.Bt, NW); go<RAW_WEAK_CG>("raw weak.cg", q.Pm, q.Pn, q.Bt, NW); go<RAW_CPASYNC>("raw cp.async", q.Pm, q.Pn, q.Bt, NW); }
    if (which == 5) go<RELAXED_B128>("relaxed.b128", q.Pm, q.Pn, q.Bt, NW);
  }
}
