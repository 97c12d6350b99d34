// The cell warps: partial sums in, the cell or its derivative, the state to the group and results to memory.
#pragma once

#include "cells.cuh"
#include "persistent_layout.cuh"

namespace persistent {

// Four neighbours of a memory, whose numbers are those of the tensors or fp32.
template <typename M>
__device__ __forceinline__ void read4(const void* from, float (&values)[4]) {
  if constexpr (sizeof(M) == 4) {
    const float4 v = *static_cast<const float4*>(from);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    unpack<M>(*static_cast<const Words2*>(from), values);
  }
}

template <typename M>
__device__ __forceinline__ void write4(char* to, const float (&values)[4]) {
  if constexpr (sizeof(M) == 4) {
    store_stream(to, {__float_as_uint(values[0]), __float_as_uint(values[1])});
    store_stream(to + 8, {__float_as_uint(values[2]), __float_as_uint(values[3])});
  } else {
    store_stream(to, pack<M>(values));
  }
}

// A step's wipes are fenced while the next one runs, and over before anything after that is published: several steps
// before anyone looks at a wiped slot again. The fence takes about half a step, so a warp of its own does it, or the
// first cell warp where none is left.
template <typename S, typename Exchange>
__device__ __forceinline__ void finish_steps(int from, int to, int products) {
  if constexpr (Exchange::kWipes) {
#pragma unroll 1
    for (int step = from; step < to && step < products; ++step) {
      if (step + 1 < products) {
        if (S::kSpareWarp || threadIdx.x >= kProductThreads + 32) {
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
}

// A cell thread looks after four hidden units of one row of every pass. Where the cell has a memory, the thread carries
// it from step to step in shared memory, and backwards its gradient in fp32. The memory itself is rounded to M, so
// that a sequence in chunks gives what it gives in one piece.
template <typename S, typename Cell, typename T, typename M, typename Exchange>
__device__ __forceinline__ void run_cells(const Problem<T, M>& p, const Exchange& exchange, char* shared, const Part& part,
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
        const M* first = S::kBackward ? (S::kOtherState ? p.memory_last : nullptr) : p.memory_before;
        if (first && given) read4<M>(first + static_cast<size_t>(row) * p.pitch + column, values);
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
  auto at_memory = [&](const M* base, u32 row) {
    return reinterpret_cast<char*>(const_cast<M*>(base)) +
           (static_cast<u64>(row) * (S::kMemoryWidth * row_bytes) + S::kMemoryWidth * column_bytes);
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
          const char* from = first ? at_memory(p.memory_before, row) : at_memory(p.memory, row - p.batch);
#pragma unroll
          for (int i = 0; i < S::kMemoryWidth; ++i)
            copy_async_if(input_slot(ahead_stage, n, 1 + S::kSaved + i), from + 8 * i, !first || p.memory_before);
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
  finish_steps<S, Exchange>(0, here.step, products);
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
          if (S::kMemory && !masked[n]) {
            const Words2 words = load_shared8(input_slot(stage, n, 1 + S::kSaved));
            if constexpr (S::kMemoryWidth == 2) {
              const Words2 more = load_shared8(input_slot(stage, n, 2 + S::kSaved));
              before[0] = __uint_as_float(words.x), before[1] = __uint_as_float(words.y);
              before[2] = __uint_as_float(more.x), before[3] = __uint_as_float(more.y);
            } else {
              unpack<T>(words, before);
            }
          }
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
            if constexpr (S::kOtherState) write4<M>(at_memory(p.memory_gradient, row), memory[n]);
          }
        fetch_ahead();
        finish_steps<S, Exchange>(step, next.step, products);
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
            if constexpr (S::kMemoryWidth == 1)
              unpack<T>(S::kOtherState ? pack<T>(memory[n]) : published[n][0], memory[n]);
            if (S::kOtherState && inside(tile, n)) {
              if (p.memory) write4<M>(at_memory(p.memory, row), memory[n]);
              if (step + 1 == p.steps)
                write4<M>(at_memory(p.memory_last, group_start + tile * S::kTileRows + n * S::kPassRows), memory[n]);
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
      finish_steps<S, Exchange>(step, next.step, products);
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

}  // namespace persistent
