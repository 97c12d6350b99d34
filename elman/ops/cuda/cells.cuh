// Cells: the pointwise rule of a step and its derivative, apart from the product that feeds it. The same functors serve
// every backend; their twins in Python are in elman/ops/cells.py.
//
// `forward` makes a unit's next state of its kGates pre-activations v; `backward` takes the gradient of that state to
// those of v. Both are functions of v, never of the stored state: bf16 rounds tanh to ±1 from about |v| = 3.5, where
// 1 − h² would be 0 and the unit would never learn again.
//
// `Math` is the arithmetic: Precise<float> and Precise<double>, or Fast where the result is rounded to 16 bits anyway.
#pragma once

template <class Number>
struct Precise {
    using Real = Number;
    static __device__ __forceinline__ Real exp(Real x) { return ::exp(x); }
    static __device__ __forceinline__ Real tanh(Real x) { return ::tanh(x); }
};

struct Fast {
    using Real = float;
    static __device__ __forceinline__ float exp(float x) { return __expf(x); }
    static __device__ __forceinline__ float tanh(float x) {
        const float magnitude = fabsf(x);
        // (1 − e) / (1 + e) loses its relative precision where e is near 1: there, a series.
        if (magnitude < 0.25f) {
            const float square = x * x;
            return x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
        }
        const float e = __expf(-2.0f * magnitude);
        return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
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
    static __device__ __forceinline__ void backward(const Real (&v)[kGates], Real dh, Real (&dv)[kGates]) {
        const Real e = Math::exp(Real(-2) * fabs(v[0]));
        const Real root = Real(1) / (Real(1) + e);
        dv[0] = dh * (Real(4) * e * root * root);
    }
};

struct Softsign {
    static constexpr int kGates = 1;

    template <class Math, class Real = typename Math::Real>
    static __device__ __forceinline__ Real forward(const Real (&v)[kGates]) {
        return v[0] / (Real(1) + fabs(v[0]));
    }

    template <class Math, class Real = typename Math::Real>
    static __device__ __forceinline__ void backward(const Real (&v)[kGates], Real dh, Real (&dv)[kGates]) {
        const Real root = Real(1) / (Real(1) + fabs(v[0]));
        dv[0] = dh * root * root;
    }
};
