// All T steps of a recurrence in one launch, h_t = f(pre_t, W h_{t-1}, memory_{t-1}) with a cell f, and its gradient.
//
// The grid is heads x groups x columns. A group owns some batch rows of a head, and its CTAs split the hidden units.
// Each CTA keeps its rows of W on chip for the whole launch, as fragments of the tensor cores' stationary operand: in
// registers as far as they go, the rest in shared memory. A step computes v^T = W h^T, so that W is that operand and
// the few batch rows of a tile are the narrow one. The eight product warps split the depth K of the product: every word
// of the state enters a CTA once, straight into the fragment that uses it, and partial sums meet in shared memory.
//
// Batch rows are independent, so each tile of 8 or 16 rows runs at its own pace: while one tile's state travels between
// the CTAs (exchange.cuh), the tensor cores work on the next.
//
// Roles of the 16 warps: 0-7 products; then one a row tile of W sums, applies the cell, publishes and stores; the last
// fences; any between have nothing to do.
#pragma once

#include "cells.cuh"
#include "exchange.cuh"

namespace persistent {

constexpr int kThreads = 512;
constexpr int kProductThreads = kProductWarps * 32;
constexpr int kLastWarp = kThreads / 32 - 1;

// Named barriers; 0 is __syncthreads. Sums alternate between two buffers.
constexpr int kSumsFull = 1, kSumsEmpty = 3;
// So do these two, from step to step.
constexpr int kStepDone = 5, kStepFenced = 7;

// G gates, P products, S saved values, as the cell has them; its memory is h, or c where it has a second state.
template <typename T>
struct Problem {
  const T* input;          // forward: pre (T, B, G, H); backward: gradient of h (T, B, H)
  const T* weight;         // (P, N, H/N, H/N) for N heads; PyTorch's weight_hh for one
  const T* bias;           // forward: (P, H) or null
  const T* initial;        // forward: h0 (B, H) or null; backward: null
  const T* last_gradient;  // backward: gradient of h_last (B, H) or null
  const u8* reset;         // (T, B) or null
  T* output;               // forward: h (T, B, H); backward: gradient of pre (T, B, G, H)
  T* saved;                // (T, B, S, H): forward writes it if not null, backward reads it
  T* initial_gradient;     // backward: gradient of h0 (B, H) or null
  const T* memory_before;  // the memory before the first step (B, H) or null
  T* memory;               // after every step (T, B, H): forward writes c if not null, backward reads it
  T* memory_last;          // forward: c_last (B, H), written; backward: gradient of it or null
  T* memory_gradient;      // backward: gradient of c0 (B, H), written if initial_gradient is
  T* products_gradient;    // backward: gradient of rec (T, B, P, H), written where it is no part of pre's
  char* ring;              // see Ring; null for a cluster
  int steps, batch;
  int hidden, pitch;  // units of a head, H/N, and of all, H
  int tiles;          // row tiles of a group
};

// What the cell warps need to know of a kernel: kRows rows of W a CTA, tiles of kTileRows batch rows, of which the cell
// threads take kPassRows at once, and kParts partial sums of every product.
template <typename Cell, bool kBackward_, int kRows_, int kTileRows_, int kPassRows_, int kParts_, int kWeightBytes>
struct Layout {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRows = kRows_, kTileRows = kTileRows_, kPassRows = kPassRows_, kParts = kParts_;
  static constexpr int kPasses = kTileRows / kPassRows;
  static constexpr int kGates = Cell::kGates, kProducts = Cell::kProducts, kSaved = Cell::kSaved;
  static constexpr bool kMemory = Cell::kReadsMemory, kOtherState = Cell::kStates == 2;
  static constexpr int kIn = kBackward ? kProducts : 1;   // values that a hidden unit publishes
  static constexpr int kOut = kBackward ? 1 : kProducts;  // rows of the product that a hidden unit needs
  static constexpr int kColumns = kRows / kOut / 8 * 8;   // hidden units a CTA: pairs of threads publish eight
  static constexpr int kQuads = kColumns / 4;
  static constexpr int kCellThreads = (kPassRows * kQuads + 31) / 32 * 32;
  static constexpr bool kExactThreads = kCellThreads == kPassRows * kQuads;
  static constexpr int kSumsThreads = kProductThreads + kCellThreads;
  // Where there are warps enough, two groups of cell threads take turns, each with a buffer of sums of its own.
  static constexpr int kCellGroups = kProductThreads + 2 * kCellThreads <= kThreads ? 2 : 1;
  static constexpr int kAllCells = kCellGroups * kCellThreads;
  static constexpr bool kSpareWarp = kProductThreads + kAllCells < kThreads;
  // +4 words: the lane quads of a fragment store fall on different banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kPartSums = kTileRows * kSumPitch;
  static constexpr int kBufferSums = kParts * kPartSums;
  static constexpr int kInputs = kBackward ? 1 + kSaved + kMemory : kGates;  // values a cell thread reads for a unit
  // Tiles of a cell group whose inputs are in shared memory or on the way.
  static constexpr int kStages = kMemory ? 4 : (kTileRows > 16 ? 4 : 64 / kTileRows) / kCellGroups;
  static constexpr int kWeightOffset = 2 * kBufferSums * 4;
  static constexpr int kInputOffset = kWeightOffset + kWeightBytes;
  static constexpr int kCarriedOffset = kInputOffset + kStages * kPasses * kInputs * kAllCells * 8;
  static constexpr int kCarriedBytes = kMemory ? 16 * kPasses * kCellThreads : 0;  // of a tile, see run_cells
  static __device__ __forceinline__ int exchange_offset(int tiles) { return kCarriedOffset + tiles * kCarriedBytes; }
  // The tiles of all steps are dealt to buffers and cell groups in turn; with memory those of each step anew, so that a
  // thread finds again what it remembers of a tile.
  static __device__ __forceinline__ int buffer_of(int phase, int tile) { return (kMemory ? tile : phase) & 1; }
  static __device__ __forceinline__ bool buffer_used(int phase, int step, int tile) {
    return kMemory ? step > 0 || tile >= 2 : phase >= 2;
  }
  static_assert(kColumns > 0, "too few rows of W for the products of eight hidden units");
  static_assert(kSumsThreads <= kThreads, "too many rows of W for the cell warps");
};

// The shape of one instantiation for mma.sync: 16 x kRowTiles rows of W a CTA, of which a product warp holds
// kRegisterUnits units of depth in registers and kSharedUnits in shared memory, against tiles of 8 x kBlocks batch rows.
// A cell with memory has few hidden units a CTA and many values a unit: its threads take all rows of a tile at once.
template <typename Cell, bool kBackward, int kRowTiles_, int kRegisterUnits_, int kSharedUnits_, int kBlocks_>
struct Shape : Layout<Cell, kBackward, 16 * kRowTiles_, kBlocks_ * kBlockRows,
                      (Cell::kReadsMemory ? kBlocks_ : 1) * kBlockRows, kProductWarps,
                      kProductWarps * kSharedUnits_ * kRowTiles_ * 1024> {
  static constexpr int kRowTiles = kRowTiles_, kRegisterUnits = kRegisterUnits_, kSharedUnits = kSharedUnits_;
  static constexpr int kBlocks = kBlocks_, kUnits = kRegisterUnits + kSharedUnits;
  // Units whose fragments are received together: enough to keep the tensor cores busy, few enough for the registers.
  static constexpr int kGroupLimit = kBlocks == 1 ? 5 : 3;
  static constexpr int kGroups = (kUnits + kGroupLimit - 1) / kGroupLimit;
  static constexpr int kGroup = (kUnits + kGroups - 1) / kGroups;
  // Registers of a product thread and of the others: 512 threads share 65536.
  static constexpr int kProductRegisters =
      Cell::kReadsMemory ? (kBackward ? 176 : 160) : kBlocks == 1 ? 208 : 200;
  static constexpr int kOtherRegisters = 256 - kProductRegisters;
};

// Eight consecutive k of one row of the stationary operand, zero outside the matrix.
template <typename S, typename T>
__device__ __forceinline__ Words4 load_weight(const Problem<T>& p, const Part& part, int row, int k) {
  const int product = row / S::kColumns, unit = part.first_unit + row % S::kColumns;
  if (product >= S::kOut || unit >= p.hidden || k >= S::kIn * p.hidden) return {0, 0, 0, 0};
  // Row `unit` of a product's matrix for this head.
  auto at = [&](int product, int unit) {
    return p.weight + (static_cast<size_t>(product) * p.pitch + part.head * p.hidden + unit) * p.hidden;
  };
  if constexpr (!S::kBackward) {
    return *reinterpret_cast<const Words4*>(at(product, unit) + k);
  } else {
    u32 word[4];
    const int from = S::kIn == 1 ? 0 : k / p.hidden;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* pair = at(from, k - from * p.hidden + 2 * i) + unit;
      word[i] = pair[0].bits | static_cast<u32>(pair[p.hidden].bits) << 16;
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
      const Words4 a = load_weight<S>(p, part, row, k);
      const Words4 b = load_weight<S>(p, part, row + 8, k);
      if (u < kRegisterUnits) {
        top[u % kRegisterUnits][m] = a, bottom[u % kRegisterUnits][m] = b;
      } else {
        Words4* block = blocks + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
        block[0] = a, block[32] = b;
      }
    }

  float* sums = reinterpret_cast<float*>(shared) + warp * S::kPartSums + (lane & 3) * 2 * S::kSumPitch + lane_row();
  exchange.start();

  int phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      exchange.await(step, tile);
      float sum[S::kBlocks][S::kRowTiles][4] = {};
#pragma unroll
      for (int first = 0; first < S::kUnits; first += S::kGroup) {
        Words4 state[S::kGroup][S::kBlocks];
        if (first + S::kGroup <= S::kUnits) {
          exchange.receive(first, state);
        } else {
          Words4 rest[S::kUnits % S::kGroup + (S::kUnits % S::kGroup == 0)][S::kBlocks];
          exchange.receive(first, rest);
#pragma unroll
          for (int i = 0; i < S::kUnits % S::kGroup; ++i)
#pragma unroll
            for (int n = 0; n < S::kBlocks; ++n) state[i][n] = rest[i][n];
        }
#pragma unroll
        for (int u = first; u < first + S::kGroup && u < S::kUnits; ++u)
#pragma unroll
          for (int m = 0; m < S::kRowTiles; ++m) {
            Words4 a, b;
            if (u < kRegisterUnits) {
              a = top[u % kRegisterUnits][m], b = bottom[u % kRegisterUnits][m];
            } else {
              const Words4* block = blocks + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
              a = block[0], b = block[32];
            }
#pragma unroll
            for (int n = 0; n < S::kBlocks; ++n) multiply<T>(sum[n][m], a, b, state[u - first][n]);
          }
      }

      const int buffer = S::buffer_of(phase, tile);
      if (S::buffer_used(phase, step, tile)) barrier_sync(kSumsEmpty + buffer, S::kSumsThreads);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n)
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          float* at = sums + buffer * S::kBufferSums + n * kBlockRows * S::kSumPitch + m * 16;
          at[0] = sum[n][m][0], at[S::kSumPitch] = sum[n][m][1];
          at[8] = sum[n][m][2], at[S::kSumPitch + 8] = sum[n][m][3];
        }
      barrier_arrive(kSumsFull + buffer, S::kSumsThreads);
    }
  if constexpr (S::kMemory) {
    for (int last = 0; last < min(2, part.tiles); ++last) barrier_sync(kSumsEmpty + last, S::kSumsThreads);
  } else {
    for (int last = max(phase - 2, 0); last < phase; ++last) barrier_sync(kSumsEmpty + (last & 1), S::kSumsThreads);
  }
}

