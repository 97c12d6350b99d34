// All T steps of a recurrence whose units do not see each other, rec = w ⊙ h_{t-1}, in one launch, and its gradient. A
// thread owns kWidth neighbouring units of one batch row for the whole sequence, so nothing is exchanged, and a step
// costs what its numbers cost to move.
//
// What a step reads does not depend on the state, so a thread keeps two windows of steps in registers: while it walks
// through one, the other's loads are on their way. The loads of a window are issued together because a warp has six
// scoreboards only, and would otherwise wait for the youngest load of all when it needs the oldest.
//
// Tensors are (T, B, n, H) where a unit has n values, states (B, H), weight and bias (kProducts, H), and dweight (B,
// kProducts, H) and dpre_sum (B, kGates, H): a row's sums over time. Only `pre`, `kept` and `dh` may have steps, rows and gates that lie apart. A pointer
// that is not needed is null. With kWidth > 1, hidden and those strides are its multiples, and all pointers are aligned
// to packs. A step of any tensor has less than 4 GB. Every argument has 8 bytes.
#pragma once

#include "cells.cuh"
#include "numbers.cuh"

namespace diagonal {

constexpr int kThreads = 64;  // few, so that a small problem still reaches every multiprocessor
constexpr int kBlocks = 4;    // of them fit a multiprocessor: 255 registers a thread

// Of cells that compute much a step and move much: more warps hide each other's latencies, and their windows need not be
// as long. 168 registers a thread, and a third of them for what is on its way.
template <class Cell, class T>
constexpr bool kHeavy = Cell::kGates > 1 && sizeof(T) == 2;
template <class Cell, class T>
constexpr int kBlocksOf = kHeavy<Cell, T> ? 6 : kBlocks;
template <class Cell, class T>
constexpr int kWindowWords = kHeavy<Cell, T> ? 36 : 56;

// A pack as one word, which is what moves: as numbers, each 16 bits of it would take a register.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = u16;
};
template <>
struct WordOf<4> {
  using Type = u32;
};
template <>
struct WordOf<8> {
  using Type = u64;
};
template <class T, int kWidth>
using Word = typename WordOf<kWidth * sizeof(T)>::Type;

template <class T, int kWidth>
__device__ __forceinline__ Word<T, kWidth> pack(const RealOf<T> (&values)[kWidth]) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    return T::pack(values[0], values[1]);
  } else {
    Pack<T, kWidth> numbers;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) from_real(values[j], numbers.at[j]);
    Word<T, kWidth> word;
    memcpy(&word, &numbers, sizeof word);
    return word;
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void unpack(Word<T, kWidth> word, RealOf<T> (&values)[kWidth]) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    values[0] = T::low(word), values[1] = T::high(word);
  } else {
    Pack<T, kWidth> numbers;
    memcpy(&numbers, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = to_real(numbers.at[j]);
  }
}

template <int kWidth, class T>
__device__ __forceinline__ Word<T, kWidth> fetch(const T* from) {
  return *reinterpret_cast<const Word<T, kWidth>*>(from);
}

template <int kWidth, class T>
__device__ __forceinline__ void write(T* to, Word<T, kWidth> word) {
  *reinterpret_cast<Word<T, kWidth>*>(to) = word;
}

// Zeros where there is nothing to read.
template <int kWidth, class T>
__device__ __forceinline__ void read(const T* base, long long index, RealOf<T> (&values)[kWidth]) {
  unpack<T, kWidth>(base != nullptr ? fetch<kWidth>(base + index) : Word<T, kWidth>(0), values);
}

// Some steps of what a thread reads: kInputs packs and a reset each, kMostWords words in all. Two windows fill half the
// registers, and the code of a walk, which is written out in full, fits the instruction cache.
template <class T, int kWidth, int kInputs, int kMostWords = 56>
struct Window {
  static constexpr int kWords = kInputs * ((kWidth * sizeof(T) + 3) / 4) + 1;
  static constexpr int kDepth = kMostWords / kWords > 24 ? 24 : kMostWords / kWords;
  Word<T, kWidth> words[kDepth][kInputs];
  bool reset[kDepth];
};

// Where x[t] has this thread's units. A step's bytes fit 32 bits, so that an address is one multiplication.
template <class T>
struct Steps {
  T* first;
  u32 bytes;
  __device__ __forceinline__ Steps(T* first, long long stride) : first(first), bytes(stride * sizeof(T)) {}
  __device__ __forceinline__ T* operator[](u32 t) const {
    return (T*)((const char*)first + static_cast<u64>(t) * bytes);
  }
};

