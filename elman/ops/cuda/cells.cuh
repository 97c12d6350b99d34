// Cells: the pointwise rule of a step and its derivative, apart from the product that feeds it. The same functors serve
// every backend and know nothing of how tensors lie; their twins in Python are in elman/ops/cells.py.
//
// A unit has kGates values `pre` of its input, kProducts values `rec` of the operator and kStates states, h first. A
// cell may read one state itself, its memory: the last one, which is h where there is no other.
//
//   h = forward(pre, rec, memory, saved)      memory: before the step, then after it (the caller rounds it)
//   slopes(saved, memory, slope)              all of the derivative that needs no gradient; memory: before the step
//   backward(slope, dh, dmemory, dpre, drec)  dmemory: of the memory after the step by the next cell, then before it
//
// kLogarithmic says that the memory holds log |h| and the sign of h in one number; it is then of Math::Real wherever it
// lies, and dmemory is the gradient of the number it stands for.
//
// The derivative is a function of what enters the activations, never of what comes out: bf16 rounds tanh to +-1 from
// about |v| = 3.5, where 1 - h^2 would be 0 and the unit would never learn again. kAdditive says that drec is the first
// kProducts of dpre.
//
// `Math` is the arithmetic: Precise<float> and Precise<double>, or in float32 what is exact enough for a result that is
// rounded to 11 bits (Fast) or to 8 (Coarse). It takes logarithms to the base that it finds cheapest, e or 2: in_base
// and in_nats turn those to the base e into them and back, and log1p is to that base too. Of a Fast one the absolute error
// is 3e-7, which is the relative one of the number it stands for; so is that of a sum or difference of two such numbers,
// over the larger.
#pragma once

template <class Number>
struct Precise {
  using Real = Number;
  static __device__ __forceinline__ Real exp(Real x) { return ::exp(x); }
  static __device__ __forceinline__ Real in_base(Real nats) { return nats; }
  static __device__ __forceinline__ Real in_nats(Real log) { return log; }
  static __device__ __forceinline__ Real power(Real log) { return ::exp(log); }
  static __device__ __forceinline__ Real log(Real x) { return ::log(x); }
  static __device__ __forceinline__ Real log1p(Real x) { return ::log1p(x); }
  // log (1 + z) and, where the signs of a and b differ, log (1 - z), z being power(gap) and gap at most 0.
  static __device__ __forceinline__ Real log_sum(Real gap, Real a, Real b) {
    return (a < Real(0)) == (b < Real(0)) ? ::log1p(::exp(gap)) : ::log(-::expm1(gap));
  }
  static __device__ __forceinline__ Real divide(Real x, Real y) { return x / y; }
  static __device__ __forceinline__ Real tanh(Real x) { return ::tanh(x); }
};

// Single instructions, to 2^-22 of their result or, log2 near 1, of 1; what is subnormal counts as 0.
namespace hardware {
#ifdef __CUDA_ARCH__
#define ELMAN_INSTRUCTION(name, instruction, host)                    \
  __device__ __forceinline__ float name(float x) {                    \
    float y;                                                          \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));    \
    return y;                                                         \
  }
#else
#define ELMAN_INSTRUCTION(name, instruction, host) \
  inline float name(float x) { return host; }
#endif
ELMAN_INSTRUCTION(exp2, "ex2", ::exp2f(x))
ELMAN_INSTRUCTION(log2, "lg2", ::log2f(x))
ELMAN_INSTRUCTION(reciprocal, "rcp", 1.0f / x)
#undef ELMAN_INSTRUCTION
}  // namespace hardware