// A cell thread looks after four hidden units of one row of every pass. Where the cell has a memory, the thread carries
// it from step to step in shared memory, and backwards its gradient in fp32. The memory itself is rounded, so that a
// sequence in chunks gives what it gives in one piece.
template <typename S, typename Cell, typename T, typename Exchange>
__device__ __forceinline__ void run_cells(const Problem<T>& p, const Exchange& exchange, char* shared, const Part& part,
                                          int products) {
  constexpr int kGates = S::kGates, kPasses = S::kPasses, kSlopes = Cell::kSlopes;
  const int group = (threadIdx.x - kProductThreads) / S::kCellThreads;
  const int thread = (threadIdx.x - kProductThreads) % S::kCellThreads;
  const int pass_row = thread / S::kQuads, unit = part.first_unit + thread % S::kQuads * 4;
  const int column = part.head * p.hidden + unit;
  const bool working = pass_row < S::kPassRows && unit < p.hidden;
  auto group_row = [&](int tile, int n) { return (tile * kPasses + n) * S::kPassRows + pass_row; };
  auto inside = [&](int tile, int n) { return working && group_row(tile, n) < part.rows; };
  auto carried = [&](int tile, int n) -> float4& {
    return reinterpret_cast<float4*>(shared + S::kCarriedOffset)[(tile * kPasses + n) * S::kCellThreads + thread];
  };
  auto load_row = [&](const T* base, int row, float (&values)[4]) {
    unpack<T>(*reinterpret_cast<const Words2*>(base + static_cast<size_t>(row) * p.pitch + column), values);
  };

  for (int tile = group; tile < part.tiles; tile += S::kCellGroups)
    for (int n = 0; n < kPasses; ++n) {
      const int row = part.first_row + group_row(tile, n);
      const bool given = inside(tile, n) && (S::kBackward || !(p.reset && p.reset[row]));
      Words2 words{0, 0};
      if (!S::kBackward && p.initial && given) {
        // Through fp32, so that a NaN of any payload becomes the canonical one.
        float values[4];
        load_row(p.initial, row, values);
        words = pack<T>(values);
      }
      if constexpr (S::kMemory) {
        float values[4] = {};
        const T* first = S::kBackward ? (S::kOtherState ? p.memory_last : nullptr) : p.memory_before;
        if (first && given) load_row(first, row, values);
        carried(tile, n) = {values[0], values[1], values[2], values[3]};
      }
#pragma unroll
      for (int value = 0; value < S::kIn; ++value)
        exchange.publish(0, group_row(tile, n), value * p.hidden + unit, words, working);
    }

  // Rows of the whole sequence, (t, batch row), count in 32 bits; a thread moves on from tile to tile and step to step.
  const u32 row_bytes = p.pitch * sizeof(T), column_bytes = column * sizeof(T);
  const u32 next_step = (S::kBackward ? -p.batch : p.batch) - part.tiles * S::kTileRows;
  const u32 group_start = part.first_row + pass_row;
  const u32 start = (S::kBackward ? (p.steps - 1) * p.batch : 0) + group_start;
  auto at = [&](const T* base, u32 row, int values, int value) {
    return reinterpret_cast<char*>(const_cast<T*>(base)) +
           (static_cast<u64>(row) * (values * row_bytes) + (value * row_bytes + column_bytes));
  };

  struct Place {
    int step, tile;
    u32 row;
  };
  // By some tiles; with memory, to the next of this group's. See buffer_of.
  auto advance = [&](Place& place, int tiles) {
    if constexpr (S::kMemory) {
      place.tile += S::kCellGroups, place.row += S::kCellGroups * S::kTileRows;
      if (place.tile >= part.tiles) {
        place.row += (S::kBackward ? -p.batch : p.batch) - (place.tile - group) * S::kTileRows;
        place.tile = group, ++place.step;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        place.row += S::kTileRows;
        if (++place.tile == part.tiles) place.tile = 0, ++place.step, place.row += next_step;
      }
    }
  };

  auto first_place = [&]() {
    Place place{0, 0, start};
    if constexpr (S::kMemory)
      place = {group < part.tiles ? 0 : p.steps + 1, group, start + group * S::kTileRows};
    else
      advance(place, group);
    return place;
  };

  // Every thread copies its own inputs, so it alone waits for them. Backwards they are the gradient of h, the saved
  // values and the memory before the step.
  const u32 inputs = shared_address(shared + S::kInputOffset) + (group * S::kStages * kPasses * S::kInputs * S::kCellThreads + thread) * 8;
  constexpr int kStageBytes = kPasses * S::kInputs * S::kCellThreads * 8;
  auto input_slot = [&](int stage, int n, int i) {
    return inputs + stage * kStageBytes + (n * S::kInputs + i) * (S::kCellThreads * 8);
  };
  Place ahead = first_place();
  int ahead_stage = 0;
  auto fetch_ahead = [&]() {
#pragma unroll
    for (int n = 0; n < kPasses; ++n)
      if (inside(ahead.tile, n) && ahead.step < p.steps) {
        const u32 row = ahead.row + n * S::kPassRows;
        constexpr int kSequences = S::kBackward ? S::kSaved : kGates;
        if constexpr (S::kBackward) copy_async(input_slot(ahead_stage, n, 0), at(p.input, row, 1, 0));
#pragma unroll
        for (int value = 0; value < kSequences; ++value)
          copy_async(input_slot(ahead_stage, n, value + (S::kBackward ? 1 : 0)),
                     at(S::kBackward ? p.saved : p.input, row, kSequences, value));
        if constexpr (S::kBackward && S::kMemory) {
          const bool first = ahead.step + 1 == p.steps;
          copy_async_if(input_slot(ahead_stage, n, 1 + S::kSaved),
                        first ? at(p.memory_before, row, 1, 0) : at(p.memory, row - p.batch, 1, 0),
                        !first || p.memory_before);
        }
      }
    commit_copies();
    ahead_stage = (ahead_stage + 1) % S::kStages;
    advance(ahead, S::kCellGroups);
  };
  for (int i = 0; i < S::kStages - 1; ++i) fetch_ahead();

  // What a step publishes crosses into the next time step forwards, and out of its own backwards.
  u32 masked[kPasses] = {};
  auto fetch_masks = [&](int step, int tile) {
    if (!p.reset || step + (S::kBackward ? 0 : 1) >= p.steps) return;
#pragma unroll
    for (int n = 0; n < kPasses; ++n)
      if (inside(tile, n))
        masked[n] = p.reset[static_cast<size_t>(S::kBackward ? p.steps - 1 - step : step + 1) * p.batch +
                            part.first_row + group_row(tile, n)];
  };

  // A step's wipes are fenced while the next one runs, and over before anything after that is published: several steps
  // before anyone looks at a wiped slot again. The fence takes about half a step, so a warp of its own does it, or the
  // first cell warp where none is left.
  auto finish_steps = [&](int from, int to) {
    if constexpr (Exchange::kWipes) {
#pragma unroll 1
      for (int step = from; step < to && step < products; ++step) {
        if (step + 1 < products) {
          if (S::kSpareWarp || group > 0 || thread >= 32) {
            barrier_arrive(kStepDone + (step & 1), S::kAllCells + (S::kSpareWarp ? 32 : 0));
          } else {
            barrier_sync(kStepDone + (step & 1), S::kAllCells);
            fence_gpu();
            barrier_arrive(kStepFenced + (step & 1), S::kAllCells + 32);
          }
        }
        if (step > 0) barrier_sync(kStepFenced + (step - 1 & 1), S::kAllCells + 32);
      }
    }
  };

  Words2 bias[S::kOut] = {};
  if constexpr (!S::kBackward && !Cell::kAdditive) {
    if (p.bias && working) {
#pragma unroll
      for (int product = 0; product < S::kOut; ++product)
        bias[product] = *reinterpret_cast<const Words2*>(p.bias + product * p.pitch + column);
    }
  }

  const float* sums = reinterpret_cast<const float*>(shared) + pass_row * S::kSumPitch + thread % S::kQuads * 4;
  Place here = first_place();
  finish_steps(0, here.step);
  fetch_masks(here.step, here.tile);
  Place next = here;
  for (int turn = 0; here.step < products; ++turn, here = next) {
    const int step = here.step, tile = here.tile;
    const int buffer = S::kCellGroups == 2 ? group : S::buffer_of(turn, tile), stage = turn % S::kStages;
    advance(next, S::kCellGroups);
    {
      // All that does not depend on the sums happens before they come: backwards, the derivative of the cell.
      wait_copies<S::kStages - 2>();
      float given[kPasses][S::kBackward ? 1 : kGates][4], slope[kPasses][kSlopes][4], memory[kPasses][4];
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        if constexpr (S::kMemory) {
          const float4 values = carried(tile, n);
          memory[n][0] = values.x, memory[n][1] = values.y, memory[n][2] = values.z, memory[n][3] = values.w;
        } else {
          memory[n][0] = memory[n][1] = memory[n][2] = memory[n][3] = 0;
        }
        if constexpr (S::kBackward) {
          unpack<T>(load_shared8(input_slot(stage, n, 0)), given[n][0]);
          float saved[S::kSaved][4], before[4] = {};
#pragma unroll
          for (int value = 0; value < S::kSaved; ++value)
            unpack<T>(load_shared8(input_slot(stage, n, 1 + value)), saved[value]);
          if (S::kMemory && !masked[n]) unpack<T>(load_shared8(input_slot(stage, n, 1 + S::kSaved)), before);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float unit_saved[S::kSaved], unit_slope[kSlopes];
#pragma unroll
            for (int value = 0; value < S::kSaved; ++value) unit_saved[value] = saved[value][j];
            Cell::template slopes<typename T::Math>(unit_saved, before[j], unit_slope);
#pragma unroll
            for (int i = 0; i < kSlopes; ++i) settle(slope[n][i][j] = unit_slope[i]);
          }
          if (step == 0 && p.last_gradient && inside(tile, n)) {
            float last[4];
            unpack<T>(*reinterpret_cast<const Words2*>(
                          at(p.last_gradient, group_start + tile * S::kTileRows + n * S::kPassRows, 1, 0)),
                      last);
#pragma unroll
            for (int j = 0; j < 4; ++j) given[n][0][j] += last[j];
          }
        } else {
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            unpack<T>(load_shared8(input_slot(stage, n, gate)), given[n][gate]);
        }
      }

      barrier_sync(kSumsFull + buffer, S::kSumsThreads);
      float sum[kPasses][S::kOut][4] = {};
      if constexpr (!S::kBackward && !Cell::kAdditive) {
#pragma unroll
        for (int n = 0; n < kPasses; ++n)
#pragma unroll
          for (int product = 0; product < S::kOut; ++product) unpack<T>(bias[product], sum[n][product]);
      }
      if (S::kExactThreads || pass_row < S::kPassRows) {
#pragma unroll
        for (int n = 0; n < kPasses; ++n)
#pragma unroll
          for (int part = 0; part < S::kParts; ++part)
#pragma unroll
            for (int out = 0; out < S::kOut; ++out) {
              const float4 part_sum = *reinterpret_cast<const float4*>(
                  sums + buffer * S::kBufferSums + part * S::kPartSums + n * S::kPassRows * S::kSumPitch +
                  out * S::kColumns);
              sum[n][out][0] += part_sum.x, sum[n][out][1] += part_sum.y;
              sum[n][out][2] += part_sum.z, sum[n][out][3] += part_sum.w;
            }
      }
      barrier_arrive(kSumsEmpty + buffer, S::kSumsThreads);

      if (S::kBackward && step == p.steps) {
#pragma unroll
        for (int n = 0; n < kPasses; ++n)
          if (inside(tile, n)) {
            const u32 row = group_start + tile * S::kTileRows + n * S::kPassRows;
            if constexpr (S::kMemory && !S::kOtherState) {
#pragma unroll
              for (int j = 0; j < 4; ++j) sum[n][0][j] += memory[n][j];
            }
            store_stream(at(p.initial_gradient, row, 1, 0), pack<T>(sum[n][0]));
            if constexpr (S::kOtherState) store_stream(at(p.memory_gradient, row, 1, 0), pack<T>(memory[n]));
          }
        fetch_ahead();
        finish_steps(step, next.step);
        continue;
      }

      // Backwards, what is published is the gradient of the products, and what is kept is that of pre.
      constexpr int kKept = S::kBackward ? kGates : S::kSaved;
      Words2 published[kPasses][S::kIn], kept[kPasses][kKept];
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        float to_publish[S::kIn][4], to_keep[kKept][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (S::kBackward) {
            float unit_slope[kSlopes], unit_dpre[kGates], unit_drec[S::kProducts];
#pragma unroll
            for (int i = 0; i < kSlopes; ++i) unit_slope[i] = slope[n][i][j];
            Cell::backward(unit_slope, given[n][0][j] + sum[n][0][j], memory[n][j], unit_dpre, unit_drec);
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) to_keep[gate][j] = unit_dpre[gate];
#pragma unroll
            for (int product = 0; product < S::kProducts; ++product) to_publish[product][j] = unit_drec[product];
          } else {
            float unit_pre[kGates], unit_rec[S::kProducts], unit_saved[S::kSaved];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_pre[gate] = given[n][gate][j];
#pragma unroll
            for (int product = 0; product < S::kProducts; ++product) unit_rec[product] = sum[n][product][j];
            to_publish[0][j] = Cell::template forward<typename T::Math>(unit_pre, unit_rec, memory[n][j], unit_saved);
#pragma unroll
            for (int value = 0; value < S::kSaved; ++value) to_keep[value][j] = unit_saved[value];
          }
        }
