// All T steps of a recurrence in one launch: h_t = f(pre_t + W h_{t-1}) forwards, and its gradient backwards.
//
// The grid is groups x columns. A group owns some batch rows, and its CTAs split the hidden units. Each CTA keeps its
// rows of W on chip for the whole launch, as fragments of the tensor cores' stationary operand: in registers as far as
// they go, the rest in shared memory. A step computes v^T = W h^T, so that W is that operand and the few batch rows of
// a tile are the narrow one. The eight product warps split the depth K of the product: every word of the state enters
// a CTA once, straight into the fragment that uses it, and partial sums meet in shared memory.
//
// Batch rows are independent, so each tile of eight rows runs at its own pace: while one tile's state travels between
// the CTAs (exchange.cuh), the tensor cores work on the next.
//
// Roles of the 16 warps: 0-7 products; then one a row tile of W sums, applies the cell, publishes and stores; the last
// fences and prefetches; any between have nothing to do.
#pragma once

#include "cells.cuh"
#include "exchange.cuh"

namespace persistent {

constexpr int kThreads = 512;
constexpr int kProductThreads = kProductWarps * 32;
constexpr int kSpareWarp = kThreads / 32 - 1;
constexpr int kPrefetchSteps = 3;

// Named barriers; 0 is __syncthreads. Sums alternate between two buffers.
constexpr int kSumsFull = 1, kSumsEmpty = 3, kStepDone = 5;

template <typename T>
struct Problem {
  const T* input;          // forward: pre (T, B, G, H); backward: gradient of h (T, B, H)
  const T* weight;         // (G, H, H), as PyTorch's weight_hh
  const T* initial;        // forward: h0 (B, H) or null; backward: null
  const T* last_gradient;  // backward: gradient of h_last (B, H) or null
  const u8* reset;         // (T, B) or null
  T* output;               // forward: h (T, B, H); backward: gradient of pre (T, B, G, H)
  T* v;                    // (T, B, G, H) pre-activations: forward writes them if not null, backward reads them
  T* initial_gradient;     // backward: gradient of h0 (B, H) or null
  char* ring;              // see Ring; null for a cluster
  int steps, batch, hidden;
  int tiles;  // row tiles of a group
};

// The shape of one instantiation: 16 x kRowTiles rows of W a CTA, of which a product warp holds kRegisterUnits units of
// depth in registers and kSharedUnits in shared memory.
template <typename Cell, bool kBackward_, int kRowTiles_, int kRegisterUnits_, int kSharedUnits_>
struct Shape {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRowTiles = kRowTiles_, kRegisterUnits = kRegisterUnits_, kSharedUnits = kSharedUnits_;
  static constexpr int kUnits = kRegisterUnits + kSharedUnits;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kIn = kBackward ? kGates : 1;   // values that a hidden unit publishes
  static constexpr int kOut = kBackward ? 1 : kGates;  // rows of the product that a hidden unit needs
  static constexpr int kColumns = kRows / kOut;        // hidden units a CTA
  static constexpr int kQuads = kColumns / 4;
  static constexpr int kCellThreads = (kTileRows * kQuads + 31) / 32 * 32;
  static constexpr int kSumsThreads = kProductThreads + kCellThreads;
  // +4 words: the lane quads of a fragment store fall on different banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kWarpSums = kTileRows * kSumPitch;
  static constexpr int kBufferSums = kProductWarps * kWarpSums;
  static constexpr int kWeightOffset = 2 * kBufferSums * 4;
  static constexpr int kExchangeOffset = kWeightOffset + kProductWarps * kSharedUnits * kRowTiles * 1024;
  static_assert(kColumns % 4 == 0, "a cell thread handles four hidden units");
  static_assert(kProductThreads + kCellThreads + 32 <= kThreads, "too many rows of W for the cell warps");
};

// Eight consecutive k of one row of the stationary operand, zero outside the matrix.
template <typename S, typename T>
__device__ __forceinline__ Words4 load_weight(const Problem<T>& p, int row, int k, int first_unit) {
  const int gate = row / S::kColumns, unit = first_unit + row % S::kColumns;
  if (unit >= p.hidden || k >= S::kIn * p.hidden) return {0, 0, 0, 0};
  if constexpr (!S::kBackward) {
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

// The two mma of one unit of depth. A lane holds eight consecutive k of a row; the hardware's order of k within a
// fragment is arbitrary as long as both operands follow the same one, so no shuffle and no ldmatrix is needed.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const Words4& top, const Words4& bottom, const Words4& state) {
  T::mma(sum, {top.x, bottom.x, top.y, bottom.y}, state.x, state.y);
  T::mma(sum, {top.z, bottom.z, top.w, bottom.w}, state.z, state.w);
}

template <typename S, typename T, typename Exchange>
__device__ __forceinline__ void run_products(const Problem<T>& p, Exchange& exchange, char* shared, const Part& part,
                                             int products) {
  constexpr int kRegisterUnits = S::kRegisterUnits;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Words4* blocks = reinterpret_cast<Words4*>(shared + S::kWeightOffset) +
                   warp * S::kSharedUnits * S::kRowTiles * 64 + lane;

  Words4 top[kRegisterUnits][S::kRowTiles], bottom[kRegisterUnits][S::kRowTiles];
#pragma unroll
  for (int u = 0; u < S::kUnits; ++u)
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      const int row = m * 16 + lane_row(), k = lane_depth() + u * kDepthStride;
      const Words4 a = load_weight<S>(p, row, k, part.first_unit);
      const Words4 b = load_weight<S>(p, row + 8, k, part.first_unit);
      if (u < kRegisterUnits) {
        top[u % kRegisterUnits][m] = a, bottom[u % kRegisterUnits][m] = b;
      } else {
        Words4* block = blocks + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
        block[0] = a, block[32] = b;
      }
    }

  float* sums = reinterpret_cast<float*>(shared) + warp * S::kWarpSums + (lane & 3) * 2 * S::kSumPitch + lane_row();
  const char* first = exchange.source(0, 0);
#pragma unroll
  for (int u = 0; u < S::kUnits; ++u) exchange.request(first, 0, u);

  int phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      const bool last_tile = tile + 1 == part.tiles;
      const int next_tile = last_tile ? 0 : tile + 1;
      // Past the end this asks for a state that nobody waits for, from a slot that exists.
      const char* next = exchange.source(step + last_tile, next_tile);
      exchange.receive(step, tile);

      float sum[S::kRowTiles][4] = {};
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          if (u < kRegisterUnits) {
            multiply<T>(sum[m], top[u % kRegisterUnits][m], bottom[u % kRegisterUnits][m], exchange.state[u]);
          } else {
            const Words4* block = blocks + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
            multiply<T>(sum[m], block[0], block[32], exchange.state[u]);
          }
        }
        // As a fragment is used up, the next tile's takes its registers.
        exchange.request(next, next_tile, u);
      }

      const int buffer = phase & 1;
      if (phase >= 2) barrier_sync(kSumsEmpty + buffer, S::kSumsThreads);
      float* mine = sums + buffer * S::kBufferSums;
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        float* at = mine + m * 16;
        at[0] = sum[m][0], at[S::kSumPitch] = sum[m][1];
        at[8] = sum[m][2], at[S::kSumPitch + 8] = sum[m][3];
      }
      barrier_arrive(kSumsFull + buffer, S::kSumsThreads);
    }
}