// The units of this thread.
struct Place {
  long long row, column, batch, hidden;
  bool inside;

  __device__ __forceinline__ Place(int width, long long batch, long long hidden) : batch(batch), hidden(hidden) {
    const long long item = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x, items = hidden / width;
    row = item / items, column = item % items * width, inside = row < batch;
  }
  // Value i of n a unit, in one step of a tensor.
  __device__ __forceinline__ long long at(int i = 0, int n = 1) const { return (row * n + i) * hidden + column; }
  template <class T>
  __device__ __forceinline__ Steps<T> steps(T* base, int i = 0, int n = 1) const {
    return {base + at(i, n), batch * n * hidden};
  }
  template <class T>
  __device__ __forceinline__ Steps<T> steps(T* base, long long step, long long row_stride) const {
    return {base + row * row_stride + column, step};
  }
};

// Calls step(t, words, reset) for all t in order, backwards if so asked, with two windows that fill(t, words) loads in
// turn.
template <class Window, bool kBackward, class Fill, class Step>
__device__ __forceinline__ void walk(u32 steps, const bool* reset, const Place& place, const Fill& fill,
                                     const Step& step) {
  constexpr int kDepth = Window::kDepth;
  const Steps<const bool> resets(reset + place.row, place.batch);
  // Past the end the last step is loaded again: cheaper than a branch a load.
  auto time = [&](u32 turn) { return kBackward ? steps - 1 - min(turn, steps - 1) : min(turn, steps - 1); };
  auto load = [&](Window& window, u32 first) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      fill(time(first + i), window.words[i]);
      window.reset[i] = false;
    }
    if (reset == nullptr) return;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) window.reset[i] = *resets[time(first + i)];
  };
  auto use = [&](const Window& window, u32 first) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (first + i < steps) step(kBackward ? steps - 1 - (first + i) : first + i, window.words[i], window.reset[i]);
  };
  Window even, odd;
  load(even, 0);
#pragma unroll 1
  for (u32 first = 0; first < steps; first += 2 * kDepth) {
    load(odd, first + kDepth);
    use(even, first);
    load(even, first + 2 * kDepth);
    use(odd, first + kDepth);
  }
}

}  // namespace diagonal

// `h` takes the state h of every step, `saved` what the cell saves if it is not additive, `memories` the other state if
// there is one and it is not logarithmic, and `last_memory` its last.
template <class Cell, class T, int kWidth, class Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocksOf<Cell, T>)
    diagonal_forward(const T* __restrict__ pre, long long pre_step, long long pre_row, long long pre_gate,
                     const T* __restrict__ weight, const T* __restrict__ bias, const T* __restrict__ h0,
                     const Memory* __restrict__ memory0, const bool* __restrict__ reset, T* __restrict__ h,
                     T* __restrict__ saved, Memory* __restrict__ memories, Memory* __restrict__ last_memory,
                     long long steps, long long batch, long long hidden) {
  using Real = RealOf<T>;
  using Word = diagonal::Word<T, kWidth>;
  constexpr int kGates = Cell::kGates, kProducts = Cell::kProducts, kSaved = Cell::kSaved;
  constexpr bool kTwoStates = Cell::kStates == 2;
  using Window = diagonal::Window<T, kWidth, kGates, diagonal::kWindowWords<Cell, T>>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto pres = place.steps(pre, pre_step, pre_row);
  const auto hs = place.steps(h), saves = place.steps(saved, 0, kSaved);
  const auto others = place.steps(memories);

  Real w[kProducts][kWidth], b[kProducts][kWidth], state[kWidth], memory[kWidth];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    diagonal::read<kWidth>(weight, p * hidden + place.column, w[p]);
    diagonal::read<kWidth>(bias, p * hidden + place.column, b[p]);
  }
  diagonal::read<kWidth>(h0, place.at(), state);
  diagonal::read<kWidth>(memory0, place.at(), memory);

  auto fill = [&](u32 t, Word (&words)[kGates]) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) words[gate] = diagonal::fetch<kWidth>(pres[t] + gate * pre_gate);
  };
  auto step = [&](u32 t, const Word (&words)[kGates], bool reset) {
    Real given[kGates][kWidth], kept[kSaved][kWidth];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) diagonal::unpack<T, kWidth>(words[gate], given[gate]);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Real previous = reset ? Real(0) : state[j];
      Real unit_memory = !kTwoStates ? previous : reset ? Real(0) : memory[j];
      Real unit_pre[kGates], unit_rec[kProducts], unit_saved[kSaved];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) unit_pre[gate] = given[gate][j];
