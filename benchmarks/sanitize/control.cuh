// What racecheck is told by: sums handed from one half of a block to the other by named barriers, as persistent_cells.cuh
// and persistent_products.cuh do it and as the PTX manual documents barrier.cta.arrive; and the same with a race.
#include "primitives.cuh"

// Kinds are types, so that every message has their names.
struct control_handed_over {
  static constexpr bool kRacing = false;
};

// The writer arrives before it has written, not after: as many take part in every barrier, so that nothing hangs.
struct control_racing {
  static constexpr bool kRacing = true;
};

// Of kBuffers buffers the barriers are full = 1 + buffer and empty = 3 + buffer.
template <class Kind, int kWarps, int kBuffers>
__global__ void control(float* sums, long long steps) {
  constexpr int kFull = 1, kEmpty = 3, kHalf = 32 * kWarps, kAll = 2 * kHalf;
  extern __shared__ float handed[];
  const int thread = threadIdx.x % kHalf, rounds = steps;
  if (threadIdx.x < kHalf) {
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int buffer = round % kBuffers;
      if (round >= kBuffers) barrier_sync(kEmpty + buffer, kAll);
      if (Kind::kRacing) barrier_arrive(kFull + buffer, kAll);
      handed[buffer * kHalf + thread] = float(round + thread);
      if (!Kind::kRacing) barrier_arrive(kFull + buffer, kAll);
    }
    for (int round = max(rounds - kBuffers, 0); round < rounds; ++round) barrier_sync(kEmpty + round % kBuffers, kAll);
  } else {
    float sum = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int buffer = round % kBuffers;
      barrier_sync(kFull + buffer, kAll);
      sum += handed[buffer * kHalf + kHalf - 1 - thread];
      barrier_arrive(kEmpty + buffer, kAll);
    }
    sums[thread] = sum;
  }
}
