// What bounds a matrix state at every step.
#pragma once

#include "numbers.cuh"

namespace matrix {

// Cells. They take x times `scale`, which its factors are given at the start: a multiplication a row and column, not one a
// number. `forward` is what the forward pass makes of it; `again` what the backward pass takes for it, from whose value y it
// has the slope, and which must not lose that where y is near 1. Of half types tanh is one instruction forwards in bf16
// (relative error 2^-11, and as many clocks as the four multiply-adds of an element together and once more), and elsewhere 1
// − 2 / (1 + exp 2x), two of those, whose absolute error is 2e-7.
struct Unscaled {
  static constexpr bool kBounded = false;
  template <bool kAgain, class Math>
  static __device__ __forceinline__ constexpr float scale(Math) {
    return 1.0f;
  }
};

struct Tanh {
  static constexpr bool kBounded = true;
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Precise<float>) {
    return 1.0f;
  }
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Fast) {
    return 2.0f * Fast::kLog2E;
  }
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Coarse) {
    return kAgain ? 2.0f * Fast::kLog2E : 1.0f;
  }
  static __device__ __forceinline__ float again(Precise<float>, float x) { return ::tanh(x); }
  static __device__ __forceinline__ float again(Fast, float x) {
    return fmaf(-2.0f, hardware::reciprocal(1.0f + hardware::exp2(x)), 1.0f);
  }
  static __device__ __forceinline__ float forward(Precise<float> math, float x) { return again(math, x); }
  static __device__ __forceinline__ float forward(Fast math, float x) { return again(math, x); }
  static __device__ __forceinline__ float forward(Coarse, float x) { return Coarse::tanh(x); }
  static __device__ __forceinline__ float slope(float y) { return fmaf(-y, y, 1.0f); }
};

struct Softsign : Unscaled {
  static constexpr bool kBounded = true;
  template <class Math>
  static __device__ __forceinline__ float again(Math, float x) {
    return Math::divide(x, 1.0f + fabsf(x));
  }
  template <class Math>
  static __device__ __forceinline__ float forward(Math math, float x) {
    return again(math, x);
  }
  static __device__ __forceinline__ float slope(float y) { return (1.0f - fabsf(y)) * (1.0f - fabsf(y)); }
};

struct Identity : Unscaled {
  template <class Math>
  static __device__ __forceinline__ float again(Math, float x) {
    return x;
  }
  template <class Math>
  static __device__ __forceinline__ float forward(Math, float x) {
    return x;
  }
  static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

template <bool kChoose, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

}  // namespace matrix
