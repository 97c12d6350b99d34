// What a persistent kernel works on, and how its warps, registers and shared memory are shared out.
#pragma once

#include "exchange.cuh"
#include "numbers.cuh"

namespace persistent {

constexpr int kThreads = 512;
constexpr int kProductThreads = kProductWarps * 32;
constexpr int kLastWarp = kThreads / 32 - 1;

// Named barriers; 0 is __syncthreads. Sums alternate between two buffers.
constexpr int kSumsFull = 1, kSumsEmpty = 3;
// So do these two, from step to step.
constexpr int kStepDone = 5, kStepFenced = 7;

// G gates, P products, S saved values, as the cell has them; its memory, of numbers M, is h, or c where it has a second
// state.
template <typename T, typename M>
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
  const M* memory_before;  // the memory before the first step (B, H) or null
  M* memory;               // after every step (T, B, H): forward writes c if not null, backward reads it
  M* memory_last;          // forward: c_last (B, H), written; backward: gradient of it or null
  M* memory_gradient;      // backward: gradient of c0 (B, H), written if initial_gradient is
  T* products_gradient;    // backward: gradient of rec (T, B, P, H), written where it is no part of pre's
  char* ring;              // see Ring; null for a cluster
  int steps, batch;
  int hidden, pitch;  // units of a head, H/N, and of all, H
  int tiles;          // row tiles of a group
};

// What the cell warps need to know of a kernel: kRows rows of W a CTA, tiles of kTileRows batch rows, of which the cell
// threads take kPassRows at once, and kParts partial sums of every product. kOtherThreads more do other things.
template <typename Cell, bool kBackward_, int kRows_, int kTileRows_, int kPassRows_, int kParts_, int kWeightBytes,
          int kOtherThreads = 0>
struct Layout {
  static constexpr bool kBackward = kBackward_;
  static constexpr int kRows = kRows_, kTileRows = kTileRows_, kPassRows = kPassRows_, kParts = kParts_;
  static constexpr int kPasses = kTileRows / kPassRows;
  static constexpr int kGates = Cell::kGates, kProducts = Cell::kProducts, kSaved = Cell::kSaved;
  static constexpr bool kMemory = Cell::kReadsMemory, kOtherState = Cell::kStates == 2;
  static constexpr int kMemoryWidth = Cell::kLogarithmic ? 2 : 1;  // of its numbers, in those of the tensors
  static constexpr int kIn = kBackward ? kProducts : 1;   // values that a hidden unit publishes
  static constexpr int kOut = kBackward ? 1 : kProducts;  // rows of the product that a hidden unit needs
  static constexpr int kColumns = kRows / kOut / 8 * 8;   // hidden units a CTA: pairs of threads publish eight
  static constexpr int kPeerStep = 1;                     // what the CTAs of a group are a multiple of
  static constexpr int kQuads = kColumns / 4;
  static constexpr int kCellThreads = (kPassRows * kQuads + 31) / 32 * 32;
  static constexpr bool kExactThreads = kCellThreads == kPassRows * kQuads;
  static constexpr int kSumsThreads = kProductThreads + kCellThreads;
  // Where there are warps enough, two groups of cell threads take turns, each with a buffer of sums of its own.
  static constexpr int kReserved = kOtherThreads ? kOtherThreads + 32 : 0;
  static constexpr int kCellGroups = kProductThreads + 2 * kCellThreads + kReserved <= kThreads ? 2 : 1;
  static constexpr int kAllCells = kCellGroups * kCellThreads;
  static constexpr bool kSpareWarp = kProductThreads + kAllCells + kOtherThreads < kThreads;
  // +4 words: the lane quads of a fragment store fall on different banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kPartSums = kTileRows * kSumPitch;
  static constexpr int kBufferSums = kParts * kPartSums;
  // Values a cell thread reads for a unit.
  static constexpr int kInputs = kBackward ? 1 + kSaved + (kMemory ? kMemoryWidth : 0) : kGates;
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
template <typename Cell, bool kBackward, int kRowTiles_, int kRegisterUnits_, int kSharedUnits_, int kBlocks_,
          int kOtherThreads = 0>
struct Shape : Layout<Cell, kBackward, 16 * kRowTiles_, kBlocks_ * kBlockRows,
                      (Cell::kReadsMemory ? kBlocks_ : 1) * kBlockRows, kProductWarps,
                      kProductWarps * kSharedUnits_ * kRowTiles_ * 1024, kOtherThreads> {
  static constexpr int kRowTiles = kRowTiles_, kRegisterUnits = kRegisterUnits_, kSharedUnits = kSharedUnits_;
  static constexpr int kBlocks = kBlocks_, kUnits = kRegisterUnits + kSharedUnits;
  // Units whose fragments are received together: enough to keep the tensor cores busy, few enough for the registers.
  static constexpr int kGroupLimit = kBlocks == 1 ? 5 : 3;
  static constexpr int kGroups = (kUnits + kGroupLimit - 1) / kGroupLimit;
  static constexpr int kGroup = (kUnits + kGroups - 1) / kGroups;
  static constexpr int kChains = 1;  // of sums that are added up at the end: one where row tiles keep the mma apart
  // Registers of a product thread and of the others: 512 threads share 65536.
  static constexpr int kProductRegisters =
      Cell::kReadsMemory ? (kBackward ? 176 : 160) : kBlocks == 1 ? 208 : 200;
  static constexpr int kOtherRegisters = 256 - kProductRegisters;
};

// What this CTA works on, in the order heads x groups x columns, of which there are `peers`.
template <typename S, typename T, typename M>
__device__ __forceinline__ Part part_of(const Problem<T, M>& p, int peers) {
  Part part;
  part.peers = peers;
  const int group = blockIdx.x / part.peers, groups = gridDim.x / part.peers / (p.pitch / p.hidden);
  part.head = group / groups;
  part.first_row = group % groups * p.tiles * S::kTileRows;
  part.first_slot = group * p.tiles * S::kTileRows;
  part.first_unit = blockIdx.x % part.peers * S::kColumns;
  part.rows = min(p.tiles * S::kTileRows, p.batch - part.first_row);
  part.tiles = (part.rows + S::kTileRows - 1) / S::kTileRows;
  return part;
}

template <typename S, typename T, typename M>
__device__ __forceinline__ Part part_of(const Problem<T, M>& p) {
  constexpr int kStep = S::kPeerStep * S::kColumns;
  return part_of<S>(p, (p.hidden + kStep - 1) / kStep * S::kPeerStep);
}

}  // namespace persistent
