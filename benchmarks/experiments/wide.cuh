// The recurrence for large batches on Hopper, by wgmma.
//
// A CTA owns 64 rows of W, one wgmma tall. The depth is cut into chunks, and two product warp groups take turns with
// them: each holds the columns of W that belong to its chunks, in registers as far as they go, the rest in shared
// memory. A loader warp brings the chunks of the state from L2 into a ring of slots in shared memory, whose mbarriers
// tell full from empty.
//
// The loader polls a few words of a chunk and copies it once those have arrived. The rest nearly always has arrived
// too: what has not is a NaN (RingSlots), which no product hides. So a warp whose sum is NaN fetches and multiplies
// once more, word by word, and only a NaN that is really there survives that.
#pragma once

#include "persistent.cuh"
#include "wgmma.cuh"
#include "watch.cuh"

#ifdef ELMAN_COUNT_RETRIES
extern "C" __device__ unsigned elman_retries;
__device__ unsigned elman_retries;
#endif

namespace persistent {

constexpr int kGroupThreads = 128;
constexpr int kCoreBytes = 128;  // a core matrix of wgmma: eight rows of eight values
constexpr int kChunkSteps = 8;   // wgmma deep
constexpr int kChunkDepth = kChunkSteps * 16;
constexpr int kBlockBytes = kChunkDepth / 8 * kCoreBytes;  // of a chunk: eight batch rows
constexpr int kCellWarp = 8, kLoaderWarp = 16, kLoaders = 3, kWipeWarp = kLoaderWarp + kLoaders;
constexpr int kWideThreads = 640;

// kSplit CTAs of a cluster share the same rows of W and split the depth; each applies the cell to its part of a tile's rows.
template <typename Cell, bool kBackward_, int kRegisterChunks_, int kSharedChunks_, int kBlocks_, int kSlots_, int kSplit_>
struct WideShape {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRegisterChunks = kRegisterChunks_, kSharedChunks = kSharedChunks_, kBlocks = kBlocks_;
  static constexpr int kChunks = kRegisterChunks + kSharedChunks, kSlots = kSlots_;
  static constexpr int kSplit = kSplit_, kParts = 2 * kSplit, kCellBlocks = kBlocks / kSplit;
  static constexpr int kRows = 64, kTileRows = kBlocks * kBlockRows, kCellRows = kTileRows / kSplit;
  static_assert(kBlocks % kSplit == 0, "every CTA of a cluster applies the cell to as many rows");
  static constexpr int kGates = Cell::kGates;
  static constexpr int kIn = kBackward ? kGates : 1, kOut = kBackward ? 1 : kGates;
  static constexpr int kColumns = kRows / kOut;  // hidden units a CTA
  static constexpr int kChunkBytes = kBlocks * kBlockBytes;
  // Cells: a thread takes eight hidden units of a row.
  static constexpr int kOctets = kColumns / 8, kCellThreads = 256;
  static constexpr int kInputs = kBackward ? 1 + kGates : kGates;
  static constexpr int kStages = kSharedChunks > 3 ? 3 : 4;  // tiles whose inputs are in shared memory or on the way
  static_assert(kCellRows * kOctets <= kCellThreads, "one row of a tile a thread");
  static constexpr int kSumPitch = kRows + 4, kPartSums = kCellRows * kSumPitch, kBufferSums = kParts * kPartSums;
  static constexpr int kWeightOffset = 2 * kBufferSums * 4;
  static constexpr int kInputOffset = kWeightOffset + 2 * kSharedChunks * kChunkSteps * 2048;
  static constexpr int kBarrierOffset = kInputOffset + kStages * kInputs * kCellThreads * 16;
  static constexpr int kEmptyOffset = kBarrierOffset + (16 * kSlots + 32 + 127) / 128 * 128;
  static constexpr int kDataOffset = kEmptyOffset + 1024;
  static constexpr int kProductRegisters = kRegisterChunks * 32 + kBlocks * 4 > 120 ? 176 : 160,
                       kCellRegisters = kProductRegisters > 160 ? 40 : 48,
                       kLoaderRegisters = kProductRegisters > 160 ? 48 : 64;
};

// The ring of RingSlots, a chunk of a tile being contiguous and laid out as wgmma reads it.
template <typename S>
struct WideRing {
  static constexpr int kSlots = 8;
  static constexpr u32 kEmpty = 0xffffffffu;

