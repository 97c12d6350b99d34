// The product of a tile by warp groups that hold their rows of W, and the loader warps that bring it the state.
#pragma once

#include "wide_layout.cuh"

namespace wide {

// Words of the state that a copy came too early for, polled for until they are there, by a warp group. All of them, where
// `to` is not the place that the copy went to: then nobody else has anything to do with that. Where it is, the other
// warp group may read it meanwhile, or do the same: it finds what is missing, or what it is.
template <typename S>
__device__ __forceinline__ void repair(u32 to, const char* from, int bytes, bool all, int barrier) {
  barrier_sync(barrier, kGroupThreads);
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads * 16; i < bytes; i += kGroupThreads * 16) {
    Words4 words = all ? Words4{Ring<S>::kEmpty, 0, 0, 0} : load_shared(to + i);
    for (u32 polls = 0; max(max(words.x, words.y), max(words.z, words.w)) == Ring<S>::kEmpty; ++polls) {
      words = load_strong(from + i / S::kChunkBytes * ((S::kStride - 1) * S::kChunkBytes) + i);
      if (polls > kSpinLimit) __trap();
    }
    store_shared(to + i, words);
  }
  fence_async_shared();
  barrier_sync(barrier, kGroupThreads);
}

template <typename S>
__device__ __forceinline__ void release(const Slots<S>& slots, u32 phase, int n, int all) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(slots.empty + Place<S>(phase, n, all).slot * 8);
}

// What is left of a tile's slots, once nobody will multiply by it again.
template <typename S>
__device__ __forceinline__ void release_tile(const Slots<S>& slots, u32 phase, int all) {
  if constexpr (S::kRelease)
    release(slots, phase, all - 1, all);
  else if (static_cast<int>(threadIdx.x & 31) < all)
    mbarrier_arrive(slots.empty + Place<S>(phase, threadIdx.x & 31, all).slot * 8);
}

// Chunks of a tile that have not come yet, a bit each, the same in all lanes: a lane looks at one of them, so that a tile
// that has come is not waited for chunk by chunk.
template <typename S>
__device__ __forceinline__ u32 missing_chunks(const Slots<S>& slots, u32 phase, int all) {
  static_assert(S::kFixed, "of a slot that an earlier chunk of the tile has first, a parity does not tell whose it is");
  const int lane = threadIdx.x & 31;
  bool missing = true;
  if (lane < all) {
    const Place<S> place(phase, lane, all);
    missing = !mbarrier_passed(slots.full + place.slot * 8, place.parity);
  }
  const u32 all_missing = __ballot_sync(~0u, missing);
  __syncwarp();  // what one lane has seen to be there is there for all
  return all_missing;
}

// Begins the sums of a tile, which `multiplied` waits for: 64 x kTileRows, over the chunks of a member. kAgain: of the
// state as it is once all of it has come; where slots have been given back, each chunk is fetched anew, into the last
// slot. The order of the sums is the same, so the bits are.
//
// Weights in registers and in shared memory take turns, because a wgmma holds its warp until it has read its registers:
// by themselves they would leave the tensor cores idle between two chunks.
template <typename S, typename T, bool kAgain>
__device__ __forceinline__ void multiply(float (&sum)[S::kBlocks * 4],
                                         const u32 (&weights)[S::kRegisterChunks * kChunkSteps][4], u32 shared_weights,
                                         const Slots<S>& slots, const char* state, u32 phase, int all, int member,
                                         int group, bool passes) {
  constexpr u32 kHigh = matrix_high(kCoreBytes), kStepStride = 2 * S::kBlocks * kCoreBytes >> 4;
  constexpr bool kFetch = kAgain && S::kRelease;  // other slots are in use again
  u32 data = slots.data;
  // Else the compiler would keep what both passes need in registers, which the weights have taken.
  if constexpr (kAgain) settle(data), settle(shared_weights);
  const u32 last_slot = Place<S>(phase, all - 1, all).slot;
  if constexpr (kAgain && !kFetch)
    repair<S>(data + Place<S>(phase, 0, all).slot * S::kChunkBytes, state + S::chunk_of(0, member) * S::kChunkBytes,
              all * S::kChunkBytes, false, kVote + group);
  u32 missing = ~0u;
#pragma unroll
  for (int n = 0; n < S::kChunks; ++n)
    if (S::kStride == 1 || n < S::kChunks - 1 || n < all) {
      if constexpr (!kAgain && S::kFixed)
        if (n == 0 || n == S::kChunks / 2) missing = missing_chunks(slots, phase, all);
      const Place<S> place(phase, n, all);
      const u32 slot = data + (kFetch ? last_slot : place.slot) * S::kChunkBytes;
      if constexpr (kFetch)
        repair<S>(slot, state + S::chunk_of(n, member) * S::kChunkBytes, S::kChunkBytes, true, kVote + group);
      else if (!kAgain && missing >> n & 1)
        mbarrier_wait<kSpinLimit>(slots.full + place.slot * 8, place.parity);
      const u32 low = matrix_low(slot, S::kBlocks * kCoreBytes);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kChunkSteps; ++s) {
        const int i = S::index(n * kChunkSteps + s);
        if (S::in_registers(n * kChunkSteps + s))
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
      if (n == S::kPass && passes) barrier_arrive(kTurn + (group ^ 1), kGroups * kGroupThreads);
    }
}

