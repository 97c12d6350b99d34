// All T steps of a recurrence in one launch, for large batches on Hopper: the products by wgmma, the cell in registers.
//
// The frame is that of persistent.cuh: groups of batch rows, CTAs that split the hidden units, W on chip for the whole
// launch, a state whose data is its own flag. A CTA owns 64 rows of W, one wgmma tall, against tiles of 16 to 64 batch
// rows. Two warp groups multiply; the sums that a thread gets from wgmma are the ones that it applies the cell to, and
// what it publishes lies as the next step's wgmma reads it: nothing is transposed and nobody waits for another warp.
//
//   kSplit 1  each warp group has tiles of its own, and both share W: the part in shared memory lies there once, the
//             part in registers in each. While one waits for the state of its tile, the other has the tensor cores.
//   kSplit 2  both work on the same tile and each holds the weights of every other chunk of the depth, so that twice as
//             many fit; they swap partial sums, and each applies the cell to half of the rows.
//
// Loader warps bring the state from L2 into a ring of slots in shared memory, chunk by chunk of the depth, when the
// flags of those who publish a chunk are up. No fence stands between data and flag, since that would cost more than the
// exchange itself: nearly always the data has come too, and what has not is a NaN (see RingSlots), which no product
// hides. So a warp group whose sums hold a NaN looks for words that are missing, waits for them and multiplies once
// more; only a NaN that is really there survives that.
#pragma once

#include "wide_layout.cuh"

namespace wide {

// Words of the state that a copy came too early for, polled for until they are there, by a warp group that has done
// with what is at `to`. All of them, where `to` is not the place that the copy went to.
template <typename S>
__device__ __forceinline__ void repair(u32 to, const char* from, int bytes, bool all, int barrier) {
  ::barrier_sync(barrier, kGroupThreads);
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads * 16; i < bytes; i += kGroupThreads * 16) {
    Words4 words = all ? Words4{Ring<S>::kEmpty, 0, 0, 0} : load_shared(to + i);
    for (u32 polls = 0; max(max(words.x, words.y), max(words.z, words.w)) == Ring<S>::kEmpty; ++polls) {
      words = load_strong(from + i / S::kChunkBytes * ((S::kSplit - 1) * S::kChunkBytes) + i);
      if (polls > kSpinLimit) __trap();
    }
    store_shared(to + i, words);
  }
  fence_async_shared();
  ::barrier_sync(barrier, kGroupThreads);
}

template <typename S>
__device__ __forceinline__ void release(const Slots<S>& slots, u32 phase, int n, int all) {
  if (threadIdx.x % 32 == 0) barrier_arrive(slots.empty + Place<S>(phase, n, all).slot * 8);
}

