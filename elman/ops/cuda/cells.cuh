// Cells: the pointwise rule of one step and its derivative, apart from the product that feeds it.
//
// A cell sees the kGates pre-activations v of one hidden unit, in fp32. `forward` may be approximate to
// about 11 bits when the result is rounded to 8 (`kCoarse`). `slope` is the derivative of the new
// state by each v. It is a function of v, never of the stored h: bf16 rounds tanh to +-1 from about |v| = 3.5,
// where 1 - h * h would be zero and the unit would stop learning.
#pragma once

struct Tanh {
  static constexpr int kGates = 1;

  template <bool kCoarse>
  static __device__ __forceinline__ float forward(const float (&v)[kGates]) {
    const float x = v[0];
    if constexpr (kCoarse) {
      float y;
      asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
      return y;
    }
    // (1 - e) / (1 + e) loses relative precision where e is near 1: a series there.
    const float s = x * x;
    const float series = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315))));
    const float e = __expf(-2.0f * fabsf(x));
    const float quotient = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
    return fabsf(x) < 0.25f ? series : quotient;
  }

  static __device__ __forceinline__ void slope(const float (&v)[kGates], float (&slope)[kGates]) {
    const float e = __expf(-2.0f * fabsf(v[0]));
    const float d = __fdividef(1.0f, 1.0f + e);
    slope[0] = 4.0f * e * d * d;
  }
};

struct Softsign {
  static constexpr int kGates = 1;

  template <bool kCoarse>
  static __device__ __forceinline__ float forward(const float (&v)[kGates]) {
    return __fdividef(v[0], 1.0f + fabsf(v[0]));
  }

  static __device__ __forceinline__ void slope(const float (&v)[kGates], float (&slope)[kGates]) {
    const float d = __fdividef(1.0f, 1.0f + fabsf(v[0]));
    slope[0] = d * d;
  }
};
