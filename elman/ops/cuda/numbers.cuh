// Every stored number type, the arithmetic that it is computed in, and packs of neighbours that move as one word.
#pragma once

#include "primitives.cuh"

template <class T>
struct Arithmetic {
  using Math = typename T::Math;
};
template <>
struct Arithmetic<float> {
  using Math = Precise<float>;
};
template <>
struct Arithmetic<double> {
  using Math = Precise<double>;
};
template <class T>
using MathOf = typename Arithmetic<T>::Math;
template <class T>
using RealOf = typename MathOf<T>::Real;

// In what a cell's memory is kept beside tensors of T.
template <class T, bool kLogarithmic>
struct MemoryBeside {
  using Type = T;
};
template <class T>
struct MemoryBeside<T, true> {
  using Type = RealOf<T>;
};
template <class Cell, class T>
using MemoryOf = typename MemoryBeside<T, Cell::kLogarithmic>::Type;

__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ float to_real(bf16 x) { return bf16::low(x.bits); }
__device__ __forceinline__ float to_real(fp16 x) { return fp16::low(x.bits); }

// Rounds to nearest even; NaN stays NaN.
__device__ __forceinline__ void from_real(double x, double& y) { y = x; }
__device__ __forceinline__ void from_real(float x, float& y) { y = x; }
__device__ __forceinline__ void from_real(float x, fp16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = static_cast<unsigned short>(fp16::pack(x, 0.0f));
#endif
}
__device__ __forceinline__ void from_real(float x, bf16& y) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = is_nan ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> load(const T* base, long long index) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(base + index);
}

template <int kWidth, class T>
__device__ __forceinline__ void store(T* base, long long index, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(base + index) = pack;
}