template <int kSums>
__device__ __forceinline__ void multiplied(float (&sum)[kSums]) {
  wgmma_wait<0>();
  wgmma_use(sum);
}

// Whether any of the sums is a NaN.
template <int kSums>
__device__ __forceinline__ bool suspect(const float (&sum)[kSums]) {
  float total[4] = {};
#pragma unroll
  for (int i = 0; i < kSums; ++i) total[i % 4] += sum[i];
  total[0] = (total[0] + total[1]) + (total[2] + total[3]);
  return total[0] != total[0];
}

// Whoever has published step s has received all of step s - 1, from CTAs that had done with step s - 2: what this CTA
// has published of that is wiped once a loader has seen step s. Where the depth is split over a cluster, the warps whose
// sums a CTA publishes step s of have received all of step s - 1 together; so every CTA has published that, having had
// the sums of step s - 2 of its own warps in all CTAs of its cluster. A chunk comes from a whole cluster, whose CTAs own
// all of its warps: both groups of each had done with step s - 2. A wipe is over before the third tile after it is
// copied, steps before this CTA publishes into the same place again.
template <typename S>
__device__ __forceinline__ void wipe(const Ring<S>& ring, char* shared, const Part& part, int step, int tile) {
  wait_bulk_stores();
  fence_gpu();
  const u32 wiped = Ring<S>::core(part.first_unit / 8, 0);
  if (step >= 2)
#pragma unroll 1
    for (int i = 0; i < S::kOwnBytes; i += S::kEmptyBytes)
      store_bulk(ring.at(step - 2, tile) + wiped + i, shared_address(shared) + S::kEmptyOffset, S::kEmptyBytes);
}

// A warp that does nothing else, because the fence takes longer than a loader has. Neither it nor the loader that it
// follows is ever more than a tile ahead: parities of mbarriers tell no more apart.
template <typename S>
__device__ __forceinline__ void run_wiper(const Ring<S>& ring, char* shared, const Part& part, int products) {
  const u32 seen = shared_address(shared) + S::kSeen, wiped = seen + 8;
  u32 phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      mbarrier_wait<kSpinLimit>(seen, phase & 1);
      if ((threadIdx.x & 31) == 0) wipe(ring, shared, part, step, tile), mbarrier_arrive(wiped);
      __syncwarp();
    }
  if ((threadIdx.x & 31) == 0) wait_bulk_stores();
}

// Brings every other chunk of a ring's tiles, once the flags of the warps that publish it are up. No fence stands
// between data and flag: now and then a word is later than its flag, see `multiply`.
template <typename S>
__device__ __forceinline__ void run_loader(const Ring<S>& ring, char* shared, const Part& part, int member,
                                           int slots_of, int loader, int all, int products) {
  constexpr int kMost = (S::kChunks + kLoaders - 1) / kLoaders;
  constexpr int kLanes = S::kPeerStep * S::kFlagQuads;              // of a chunk: each looks after four warps
  constexpr u32 kStride = kLoaders * S::kStride * S::kChunkBytes;   // from one chunk of this loader to the next
  constexpr int kPolls = 3;                                         // on the way at a time
  static_assert(kMost * kLanes <= 32, "a lane for every four warps");
  const int lane = threadIdx.x & 31, mine = (all - loader + kLoaders - 1) / kLoaders;
  const Slots<S> slots(shared, slots_of);
  const int publisher =
      S::chunk_of(loader + lane / kLanes * kLoaders, member) * S::kPeerStep + lane % kLanes / S::kFlagQuads;
  const u32 flag = publisher * Ring<S>::kFlagBytes + lane % S::kFlagQuads * 16;
  const int first_tile = slots_of % S::kTileGroups;
  const bool wipes = loader == 0 && slots_of == first_tile;  // or tells the warp that does

  u32 phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = first_tile; tile < part.tiles; tile += S::kTileGroups, ++phase) {
      const char* from = ring.at(step, tile) + S::chunk_of(loader, member) * S::kChunkBytes;
      const char* flags = ring.flags + tile * ring.flag_bytes + flag;
      auto poll = [&]() { return lane < mine * kLanes ? load_strong(flags) : Words4{}; };
      auto arm = [&](int n) {
        const Place<S> place(phase, loader + n * kLoaders, all);
        const u32 empty = slots.empty + place.slot * 8;
        mbarrier_wait<kSpinLimit>(empty, place.parity ^ 1);
        if (lane == 0) mbarrier_expect(slots.full + place.slot * 8, S::kChunkBytes);
      };
      if constexpr (S::kFixed)
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
          if (fresh >> n & 1 && (S::kFixed || !(missing & (1u << n) - 1))) {
            if constexpr (!S::kFixed) arm(n);
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
      if constexpr (S::kWiper) {
        const u32 seen = shared_address(shared) + S::kSeen, wiped = seen + 8;
        if (wipes && phase > 0) mbarrier_wait<kSpinLimit>(wiped, (phase & 1) ^ 1);
        if (wipes && lane == 0) mbarrier_arrive(seen);
      } else if (wipes && lane == 0) {
        wipe(ring, shared, part, step, tile);
      }
      __syncwarp();
    }
  if (!S::kWiper && wipes && lane == 0) wait_bulk_stores();
}

}  // namespace wide
