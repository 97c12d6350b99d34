// How the CTAs of a group hand each other the state of a step: through L2, or through a cluster's shared memory.
//
// All have the same face. Cell threads `publish` eight bytes of the state of step s and `wipe` what is used up; product
// warps `await` a tile and then `receive` its fragments, some units of depth at a time. Step 0 is the initial state; rows count from the group's first
// row; k runs over the values that a row publishes. A tile is kBlocks blocks of eight rows, one block being the narrow
// side of an mma.
#pragma once

#include "primitives.cuh"

namespace persistent {

constexpr int kBlockRows = 8;   // batch rows of a block: the n of mma.m16n8k16
constexpr int kUnitDepth = 32;  // k of a unit of work: 16 bytes a lane, two mma deep
constexpr int kProductWarps = 8;
constexpr int kDepthStride = kProductWarps * kUnitDepth;  // units of depth are dealt to the warps in turn
constexpr u32 kSpinLimit = 1u << 23;  // polls of about 0.3 us before a wait counts as a bug and ends the kernel

// What a CTA works on.
struct Part {
  int head;                    // its units see no others
  int first_row, rows, tiles;  // batch rows of the group, in row tiles
  int first_slot;              // of the group's rows in the workspace, where all groups lie one after another
  int first_unit;              // of the CTA's hidden units, within the head
  int peers;                   // CTAs of the group
};

// Where a lane of a product warp stands in a fragment of the state.
__device__ __forceinline__ int lane_row() { return (threadIdx.x & 31) >> 2; }
__device__ __forceinline__ int lane_depth() { return (threadIdx.x >> 5) * kUnitDepth + (threadIdx.x & 3) * 8; }

// The state lies as the product warps read it: blocks of eight rows by one unit of depth, 64 bytes a row. A warp's
// fragment is then 512 contiguous bytes; row by row it would be eight half-used cache lines, at half the speed.
constexpr int kUnitBytes = kBlockRows * kUnitDepth * 2;

__device__ __forceinline__ int units_of(int depth) { return (depth + kUnitDepth - 1) / kUnitDepth; }
__device__ __forceinline__ u32 place(int row, int k, int units) {
  return (row / kBlockRows * units + k / kUnitDepth) * kUnitBytes + row % kBlockRows * (kUnitDepth * 2) +
         k % kUnitDepth * 2;
}

// A ring of slots in global memory in which the data is its own flag: a slot holds a bit pattern that no published
// value has until the value arrives, and readers poll the very words they need. This saves the fence and the second
// trip to L2 that a flag costs. Every row of every tile is published, whether the batch has it or not, so that readers
// need not ask.
template <typename T, int kUnits, int kBlocks>
struct RingSlots {
  static constexpr int kSlots = 8;
  static constexpr u32 kEmpty = 0xffffffffu;  // two NaNs that cvt.rn never returns: its NaN is 0x7fff
  static constexpr bool kWipes = true;

  char* slots;  // kSlots x (all rows x units of depth), every byte 0xff before the launch; under 4 GB
  u32 slot_bytes, awaited;
  int units;
  bool last_inside;  // is the last unit of this lane inside the depth? All others are.

  __device__ RingSlots(char* ring, const Part& part, int all_rows, int depth) {
    units = units_of(depth);
    slot_bytes = place(all_rows, 0, units);
    slots = ring + place(part.first_slot, 0, units);
    last_inside = lane_depth() + (kUnits - 1) * kDepthStride < depth;
  }
  __device__ void open() {}
  __device__ void close() {}

  __device__ u32 at(int step, int row, int k) const {
    return static_cast<u32>(step) % kSlots * slot_bytes + place(row, k, units);
  }
  __device__ void publish(int step, int row, int k, const Words2& words, bool inside) const {
    if (inside) store_strong(slots + at(step, row, k), words);
  }

  // When this CTA has received a tile of step s, every CTA of the group has finished with that tile of step s - 1. The
  // caller must see to it that a fence follows the wipe before this CTA publishes step s - 1 + kSlots - 1.
  __device__ void wipe(int step, int row, int k) const {
    store_strong(slots + at(step, row, k), {kEmpty, kEmpty});
  }