struct Fast {
  using Real = float;
  static constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
  static __device__ __forceinline__ float exp(float x) { return hardware::exp2(x * kLog2E); }
  static __device__ __forceinline__ float in_base(float nats) { return nats * kLog2E; }
  static __device__ __forceinline__ float in_nats(float log) { return log * kLn2; }
  static __device__ __forceinline__ float power(float log) { return hardware::exp2(log); }
  static __device__ __forceinline__ float log(float x) { return hardware::log2(x); }
  static __device__ __forceinline__ float log1p(float x) { return hardware::log2(1.0f + x); }
  static __device__ __forceinline__ float log_sum(float gap, float a, float b) {
    return log1p(copysignf(power(gap), a * b));  // the product has a sign even where it is 0
  }
  static __device__ __forceinline__ float divide(float x, float y) { return x * hardware::reciprocal(y); }
  // (1 − e) / (1 + e) loses its relative precision where e is near 1: there, a series.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    const float series = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
    const float e = exp(-2.0f * fabsf(x));
    const float quotient = copysignf(divide(1.0f - e, 1.0f + e), x);
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

template <class Math, class Real = typename Math::Real>
__device__ __forceinline__ Real sigmoid(Real v) {
  return Math::divide(Real(1), Real(1) + Math::exp(-v));
}

// A sigmoid at v with what its derivative needs: e = exp(-|v|) never overflows, and nothing is taken from 1.
template <class Math, class Real = typename Math::Real>
struct Gate {
  Real open, shut, slope, e;  // σ(v), σ(-v), σ'(v), exp(-|v|)

  __device__ __forceinline__ explicit Gate(Real v) : Gate(v, Math::exp(-fabs(v))) {}

  __device__ __forceinline__ Gate(Real v, Real e) : e(e) {
    const Real high = Math::divide(Real(1), Real(1) + e), low = e * high;
    open = v < Real(0) ? low : high, shut = v < Real(0) ? high : low, slope = high * low;
  }
};

// sech^2(v) without the cancellation of 1 - tanh^2(v).
template <class Math, class Real = typename Math::Real>
__device__ __forceinline__ Real tanh_slope(Real v) {
  const Real e = Math::exp(Real(-2) * fabs(v));
  const Real root = Math::divide(Real(1), Real(1) + e);
  return Real(4) * e * root * root;
}

// h = f(v), v = pre + rec.
template <class Activation>
struct Additive {
  static constexpr int kGates = 1, kProducts = 1, kStates = 1, kSaved = 1, kSlopes = 1;
  static constexpr bool kReadsMemory = false, kAdditive = true, kLogarithmic = false;

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

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real derivative(Real v) {
    return tanh_slope<Math>(v);
  }
};

// A NaN stays one, in the slope too.
struct Relu : Additive<Relu> {
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real value(Real v) {
    return v <= Real(0) ? Real(0) : v;
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real derivative(Real v) {
    return v > Real(0) ? Real(1) : v <= Real(0) ? Real(0) : v;
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

// The logarithm of 1 + power(x), 0 < power(-|x|) < 1 being given where it is known.
template <class Math, class Real = typename Math::Real>
__device__ __forceinline__ Real softplus(Real x, Real e) {
  return fmax(x, Real(0)) + Math::log1p(e);
}

template <class Math, class Real = typename Math::Real>
__device__ __forceinline__ Real softplus(Real x) {
  return softplus<Math>(x, Math::power(-fabs(x)));
}

// x, or 1 if that is less; NaN stays NaN.
__device__ __forceinline__ double at_most_one(double x) { return x > 1 ? 1 : x; }
__device__ __forceinline__ float at_most_one(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, 0f3f800000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x > 1 ? 1 : x;
#endif
}

// A number by its logarithm, to the base of Math: the sign is that of `sign`, and log is -infinity for a zero.
template <class Real>
struct Signed {
  Real log, sign;
};

// h = (1 - δ) h + δ tanh(a), δ = σ(d): the first product is a's, the second, where there is one, d's.
template <int kProducts_>
struct LeakyTanh {
  static constexpr int kGates = 2, kProducts = kProducts_, kStates = 1, kSaved = 2, kSlopes = 3;
  static constexpr bool kReadsMemory = true, kAdditive = true, kLogarithmic = false;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[2], const Real (&rec)[kProducts], Real& memory,
                                                 Real (&saved)[2]) {
    sum(pre, rec, saved);
    const Real rate = sigmoid<Math>(saved[1]);
    memory += rate * (Math::tanh(saved[0]) - memory);
    return memory;
  }

  template <class Real>
  static __device__ __forceinline__ void sum(const Real (&pre)[2], const Real (&rec)[kProducts], Real (&saved)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) saved[i] = i < kProducts ? pre[i] + rec[i % kProducts] : pre[i];
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Signed<Real> candidate(const Real (&saved)[2]) {
    return {Math::log(Math::tanh(fabs(saved[0]))), saved[0]};
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[2], Real memory, Real (&slope)[3]) {
    const Gate<Math> rate(saved[1]);
    slope[0] = rate.open * tanh_slope<Math>(saved[0]);
    slope[1] = rate.slope * (Math::tanh(saved[0]) - memory);
    slope[2] = rate.shut;
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[3], Real dh, Real& dmemory, Real (&dpre)[2],
                                                  Real (&drec)[kProducts]) {
    dh += dmemory;
#pragma unroll
    for (int i = 0; i < 2; ++i) dpre[i] = dh * slope[i];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) drec[i] = dpre[i];
    dmemory = dh * slope[2];
  }
};

using Delta = LeakyTanh<1>;
using TripleR = LeakyTanh<2>;

// Hochreiter and Schmidhuber (1997) with a forget gate, as PyTorch has it: i, f, g, o; the memory is c.
struct Lstm {
  static constexpr int kGates = 4, kProducts = 4, kStates = 2, kSaved = 4, kSlopes = 6;
  static constexpr bool kReadsMemory = true, kAdditive = true, kLogarithmic = false;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[4], const Real (&rec)[4], Real& memory,
                                                 Real (&saved)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) saved[i] = pre[i] + rec[i];
    memory = sigmoid<Math>(saved[1]) * memory + sigmoid<Math>(saved[0]) * Math::tanh(saved[2]);
    return sigmoid<Math>(saved[3]) * Math::tanh(memory);
  }

