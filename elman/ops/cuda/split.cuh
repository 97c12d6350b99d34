// All T steps of a recurrence in one launch, for large batches and wide states on Hopper: wide.cuh with the depth of
// the product split over a cluster, so that a CTA holds some columns of many rows of W and needs a part of the state.
//
// A cluster of kCluster CTAs owns 128 units, two wgmma tall. Each CTA holds their rows of W for every kCluster-th chunk
// of the depth, 64 rows a warp group, and both warp groups multiply by the same chunks of the state, which go through
// one ring of slots. A product warp has the sums of 16 units over the CTA's part of the depth, and all 16 belong to one
// CTA of the cluster, into whose shared memory the warp stores them as they lie in its registers. There four warps add
// up the parts, in the order of the CTAs so that results are bitwise repeatable, apply the cell, and publish as the
// warps of wide.cuh do. Meanwhile the product warps are at the next tile: with two tiles each one's exchange hides
// behind the other's product. The warp groups take turns at the tensor cores, and nobody waits for both: while one sends
// its sums, the other multiplies.
//
// A CTA has rooms for the parts of two tiles, or for those of one: of large ones, and where that makes room for slots of
// the state. Whoever has read one tells the senders, who wait for that before they use it again.
//
// Roles of the 16 warps: 0-7 products, 8-11 cells, 12 and 13 loaders, 14 wipes.
#pragma once

#include "wide_cells.cuh"
#include "wide_products.cuh"

namespace split {

using wide::kBlockRows;
using wide::kChunkDepth;
using wide::kChunkSteps;
using wide::kGroups;
using wide::kGroupThreads;
using wide::kGroupWarps;
using wide::kRows;
using wide::kSpinLimit;
using wide::kWarpRows;
using wide::Part;
using wide::Problem;

constexpr int kThreads = 4 * kGroupThreads;
constexpr int kClusterUnits = kGroups * kRows, kCellWarps = 4, kProductWarps = kGroups * kGroupWarps;

template <typename Cell, bool kBackward, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kCluster_,
          int kRooms_>
struct Shape : wide::Depth<kBackward, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kCluster_> {
  using Base = wide::Depth<kBackward, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kCluster_>;
  static constexpr int kCluster = kCluster_, kColumns = kClusterUnits / kCluster;
  static constexpr int kPeerStep = kCluster;  // CTAs that publish a chunk
  static constexpr int kOwnWarps = kColumns / kWarpRows;  // product warps whose sums a CTA keeps, 16 units each
  static constexpr int kCellBlocks = kBlocks * kOwnWarps / kCellWarps, kCellRows = kCellBlocks * kBlockRows;
  static constexpr int kTileGroups = 1, kFlagQuads = 1;
  // With its chunk of this number a warp group passes its turn on: late, but so that three chunks more can come while the
  // other one has yet to give back the first. Some CTAs have one chunk less than others.
  static constexpr int kLate = Base::kChunks < kSlots - 1 ? Base::kChunks - 3 : kSlots - 4;
  static constexpr int kPass = kLate > 0 ? kLate : 0;
  static_assert(kPass < kSlots, "or the first group would wait for slots that the other holds, and that for its turn");
  static constexpr int kRings = 1, kRingWarps = kProductWarps;
  static constexpr bool kWiper = true;
  static constexpr int kInputs = kBackward ? 1 + Cell::kSaved : Cell::kGates;  // values a unit that the cell reads
  static constexpr int kOwnBytes = kBlocks * kColumns * kBlockRows * 2;        // of a tile, what a CTA publishes
  static constexpr int kEmptyBytes = kBlocks * wide::kCoreBytes;
  static constexpr int kStageBytes = kCellRows * kWarpRows * 2;  // a cell warp's part of a tile of any tensor
  // Inputs of the next tile come while the cell is applied to this one, but for large tiles: those leave time enough
  // after that, and what is stored goes where the inputs were.
  static constexpr bool kAhead = kBlocks < 8;
  static constexpr int kStages = kInputs + kAhead, kOutStage = kAhead ? kInputs : 0;
  static constexpr int kPartBytes = kBlocks * 32 * 16;           // the sums of a product warp
  static constexpr int kWeightOffset = kSlots * Base::kChunkBytes;
  static constexpr int kPartOffset = kWeightOffset + kGroups * Base::kGroupWeightBytes;
  static constexpr int kRoomBytes = kProductWarps * kPartBytes;  // of the units a CTA owns, from the whole cluster
  static constexpr int kRooms = kRooms_;
  static constexpr int kStageOffset = kPartOffset + kRooms * kRoomBytes;
  static constexpr int kEmptyOffset = kStageOffset + kCellWarps * kStages * kStageBytes;
  static constexpr int kBarrierOffset = kEmptyOffset + kEmptyBytes;
  // The last turn that each warp has multiplied in, of both groups; that each of the first has done with.
  static constexpr int kMultiplied = kBarrierOffset + kSlots * 16, kDone = kMultiplied + kProductWarps * 4;
  static constexpr int kPartsFull = kDone + kGroupWarps * 4;       // one a room
  static constexpr int kPartsRead = kPartsFull + kRooms * 8;       // one a room and CTA that is sent to
  static constexpr int kSeen = kPartsRead + kRooms * kCluster * 8;  // what a loader tells the warp that wipes, and back
  static constexpr int kSharedBytes = kSeen + 16;
  // Registers of a thread that multiplies, that applies the cell, and of the others; 512 threads share 65536.
  static constexpr int kProductRegisters = kCellBlocks > 4 ? 184 : 192, kOtherRegisters = 24;
  static constexpr int kCellRegisters = 512 - 2 * kProductRegisters - kOtherRegisters;
  static_assert(kBlocks * kOwnWarps % kCellWarps == 0, "every cell warp has as many blocks");
  static_assert(kOwnBytes % kEmptyBytes == 0, "wipes are whole copies");
  static_assert(Cell::kProducts == 1 && !Cell::kReadsMemory && Cell::kAdditive, "one product and no memory");
};

template <typename S, typename T>
__device__ __forceinline__ void run_products(const Problem<T>& p, const wide::Ring<S>& ring, char* shared,
                                             const Part& part, int rank, int all, int products) {
  const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x / 32), group = uniform(threadIdx.x / kGroupThreads);
  const wide::Slots<S> slots(shared, 0);
  const u32 base = shared_address(shared);