  char* slots;
  u32 tile_bytes, slot_bytes;
  int first, chunks, depth;  // chunks of this CTA, of the whole depth

  __device__ WideRing(char* ring, const Part& part, int all_tiles, int depth) : depth(depth) {
    const int all = (depth + kChunkDepth - 1) / kChunkDepth, most = (all + S::kSplit - 1) / S::kSplit;
    first = rank() * most, chunks = min(most, all - first);
    tile_bytes = all * S::kChunkBytes;
    slot_bytes = all_tiles * tile_bytes;
    slots = ring + part.first_row / S::kTileRows * tile_bytes;
  }
  static __device__ int rank() { return blockIdx.x % S::kSplit; }
  __device__ u32 tile(int step, int tile) const { return static_cast<u32>(step) % kSlots * slot_bytes + tile * tile_bytes; }
  static __device__ u32 within(int row, int k) {
    return k / kChunkDepth * S::kChunkBytes + row / kBlockRows * kBlockBytes + k % kChunkDepth / 8 * kCoreBytes +
           row % kBlockRows * 16 + k % 8 * 2;
  }
};

// Two consecutive k of one row of W, zero outside the matrix.
template <typename S, typename T>
__device__ __forceinline__ u32 load_weight_pair(const Problem<T>& p, int row, int k, int first_unit) {
  const int gate = row / S::kColumns, unit = first_unit + row % S::kColumns;
  if (unit >= p.hidden || k >= S::kIn * p.hidden) return 0;
  if constexpr (!S::kBackward) {
    return *reinterpret_cast<const u32*>(p.weight + (static_cast<size_t>(gate) * p.hidden + unit) * p.hidden + k);
  } else {
    const T* at = p.weight + static_cast<size_t>(k) * p.hidden + unit;
    return at[0].bits | static_cast<u32>(at[p.hidden].bits) << 16;
  }
}

// A shared operand of core matrices, no swizzle: strides in bytes along the depth (low word) and along the rows.
__device__ __forceinline__ u32 matrix_low(u32 address, u32 depth_stride) {
  return (address & 0x3ffff) >> 4 | (depth_stride >> 4) << 16;
}
__device__ constexpr u32 matrix_high(u32 row_stride) { return row_stride >> 4; }

__device__ __forceinline__ u32 load_strong4(const void* address) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_strong16(void* address, const Words4& v) {
  asm volatile(
      "{.reg .b128 q; .reg .b64 lo, hi; mov.b64 lo, {%1, %2}; mov.b64 hi, {%3, %4}; mov.b128 q, {lo, hi};"
      " st.relaxed.gpu.global.b128 [%0], q;}" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_stream16(void* address, const Words4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void mbarrier_init_local(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_local(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// In one block of PTX: the compiler would unroll the loop, and code that misses the instruction cache is slow.
__device__ __forceinline__ void mbarrier_wait_local(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p; .reg .u32 polls; mov.u32 polls, 0;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE; add.u32 polls, polls, 1; setp.lt.u32 p, polls, %2; @p bra WAIT; trap; DONE:}" ::"r"(barrier),
      "r"(parity), "n"(kSpinLimit) : "memory");
}
__device__ __forceinline__ bool mbarrier_test(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// The same address in a CTA of the cluster; one's own stays as it is.
template <typename S>
__device__ __forceinline__ u32 in_cluster(u32 address, int rank) {
  return S::kSplit == 1 || rank == blockIdx.x % S::kSplit ? address : peer_address(address, rank);
}
__device__ __forceinline__ void store_cluster(u32 address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p; .reg .u32 polls; mov.u32 polls, 0;\n"
      "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE; add.u32 polls, polls, 1; setp.lt.u32 p, polls, %2; @p bra WAIT; trap; DONE:}" ::"r"(barrier),
      "r"(parity), "n"(kSpinLimit) : "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Where in the ring of chunks a warp stands. Chunks are numbered through all tiles and steps.
template <int kSlots>
struct Cursor {
  int slot;
  u32 parity;
  // By at most as many as there are slots, either way.
  __device__ void advance(int chunks) {
    slot += chunks;
    if (slot >= kSlots) slot -= kSlots, parity ^= 1;
  }
  __device__ void retreat() {
    if (--slot < 0) slot += kSlots, parity ^= 1;
  }
};

template <typename S>
struct Chunks {
  u32 full, empty, sums_full, sums_empty, data;
  __device__ Chunks(char* shared) {
    full = shared_address(shared) + S::kBarrierOffset, empty = full + S::kSlots * 8;
    sums_full = empty + S::kSlots * 8, sums_empty = sums_full + 16;
    data = shared_address(shared) + S::kDataOffset;
  }
  __device__ u32 at(int slot) const { return data + slot * S::kChunkBytes; }
};

template <typename S, typename T>
__device__ __forceinline__ void run_wide_products(const Problem<T>& p, const WideRing<S>& ring, char* shared,
                                                  const Chunks<S>& chunks, const Part& part, int products) {
  using Product = Wgmma<T>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / kGroupThreads;
  const int row = warp * 16 + lane / 4;

  u32 weights[S::kRegisterChunks * kChunkSteps][4];
#pragma unroll
  for (int s = 0; s < S::kRegisterChunks * kChunkSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[s][i] = load_weight_pair<S>(
          p, row + i % 2 * 8,
          (ring.first + s / kChunkSteps * 2 + group) * kChunkDepth + s % kChunkSteps * 16 + i / 2 * 8 + lane % 4 * 2,
          part.first_unit);
  char* block = shared + S::kWeightOffset + group * (S::kSharedChunks * kChunkSteps * 2048);
#pragma unroll 1
  for (int s = 0; s < S::kSharedChunks * kChunkSteps; ++s)
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, half = i / 2;
      const u32 pair = load_weight_pair<S>(p, r,
                                           (ring.first + (S::kRegisterChunks + s / kChunkSteps) * 2 + group) * kChunkDepth +
                                               s % kChunkSteps * 16 + half * 8 + lane % 4 * 2,
                                           part.first_unit);
      *reinterpret_cast<u32*>(block + s * 2048 + half * 1024 + r / 8 * kCoreBytes + r % 8 * 16 + lane % 4 * 4) = pair;
    }
  fence_async_shared();
  barrier_sync(9 + group, kGroupThreads);

  const u32 shared_weights = matrix_low(shared_address(block), 1024);
  const u32 sums = shared_address(shared) + ((WideRing<S>::rank() * 2 + group) * S::kPartSums + (lane & 3) * 2 * S::kSumPitch + row) * 4;

  Cursor<S::kSlots> cursor{0, 0};
  cursor.advance(group);
  // A lane for each chunk gives its slot back.
  Cursor<S::kSlots> used{0, 0};
  used.advance(group);
  for (int i = 0; i < lane && i < S::kChunks; ++i) used.advance(2);
  float sum[S::kBlocks * 4];
  int phase = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
#pragma unroll
      for (int i = 0; i < S::kChunks; ++i)
        if (i < S::kChunks - 1 || i * 2 + group < ring.chunks) {
          mbarrier_wait_local(chunks.full + cursor.slot * 8, cursor.parity);
          if (warp == 0) mark(group, step, tile, i);
          const u32 state = matrix_low(chunks.at(cursor.slot), kCoreBytes);
          cursor.advance(2);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < kChunkSteps; ++s) {
            if (i < S::kRegisterChunks)
              Product::multiply(sum, weights[(i < S::kRegisterChunks ? i : 0) * kChunkSteps + s],
                                state + s * (2 * kCoreBytes >> 4), matrix_high(kBlockBytes), i + s > 0);
            else
              Product::multiply(sum, shared_weights + ((i - S::kRegisterChunks) * kChunkSteps + s) * (2048 >> 4),
                                matrix_high(kCoreBytes), state + s * (2 * kCoreBytes >> 4), matrix_high(kBlockBytes));
          }
          wgmma_commit();
        }
      if (ring.chunks % 2) {
        if (group)
          cursor.advance(1);
        else
          cursor.retreat();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < S::kBlocks * 4; ++i) asm volatile("" : "+f"(sum[i])::"memory");
      if (lane * 2 + group < ring.chunks) mbarrier_arrive_local(chunks.empty + used.slot * 8);
      used.advance(ring.chunks);
      float parts[4] = {};
#pragma unroll
      for (int i = 0; i < S::kBlocks; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) parts[j] += sum[i * 4 + j];
      const float total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      if (warp == 0) mark(group, step, tile, 16);

      if (__builtin_expect(__any_sync(~0u, total != total), 0)) {
#ifdef ELMAN_COUNT_RETRIES
        if (lane == 0) atomicAdd(&elman_retries, 1);
#endif
#pragma unroll
        for (int i = 0; i < S::kBlocks * 4; ++i) sum[i] = 0;
#pragma unroll
        for (int i = 0; i < S::kChunks; ++i)
#pragma unroll
          for (int s = 0; s < kChunkSteps; ++s) {
            const int chunk = i * 2 + group, k = (ring.first + chunk) * kChunkDepth + s * 16 + lane % 4 * 2;
            if (chunk < ring.chunks) {
              u32 a[4];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                if (i < S::kRegisterChunks)
                  a[j] = weights[(i < S::kRegisterChunks ? i : 0) * kChunkSteps + s][j];
                else
                  a[j] = *reinterpret_cast<const u32*>(block + ((i - S::kRegisterChunks) * kChunkSteps + s) * 2048 +
                                                       j / 2 * 1024 + (row + j % 2 * 8) / 8 * kCoreBytes + row % 8 * 16 +
                                                       lane % 4 * 4);
              }
              const char* from = ring.slots + ring.tile(step, tile) + WideRing<S>::within(lane / 4, k);
              u32 b[S::kBlocks][2];
              for (u32 polls = 0;; ++polls) {
                u32 most = 0;
#pragma unroll
                for (int n = 0; n < S::kBlocks; ++n)
#pragma unroll
                  for (int half = 0; half < 2; ++half) {
                    b[n][half] = load_strong4(from + n * kBlockBytes + half * kCoreBytes);
                    most = max(most, b[n][half]);
                  }
                if (most != WideRing<S>::kEmpty) break;
                if (polls > kSpinLimit) __trap();
              }
              __syncwarp();
#pragma unroll
              for (int n = 0; n < S::kBlocks; ++n)
                T::mma(*reinterpret_cast<float(*)[4]>(sum + n * 4), a, b[n][0], b[n][1]);
            }
          }
      }
      if (warp == 0) mark(group, step, tile, 19);
      const int buffer = phase & 1;
      if (phase >= 2) mbarrier_wait_cluster(chunks.sums_empty + buffer * 8, (phase >> 1) + 1 & 1);
      if (warp == 0) mark(group, step, tile, 17);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        const u32 at = in_cluster<S>(sums, n / S::kCellBlocks) +
                       (buffer * S::kBufferSums + n % S::kCellBlocks * kBlockRows * S::kSumPitch) * 4;
        store_cluster(at, sum[n * 4]), store_cluster(at + S::kSumPitch * 4, sum[n * 4 + 1]);
        store_cluster(at + 32, sum[n * 4 + 2]), store_cluster(at + S::kSumPitch * 4 + 32, sum[n * 4 + 3]);
      }
      __syncwarp();
      if (lane < S::kSplit) mbarrier_arrive_cluster(in_cluster<S>(chunks.sums_full + buffer * 8, lane));
      if (warp == 0) mark(group, step, tile, 18);
    }
}

// Brings every kLoaders-th chunk of every tile. Sixteen words of a chunk tell that it is there: one of each warp that
// publishes a part of it. Two polls are always on the way. (The last octet: not yet measured.)
template <typename S, typename T>
__device__ __forceinline__ void run_loader(const WideRing<S>& ring, const Chunks<S>& chunks, const Part& part, int products,
                                           int loader) {
  constexpr int kMine = (2 * S::kChunks + kLoaders - 1) / kLoaders, kPolls = (kMine + 1) / 2;
  constexpr int kWarpRows = 32 / S::kOctets, kSampleRows = 16 * S::kColumns / kChunkDepth;
  const int lane = threadIdx.x & 31;
  const int sample_row = lane % kSampleRows * S::kTileRows / kSampleRows / kWarpRows * kWarpRows;
  const int sample_k = lane % 16 / kSampleRows * S::kColumns + (S::kColumns - 8);  // what a warp stores last
  const u32 sample = WideRing<S>::within(sample_row, sample_k) + (loader + lane / 16 * kLoaders) * S::kChunkBytes;
  const int first_k = ring.first * kChunkDepth;
  const int mine = (ring.chunks - loader + kLoaders - 1) / kLoaders;

  Cursor<S::kSlots> cursor{0, 1};  // of empty slots: the first round finds all of them so
  cursor.advance(loader);
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile) {
      mark(2, step, tile, 0);
      const char* from = ring.slots + ring.tile(step, tile) + ring.first * S::kChunkBytes;
      auto poll = [&](u32 (&word)[kPolls]) {
#pragma unroll
        for (int i = 0; i < kPolls; ++i) {
          const int chunk = loader + (i * 2 + lane / 16) * kLoaders, k = first_k + chunk * kChunkDepth + sample_k;
          word[i] = chunk < ring.chunks && k < ring.depth ? load_strong4(from + sample + i * (2 * kLoaders * S::kChunkBytes)) : 0;
        }
      };
      u32 early[kPolls], late[kPolls];
      poll(early);
      int next = 0;
      for (u32 polls = 0; next < mine; ++polls) {
        poll(late);
        u32 fresh = 0;
#pragma unroll
        for (int i = 0; i < kPolls; ++i) {
          const u32 votes = __ballot_sync(~0u, early[i] != WideRing<S>::kEmpty);
          fresh |= ((votes & 0xffff) == 0xffff ? 1u : 0u) << (2 * i) | (votes >> 16 == 0xffff ? 2u : 0u) << (2 * i);
        }
        mark(2, step, tile, 1 + min(polls, 10u));
#pragma unroll 1
        for (; next < mine && fresh >> next & 1; ++next) {
          mbarrier_wait_local(chunks.empty + cursor.slot * 8, cursor.parity);
          if (lane == 0) {
            mbarrier_expect(chunks.full + cursor.slot * 8, S::kChunkBytes);
            copy_bulk(chunks.at(cursor.slot), from + (loader + next * kLoaders) * S::kChunkBytes, S::kChunkBytes,
                      chunks.full + cursor.slot * 8);
          }
          cursor.advance(next + 1 < mine ? kLoaders : ring.chunks - next * kLoaders);
        }
        mark(2, step, tile, 16);
#pragma unroll
        for (int i = 0; i < kPolls; ++i) early[i] = late[i];
        if (polls > kSpinLimit) __trap();
      }
    }
}

template <typename T>
__device__ __forceinline__ void unpack8(const Words4& words, float (&values)[8]) {
  values[0] = T::low(words.x), values[1] = T::high(words.x), values[2] = T::low(words.y), values[3] = T::high(words.y);
  values[4] = T::low(words.z), values[5] = T::high(words.z), values[6] = T::low(words.w), values[7] = T::high(words.w);
}
template <typename T>
__device__ __forceinline__ Words4 pack8(const float (&v)[8]) {
  return {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7])};
}

