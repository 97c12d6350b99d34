// A short causal depthwise convolution v_t = f(Σ_j w_j ⊙ u_{t-j}), f the identity or silu, and its gradient: every tensor is
// read and written once, but for kTaps − 1 steps at the borders of pieces. A thread owns kWidth neighbouring units of one
// batch row for `piece` steps, and keeps the inputs that it still needs in registers.
//
// The backward pass walks forward too. It makes the sums again for silu's slope, and collects the gradient of each input
// over the kTaps steps that see it, those behind its piece included. Of the weights' gradient a thread leaves its part.
//
// Tensors are contiguous: u, v (T, B, H), weight (kTaps, H), last and left, the inputs before the first step and those
// that a step after the last would see, (B, kTaps − 1, H), the oldest first, reset (T, B), dweight (pieces, B, kTaps, H).
// Weights are of RealOf<T>. What is null is not there. Inputs from before a reset count as zero. An argument has 8 bytes.
#pragma once

#include "cells.cuh"
#include "numbers.cuh"

namespace short_conv {

constexpr int kThreads = 128;

// Of a multiprocessor at least, which leaves each thread the registers that it wants.
template <int kTaps>
constexpr int kBlocks = kTaps <= 4 ? 4 : 2;

// The units, row and steps of a thread.
struct Place {
  bool inside;
  long long column, row, piece, first, end, batch, hidden;

  __device__ __forceinline__ Place(int width, long long steps, long long batch, long long hidden, long long length)
      : batch(batch), hidden(hidden) {
    const long long index = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x, packs = hidden / width;
    column = index % packs * width, row = index / packs % batch, piece = index / packs / batch;
    first = piece * length, end = first + length < steps ? first + length : steps;
    inside = first < steps;
  }

  __device__ __forceinline__ long long at(long long t) const { return (t * batch + row) * hidden + column; }

  // Of the inputs before the first step and behind the last, and of dweight.
  template <int kTaps>
  __device__ __forceinline__ long long edge(long long i) const {
    return (row * (kTaps - 1) + i) * hidden + column;
  }
};

// What a step sees: the input of j steps ago in x[j], zero where a reset lies between; `alive` are not cut off from it.
template <class T, int kWidth, int kTaps>
struct Window {
  using Real = RealOf<T>;
  Real x[kTaps][kWidth];
  int alive;

  // As it is before step place.first.
  __device__ __forceinline__ Window(const Place& place, const T* u, const T* last, const bool* reset) : alive(kTaps - 1) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[j][i] = 0;
#pragma unroll
    for (int back = kTaps - 1; back > 0; --back) {
      const long long t = place.first - back;
      const T* from = t >= 0 ? u + place.at(t) : last == nullptr ? nullptr : last + place.edge<kTaps>(t + kTaps - 1);
      push(from, t >= 0 && reset != nullptr && reset[t * place.batch + place.row]);
    }
  }

  // A step's own input is x[0].
  __device__ __forceinline__ void push(const T* from, bool reset) {
    alive = reset ? 0 : min(alive + 1, kTaps - 1);
#pragma unroll
    for (int j = kTaps - 1; j > 0; --j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[j][i] = reset ? Real(0) : x[j - 1][i];
    Pack<T, kWidth> given{};
    if (from != nullptr) given = load<kWidth>(from, 0);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[0][i] = to_real(given.at[i]);
  }

  __device__ __forceinline__ Real sum(const Real (&w)[kTaps][kWidth], int i) const {
    Real sum = w[0][i] * x[0][i];
#pragma unroll
    for (int j = 1; j < kTaps; ++j) sum += w[j][i] * x[j][i];
    return sum;
  }
};

template <int kWidth, int kTaps, class Real>
__device__ __forceinline__ void read_weight(const Place& place, const Real* weight, Real (&w)[kTaps][kWidth]) {
#pragma unroll
  for (int j = 0; j < kTaps; ++j)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) w[j][i] = weight[j * place.hidden + place.column + i];
}

template <class T, int kWidth>
__device__ __forceinline__ void write(T* to, const RealOf<T> (&values)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) from_real(values[i], pack.at[i]);
  store<kWidth>(to, 0, pack);
}

}  // namespace short_conv

