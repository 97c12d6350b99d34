// All T steps of a recurrence in one launch: h_t = f(pre_t + W h_{t-1}) forwards, and its gradient backwards.
//
// The grid is groups x columns. A group owns some batch rows, and its CTAs split the hidden units. Each CTA keeps its
// rows of W on chip for the whole launch, as fragments of the tensor cores' stationary operand: in registers as far as
// they go, the rest in shared memory. A step computes v^T = W h^T, so that W is that operand and the few batch rows of
// a tile are the narrow one. The eight product warps split the depth K of the product: every word of the state enters
// a CTA once, straight into the fragment that uses it, and partial sums meet in shared memory.
//
// Batch rows are independent, so each tile of 8 or 16 rows runs at its own pace: while one tile's state travels between
// the CTAs (exchange.cuh), the tensor cores work on the next.
//
// Roles of the 16 warps: 0-7 products; then one a row tile of W sums, applies the cell, publishes and stores; the last
// fences; any between have nothing to do.
#pragma once

#include "cells.cuh"
#include "exchange.cuh"
#include "watch.cuh"

namespace persistent {

constexpr int kThreads = 512;
constexpr int kProductThreads = kProductWarps * 32;
constexpr int kLastWarp = kThreads / 32 - 1;

// Named barriers; 0 is __syncthreads. Sums alternate between two buffers.
constexpr int kSumsFull = 1, kSumsEmpty = 3;
// So do these two, from step to step.
constexpr int kStepDone = 5, kStepFenced = 7;

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

// What the cell warps need to know of a kernel: kRows rows of W a CTA, tiles of kTileRows batch rows, of which the cell
// threads take kPassRows at once, and kParts partial sums of every product.
template <typename Cell, bool kBackward_, int kRows_, int kTileRows_, int kPassRows_, int kParts_, int kWeightBytes,
          int kMaxCellGroups = 2>
struct Layout {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRows = kRows_, kTileRows = kTileRows_, kPassRows = kPassRows_, kParts = kParts_;
  static constexpr int kPasses = kTileRows / kPassRows;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kIn = kBackward ? kGates : 1;   // values that a hidden unit publishes
  static constexpr int kOut = kBackward ? 1 : kGates;  // rows of the product that a hidden unit needs
  static constexpr int kColumns = kRows / kOut;        // hidden units a CTA
  static constexpr int kQuads = kColumns / 4;
  static constexpr int kCellThreads = (kPassRows * kQuads + 31) / 32 * 32;
  static constexpr bool kExactThreads = kCellThreads == kPassRows * kQuads;
  static constexpr int kSumsThreads = kProductThreads + kCellThreads;
  // Where there are warps enough, two groups of cell threads take turns, each with a buffer of sums of its own.
  static constexpr int kCellGroups =
      kMaxCellGroups == 2 && kProductThreads + 2 * kCellThreads <= kThreads ? 2 : 1;
  static constexpr int kAllCells = kCellGroups * kCellThreads;
  static constexpr bool kSpareWarp = kProductThreads + kAllCells < kThreads;
  // +4 words: the lane quads of a fragment store fall on different banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kPartSums = kTileRows * kSumPitch;
  static constexpr int kBufferSums = kParts * kPartSums;
  static constexpr int kInputs = kBackward ? 1 + kGates : kGates;  // values a cell thread reads, for each unit
  // Tiles of a cell group whose inputs are in shared memory or on the way.
  static constexpr int kStages = (kTileRows > 16 ? 4 : 64 / kTileRows) / kCellGroups;
  static constexpr int kWeightOffset = 2 * kBufferSums * 4;
  static constexpr int kInputOffset = kWeightOffset + kWeightBytes;
  static constexpr int kExchangeOffset = kInputOffset + kStages * kPasses * kInputs * kAllCells * 8;
  static_assert(kColumns % 4 == 0, "a cell thread handles four hidden units");
  static_assert(kSumsThreads <= kThreads, "too many rows of W for the cell warps");
};

// The shape of one instantiation for mma.sync: 16 x kRowTiles rows of W a CTA, of which a product warp holds
// kRegisterUnits units of depth in registers and kSharedUnits in shared memory, against tiles of 8 x kBlocks batch rows.
template <typename Cell, bool kBackward, int kRowTiles_, int kRegisterUnits_, int kSharedUnits_, int kBlocks_>
struct Shape : Layout<Cell, kBackward, 16 * kRowTiles_, kBlocks_ * kBlockRows, kBlockRows, kProductWarps,
                      kProductWarps * kSharedUnits_ * kRowTiles_ * 1024> {
  static constexpr int kRowTiles = kRowTiles_, kRegisterUnits = kRegisterUnits_, kSharedUnits = kSharedUnits_;
  static constexpr int kBlocks = kBlocks_, kUnits = kRegisterUnits + kSharedUnits;
  // Units whose fragments are received together: enough to keep the tensor cores busy, few enough for the registers.
  static constexpr int kGroupLimit = kBlocks == 1 ? 5 : 3;
  static constexpr int kGroups = (kUnits + kGroupLimit - 1) / kGroupLimit;
  static constexpr int kGroup = (kUnits + kGroups - 1) / kGroups;
  // Registers of a product thread and of the others: 512 threads share 65536.
  static constexpr int kProductRegisters = kBlocks == 1 ? 208 : 200, kOtherRegisters = 256 - kProductRegisters;
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

      const int buffer = phase & 1;
      if (phase >= 2) barrier_sync(kSumsEmpty + buffer, S::kSumsThreads);
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
  for (int last = max(phase - 2, 0); last < phase; ++last) barrier_sync(kSumsEmpty + (last & 1), S::kSumsThreads);
}

// A cell thread looks after four hidden units of one row of every pass.
template <typename S, typename Cell, typename T, typename Exchange>
__device__ __forceinline__ void run_cells(const Problem<T>& p, const Exchange& exchange, const char* shared,
                                          const Part& part, int products) {
  constexpr int kGates = S::kGates, kPasses = S::kPasses;
  const int group = (threadIdx.x - kProductThreads) / S::kCellThreads;
  const int thread = (threadIdx.x - kProductThreads) % S::kCellThreads;
  const int pass_row = thread / S::kQuads, unit = part.first_unit + thread % S::kQuads * 4;
  const bool working = pass_row < S::kPassRows && unit < p.hidden;
  auto group_row = [&](int tile, int n) { return (tile * kPasses + n) * S::kPassRows + pass_row; };
  auto inside = [&](int tile, int n) { return working && group_row(tile, n) < part.rows; };

  for (int tile = group; tile < part.tiles; tile += S::kCellGroups)
    for (int n = 0; n < kPasses; ++n) {
      const int row = part.first_row + group_row(tile, n);
      Words2 words{0, 0};
      if (!S::kBackward && p.initial && inside(tile, n) && !(p.reset && p.reset[row])) {
        // Through fp32, so that a NaN of any payload becomes the canonical one.
        float values[4];
        unpack<T>(*reinterpret_cast<const Words2*>(p.initial + static_cast<size_t>(row) * p.hidden + unit), values);
        words = pack<T>(values);
      }
#pragma unroll
      for (int gate = 0; gate < S::kIn; ++gate)
        exchange.publish(0, group_row(tile, n), gate * p.hidden + unit, words, working);
    }

  // Rows of the whole sequence, (t, batch row), count in 32 bits; a thread moves on from tile to tile and step to step.
  const u32 row_bytes = p.hidden * sizeof(T), unit_bytes = unit * sizeof(T);
  const u32 next_step = (S::kBackward ? -p.batch : p.batch) - part.tiles * S::kTileRows;
  const u32 group_start = part.first_row + pass_row;
  const u32 start = (S::kBackward ? (p.steps - 1) * p.batch : 0) + group_start;
  auto at = [&](const T* base, u32 row, int gates, int gate) {
    return reinterpret_cast<char*>(const_cast<T*>(base)) +
           (static_cast<u64>(row) * (gates * row_bytes) + (gate * row_bytes + unit_bytes));
  };

  // The tiles of all steps are dealt to the cell groups in turn.
  struct Place {
    int step, tile;
    u32 row;
  };
  auto advance = [&](Place& place, int tiles) {
    for (int i = 0; i < tiles; ++i) {
      place.row += S::kTileRows;
      if (++place.tile == part.tiles) place.tile = 0, ++place.step, place.row += next_step;
    }
  };

  // Every thread copies its own inputs, so it alone waits for them. Backwards, the gradient of h comes before the v's.
  const u32 inputs = shared_address(shared + S::kInputOffset) + (group * S::kStages * kPasses * S::kInputs * S::kCellThreads + thread) * 8;
  constexpr int kStageBytes = kPasses * S::kInputs * S::kCellThreads * 8;
  auto input_slot = [&](int stage, int n, int i) {
    return inputs + stage * kStageBytes + (n * S::kInputs + i) * (S::kCellThreads * 8);
  };
  Place ahead{0, 0, start};
  advance(ahead, group);
  int ahead_stage = 0;
  auto fetch_ahead = [&]() {
#pragma unroll
    for (int n = 0; n < kPasses; ++n)
      if (inside(ahead.tile, n) && ahead.step < p.steps) {
        const u32 row = ahead.row + n * S::kPassRows;
        if constexpr (S::kBackward) copy_async(input_slot(ahead_stage, n, 0), at(p.input, row, 1, 0));
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          copy_async(input_slot(ahead_stage, n, gate + (S::kBackward ? 1 : 0)),
                     at(S::kBackward ? p.v : p.input, row, kGates, gate));
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

  const float* sums = reinterpret_cast<const float*>(shared) + pass_row * S::kSumPitch + thread % S::kQuads * 4;
  Place here{0, 0, start};
  advance(here, group);
  finish_steps(0, here.step);
  fetch_masks(here.step, here.tile);
  Place next = here;
  for (int turn = 0; here.step < products; ++turn, here = next) {
    const int step = here.step, tile = here.tile;
    const int buffer = S::kCellGroups == 2 ? group : turn & 1, stage = turn % S::kStages;
    advance(next, S::kCellGroups);
    {
      // All that does not depend on the sums happens before they come: backwards, the derivative of the cell.
      wait_copies<S::kStages - 2>();
      float given[kPasses][S::kBackward ? 1 : kGates][4], slope[kPasses][kGates][4];
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        if constexpr (S::kBackward) {
          unpack<T>(load_shared8(input_slot(stage, n, 0)), given[n][0]);
          float v[kGates][4];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) unpack<T>(load_shared8(input_slot(stage, n, 1 + gate)), v[gate]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float unit_v[kGates], unit_slope[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = v[gate][j];
            Cell::template slope<typename T::Math>(unit_v, unit_slope);
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) settle(slope[n][gate][j] = unit_slope[gate]);
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
          if (inside(tile, n))
            store_stream(at(p.initial_gradient, group_start + tile * S::kTileRows + n * S::kPassRows, 1, 0),
                         pack<T>(sum[n][0]));
        fetch_ahead();
        finish_steps(step, next.step);
        continue;
      }

      Words2 published[kPasses][S::kIn], kept[kPasses][kGates];
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        if constexpr (S::kBackward) {
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            float dv[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) dv[j] = (given[n][0][j] + sum[n][0][j]) * slope[n][gate][j];
            published[n][gate] = pack<T>(dv);
          }
        } else {
          float h[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float unit_v[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = given[n][gate][j] += sum[n][gate][j];
            h[j] = Cell::template forward<typename T::Math>(unit_v);
          }
          published[n][0] = pack<T>(h);
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) kept[n][gate] = pack<T>(given[n][gate]);
        }
        if (step + 1 < products) {
#pragma unroll
          for (int gate = 0; gate < S::kIn; ++gate)
            exchange.publish(step + 1, group_row(tile, n), gate * p.hidden + unit,
                             masked[n] ? Words2{0, 0} : published[n][gate], working);
        }
      }
#pragma unroll
      for (int n = 0; n < kPasses; ++n) {
        if (step > 0 && working) {
#pragma unroll
          for (int gate = 0; gate < S::kIn; ++gate)
            exchange.wipe(step - 1, group_row(tile, n), gate * p.hidden + unit);
        }
        if (!inside(tile, n)) continue;
        const u32 row = here.row + n * S::kPassRows;
#pragma unroll
        for (int gate = 0; gate < S::kIn; ++gate)
          store_stream(at(p.output, row, S::kIn, gate), published[n][gate]);
        if (!S::kBackward && p.v) {
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) store_stream(at(p.v, row, kGates, gate), kept[n][gate]);
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
  part.first_row = blockIdx.x / part.peers * p.tiles * S::kTileRows;
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

  Exchange<T, S::kUnits, S::kBlocks> exchange(p.ring, shared + S::kExchangeOffset, part,
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
    persistent_forward(const T* pre, const T* weight, const T* h0, const u8* reset, T* h, T* v, char* ring, int steps,
                       int batch, int hidden, int tiles) {
  using S = persistent::Shape<Cell, false, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::run<S, Cell, T, Exchange>({pre, weight, h0, nullptr, reset, h, v, nullptr, ring, steps, batch, hidden, tiles});
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks,
          template <typename, int, int> class Exchange>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_backward(const T* dh, const T* weight, const T* dh_last, const u8* reset, T* v, T* dpre, T* dh0,
                        char* ring, int steps, int batch, int hidden, int tiles) {
  using S = persistent::Shape<Cell, true, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::run<S, Cell, T, Exchange>(
      {dh, weight, nullptr, dh_last, reset, dpre, v, dh0, ring, steps, batch, hidden, tiles});
}