// A thread takes eight hidden units of one row of every tile. Code that a warp runs alone is short, because it mostly
// waits for the instruction cache.
template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run_wide_cells(const Problem<T>& p, const WideRing<S>& ring, const Chunks<S>& chunks,
                                               char* shared, const Part& part, int products) {
  constexpr int kGates = S::kGates;
  const int thread = threadIdx.x - kCellWarp * 32;
  const int cell_row = thread / S::kOctets, row0 = WideRing<S>::rank() * S::kCellRows + cell_row;
  const int unit = part.first_unit + thread % S::kOctets * 8;
  const bool working = unit < p.hidden && cell_row < S::kCellRows;
  // Offsets inside a tile of the exchanged state.
  u32 place[S::kIn];
#pragma unroll
  for (int gate = 0; gate < S::kIn; ++gate) place[gate] = WideRing<S>::within(row0, gate * p.hidden + unit);

  for (int tile = 0; tile < part.tiles; ++tile) {
    const int group_row = tile * S::kTileRows + row0, row = part.first_row + group_row;
    Words4 words{0, 0, 0, 0};
    if (!S::kBackward && p.initial && working && group_row < part.rows && !(p.reset && p.reset[row])) {
      float values[8];
      unpack8<T>(*reinterpret_cast<const Words4*>(p.initial + static_cast<size_t>(row) * p.hidden + unit), values);
      words = pack8<T>(values);
    }
    if (working)
#pragma unroll
      for (int gate = 0; gate < S::kIn; ++gate) store_strong16(ring.slots + ring.tile(0, tile) + place[gate], words);
  }

  // Tensors of the whole sequence in units of sixteen bytes.
  const u32 pitch = p.hidden / 8, column = unit / 8;
  auto at = [&](const T* base, u32 row, int gates, int gate) {
    return reinterpret_cast<char*>(const_cast<T*>(base)) + static_cast<u64>(row * (gates * pitch) + (gate * pitch + column)) * 16;
  };
  const u32 next_step = (S::kBackward ? -p.batch : p.batch) - part.tiles * S::kTileRows;
  const u32 start = (S::kBackward ? (p.steps - 1) * p.batch : 0) + part.first_row + row0;
  const int rows = working ? part.rows - row0 : 0;

  const u32 inputs = shared_address(shared) + S::kInputOffset + thread * 16;
  constexpr u32 kInputBytes = S::kCellThreads * 16, kStageBytes = S::kInputs * kInputBytes;
  int ahead_step = 0, ahead_tile = 0;
  u32 ahead_row = start, ahead_stage = inputs;
  auto fetch_ahead = [&]() {
    if (ahead_step < p.steps && ahead_tile * S::kTileRows < rows) {
      if constexpr (S::kBackward) copy_async16(ahead_stage, at(p.input, ahead_row, 1, 0));
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        copy_async16(ahead_stage + (gate + (S::kBackward ? 1 : 0)) * kInputBytes,
                     at(S::kBackward ? p.v : p.input, ahead_row, kGates, gate));
    }
    commit_copies();
    ahead_stage = ahead_stage == inputs + (S::kStages - 1) * kStageBytes ? inputs : ahead_stage + kStageBytes;
    ahead_row += S::kTileRows;
    if (++ahead_tile == part.tiles) ahead_tile = 0, ++ahead_step, ahead_row += next_step;
  };
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) fetch_ahead();

  const float* sums = reinterpret_cast<const float*>(shared) + cell_row * S::kSumPitch + thread % S::kOctets * 8;
  u32 here = start, stage = inputs;
  int phase = 0;
  for (int step = 0; step < products; ++step) {
    for (int tile = 0; tile < part.tiles; ++tile, ++phase, here += S::kTileRows) {
      const int buffer = phase & 1;
      const bool in = tile * S::kTileRows < rows;
      wait_copies<S::kStages - 2>();
      Words4 given[S::kInputs];
#pragma unroll
      for (int n = 0; n < S::kInputs; ++n) given[n] = load_shared(stage + n * kInputBytes);
      stage = stage == inputs + (S::kStages - 1) * kStageBytes ? inputs : stage + kStageBytes;
      bool keep = in;  // does what is published cross into the next time step?
      if (p.reset && in && step + (S::kBackward ? 0 : 1) < p.steps)
        keep = !p.reset[static_cast<size_t>(S::kBackward ? p.steps - 1 - step : step + 1) * p.batch + part.first_row +
                        tile * S::kTileRows + row0];
      float slope[kGates][8];
      if constexpr (S::kBackward) {
        // What does not depend on the sums comes before them.
        float v[kGates][8];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) unpack8<T>(given[1 + gate], v[gate]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float unit_v[kGates], unit_slope[kGates];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = v[gate][j];
          Cell::template slope<typename T::Math>(unit_v, unit_slope);
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) settle(slope[gate][j] = unit_slope[gate]);
        }
      }
      mbarrier_wait_cluster(chunks.sums_full + buffer * 8, phase >> 1 & 1);
      float sum[S::kOut][8];
      if (cell_row < S::kCellRows)