template <typename S, typename Cell, typename T, typename Exchange>
__device__ __forceinline__ void run_cells(const Problem<T>& p, const Exchange& exchange, const char* shared,
                                          const Part& part, int products) {
  constexpr int kGates = S::kGates;
  const int thread = threadIdx.x - kProductThreads;
  const int tile_row = thread / S::kQuads, unit = part.first_unit + thread % S::kQuads * 4;
  const bool working = tile_row < kTileRows && unit < p.hidden;
  auto inside = [&](int tile) { return working && tile * kTileRows + tile_row < part.rows; };

  for (int tile = 0; tile < part.tiles; ++tile) {
    const int row = tile * kTileRows + tile_row, batch_row = part.first_row + row;
    Words2 words{0, 0};
    if (!S::kBackward && p.initial && inside(tile) && !(p.reset && p.reset[batch_row])) {
      // Through fp32, so that a NaN of any payload becomes the canonical one.
      float values[4];
      unpack<T>(*reinterpret_cast<const Words2*>(p.initial + static_cast<size_t>(batch_row) * p.hidden + unit), values);
      words = pack<T>(values);
    }
#pragma unroll
    for (int gate = 0; gate < S::kIn; ++gate) exchange.publish(0, row, gate * p.hidden + unit, words, inside(tile));
  }

  // Rows of the whole sequence, (t, batch row), count in 32 bits; only addresses need 64.
  const u32 row_bytes = p.hidden * sizeof(T);
  auto address = [&](const T* base, u32 row, int gates, int gate) {
    return reinterpret_cast<char*>(const_cast<T*>(base)) + static_cast<u64>(row) * (gates * row_bytes) +
           (gate * p.hidden + unit) * sizeof(T);
  };
  auto first_row_of = [&](int step) {
    return static_cast<u32>((S::kBackward ? p.steps - 1 - step : step) * p.batch + part.first_row + tile_row);
  };

  Words2 input[S::kBackward ? 1 : kGates], saved[kGates];
  bool masked = false;
  auto fetch = [&](int step, int tile) {
    if (step >= p.steps || !inside(tile)) return;
    const u32 row = first_row_of(step) + tile * kTileRows;
    if constexpr (S::kBackward) {
      input[0] = load_stream(address(p.input, row, 1, 0));
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) saved[gate] = load_stream(address(p.v, row, kGates, gate));
    } else {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) input[gate] = load_stream(address(p.input, row, kGates, gate));
    }
    // What a step publishes crosses into the next time step forwards, and out of its own backwards.
    if (p.reset) masked = S::kBackward ? p.reset[row] : step + 1 < p.steps && p.reset[row + p.batch];
  };

  fetch(0, 0);
  const float* sums = reinterpret_cast<const float*>(shared) + tile_row * S::kSumPitch + thread % S::kQuads * 4;
  const int phases = products * part.tiles;
  int phase = 0;
  for (int step = 0; step < products; ++step) {
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      const int buffer = phase & 1;
      const int group_row = tile * kTileRows + tile_row;
      const u32 row = first_row_of(step) + tile * kTileRows;
      barrier_sync(kSumsFull + buffer, S::kSumsThreads);
      float sum[S::kOut][4] = {};
      if (tile_row < kTileRows) {
#pragma unroll
        for (int warp = 0; warp < kProductWarps; ++warp)
#pragma unroll
          for (int out = 0; out < S::kOut; ++out) {
            const float4 part_sum = *reinterpret_cast<const float4*>(sums + buffer * S::kBufferSums +
                                                                     warp * S::kWarpSums + out * S::kColumns);
            sum[out][0] += part_sum.x, sum[out][1] += part_sum.y, sum[out][2] += part_sum.z, sum[out][3] += part_sum.w;
          }
      }
      if (phase + 2 < phases) barrier_arrive(kSumsEmpty + buffer, S::kSumsThreads);

      if constexpr (!S::kBackward) {
        float v[kGates][4], h[4];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          unpack<T>(input[gate], v[gate]);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[gate][j] += sum[gate][j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float unit_v[kGates];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = v[gate][j];
          h[j] = Cell::template forward<T::kCoarse>(unit_v);
        }
        const Words2 words = pack<T>(h);
        if (step + 1 < products) exchange.publish(step + 1, group_row, unit, masked ? Words2{0, 0} : words, inside(tile));
        if (inside(tile)) {
          store_stream(address(p.output, row, 1, 0), words);
          if (p.v) {
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate)
              store_stream(address(p.v, row, kGates, gate), pack<T>(v[gate]));
          }
        }
      } else if (step == p.steps) {
        if (inside(tile))
          store_stream(address(p.initial_gradient, part.first_row + group_row, 1, 0), pack<T>(sum[0]));
      } else {
        float dh[4], v[kGates][4], dv[kGates][4];
        unpack<T>(input[0], dh);
#pragma unroll
        for (int j = 0; j < 4; ++j) dh[j] += sum[0][j];
        if (step == 0 && p.last_gradient && inside(tile)) {
          float last[4];
          unpack<T>(load_stream(address(p.last_gradient, part.first_row + group_row, 1, 0)), last);
#pragma unroll
          for (int j = 0; j < 4; ++j) dh[j] += last[j];
        }
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) unpack<T>(saved[gate], v[gate]);
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
          if (step + 1 < products)
            exchange.publish(step + 1, group_row, gate * p.hidden + unit, masked ? Words2{0, 0} : words, inside(tile));
          if (inside(tile)) store_stream(address(p.output, row, kGates, gate), words);
        }
      }
      if (step > 0) {
#pragma unroll
        for (int gate = 0; gate < S::kIn; ++gate)
          exchange.wipe(step - 1, group_row, gate * p.hidden + unit, inside(tile));
      }
      const bool last_tile = tile + 1 == part.tiles;
      fetch(step + last_tile, last_tile ? 0 : tile + 1);
    }
    barrier_sync(kStepDone, S::kCellThreads + 32);
  }
}

