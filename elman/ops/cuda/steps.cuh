// One step of the loop backend, all but its matrix product: a row of the batch is a row of blocks, a thread owns kWidth
// neighbouring columns. Tensors are (B, H), or (B, n, H) where a unit has n values; their rows are dense, and only those
// of `pre` and `dh` may lie apart from each other.
// A pointer that is not needed is null. With kWidth > 1, hidden and the row strides are its multiples, and all pointers
// are aligned to packs. Every argument has 8 bytes: the host writes them as one table.
#pragma once

#include "cells.cuh"
#include "numbers.cuh"

constexpr int kStepThreads = 256;

// The cell's forward. `memory` is the state that it reads, as the step before left it, and zero in the rows that `reset`
// names; `state` takes the one that is not h. `carry` is h as the next step's product shall see it: zero in the rows that
// `reset_next` names.
template <class Cell, class T, int kWidth, class Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(kStepThreads)
    step_forward(const T* __restrict__ pre, long long pre_stride, long long gate_stride, const T* __restrict__ rec,
                 const T* __restrict__ bias, const bool* __restrict__ reset, const bool* __restrict__ reset_next,
                 const Memory* memory, T* __restrict__ saved, T* h, Memory* state, T* __restrict__ carry,
                 long long hidden) {
  using Real = RealOf<T>;
  const long long row = blockIdx.x;
  const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  const long long index = row * hidden + column;
  const bool carried = reset_next == nullptr || !reset_next[row];
  const bool remembered = Cell::kReadsMemory && memory != nullptr && (reset == nullptr || !reset[row]);

  Pack<T, kWidth> pre_pack[Cell::kGates], rec_pack[Cell::kProducts], bias_pack[Cell::kProducts];
  Pack<Memory, kWidth> memory_pack, state_pack;
#pragma unroll
  for (int gate = 0; gate < Cell::kGates; ++gate)
    pre_pack[gate] = load<kWidth>(pre, row * pre_stride + gate * gate_stride + column);
#pragma unroll
  for (int product = 0; product < Cell::kProducts; ++product) {
    if (rec != nullptr)
      rec_pack[product] = load<kWidth>(rec, (row * Cell::kProducts + product) * hidden + column);
    if (!Cell::kAdditive && bias != nullptr) bias_pack[product] = load<kWidth>(bias, product * hidden + column);
  }
  if (remembered) memory_pack = load<kWidth>(memory, index);

  Pack<T, kWidth> saved_pack[Cell::kSaved], h_pack, carry_pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    Real unit_pre[Cell::kGates], unit_rec[Cell::kProducts], unit_saved[Cell::kSaved];
#pragma unroll
    for (int gate = 0; gate < Cell::kGates; ++gate) unit_pre[gate] = to_real(pre_pack[gate].at[i]);
#pragma unroll
    for (int product = 0; product < Cell::kProducts; ++product) {
      unit_rec[product] = rec != nullptr ? to_real(rec_pack[product].at[i]) : Real(0);
      if (!Cell::kAdditive && bias != nullptr) unit_rec[product] += to_real(bias_pack[product].at[i]);
    }
    Real unit_memory = remembered ? to_real(memory_pack.at[i]) : Real(0);
    from_real(Cell::template forward<MathOf<T>>(unit_pre, unit_rec, unit_memory, unit_saved), h_pack.at[i]);
    if (Cell::kStates == 2) from_real(unit_memory, state_pack.at[i]);
#pragma unroll
    for (int value = 0; value < Cell::kSaved; ++value) from_real(unit_saved[value], saved_pack[value].at[i]);
    carry_pack.at[i] = carried ? h_pack.at[i] : T{};
  }
  if (saved != nullptr) {
#pragma unroll
    for (int value = 0; value < Cell::kSaved; ++value)
      store<kWidth>(saved, (row * Cell::kSaved + value) * hidden + column, saved_pack[value]);
  }
  store<kWidth>(h, index, h_pack);
  if (Cell::kStates == 2) store<kWidth>(state, index, state_pack);
  if (carry != nullptr) store<kWidth>(carry, index, carry_pack);
}