  __device__ u32 source(int step, int tile) const {
    return at(step, tile * kBlocks * kBlockRows, 0) + threadIdx.x * 16;
  }
  __device__ bool inside(int u) const { return u < kUnits - 1 || last_inside; }
  __device__ const char* word(u32 from, int u, int n) const {
    return slots + from + n * units * kUnitBytes + u * (kProductWarps * kUnitBytes);
  }
  static __device__ bool stale(const Words4& words) { return max(words.x, words.z) == kEmpty; }
};

// For a group of one tile, which waits for every step: poll straight into the fragments. All that a lane still lacks is
// asked for again together, since a retry is a round trip to L2.
template <typename T, int kUnits, int kBlocks>
struct PolledRing : RingSlots<T, kUnits, kBlocks> {
  using Base = RingSlots<T, kUnits, kBlocks>;
  Words4 state[kUnits][kBlocks];

  __device__ PolledRing(char* ring, char*, const Part& part, int all_rows, int depth)
      : Base(ring, part, all_rows, depth) {}

  __device__ void start() {}
  __device__ void await(int step, int tile) {
    ask(step, tile);
    settle();
  }
  // The two halves of it: what is asked for early is on its way while other things are done.
  __device__ void ask(int step, int tile) {
    this->awaited = this->source(step, tile);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
        state[u][n] = this->inside(u) ? load_strong(this->word(this->awaited, u, n)) : Words4{0, 0, 0, 0};
  }
  __device__ void settle() {
    for (u32 polls = 0;; ++polls) {
      u32 most = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) most = max(most, max(state[u][n].x, state[u][n].z));
      if (most != Base::kEmpty) break;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
          if (Base::stale(state[u][n])) state[u][n] = load_strong(this->word(this->awaited, u, n));
      if (polls > kSpinLimit) __trap();
    }
    __syncwarp();
  }
  template <int kCount>
  __device__ void receive(int first, Words4 (&fragments)[kCount][kBlocks]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) fragments[i][n] = state[first + i][n];
  }
};

// For groups of several tiles: every lane copies the fragments it will need into shared memory, kStages - 1 tiles
// ahead, so that no register and no scoreboard waits for them. The copies are weak accesses, which L2 serves as well
// (cp.async.cg skips L1); what one finds too early is polled for with strong loads.
template <typename T, int kUnits, int kBlocks, int kStages>
struct StagedRing : RingSlots<T, kUnits, kBlocks> {
  using Base = RingSlots<T, kUnits, kBlocks>;
  u32 stages, stage;
  int tiles, ahead_step, ahead_tile, write, read;

  __device__ StagedRing(char* ring, char* shared, const Part& part, int all_rows, int depth)
      : Base(ring, part, all_rows, depth) {
    stages = shared_address(shared) + threadIdx.x * 16;
    tiles = part.tiles, ahead_step = ahead_tile = write = read = 0;
  }

  __device__ u32 slot(u32 stage_base, int u, int n) const {
    return stage_base + (u * kBlocks + n) * (kProductWarps * kUnitBytes);
  }
  __device__ u32 stage_at(int index) const { return stages + index * (kUnits * kBlocks * kProductWarps * kUnitBytes); }

  // Past the last step this copies what nobody reads, from a slot that exists.
  __device__ void copy_ahead() {
    const u32 from = this->source(ahead_step, ahead_tile), to = stage_at(write);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
        if (this->inside(u)) copy_async16(slot(to, u, n), this->word(from, u, n));
    commit_copies();
    if (++ahead_tile == tiles) ahead_tile = 0, ++ahead_step;
    if (++write == kStages) write = 0;
  }
  __device__ void start() {
    // A unit outside the depth is never copied: zero once and for all.
    if (!this->last_inside)
      for (int i = 0; i < kStages; ++i)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) store_shared(slot(stage_at(i), kUnits - 1, n), {0, 0, 0, 0});
    for (int i = 0; i < kStages - 1; ++i) copy_ahead();
  }
  __device__ void await(int step, int tile) {
    wait_copies<kStages - 2>();
    this->awaited = this->source(step, tile);
    stage = stage_at(read);
    if (++read == kStages) read = 0;
    copy_ahead();
  }
  template <int kCount>
  __device__ void receive(int first, Words4 (&fragments)[kCount][kBlocks]) const {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        fragments[i][n] = load_shared(slot(stage, first + i, n));
        most = max(most, max(fragments[i][n].x, fragments[i][n].z));
      }
    for (u32 polls = 0; most == Base::kEmpty; ++polls) {
      most = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          if (Base::stale(fragments[i][n])) fragments[i][n] = load_strong(this->word(this->awaited, first + i, n));
          most = max(most, max(fragments[i][n].x, fragments[i][n].z));
        }
      if (polls > kSpinLimit) __trap();
    }
    __syncwarp();
  }
};

