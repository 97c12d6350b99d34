// All T steps of a recurrence of low rank in one launch, h_t = f(pre_t + U V h_{t-1}, memory_{t-1}), and its gradient.
//
// The frame is that of persistent.cuh: groups of batch rows, CTAs that share them, weights on chip for the whole launch.
// A CTA owns some hidden units and some ranks: rows of the first matrix (ranks x H) and of the second (H x ranks), which
// are V and U forwards, U^T and V^T backwards. A step of a tile is two products, and each hands its result to the group:
//
//   down  s = first h     sums of the ranks, rounded, published in a ring of their own by the rank warps
//   up    v = second s    sums of the units; the cell warps do with them as with those of a dense matrix
//
// Roles of the 16 warps: 0-7 both products; then one a row tile of the second matrix applies the cell; then one a row
// tile of the first sums up ranks; the last one fences. The tiles of a group go down and up by turns, each as long after
// its other product as before it, so that what one waits for travels while the others are worked on. The ranks of a tile
// are asked for before another's product; from three tiles on, the states are too (kAhead): two would not be there yet.
//
// Slots of both rings are used again as those of one are (see RingSlots), for a CTA publishes states of step t + 1 only
// after it has received all ranks of step t, and ranks of step t after all states of step t. Some CTAs have units but no
// ranks, or ranks but no units; so of a tile it is states and ranks of step t together that tell that all CTAs have done
// with both of step t - 1. The cell warps know of both of their own step; the rank warps know of the ranks one step back.
#pragma once

#include "persistent_cells.cuh"
#include "persistent_products.cuh"

namespace low_rank {

using persistent::kBlockRows;
using persistent::kProductThreads;
using persistent::kProductWarps;
using persistent::Part;
using persistent::Problem;

// Of the ranks: their sums are all there is.
struct Linear {
  static constexpr int kGates = 0, kProducts = 1, kStates = 1, kSaved = 0;
  static constexpr bool kReadsMemory = false, kAdditive = true, kLogarithmic = false;
};

constexpr int kRankBarriers = 8;  // from those of the units' sums to those of the ranks'

template <int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks>
struct Ranks : persistent::Shape<Linear, false, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks> {
  // An mma waits some 33 clocks for the one before it in its chain: four chains for the two warps of a tensor core.
  static constexpr int kTiles = kRowTiles * kBlocks;
  static constexpr int kChains = kTiles >= 4 ? 1 : kTiles >= 2 ? 2 : 4;
};

// Sizes of the second matrix and of the first, each as persistent::Shape has them.
template <typename Cell, bool kBackward, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kRankTiles,
          int kRankRegisterUnits, int kRankSharedUnits, int kBlocks, bool kAhead_>
struct Shape : persistent::Shape<Cell, kBackward, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks, 32 * kRankTiles> {
  using Down = Ranks<kRankTiles, kRankRegisterUnits, kRankSharedUnits, kBlocks>;
  static_assert(Shape::kSpareWarp, "a warp that fences");
  static_assert(Shape::kProducts == 1, "one product of the cell");
  static_assert(Down::kCellThreads == 32 * kRankTiles, "a warp of ranks a row tile");
  static constexpr int kRankBytes = Down::kInputOffset;
  static constexpr bool kAhead = kAhead_;
};

// Eight consecutive k of a row, zero outside the matrix.
template <typename T>
__device__ __forceinline__ Words4 load_row(const T* matrix, int rows, int depth, int row, int k) {
  if (row >= rows || k >= depth) return {0, 0, 0, 0};
  return *reinterpret_cast<const Words4*>(matrix + static_cast<size_t>(row) * depth + k);
}

// What is received is asked for, and settled, before the product that takes it.
template <typename T, int kUnits, int kBlocks>
struct AskedRing : persistent::PolledRing<T, kUnits, kBlocks> {
  using persistent::PolledRing<T, kUnits, kBlocks>::PolledRing;
  __device__ void await(int, int) const {}
};

// The rank warps: a thread looks after four ranks of one row of every block.
template <typename S, typename T, typename Exchange>
__device__ __forceinline__ void run_ranks(const Exchange& exchange, char* shared, const Part& part, int first, int ranks,
                                          int products) {
  using D = typename S::Down;
  const int thread = threadIdx.x - kProductThreads - S::kAllCells;
  const int block_row = thread / D::kQuads, rank = first + thread % D::kQuads * 4;
  const bool working = rank < ranks;
  const float* sums = reinterpret_cast<const float*>(shared) + block_row * D::kSumPitch + thread % D::kQuads * 4;
  int phase = 0;
#pragma unroll 1
  for (int step = 0; step < products; ++step) {
#pragma unroll 1
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      const int buffer = phase & 1, row = tile * D::kTileRows + block_row;
      barrier_sync(persistent::kSumsFull + kRankBarriers + buffer, D::kSumsThreads);
      float sum[D::kBlocks][4] = {};
#pragma unroll
      for (int n = 0; n < D::kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < D::kParts; ++i) {
          const float4 x = *reinterpret_cast<const float4*>(sums + buffer * D::kBufferSums + i * D::kPartSums +
                                                            n * kBlockRows * D::kSumPitch);
          sum[n][0] += x.x, sum[n][1] += x.y, sum[n][2] += x.z, sum[n][3] += x.w;
        }
      barrier_arrive(persistent::kSumsEmpty + kRankBarriers + buffer, D::kSumsThreads);
#pragma unroll
      for (int n = 0; n < D::kBlocks; ++n) exchange.publish(step, row + n * kBlockRows, rank, pack<T>(sum[n]), working);
      if (step >= 2 && working)
#pragma unroll
        for (int n = 0; n < D::kBlocks; ++n) exchange.wipe(step - 2, row + n * kBlockRows, rank);
    }
    // The wipes of four steps are over before the next one's ranks are published, and so before anyone who has received
    // those looks at the slots again. The warp has nothing else to do meanwhile, and must not wait for the cells: they are
    // some tiles behind.
    if (step % 4 == 3) fence_gpu();
  }
}