  // slope[4] takes dh to dc, and slope[5] dc to the memory before.
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[4], Real memory, Real (&slope)[6]) {
    const Gate<Math> i(saved[0]), f(saved[1]), o(saved[3]);
    const Real g = Math::tanh(saved[2]), c = f.open * memory + i.open * g;
    slope[0] = g * i.slope;
    slope[1] = memory * f.slope;
    slope[2] = i.open * tanh_slope<Math>(saved[2]);
    slope[3] = Math::tanh(c) * o.slope;
    slope[4] = o.open * tanh_slope<Math>(c);
    slope[5] = f.open;
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[6], Real dh, Real& dmemory, Real (&dpre)[4],
                                                  Real (&drec)[4]) {
    const Real dc = dmemory + dh * slope[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) drec[i] = dpre[i] = (i < 3 ? dc : dh) * slope[i];
    dmemory = dc * slope[5];
  }
};

// Cho et al. (2014) as PyTorch has it: r, z, n, the reset gate on the product of n, bias included, which is saved too.
struct Gru {
  static constexpr int kGates = 3, kProducts = 3, kStates = 1, kSaved = 4, kSlopes = 5;
  static constexpr bool kReadsMemory = true, kAdditive = false, kLogarithmic = false;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[3], const Real (&rec)[3], Real& memory,
                                                 Real (&saved)[4]) {
    saved[0] = pre[0] + rec[0], saved[1] = pre[1] + rec[1], saved[3] = rec[2];
    saved[2] = pre[2] + sigmoid<Math>(saved[0]) * rec[2];
    const Real n = Math::tanh(saved[2]);
    memory = n + sigmoid<Math>(saved[1]) * (memory - n);
    return memory;
  }

  // slope[3] takes dh to drec's n, and slope[4] dh to the memory before.
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[4], Real memory, Real (&slope)[5]) {
    const Gate<Math> r(saved[0]), z(saved[1]);
    slope[2] = z.shut * tanh_slope<Math>(saved[2]);
    slope[0] = slope[2] * saved[3] * r.slope;
    slope[1] = z.slope * (memory - Math::tanh(saved[2]));
    slope[3] = slope[2] * r.open;
    slope[4] = z.open;
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[5], Real dh, Real& dmemory, Real (&dpre)[3],
                                                  Real (&drec)[3]) {
    dh += dmemory;
#pragma unroll
    for (int i = 0; i < 3; ++i) dpre[i] = dh * slope[i];
    drec[0] = dpre[0], drec[1] = dpre[1], drec[2] = dh * slope[3];
    dmemory = dh * slope[4];
  }
};