// Off the cell warps' path: the fence behind a step's wipes, which takes about half a step, and prefetching the inputs
// of a later step. The cell warps meet this one at the end of every step, so a fence is over before the last tile of
// the step after, several steps before anyone looks at the wiped slot again.
template <typename S, typename T, typename Exchange>
__device__ __forceinline__ void run_spare(const Problem<T>& p, const Part& part, int products) {
  constexpr int kLine = 128 / sizeof(T);  // units of a cache line
  const int lane = threadIdx.x & 31;
  const int unit = part.first_unit / kLine * kLine + lane % 4 * kLine;
  const bool wanted = unit < min(part.first_unit + S::kColumns, p.hidden);
  for (int step = 0; step < products; ++step) {
    const int ahead = step + kPrefetchSteps;
    if (ahead < p.steps && wanted) {
      const int t = S::kBackward ? p.steps - 1 - ahead : ahead;
      for (int row = lane / 4; row < part.rows; row += 8) {
        const size_t cell = static_cast<size_t>(t) * p.batch + part.first_row + row;
        if constexpr (S::kBackward) prefetch_l2(p.input + cell * p.hidden + unit);
        const T* gates = S::kBackward ? p.v : p.input;
#pragma unroll
        for (int gate = 0; gate < S::kGates; ++gate) prefetch_l2(gates + (cell * S::kGates + gate) * p.hidden + unit);
      }
    }
    barrier_sync(kStepDone, S::kCellThreads + 32);
    if constexpr (Exchange::kWipes) fence_gpu();
  }
}

