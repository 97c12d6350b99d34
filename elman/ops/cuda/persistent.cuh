// All T steps of a recurrence in one launch: h_t = f(pre_t + W h_{t-1}) forwards, and its gradient backwards.
//
// The grid is groups x columns. A group owns some batch rows, and its CTAs split the hidden units. Each CTA keeps its
// rows of W on chip for the whole launch, as fragments of the tensor cores' stationary operand: in registers as far as
// they go, the rest in shared memory. A step computes v^T = W h^T, so that W is that operand and the few batch rows of
// a tile are the narrow one. The eight product warps split the depth K of the product: every word of the state is
// loaded once a CTA, straight from L2 into the fragment that uses it, and partial sums meet in shared memory.
//
// CTAs of a group exchange the state through a ring in global memory, and the data is its own flag: a slot holds a
// bit pattern that no published value has until the value arrives, and readers poll the words they need. That saves
// the fence and the second round trip of a flag. Batch rows are independent, so each tile of eight rows runs at its own
// pace: while one tile's state travels, the tensor cores work on the next.
//
// Roles of the 12 warps: 0-7 products; 8-10 sums, cell, publishing, outputs; 11 wipes used slots of the ring and
// prefetches inputs.
#pragma once

#include "cells.cuh"
#include "primitives.cuh"

namespace persistent {

constexpr int kProductWarps = 8;
constexpr int kCellWarps = 3;
constexpr int kThreads = (kProductWarps + kCellWarps + 1) * 32;
constexpr int kTileRows = 8;    // batch rows of a tile: the n of mma.m16n8k16
constexpr int kUnitDepth = 32;  // k of a unit of work: 16 bytes a lane, two mma deep
constexpr int kSlots = 8;       // of the exchange ring; a slot is wiped at least two steps before its next use
constexpr int kPrefetchSteps = 3;
constexpr u32 kEmpty = 0xffffffffu;  // two 16-bit NaNs that cvt.rn never returns (its NaN is 0x7fff)
constexpr u32 kSpinLimit = 1u << 23;  // polls of about 0.3 us before a wait counts as a bug

// Named barriers; 0 is __syncthreads. Sums alternate between two buffers.
constexpr int kSumsFull = 1, kSumsEmpty = 3, kStepDone = 5;
constexpr int kSumsThreads = (kProductWarps + kCellWarps) * 32;
constexpr int kStepThreads = (kCellWarps + 1) * 32;

template <typename T>
struct Problem {
  const T* input;           // forward: pre (T, B, G, H); backward: gradient of h (T, B, H)
  const T* weight;          // (G, H, H), as PyTorch's weight_hh
  const T* initial;         // forward: h0 (B, H) or null; backward: null
  const T* last_gradient;   // backward: gradient of h_last (B, H) or null
  const u8* reset;          // (T, B) or null
  T* output;                // forward: h (T, B, H); backward: gradient of pre (T, B, G, H)
  T* v;                     // (T, B, G, H) pre-activations: forward writes them if not null, backward reads them
  T* initial_gradient;      // backward: gradient of h0 (B, H) or null
  char* ring;               // kSlots x (B, K) of T, every byte 0xff before the launch
  int steps, batch, hidden;
  int tiles;                // row tiles of a group
};

// The shape of one instantiation. kRowTiles x 16 rows of W a CTA; a product warp holds kRegisterUnits units of depth in
// registers and kSharedUnits in shared memory.
template <typename Cell, bool kBackward, int kRowTiles, int kRegisterUnits, int kSharedUnits>
struct Shape {
  static constexpr int kUnits = kRegisterUnits + kSharedUnits;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kIn = kBackward ? Cell::kGates : 1;   // published values a hidden unit
  static constexpr int kOut = kBackward ? 1 : Cell::kGates;  // rows of the product a hidden unit
  static constexpr int kColumns = kRows / kOut;              // hidden units a CTA
  static constexpr int kQuads = kColumns / 4;
  static constexpr int kItems = (kTileRows * kQuads + kCellWarps * 32 - 1) / (kCellWarps * 32);
  // +4 words: the four lane quads of a fragment store fall on different banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kSumWords = kProductWarps * kTileRows * kSumPitch;
  static constexpr int kSharedBytes = 2 * kSumWords * 4 + kProductWarps * kSharedUnits * kRowTiles * 1024;
  static_assert(kColumns % 4 == 0, "a thread of the cell warps handles four hidden units");
};

// Eight consecutive k of one row of the stationary operand, zero outside the matrix.
template <typename T, typename S, bool kBackward>
__device__ __forceinline__ Words4 load_weight(const Problem<T>& p, int row, int k, int first_unit) {
  const int gate = row / S::kColumns, unit = first_unit + row % S::kColumns;
  if (unit >= p.hidden || k >= S::kIn * p.hidden) return {0, 0, 0, 0};
  if constexpr (!kBackward) {
    return *reinterpret_cast<const Words4*>(p.weight + (static_cast<size_t>(gate) * p.hidden + unit) * p.hidden + k);
  } else {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* at = p.weight + static_cast<size_t>(k + 2 * i) * p.hidden + unit;
      word[i] = at[0].bits | static_cast<u32>(at[p.hidden].bits) << 16;
    }
    return {word[0], word[1], word[2], word[3]};
  }
}