#pragma unroll
        for (int out = 0; out < S::kOut; ++out)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* from = sums + buffer * S::kBufferSums + out * S::kColumns + half * 4;
            float* to = sum[out] + half * 4;
            to[0] = to[1] = to[2] = to[3] = 0;
#pragma unroll
            for (int i = 0; i < S::kParts; ++i) {
              const float4 a = *reinterpret_cast<const float4*>(from + i * S::kPartSums);
              to[0] += a.x, to[1] += a.y, to[2] += a.z, to[3] += a.w;
            }
          }
      if (thread < 32) mark(3, step, tile, 2);
      __syncwarp();
      if ((thread & 31) < S::kSplit) mbarrier_arrive_cluster(in_cluster<S>(chunks.sums_empty + buffer * 8, thread & 31));
      if (cell_row < S::kCellRows) {
        const u32 group_row = part.first_row + tile * S::kTileRows + row0;
        Words4 published[S::kIn];
        if constexpr (S::kBackward) {
          if (step == p.steps) {
            if (in) store_stream16(at(p.initial_gradient, group_row, 1, 0), pack8<T>(sum[0]));
            continue;
          }
          float dh[8], dv[kGates][8];
          unpack8<T>(given[0], dh);
          if (step == 0 && p.last_gradient && in) {
            float last[8];
            unpack8<T>(*reinterpret_cast<const Words4*>(at(p.last_gradient, group_row, 1, 0)), last);
#pragma unroll
            for (int j = 0; j < 8; ++j) dh[j] += last[j];
          }
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
            for (int j = 0; j < 8; ++j) dv[gate][j] = (dh[j] + sum[0][j]) * slope[gate][j];
            published[gate] = pack8<T>(dv[gate]);
          }
        } else {
          float h[8];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            float pre[8];
            unpack8<T>(given[gate], pre);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[gate][j] += pre[j];
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float unit_v[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) unit_v[gate] = sum[gate][j];
            h[j] = Cell::template forward<typename T::Math>(unit_v);
          }
          published[0] = pack8<T>(h);
        }
        if (step + 1 < products && working)
