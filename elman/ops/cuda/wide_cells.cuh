// The cell where its sums lie as wgmma leaves them: what a warp applies it to, reads for it, publishes and stores.
#pragma once

#include "wide_layout.cuh"

namespace wide {

// A warp with 16 units, two rows of wgmma's sums a lane, and S::kCellBlocks blocks of every tile.
template <typename S, typename Cell, typename T>
struct Cells {
  static constexpr int kWords = 2 * S::kCellBlocks;  // pairs of batch rows of one unit: of each block, and 8 units on
  static constexpr int kSums = 2 * kWords;
  static constexpr int kCopies = (2 * S::kCellRows + 31) / 32;

  // What does not depend on the sums of a tile.
  struct Given {
    u32 input[S::kInputs][kWords];
    float slope[S::kBackward ? kWords : 1][2];
    u32 kept[S::kCellBlocks];
  };

  const Problem<T>& p;
  const Ring<S>& ring;
  const Part& part;
  int lane, unit, pair;  // the first unit of a lane, and the first batch row of a block
  int column, copied_row;
  u32 own, flag, stage, out, fragment, copied;

  // The warp has the CTA's `units`-th 16 units and raises its `word`-th flag; `memory` is S::kStages pieces of its own.
  __device__ __forceinline__ Cells(const Problem<T>& p, const Ring<S>& ring, const Part& part, int units,
                                   int first_block, int word, u32 memory)
      : p(p), ring(ring), part(part) {
    lane = threadIdx.x & 31;
    unit = part.first_unit + units * kWarpRows + lane / 4;  // and 8 on
    pair = first_block * kBlockRows + lane % 4 * 2;
    own = Ring<S>::core((part.first_unit + units * kWarpRows) / 8, first_block) + lane * 4;
    flag = part.first_unit / S::kColumns * Ring<S>::kFlagBytes + word * 4;
    // Tensors of the whole sequence pass through shared memory, where a warp has its 16 units of a tile's rows, 32
    // bytes a row; the halves of every other four rows are swapped, so that no two of the eight rows of a matrix share
    // a bank.
    stage = memory, out = stage + S::kOutStage * S::kStageBytes;
    fragment = lane % 8 * 32 + ((lane / 8 ^ lane / 4) & 1) * 16;
    copied = lane / 2 * 32 + ((lane ^ lane / 8) & 1) * 16;
    column = part.first_unit + units * kWarpRows + lane % 2 * 8;
    copied_row = first_block * kBlockRows + lane / 2;
  }

  __device__ __forceinline__ void publish(int step, int tile, const u32 (&words)[kWords]) const {
    char* to = ring.at(step, tile) + own;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int block = 0; block < S::kCellBlocks; ++block)
        store_strong4(to + Ring<S>::core(half, block), words[block * 2 + half]);
    if (lane == 0) store_strong4(ring.flags + tile * ring.flag_bytes + flag, step);
  }