__device__ __forceinline__ bool incomplete(const Words4& v) {
  return v.x == kEmpty || v.y == kEmpty || v.z == kEmpty || v.w == kEmpty;
}

// The two mma of one unit of depth. A lane holds eight consecutive k of a row; the hardware's order of k within a
// fragment is arbitrary as long as both operands follow the same one, so no shuffle and no ldmatrix is needed.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const Words4& top, const Words4& bottom, const Words4& state) {
  T::mma(sum, {top.x, bottom.x, top.y, bottom.y}, state.x, state.y);
  T::mma(sum, {top.z, bottom.z, top.w, bottom.w}, state.z, state.w);
}

template <typename T, typename S, bool kBackward, int kRowTiles, int kRegisterUnits, int kSharedUnits>
__device__ __forceinline__ void run_products(const Problem<T>& p, float* sums, Words4* shared_weights, int first_row,
                                             int row_tiles, int first_unit, int products) {
  constexpr int kUnits = S::kUnits;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane >> 2, k0 = warp * kUnitDepth + (lane & 3) * 8;
  constexpr int kStride = kProductWarps * kUnitDepth;  // units are dealt to the warps in turn
  const int depth = S::kIn * p.hidden;

  Words4 top[kRegisterUnits][kRowTiles], bottom[kRegisterUnits][kRowTiles];
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const Words4 a = load_weight<T, S, kBackward>(p, m * 16 + group, k0 + u * kStride, first_unit);
      const Words4 b = load_weight<T, S, kBackward>(p, m * 16 + group + 8, k0 + u * kStride, first_unit);
      if (u < kRegisterUnits) {
        top[u < kRegisterUnits ? u : 0][m] = a, bottom[u < kRegisterUnits ? u : 0][m] = b;
      } else {
        Words4* block = shared_weights + ((warp * kSharedUnits + u - kRegisterUnits) * kRowTiles + m) * 64 + lane;
        block[0] = a, block[32] = b;
      }
    }

  int valid = 0;  // units of this lane inside the depth
#pragma unroll
  for (int u = 0; u < kUnits; ++u) valid += k0 + u * kStride < depth;
  const size_t row_bytes = static_cast<size_t>(depth) * sizeof(T);
  const size_t slot_bytes = static_cast<size_t>(p.batch) * row_bytes;
  const char* lane_base = p.ring + static_cast<size_t>(first_row + group) * row_bytes + k0 * sizeof(T);
  const int row = first_row + group;

  Words4 state[kUnits];
  auto fetch = [&](int step, int tile) {
    const bool inside = row + tile * kTileRows < p.batch;
    const char* from = lane_base + (step % kSlots) * slot_bytes + tile * (kTileRows * row_bytes);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      state[u] = inside && u < valid ? load_strong(from + u * kStride * sizeof(T)) : Words4{0, 0, 0, 0};
  };

  fetch(0, 0);
  int phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < row_tiles; ++tile, ++phase) {
      const char* from = lane_base + (step % kSlots) * slot_bytes + tile * (kTileRows * row_bytes);
      for (u32 polls = 0;; ++polls) {
        bool again = false;
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
          if (incomplete(state[u])) state[u] = load_strong(from + u * kStride * sizeof(T)), again = true;
        if (!again) break;
        if (polls > kSpinLimit) __trap();
      }
      __syncwarp();

      float sum[kRowTiles][4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if (u < kRegisterUnits) {
            multiply<T>(sum[m], top[u < kRegisterUnits ? u : 0][m], bottom[u < kRegisterUnits ? u : 0][m], state[u]);
          } else {
            const Words4* block =
                shared_weights + ((warp * kSharedUnits + u - kRegisterUnits) * kRowTiles + m) * 64 + lane;
            multiply<T>(sum[m], block[0], block[32], state[u]);
          }
        }

      // The next tile's state is on its way while this one's sums are handed over.
      const int next_tile = tile + 1 < row_tiles ? tile + 1 : 0;
      const int next_step = step + (next_tile == 0);
      if (next_step < products) fetch(next_step, next_tile);

      const int buffer = phase & 1;
      if (phase >= 2) barrier_sync(kSumsEmpty + buffer, kSumsThreads);
      float* mine = sums + buffer * S::kSumWords + warp * kTileRows * S::kSumPitch;
      const int column = (lane & 3) * 2;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float* at = mine + column * S::kSumPitch + m * 16 + group;
        at[0] = sum[m][0], at[S::kSumPitch] = sum[m][1];
        at[8] = sum[m][2], at[S::kSumPitch + 8] = sum[m][3];
      }
      barrier_arrive(kSumsFull + buffer, kSumsThreads);
    }
}

