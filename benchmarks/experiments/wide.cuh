// The recurrence for large batches on Hopper: the loop, cells and sums of persistent.cuh around wgmma products.
//
// A CTA owns 64 rows of W, one wgmma tall, and its two product warp groups split the depth K. W is the register operand
// (what does not fit comes from shared memory), the batch tile the shared one. wgmma runs beside the warps that issued
// it, so while a tile is multiplied the next one is copied in and checked; two tiles of the batch are always on the way.
#pragma once

#include "persistent.cuh"

namespace persistent {

constexpr int kChunkBytes = 128;  // a core matrix of wgmma: eight rows of eight values
constexpr int kStepChunks = 2;    // of one wgmma, sixteen deep
constexpr int kGroupThreads = 128;
constexpr int kTileReady = 6;  // two named barriers, one a product warp group

// kRegisterSteps + kSharedSteps wgmma deep a warp group, against tiles of 8 x kBlocks batch rows.
template <typename Cell, bool kBackward, int kRegisterSteps_, int kSharedSteps_, int kBlocks_>
struct WideShape : Layout<Cell, kBackward, 64, kBlocks_ * kBlockRows, (kBlocks_ < 2 ? 1 : 2) * kBlockRows, 2,
                          2 * kSharedSteps_ * 2048> {
  static constexpr int kRegisterSteps = kRegisterSteps_, kSharedSteps = kSharedSteps_, kBlocks = kBlocks_;
  static constexpr int kSteps = kRegisterSteps + kSharedSteps;
  static constexpr int kProductRegisters = 208, kOtherRegisters = 48;
};

// The ring of exchange.cuh with the state laid out as wgmma reads it: core matrices, those of eight batch rows in a row.
// A warp group copies its half of the depth of a tile into shared memory, every thread checking what it copied.
template <typename T, typename S, int kStages>
struct WideRing {
  static constexpr int kSlots = 8;
  static constexpr u32 kEmpty = 0xffffffffu;
  static constexpr bool kWipes = true;
  static constexpr int kChunks = S::kSteps * kStepChunks;  // of a warp group's half
  static constexpr int kPieces = kChunks * kChunkBytes / 16;
  static constexpr int kThreadPieces = (kPieces + kGroupThreads - 1) / kGroupThreads;
  static constexpr int kBlockBytes = kChunks * kChunkBytes;
  static constexpr int kStageBytes = 2 * S::kBlocks * kBlockBytes;

  char* slots;
  u32 slot_bytes, stages;
  int chunks, tiles, pieces;  // chunks of a whole row; 16-byte pieces of this group's half that lie inside the depth
  int ahead_step, ahead_tile, write;

  __device__ WideRing(char* ring, char* shared, const Part& part, int all_rows, int depth) {
    chunks = depth / 8;
    slot_bytes = place(all_rows, 0);
    slots = ring + place(part.first_row, 0);
    const int group = threadIdx.x / kGroupThreads;
    stages = shared_address(shared) + group * (S::kBlocks * kBlockBytes);
    pieces = max(0, min(kPieces, (chunks - group * kChunks) * (kChunkBytes / 16)));
    tiles = part.tiles, ahead_step = ahead_tile = write = 0;
  }
  __device__ void open() {}
  __device__ void close() {}

  __device__ u32 place(int row, int k) const {
    return (row / kBlockRows * chunks + k / 8) * kChunkBytes + row % kBlockRows * 16 + k % 8 * 2;
  }
  __device__ u32 at(int step, int row, int k) const {
    return static_cast<u32>(step) % kSlots * slot_bytes + place(row, k);
  }
  __device__ void publish(int step, int row, int k, const Words2& words, bool inside) const {
    if (inside) store_strong(slots + at(step, row, k), words);
  }
  __device__ void wipe(int step, int row, int k) const {
    store_strong(slots + at(step, row, k), {kEmpty, kEmpty});
  }

  __device__ const char* source(int step, int tile) const {
    return slots + at(step, tile * S::kTileRows, threadIdx.x / kGroupThreads * kChunks * 8) +
           threadIdx.x % kGroupThreads * 16;
  }
  __device__ u32 stage(int index) const { return stages + index * kStageBytes; }
  __device__ bool holds(int i) const { return threadIdx.x % kGroupThreads + i * kGroupThreads < pieces; }

