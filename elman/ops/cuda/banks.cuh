// Banks m_i ← a_i m_i + (1 − a_i) h and what is shown of them, y = h silu(z_0) + Σ m_i silu(z_i): all T steps in one launch,
// and the gradient. A thread owns kWidth neighbouring units of one batch row with their kBanks banks, as in diagonal.cuh,
// so that every tensor is read and written once and the banks never lie in memory.
//
// The backward pass needs the banks of every step. It makes them again, kSteps steps at a time, from checkpoints that the
// forward pass leaves before every kSteps-th step: going back by dividing by a_i would multiply their rounding.
//
// Tensors are contiguous: h, y (T, B, H), z (T, B, kBanks + 1, H), decay (kBanks, H), banks (B, kBanks, H), checkpoints
// (ceil(T / kSteps), B, kBanks, H), and ddecay as the banks, a row's sum over time. Decay and banks are of RealOf<T>. What
// is null is not there, or not wanted. A step of any tensor has less than 4 GB. Every argument has 8 bytes.
#pragma once

#include "diagonal.cuh"

template <class T, int kWidth, int kBanks, int kSteps>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocks)
    banks_forward(const T* __restrict__ h, const T* __restrict__ z, const RealOf<T>* __restrict__ decay,
                  const RealOf<T>* __restrict__ m0, const bool* __restrict__ reset, T* __restrict__ y,
                  RealOf<T>* __restrict__ checkpoints, RealOf<T>* __restrict__ m_last, long long steps,
                  long long batch, long long hidden) {
  using Real = RealOf<T>;
  using Word = diagonal::Word<T, kWidth>;
  constexpr int kInputs = kBanks + 2;  // h, z_0 … z_k
  using Window = diagonal::Window<T, kWidth, kInputs>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto hs = place.steps(h), zs = place.steps(z, 0, kBanks + 1);
  const auto ys = place.steps(y);
  const auto kept = place.steps(checkpoints, 0, kBanks);

  Real a[kBanks][kWidth], m[kBanks][kWidth];
#pragma unroll
  for (int i = 0; i < kBanks; ++i) {
    diagonal::read<kWidth>(decay, i * hidden + place.column, a[i]);
    diagonal::read<kWidth>(m0, place.at(i, kBanks), m[i]);
  }

  auto fill = [&](u32 t, Word (&words)[kInputs]) {
    words[0] = diagonal::fetch<kWidth>(hs[t]);
#pragma unroll
    for (int i = 0; i <= kBanks; ++i) words[1 + i] = diagonal::fetch<kWidth>(zs[t] + i * hidden);
  };
  auto step = [&](u32 t, const Word (&words)[kInputs], bool reset) {
    if (reset) {
#pragma unroll
      for (int i = 0; i < kBanks; ++i)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) m[i][j] = 0;
    }
    if (checkpoints != nullptr && t % kSteps == 0) {
#pragma unroll
      for (int i = 0; i < kBanks; ++i) diagonal::write<kWidth>(kept[t / kSteps] + i * hidden, diagonal::pack<Real>(m[i]));
    }
    Real given[kWidth], gate[kWidth], sum[kWidth];
    diagonal::unpack<T, kWidth>(words[0], given);
    diagonal::unpack<T, kWidth>(words[1], gate);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] = given[j] * gate[j] * sigmoid<MathOf<T>>(gate[j]);
#pragma unroll
    for (int i = 0; i < kBanks; ++i) {
      diagonal::unpack<T, kWidth>(words[2 + i], gate);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        m[i][j] = given[j] + a[i][j] * (m[i][j] - given[j]);
        sum[j] += m[i][j] * gate[j] * sigmoid<MathOf<T>>(gate[j]);
      }
    }
    diagonal::write<kWidth>(ys[t], diagonal::pack<T>(sum));
  };
  diagonal::walk<Window, false>(steps, reset, place, fill, step);
#pragma unroll
  for (int i = 0; i < kBanks; ++i) diagonal::write<kWidth>(m_last + place.at(i, kBanks), diagonal::pack<Real>(m[i]));
}

namespace banks {

// What the backward pass reads of kSteps steps: dy, h, z_0 … z_k and the resets, and the banks before the first of them.
template <class T, int kWidth, int kBanks, int kSteps>
struct Stretch {
  diagonal::Word<T, kWidth> words[kSteps][kBanks + 3];
  diagonal::Word<RealOf<T>, kWidth> start[kBanks];
  bool reset[kSteps];
};

}  // namespace banks