template <typename T, typename Cell, typename S, bool kBackward>
__device__ __forceinline__ void run_cells(const Problem<T>& p, const float* sums, int first_row, int row_tiles,
                                          int first_unit, int products) {
  constexpr int kGates = Cell::kGates, kCellThreads = kCellWarps * 32;
  const int thread = threadIdx.x - kProductWarps * 32;
  const int depth = S::kIn * p.hidden;
  const size_t slot_bytes = static_cast<size_t>(p.batch) * depth * sizeof(T);

  struct Item {
    int row, quad, unit;  // row within the tile, hidden unit of the whole layer
    bool inside;
  };
  auto item_of = [&](int i, int tile) {
    const int index = thread + i * kCellThreads;
    Item item{index / S::kQuads, index % S::kQuads, 0, false};
    item.unit = first_unit + item.quad * 4;
    item.inside = item.row < kTileRows && item.unit < p.hidden && first_row + tile * kTileRows + item.row < p.batch;
    return item;
  };
  auto publish = [&](int step, int row, int unit, int gate, Words2 words) {
    char* at = p.ring + (step % kSlots) * slot_bytes +
               (static_cast<size_t>(row) * depth + static_cast<size_t>(gate) * p.hidden + unit) * sizeof(T);
    store_strong(at, words);
  };
  // Step s of the loop is time s forwards and time steps - 1 - s backwards.
  auto time_of = [&](int step) { return kBackward ? p.steps - 1 - step : step; };

  for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
    for (int i = 0; i < S::kItems; ++i) {
      const Item item = item_of(i, tile);
      if (!item.inside) continue;
      const int row = first_row + tile * kTileRows + item.row;
      Words2 words{0, 0};
      if (!kBackward && p.initial && !(p.reset && p.reset[row])) {
        // Through fp32, so that a NaN of any payload becomes the canonical one.
        float values[4];
        unpack<T>(*reinterpret_cast<const Words2*>(p.initial + static_cast<size_t>(row) * p.hidden + item.unit), values);
        words = pack<T>(values);
      }
#pragma unroll
      for (int gate = 0; gate < S::kIn; ++gate) publish(0, row, item.unit, gate, words);
    }

  Words2 input[S::kItems][kBackward ? 1 : kGates], saved[S::kItems][kGates];
  bool masked[S::kItems];
  auto fetch = [&](int step, int tile) {
    if (step >= p.steps) return;
    const int t = time_of(step);
#pragma unroll
    for (int i = 0; i < S::kItems; ++i) {
      const Item item = item_of(i, tile);
      if (!item.inside) continue;
      const int row = first_row + tile * kTileRows + item.row;
      const size_t cell = static_cast<size_t>(t) * p.batch + row;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const size_t at = (cell * kGates + gate) * p.hidden + item.unit;
        if constexpr (kBackward)
          saved[i][gate] = load_stream(p.v + at);
        else
          input[i][gate] = load_stream(p.input + at);
      }
      if constexpr (kBackward) input[i][0] = load_stream(p.input + cell * p.hidden + item.unit);
      // What step t publishes is used across the boundary before the next time step, or before t itself backwards.
      const size_t boundary = kBackward ? cell : cell + p.batch;
      masked[i] = p.reset && (kBackward || t + 1 < p.steps) && p.reset[boundary];
    }
  };

  fetch(0, 0);
  int phase = 0;
  for (int step = 0; step < products; ++step) {
    const int t = time_of(step);
    for (int tile = 0; tile < row_tiles; ++tile, ++phase) {
      const int buffer = phase & 1;
      barrier_sync(kSumsFull + buffer, kSumsThreads);
      float sum[S::kItems][S::kOut][4];
#pragma unroll
      for (int i = 0; i < S::kItems; ++i) {
        const Item item = item_of(i, tile);
        if (item.row >= kTileRows) continue;
        const float* from = sums + buffer * S::kSumWords + item.row * S::kSumPitch + item.quad * 4;
#pragma unroll
        for (int out = 0; out < S::kOut; ++out) {
          float4 total = *reinterpret_cast<const float4*>(from + out * S::kColumns);
#pragma unroll
          for (int warp = 1; warp < kProductWarps; ++warp) {
            const float4 part =
                *reinterpret_cast<const float4*>(from + warp * kTileRows * S::kSumPitch + out * S::kColumns);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
          }
          sum[i][out][0] = total.x, sum[i][out][1] = total.y, sum[i][out][2] = total.z, sum[i][out][3] = total.w;
        }
      }
      if (phase + 2 < products * row_tiles) barrier_arrive(kSumsEmpty + buffer, kSumsThreads);

#pragma unroll
      for (int i = 0; i < S::kItems; ++i) {
        const Item item = item_of(i, tile);
        if (!item.inside) continue;
        const int row = first_row + tile * kTileRows + item.row;
        const size_t cell = static_cast<size_t>(t) * p.batch + row;
        if constexpr (!kBackward) {
          float v[kGates][4], h[4];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            unpack<T>(input[i][gate], v[gate]);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[gate][j] += sum[i][gate][j];
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float unit_v[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = v[gate][j];
            h[j] = Cell::forward(unit_v);
          }
          const Words2 words = pack<T>(h);
          if (step + 1 < p.steps) publish(step + 1, row, item.unit, 0, masked[i] ? Words2{0, 0} : words);
          store_stream(p.output + cell * p.hidden + item.unit, words);
          if (p.v) {
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate)
              store_stream(p.v + (cell * kGates + gate) * p.hidden + item.unit, pack<T>(v[gate]));
          }
        } else {
          if (step == p.steps) {
            store_stream(p.initial_gradient + static_cast<size_t>(row) * p.hidden + item.unit, pack<T>(sum[i][0]));
            continue;
          }
          float dh[4], v[kGates][4], dv[kGates][4];
          unpack<T>(input[i][0], dh);
#pragma unroll
          for (int j = 0; j < 4; ++j) dh[j] += sum[i][0][j];
          if (step == 0 && p.last_gradient) {
            float last[4];
            unpack<T>(load_stream(p.last_gradient + static_cast<size_t>(row) * p.hidden + item.unit), last);
#pragma unroll
            for (int j = 0; j < 4; ++j) dh[j] += last[j];
          }
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) unpack<T>(saved[i][gate], v[gate]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float unit_v[kGates], unit_dv[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = v[gate][j];
            Cell::backward(unit_v, dh[j], unit_dv);
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) dv[gate][j] = unit_dv[gate];
          }
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            const Words2 words = pack<T>(dv[gate]);
            if (step + 1 < products) publish(step + 1, row, item.unit, gate, masked[i] ? Words2{0, 0} : words);
            store_stream(p.output + (cell * kGates + gate) * p.hidden + item.unit, words);
          }
        }
      }
      const int next_tile = tile + 1 < row_tiles ? tile + 1 : 0;
      fetch(step + (next_tile == 0), next_tile);
    }
    barrier_sync(kStepDone, kStepThreads);
  }
}

