// Cells: the pointwise rule of a step and its derivative, apart from the product that feeds it. The same functors serve
// every backend and know nothing of how tensors lie; their twins in Python are in elman/ops/cells.py.
//
// A unit has kGates values `pre` of its input, kProducts values `rec` of the operator and kStates states, h first. A cell
// may read one state itself, its memory: the last one, which is h where there is no other.
//
//   h = forward(pre, rec, memory, saved)         memory: before the step, then after it (h itself is rounded by the caller)
//   slopes(saved, memory, slope)                 all of the derivative that needs no gradient; memory: before the step
//   backward(slope, dh, dmemory, dpre, drec)     dmemory: of the memory after the step by the next cell, then before it
//
// The derivative is a function of what enters the activations, never of what comes out: bf16 rounds tanh to +-1 from
// about |v| = 3.5, where 1 - h^2 would be 0 and the unit would never learn again. kAdditive says that drec is the first
// kProducts of dpre.
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

// h = f(v), v = pre + rec.
template <class Activation>
struct Additive {
  static constexpr int kGates = 1, kProducts = 1, kStates = 1, kSaved = 1, kSlopes = 1;
  static constexpr bool kReadsMemory = false, kAdditive = true;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[1], const Real (&rec)[1], Real&, Real (&saved)[1]) {
    saved[0] = pre[0] + rec[0];
    return Activation::template value<Math>(saved[0]);
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[1], Real, Real (&slope)[1]) {
    slope[0] = Activation::template derivative<Math>(saved[0]);
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[1], Real dh, Real&, Real (&dpre)[1],
                                                  Real (&drec)[1]) {
    drec[0] = dpre[0] = dh * slope[0];
  }
};

struct Tanh : Additive<Tanh> {
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real value(Real v) {
    return Math::tanh(v);
  }

  // sech^2(v) without the cancellation of 1 - tanh^2(v).
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real derivative(Real v) {
    const Real e = Math::exp(Real(-2) * fabs(v));
    const Real root = Math::divide(Real(1), Real(1) + e);
    return Real(4) * e * root * root;
  }
};

struct Softsign : Additive<Softsign> {
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real value(Real v) {
    return Math::divide(v, Real(1) + fabs(v));
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real derivative(Real v) {
    const Real root = Math::divide(Real(1), Real(1) + fabs(v));
    return root * root;
  }
};
