// wgmma of Hopper (sm_90a), 64 x N x 16, by overload on the sums: N / 2 a thread. The stationary operand is four registers
// a thread or a shared matrix with the depth contiguous; the other is a shared matrix with the rows of the batch contiguous.
//
// Shared matrices are made of core matrices, eight times sixteen contiguous bytes without a swizzle, and described by
// an address and two strides: between core matrices that follow each other along the depth, and across it.
#pragma once

#include "primitives.cuh"

#define ELMAN_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ELMAN_SUMS8(i) ELMAN_SUMS4(i), ELMAN_SUMS4(i + 4)
#define ELMAN_SUMS16(i) ELMAN_SUMS8(i), ELMAN_SUMS8(i + 8)

#define ELMAN_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ELMAN_NAMES12 ELMAN_NAMES8 ",%8,%9,%10,%11"
#define ELMAN_NAMES16 ELMAN_NAMES12 ",%12,%13,%14,%15"
#define ELMAN_NAMES20 ELMAN_NAMES16 ",%16,%17,%18,%19"
#define ELMAN_NAMES24 ELMAN_NAMES20 ",%20,%21,%22,%23"
#define ELMAN_NAMES28 ELMAN_NAMES24 ",%24,%25,%26,%27"
#define ELMAN_NAMES32 ELMAN_NAMES28 ",%28,%29,%30,%31"


// The operands that follow the sums are numbered from R, N / 2.
#define ELMAN_WGMMA(TYPE, N, NAMES, A, LO, HI, P, A_LO, A_HI, B_LO, B_HI, ...)                                          \
  static __device__ __forceinline__ void multiply(float (&d)[N / 2], const u32 (&a)[4], u32 lo, u32 hi, bool add) {     \
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {" LO ", " HI "}; setp.ne.b32 p, " P ", 0;"                    \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A "}, b, p, 1, 1, 1;}" \
                 : __VA_ARGS__                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));           \
  }                                                                                                                     \
  static __device__ __forceinline__ void multiply(float (&d)[N / 2], u32 a_lo, u32 a_hi, u32 lo, u32 hi, bool add) {    \
    asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {" A_LO ", " A_HI "}; mov.b64 b, {" B_LO ", " B_HI "};"     \
                 " setp.ne.b32 p, " LO ", 0;"                                                                           \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, a, b, p, 1, 1, 0, 1;}" \
                 : __VA_ARGS__                                                                                          \
                 : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));                                 \
  }

#define ELMAN_WGMMA_SIZES(TYPE)                                                                                       \
  ELMAN_WGMMA(TYPE, 16, ELMAN_NAMES8, "%8,%9,%10,%11", "%12", "%13", "%14", "%8", "%9", "%10", "%11", ELMAN_SUMS8(0))  \
  ELMAN_WGMMA(TYPE, 24, ELMAN_NAMES12, "%12,%13,%14,%15", "%16", "%17", "%18", "%12", "%13", "%14", "%15", ELMAN_SUMS8(0), ELMAN_SUMS4(8)) \
  ELMAN_WGMMA(TYPE, 32, ELMAN_NAMES16, "%16,%17,%18,%19", "%20", "%21", "%22", "%16", "%17", "%18", "%19", ELMAN_SUMS16(0)) \
  ELMAN_WGMMA(TYPE, 40, ELMAN_NAMES20, "%20,%21,%22,%23", "%24", "%25", "%26", "%20", "%21", "%22", "%23", ELMAN_SUMS16(0), ELMAN_SUMS4(16)) \
  ELMAN_WGMMA(TYPE, 48, ELMAN_NAMES24, "%24,%25,%26,%27", "%28", "%29", "%30", "%24", "%25", "%26", "%27", ELMAN_SUMS16(0), ELMAN_SUMS8(16)) \
  ELMAN_WGMMA(TYPE, 56, ELMAN_NAMES28, "%28,%29,%30,%31", "%32", "%33", "%34", "%28", "%29", "%30", "%31", ELMAN_SUMS16(0), ELMAN_SUMS8(16), ELMAN_SUMS4(24)) \
  ELMAN_WGMMA(TYPE, 64, ELMAN_NAMES32, "%32,%33,%34,%35", "%36", "%37", "%38", "%32", "%33", "%34", "%35", ELMAN_SUMS16(0), ELMAN_SUMS16(16))

template <typename T>
struct Wgmma;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <>
struct Wgmma<bf16> {
  ELMAN_WGMMA_SIZES("bf16")
};
template <>
struct Wgmma<fp16> {
  ELMAN_WGMMA_SIZES("f16")
};
#endif

// The descriptor of a shared matrix, in two halves; only the low one depends on the address.
__device__ __forceinline__ u32 matrix_low(u32 address, u32 depth_stride) {
  return (address & 0x3ffff) >> 4 | (depth_stride >> 4) << 16;
}
__device__ constexpr u32 matrix_high(u32 row_stride) { return row_stride >> 4; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Sums may be used from here on, once they have been waited for.
template <int kSums>
__device__ __forceinline__ void wgmma_use(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