  u32 weights[S::kRegisterChunks * kChunkSteps][4];
  wide::fill_register_weights<S>(p, part.head, part.first_unit - rank * S::kColumns + group * kRows, rank, weights);
  const u32 shared_weights =
      matrix_low(base + S::kWeightOffset + group * S::kGroupWeightBytes, wide::kStepBytes / 2);

  // Where the sums go: to the owner of the warp's units, in whose memory those of all CTAs follow each other.
  const int owner = warp / S::kOwnWarps;
  const u32 to = base + S::kPartOffset + (rank * S::kOwnWarps + warp % S::kOwnWarps) * S::kPartBytes + lane * 16;
  const u32 full = base + S::kPartsFull, read = base + S::kPartsRead + owner * 8;
  const u32 multiplied = base + S::kMultiplied, done = base + S::kDone;

  u32 turn = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++turn) {
      const u32 phase = uniform(turn);  // else slots are addressed by each thread anew
      float sum[S::kBlocks * 4];
      const char* state = ring.at(step, tile);
      if (group == 1 || phase > 0) barrier_sync(wide::kTurn + group, kGroups * kGroupThreads);
      const bool passes = group == 0 || tile + 1 < part.tiles || step + 1 < products;
      wide::multiply<S, T, false>(sum, weights, shared_weights, slots, state, phase, all, rank, group, passes);
      // Meanwhile, of a tile before: its sums do not depend on this one.
      const u32 room = phase % S::kRooms, sums = to + room * S::kRoomBytes, parts_full = full + room * 8;
      mbarrier_wait<kSpinLimit>(read + room * (S::kCluster * 8), (phase / S::kRooms & 1) ^ 1);
      wide::multiplied(sum);
      if (S::kRelease && lane == 0) store_shared4(multiplied + warp * 4, phase + 1);
      // All warps of the group have done with the state when it is sent that one has: see wide::wipe.
      if (__builtin_expect(any_of(wide::kVote + group, kGroupThreads, wide::suspect(sum)), 0)) {
        // The last slot is then this group's alone: the other one does not multiply by what is there, and the second
        // waits for the first, which may want it too.
        if (S::kRelease) wait_for_four<kSpinLimit>(group == 0 ? multiplied + kGroupWarps * 4 : done, phase + 1);
        wide::multiply<S, T, true>(sum, weights, shared_weights, slots, state, phase, all, rank, group, false);
        wide::multiplied(sum);
      }
      if (S::kRelease && group == 0 && lane == 0) store_shared4(done + warp * 4, phase + 1);
      wide::release_tile(slots, phase, all);
      auto words = [&](int block) -> Words4 {
        return {__float_as_uint(sum[block * 4]), __float_as_uint(sum[block * 4 + 1]),
                __float_as_uint(sum[block * 4 + 2]), __float_as_uint(sum[block * 4 + 3])};
      };
      if (owner == rank) {
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) store_shared(sums + block * 512, words(block));
        __syncwarp();
        if (lane == 0) mbarrier_arrive(parts_full);
      } else {
        const u32 theirs = peer_address(sums, owner), counted = peer_address(parts_full, owner);
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) push(theirs + block * 512, words(block), counted);
      }
      __syncwarp();
    }
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run_cells(const Problem<T>& p, const wide::Ring<S>& ring, char* shared,
                                          const Part& part, int rank, int products) {
  const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x / 32) - kProductWarps;
  const int units = warp % S::kOwnWarps, first_block = warp / S::kOwnWarps * S::kCellBlocks;
  const u32 base = shared_address(shared);
  const wide::Cells<S, Cell, T> cells(p, ring, part, units, first_block, warp,
                                      base + S::kStageOffset + warp * (S::kStages * S::kStageBytes));
  for (int tile = 0; tile < part.tiles; ++tile) cells.publish_initial(tile);

  const u32 first_full = base + S::kPartsFull, first_read = base + S::kPartsRead + rank * 8;
  const u32 first_parts = base + S::kPartOffset + units * S::kPartBytes + first_block * 512 + lane * 16;
  u32 phase = 0;
  cells.fetch(0, 0);
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      const u32 room = phase % S::kRooms, parts = first_parts + room * S::kRoomBytes;
      const u32 full = first_full + room * 8, read = first_read + room * (S::kCluster * 8);
      if (warp == 0 && lane == 0) mbarrier_expect(full, (S::kCluster - 1) * S::kOwnWarps * S::kPartBytes);
      auto fetch_next = [&]() {
        if (tile + 1 < part.tiles)
          cells.fetch(step, tile + 1);
        else
          cells.fetch(step + 1, 0);
      };
      typename wide::Cells<S, Cell, T>::Given given;
      cells.take(given);
      if (S::kAhead) fetch_next();
      cells.prepare(step, tile, given);
      mbarrier_wait<kSpinLimit>(full, phase / S::kRooms & 1);
      float mine[S::kCellBlocks * 4] = {};
