// y = softmax(x over each group) ⊙ silu(s) and its gradient, each tensor read and written once. Tensors are of T,
// contiguous and aligned to 16 bytes; a group is `size` neighbours, wherever rows begin.
//
// A warp takes tiles of some whole groups, a whole number of 16 bytes: so any size of group moves in wide words. Tiles
// come into shared memory by asynchronous copies, the next while one is worked on, and results leave from there in the
// place of what they were made of. A group belongs to kLanes lanes by turns, kValues numbers each at most, kLanes (kValues
// - 1) < size. In shared memory groups begin `pitch` numbers apart, so that they begin at different banks; where that is
// more than `size`, it holds a whole number of 16 bytes, and `inverse` is 2^20 over that number, rounded up.
#pragma once

#include "numbers.cuh"

namespace gated_softmax {

constexpr int kMostThreads = 128;
constexpr u32 kAll = 0xffffffffu;

// Where tiles lie in memory and in shared memory.
template <class T>
struct Layout {
  static constexpr int kVector = 16 / sizeof(T);
  long long numbers;  // of a tensor
  int size, tile, pitch, inverse, lane;

  __device__ __forceinline__ long long first(long long index) const { return index * tile * size; }

  __device__ __forceinline__ int count(long long index) const {
    const long long left = numbers - first(index);
    return left < tile * size ? static_cast<int>(left) : tile * size;
  }

  // Of a tile's 16 bytes number `vector`, where they lie in shared memory.
  __device__ __forceinline__ int place(int vector) const {
    return vector * kVector + (vector * inverse >> 20) * (pitch - size);
  }

  __device__ __forceinline__ void bring(const T* from, T* to, long long index) const {
    const int there = count(index), vectors = there / kVector;
    const T* const begin = from + first(index);
    const T* next = begin + lane * kVector;
#pragma unroll 1
    for (int v = lane; v < vectors; v += 32, next += 32 * kVector) copy_async16(shared_address(to + place(v)), next);
#pragma unroll 1
    for (int i = vectors * kVector + lane; i < there; i += 32) to[i] = begin[i];
  }

  __device__ __forceinline__ void take(const T* from, T* to, long long index) const {
    const int there = count(index), vectors = there / kVector;
    T* const begin = to + first(index);
    T* next = begin + lane * kVector;
#pragma unroll 1
    for (int v = lane; v < vectors; v += 32, next += 32 * kVector)
      *reinterpret_cast<Words4*>(next) = *reinterpret_cast<const Words4*>(from + place(v));
#pragma unroll 1
    for (int i = vectors * kVector + lane; i < there; i += 32) begin[i] = from[i];
  }
};

template <int kLanes>
__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAll, x, lane);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lane));
  return x;
}

// Which of a lane's numbers are the group's: all, or all but the last.
template <int kValues>
struct Inside {
  bool last;
  __device__ __forceinline__ bool operator()(int i) const { return i < kValues - 1 || last; }
};

// The softmax of a group of which this lane has x[0], x[kLanes] and so on. What is not inside is 0.
template <class Math, int kLanes, int kValues, class T>
__device__ __forceinline__ void shares(const T* x, Inside<kValues> inside, float (&share)[kValues]) {
  float most = __int_as_float(0xff800000), total = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    share[i] = __int_as_float(0xff800000);
    if (inside(i)) share[i] = to_real(x[i * kLanes]);
    most = fmaxf(most, share[i]);
  }
  most = largest<kLanes>(most);
#pragma unroll
  for (int i = 0; i < kValues; ++i) total += share[i] = Math::exp(share[i] - most);
  const float scale = Math::divide(1.0f, sum<kLanes>(total));
#pragma unroll
  for (int i = 0; i < kValues; ++i) share[i] *= scale;
}