// The sums of a tile, 64 x kTileRows, over the chunks of a warp group. kAgain: of the state as it is once all of it has
// come; where slots have been given back, each chunk is fetched anew, into the last slot. The order of the sums is the
// same, so the bits are.
//
// Chunks of weights in registers and in shared memory take turns, because a wgmma holds its warp until it has read its
// registers: alone, they would leave the tensor cores idle between two chunks.
template <typename S, typename T, bool kAgain>
__device__ __forceinline__ void multiply(float (&sum)[S::kBlocks * 4],
                                         const u32 (&weights)[S::kRegisterChunks * kChunkSteps][4], u32 shared_weights,
                                         const Slots<S>& slots, const char* state, u32 phase, int all, int group,
                                         bool passes) {
  constexpr u32 kHigh = matrix_high(kCoreBytes), kStepStride = 2 * S::kBlocks * kCoreBytes >> 4;
  constexpr bool kFetch = kAgain && S::kRelease;  // other slots are in use again
  u32 data = slots.data;
  // Else the compiler would keep what both passes need in registers, which the weights have taken.
  if constexpr (kAgain) asm volatile("" : "+r"(data), "+r"(shared_weights));
  const u32 last_slot = Place<S>(phase, all - 1, all).slot;
  if constexpr (kAgain && !kFetch)
    repair<S>(data, state + chunk_of<S>(0, group) * S::kChunkBytes, all * S::kChunkBytes, false, kVote + group);
#pragma unroll
  for (int n = 0; n < S::kChunks; ++n)
    if (S::kSplit == 1 || n < S::kChunks - 1 || n < all) {
      const Place<S> place(phase, n, all);
      const u32 slot = data + (kFetch ? last_slot : place.slot) * S::kChunkBytes;
      if constexpr (kFetch)
        repair<S>(slot, state + chunk_of<S>(n, group) * S::kChunkBytes, S::kChunkBytes, true, kVote + group);
      else if constexpr (!kAgain)
        barrier_wait(slots.full + place.slot * 8, place.parity);
      const u32 low = matrix_low(slot, S::kBlocks * kCoreBytes);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kChunkSteps; ++s) {
        const int i = S::index(n) * kChunkSteps + s;
        if (S::in_registers(n))
          Wgmma<T>::multiply(sum, weights[i % (S::kRegisterChunks * kChunkSteps)], low + s * kStepStride, kHigh,
                             n + s > 0);
        else
          Wgmma<T>::multiply(sum, shared_weights + i * (kStepBytes >> 4), kHigh, low + s * kStepStride, kHigh,
                             n + s > 0);
      }
      wgmma_commit();
      if constexpr (kAgain) {
        wgmma_wait<0>();
      } else if (S::kRelease && n > 0) {
        wgmma_wait<1>();
        release(slots, phase, n - 1, all);
      }
      if (n == S::kChunks / 2 && passes) ::barrier_arrive(kTurn + (group ^ 1), kGroups * kGroupThreads);
    }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < S::kBlocks * 4; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run_products(const Problem<T>& p, const Ring<S>& ring, char* shared, const Part& part,
                                             int chunks, int products) {
  constexpr int kWords = 2 * S::kCellBlocks;  // pairs of batch rows of one unit: of each block, and 8 units on
  const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x / 32 % kGroupWarps);
  const int group = uniform(threadIdx.x / kGroupThreads);
  const Slots<S> slots(shared, group);
  const int first_block = S::kSplit == 2 ? group * S::kCellBlocks : 0;
  const int unit = part.first_unit + warp * kWarpRows + lane / 4;  // and 8 on
  const int pair = first_block * kBlockRows + lane % 4 * 2;        // the first batch row of a block

  u32 weights[S::kRegisterChunks * kChunkSteps][4];