// When the cell warps have passed a step, this CTA holds the whole state published in the step before, so every CTA of
// the group has finished with the slot before that one: it can be wiped. The fence, which takes about as long as half
// a step, runs beside the next step; the cell warps wait for it only at that step's end, which is still before they
// publish the state that lets a reader look at the wiped slot again.
template <typename T, typename S, bool kBackward>
__device__ __forceinline__ void run_wiper(const Problem<T>& p, int first_row, int rows, int first_unit, int products) {
  const int lane = threadIdx.x & 31;
  const int depth = S::kIn * p.hidden;
  const int quads = min(S::kQuads, (p.hidden - first_unit) / 4);
  const size_t slot_bytes = static_cast<size_t>(p.batch) * depth * sizeof(T);
  for (int step = 0; step < products; ++step) {
    const int ahead = step + kPrefetchSteps;
    if (ahead < p.steps) {
      const int t = kBackward ? p.steps - 1 - ahead : ahead;
      constexpr int kLine = 64;  // units of a 128-byte line
      constexpr int kLines = (S::kColumns + kLine - 1) / kLine + 1;
      for (int i = lane; i < rows * kLines; i += 32) {
        const int unit = min(first_unit + i % kLines * kLine, min(first_unit + S::kColumns, p.hidden) - 1);
        const size_t cell = static_cast<size_t>(t) * p.batch + first_row + i / kLines;
        if constexpr (kBackward) prefetch_l2(p.input + cell * p.hidden + unit);
        const T* gates = kBackward ? p.v : p.input;
        for (int gate = 0; gate < S::kIn * S::kOut; ++gate)
          prefetch_l2(gates + (cell * (S::kIn * S::kOut) + gate) * p.hidden + unit);
      }
    }
    barrier_sync(kStepDone, kStepThreads);
    if (step == 0) continue;
    char* slot = p.ring + ((step - 1) % kSlots) * slot_bytes;
    for (int i = lane; i < rows * quads * S::kIn; i += 32) {
      const int quad = i % quads, gate = i / quads % S::kIn, row = first_row + i / (quads * S::kIn);
      const size_t unit = static_cast<size_t>(gate) * p.hidden + first_unit + quad * 4;
      store_strong(slot + (static_cast<size_t>(row) * depth + unit) * sizeof(T), {kEmpty, kEmpty});
    }
    fence_gpu();
  }
}