#pragma unroll
          for (int gate = 0; gate < S::kIn; ++gate)
            store_strong16(ring.slots + ring.tile(step + 1, tile) + place[gate], keep ? published[gate] : Words4{0, 0, 0, 0});
        if (thread < 32) mark(3, step, tile, 3);
#ifdef NO_STREAM
        if (0) {
#else
        if (in) {
#endif
#pragma unroll
          for (int gate = 0; gate < S::kIn; ++gate) store_stream16(at(p.output, here, S::kIn, gate), published[gate]);
          if (!S::kBackward && p.v)
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) store_stream16(at(p.v, here, kGates, gate), pack8<T>(sum[gate]));
        }
      }
      if (thread < 32) mark(3, step, tile, 4);
      fetch_ahead();
      if (thread < 32) mark(3, step, tile, 5);
    }
    here += next_step;
    if (step + 1 < products) {
      barrier_arrive(kStepDone + (step & 1), S::kCellThreads + 32);
      if (step > 0) barrier_sync(kStepFenced + (step - 1 & 1), S::kCellThreads + 32);
    }
  }
}

// Wipes what every CTA of the group has used: a step behind, by bulk copies, and over before the step after the next is
// published, long before anyone looks at a wiped slot again.
template <typename S>
__device__ __forceinline__ void run_wipes(const WideRing<S>& ring, char* shared, const Part& part, int hidden, int products) {
  const int lane = threadIdx.x & 31;
  store_shared(shared_address(shared) + S::kEmptyOffset + lane * 16, {~0u, ~0u, ~0u, ~0u});
  store_shared(shared_address(shared) + S::kEmptyOffset + 512 + lane * 16, {~0u, ~0u, ~0u, ~0u});
  fence_async_shared();
  __syncwarp();
  constexpr int kRuns = S::kCellBlocks * S::kIn;  // of neighbouring core matrices
  const u32 bytes = min(S::kColumns, hidden - part.first_unit) / 8 * kCoreBytes;
  for (int step = 0; step + 1 < products; ++step) {
    barrier_sync(kStepDone + (step & 1), S::kCellThreads + 32);
#ifdef NO_WIPE
    if (0) {
#else
    if (step > 0) {
#endif
      for (int i = lane; i < part.tiles * kRuns; i += 32) {
        char* to = ring.slots + ring.tile(step - 1, i / kRuns) +
                   WideRing<S>::within((WideRing<S>::rank() * S::kCellBlocks + i % S::kCellBlocks) * kBlockRows,
                                       i % kRuns / S::kCellBlocks * hidden + part.first_unit);
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                     "r"(shared_address(shared) + S::kEmptyOffset), "r"(bytes) : "memory");
      }
      asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group 0;" ::: "memory");
      fence_gpu();
    }
    barrier_arrive(kStepFenced + (step & 1), S::kCellThreads + 32);
  }
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run_wide(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  Part part;
  part.peers = (p.hidden + S::kColumns - 1) / S::kColumns;
  const int place = blockIdx.x / S::kSplit;
  part.first_row = place / part.peers * p.tiles * S::kTileRows;
  part.first_unit = place % part.peers * S::kColumns;
  part.rows = min(p.tiles * S::kTileRows, p.batch - part.first_row);
  part.tiles = (part.rows + S::kTileRows - 1) / S::kTileRows;
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  const WideRing<S> ring(p.ring, part, gridDim.x / S::kSplit / part.peers * p.tiles, S::kIn * p.hidden);
  const Chunks<S> chunks(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kSlots; ++i) {
      mbarrier_init_local(chunks.full + i * 8, 1);
      mbarrier_init_local(chunks.empty + i * 8, 4);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init_local(chunks.sums_full + i * 8, 8 * S::kSplit);
      mbarrier_init_local(chunks.sums_empty + i * 8, S::kCellThreads / 32 * S::kSplit);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (S::kSplit > 1) cluster_barrier();
  const int warp = threadIdx.x >> 5;
  if (warp < kCellWarp) {
    take_registers<S::kProductRegisters>();
    run_wide_products<S>(p, ring, shared, chunks, part, products);
  } else if (warp < kLoaderWarp) {
    give_registers<S::kCellRegisters>();
    run_wide_cells<S, Cell>(p, ring, chunks, shared, part, products);
  } else {
    give_registers<S::kLoaderRegisters>();
    if (warp < kWipeWarp)
      run_loader<S, T>(ring, chunks, part, products, warp - kLoaderWarp);
    else
      run_wipes<S>(ring, shared, part, p.hidden, products);
  }
  // Nobody leaves while a peer may still write to it.
  if (S::kSplit > 1) {
    __syncwarp();
    cluster_barrier();
  }
}

}  // namespace persistent

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kSplit>
__global__ void __launch_bounds__(persistent::kWideThreads, 1)
    wide_forward(const T* pre, const T* weight, const T* h0, const u8* reset, T* h, T* v, char* ring, int steps,
                 int batch, int hidden, int tiles) {
  using S = persistent::WideShape<Cell, false, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit>;
  persistent::run_wide<S, Cell, T>({pre, weight, h0, nullptr, reset, h, v, nullptr, ring, steps, batch, hidden, tiles});
}

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kSplit>
__global__ void __launch_bounds__(persistent::kWideThreads, 1)
    wide_backward(const T* dh, const T* weight, const T* dh_last, const u8* reset, T* v, T* dpre, T* dh0, char* ring,
                  int steps, int batch, int hidden, int tiles) {
  using S = persistent::WideShape<Cell, true, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit>;
  persistent::run_wide<S, Cell, T>({dh, weight, nullptr, dh_last, reset, dpre, v, dh0, ring, steps, batch, hidden, tiles});
}