template <class T, int kWidth, int kBanks, int kSteps>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocks)
    banks_backward(const T* __restrict__ dy, const RealOf<T>* __restrict__ dm_last, const T* __restrict__ h,
                   const T* __restrict__ z, const RealOf<T>* __restrict__ decay, const bool* __restrict__ reset,
                   const RealOf<T>* __restrict__ checkpoints, T* __restrict__ dh, T* __restrict__ dz,
                   RealOf<T>* __restrict__ ddecay, RealOf<T>* __restrict__ dm0, long long steps, long long batch,
                   long long hidden) {
  using Real = RealOf<T>;
  using Stretch = banks::Stretch<T, kWidth, kBanks, kSteps>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto dys = place.steps(dy), hs = place.steps(h), zs = place.steps(z, 0, kBanks + 1);
  const auto dhs = place.steps(dh), dzs = place.steps(dz, 0, kBanks + 1);
  const auto kept = place.steps(checkpoints, 0, kBanks);
  const diagonal::Steps<const bool> resets(reset + place.row, batch);
  const u32 last = steps - 1, stretches = last / kSteps + 1;

  Real a[kBanks][kWidth], da[kBanks][kWidth] = {}, dm[kBanks][kWidth];
#pragma unroll
  for (int i = 0; i < kBanks; ++i) {
    diagonal::read<kWidth>(decay, i * hidden + place.column, a[i]);
    diagonal::read<kWidth>(dm_last, place.at(i, kBanks), dm[i]);
  }

  // Turn 0 is the last stretch. Past the end of either kind the nearest is loaded again: cheaper than a branch a load.
  auto load = [&](Stretch& stretch, u32 turn) {
    const u32 index = stretches - 1 - min(turn, stretches - 1);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const u32 t = min(index * kSteps + s, last);
      stretch.words[s][0] = diagonal::fetch<kWidth>(dys[t]);
      stretch.words[s][1] = diagonal::fetch<kWidth>(hs[t]);
#pragma unroll
      for (int i = 0; i <= kBanks; ++i) stretch.words[s][2 + i] = diagonal::fetch<kWidth>(zs[t] + i * hidden);
      stretch.reset[s] = reset != nullptr && *resets[t];
    }
#pragma unroll
    for (int i = 0; i < kBanks; ++i) stretch.start[i] = diagonal::fetch<kWidth>(kept[index] + i * hidden);
  };
  auto use = [&](const Stretch& stretch, u32 turn) {
    if (turn >= stretches) return;
    const u32 first = (stretches - 1 - turn) * kSteps;
    Real m[kSteps][kBanks][kWidth];  // before each step, its reset done
#pragma unroll
    for (int i = 0; i < kBanks; ++i) diagonal::unpack<Real, kWidth>(stretch.start[i], m[0][i]);
#pragma unroll
    for (int s = 1; s < kSteps; ++s) {
      Real given[kWidth];
      diagonal::unpack<T, kWidth>(stretch.words[s - 1][1], given);
#pragma unroll
      for (int i = 0; i < kBanks; ++i)
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          m[s][i][j] = stretch.reset[s] ? Real(0) : given[j] + a[i][j] * (m[s - 1][i][j] - given[j]);
    }
#pragma unroll
    for (int s = kSteps - 1; s >= 0; --s) {
      const u32 t = first + s;
      if (t > last) continue;
      Real through[kWidth], given[kWidth], gate[kWidth], to_h[kWidth], to_gate[kWidth];
      diagonal::unpack<T, kWidth>(stretch.words[s][0], through);
      diagonal::unpack<T, kWidth>(stretch.words[s][1], given);
      diagonal::unpack<T, kWidth>(stretch.words[s][2], gate);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Gate<MathOf<T>> open(gate[j]);
        to_h[j] = through[j] * gate[j] * open.open;
        to_gate[j] = through[j] * given[j] * (open.open + gate[j] * open.slope);
      }
      diagonal::write<kWidth>(dzs[t], diagonal::pack<T>(to_gate));
#pragma unroll
      for (int i = 0; i < kBanks; ++i) {
        diagonal::unpack<T, kWidth>(stretch.words[s][3 + i], gate);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Gate<MathOf<T>> open(gate[j]);
          const Real apart = m[s][i][j] - given[j];
          to_gate[j] = through[j] * (given[j] + a[i][j] * apart) * (open.open + gate[j] * open.slope);
          dm[i][j] += through[j] * gate[j] * open.open;
          to_h[j] += (Real(1) - a[i][j]) * dm[i][j];
          da[i][j] += dm[i][j] * apart;
          dm[i][j] = stretch.reset[s] ? Real(0) : a[i][j] * dm[i][j];
        }
        diagonal::write<kWidth>(dzs[t] + (1 + i) * hidden, diagonal::pack<T>(to_gate));
      }
      diagonal::write<kWidth>(dhs[t], diagonal::pack<T>(to_h));
    }
  };
  Stretch even, odd;
  load(even, 0);
#pragma unroll 1
  for (u32 turn = 0; turn < stretches; turn += 2) {
    load(odd, turn + 1);
    use(even, turn);
    load(even, turn + 2);
    use(odd, turn + 1);
  }

#pragma unroll
  for (int i = 0; i < kBanks; ++i) {
    diagonal::write<kWidth>(ddecay + place.at(i, kBanks), diagonal::pack<Real>(da[i]));
    diagonal::write<kWidth>(dm0 + place.at(i, kBanks), diagonal::pack<Real>(dm[i]));
  }
}
