// One step of the loop backend, all but its matrix product: a row of the batch is a row of blocks, a thread owns kWidth
// neighbouring columns. Tensors are (B, H); their rows are dense, and only `pre` and `dh` may lie apart from each other.
// A pointer that is not needed is null. With kWidth > 1, hidden and the row strides are its multiples, and all pointers
// are aligned to packs. Every argument has 8 bytes: the host writes them as one table.
#pragma once

#include "cells.cuh"
#include "numbers.cuh"

constexpr int kStepThreads = 256;

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

// h = f(pre + rec), and v = pre + rec where a backward pass will need it. `carry` is h as the next step's product shall
// see it: zero in the rows that `reset_next` names.
template <class Cell, class T, int kWidth>
__global__ void __launch_bounds__(kStepThreads)
    step_forward(const T* __restrict__ pre, long long pre_stride, const T* __restrict__ rec,
                 const bool* __restrict__ reset_next, T* __restrict__ v, T* __restrict__ h, T* __restrict__ carry,
                 long long hidden) {
  const long long row = blockIdx.x;
  const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  const long long index = row * hidden + column;
  const bool reset = reset_next != nullptr && reset_next[row];
  static_assert(Cell::kGates == 1, "one pre-activation a unit");

  const auto pre_pack = load<kWidth>(pre, row * pre_stride + column);
  Pack<T, kWidth> rec_pack, v_pack, h_pack, carry_pack;
  if (rec != nullptr) rec_pack = load<kWidth>(rec, index);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    RealOf<T> sum[1] = {to_real(pre_pack.at[i])};
    if (rec != nullptr) sum[0] += to_real(rec_pack.at[i]);
    from_real(sum[0], v_pack.at[i]);
    from_real(Cell::template forward<MathOf<T>>(sum), h_pack.at[i]);
    carry_pack.at[i] = reset ? T{} : h_pack.at[i];
  }
  if (v != nullptr) store<kWidth>(v, index, v_pack);
  store<kWidth>(h, index, h_pack);
  if (carry != nullptr) store<kWidth>(carry, index, carry_pack);
}

// dpre = (dh + drec) ⊙ f′(v), drec being the next step's gradient: it stops in the rows that `reset_next` names.
template <class Cell, class T, int kWidth>
__global__ void __launch_bounds__(kStepThreads)
    step_backward(const T* __restrict__ dh, long long dh_stride, const T* __restrict__ drec,
                  const bool* __restrict__ reset_next, const T* __restrict__ v, T* __restrict__ dpre,
                  long long hidden) {
  const long long row = blockIdx.x;
  const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  const long long index = row * hidden + column;
  const bool reset = reset_next != nullptr && reset_next[row];
  const bool has_drec = drec != nullptr && !reset;

  const auto v_pack = load<kWidth>(v, index);
  Pack<T, kWidth> dh_pack, drec_pack, dpre_pack;
  if (dh != nullptr) dh_pack = load<kWidth>(dh, row * dh_stride + column);
  if (has_drec) drec_pack = load<kWidth>(drec, index);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    RealOf<T> gradient = dh != nullptr ? to_real(dh_pack.at[i]) : RealOf<T>(0);
    if (has_drec) gradient += to_real(drec_pack.at[i]);
    const RealOf<T> sum[1] = {to_real(v_pack.at[i])};
    RealOf<T> slope[1];
    Cell::template slope<MathOf<T>>(sum, slope);
    from_real(gradient * slope[0], dpre_pack.at[i]);
  }
  store<kWidth>(dpre, index, dpre_pack);
}