template <typename S, typename Cell, typename T, template <typename, int> class Exchange>
__device__ __forceinline__ void run(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const int columns = (p.hidden + S::kColumns - 1) / S::kColumns;
  Part part;
  part.first_row = blockIdx.x / columns * p.tiles * kTileRows;
  part.first_unit = blockIdx.x % columns * S::kColumns;
  part.rows = min(p.tiles * kTileRows, p.batch - part.first_row);
  part.tiles = (part.rows + kTileRows - 1) / kTileRows;
  part.peers = columns;
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);

  Exchange<T, S::kUnits> exchange(p.ring, shared + S::kExchangeOffset, part, p.batch, S::kIn * p.hidden);
  exchange.open(part);
  const int warp = threadIdx.x >> 5;
  if (warp < kProductWarps) {
    take_registers<208>();
    run_products<S>(p, exchange, shared, part, products);
  } else {
    give_registers<48>();
    if (warp < kProductWarps + S::kCellThreads / 32)
      run_cells<S, Cell>(p, exchange, shared, part, products);
    else if (warp == kSpareWarp)
      run_spare<S, T, Exchange<T, S::kUnits>>(p, part, products);
  }
  __syncwarp();
  exchange.close();
}

}  // namespace persistent

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits,
          template <typename, int> class Exchange>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_forward(const T* pre, const T* weight, const T* h0, const u8* reset, T* h, T* v, char* ring, int steps,
                       int batch, int hidden, int tiles) {
  using S = persistent::Shape<Cell, false, kRowTiles, kRegisterUnits, kSharedUnits>;
  persistent::run<S, Cell, T, Exchange>({pre, weight, h0, nullptr, reset, h, v, nullptr, ring, steps, batch, hidden, tiles});
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits,
          template <typename, int> class Exchange>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_backward(const T* dh, const T* weight, const T* dh_last, const u8* reset, T* v, T* dpre, T* dh0,
                        char* ring, int steps, int batch, int hidden, int tiles) {
  using S = persistent::Shape<Cell, true, kRowTiles, kRegisterUnits, kSharedUnits>;
  persistent::run<S, Cell, T, Exchange>(
      {dh, weight, nullptr, dh_last, reset, dpre, v, dh0, ring, steps, batch, hidden, tiles});
}