  __device__ __forceinline__ void publish_initial(int tile) const {
    u32 words[kWords] = {};
    if (!S::kBackward && p.initial)
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float value[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = pair + i / 2 * kBlockRows + j, group_row = tile * S::kTileRows + row;
          const bool wiped = p.reset && group_row < part.rows && p.reset[part.first_row + group_row];
          value[j] = wiped ? 0 : load_value(p.initial, tile, row, i % 2);
        }
        words[i] = T::pack(value[0], value[1]);
      }
    publish(0, tile, words);
  }

  // A value of a tensor of one step, which only the first and the last one need.
  __device__ __forceinline__ float load_value(const T* base, int tile, int row, int half) const {
    const int group_row = tile * S::kTileRows + row;
    if (group_row >= part.rows || unit + half * 8 >= p.hidden) return 0.0f;
    const u16 bits =
        base[static_cast<size_t>(part.first_row + group_row) * p.pitch + part.head * p.hidden + unit + half * 8].bits;
    return T::low(bits);
  }

  // Is the i-th of the pieces there that a lane copies of a tile?
  __device__ __forceinline__ bool copies(int tile, int i) const {
    return column < p.hidden && lane / 2 + 16 * i < S::kCellRows &&
           tile * S::kTileRows + copied_row + 16 * i < part.rows;
  }
  __device__ __forceinline__ char* at(const T* base, u32 row, int values, int value) const {
    return reinterpret_cast<char*>(const_cast<T*>(base)) +
           (static_cast<u64>(row * values + value) * p.pitch + part.head * p.hidden + column) * sizeof(T);
  }
  __device__ __forceinline__ u32 row_of(int step, int tile) const {
    const int time = S::kBackward ? p.steps - 1 - step : step;
    return static_cast<u32>(time) * p.batch + part.first_row + tile * S::kTileRows + copied_row;
  }
  __device__ __forceinline__ void fetch_rows(u32 to, const T* base, u32 row, int tile, int values, int value) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool wanted = copies(tile, i);
      if (lane / 2 + 16 * i < S::kCellRows)
        copy_async16_if(to + copied + i * 512, at(base, wanted ? row + 16 * i : 0, values, value), wanted);
    }
    commit_copies();
  }
  __device__ __forceinline__ void fetch(int step, int tile) const {
    if (step >= p.steps) return;
    const u32 row = row_of(step, tile);
    if constexpr (S::kBackward) fetch_rows(stage, p.input, row, tile, 1, 0);
    constexpr int kSequences = S::kBackward ? Cell::kSaved : Cell::kGates, kFirst = S::kInputs - kSequences;
#pragma unroll
    for (int n = 0; n < kSequences; ++n)
      fetch_rows(stage + (kFirst + n) * S::kStageBytes, S::kBackward ? p.saved : p.input, row, tile, kSequences, n);
  }
  __device__ __forceinline__ void store(const u32 (&words)[kWords], T* base, u32 row, int tile, int values,
                                        int value) const {
    __syncwarp();
#pragma unroll
    for (int block = 0; block < S::kCellBlocks; ++block)
      store_transposed(out + fragment + block * 256, words[block * 2], words[block * 2 + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      if (copies(tile, i)) store_stream16(at(base, row + 16 * i, values, value), load_shared(out + copied + i * 512));
  }

  // What has been fetched; then that may be overwritten.
  __device__ __forceinline__ void take(Given& given) const {
    wait_copies<0>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < S::kInputs; ++n)
#pragma unroll
      for (int block = 0; block < S::kCellBlocks; ++block)
        load_transposed(stage + n * S::kStageBytes + fragment + block * 256, given.input[n][block * 2],
                        given.input[n][block * 2 + 1]);
    __syncwarp();
  }
  __device__ __forceinline__ void prepare(int step, int tile, Given& given) const {
    if constexpr (S::kBackward) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float saved[1] = {j ? T::high(given.input[1][i]) : T::low(given.input[1][i])};
          float unit_slope[1];
          Cell::template slopes<typename T::Math>(saved, 0.0f, unit_slope);
          settle(given.slope[i][j] = unit_slope[0]);
        }
    }
    // What a step publishes crosses into the next time step forwards, and out of its own backwards.
#pragma unroll
    for (int block = 0; block < S::kCellBlocks; ++block) given.kept[block] = ~0u;
    if (p.reset && step + (S::kBackward ? 0 : 1) < p.steps)
#pragma unroll
      for (int block = 0; block < S::kCellBlocks; ++block)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int group_row = tile * S::kTileRows + pair + block * kBlockRows + j;
          const u32 time = S::kBackward ? p.steps - 1 - step : step + 1;
          if (group_row < part.rows && p.reset[time * p.batch + part.first_row + group_row])
            given.kept[block] &= j ? 0x0000ffffu : 0xffff0000u;
        }
  }

  // Applies the cell to the sums of a tile, publishes if a product follows, and stores.
  __device__ __forceinline__ void finish(int step, int tile, int products, const Given& given,
                                         float (&mine)[kSums]) const {
    const u32 row = row_of(step, tile);
    u32 published[kWords], saved[kWords];
    if constexpr (S::kBackward) {
      if (step == p.steps) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) published[i] = T::pack(mine[i * 2], mine[i * 2 + 1]);
        store(published, p.initial_gradient, part.first_row + tile * S::kTileRows + copied_row, tile, 1, 0);
        return;
      }
      if (step == 0 && p.last_gradient) {
        fetch_rows(out, p.last_gradient, part.first_row + tile * S::kTileRows + copied_row, tile, 1, 0);
        wait_copies<0>();
        __syncwarp();
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block) {
          u32 last_words[2];
          load_transposed(out + fragment + block * 256, last_words[0], last_words[1]);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            mine[block * 4 + i] += i % 2 ? T::high(last_words[i / 2]) : T::low(last_words[i / 2]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float result[2], value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float memory = 0, pre[1], rec[1], other[1];
        if constexpr (S::kBackward) {
          const float dh = j ? T::high(given.input[0][i]) : T::low(given.input[0][i]);
          Cell::backward({given.slope[i][j]}, dh + mine[i * 2 + j], memory, pre, rec);
          result[j] = rec[0];
        } else {
          pre[0] = j ? T::high(given.input[0][i]) : T::low(given.input[0][i]), rec[0] = mine[i * 2 + j];
          result[j] = Cell::template forward<typename T::Math>(pre, rec, memory, other);
          value[j] = other[0];
        }
      }
      published[i] = T::pack(result[0], result[1]);
      if constexpr (!S::kBackward) saved[i] = T::pack(value[0], value[1]);
    }
    if (step + 1 < products) {
      u32 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = published[i] & given.kept[i / 2];
      publish(step + 1, tile, words);
    }
    store(published, p.output, row, tile, 1, 0);
    if constexpr (!S::kBackward)
      if (p.saved) store(saved, p.saved, row, tile, 1, 0);
  }
};

}  // namespace wide