// h = (1 - δ) h + δ sign(c) e (|c| / e)^α with c = clamp(v, ±1), δ = σ(d) and α = 1 + softplus(a): v, d, a. The power's
// slope is at most 1 whatever α is.
struct Polynomial {
  static constexpr int kGates = 3, kProducts = 1, kStates = 1, kSaved = 3, kSlopes = 4;
  static constexpr bool kReadsMemory = true, kAdditive = true, kLogarithmic = false;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[3], const Real (&rec)[1], Real& memory,
                                                 Real (&saved)[3]) {
    saved[0] = pre[0] + rec[0], saved[1] = pre[1], saved[2] = pre[2];
    const Real log = exponent<Math>(saved[2]) * log_part<Math>(at_most_one(fabs(saved[0])));
    const Real size = Math::power(Math::in_base(Real(1)) + log);  // of 0 it is power(-infinity)
    memory += sigmoid<Math>(saved[1]) * (copysign(size, saved[0]) - memory);
    return memory;
  }

  // log (x / e), to the base of Math.
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real log_part(Real x) {
    return Math::log(x) - Math::in_base(Real(1));
  }

  // 1 + softplus(e), in nats.
  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real exponent(Real e) {
    return Real(1) + Math::in_nats(softplus<Math>(Math::in_base(e)));
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[3], Real memory, Real (&slope)[4]) {
    const Gate<Math> rate(saved[1]), bent(saved[2]);
    const Real size = fabs(saved[0]), more = Math::in_nats(softplus<Math>(Math::in_base(saved[2]), bent.e));
    // At 0 the power and its slopes are 0, where the formulas' are 0 times infinity.
    const Real cut = at_most_one(size), log = size == Real(0) ? Real(0) : log_part<Math>(cut);
    const Real root = Math::power(more * log), power = copysign(cut * root, saved[0]), steep = rate.open * root;
    slope[0] = size == Real(0) || size > Real(1) ? Real(0) : steep + more * steep;
    slope[1] = rate.slope * (power - memory);
    slope[2] = rate.open * power * Math::in_nats(log) * bent.open;
    slope[3] = rate.shut;
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[4], Real dh, Real& dmemory, Real (&dpre)[3],
                                                  Real (&drec)[1]) {
    dh += dmemory;
#pragma unroll
    for (int i = 0; i < 3; ++i) dpre[i] = dh * slope[i];
    drec[0] = dpre[0];
    dmemory = dh * slope[3];
  }
};

// h = (1 - δ) h + δ sign(v) σ(α log |v|), a power for small v that never passes 1: v, d, e as Polynomial. It runs as
// logarithms only, see Logarithmic.
struct BoundedPower {
  static constexpr int kGates = 3, kProducts = 1, kStates = 1, kSaved = 3, kSlopes = 4;
  static constexpr bool kReadsMemory = true, kAdditive = true, kLogarithmic = false;

