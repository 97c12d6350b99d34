// The product warps: W in registers and shared memory, the state of a tile from the exchange, partial sums out.
#pragma once

#include "persistent_layout.cuh"

namespace persistent {

// Eight consecutive k of one row of the stationary operand, zero outside the matrix.
template <typename S, typename T, typename M>
__device__ __forceinline__ Words4 load_weight(const Problem<T, M>& p, const Part& part, int row, int k) {
  const int product = row / S::kColumns, unit = part.first_unit + row % S::kColumns;
  if (product >= S::kOut || unit >= p.hidden || k >= S::kIn * p.hidden) return {0, 0, 0, 0};
  // Row `unit` of a product's matrix for this head.
  auto at = [&](int product, int unit) {
    return p.weight + (static_cast<size_t>(product) * p.pitch + part.head * p.hidden + unit) * p.hidden;
  };
  if constexpr (!S::kBackward) {
    return *reinterpret_cast<const Words4*>(at(product, unit) + k);
  } else {
    u32 word[4];
    const int from = S::kIn == 1 ? 0 : k / p.hidden;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* pair = at(from, k - from * p.hidden + 2 * i) + unit;
      word[i] = pair[0].bits | static_cast<u32>(pair[p.hidden].bits) << 16;
    }
    return {word[0], word[1], word[2], word[3]};
  }
}

// The two mma of one unit of depth. A lane holds eight consecutive k of a row; the hardware's order of k within a
// fragment is arbitrary as long as both operands follow the same one, so no shuffle and no ldmatrix is needed.
template <typename T>
__device__ __forceinline__ void multiply(float (&first)[4], float (&second)[4], const Words4& top, const Words4& bottom,
                                         const Words4& state) {
  T::mma(first, {top.x, bottom.x, top.y, bottom.y}, state.x, state.y);
  T::mma(second, {top.z, bottom.z, top.w, bottom.w}, state.z, state.w);
}

// One product of every step: a CTA's rows of a matrix, on chip for the whole launch, times the state of a tile. The
// eight warps split the depth, and those who take the sums wait at kSumsFull + kBarriers.
template <typename S, int kBarriers = 0>
struct Product {
  static constexpr int kRegisterUnits = S::kRegisterUnits;
  Words4 top[kRegisterUnits][S::kRowTiles], bottom[kRegisterUnits][S::kRowTiles];
  const Words4* blocks;
  float* sums;
  int phase;

  // `load` gives eight consecutive k of a row. Sums and weights lie in `shared` as S says.
  template <typename Load>
  __device__ __forceinline__ Product(char* shared, const Load& load) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Words4* own = reinterpret_cast<Words4*>(shared + S::kWeightOffset) + warp * S::kSharedUnits * S::kRowTiles * 64 + lane;
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u)
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        const int row = m * 16 + lane_row(), k = lane_depth() + u * kDepthStride;
        const Words4 a = load(row, k), b = load(row + 8, k);
        if (u < kRegisterUnits) {
          top[u % kRegisterUnits][m] = a, bottom[u % kRegisterUnits][m] = b;
        } else {
          Words4* block = own + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
          block[0] = a, block[32] = b;
        }
      }
    blocks = own, phase = 0;
    sums = reinterpret_cast<float*>(shared) + warp * S::kPartSums + (lane & 3) * 2 * S::kSumPitch + lane_row();
  }

  template <typename T, typename Exchange>
  __device__ __forceinline__ void run(Exchange& exchange, int step, int tile) {
    exchange.await(step, tile);
    float sum[S::kChains][S::kBlocks][S::kRowTiles][4] = {};
#pragma unroll
    for (int first = 0; first < S::kUnits; first += S::kGroup) {
      Words4 state[S::kGroup][S::kBlocks];
      if (first + S::kGroup <= S::kUnits) {
        exchange.receive(first, state);
      } else {
        Words4 rest[S::kUnits % S::kGroup + (S::kUnits % S::kGroup == 0)][S::kBlocks];
        exchange.receive(first, rest);
#pragma unroll
        for (int i = 0; i < S::kUnits % S::kGroup; ++i)
#pragma unroll
          for (int n = 0; n < S::kBlocks; ++n) state[i][n] = rest[i][n];
      }
#pragma unroll
      for (int u = first; u < first + S::kGroup && u < S::kUnits; ++u)
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          Words4 a, b;
          if (u < kRegisterUnits) {
            a = top[u % kRegisterUnits][m], b = bottom[u % kRegisterUnits][m];
          } else {
            const Words4* block = blocks + ((u - kRegisterUnits) * S::kRowTiles + m) * 64;
            a = block[0], b = block[32];
          }
#pragma unroll
          for (int n = 0; n < S::kBlocks; ++n)
            multiply<T>(sum[2 * u % S::kChains][n][m], sum[(2 * u + 1) % S::kChains][n][m], a, b, state[u - first][n]);
        }
    }
#pragma unroll
    for (int chain = 1; chain < S::kChains; ++chain)
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n)
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[0][n][m][i] += sum[chain][n][m][i];

    const int buffer = S::buffer_of(phase, tile);
    if (S::buffer_used(phase, step, tile)) barrier_sync(kSumsEmpty + kBarriers + buffer, S::kSumsThreads);
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n)
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        float* at = sums + buffer * S::kBufferSums + n * kBlockRows * S::kSumPitch + m * 16;
        at[0] = sum[0][n][m][0], at[S::kSumPitch] = sum[0][n][m][1];
        at[8] = sum[0][n][m][2], at[S::kSumPitch + 8] = sum[0][n][m][3];
      }
    barrier_arrive(kSumsFull + kBarriers + buffer, S::kSumsThreads);
    ++phase;
  }

  // Waits until the last sums have been taken.
  __device__ __forceinline__ void close(int tiles) const {
    if constexpr (S::kMemory) {
      for (int last = 0; last < min(2, tiles); ++last) barrier_sync(kSumsEmpty + kBarriers + last, S::kSumsThreads);
    } else {
      for (int last = max(phase - 2, 0); last < phase; ++last)
        barrier_sync(kSumsEmpty + kBarriers + (last & 1), S::kSumsThreads);
    }
  }
};

template <typename S, typename T, typename M, typename Exchange>
__device__ __forceinline__ void run_products(const Problem<T, M>& p, Exchange& exchange, char* shared, const Part& part,
                                             int products) {
  Product<S> product(shared, [&](int row, int k) { return load_weight<S>(p, part, row, k); });
  exchange.start();
  for (int step = 0; step < products; ++step)
    for (int tile = 0; tile < part.tiles; ++tile) product.template run<T>(exchange, step, tile);
  product.close(part.tiles);
}

}  // namespace persistent