  template <typename Visit>
  __device__ void each_piece(Visit visit) const {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < kThreadPieces; ++i)
        if (holds(i)) visit(n * chunks * kChunkBytes + i * kGroupThreads * 16, n * kBlockBytes + i * kGroupThreads * 16);
  }

  // Past the last step this copies what nobody reads, from a slot that exists.
  __device__ void copy_ahead() {
    const char* from = source(ahead_step, ahead_tile);
    const u32 to = stage(write) + threadIdx.x % kGroupThreads * 16;
    each_piece([&](int there, int here) { copy_async16(to + here, from + there); });
    commit_copies();
    if (++ahead_tile == tiles) ahead_tile = 0, ++ahead_step;
    if (++write == kStages) write = 0;
  }
  __device__ void start() {
    // What lies outside the depth is never copied, and zero times anything but NaN is zero: clear it once.
    for (u32 i = threadIdx.x % kGroupThreads * 16; i < S::kBlocks * kBlockBytes; i += kGroupThreads * 16)
      for (int s = 0; s < kStages; ++s) store_shared(stage(s) + i, {0, 0, 0, 0});
    barrier_sync(kTileReady + threadIdx.x / kGroupThreads, kGroupThreads);
    for (int i = 0; i < kStages - 1; ++i) copy_ahead();
  }
  // Waits until the tile's copies are here and none of them was too early.
  __device__ void check(int step, int tile, int index) const {
    const char* from = source(step, tile);
    const u32 to = stage(index) + threadIdx.x % kGroupThreads * 16;
    u32 most = 0;
    each_piece([&](int, int here) {
      const Words4 words = load_shared(to + here);
      most = max(most, max(words.x, words.z));
    });
    for (u32 polls = 0; most == kEmpty; ++polls) {
      most = 0;
      each_piece([&](int there, int here) {
        const Words4 words = load_strong(from + there);
        store_shared(to + here, words);
        most = max(most, max(words.x, words.z));
      });
      if (polls > kSpinLimit) __trap();
    }
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

// A shared operand of core matrices, no swizzle: strides in bytes along the depth and along the rows.
__device__ __forceinline__ u64 matrix(u32 address, u32 depth_stride, u32 row_stride) {
  return (address & 0x3ffff) >> 4 | static_cast<u64>(depth_stride >> 4) << 16 | static_cast<u64>(row_stride >> 4) << 32;
}

template <typename S, typename T, typename Exchange, int kStages>
__device__ __forceinline__ void run_wide_products(const Problem<T>& p, Exchange& exchange, char* shared,
                                                  const Part& part, int products) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / kGroupThreads;
  const int row = warp * 16 + lane / 4, k0 = group * S::kSteps * 16 + lane % 4 * 2;

  u32 weights[S::kRegisterSteps][4];
#pragma unroll
  for (int s = 0; s < S::kRegisterSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[s][i] = load_weight_pair<S>(p, row + i % 2 * 8, k0 + s * 16 + i / 2 * 8, part.first_unit);
  char* block = shared + S::kWeightOffset + group * S::kSharedSteps * 2048;
#pragma unroll 1
  for (int s = 0; s < S::kSharedSteps; ++s)
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, chunk = i / 2;
      const u32 pair = load_weight_pair<S>(p, r, k0 + (S::kRegisterSteps + s) * 16 + chunk * 8, part.first_unit);
      *reinterpret_cast<u32*>(block + s * 2048 + chunk * 1024 + r / 8 * kChunkBytes + r % 8 * 16 + lane % 4 * 4) = pair;
    }

  const int ready = kTileReady + group;
  exchange.start();
  wait_copies<kStages - 2>();
  exchange.check(0, 0, 0);
  fence_async_shared();
  barrier_sync(ready, kGroupThreads);

  u64 shared_weights = matrix(shared_address(block), 1024, kChunkBytes);
  float* sums = reinterpret_cast<float*>(shared) + group * S::kPartSums + (lane & 3) * 2 * S::kSumPitch + row;
  int phase = 0, read = 0;
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile, ++phase) {
      const u64 state = matrix(exchange.stage(read), kChunkBytes, Exchange::kBlockBytes);
      float sum[S::kBlocks * 4];
      // Or the compiler would keep every one of its multiples in registers.
      asm volatile("" : "+l"(shared_weights));
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < S::kRegisterSteps; ++s)
        T::wgmma(sum, weights[s], state + s * (kStepChunks * kChunkBytes >> 4), s > 0);
#pragma unroll
      for (int s = 0; s < S::kSharedSteps; ++s)
        T::wgmma(sum, shared_weights + s * (2048 >> 4),
                 state + (S::kRegisterSteps + s) * (kStepChunks * kChunkBytes >> 4));
      wgmma_commit();