#pragma unroll
      for (int from = 0; from < S::kCluster; ++from)
#pragma unroll
        for (int block = 0; block < S::kCellBlocks; ++block) {
          const Words4 theirs = load_shared(parts + from * (S::kOwnWarps * S::kPartBytes) + block * 512);
          mine[block * 4] += __uint_as_float(theirs.x), mine[block * 4 + 1] += __uint_as_float(theirs.y);
          mine[block * 4 + 2] += __uint_as_float(theirs.z), mine[block * 4 + 3] += __uint_as_float(theirs.w);
        }
      u32 loaded = 0;
#pragma unroll
      for (int i = 0; i < S::kCellBlocks * 4; ++i) loaded = max(loaded, __float_as_uint(mine[i]));
      __syncwarp();
      if (lane < S::kCluster) mbarrier_arrive_peer(peer_address(read, lane), loaded);
      cells.finish(step, tile, products, given, mine);
      __syncwarp();
      if (!S::kAhead) fetch_next();
    }
}

template <typename S, typename Cell, typename T>
__device__ __forceinline__ void run(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = persistent::part_of<S>(p);
  const int rank = blockIdx.x % S::kCluster;
  const int chunks = (p.hidden + kChunkDepth - 1) / kChunkDepth, all = S::chunks_of(chunks, rank);
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  const wide::Ring<S> ring(p.ring, part, gridDim.x / part.peers * p.tiles, chunks);
  wide::prepare_rings<S, kThreads>(shared);
  if (threadIdx.x == 0) {
    const u32 base = shared_address(shared);
    for (int i = 0; i < S::kRooms; ++i) mbarrier_init(base + S::kPartsFull + i * 8, 1 + S::kOwnWarps);
    for (int i = 0; i < S::kRooms * S::kCluster; ++i) mbarrier_init(base + S::kPartsRead + i * 8, kCellWarps);
    for (int i = 0; i < 2; ++i) mbarrier_init(base + S::kSeen + i * 8, 1);
    for (int i = 0; i < kProductWarps + kGroupWarps; ++i) store_shared4(base + S::kMultiplied + i * 4, 0);
    fence_mbarrier_init();
  }
  if constexpr (S::kSharedChunks > 0)
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group)
      wide::fill_shared_weights<S, kThreads>(p, part.head, part.first_unit - rank * S::kColumns + group * kRows,
                                             rank, shared + S::kWeightOffset + group * S::kGroupWeightBytes);
  fence_async_shared();
  __syncthreads();
  cluster_barrier();  // before anything comes from a peer
  const int warp = uniform(threadIdx.x / 32);
  if (warp < kProductWarps) {
    take_registers<S::kProductRegisters>();
    run_products<S>(p, ring, shared, part, rank, all, products);
  } else if (warp < kProductWarps + kCellWarps) {
    give_registers<S::kCellRegisters>();
    run_cells<S, Cell>(p, ring, shared, part, rank, products);
  } else {
    give_registers<S::kOtherRegisters>();
    const int loader = warp - kProductWarps - kCellWarps;
    if (loader < wide::kLoaders)
      wide::run_loader<S>(ring, shared, part, rank, 0, loader, all, products);
    else if (loader == wide::kLoaders)
      wide::run_wiper<S>(ring, shared, part, products);
  }
  __syncwarp();
  cluster_barrier();  // nobody leaves while a peer may still push to it
}

}  // namespace split

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kCluster,
          int kRooms>