// Calls use(inputs, inside) for every group of this warp's tiles, in place of which it leaves its results: the first
// kOutputs of the inputs, as then found, go to `outputs`. inputs[i] is this lane's first number of the group.
template <int kLanes, int kValues, int kInputs, int kOutputs, class T, class Use>
__device__ __forceinline__ void walk(const T* const (&inputs)[kInputs], T* const (&outputs)[kOutputs], long long groups,
                                     int size, int tile, int pitch, int inverse, int turns, const Use& use) {
  extern __shared__ Words4 memory[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const Layout<T> layout{groups * size, size, tile, pitch, inverse, lane};
  T* const mine = reinterpret_cast<T*>(memory) + static_cast<long long>(warp) * 2 * kInputs * tile * pitch;
  const long long tiles = (groups + tile - 1) / tile, begin = static_cast<long long>(blockIdx.x) * turns * warps;
  const long long end = min(begin + turns * warps, tiles);
  auto held = [&](int half, int input) { return mine + (half * kInputs + input) * tile * pitch; };
  auto bring = [&](long long index, int half) {
    if (index < end) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) layout.bring(inputs[i], held(half, i), index);
    }
    commit_copies();
  };
  const Inside<kValues> inside{lane % kLanes + (kValues - 1) * kLanes < size};

  long long index = begin + warp;
  bring(index, 0);
  for (int half = 0; index < end; index += warps, half ^= 1) {
    bring(index + warps, half ^ 1);
    wait_copies<1>();
    __syncwarp();
#pragma unroll 1
    for (int group = 0; group < tile; group += 32 / kLanes) {
      T* numbers[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) numbers[i] = held(half, i) + (group + lane / kLanes) * pitch + lane % kLanes;
      use(numbers, inside);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) layout.take(held(half, i), outputs[i], index);
    __syncwarp();
  }
}

}  // namespace gated_softmax

template <class T, int kLanes, int kValues>
__global__ void __launch_bounds__(gated_softmax::kMostThreads)
    gated_softmax_forward(const T* __restrict__ x, const T* __restrict__ s, T* __restrict__ y, long long groups, int size,
                          int tile, int pitch, int inverse, int turns) {
  using Math = MathOf<T>;
  auto use = [](T* const(&numbers)[2], gated_softmax::Inside<kValues> inside) {
    float share[kValues];
    gated_softmax::shares<Math, kLanes>(numbers[0], inside, share);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (!inside(i)) continue;
      const float v = to_real(numbers[1][i * kLanes]);
      from_real(share[i] * v * sigmoid<Math>(v), numbers[0][i * kLanes]);
    }
  };
  gated_softmax::walk<kLanes, kValues>({x, s}, {y}, groups, size, tile, pitch, inverse, turns, use);
}

template <class T, int kLanes, int kValues>
__global__ void __launch_bounds__(gated_softmax::kMostThreads)
    gated_softmax_backward(const T* __restrict__ x, const T* __restrict__ s, const T* __restrict__ dy, T* __restrict__ dx,
                           T* __restrict__ ds, long long groups, int size, int tile, int pitch, int inverse, int turns) {
  using Math = MathOf<T>;
  auto use = [](T* const(&numbers)[3], gated_softmax::Inside<kValues> inside) {
    float share[kValues], gradient[kValues], dot = 0;
    gated_softmax::shares<Math, kLanes>(numbers[0], inside, share);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      gradient[i] = 0;
      if (!inside(i)) continue;
      const float v = to_real(numbers[1][i * kLanes]), d = to_real(numbers[2][i * kLanes]);
      const float open = sigmoid<Math>(v), shown = v * open;
      gradient[i] = d * shown;
      dot += share[i] * gradient[i];
      from_real(d * share[i] * (open + shown * (1.0f - open)), numbers[1][i * kLanes]);
    }
    dot = gated_softmax::sum<kLanes>(dot);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (inside(i)) from_real(share[i] * (gradient[i] - dot), numbers[0][i * kLanes]);
    }
  };
  gated_softmax::walk<kLanes, kValues>({x, s, dy}, {dx, ds}, groups, size, tile, pitch, inverse, turns, use);
}