#pragma unroll
        for (int value = 0; value < S::kIn; ++value) published[n][value] = pack<T>(to_publish[value]);
#pragma unroll
        for (int value = 0; value < kKept; ++value) kept[n][value] = pack<T>(to_keep[value]);
        if (step + 1 < products) {
#pragma unroll
          for (int value = 0; value < S::kIn; ++value)
            exchange.publish(step + 1, group_row(tile, n), value * p.hidden + unit,
                             masked[n] ? Words2{0, 0} : published[n][value], working);
        }
      }
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        if (step > 0 && working) {
#pragma unroll
          for (int value = 0; value < S::kIn; ++value)
            exchange.wipe(step - 1, group_row(tile, n), value * p.hidden + unit);
        }
        const u32 row = here.row + n * S::kPassRows;
        if constexpr (S::kMemory) {
          if constexpr (!S::kBackward) {
            const Words2 words = S::kOtherState ? pack<T>(memory[n]) : published[n][0];
            unpack<T>(words, memory[n]);
            if (S::kOtherState && inside(tile, n)) {
              if (p.memory) store_stream(at(p.memory, row, 1, 0), words);
              if (step + 1 == p.steps)
                store_stream(at(p.memory_last, group_start + tile * S::kTileRows + n * S::kPassRows, 1, 0), words);
            }
          }
          carried(tile, n) = masked[n] ? float4{0, 0, 0, 0}
                                       : float4{memory[n][0], memory[n][1], memory[n][2], memory[n][3]};
        }
        if (!inside(tile, n)) continue;
        if constexpr (S::kBackward) {
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) store_stream(at(p.output, row, kGates, gate), kept[n][gate]);
          if constexpr (!Cell::kAdditive) {
#pragma unroll
            for (int product = 0; product < S::kProducts; ++product)
              store_stream(at(p.products_gradient, row, S::kProducts, product), published[n][product]);
          }
        } else {
          store_stream(at(p.output, row, 1, 0), published[n][0]);
          if (p.saved) {
#pragma unroll
            for (int value = 0; value < S::kSaved; ++value)
              store_stream(at(p.saved, row, S::kSaved, value), kept[n][value]);
          }
        }
      }
      fetch_masks(next.step, next.tile);
      fetch_ahead();
      finish_steps(step, next.step);
    }
  }
}