__global__ void __launch_bounds__(split::kThreads, 1)
    split_forward(const T* pre, const T* weight, const T*, const T* h0, const T*, const u8* reset, T* h, T* saved, T*,
                  T*, char* ring, int steps, int batch, int hidden, int pitch, int tiles) {
  wide::Problem<T> p{};
  p.input = pre, p.weight = weight, p.initial = h0, p.reset = reset, p.output = h, p.saved = saved;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  split::run<split::Shape<Cell, false, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kCluster, kRooms>, Cell>(p);
}

template <typename T, typename Cell, int kRegisterChunks, int kSharedChunks, int kBlocks, int kSlots, int kCluster,
          int kRooms>
__global__ void __launch_bounds__(split::kThreads, 1)
    split_backward(const T* dh, const T* weight, const T* dh_last, T*, const u8* reset, T* saved, const T*, T*, T* dpre,
                   T*, T* dh0, T*, char* ring, int steps, int batch, int hidden, int pitch, int tiles) {
  wide::Problem<T> p{};
  p.input = dh, p.weight = weight, p.last_gradient = dh_last, p.reset = reset, p.output = dpre, p.saved = saved;
  p.initial_gradient = dh0;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  split::run<split::Shape<Cell, true, kRegisterChunks, kSharedChunks, kBlocks, kSlots, kCluster, kRooms>, Cell>(p);
}