template <typename T, int kUnits, int kBlocks>
using StagedRing2 = StagedRing<T, kUnits, kBlocks, 2>;
template <typename T, int kUnits, int kBlocks>
using StagedRing3 = StagedRing<T, kUnits, kBlocks, 3>;

// The group is one cluster: publishing pushes into the shared memory of every CTA, and an mbarrier a tile counts the
// bytes. Two buffers are enough: a CTA publishes step s + 1 only after it has received step s whole, which its peers
// published after they had read step s - 1. Fastest while a step brings a CTA some 16 KB at most.
template <typename T, int kUnits, int kBlocks>
struct ClusterPush {
  static constexpr bool kWipes = false;

  u32 buffers, barriers, awaited;
  int tiles, units, peers, bytes_of_tile;
  bool last_inside;

  __device__ ClusterPush(char*, char* shared, const Part& part, int, int depth) {
    tiles = part.tiles, peers = part.peers, units = units_of(depth);
    bytes_of_tile = kBlocks * kBlockRows * depth * sizeof(T);
    barriers = shared_address(shared);
    buffers = barriers + (16 * tiles + 127) / 128 * 128;
    last_inside = lane_depth() + (kUnits - 1) * kDepthStride < depth;
  }
  __device__ void open() const {
    if (threadIdx.x < 2 * tiles) mbarrier_init(barriers + threadIdx.x * 8);
    cluster_barrier();
  }
  // Nobody leaves while a peer may still push to it.
  __device__ void close() const { cluster_barrier(); }

  __device__ u32 barrier(int step, int tile) const { return barriers + ((step & 1) * tiles + tile) * 8; }
  __device__ u32 at(int step, int row, int k) const {
    return buffers + place((step & 1) * tiles * kBlocks * kBlockRows + row, k, units);
  }
  // Two neighbouring lanes hold sixteen bytes together: one serves the even peers, the other the odd ones.
  __device__ void publish(int step, int row, int k, const Words2& words, bool inside) const {
    const bool odd = threadIdx.x & 1;
    const u32 x = __shfl_xor_sync(~0u, words.x, 1), y = __shfl_xor_sync(~0u, words.y, 1);
    const Words4 both = odd ? Words4{x, y, words.x, words.y} : Words4{words.x, words.y, x, y};
    if (!inside) return;
    const u32 to = at(step, row, k - (odd ? 4 : 0)), count = barrier(step, row / (kBlocks * kBlockRows));
    for (int peer = odd; peer < peers; peer += 2) push(peer_address(to, peer), both, peer_address(count, peer));
  }
  __device__ void wipe(int, int, int) const {}

  __device__ void start() const {}
  __device__ void await(int step, int tile) {
    const u32 count = barrier(step, tile);
    if (threadIdx.x == 0) mbarrier_expect(count, bytes_of_tile);
    for (u32 polls = 0; !mbarrier_done(count, step >> 1 & 1); ++polls)
      if (polls > kSpinLimit) __trap();
    awaited = at(step, tile * kBlocks * kBlockRows, 0) + threadIdx.x * 16;
  }
  template <int kCount>
  __device__ void receive(int first, Words4 (&fragments)[kCount][kBlocks]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
        fragments[i][n] = first + i < kUnits - 1 || last_inside
                              ? load_shared(awaited + n * units * kUnitBytes + (first + i) * (kProductWarps * kUnitBytes))
                              : Words4{0, 0, 0, 0};
  }
};

}  // namespace persistent
