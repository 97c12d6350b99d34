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

#include "wide_cells.cuh"
#include "wide_products.cuh"

namespace wide {

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run_products(const Problem<T>& p, const Ring<S>& ring, char* shared, const Part& part,
                                             int chunks, int products) {
  const int warp = uniform(threadIdx.x / 32 % kGroupWarps);
  const int group = uniform(threadIdx.x / kGroupThreads), member = S::kSplit == 2 ? group : 0;
  const Slots<S> slots(shared, group);

  u32 weights[S::kRegisterChunks * kChunkSteps][4];
  fill_register_weights<S>(p, part.head, part.first_unit, member, weights);
  const u32 shared_weights =
      matrix_low(shared_address(shared) + S::kWeightOffset + member * S::kGroupWeightBytes, kStepBytes / 2);

  const Cells<S, Cell, T> cells(
      p, ring, part, warp, member * S::kCellBlocks, member * kGroupWarps + warp,
      shared_address(shared) + S::kStageOffset + (group * kGroupWarps + warp) * (S::kStages * S::kStageBytes));

  const int first_tile = S::kSplit == 2 ? 0 : group;
  for (int tile = first_tile; tile < part.tiles; tile += S::kTileGroups) cells.publish_initial(tile);

  const int all = S::chunks_of(chunks, member);  // of this warp group
  u32 phase = 0;
  if (first_tile < part.tiles) cells.fetch(0, first_tile);
  for (int step = 0; step < products; ++step)
    for (int tile = first_tile; tile < part.tiles; tile += S::kTileGroups, ++phase) {
      // All that does not depend on the sums happens before them.
      typename Cells<S, Cell, T>::Given given;
      cells.take(given);
      if (tile + S::kTileGroups < part.tiles)
        cells.fetch(step, tile + S::kTileGroups);
      else
        cells.fetch(step + 1, first_tile);
      cells.prepare(step, tile, given);

      // The warp groups take turns: two products at a time would take twice as long each, and then both would wait.
      if (S::kSplit == 1 && (tile > 0 || (step > 0 && part.tiles % 2 == 0)))
        barrier_sync(kTurn + group, kGroups * kGroupThreads);
      float sum[S::kBlocks * 4];
      float mine[S::kCellBlocks * 4];
      const u32 swap = shared_address(shared) + S::kSwapOffset + (phase & 1) * (S::kSwapBytes / 2) +
                       threadIdx.x % kGroupThreads * 16;
      constexpr int kGroupSwap = S::kCellBlocks * kGroupThreads * 16;
      const bool passes = S::kSplit == 1 && (tile + 1 < part.tiles || (group == 1 && step + 1 < products));
      // What this warp group goes on with; whether any of its sums, or of the other's, is a NaN.
      auto share = [&]() {
        const bool missing = suspect(sum);
        if constexpr (S::kSplit == 1) {
#pragma unroll
          for (int i = 0; i < S::kCellBlocks * 4; ++i) mine[i] = sum[i];
          return any_of(kVote + group, kGroupThreads, missing);
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
          return any_of(kSumsReady, kGroups * kGroupThreads, missing);
        }
      };
      multiply<S, T, false>(sum, weights, shared_weights, slots, ring.at(step, tile), phase, all, member, group,
                            passes);
      multiplied(sum);
      if (__builtin_expect(share(), 0)) {
        multiply<S, T, true>(sum, weights, shared_weights, slots, ring.at(step, tile), phase, all, member, group,
                             false);
        multiplied(sum);
        share();
      }
      release_tile(slots, phase, all);
      if constexpr (S::kSplit == 2) {
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block) {
          const Words4 theirs = load_shared(swap + group * kGroupSwap + block * (kGroupThreads * 16));
          mine[block * 4] += __uint_as_float(theirs.x), mine[block * 4 + 1] += __uint_as_float(theirs.y);
          mine[block * 4 + 2] += __uint_as_float(theirs.z), mine[block * 4 + 3] += __uint_as_float(theirs.w);
        }
      }
      cells.finish(step, tile, products, given, mine);
    }
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = persistent::part_of<S>(p);
  const int chunks = (p.hidden + kChunkDepth - 1) / kChunkDepth;
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  const Ring<S> ring(p.ring, part, gridDim.x / part.peers * p.tiles, chunks);
  prepare_rings<S, kThreads>(shared);
  if constexpr (S::kSharedChunks > 0)
#pragma unroll 1
    for (int member = 0; member < S::kSplit; ++member)
      fill_shared_weights<S, kThreads>(p, part.head, part.first_unit, member,
                             shared + S::kWeightOffset + member * S::kGroupWeightBytes);
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x < kGroups * kGroupThreads) {
    take_registers<S::kProductRegisters>();
    run_products<S, Cell>(p, ring, shared, part, chunks, products);
  } else {
    give_registers<S::kOtherRegisters>();
    const int warp = uniform(threadIdx.x / 32) - kGroups * kGroupWarps, group = warp / kLoaders;
    const int member = S::kSplit == 2 ? group : 0;
    run_loader<S>(ring, shared, part, member, group, warp % kLoaders, S::chunks_of(chunks, member), products);
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