// The cell's backward. `dh_next` is what the next step's products gave to h, and `dmemory` what its cell gave to the
// memory, where this step's cell puts its own: neither crosses into the rows that `reset_next` names. `memory` and
// `reset` are as in step_forward; `drec` is written only where it is no part of `dpre`.
template <class Cell, class T, int kWidth, class Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(kStepThreads)
    step_backward(const T* __restrict__ dh, long long dh_stride, const T* __restrict__ dh_next,
                  RealOf<T>* __restrict__ dmemory, const bool* __restrict__ reset, const bool* __restrict__ reset_next,
                  const T* __restrict__ saved, const Memory* __restrict__ memory, T* __restrict__ dpre, T* __restrict__ drec,
                  long long hidden) {
  using Real = RealOf<T>;
  const long long row = blockIdx.x;
  const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  const long long index = row * hidden + column;
  const bool carried = reset_next == nullptr || !reset_next[row];
  const bool has_next = dh_next != nullptr && carried;
  const bool remembered = Cell::kReadsMemory && memory != nullptr && (reset == nullptr || !reset[row]);

  Pack<T, kWidth> saved_pack[Cell::kSaved], dh_pack, next_pack;
  Pack<Memory, kWidth> memory_pack;
  Pack<Real, kWidth> dmemory_pack;
#pragma unroll
  for (int value = 0; value < Cell::kSaved; ++value)
    saved_pack[value] = load<kWidth>(saved, (row * Cell::kSaved + value) * hidden + column);
  if (dh != nullptr) dh_pack = load<kWidth>(dh, row * dh_stride + column);
  if (has_next) next_pack = load<kWidth>(dh_next, index);
  if (remembered) memory_pack = load<kWidth>(memory, index);
  if (Cell::kReadsMemory) dmemory_pack = load<kWidth>(dmemory, index);

  Pack<T, kWidth> dpre_pack[Cell::kGates], drec_pack[Cell::kProducts];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    Real gradient = dh != nullptr ? to_real(dh_pack.at[i]) : Real(0);
    if (has_next) gradient += to_real(next_pack.at[i]);
    Real unit_saved[Cell::kSaved], slope[Cell::kSlopes], unit_dpre[Cell::kGates], unit_drec[Cell::kProducts];
#pragma unroll
    for (int value = 0; value < Cell::kSaved; ++value) unit_saved[value] = to_real(saved_pack[value].at[i]);
    Cell::template slopes<MathOf<T>>(unit_saved, remembered ? to_real(memory_pack.at[i]) : Real(0), slope);
    Real unit_dmemory = Cell::kReadsMemory && carried ? dmemory_pack.at[i] : Real(0);
    Cell::backward(slope, gradient, unit_dmemory, unit_dpre, unit_drec);
    if (Cell::kReadsMemory) dmemory_pack.at[i] = unit_dmemory;
#pragma unroll
    for (int gate = 0; gate < Cell::kGates; ++gate) from_real(unit_dpre[gate], dpre_pack[gate].at[i]);
#pragma unroll
    for (int product = 0; product < Cell::kProducts; ++product) from_real(unit_drec[product], drec_pack[product].at[i]);
  }
#pragma unroll
  for (int gate = 0; gate < Cell::kGates; ++gate)
    store<kWidth>(dpre, (row * Cell::kGates + gate) * hidden + column, dpre_pack[gate]);
  if (!Cell::kAdditive) {
#pragma unroll
    for (int product = 0; product < Cell::kProducts; ++product)
      store<kWidth>(drec, (row * Cell::kProducts + product) * hidden + column, drec_pack[product]);
  }
  if (Cell::kReadsMemory) store<kWidth>(dmemory, index, dmemory_pack);
}
