// The norm of a sum, n = s r w with s = x + y and r = (mean s² + ε)^-½, forward and backward, each tensor read and
// written once. The stream x is float, the branch y and the result n are of T. Tensors are (rows, width), contiguous.
// A block owns whole rows, every gridDim.x-th of them; a thread owns the same columns of each, kPacks packs of four.
// What is null is not there, or not wanted. The width is a multiple of four and at most 4 kPacks blockDim.x.
#pragma once

#include "steps.cuh"

constexpr int kNormThreads = 512;
constexpr int kNormPack = 4;

// The sum over the block, in the same order in every thread. Calls alternate between the two halves of `partial`, so
// that one barrier a call is enough: nobody writes a half again before all have passed the next call's.
__device__ __forceinline__ float block_sum(float x, float (&partial)[kNormThreads / 32]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  return sum;
}

__device__ __forceinline__ long long norm_column(int pack) {
  return (static_cast<long long>(pack) * blockDim.x + threadIdx.x) * kNormPack;
}

template <class T, int kPacks>
__global__ void __launch_bounds__(kNormThreads)
    norm_forward(const float* __restrict__ x, const T* __restrict__ y, const float* __restrict__ weight,
                 float* __restrict__ s, T* __restrict__ n, float* __restrict__ r, double epsilon, long long rows,
                 long long width) {
  __shared__ float partial[2][kNormThreads / 32];
  Pack<float, kNormPack> w[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (norm_column(p) < width) w[p] = load<kNormPack>(weight, norm_column(p));
  }
  int half = 0;
  for (long long row = blockIdx.x; row < rows; row += gridDim.x, half ^= 1) {
    Pack<float, kNormPack> sum[kPacks];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const long long index = row * width + norm_column(p);
      if (norm_column(p) >= width) continue;
      sum[p] = load<kNormPack>(x, index);
      if (y != nullptr) {
        const auto branch = load<kNormPack>(y, index);
#pragma unroll
        for (int i = 0; i < kNormPack; ++i) sum[p].at[i] += to_real(branch.at[i]);
      }
      if (s != nullptr) store<kNormPack>(s, index, sum[p]);
#pragma unroll
      for (int i = 0; i < kNormPack; ++i) squares += sum[p].at[i] * sum[p].at[i];
    }
    const float scale = rsqrtf(block_sum(squares, partial[half]) / width + static_cast<float>(epsilon));
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (norm_column(p) >= width) continue;
      Pack<T, kNormPack> result;
#pragma unroll
      for (int i = 0; i < kNormPack; ++i) from_real(sum[p].at[i] * scale * w[p].at[i], result.at[i]);
      store<kNormPack>(n, row * width + norm_column(p), result);
    }
    if (threadIdx.x == 0) r[row] = scale;
  }
}

// dx = ds + r (dn w − s r² mean(dn w s)), dy the same in T, and each block's part of dw = Σ dn s r, (gridDim.x, width).
template <class T, int kPacks>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward(const T* __restrict__ dn, const float* __restrict__ ds, const float* __restrict__ s,
                  const float* __restrict__ weight, const float* __restrict__ r, float* __restrict__ dx,
                  T* __restrict__ dy, float* __restrict__ dweight, long long rows, long long width) {
  __shared__ float partial[2][kNormThreads / 32];
  Pack<float, kNormPack> w[kPacks], dw[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    dw[p] = {};
    if (norm_column(p) < width) w[p] = load<kNormPack>(weight, norm_column(p));
  }
  int half = 0;
  for (long long row = blockIdx.x; row < rows; row += gridDim.x, half ^= 1) {
    Pack<float, kNormPack> sum[kPacks], gradient[kPacks], through[kPacks];
    const float scale = r[row];
    float dot = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const long long index = row * width + norm_column(p);
      if (norm_column(p) >= width) continue;
      const auto outer = load<kNormPack>(dn, index);
      sum[p] = load<kNormPack>(s, index);
      through[p] = {};
      if (ds != nullptr) through[p] = load<kNormPack>(ds, index);
#pragma unroll
      for (int i = 0; i < kNormPack; ++i) {
        const float d = to_real(outer.at[i]);
        gradient[p].at[i] = d * w[p].at[i];
        dot += gradient[p].at[i] * sum[p].at[i];
        dw[p].at[i] += d * sum[p].at[i] * scale;
      }
    }
    const float back = scale * scale * block_sum(dot, partial[half]) / width;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const long long index = row * width + norm_column(p);
      if (norm_column(p) >= width) continue;
      Pack<T, kNormPack> branch;
#pragma unroll
      for (int i = 0; i < kNormPack; ++i) {
        through[p].at[i] += scale * (gradient[p].at[i] - sum[p].at[i] * back);
        from_real(through[p].at[i], branch.at[i]);
      }
      store<kNormPack>(dx, index, through[p]);
      if (dy != nullptr) store<kNormPack>(dy, index, branch);
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (norm_column(p) < width) store<kNormPack>(dweight, blockIdx.x * width + norm_column(p), dw[p]);
  }
}
