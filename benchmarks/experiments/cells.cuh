// Cells: the pointwise rule of a step and its derivative, apart from the product that feeds it. The same functors serve
// every backend; their twins in Python are in elman/ops/cells.py.
//
// `forward` makes a unit's next state of its kGates pre-activations v; `slope` is its derivative by each v. Both are
// functions of v, never of the stored state: bf16 rounds tanh to ±1 from about |v| = 3.5, where 1 − h² would be 0 and
// the unit would never learn again.
//
// `Math` is the arithmetic: Precise<float> and Precise<double>, or in float32 what is exact enough for a result that is
// rounded to 11 bits (Fast) or to 8 (Coarse).
#pragma once

template <class Number>
struct Precise {
  using Real = Number;
  static __device__ __forceinline__ Real exp(Real x) { return ::exp(x); }
  static __device__ __forceinline__ Real divide(Real x, Real y) { return x / y; }
  static __device__ __forceinline__ Real tanh(Real x) { return ::tanh(x); }
};

struct Fast {
  using Real = float;
  static __device__ __forceinline__ float exp(float x) { return __expf(x); }
  static __device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }
  // (1 − e) / (1 + e) loses its relative precision where e is near 1: there, a series.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    const float series = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
    const float e = __expf(-2.0f * fabsf(x));
    const float quotient = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
    return fabsf(x) < 0.25f ? series : quotient;
  }
};

struct Coarse : Fast {
  static __device__ __forceinline__ float tanh(float x) {
#if __CUDA_ARCH__ >= 750
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return Fast::tanh(x);
#endif
  }
};

struct Tanh {
  static constexpr int kGates = 1;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&v)[kGates]) {
    return Math::tanh(v[0]);
  }

  // sech²(v) without the cancellation of 1 − tanh²(v).
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slope(const Real (&v)[kGates], Real (&slope)[kGates]) {
    const Real e = Math::exp(Real(-2) * fabs(v[0]));
    const Real root = Math::divide(Real(1), Real(1) + e);
    slope[0] = Real(4) * e * root * root;
  }
};

struct Softsign {
  static constexpr int kGates = 1;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&v)[kGates]) {
    return Math::divide(v[0], Real(1) + fabs(v[0]));
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slope(const Real (&v)[kGates], Real (&slope)[kGates]) {
    const Real root = Math::divide(Real(1), Real(1) + fabs(v[0]));
    slope[0] = root * root;
  }
};