      if (++read == kStages) read = 0;
      const bool last_tile = tile + 1 == part.tiles;
      auto take_next = [&]() {
        exchange.copy_ahead();
        wait_copies<kStages - 2>();
        if (!last_tile || step + 1 < products) exchange.check(step + last_tile, last_tile ? 0 : tile + 1, read);
        fence_async_shared();
      };
      // A single tile's next state comes from this one's sums, so there it has to wait for them.
      if (part.tiles > 1) take_next();

      const int buffer = phase & 1;
      if (phase >= 2) barrier_sync(kSumsEmpty + buffer, S::kSumsThreads);
      wgmma_wait(sum);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        float* at = sums + buffer * S::kBufferSums + n * kBlockRows * S::kSumPitch;
        at[0] = sum[n * 4], at[S::kSumPitch] = sum[n * 4 + 1];
        at[8] = sum[n * 4 + 2], at[S::kSumPitch + 8] = sum[n * 4 + 3];
      }
      barrier_arrive(kSumsFull + buffer, S::kSumsThreads);
      if (part.tiles == 1) take_next();
      barrier_sync(ready, kGroupThreads);
    }
  for (int last = max(phase - 2, 0); last < phase; ++last) barrier_sync(kSumsEmpty + (last & 1), S::kSumsThreads);
}

template <typename S, typename Cell, typename T, int kStages>
__device__ __forceinline__ void run_wide(const Problem<T>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = part_of<S>(p);
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);
  using Exchange = WideRing<T, S, kStages>;
  Exchange exchange(p.ring, shared + S::kExchangeOffset, part, gridDim.x / part.peers * p.tiles * S::kTileRows,
                    S::kIn * p.hidden);
  if (threadIdx.x < kProductThreads) {
    take_registers<S::kProductRegisters>();
    run_wide_products<S, T, Exchange, kStages>(p, exchange, shared, part, products);
  } else {
    give_registers<S::kOtherRegisters>();
    if (threadIdx.x < S::kSumsThreads)
      run_cells<S, Cell>(p, exchange, shared, part, products);
    else if (S::kSpareWarp && threadIdx.x / 32 == kLastWarp)
      run_fences<S, Exchange>(products);
  }
}

}  // namespace persistent

template <typename T, typename Cell, int kRegisterSteps, int kSharedSteps, int kBlocks, int kStages>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    wide_forward(const T* pre, const T* weight, const T* h0, const u8* reset, T* h, T* v, char* ring, int steps,
                 int batch, int hidden, int tiles) {
  using S = persistent::WideShape<Cell, false, kRegisterSteps, kSharedSteps, kBlocks>;
  persistent::run_wide<S, Cell, T, kStages>({pre, weight, h0, nullptr, reset, h, v, nullptr, ring, steps, batch, hidden, tiles});
}

template <typename T, typename Cell, int kRegisterSteps, int kSharedSteps, int kBlocks, int kStages>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    wide_backward(const T* dh, const T* weight, const T* dh_last, const u8* reset, T* v, T* dpre, T* dh0, char* ring,
                  int steps, int batch, int hidden, int tiles) {
  using S = persistent::WideShape<Cell, true, kRegisterSteps, kSharedSteps, kBlocks>;
  persistent::run_wide<S, Cell, T, kStages>({dh, weight, nullptr, dh_last, reset, dpre, v, dh0, ring, steps, batch, hidden, tiles});
}
