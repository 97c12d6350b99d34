// The wgmma of each number type and width, by overload on the sums. Only sm_90a has them.
#pragma once

#include "primitives.cuh"

template <typename T>
struct Wgmma;

template <>
struct Wgmma<bf16> {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%8, %9}; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%4, %5}; mov.b64 b, {%6, %7}; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[8], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%12, %13}; setp.ne.b32 p, %14, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[8], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%8, %9}; mov.b64 b, {%10, %11}; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[12], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%16, %17}; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[12], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%12, %13}; mov.b64 b, {%14, %15}; wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[16], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%20, %21}; setp.ne.b32 p, %22, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[16], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%16, %17}; mov.b64 b, {%18, %19}; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[20], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%24, %25}; setp.ne.b32 p, %26, 0; wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}, {%20,%21,%22,%23}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[20], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%20, %21}; mov.b64 b, {%22, %23}; wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[24], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%28, %29}; setp.ne.b32 p, %30, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, {%24,%25,%26,%27}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[24], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%24, %25}; mov.b64 b, {%26, %27}; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[32], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%36, %37}; setp.ne.b32 p, %38, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[32], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%32, %33}; mov.b64 b, {%34, %35}; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
#endif
};

template <>
struct Wgmma<fp16> {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%8, %9}; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%4, %5}; mov.b64 b, {%6, %7}; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[8], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%12, %13}; setp.ne.b32 p, %14, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[8], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%8, %9}; mov.b64 b, {%10, %11}; wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[12], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%16, %17}; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n24k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[12], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%12, %13}; mov.b64 b, {%14, %15}; wgmma.mma_async.sync.aligned.m64n24k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[16], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%20, %21}; setp.ne.b32 p, %22, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[16], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%16, %17}; mov.b64 b, {%18, %19}; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[20], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%24, %25}; setp.ne.b32 p, %26, 0; wgmma.mma_async.sync.aligned.m64n40k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}, {%20,%21,%22,%23}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[20], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%20, %21}; mov.b64 b, {%22, %23}; wgmma.mma_async.sync.aligned.m64n40k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[24], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%28, %29}; setp.ne.b32 p, %30, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, {%24,%25,%26,%27}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[24], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%24, %25}; mov.b64 b, {%26, %27}; wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
  static __device__ __forceinline__ void multiply(float (&d)[32], const u32 (&a)[4], u32 lo, u32 hi, bool add) {
    asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%36, %37}; setp.ne.b32 p, %38, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, b, p, 1, 1, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(lo), "r"(hi), "r"(static_cast<int>(add)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[32], u32 a_lo, u32 a_hi, u32 lo, u32 hi) {
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%32, %33}; mov.b64 b, {%34, %35}; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, a, b, 1, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "r"(a_lo), "r"(a_hi), "r"(lo), "r"(hi));
  }
#endif
};

