// Stored number types, and the arithmetic that each is computed in.
//
// The half types are ours, because NVRTC's wheel lacks the headers that cuda_bf16.h and cuda_fp16.h need.
#pragma once

#include "cells.cuh"

struct bf16 {
    unsigned short bits;
};

struct fp16 {
    unsigned short bits;
};

template <class T>
struct Arithmetic {
    using Math = Precise<T>;
};
template <>
struct Arithmetic<bf16> {
    using Math = Fast;
};
template <>
struct Arithmetic<fp16> {
    using Math = Fast;
};
template <class T>
using MathOf = typename Arithmetic<T>::Math;
template <class T>
using RealOf = typename MathOf<T>::Real;

__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ float to_real(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_real(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest even; NaN stays NaN.
__device__ __forceinline__ void from_real(double x, double& y) { y = x; }
__device__ __forceinline__ void from_real(float x, float& y) { y = x; }
__device__ __forceinline__ void from_real(float x, fp16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void from_real(float x, bf16& y) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = is_nan ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