#pragma unroll
  for (int s = 0; s < S::kRegisterChunks * kChunkSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[s][i] = load_weights<S>(p, part, warp * kWarpRows + lane / 4 + i % 2 * 8,
                                      chunk_of<S>(S::of_registers(s / kChunkSteps), group) * kChunkDepth +
                                          s % kChunkSteps * 16 + i / 2 * 8 + lane % 4 * 2);

  // A value of a tensor of one step, which only the first and the last one need.
  auto load_value = [&](const T* base, int tile, int row, int half) {
    const int group_row = tile * S::kTileRows + row;
    if (group_row >= part.rows || unit + half * 8 >= p.hidden) return 0.0f;
    const u16 bits =
        base[static_cast<size_t>(part.first_row + group_row) * p.pitch + part.head * p.hidden + unit + half * 8].bits;
    return T::low(bits);
  };
  const u32 own = Ring<S>::core((part.first_unit + warp * kWarpRows) / 8, first_block) + lane * 4;
  const u32 flag =
      part.first_unit / kRows * Ring<S>::kFlagBytes + ((S::kSplit == 2 ? group * kGroupWarps : 0) + warp) * 4;
  auto publish = [&](int step, int tile, const u32(&words)[kWords]) {
    char* to = ring.at(step, tile) + own;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int block = 0; block < S::kCellBlocks; ++block)
        store_strong4(to + Ring<S>::core(half, block), words[block * 2 + half]);
    if (lane == 0) store_strong4(ring.flags + tile * ring.flag_bytes + flag, step);
  };

  const int first_tile = S::kSplit == 2 ? 0 : group;
  for (int tile = first_tile; tile < part.tiles; tile += S::kTileGroups) {
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

  // Tensors of the whole sequence pass through shared memory, where a warp has its 16 units of a tile's rows, 32 bytes
  // a row; the halves of every other four rows are swapped, so that no two of the eight rows of a matrix share a bank.
  const u32 stage =
      shared_address(shared) + S::kStageOffset + (group * kGroupWarps + warp) * ((S::kInputs + 1) * S::kStageBytes);
  const u32 out = stage + S::kInputs * S::kStageBytes;
  const u32 fragment = lane % 8 * 32 + ((lane / 8 ^ lane / 4) & 1) * 16,
            copied = lane / 2 * 32 + ((lane ^ lane / 8) & 1) * 16;
  constexpr int kCopies = (2 * S::kCellRows + 31) / 32;
  const int column = part.first_unit + warp * kWarpRows + lane % 2 * 8;
  const int copied_row = first_block * kBlockRows + lane / 2;
  // Is the i-th of the pieces there that a lane copies of a tile?
  auto copies = [&](int tile, int i) {
    return column < p.hidden && lane / 2 + 16 * i < S::kCellRows &&
           tile * S::kTileRows + copied_row + 16 * i < part.rows;
  };
  auto at = [&](const T* base, u32 row, int values, int value) {
    return reinterpret_cast<char*>(const_cast<T*>(base)) +
           (static_cast<u64>(row * values + value) * p.pitch + part.head * p.hidden + column) * sizeof(T);
  };
  auto time_of = [&](int step) { return S::kBackward ? p.steps - 1 - step : step; };
  auto row_of = [&](int step, int tile) {
    return static_cast<u32>(time_of(step)) * p.batch + part.first_row + tile * S::kTileRows + copied_row;
  };
  auto fetch_rows = [&](u32 to, const T* base, u32 row, int tile, int values, int value) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool wanted = copies(tile, i);
      if (lane / 2 + 16 * i < S::kCellRows)
        copy_async16_if(to + copied + i * 512, at(base, wanted ? row + 16 * i : 0, values, value), wanted);
    }
    commit_copies();
  };
  auto fetch = [&](int step, int tile) {
    if (step >= p.steps) return;
    const u32 row = row_of(step, tile);
    if constexpr (S::kBackward) fetch_rows(stage, p.input, row, tile, 1, 0);
    constexpr int kSequences = S::kBackward ? Cell::kSaved : Cell::kGates, kFirst = S::kInputs - kSequences;
#pragma unroll
    for (int n = 0; n < kSequences; ++n)
      fetch_rows(stage + (kFirst + n) * S::kStageBytes, S::kBackward ? p.saved : p.input, row, tile, kSequences, n);
  };
  auto store = [&](const u32(&words)[kWords], T* base, u32 row, int tile, int values, int value) {
    __syncwarp();
#pragma unroll
    for (int block = 0; block < S::kCellBlocks; ++block)
      store_transposed(out + fragment + block * 256, words[block * 2], words[block * 2 + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      if (copies(tile, i)) store_stream16(at(base, row + 16 * i, values, value), load_shared(out + copied + i * 512));
  };

  const u32 shared_weights =
      matrix_low(shared_address(shared) + S::kWeightOffset +
                     (S::kSplit == 2 ? group * (S::kSharedChunks * kChunkSteps * kStepBytes) : 0),
                 kStepBytes / 2);

  const int all = S::kSplit == 2 ? (chunks - group + 1) / 2 : chunks;  // of this warp group
  u32 phase = 0;
  if (first_tile < part.tiles) fetch(0, first_tile);
  for (int step = 0; step < products; ++step)
    for (int tile = first_tile; tile < part.tiles; tile += S::kTileGroups, ++phase) {
      // All that does not depend on the sums happens before them.
      wait_copies<0>();
      __syncwarp();
      u32 given[S::kInputs][kWords];
#pragma unroll
      for (int n = 0; n < S::kInputs; ++n)
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block)
          load_transposed(stage + n * S::kStageBytes + fragment + block * 256, given[n][block * 2],
                          given[n][block * 2 + 1]);
      __syncwarp();
      if (tile + S::kTileGroups < part.tiles)
        fetch(step, tile + S::kTileGroups);
      else
        fetch(step + 1, first_tile);
      float slope[S::kBackward ? kWords : 1][2];
      if constexpr (S::kBackward) {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float saved[1] = {j ? T::high(given[1][i]) : T::low(given[1][i])};
            float unit_slope[1];
            Cell::template slopes<typename T::Math>(saved, 0.0f, unit_slope);
            settle(slope[i][j] = unit_slope[0]);
          }
      }
      // What a step publishes crosses into the next time step forwards, and out of its own backwards.
      u32 kept[S::kCellBlocks];
#pragma unroll
      for (int block = 0; block < S::kCellBlocks; ++block) kept[block] = ~0u;
      if (p.reset && step + (S::kBackward ? 0 : 1) < p.steps)
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int group_row = tile * S::kTileRows + pair + block * kBlockRows + j;
            if (group_row < part.rows &&
                p.reset[static_cast<size_t>(S::kBackward ? p.steps - 1 - step : step + 1) * p.batch + part.first_row +
                        group_row])
              kept[block] &= j ? 0x0000ffffu : 0xffff0000u;
          }

      // The warp groups take turns: two products at a time would take twice as long each, and then both would wait.
      if (S::kSplit == 1 && (tile > 0 || (step > 0 && part.tiles % 2 == 0)))
        ::barrier_sync(kTurn + group, kGroups * kGroupThreads);
      float sum[S::kBlocks * 4];
      float mine[S::kCellBlocks * 4];
      const u32 swap = shared_address(shared) + S::kSwapOffset + (phase & 1) * (S::kSwapBytes / 2) +
                       threadIdx.x % kGroupThreads * 16;
      constexpr int kGroupSwap = S::kCellBlocks * kGroupThreads * 16;
      const bool passes = S::kSplit == 1 && (tile + 1 < part.tiles || (group == 1 && step + 1 < products));
      // What this warp group goes on with; whether any of its sums, or of the other's, is a NaN.
      auto share = [&]() {
        float total[4] = {};
#pragma unroll
        for (int i = 0; i < S::kBlocks * 4; ++i) total[i % 4] += sum[i];
        total[0] = (total[0] + total[1]) + (total[2] + total[3]);
        const bool suspect = total[0] != total[0];
        if constexpr (S::kSplit == 1) {
#pragma unroll
          for (int i = 0; i < S::kCellBlocks * 4; ++i) mine[i] = sum[i];
          return any_of(kVote + group, kGroupThreads, suspect);
        } else {
#pragma unroll
          for (int block = 0; block < S::kCellBlocks; ++block) {
            // Selected, not indexed: registers have no addresses.
            u32 theirs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float low = sum[block * 4 + i], high = sum[(block + S::kCellBlocks) * 4 + i];
              mine[block * 4 + i] = group ? high : low, theirs[i] = __float_as_uint(group ? low : high);
            }
            store_shared(swap + (group ^ 1) * kGroupSwap + block * (kGroupThreads * 16),
                         {theirs[0], theirs[1], theirs[2], theirs[3]});
          }
          return any_of(kSumsReady, kGroups * kGroupThreads, suspect);
        }
      };
      multiply<S, T, false>(sum, weights, shared_weights, slots, ring.at(step, tile), phase, all, group, passes);
      if (__builtin_expect(share(), 0)) {
        multiply<S, T, true>(sum, weights, shared_weights, slots, ring.at(step, tile), phase, all, group, false);
        share();
      }
      if constexpr (S::kRelease)
        release(slots, phase, all - 1, all);
      else if (lane < all)
        barrier_arrive(slots.empty + lane * 8);
      if constexpr (S::kSplit == 2) {
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block) {
          const Words4 theirs = load_shared(swap + group * kGroupSwap + block * (kGroupThreads * 16));
          mine[block * 4] += __uint_as_float(theirs.x), mine[block * 4 + 1] += __uint_as_float(theirs.y);
          mine[block * 4 + 2] += __uint_as_float(theirs.z), mine[block * 4 + 3] += __uint_as_float(theirs.w);
        }
      }
      const u32 row = row_of(step, tile);
      u32 published[kWords], saved[kWords];
      if constexpr (S::kBackward) {
        if (step == p.steps) {
#pragma unroll
          for (int i = 0; i < kWords; ++i) published[i] = T::pack(mine[i * 2], mine[i * 2 + 1]);
          store(published, p.initial_gradient, part.first_row + tile * S::kTileRows + copied_row, tile, 1, 0);
          continue;
        }
        if (step == 0 && p.last_gradient) {
          fetch_rows(out, p.last_gradient, part.first_row + tile * S::kTileRows + copied_row, tile, 1, 0);
          wait_copies<0>();
          __syncwarp();
#pragma unroll
          for (int block = 0; block < S::kCellBlocks; ++block) {
            u32 last[2];
            load_transposed(out + fragment + block * 256, last[0], last[1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) mine[block * 4 + i] += i % 2 ? T::high(last[i / 2]) : T::low(last[i / 2]);
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
            const float dh = j ? T::high(given[0][i]) : T::low(given[0][i]);
            Cell::backward({slope[i][j]}, dh + mine[i * 2 + j], memory, pre, rec);
            result[j] = rec[0];
          } else {
            pre[0] = j ? T::high(given[0][i]) : T::low(given[0][i]), rec[0] = mine[i * 2 + j];
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
        for (int i = 0; i < kWords; ++i) words[i] = published[i] & kept[i / 2];
        publish(step + 1, tile, words);
      }
      store(published, p.output, row, tile, 1, 0);
      if constexpr (!S::kBackward)
        if (p.saved) store(saved, p.saved, row, tile, 1, 0);
    }
}

// Brings every other chunk of a warp group's tiles, once the flags of the eight warps that publish it are up. No fence
// stands between data and flag: now and then a word is later than its flag, see `multiply`.
//
// Whoever has published step s has received all of step s - 1, from CTAs that had done with step s - 2: what this CTA
// has published of that is wiped then. The wipe is over before anything of step s + 1 is copied, long before this CTA
// publishes into the same place again.
template <typename S>
__device__ __forceinline__ void run_loader(const Ring<S>& ring, char* shared, const Part& part, int group, int loader,
                                           int all, int products) {
  constexpr int kMost = (S::kChunks + kLoaders - 1) / kLoaders;
  constexpr int kLanes = 2 * S::kSplit;                           // of a chunk: each looks after four warps
  constexpr u32 kStride = kLoaders * S::kSplit * S::kChunkBytes;  // from one chunk of this loader to the next
  constexpr int kPolls = 3;                                       // on the way at a time
  static_assert(kMost * kLanes <= 32, "a lane for every four warps");
  const int lane = threadIdx.x & 31, mine = (all - loader + kLoaders - 1) / kLoaders;
  const Slots<S> slots(shared, group);
  const int publisher = chunk_of<S>(loader + lane / kLanes * kLoaders, group) * 2 + lane % kLanes / S::kSplit;
  const u32 flag = publisher * Ring<S>::kFlagBytes + lane % S::kSplit * 16;
  const u32 wiped = Ring<S>::core(part.first_unit / 8, 0);
  const bool wipes = loader == 0 && (S::kSplit == 1 || group == 0);

  u32 phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = S::kSplit == 2 ? 0 : group; tile < part.tiles; tile += S::kTileGroups, ++phase) {
      const char* from = ring.at(step, tile) + chunk_of<S>(loader, group) * S::kChunkBytes;
      const char* flags = ring.flags + tile * ring.flag_bytes + flag;
      auto poll = [&]() { return lane < mine * kLanes ? load_strong(flags) : Words4{}; };
      auto arm = [&](int n) {
        const Place<S> place(phase, loader + n * kLoaders, all);
        barrier_wait(slots.empty + place.slot * 8, place.parity ^ 1);
        if (lane == 0) mbarrier_expect(slots.full + place.slot * 8, S::kChunkBytes);
      };
      if constexpr (Place<S>::kFixed)
#pragma unroll
        for (int n = 0; n < kMost; ++n)
          if (n < mine) arm(n);
      u32 missing = (1u << mine) - 1;  // a bit a chunk
      Words4 seen[kPolls];
#pragma unroll
      for (int i = 0; i + 1 < kPolls; ++i) seen[i] = poll();
      for (u32 polls = 0; missing; ++polls) {
        seen[kPolls - 1] = poll();
        const u32 votes =
            __ballot_sync(~0u, min(min(static_cast<int>(seen[0].x), static_cast<int>(seen[0].y)),
                                   min(static_cast<int>(seen[0].z), static_cast<int>(seen[0].w))) >= step);
        u32 fresh = 0;
#pragma unroll
        for (int n = 0; n < kMost; ++n) {
          constexpr u32 kAll = (1u << kLanes) - 1;
          if ((votes >> (n * kLanes) & kAll) == kAll) fresh |= 1u << n;
        }
        fresh &= missing;
      // Slots that chunks of the same tile share are given to them in order.
#pragma unroll
        for (int n = 0; n < kMost; ++n)
          if (fresh >> n & 1 && (Place<S>::kFixed || !(missing & (1u << n) - 1))) {
            if constexpr (!Place<S>::kFixed) arm(n);
            const u32 slot = Place<S>(phase, loader + n * kLoaders, all).slot;
            if (lane == 0)
              copy_bulk(slots.data + slot * S::kChunkBytes, from + n * kStride, S::kChunkBytes, slots.full + slot * 8);
            missing &= ~(1u << n);
          }
        __syncwarp();
#pragma unroll
        for (int i = 0; i + 1 < kPolls; ++i) seen[i] = seen[i + 1];
        if (polls > kSpinLimit) __trap();
      }
      if (wipes && lane == 0) {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        fence_gpu();
        if (step >= 2)
          store_bulk(ring.at(step - 2, tile) + wiped, shared_address(shared) + S::kEmptyOffset, S::kOwnBytes);
      }
      __syncwarp();
    }
  if (wipes && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = persistent::part_of<S>(p);
  const int chunks = (p.hidden + kChunkDepth - 1) / kChunkDepth;
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  const Ring<S> ring(p.ring, part, gridDim.x / part.peers * p.tiles, chunks);
  if (threadIdx.x < kGroups * S::kSlots) {
    const Slots<S> slots(shared, threadIdx.x / S::kSlots);
    const u32 slot = threadIdx.x % S::kSlots * 8;
    barrier_init(slots.full + slot, 1), barrier_init(slots.empty + slot, kGroupWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (S::kSharedChunks > 0) fill_shared_weights<S>(p, part, shared);
  for (int i = threadIdx.x * 16; i < S::kOwnBytes; i += kThreads * 16)
    store_shared(shared_address(shared) + S::kEmptyOffset + i, {~0u, ~0u, ~0u, ~0u});
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x < kGroups * kGroupThreads) {
    take_registers<S::kProductRegisters>();
    run_products<S, Cell>(p, ring, shared, part, chunks, products);
  } else {
    give_registers<S::kOtherRegisters>();
    const int warp = uniform(threadIdx.x / 32) - kGroups * kGroupWarps, group = warp / kLoaders;
    run_loader<S>(ring, shared, part, group, warp % kLoaders, S::kSplit == 2 ? (chunks - group + 1) / 2 : chunks,
                  products);
  }
}

}  // namespace wide

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kSplit>
__global__ void __launch_bounds__(wide::kThreads, 1)
    wide_forward(const T* pre, const T* weight, const T*, const T* h0, const T*, const u8* reset, T* h, T* saved, T*,
                 T*, char* ring, int steps, int batch, int hidden, int pitch, int tiles) {
  wide::Problem<T> p{};
  p.input = pre, p.weight = weight, p.initial = h0, p.reset = reset, p.output = h, p.saved = saved;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  wide::run<wide::Shape<Cell, false, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit>, Cell>(p);
}

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kSplit>
__global__ void __launch_bounds__(wide::kThreads, 1)
    wide_backward(const T* dh, const T* weight, const T* dh_last, T*, const u8* reset, T* saved, const T*, T*, T* dpre,
                  T*, T* dh0, T*, char* ring, int steps, int batch, int hidden, int pitch, int tiles) {
  wide::Problem<T> p{};
  p.input = dh, p.weight = weight, p.last_gradient = dh_last, p.reset = reset, p.output = dpre, p.saved = saved;
  p.initial_gradient = dh0;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  wide::run<wide::Shape<Cell, true, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit>, Cell>(p);
}
