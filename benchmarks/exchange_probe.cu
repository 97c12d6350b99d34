// What one step's exchange of h costs, mechanism by mechanism: groups of Pn CTAs, each writing a slice of
// Bt x 128 bytes and reading all Pn slices of its group back into shared memory, T times, with no arithmetic.
// Build: nvcc -O3 -gencode=arch=compute_90a,code=sm_90a exchange_probe.cu -o exchange_probe -lcuda
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <vector>
#include <algorithm>
typedef unsigned int u32; typedef unsigned long long u64;
#define DEV __device__ __forceinline__
DEV u32 s2u(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV u32 ld_acq(const u32* p) { u32 v; asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV u32 ld_rlx(const u32* p) { u32 v; asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV void st_rlx(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" :: "l"(p), "r"(v) : "memory"); }
DEV void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEV void red_rel(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0],1;" :: "l"(p) : "memory"); }
DEV void pfence() { asm volatile("fence.proxy.async;" ::: "memory"); }
DEV void mb_init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" :: "r"(b), "r"(n) : "memory"); }
DEV void mb_expect(u32 b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" :: "r"(b), "r"(n) : "memory"); }
DEV bool mb_try(u32 b, u32 ph) { u32 ok; asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}" : "=r"(ok) : "r"(b), "r"(ph) : "memory"); return ok; }
DEV void mb_wait(u32 b, u32 ph) { for (int i = 0; !mb_try(b, ph); ++i) if (i > (1 << 20)) __trap(); }
DEV void bulk(u32 d, const void* s, u32 n, u32 b) { asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" :: "r"(d), "l"(s), "r"(n), "r"(b) : "memory"); }
DEV void bulk_mc(u32 d, const void* s, u32 n, u32 b, uint16_t m) { asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1],%2,[%3],%4;" :: "r"(d), "l"(s), "r"(n), "r"(b), "h"(m) : "memory"); }
DEV void cluster_sync() { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
DEV uint4 ld4(const void* p) { uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
DEV void st4(void* p, uint4 v) { asm volatile("st.relaxed.gpu.global.v4.u32 [%0],{%1,%2,%3,%4};" :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
DEV void sts4(u32 a, uint4 v) { asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" :: "r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
DEV u32 lds(u32 a) { u32 v; asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(a) : "memory"); return v; }
DEV u32 mapa(u32 a, u32 r) { u32 o; asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(o) : "r"(a), "r"(r)); return o; }
DEV void st_async4(u32 a, uint4 v, u32 b) { asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0],{%1,%2,%3,%4},[%5];" :: "r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(b) : "memory"); }

struct P { char* x; u32* flags; u32* bad; int Pm, Pn, Bt, T, C; };
extern __shared__ __align__(1024) char smem[];
__shared__ __align__(8) u64 mbar[2];

enum { BULK, BULK_WREL, CPASYNC, LL, MULTICAST, DSMEM, RAW_BULK, RAW_CPASYNC, RAW_MULTICAST, RAW_LD };
template <int MODE> __global__ void __launch_bounds__(512, 1) probe(P p) {
  const int tid = threadIdx.x, nt = blockDim.x, g = blockIdx.x / p.Pn, j = blockIdx.x % p.Pn;
  const int slice = p.Bt * 128, units = p.Bt * 8;
  const size_t slot_bytes = (size_t)p.Pm * p.Pn * slice;
  char* xg = p.x + (size_t)g * p.Pn * slice;
  u32* fl = p.flags + g * 64;
  const u32 sb = s2u(smem), b0 = s2u(mbar);
  u32 rank = 0; if (p.C > 1) asm("mov.u32 %0,%%cluster_ctarank;" : "=r"(rank));
  if (tid == 0) { mb_init(b0, 1); mb_init(b0 + 8, 1); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); pfence(); }
  __syncthreads();
  if (p.C > 1) cluster_sync();
  const u32 warps_writing = (min(units, nt) + 31) / 32;
  u32 wrong = 0;
  if (MODE == DSMEM && tid == 0) { mb_expect(b0, p.Pn * slice); mb_expect(b0 + 8, p.Pn * slice); }
  if (MODE == DSMEM) cluster_sync();
  for (int t = 1; t <= p.T; ++t) {
    if (MODE < RAW_BULK && MODE != DSMEM) {
      char* mine = xg + (size_t)(t & 3) * slot_bytes + (size_t)j * slice;
      if (MODE == LL && t > 2) {
        char* old = xg + (size_t)((t + 2) & 3) * slot_bytes + (size_t)j * slice;
        uint4 ones = {~0u, ~0u, ~0u, ~0u};
        for (int i = tid; i < units; i += nt) st4(old + i * 16, ones);
      }
      for (int i = tid; i < units; i += nt) st4(mine + i * 16, make_uint4(t, j, i, 0));
      if (MODE == LL) { if (tid < units) fence(); }
      else if (MODE == BULK_WREL) { __syncwarp(); if ((tid & 31) == 0 && tid < units) red_rel(fl + j); }
      else { __syncthreads(); if (tid == 0) { fence(); st_rlx(fl + j, t); } }
    }
    const char* src = xg + (size_t)(t & 3) * slot_bytes;
    const u32 ph = (t - 1) & 1;
    if (MODE == BULK || MODE == BULK_WREL || MODE == MULTICAST) {
      if (tid < 32) {
        if (tid == 0) mb_expect(b0, p.Pn * slice);
        __syncwarp();
        u32 goal = MODE == BULK_WREL ? t * warps_writing : t;
        if (MODE == MULTICAST) {
          bool sent = tid >= p.Pn || tid % p.C != (int)rank; u32 base = j - rank;
          for (int it = 0;; ++it) {
            u32 f = tid < p.Pn ? ld_rlx(fl + tid) : goal;
            bool ok = f >= goal;
            u32 m = __ballot_sync(~0u, ok);
            bool peers = ((m >> base) & ((1u << p.C) - 1)) == ((1u << p.C) - 1);
            if (!sent && ok && peers) { fence(); pfence(); bulk_mc(sb + tid * slice, src + (size_t)tid * slice, slice, b0, (uint16_t)((1 << p.C) - 1)); sent = true; }
            if (__all_sync(~0u, sent)) break;
            if (it > (1 << 20)) __trap();
          }
        } else if (tid < p.Pn) {
          for (int it = 0; ld_acq(fl + tid) < goal; ++it) if (it > (1 << 20)) __trap();
          pfence();
          bulk(sb + tid * slice, src + (size_t)tid * slice, slice, b0);
        }
      }
      mb_wait(b0, ph);
    }
    if (MODE == RAW_BULK || MODE == RAW_MULTICAST) {
      if (tid == 0) mb_expect(b0, p.Pn * slice);
      if (MODE == RAW_MULTICAST) cluster_sync(); else __syncthreads();
      if (tid < p.Pn) {
        if (MODE == RAW_BULK) bulk(sb + tid * slice, src + (size_t)tid * slice, slice, b0);
        else if (tid % p.C == (int)rank) bulk_mc(sb + tid * slice, src + (size_t)tid * slice, slice, b0, (uint16_t)((1 << p.C) - 1));
      }
      mb_wait(b0, ph);
    }
    if (MODE == CPASYNC || MODE == RAW_CPASYNC) {
      if (MODE == CPASYNC) {
        if (tid < 32 && tid < p.Pn) for (int it = 0; ld_acq(fl + tid) < (u32)t; ++it) if (it > (1 << 20)) __trap();
        __syncthreads();
      }
      for (int i = tid; i < units * p.Pn; i += nt) asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(sb + i * 16), "l"(src + (size_t)i * 16) : "memory");
      asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
    }
    if (MODE == LL || MODE == RAW_LD) {
      constexpr int U = 8;
      for (int i0 = tid; i0 < units * p.Pn; i0 += nt * U) {
        uint4 v[U];
        #pragma unroll
        for (int u = 0; u < U; ++u) { int i = i0 + u * nt; if (i < units * p.Pn) v[u] = ld4(src + (size_t)i * 16); }
        #pragma unroll
        for (int u = 0; u < U; ++u) {
          int i = i0 + u * nt;
          if (i < units * p.Pn) {
            if (MODE == LL) for (int it = 0; v[u].x == ~0u || v[u].y == ~0u || v[u].z == ~0u || v[u].w == ~0u; ++it) { v[u] = ld4(src + (size_t)i * 16); if (it > (1 << 20)) __trap(); }
            sts4(sb + i * 16, v[u]);
          }
        }
      }
    }
    if (MODE == DSMEM) {
      const u32 buf = sb + (t & 1) * p.Pn * slice, b = b0 + 8 * (t & 1);
      for (int k = tid; k < units * p.Pn; k += nt) {
        int peer = k / units, i = k % units;
        st_async4(mapa(buf + j * slice + i * 16, peer), make_uint4(t, j, i, 0), mapa(b, peer));
      }
      mb_wait(b, ((t - 1) >> 1) & 1);
      __syncthreads();
      if (tid == 0) mb_expect(b, p.Pn * slice);
      if (lds(buf + (tid % p.Pn) * slice) != (u32)t) ++wrong;
    } else {
      if (MODE != BULK && MODE != BULK_WREL && MODE != MULTICAST) __syncthreads();
      if (MODE < RAW_BULK) {
        int c = tid % p.Pn, i = tid % units;
        u32 a = sb + c * slice + i * 16;
        if (lds(a) != (u32)t || lds(a + 4) != (u32)c || lds(a + 8) != (u32)i) ++wrong;
      }
      __syncthreads();
    }
  }
  if (wrong) atomicAdd(p.bad, wrong);
  if (p.C > 1) cluster_sync();
}

template <int MODE> void go(const char* name, int Pm, int Pn, int Bt, int nt, int C = 1) {
  P p{nullptr, nullptr, nullptr, Pm, Pn, Bt, 2000, C};
  size_t slot = (size_t)Pm * Pn * Bt * 128;
  cudaMalloc(&p.x, slot * 4); cudaMalloc(&p.flags, 64 * 4 * 64); cudaMalloc(&p.bad, 4); cudaMemset(p.bad, 0, 4);
  int sm = Pn * Bt * 128 * (MODE == DSMEM ? 2 : 1);
  if (sm > 227 * 1024) { printf("%-14s %3dx%2d Bt %3d: does not fit\n", name, Pm, Pn, Bt); return; }
  cudaFuncSetAttribute(probe<MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, sm);
  if (C > 8) cudaFuncSetAttribute(probe<MODE>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t cfg = {}; cfg.gridDim = Pm * Pn; cfg.blockDim = nt; cfg.dynamicSmemBytes = sm;
  cudaLaunchAttribute at[2]; int na = 0;
  if (C > 1) { at[na].id = cudaLaunchAttributeClusterDimension; at[na].val.clusterDim.x = C; at[na].val.clusterDim.y = at[na].val.clusterDim.z = 1; ++na; }
  at[na].id = cudaLaunchAttributeCooperative; at[na].val.cooperative = 1; ++na;
  cfg.attrs = at; cfg.numAttrs = na;
  cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1);
  std::vector<float> ms;
  for (int r = 0; r < 4; ++r) {
    cudaMemset(p.x, 0xff, slot * 4); cudaMemset(p.flags, 0, 64 * 4 * 64);
    cudaEventRecord(e0); cudaLaunchKernelEx(&cfg, probe<MODE>, p); cudaEventRecord(e1);
    cudaError_t e = cudaDeviceSynchronize(); if (e == cudaSuccess) e = cudaGetLastError();
    if (e != cudaSuccess) { printf("%-14s %3dx%2d Bt %3d C %d: %s\n", name, Pm, Pn, Bt, C, cudaGetErrorString(e)); fflush(stdout); if (e == cudaErrorCooperativeLaunchTooLarge || e == cudaErrorInvalidClusterSize) return; exit(1); }
    float x; cudaEventElapsedTime(&x, e0, e1); if (r) ms.push_back(x);
  }
  std::sort(ms.begin(), ms.end());
  u32 bad; cudaMemcpy(&bad, p.bad, 4, cudaMemcpyDeviceToHost);
  printf("%-14s %3dx%2d Bt %3d nt %3d C %2d ingest %6.1f KB: %6.3f us/step  wrong %u\n", name, Pm, Pn, Bt, nt, C, Pn * Bt / 8.0, ms[1] * 1e3 / p.T, bad); fflush(stdout);
  cudaFree(p.x); cudaFree(p.flags); cudaFree(p.bad);
}
int main(int argc, char** argv) {
  int which = argc > 1 ? atoi(argv[1]) : 0;
  struct S { int Pm, Pn, Bt; } s[] = {{8, 8, 8}, {8, 16, 8}, {4, 20, 16}, {3, 28, 16}, {6, 20, 24}, {6, 20, 48}, {6, 20, 88}, {4, 32, 32}, {4, 32, 52}};
  for (auto& q : s) {
    if (which == 0) { go<BULK>("bulk", q.Pm, q.Pn, q.Bt, 256); go<BULK_WREL>("bulk warp-rel", q.Pm, q.Pn, q.Bt, 256); }
    if (which == 1) go<CPASYNC>("cp.async", q.Pm, q.Pn, q.Bt, 256);
    if (which == 2) { go<LL>("LL", q.Pm, q.Pn, q.Bt, 256); go<LL>("LL", q.Pm, q.Pn, q.Bt, 512); }
    if (which == 3) { go<MULTICAST>("multicast", q.Pm, q.Pn, q.Bt, 256, 2); go<MULTICAST>("multicast", q.Pm, q.Pn, q.Bt, 256, 4); }
    if (which == 4 && q.Pn <= 16 && q.Pn % 8 == 0) go<DSMEM>("dsmem push", q.Pm == 8 && q.Pn == 16 ? 4 : q.Pm, q.Pn, q.Bt, 256, q.Pn);
    if (which == 5) { go<RAW_BULK>("raw bulk", q.Pm, q.Pn, q.Bt, 256); go<RAW_CPASYNC>("raw cp.async", q.Pm, q.Pn, q.Bt, 256); go<RAW_LD>("raw ld", q.Pm, q.Pn, q.Bt, 512); }
    if (which == 6) { go<RAW_MULTICAST>("raw multicast", q.Pm, q.Pn, q.Bt, 256, 2); go<RAW_MULTICAST>("raw multicast", q.Pm, q.Pn, q.Bt, 256, 4); }
  }
  if (which == 4) { go<DSMEM>("dsmem push", 4, 16, 16, 512, 16); go<DSMEM>("dsmem push", 4, 8, 16, 256, 8); go<DSMEM>("dsmem push", 16, 4, 8, 256, 4); go<DSMEM>("dsmem push", 4, 10, 8, 256, 10); }
}