#pragma unroll
      for (int p = 0; p < kProducts; ++p)
        unit_rec[p] = Cell::kAdditive ? w[p][j] * previous : w[p][j] * previous + b[p][j];
      state[j] = Cell::template forward<MathOf<T>>(unit_pre, unit_rec, unit_memory, unit_saved);
      memory[j] = unit_memory;
#pragma unroll
      for (int value = 0; value < kSaved; ++value) kept[value][j] = unit_saved[value];
    }
    // The states go on as they are stored, so that a sequence in chunks gives the same values as in one piece.
    const Word h_word = diagonal::pack<T>(state);
    const auto memory_word = diagonal::pack<Memory>(memory);
    diagonal::unpack<T, kWidth>(h_word, state), diagonal::unpack<Memory, kWidth>(memory_word, memory);
    diagonal::write<kWidth>(hs[t], h_word);
    if (!Cell::kAdditive && saved != nullptr) {
#pragma unroll
      for (int value = 0; value < kSaved; ++value)
        diagonal::write<kWidth>(saves[t] + value * hidden, diagonal::pack<T>(kept[value]));
    }
    if (kTwoStates && !Cell::kLogarithmic && memories != nullptr) diagonal::write<kWidth>(others[t], memory_word);
  };
  diagonal::walk<Window, false>(steps, reset, place, fill, step);
  if (kTwoStates) diagonal::write<kWidth>(last_memory + place.at(), diagonal::pack<Memory>(memory));
}

// `kept` is pre where the cell is additive, for it saves pre + w ⊙ h, whose terms are there, and writing the sum would cost
// more than adding again; else it is what the cell saved. A logarithmic memory stands for h but for its rounding, so h takes
// its place, except before the first step. `drec` is written only where it is no part of `dpre`.
template <class Cell, class T, int kWidth, class Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(diagonal::kThreads, diagonal::kBlocksOf<Cell, T>)
    diagonal_backward(const T* __restrict__ dh, long long dh_step, long long dh_row, const T* __restrict__ kept,
                      long long kept_step, long long kept_row, long long kept_value, const T* __restrict__ weight,
                      const T* __restrict__ h0, const Memory* __restrict__ memory0, const T* __restrict__ dh_last,
                      const Memory* __restrict__ dmemory_last, const bool* __restrict__ reset,
                      const T* __restrict__ h, const Memory* __restrict__ memories,
                      T* __restrict__ dpre, T* __restrict__ drec, T* __restrict__ dh0, Memory* __restrict__ dmemory0,
                      RealOf<T>* __restrict__ dweight, RealOf<T>* __restrict__ dpre_sum, long long steps, long long batch,
                      long long hidden) {
  using Real = RealOf<T>;
  using Word = diagonal::Word<T, kWidth>;
  using MemoryWord = diagonal::Word<Memory, kWidth>;
  constexpr int kGates = Cell::kGates, kProducts = Cell::kProducts, kSaved = Cell::kSaved, kSlopes = Cell::kSlopes;
  constexpr bool kTwoStates = Cell::kStates == 2, kOther = kTwoStates && !Cell::kLogarithmic;
  // What a step reads, in this order: dh, h of the step before, `kept`, the memory of the step before, which may be as
  // wide as two of the others.
  constexpr int kFirstSaved = 2, kMemory = kFirstSaved + kSaved, kMemoryWords = sizeof(Memory) / sizeof(T);
  constexpr int kInputs = kMemory + (kOther ? kMemoryWords : 0);
  using Window = diagonal::Window<T, kWidth, kInputs, diagonal::kWindowWords<Cell, T>>;
  const diagonal::Place place(kWidth, batch, hidden);
  if (!place.inside) return;
  const auto dhs = place.steps(dh, dh_step, dh_row);
  const auto keeps = place.steps(kept, kept_step, kept_row);
  const auto hs = place.steps(h);
  const auto others = place.steps(memories);
  const auto dpres = place.steps(dpre, 0, kGates), drecs = place.steps(drec, 0, kProducts);
  // Without h0 the state before step 0 is zero, as after a reset; what is loaded in its place does not matter.
  const u32 start = h0 == nullptr ? 0 : ~0u;
  const T* first_h = h0 != nullptr ? h0 + place.at() : hs[0];
  const Memory* first_memory = memory0 != nullptr ? memory0 + place.at() : others[0];

  Real w[kProducts][kWidth], dw[kProducts][kWidth] = {}, sums[kGates][kWidth] = {}, carried[kWidth], dmemory[kWidth];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) diagonal::read<kWidth>(weight, p * hidden + place.column, w[p]);
  diagonal::read<kWidth>(dh_last, place.at(), carried);
  diagonal::read<kWidth>(dmemory_last, place.at(), dmemory);
  Real first_number[kWidth] = {};
  if constexpr (Cell::kLogarithmic) {
    diagonal::read<kWidth>(memory0, place.at(), first_number);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) first_number[j] = Cell::template number<MathOf<T>>(first_number[j]);
  }

  auto fill = [&](u32 t, Word (&words)[kInputs]) {
    words[0] = diagonal::fetch<kWidth>(dhs[t]);
    words[1] = diagonal::fetch<kWidth>(t > 0 ? hs[t - 1] : first_h);
#pragma unroll
    for (int value = 0; value < kSaved; ++value)
      words[kFirstSaved + value] = diagonal::fetch<kWidth>(keeps[t] + value * kept_value);
    if constexpr (kOther) {
      const MemoryWord word = diagonal::fetch<kWidth>(t > 0 ? others[t - 1] : first_memory);
      words[kMemory] = static_cast<Word>(word);
      if constexpr (kMemoryWords == 2) words[kMemory + 1] = static_cast<Word>(word >> 8 * sizeof(Word));
    }
  };
  auto step = [&](u32 t, const Word (&words)[kInputs], bool reset) {
    Real values[kMemory][kWidth], before[kWidth], of_gates[kGates][kWidth], of_products[kProducts][kWidth];
#pragma unroll
    for (int i = 0; i < kMemory; ++i) diagonal::unpack<T, kWidth>(words[i], values[i]);
    if constexpr (kOther) {
      MemoryWord word = words[kMemory];
      if constexpr (kMemoryWords == 2) word |= static_cast<MemoryWord>(words[kMemory + 1]) << 8 * sizeof(Word);
      diagonal::unpack<Memory, kWidth>(word, before);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) before[j] = Cell::kLogarithmic && t == 0 ? first_number[j] : values[1][j];
    }
    const bool fresh = reset || t == start;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Real previous = fresh ? Real(0) : values[1][j], unit_memory = fresh ? Real(0) : before[j];
      Real unit_saved[kSaved], slope[kSlopes], unit_dpre[kGates], unit_drec[kProducts];