// See finish_steps.
template <typename S, typename Exchange>
__device__ __forceinline__ void run_fences(int products) {
  if constexpr (Exchange::kWipes) {
    for (int step = 0; step + 1 < products; ++step) {
      barrier_sync(kStepDone + (step & 1), S::kAllCells + 32);
      fence_gpu();
      barrier_arrive(kStepFenced + (step & 1), S::kAllCells + 32);
    }
  }
}

template <typename S, typename T>
__device__ __forceinline__ Part part_of(const Problem<T>& p) {
  Part part;
  part.peers = (p.hidden + S::kColumns - 1) / S::kColumns;
  const int group = blockIdx.x / part.peers, groups = gridDim.x / part.peers / (p.pitch / p.hidden);
  part.head = group / groups;
  part.first_row = group % groups * p.tiles * S::kTileRows;
  part.first_slot = group * p.tiles * S::kTileRows;
  part.first_unit = blockIdx.x % part.peers * S::kColumns;
  part.rows = min(p.tiles * S::kTileRows, p.batch - part.first_row);
  part.tiles = (part.rows + S::kTileRows - 1) / S::kTileRows;
  return part;
}

template <typename S, typename Cell, typename T, template <typename, int, int> class Exchange>
__device__ __forceinline__ void run(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = part_of<S>(p);
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);

  Exchange<T, S::kUnits, S::kBlocks> exchange(p.ring, shared + S::exchange_offset(p.tiles), part,
                                              gridDim.x / part.peers * p.tiles * S::kTileRows, S::kIn * p.hidden);
  exchange.open();
  const int warp = threadIdx.x >> 5;
  if (warp < kProductWarps) {
    take_registers<S::kProductRegisters>();
    run_products<S>(p, exchange, shared, part, products);
  } else {
    give_registers<S::kOtherRegisters>();
    if (warp < kProductWarps + S::kAllCells / 32)
      run_cells<S, Cell>(p, exchange, shared, part, products);
    else if (S::kSpareWarp && warp == kLastWarp)
      run_fences<S, Exchange<T, S::kUnits, S::kBlocks>>(products);
  }
  __syncwarp();
  exchange.close();
}

}  // namespace persistent

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks,
          template <typename, int, int> class Exchange>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_forward(const T* pre, const T* weight, const T* bias, const T* h0, const T* c0, const u8* reset, T* h,
                       T* saved, T* c, T* c_last, char* ring, int steps, int batch, int hidden, int pitch, int tiles) {
  using S = persistent::Shape<Cell, false, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::Problem<T> p{};
  p.input = pre, p.weight = weight, p.bias = bias, p.initial = h0, p.reset = reset, p.output = h, p.saved = saved;
  p.memory_before = S::kOtherState ? c0 : h0, p.memory = c, p.memory_last = c_last;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  persistent::run<S, Cell, T, Exchange>(p);
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks,
          template <typename, int, int> class Exchange>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_backward(const T* dh, const T* weight, const T* dh_last, T* dc_last, const u8* reset, T* saved,
                        const T* memory0, T* memory, T* dpre, T* drec, T* dh0, T* dc0, char* ring, int steps, int batch,
                        int hidden, int pitch, int tiles) {
  using S = persistent::Shape<Cell, true, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::Problem<T> p{};
  p.input = dh, p.weight = weight, p.last_gradient = dh_last, p.reset = reset, p.output = dpre, p.saved = saved;
  p.initial_gradient = dh0, p.memory_before = memory0, p.memory = memory, p.memory_last = dc_last;
  p.memory_gradient = dc0, p.products_gradient = drec;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  persistent::run<S, Cell, T, Exchange>(p);
}