  template <class Real>
  static __device__ __forceinline__ void sum(const Real (&pre)[3], const Real (&rec)[1], Real (&saved)[3]) {
    saved[0] = pre[0] + rec[0], saved[1] = pre[1], saved[2] = pre[2];
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Signed<Real> candidate(const Real (&saved)[3]) {
    const Real power = Polynomial::exponent<Math>(saved[2]) * Math::log(fabs(saved[0]));
    return {-softplus<Math>(-power), saved[0]};
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[3], Real memory, Real (&slope)[4]) {
    const Gate<Math> rate(saved[1]), bent(saved[2]);
    const Real alpha = Real(1) + Math::in_nats(softplus<Math>(Math::in_base(saved[2]), bent.e));
    // At 0 all slopes are 0, where the formulas' are 0 times infinity: there, a logarithm whose power is 0.
    const bool zero = saved[0] == Real(0);
    const Real log = zero ? Real(-1e4) : Math::log(fabs(saved[0])), power = alpha * log;
    const Gate<Math> height(power, Math::power(-fabs(power)));
    // σ'(power) over |v|, of which neither factor may overflow.
    const Real high = power < Real(0) ? height.shut : height.open;
    const Real steep = high * high * Math::power(-fabs(power) - log);
    slope[0] = zero ? Real(0) : rate.open * alpha * steep;
    slope[1] = rate.slope * (copysign(height.open, saved[0]) - memory);
    slope[2] = rate.open * copysign(height.slope, saved[0]) * Math::in_nats(log) * bent.open;
    slope[3] = rate.shut;
  }

  template <class Real>
  static __device__ __forceinline__ void backward(const Real (&slope)[4], Real dh, Real& dmemory, Real (&dpre)[3],
                                                  Real (&drec)[1]) {
    Polynomial::backward(slope, dh, dmemory, dpre, drec);
  }
};

// A leaky cell whose memory is -log |h| with the sign of h: 0 for a zero, and the smallest normal number where |h| is 1
// or, by rounding, more. It is mixed as logarithms; the number is the same, and so is its derivative, that of `Leaky`.
template <class Leaky>
struct Logarithmic : Leaky {
  using Linear = Leaky;
  static constexpr int kGates = Leaky::kGates, kProducts = Leaky::kProducts, kStates = 2, kSaved = Leaky::kSaved;
  static constexpr bool kLogarithmic = true;

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real number(Real memory) {
    return memory == Real(0) ? Real(0) : copysign(Math::exp(-fabs(memory)), memory);
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ Real forward(const Real (&pre)[kGates], const Real (&rec)[kProducts], Real& memory,
                                                 Real (&saved)[kSaved]) {
    Leaky::sum(pre, rec, saved);
    const Signed<Real> given = Leaky::template candidate<Math>(saved);
    const Real rate = Math::in_base(saved[1]), both = Math::log1p(Math::power(-fabs(rate)));
    // log (1 - δ) |h| and log δ |c|, but for -both: for no h as good as -infinity, and other than that when subtracted
    // from itself.
    const Real nothing = -1e30f, size_before = Math::in_base(fabs(memory));
    const Real kept = memory == Real(0) ? nothing : -fmax(rate, Real(0)) - size_before;
    const Real taken = given.log - fmax(-rate, Real(0));
    // The larger of the two, and the other over it: a NaN of either comes out of the gap.
    const Real log = Math::in_nats(fmax(kept, taken) - both + Math::log_sum(-fabs(kept - taken), memory, given.sign));
    const Real sign = taken > kept ? given.sign : memory;
    const Real smallest = sizeof(Real) == 8 ? 2.2250738585072014e-308 : 1.17549435e-38f;
    const Real size = -log <= smallest ? smallest : -log;
    memory = log < Real(0.1) * nothing ? Real(0) : copysign(size, sign);
    return copysign(Math::exp(-size), sign);
  }

  template <class Math, class Real = typename Math::Real>
  static __device__ __forceinline__ void slopes(const Real (&saved)[kSaved], Real memory,
                                                Real (&slope)[Leaky::kSlopes]) {
    Leaky::template slopes<Math>(saved, number<Math>(memory), slope);
  }
};

using LogDelta = Logarithmic<Delta>;
using LogTripleR = Logarithmic<TripleR>;
using LogPolynomial = Logarithmic<BoundedPower>;
