// The linear recurrence h_t = a_t h_{t-1} + b_t, all T steps in one launch, and its gradient. A thread owns kWidth
// neighbouring units of one batch row for the whole sequence, as in diagonal.cuh, so that every tensor is read and written
// once, and a step costs what its numbers cost to move. Sums are of RealOf<T>; h is rounded only where it is stored.
//
// Tensors are contiguous: a, b, h, dh, da, db (T, B, H), h0 and dh0 (B, H), reset (T, B). What is null is not there, or not
// wanted. A step of any tensor has less than 4 GB. Every argument has 8 bytes.
#pragma once

#include "diagonal.cuh"

template <class T, int kWidth>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocks)
    scan_forward(const T* __restrict__ a, const T* __restrict__ b, const T* __restrict__ h0,
                 const bool* __restrict__ reset, T* __restrict__ h, long long steps, long long batch, long long hidden) {
  using Real = RealOf<T>;
  using Word = diagonal::Word<T, kWidth>;
  using Window = diagonal::Window<T, kWidth, 2>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto as = place.steps(a), bs = place.steps(b);
  const auto hs = place.steps(h);

  Real state[kWidth];
  diagonal::read<kWidth>(h0, place.at(), state);

  auto fill = [&](u32 t, Word (&words)[2]) {
    words[0] = diagonal::fetch<kWidth>(as[t]), words[1] = diagonal::fetch<kWidth>(bs[t]);
  };
  auto step = [&](u32 t, const Word (&words)[2], bool reset) {
    Real keep[kWidth], take[kWidth];
    diagonal::unpack<T, kWidth>(words[0], keep), diagonal::unpack<T, kWidth>(words[1], take);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) state[j] = reset ? take[j] : keep[j] * state[j] + take[j];
    diagonal::write<kWidth>(hs[t], diagonal::pack<T>(state));
  };
  diagonal::walk<Window, false>(steps, reset, place, fill, step);
}

// db_t = dh_t + a_{t+1} db_{t+1}, da_t = db_t h_{t-1}, and neither crosses a reset.
template <class T, int kWidth>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocks)
    scan_backward(const T* __restrict__ dh, const T* __restrict__ a, const T* __restrict__ h, const T* __restrict__ h0,
                  const bool* __restrict__ reset, T* __restrict__ da, T* __restrict__ db, T* __restrict__ dh0,
                  long long steps, long long batch, long long hidden) {
  using Real = RealOf<T>;
  using Word = diagonal::Word<T, kWidth>;
  using Window = diagonal::Window<T, kWidth, 3>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto dhs = place.steps(dh), as = place.steps(a), hs = place.steps(h);
  const auto das = place.steps(da), dbs = place.steps(db);
  // Without h0 the state before step 0 is zero, as after a reset; what is loaded in its place does not matter.
  const u32 start = h0 == nullptr ? 0 : ~0u;
  const T* first = h0 != nullptr ? h0 + place.at() : hs[0];

  Real carried[kWidth] = {};
  auto fill = [&](u32 t, Word (&words)[3]) {
    words[0] = diagonal::fetch<kWidth>(dhs[t]), words[1] = diagonal::fetch<kWidth>(as[t]);
    words[2] = diagonal::fetch<kWidth>(t > 0 ? hs[t - 1] : first);
  };
  auto step = [&](u32 t, const Word (&words)[3], bool reset) {
    Real through[kWidth], keep[kWidth], before[kWidth], to_a[kWidth];
    diagonal::unpack<T, kWidth>(words[0], through), diagonal::unpack<T, kWidth>(words[1], keep);
    diagonal::unpack<T, kWidth>(words[2], before);
    const bool fresh = reset || t == start;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      through[j] += carried[j];
      to_a[j] = fresh ? Real(0) : through[j] * before[j];
      carried[j] = fresh ? Real(0) : keep[j] * through[j];
    }
    diagonal::write<kWidth>(dbs[t], diagonal::pack<T>(through));
    diagonal::write<kWidth>(das[t], diagonal::pack<T>(to_a));
  };
  diagonal::walk<Window, true>(steps, reset, place, fill, step);
  if (dh0 != nullptr) diagonal::write<kWidth>(dh0 + place.at(), diagonal::pack<T>(carried));
}
