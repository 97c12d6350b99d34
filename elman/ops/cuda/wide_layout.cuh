// What the warps of the wide and the split kernels share: sizes, places in registers and shared memory, and the
// exchanged state. The whole is told in wide.cuh.
#pragma once

#include "hopper.cuh"
#include "persistent_layout.cuh"

namespace wide {

using persistent::kBlockRows;
using persistent::kSpinLimit;
using persistent::Part;
template <typename T>
using Problem = persistent::Problem<T, T>;

constexpr int kGroups = 2, kGroupThreads = 128, kGroupWarps = 4,
              kLoaders = 2;  // warp groups that multiply; loader warps of each ring
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kRows = 64, kWarpRows = 16;  // of W: a warp group's, a warp's
constexpr int kCoreBytes = 128;            // a core matrix of wgmma: eight units of eight batch rows
constexpr int kChunkSteps = 8, kChunkDepth = kChunkSteps * 16;
constexpr int kStepBytes = kRows * 16 * 2;           // of W, one wgmma deep
constexpr int kSumsReady = 1, kTurn = 2, kVote = 4;  // named barriers; of the last two one a warp group

// Chunks of the depth, of which every kStride-th is one member's: a warp group's or a CTA's of a cluster.
// kRegisterChunks + kSharedChunks: those whose weights a warp group holds, in registers and in shared memory; kBlocks:
// blocks of eight batch rows a tile; kSlots: chunks of the state in a ring.
template <bool kBackward_, int kRegisterChunks_, int kSharedChunks_, int kBlocks_, int kSlots_, int kStride_>
struct Depth {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRegisterChunks = kRegisterChunks_, kSharedChunks = kSharedChunks_;
  static constexpr int kChunks = kRegisterChunks + kSharedChunks, kBlocks = kBlocks_, kSlots = kSlots_,
                       kStride = kStride_;
  static constexpr bool kFixed = kSlots % kChunks == 0;  // every chunk of a tile has a slot of its own
  static constexpr bool kRelease = !kFixed;              // or slots are given back chunk by chunk
  static constexpr int kSets = kFixed ? kSlots / kChunks : 1;  // of them, which tiles have by turns
  // Weights in shared memory and in registers, each the depth of one wgmma, take turns, the former first, until one kind
  // is used up.
  static constexpr int kTurns = (kRegisterChunks < kSharedChunks ? kRegisterChunks : kSharedChunks) * kChunkSteps;
  static __device__ constexpr bool in_registers(int step) {
    return step < 2 * kTurns ? step % 2 == 1 : kRegisterChunks > kSharedChunks;
  }
  static __device__ constexpr int index(int step) { return step < 2 * kTurns ? step / 2 : step - kTurns; }
  static __device__ constexpr int of_registers(int i) {
    return i < kTurns ? 2 * i + 1 : i + kTurns;
  }  // index's inverse
  static __device__ constexpr int of_shared(int i) { return i < kTurns ? 2 * i : i + kTurns; }
  // The chunk of the depth that a member's n-th one is, and how many it has of so many.
  static __device__ __forceinline__ int chunk_of(int n, int member) { return kStride * n + member; }
  static __device__ __forceinline__ int chunks_of(int chunks, int member) {
    return (chunks - member + kStride - 1) / kStride;
  }
  static constexpr int kTileRows = kBlocks * kBlockRows;
  static constexpr int kChunkBytes = kBlocks * kChunkDepth * kBlockRows * 2;
  static constexpr int kGroupWeightBytes = kSharedChunks * kChunkSteps * kStepBytes;  // in shared memory
  static_assert(kChunks < 32, "loaders keep a bit a chunk");
  static_assert(kSlots >= 3 || kFixed, "parities tell two uses of a slot apart, loaders being two");
};

// kSplit: among how many warp groups the depth of a tile is split.
template <typename Cell, bool kBackward, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kSplit_>
struct Shape : Depth<kBackward, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit_> {
  using Base = Depth<kBackward, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kSplit_>;
  static constexpr int kSplit = kSplit_, kColumns = kRows;
  static constexpr int kPeerStep = 2;  // CTAs that publish a chunk
  static constexpr int kCellBlocks = kBlocks / kSplit, kCellRows = kCellBlocks * kBlockRows;
  static constexpr int kPass = Base::kChunks / 2;       // with its chunk of this number a warp group passes its turn on
  static constexpr int kTileGroups = kGroups / kSplit;  // tiles are dealt to so many in turn
  static constexpr int kFlagQuads = kSplit;             // of words that a CTA's warps raise, one each
  static constexpr int kRings = kGroups, kRingWarps = kGroupWarps;
  static constexpr bool kWiper = false;
  static constexpr int kInputs = kBackward ? 1 + Cell::kSaved : Cell::kGates;  // values a unit that the cell reads
  static constexpr int kOwnBytes = kBlocks * kRows * kBlockRows * 2;  // of a tile, what a CTA publishes
  static constexpr int kEmptyBytes = kOwnBytes;
  static constexpr int kStageBytes = kCellRows * kWarpRows * 2;       // a warp's part of a tile of any tensor
  static constexpr int kStages = kInputs + 1, kOutStage = kInputs;
  static constexpr int kSwapBytes = kSplit == 2 ? 2 * kGroups * kCellBlocks * kGroupThreads * 16 : 0;
  static constexpr int kWeightOffset = kRings * kSlots * Base::kChunkBytes;
  static constexpr int kSwapOffset = kWeightOffset + kSplit * Base::kGroupWeightBytes;
  static constexpr int kStageOffset = kSwapOffset + kSwapBytes;
  static constexpr int kEmptyOffset = kStageOffset + kGroups * kGroupWarps * kStages * kStageBytes;
  static constexpr int kBarrierOffset = kEmptyOffset + kEmptyBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kRings * kSlots * 16;
  // Registers of a thread that multiplies and of the others; a launch of 384 threads takes 168 each.
  static constexpr int kProductRegisters = 232, kOtherRegisters = 40;
  static_assert(kBlocks % kSplit == 0, "both warp groups apply the cell to as many rows");
  static_assert(Cell::kProducts == 1 && !Cell::kReadsMemory && Cell::kAdditive, "one product and no memory");
};

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

// Where the chunks of one ring lie, numbered through all its tiles and steps. Where the ring has room for a whole
// tile every chunk has its own slot, known to the compiler; with room for two, tiles have them by turns.
template <typename S>
struct Place {
  u32 slot, parity;  // of the barrier that tells it full; that of an empty one is the other
  __device__ Place(u32 phase, u32 n, u32 all) {
    if constexpr (S::kFixed) {
      slot = phase % S::kSets * S::kChunks + n, parity = phase / S::kSets & 1;
    } else {
      const u32 number = phase * all + n;
      slot = number % S::kSlots, parity = number / S::kSlots & 1;
    }
  }
};

// A ring in shared memory, of the warp groups that multiply by what it brings.
template <typename S>
struct Slots {
  u32 data, full, empty;
  __device__ Slots(char* shared, int ring) {
    data = shared_address(shared) + ring * (S::kSlots * S::kChunkBytes);
    full = shared_address(shared) + S::kBarrierOffset + ring * (S::kSlots * 16), empty = full + S::kSlots * 8;
  }
};

// Two consecutive k of one unit's row of W, zero outside the matrix.
template <typename S, typename T>
__device__ __forceinline__ u32 load_weights(const Problem<T>& p, int head, int unit, int k) {
  if (unit >= p.hidden || k >= p.hidden) return 0;
  const T* matrix = p.weight + static_cast<size_t>(head) * p.hidden * p.hidden;
  if constexpr (!S::kBackward) {
    return *reinterpret_cast<const u32*>(matrix + static_cast<size_t>(unit) * p.hidden + k);
  } else {
    const T* pair = matrix + static_cast<size_t>(k) * p.hidden + unit;
    return pair[0].bits | static_cast<u32>(pair[p.hidden].bits) << 16;
  }
}

// The chunks that a thread of a member's warp group holds in registers, of the rows from this unit on.
template <typename S, typename T>
__device__ __forceinline__ void fill_register_weights(const Problem<T>& p, int head, int first_unit, int member,
                                                      u32 (&weights)[S::kRegisterChunks * kChunkSteps][4]) {
  const int lane = threadIdx.x & 31, row = uniform(threadIdx.x / 32 % kGroupWarps) * kWarpRows + lane / 4;
#pragma unroll
  for (int s = 0; s < S::kRegisterChunks * kChunkSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = S::of_registers(s);
      weights[s][i] = load_weights<S>(p, head, first_unit + row + i % 2 * 8,
                                      S::chunk_of(step / kChunkSteps, member) * kChunkDepth + step % kChunkSteps * 16 +
                                          i / 2 * 8 + lane % 4 * 2);
    }
}

// And those that it reads from shared memory, by all threads of a CTA.
template <typename S, int kThreads, typename T>
__device__ __forceinline__ void fill_shared_weights(const Problem<T>& p, int head, int first_unit, int member,
                                                    char* to) {
  constexpr int kLoads = kThreads > 384 ? 4 : 8;  // on the way at a time: what the registers of a launch hold
#pragma unroll kLoads
  for (int i = threadIdx.x; i < kRows * S::kSharedChunks * kChunkDepth / 2; i += kThreads) {
    const int row = i % kRows, step = i / kRows / 8, inner = i / kRows % 8 * 2;
    const int deep = S::of_shared(step), chunk = S::chunk_of(deep / kChunkSteps, member);
    *reinterpret_cast<u32*>(to + step * kStepBytes + inner / 8 * (kStepBytes / 2) + row * 16 + inner % 8 * 2) =
        load_weights<S>(p, head, first_unit + row, chunk * kChunkDepth + deep % kChunkSteps * 16 + inner);
  }
}

// Before the first step: the barriers of all rings, and the empty words that wipes copy.
template <typename S, int kThreads>
__device__ __forceinline__ void prepare_rings(char* shared) {
  if (threadIdx.x < S::kRings * S::kSlots) {
    const Slots<S> slots(shared, threadIdx.x / S::kSlots);
    const u32 slot = threadIdx.x % S::kSlots * 8;
    mbarrier_init(slots.full + slot, 1), mbarrier_init(slots.empty + slot, S::kRingWarps);
    fence_mbarrier_init();
  }
  for (int i = threadIdx.x * 16; i < S::kEmptyBytes; i += kThreads * 16)
    store_shared(shared_address(shared) + S::kEmptyOffset + i, {~0u, ~0u, ~0u, ~0u});
}

}  // namespace wide
