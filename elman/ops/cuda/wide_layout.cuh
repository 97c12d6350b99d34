// What the warps of the wide kernels share: sizes, places in registers and shared memory, and the exchanged state. The
// whole is told in wide.cuh.
#pragma once

#include "persistent_layout.cuh"
#include "wgmma.cuh"

namespace wide {

using persistent::kBlockRows;
using persistent::kSpinLimit;
using persistent::Part;
template <typename T>
using Problem = persistent::Problem<T, T>;

constexpr int kGroups = 2, kGroupThreads = 128, kGroupWarps = 4,
              kLoaders = 2;  // warp groups that multiply; loader warps of each
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kRows = 64, kWarpRows = 16;  // of W: a CTA's, a warp's
constexpr int kCoreBytes = 128;            // a core matrix of wgmma: eight units of eight batch rows
constexpr int kChunkSteps = 8, kChunkDepth = kChunkSteps * 16;
constexpr int kStepBytes = kRows * 16 * 2;           // of W, one wgmma deep
constexpr int kSumsReady = 1, kTurn = 2, kVote = 4;  // named barriers; of the last two one a warp group

// kRegisterChunks + kSharedChunks: chunks of the depth whose weights a warp group holds, in registers and in shared
// memory; kBlocks: blocks of eight batch rows a tile; kSlots: chunks of the state in the ring of a warp group.
template <typename Cell, bool kBackward_, int kRegisterChunks_, int kSharedChunks_, int kBlocks_, int kSlots_,
          int kSplit_>
struct Shape {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRegisterChunks = kRegisterChunks_, kSharedChunks = kSharedChunks_;
  static constexpr int kChunks = kRegisterChunks + kSharedChunks, kBlocks = kBlocks_, kSlots = kSlots_,
                       kSplit = kSplit_;
  static constexpr bool kRelease = kSlots < kChunks;  // slots are given back chunk by chunk
  // Chunks of weights in shared memory and in registers take turns, the former first, until one kind is used up.
  static constexpr int kTurns = kRegisterChunks < kSharedChunks ? kRegisterChunks : kSharedChunks;
  static __device__ constexpr bool in_registers(int n) {
    return n < 2 * kTurns ? n % 2 == 1 : kRegisterChunks > kSharedChunks;
  }
  static __device__ constexpr int index(int n) { return n < 2 * kTurns ? n / 2 : n - kTurns; }
  static __device__ constexpr int of_registers(int i) {
    return i < kTurns ? 2 * i + 1 : i + kTurns;
  }  // index's inverse
  static __device__ constexpr int of_shared(int i) { return i < kTurns ? 2 * i : i + kTurns; }
  static constexpr int kColumns = kRows, kTileRows = kBlocks * kBlockRows;
  static constexpr int kPeerStep = 2;  // CTAs that publish a chunk
  static constexpr int kCellBlocks = kBlocks / kSplit, kCellRows = kCellBlocks * kBlockRows;
  static constexpr int kTileGroups = kGroups / kSplit;  // tiles are dealt to so many in turn
  static constexpr int kOutputs = kBackward ? Cell::kGates : 1;
  static constexpr int kInputs = kBackward ? 1 + Cell::kSaved : Cell::kGates;  // values a unit that the cell reads
  static constexpr int kChunkBytes = kBlocks * kChunkDepth * kBlockRows * 2;
  static constexpr int kOwnBytes = kBlocks * kRows * kBlockRows * 2;  // of a tile, what a CTA publishes
  static constexpr int kStageBytes = kCellRows * kWarpRows * 2;       // a warp's part of a tile of any tensor
  static constexpr int kSwapBytes = kSplit == 2 ? 2 * kGroups * kCellBlocks * kGroupThreads * 16 : 0;
  static constexpr int kWeightOffset = kGroups * kSlots * kChunkBytes;
  static constexpr int kSwapOffset = kWeightOffset + kSplit * kSharedChunks * kChunkSteps * kStepBytes;
  static constexpr int kStageOffset = kSwapOffset + kSwapBytes;
  static constexpr int kEmptyOffset = kStageOffset + kGroups * kGroupWarps * (kInputs + 1) * kStageBytes;
  static constexpr int kBarrierOffset = kEmptyOffset + kOwnBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kGroups * kSlots * 16;
  // Registers of a thread that multiplies and of the others; a launch of 384 threads takes 168 each.
  static constexpr int kProductRegisters = 232, kOtherRegisters = 40;
  static_assert(kChunks < 32 && kBlocks % kSplit == 0, "both warp groups apply the cell to as many rows");
  static_assert(Cell::kProducts == 1 && !Cell::kReadsMemory && Cell::kAdditive, "one product and no memory");
};

__device__ __forceinline__ u32 load_strong4(const void* address) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_shared4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_strong4(void* address, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_stream16(void* address, const Words4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Sixteen zero bytes unless `wanted`.
__device__ __forceinline__ void copy_async16_if(u32 to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A named barrier that also tells whether any thread says so.
__device__ __forceinline__ bool any_of(int barrier, int threads, bool mine) {
  u32 any;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; barrier.cta.red.or.pred p, %1, %2, p; selp.u32 %0, 1, 0, p;}"
               : "=r"(any)
               : "r"(barrier), "r"(threads), "r"(static_cast<u32>(mine))
               : "memory");
  return any;
}
// In one block of PTX: the compiler would unroll the loop, and code that misses the instruction cache is slow.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p; .reg .u32 polls; mov.u32 polls, 0;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE; add.u32 polls, polls, 1; setp.lt.u32 p, polls, %2; @p bra WAIT; trap; DONE:}" ::"r"(barrier),
      "r"(parity), "n"(kSpinLimit)
      : "memory");
}
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store_bulk(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}
// Two 8 x 8 matrices, transposed: a lane gets two neighbouring batch rows of one unit where memory has units of a row.
__device__ __forceinline__ void load_transposed(u32 address, u32& first, u32& second) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_transposed(u32 address, u32 first, u32 second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(first), "r"(second)
               : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The exchanged state in global memory; see RingSlots of exchange.cuh for the protocol. A tile is a matrix of core
// matrices, all batch rows of eight units following each other.
template <typename S>
struct Ring {
  static constexpr int kSteps = 8;
  static constexpr u32 kEmpty = persistent::RingSlots<bf16, 1, 1>::kEmpty;

  static constexpr int kFlagBytes = 128;  // of a CTA and tile: a word a warp, the last step that it has published

  char *slots, *flags;
  u32 tile_bytes, step_bytes, flag_bytes;

  __device__ Ring(char* ring, const Part& part, int all_tiles, int chunks) {
    const int first = part.first_slot / S::kTileRows;
    tile_bytes = chunks * S::kChunkBytes, step_bytes = all_tiles * tile_bytes, flag_bytes = part.peers * kFlagBytes;
    slots = ring + first * tile_bytes;
    flags = ring + static_cast<size_t>(kSteps) * step_bytes + first * flag_bytes;
  }
  __device__ char* at(int step, int tile) const {
    return slots + (static_cast<u32>(step) % kSteps * step_bytes + tile * tile_bytes);
  }
  static __device__ u32 core(int eight_units, int block) { return (eight_units * S::kBlocks + block) * kCoreBytes; }
};

// The same in all lanes, and the compiler is to know it: what wgmma is told of shared matrices must be.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// Where the chunks of one warp group lie, numbered through all its tiles and steps. Where the ring has room for a whole
// tile every chunk has its own slot, known to the compiler.
template <typename S>
struct Place {
  u32 slot, parity;  // of the barrier that tells it full; that of an empty one is the other
  static constexpr bool kFixed = S::kSlots == S::kChunks;
  __device__ Place(u32 phase, u32 n, u32 all) {
    if constexpr (kFixed) {
      slot = n, parity = phase & 1;
    } else {
      const u32 number = phase * all + n;
      slot = number % S::kSlots, parity = number / S::kSlots & 1;
    }
  }
};

// The ring of a warp group in shared memory.
template <typename S>
struct Slots {
  u32 data, full, empty;
  __device__ Slots(char* shared, int group) {
    data = shared_address(shared) + group * (S::kSlots * S::kChunkBytes);
    full = shared_address(shared) + S::kBarrierOffset + group * (S::kSlots * 16), empty = full + S::kSlots * 8;
  }
};

// Two consecutive k of one row of W, zero outside the matrix.
template <typename S, typename T>
__device__ __forceinline__ u32 load_weights(const Problem<T>& p, const Part& part, int row, int k) {
  const int unit = part.first_unit + row;
  if (unit >= p.hidden || k >= p.hidden) return 0;
  const T* matrix = p.weight + static_cast<size_t>(part.head) * p.hidden * p.hidden;
  if constexpr (!S::kBackward) {
    return *reinterpret_cast<const u32*>(matrix + static_cast<size_t>(unit) * p.hidden + k);
  } else {
    const T* pair = matrix + static_cast<size_t>(k) * p.hidden + unit;
    return pair[0].bits | static_cast<u32>(pair[p.hidden].bits) << 16;
  }
}

// The chunk of the depth that a warp group's n-th one is.
template <typename S>
__device__ __forceinline__ int chunk_of(int n, int group) {
  return S::kSplit == 2 ? 2 * n + group : n;
}

template <typename S, typename T>
__device__ __forceinline__ void fill_shared_weights(const Problem<T>& p, const Part& part, char* shared) {
  constexpr int kPairs = S::kSplit * S::kSharedChunks * kChunkDepth / 2;
#pragma unroll 8
  for (int i = threadIdx.x; i < kRows * kPairs; i += kThreads) {
    const int row = i % kRows, step = i / kRows / 8, inner = i / kRows % 8 * 2;
    const int group = step / (S::kSharedChunks * kChunkSteps), own = step % (S::kSharedChunks * kChunkSteps);
    const int chunk = chunk_of<S>(S::of_shared(own / kChunkSteps), group);
    *reinterpret_cast<u32*>(shared + S::kWeightOffset + step * kStepBytes + inner / 8 * (kStepBytes / 2) + row * 16 +
                            inner % 8 * 2) =
        load_weights<S>(p, part, row, chunk * kChunkDepth + own % kChunkSteps * 16 + inner);
  }
}

}  // namespace wide