// The tile whose turn it is.
struct Turn {
  int step = 0, tile = 0;
  __device__ __forceinline__ void pass(int tiles) {
    if (++tile == tiles) tile = 0, ++step;
  }
};

template <typename S, typename Cell, typename T, typename M>
__device__ __forceinline__ void run(const Problem<T, M>& p, const T* first, const T* second, int ranks) {
  extern __shared__ __align__(128) char shared[];
  using D = typename S::Down;
  using States = AskedRing<T, D::kUnits, S::kBlocks>;
  using Inner = AskedRing<T, S::kUnits, S::kBlocks>;
  const int peers = max((p.hidden + S::kColumns - 1) / S::kColumns, (ranks + D::kColumns - 1) / D::kColumns);
  const Part part = persistent::part_of<S>(p, peers);
  const int first_rank = blockIdx.x % peers * D::kColumns;
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  const int rows = gridDim.x / peers * p.tiles * S::kTileRows;
  char* rank_shared = shared + S::exchange_offset(p.tiles);

  States states(p.ring, nullptr, part, rows, p.hidden);
  Inner inner(p.ring + static_cast<size_t>(States::kSlots) * states.slot_bytes, nullptr, part, rows, ranks);
  const int warp = threadIdx.x >> 5;
  if (warp < kProductWarps) {
    take_registers<S::kProductRegisters>();
    persistent::Product<S> up(
        shared, [&](int row, int k) { return load_row(second, p.hidden, ranks, part.first_unit + row, k); });
    persistent::Product<D, kRankBarriers> down(
        rank_shared, [&](int row, int k) { return load_row(first, ranks, p.hidden, first_rank + row, k); });
    // Half of the tiles are between the two products of one; a single one takes its turns alone.
    const int behind = part.tiles / 2, last = products * part.tiles + behind;
    const bool ahead = S::kAhead && part.tiles > behind + 1;
    Turn lower, upper;
    if (ahead) states.ask(0, 0);
#pragma unroll 1
    for (int turn = 0; turn < last; ++turn) {
      const bool goes_up = turn >= behind;
      if (goes_up && behind > 0) inner.ask(upper.step, upper.tile);
      if (lower.step < products) {
        if (!ahead) states.ask(lower.step, lower.tile);
        states.settle();
        down.template run<T>(states, lower.step, lower.tile);
        lower.pass(part.tiles);
      }
      if (goes_up) {
        if (behind == 0) inner.ask(upper.step, upper.tile);
        inner.settle();
      }
      // The tile's last product up was in the turn before, or earlier.
      if (ahead && lower.step < products) states.ask(lower.step, lower.tile);
      if (goes_up) {
        up.template run<T>(inner, upper.step, upper.tile);
        upper.pass(part.tiles);
      }
    }
    down.close(part.tiles);
    up.close(part.tiles);
  } else {
    give_registers<S::kOtherRegisters>();
    if (warp < kProductWarps + S::kAllCells / 32)
      persistent::run_cells<S, Cell>(p, states, shared, part, products);
    else if (warp < kProductWarps + S::kAllCells / 32 + D::kCellThreads / 32)
      run_ranks<S, T>(inner, rank_shared, part, first_rank, ranks, products);
    else if (warp == persistent::kLastWarp)
      persistent::run_fences<S, States>(products);
  }
}

}  // namespace low_rank

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kRankTiles,
          int kRankRegisterUnits, int kRankSharedUnits, int kBlocks, bool kAhead, typename Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    low_rank_forward(const T* pre, const T* first, const T* second, const T* bias, const T* h0, const Memory* c0,
                     const u8* reset, T* h, T* saved, Memory* c, Memory* c_last, char* ring, int steps, int batch,
                     int hidden, int pitch, int tiles, int ranks) {
  using S = low_rank::Shape<Cell, false, kRowTiles, kRegisterUnits, kSharedUnits, kRankTiles, kRankRegisterUnits,
                            kRankSharedUnits, kBlocks, kAhead>;
  persistent::Problem<T, Memory> p{};
  p.input = pre, p.bias = bias, p.initial = h0, p.reset = reset, p.output = h, p.saved = saved;
  p.memory = c, p.memory_last = c_last;
  if constexpr (S::kOtherState)
    p.memory_before = c0;
  else
    p.memory_before = h0;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  low_rank::run<S, Cell>(p, first, second, ranks);
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kRankTiles,
          int kRankRegisterUnits, int kRankSharedUnits, int kBlocks, bool kAhead, typename Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    low_rank_backward(const T* dh, const T* first, const T* second, const T* dh_last, Memory* dc_last, const u8* reset,
                      T* saved, const Memory* memory0, Memory* memory, T* dpre, T* drec, T* dh0, Memory* dc0,
                      char* ring, int steps, int batch, int hidden, int pitch, int tiles, int ranks) {
  using S = low_rank::Shape<Cell, true, kRowTiles, kRegisterUnits, kSharedUnits, kRankTiles, kRankRegisterUnits,
                            kRankSharedUnits, kBlocks, kAhead>;
  persistent::Problem<T, Memory> p{};
  p.input = dh, p.last_gradient = dh_last, p.reset = reset, p.output = dpre, p.saved = saved;
  p.initial_gradient = dh0, p.memory_before = memory0, p.memory = memory, p.memory_last = dc_last;
  p.memory_gradient = dc0, p.products_gradient = drec;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  low_rank::run<S, Cell>(p, first, second, ranks);
}