template <typename T, typename Cell, bool kBackward, int kRowTiles, int kRegisterUnits, int kSharedUnits>
__device__ __forceinline__ void run(const Problem<T>& p) {
  using S = Shape<Cell, kBackward, kRowTiles, kRegisterUnits, kSharedUnits>;
  extern __shared__ __align__(128) char shared[];
  float* sums = reinterpret_cast<float*>(shared);
  Words4* shared_weights = reinterpret_cast<Words4*>(shared + 2 * S::kSumWords * sizeof(float));

  const int columns = (p.hidden + S::kColumns - 1) / S::kColumns;
  const int first_row = blockIdx.x / columns * p.tiles * kTileRows;
  const int first_unit = blockIdx.x % columns * S::kColumns;
  const int rows = min(p.tiles * kTileRows, p.batch - first_row);
  const int row_tiles = (rows + kTileRows - 1) / kTileRows;
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (kBackward && p.initial_gradient ? 1 : 0);

  const int warp = threadIdx.x >> 5;
  if (warp < kProductWarps) {
    take_registers<224>();
    run_products<T, S, kBackward, kRowTiles, kRegisterUnits, kSharedUnits>(p, sums, shared_weights, first_row,
                                                                           row_tiles, first_unit, products);
  } else {
    give_registers<56>();
    if (warp < kProductWarps + kCellWarps)
      run_cells<T, Cell, S, kBackward>(p, sums, first_row, row_tiles, first_unit, products);
    else
      run_wiper<T, S, kBackward>(p, first_row, rows, first_unit, products);
  }
}

}  // namespace persistent

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_forward(const T* pre, const T* weight, const T* h0, const u8* reset, T* h, T* v, char* ring, int steps,
                       int batch, int hidden, int tiles) {
  const persistent::Problem<T> p{pre, weight, h0, nullptr, reset, h, v, nullptr, ring, steps, batch, hidden, tiles};
  persistent::run<T, Cell, false, kRowTiles, kRegisterUnits, kSharedUnits>(p);
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_backward(const T* dh, const T* weight, const T* dh_last, const u8* reset, T* v, T* dpre, T* dh0,
                        char* ring, int steps, int batch, int hidden, int tiles) {
  const persistent::Problem<T> p{dh, weight, nullptr, dh_last, reset, dpre, v, dh0, ring, steps, batch, hidden, tiles};
  persistent::run<T, Cell, true, kRowTiles, kRegisterUnits, kSharedUnits>(p);
}
