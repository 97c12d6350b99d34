// Types, conversions and the few PTX instructions the recurrence needs.
//
// NVRTC compiles this with no CUDA header on its path, so nothing here includes one: 16-bit floats are raw bit
// patterns, and memory ordering, matrix products and barriers are inline PTX.
#pragma once

#include "cells.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(8) Words2 {
  u32 x, y;
};

struct alignas(16) Words4 {
  u32 x, y, z, w;
};

// Two values of a 16-bit float in one word, the first in the low half: how tensor cores and memory both want them.
struct bf16 {
  using Math = Coarse;
  static __device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    return word;
  }
  static __device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  u16 bits;
};

struct fp16 {
  using Math = Fast;
  static __device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    return word;
  }
  static __device__ __forceinline__ float low(u32 word) {
    float value;
    asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo;}" : "=f"(value) : "r"(word));
    return value;
  }
  static __device__ __forceinline__ float high(u32 word) {
    float value;
    asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi;}" : "=f"(value) : "r"(word));
    return value;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  u16 bits;
};

// Four consecutive values of one row: 8 bytes.
template <typename T>
__device__ __forceinline__ void unpack(const Words2& words, float (&values)[4]) {
  values[0] = T::low(words.x), values[1] = T::high(words.x);
  values[2] = T::low(words.y), values[3] = T::high(words.y);
}

template <typename T>
__device__ __forceinline__ Words2 pack(const float (&values)[4]) {
  return {T::pack(values[0], values[1]), T::pack(values[2], values[3])};
}

// Strong (relaxed, GPU-scope) accesses: words that other CTAs write or read during the launch. L2 serves them, where a
// weak load may be served from a stale L1 line for ever. A 16-byte load sees each 8-byte store whole or not at all.
__device__ __forceinline__ Words4 load_strong(const void* address) {
  Words4 v;
  asm volatile(
      "{.reg .b128 q; .reg .b64 lo, hi; ld.relaxed.gpu.global.b128 q, [%4]; mov.b128 {lo, hi}, q;"
      " mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi;}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address)
      : "memory");
  return v;
}

__device__ __forceinline__ void store_strong(void* address, const Words2& v) {
  asm volatile("{.reg .b64 q; mov.b64 q, {%1, %2}; st.relaxed.gpu.global.b64 [%0], q;}" ::"l"(address), "r"(v.x),
               "r"(v.y)
               : "memory");
}

__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Inputs of the whole sequence come through shared memory, several steps ahead, each thread fetching its own.
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

// Eight zero bytes unless `wanted`; then `from` is not read.
__device__ __forceinline__ void copy_async_if(u32 to, const void* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(wanted ? 8 : 0) : "memory");
}

__device__ __forceinline__ void copy_async16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ Words4 load_shared(u32 address) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(u32 address, const Words4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ Words2 load_shared8(u32 address) {
  Words2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// Keeps the compiler from moving a value's computation past this point.
__device__ __forceinline__ void settle(float& value) { asm volatile("" : "+f"(value)); }

// Outputs of the whole sequence: first to leave L2, where the exchanged state lives.
__device__ __forceinline__ void store_stream(void* address, const Words2& v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1,%2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}

// Named barriers: `sync` waits for `threads` arrivals, `arrive` only counts.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Move registers from the warp groups that only do pointwise work to those that hold weights (Hopper alone can).
template <int kCount>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Distributed shared memory of a cluster (sm_90 on). A push writes 16 bytes into a peer's shared memory and counts them
// on the peer's mbarrier, whose phase completes when all expected bytes have come.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_init(u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;" ::"r"(barrier)
               : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_expect(u32 barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ bool mbarrier_done(u32 barrier, u32 parity) {
  u32 done = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return done;
}

__device__ __forceinline__ u32 peer_address(u32 address, int rank) {
  u32 peer = address;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
#endif
  return peer;
}

__device__ __forceinline__ void push(u32 address, const Words4& v, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
#endif
}