template <class T, int kWidth, int kTaps, bool kSilu>
__global__ void __launch_bounds__(short_conv::kThreads, short_conv::kBlocks<kTaps>)
    short_conv_forward(const T* __restrict__ u, const RealOf<T>* __restrict__ weight, const T* __restrict__ last,
                       const bool* __restrict__ reset, T* __restrict__ v, T* __restrict__ left, long long steps,
                       long long batch, long long hidden, long long piece) {
  using Real = RealOf<T>;
  const short_conv::Place place(kWidth, steps, batch, hidden, piece);
  if (!place.inside) return;
  Real w[kTaps][kWidth];
  short_conv::read_weight(place, weight, w);
  short_conv::Window<T, kWidth, kTaps> window(place, u, last, reset);
  const long long stride = batch * hidden;
  long long at = place.at(place.first);
#pragma unroll 4
  for (long long t = place.first; t < place.end; ++t, at += stride) {
    window.push(u + at, reset != nullptr && reset[t * batch + place.row]);
    Real out[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real sum = window.sum(w, i);
      out[i] = kSilu ? sum * sigmoid<MathOf<T>>(sum) : sum;
    }
    short_conv::write(v + at, out);
  }
  if (place.end != steps) return;
#pragma unroll
  for (int j = 0; j < kTaps - 1; ++j) short_conv::write(left + place.template edge<kTaps>(kTaps - 2 - j), window.x[j]);
}

template <class T, int kWidth, int kTaps, bool kSilu>
__global__ void __launch_bounds__(short_conv::kThreads, short_conv::kBlocks<kTaps>)
    short_conv_backward(const T* __restrict__ dv, const T* __restrict__ dleft, const T* __restrict__ u,
                        const RealOf<T>* __restrict__ weight, const T* __restrict__ last,
                        const bool* __restrict__ reset, T* __restrict__ du, RealOf<T>* __restrict__ dweight,
                        T* __restrict__ dlast, long long steps, long long batch, long long hidden, long long piece) {
  using Real = RealOf<T>;
  const short_conv::Place place(kWidth, steps, batch, hidden, piece);
  if (!place.inside) return;
  Real w[kTaps][kWidth], dw[kTaps][kWidth] = {}, dx[kTaps][kWidth] = {};  // dx: of the inputs in the window, so far
  short_conv::read_weight(place, weight, w);
  short_conv::Window<T, kWidth, kTaps> window(place, u, last, reset);

  const long long stride = batch * hidden, behind = place.end + kTaps - 1 < steps ? place.end + kTaps - 1 : steps;
  long long at = place.at(place.first);
  // The gradient of step t's input, at `where`. Steps before the first are of `last`, others' pieces not this thread's.
  auto finish = [&](long long t, long long where, const Real (&gradient)[kWidth]) {
    if (t >= place.end || t < (place.first == 0 ? 1 - kTaps : place.first)) return;
    short_conv::write(t >= 0 ? du + where : dlast + place.template edge<kTaps>(t + kTaps - 1), gradient);
  };
#pragma unroll 2
  for (long long t = place.first; t < behind; ++t, at += stride) {
    window.push(u + at, reset != nullptr && reset[t * batch + place.row]);
    const auto given = load<kWidth>(dv, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Real g = to_real(given.at[i]);
      if (kSilu) {
        const Real sum = window.sum(w, i);
        const Gate<MathOf<T>> gate(sum);
        g *= gate.open + sum * gate.slope;
      }
#pragma unroll
      for (int j = kTaps - 1; j >= 0; --j) {
        dx[j][i] = (j > 0 ? dx[j - 1][i] : Real(0)) + (j <= window.alive ? w[j][i] * g : Real(0));
        if (t < place.end) dw[j][i] += g * window.x[j][i];
      }
    }
    finish(t - (kTaps - 1), at - (kTaps - 1) * stride, dx[kTaps - 1]);
  }
  if (behind == steps) {
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
      if (dleft != nullptr && j <= window.alive) {
        const auto given = load<kWidth>(dleft, place.template edge<kTaps>(kTaps - 2 - j));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dx[j][i] += to_real(given.at[i]);
      }
      finish(steps - 1 - j, at - (j + 1) * stride, dx[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j)
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      dweight[((place.piece * batch + place.row) * kTaps + j) * hidden + place.column + i] = dw[j][i];
}
