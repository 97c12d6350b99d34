// How the CTAs of a group hand each other the state of a step: through L2, or through a cluster's shared memory.
//
// Both have the same face. Cell threads `publish` eight bytes of the state of step s and `wipe` what is used up; product
// warps `request` and `receive` the fragments of a tile. Step 0 is the initial state; rows count from the group's first
// row; k runs over the values that a row publishes.
#pragma once

#include "primitives.cuh"

namespace persistent {

constexpr int kTileRows = 8;    // batch rows of a tile: the n of mma.m16n8k16
constexpr int kUnitDepth = 32;  // k of a unit of work: 16 bytes a lane, two mma deep
constexpr int kProductWarps = 8;
constexpr int kDepthStride = kProductWarps * kUnitDepth;  // units of depth are dealt to the warps in turn
constexpr u32 kSpinLimit = 1u << 23;  // polls of about 0.3 us before a wait counts as a bug and ends the kernel

// What a CTA works on.
struct Part {
  int first_row, rows, tiles;  // batch rows of the group, in row tiles
  int first_unit;              // of the CTA's hidden units
  int peers;                   // CTAs of the group
};

// Where a lane of a product warp stands in a fragment of the state.
__device__ __forceinline__ int lane_row() { return (threadIdx.x & 31) >> 2; }
__device__ __forceinline__ int lane_depth() { return (threadIdx.x >> 5) * kUnitDepth + (threadIdx.x & 3) * 8; }

// A ring of slots in global memory in which the data is its own flag: a slot holds a bit pattern that no published
// value has until the value arrives, and readers poll the very words they need. This saves the fence and the second
// trip to L2 that a flag costs.
template <typename T, int kUnits>
struct Ring {
  static constexpr int kSlots = 8;
  static constexpr u32 kEmpty = 0xffffffffu;  // two NaNs that cvt.rn never returns: its NaN is 0x7fff
  static constexpr bool kWipes = true;

  char* slots;  // kSlots x (B, K) of T, every byte 0xff before the launch; under 4 GB
  u32 row_bytes, slot_bytes;
  int rows, valid;  // rows of the group; units of this lane inside the depth
  Words4 state[kUnits];

  __device__ Ring(char* ring, char*, const Part& part, int batch, int depth) {
    row_bytes = depth * sizeof(T);
    slot_bytes = batch * row_bytes;
    slots = ring + static_cast<size_t>(part.first_row) * row_bytes;
    rows = part.rows;
    valid = (depth - lane_depth() + kDepthStride - 1) / kDepthStride;
  }
  __device__ void open(const Part&) {}
  __device__ void close() {}

  __device__ char* at(int step, int row, int k) const {
    return slots + (static_cast<u32>(step % kSlots) * slot_bytes + row * row_bytes + k * sizeof(T));
  }
  __device__ void publish(int step, int row, int k, const Words2& words, bool inside) const {
    if (inside) store_strong(at(step, row, k), words);
  }

  // When this CTA has received a tile of step s, every CTA of the group has finished with that tile of step s - 1. The
  // caller must see to it that a fence follows the wipe before this CTA publishes step s - 1 + kSlots - 1.
  __device__ void wipe(int step, int row, int k, bool inside) const {
    if (inside) store_strong(at(step, row, k), {kEmpty, kEmpty});
  }

  __device__ const char* source(int step, int tile) const { return at(step, tile * kTileRows + lane_row(), lane_depth()); }
  __device__ bool wants(int tile, int u) const { return tile * kTileRows + lane_row() < rows && u < valid; }

  __device__ void request(const char* from, int tile, int u) {
    state[u] = wants(tile, u) ? load_strong(from + u * kDepthStride * sizeof(T)) : Words4{0, 0, 0, 0};
  }

  // All stale words of a lane are asked for again together: a retry is a round trip to L2.
  __device__ void receive(int step, int tile) {
    const char* from = source(step, tile);
    for (u32 polls = 0;; ++polls) {
      u32 most = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) most = max(most, max(state[u].x, state[u].z));
      if (most != kEmpty) break;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        if (max(state[u].x, state[u].z) == kEmpty) state[u] = load_strong(from + u * kDepthStride * sizeof(T));
      if (polls > kSpinLimit) __trap();
    }
    __syncwarp();
  }
};

// The group is one cluster: publishing pushes into the shared memory of every CTA, and an mbarrier a tile counts the
// bytes. Two buffers are enough: a CTA publishes step s + 1 only after it has received step s whole, which its peers
// published after they had read step s - 1. Fastest while a step brings a CTA some 16 KB at most.
template <typename T, int kUnits>
struct ClusterPush {
  static constexpr bool kWipes = false;

  u32 buffers, barriers;
  int rows, tiles, pitch, peers, bytes_of_row, valid;
  Words4 state[kUnits];

  // 64 bytes past a multiple of 128, so that the two rows that eight lanes read lie on different banks.
  static __device__ int pitch_of(int depth) { return (depth * static_cast<int>(sizeof(T)) + 127) / 128 * 128 + 64; }

  __device__ ClusterPush(char*, char* shared, const Part& part, int, int depth) {
    rows = part.rows, tiles = part.tiles, peers = part.peers;
    bytes_of_row = depth * sizeof(T);
    pitch = pitch_of(depth);
    barriers = shared_address(shared);
    buffers = barriers + (16 * tiles + 127) / 128 * 128;
    valid = (depth - lane_depth() + kDepthStride - 1) / kDepthStride;
  }
  __device__ void open(const Part&) const {
    if (threadIdx.x < 2 * tiles) mbarrier_init(barriers + threadIdx.x * 8);
    cluster_barrier();
  }
  // Nobody leaves while a peer may still push to it.
  __device__ void close() const { cluster_barrier(); }

  __device__ u32 barrier(int step, int tile) const { return barriers + ((step & 1) * tiles + tile) * 8; }
  __device__ u32 at(int step, int row, int k) const {
    return buffers + ((step & 1) * tiles * kTileRows + row) * pitch + k * sizeof(T);
  }
  // Two neighbouring lanes hold sixteen bytes together: one serves the even peers, the other the odd ones.
  __device__ void publish(int step, int row, int k, const Words2& words, bool inside) const {
    const bool odd = threadIdx.x & 1;
    const u32 x = __shfl_xor_sync(~0u, words.x, 1), y = __shfl_xor_sync(~0u, words.y, 1);
    const Words4 both = odd ? Words4{x, y, words.x, words.y} : Words4{words.x, words.y, x, y};
    if (!inside) return;
    const u32 to = at(step, row, k - (odd ? 4 : 0)), count = barrier(step, row / kTileRows);
    for (int peer = odd; peer < peers; peer += 2) push(peer_address(to, peer), both, peer_address(count, peer));
  }
  __device__ void wipe(int, int, int, bool) const {}

  __device__ const char* source(int, int) const { return nullptr; }
  __device__ void request(const char*, int, int) const {}
  __device__ void receive(int step, int tile) {
    const u32 count = barrier(step, tile);
    const int tile_rows = min(kTileRows, rows - tile * kTileRows);
    if (threadIdx.x == 0) mbarrier_expect(count, tile_rows * bytes_of_row);
    for (u32 polls = 0; !mbarrier_done(count, step >> 1 & 1); ++polls)
      if (polls > kSpinLimit) __trap();
    const u32 from = at(step, tile * kTileRows + lane_row(), lane_depth());
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      state[u] =
          lane_row() < tile_rows && u < valid ? load_shared(from + u * kDepthStride * sizeof(T)) : Words4{0, 0, 0, 0};
  }
};

}  // namespace persistent