#pragma unroll
      for (int value = 0; value < kSaved; ++value) {
        unit_saved[value] = values[kFirstSaved + value][j];
        if (Cell::kAdditive && value < kProducts) unit_saved[value] += w[value % kProducts][j] * previous;
      }
      if constexpr (Cell::kLogarithmic) {
        Cell::Linear::template slopes<MathOf<T>>(unit_saved, unit_memory, slope);
      } else {
        Cell::template slopes<MathOf<T>>(unit_saved, unit_memory, slope);
      }
      Cell::backward(slope, values[0][j] + carried[j], dmemory[j], unit_dpre, unit_drec);
      Real sum = 0;
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        of_products[p][j] = unit_drec[p];
        sum += unit_drec[p] * w[p][j];
        dw[p][j] += unit_drec[p] * previous;
      }
      carried[j] = fresh ? Real(0) : sum;
      if (fresh) dmemory[j] = 0;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) sums[gate][j] += of_gates[gate][j] = unit_dpre[gate];
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      diagonal::write<kWidth>(dpres[t] + gate * hidden, diagonal::pack<T>(of_gates[gate]));
    if (!Cell::kAdditive) {
#pragma unroll
      for (int p = 0; p < kProducts; ++p)
        diagonal::write<kWidth>(drecs[t] + p * hidden, diagonal::pack<T>(of_products[p]));
    }
  };
  diagonal::walk<Window, true>(steps, reset, place, fill, step);

  if (dh0 != nullptr) {
    // One state that is also the memory has both gradients.
    if (Cell::kReadsMemory && !kTwoStates) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) carried[j] += dmemory[j];
    }
    diagonal::write<kWidth>(dh0 + place.at(), diagonal::pack<T>(carried));
    if (kTwoStates) diagonal::write<kWidth>(dmemory0 + place.at(), diagonal::pack<Memory>(dmemory));
  }
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dweight[place.at(p, kProducts) + j] = dw[p][j];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dpre_sum[place.at(gate, kGates) + j] = sums[gate][j];
}
