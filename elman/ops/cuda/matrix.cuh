// All T steps of a recurrence whose state is a matrix S (K, V) a head, in one launch, and its gradient:
//
//   D = a S, u = Dᵀ k, S ← f(D + β k (v − u)ᵀ), y = Sᵀ q
//
// Columns of S do not see each other, so a warp owns all K rows of kWidth columns of one head of one row of the batch, in
// registers for all steps, and waits for nobody. A lane has kRows rows of kColumns neighbouring columns: lanes beside each
// other share columns (u and y are sums over them), lanes kRowLanes apart share rows (dq and dk are). So a lane reads 8
// numbers of k and q for 32 of the state, and a sum of columns takes as many shuffles as there are row lanes, to the base 2.
//
// The backward pass needs the state before every step. It makes them again, kInterval steps at a time, from checkpoints
// that the forward pass leaves before every kInterval-th step, its reset not yet done: first all steps, leaving a state at
// the start of each stretch in shared memory, then a stretch at a time, from the last on, leaving all. The last stretch
// finds less room than the others, and is shorter: 11 steps fit where four states do.
//
// T: q, k (T, B, N, K), v, y (T, B, N, V) of T, aligned to 16 bytes; decay (T, B, N), or (T, B, N, K) if kPerKey, beta (T, B,
// N), s0, s_last (B, N, K, V) in float, checkpoints (ceil(T / kInterval), B, N, K, V) of Kept; reset (T, B) an int each. Gradients lie
// as what they are of. What is null is not there, or not wanted. Every argument has 8 bytes; `pairs` is B * N.
#pragma once

#include "numbers.cuh"

namespace matrix {

// A module may have one direction alone, and NVRTC warns of what it does not use.
[[maybe_unused]] constexpr u32 kAll = 0xffffffffu;
[[maybe_unused]] constexpr int kRows = 8;
[[maybe_unused]] constexpr int kInterval = 11;
[[maybe_unused]] constexpr int kForwardWarps = 4;  // of a block; they have nothing to do with each other
[[maybe_unused]] constexpr int kDepth = 8;         // steps in a forward warp's ring
[[maybe_unused]] constexpr int kStretches = 3, kSlots = 4, kLongest = 4;
[[maybe_unused]] constexpr int kTogether = 2;  // steps whose sums over several warps' columns are added at a time

// Where a stretch of an interval starts.
__device__ __forceinline__ constexpr int start_of(int stretch) { return kLongest * stretch; }

// Cells. They take x times `scale`, which its factors are given at the start: a multiplication a row and column, not one a
// number. `forward` is what the forward pass makes of it; `again` what the backward pass takes for it, from whose value y it
// has the slope, and which must not lose that where y is near 1. Of half types tanh is one instruction forwards in bf16
// (relative error 2^-11, and as many clocks as the four multiply-adds of an element together and once more), and elsewhere 1
// − 2 / (1 + exp 2x), two of those, whose absolute error is 2e-7.
struct Unscaled {
  static constexpr bool kBounded = false;
  template <bool kAgain, class Math>
  static __device__ __forceinline__ constexpr float scale(Math) {
    return 1.0f;
  }
};

struct Tanh {
  static constexpr bool kBounded = true;
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Precise<float>) {
    return 1.0f;
  }
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Fast) {
    return 2.0f * Fast::kLog2E;
  }
  template <bool kAgain>
  static __device__ __forceinline__ constexpr float scale(Coarse) {
    return kAgain ? 2.0f * Fast::kLog2E : 1.0f;
  }
  static __device__ __forceinline__ float again(Precise<float>, float x) { return ::tanh(x); }
  static __device__ __forceinline__ float again(Fast, float x) {
    return fmaf(-2.0f, hardware::reciprocal(1.0f + hardware::exp2(x)), 1.0f);
  }
  static __device__ __forceinline__ float forward(Precise<float> math, float x) { return again(math, x); }
  static __device__ __forceinline__ float forward(Fast math, float x) { return again(math, x); }
  static __device__ __forceinline__ float forward(Coarse, float x) { return Coarse::tanh(x); }
  static __device__ __forceinline__ float slope(float y) { return fmaf(-y, y, 1.0f); }
};

struct Softsign : Unscaled {
  static constexpr bool kBounded = true;
  template <class Math>
  static __device__ __forceinline__ float again(Math, float x) {
    return Math::divide(x, 1.0f + fabsf(x));
  }
  template <class Math>
  static __device__ __forceinline__ float forward(Math math, float x) {
    return again(math, x);
  }
  static __device__ __forceinline__ float slope(float y) { return (1.0f - fabsf(y)) * (1.0f - fabsf(y)); }
};

struct Identity : Unscaled {
  template <class Math>
  static __device__ __forceinline__ float again(Math, float x) {
    return x;
  }
  template <class Math>
  static __device__ __forceinline__ float forward(Math, float x) {
    return x;
  }
  static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

template <bool kChoose, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

// What a checkpoint is kept in. A state that a cell keeps from -1 to 1 is rounded by 2^-12 of itself, which is less than the
// gradients of a half type are.
template <class T, class Cell>
using Kept = typename Either<Cell::kBounded && sizeof(T) == 2, fp16, float>::Type;
[[maybe_unused]] constexpr float kMostKept = 65504;  // only an s0 may be more

template <int K, int V>
struct Tile {
  static constexpr int kRowLanes = K / kRows;
  static constexpr int kColumnLanes = 32 / kRowLanes;
  static constexpr int kColumns = V / kColumnLanes < 4 ? V / kColumnLanes : 4;
  static constexpr int kWidth = kColumnLanes * kColumns;
  static constexpr int kWarps = V / kWidth;  // of a head
};

// Neighbours that move as one word.
template <int kNumber>
struct alignas(4 * kNumber) Floats {
  float at[kNumber];
};

// What a step reads, as it lies in shared memory: k, q, v, and in the backward pass dy, of kColumns columns; then floats
// and the reset.
template <class T, int K, int kColumns, bool kWithGradient, bool kPerKey>
struct Record {
  static constexpr int kDecays = kPerKey ? K : 1;
  static constexpr int kQuery = K * sizeof(T), kValue = 2 * kQuery;
  static constexpr int kShown = kValue + kColumns * sizeof(T);
  static constexpr int kDecay = kShown + (kWithGradient ? kColumns * sizeof(T) : 0);
  static constexpr int kBeta = kDecay + 4 * kDecays, kReset = kBeta + 4;
  static constexpr int kBytes = (kReset + 4 + 15) / 16 * 16;
  // It comes in pieces of 16 bytes, and at the end of 4.
  static constexpr int kNarrow = kPerKey ? 2 : 3;
  static constexpr int kPieces = (kPerKey ? kBeta : kDecay) / 16 + kNarrow;
};

// Where a piece of step 0 lies, and how far from it that of the next.
struct Source {
  const char* from;
  long long stride;
  int to;
  bool wide;
};

// The inputs of one head, from the first of the columns that are wanted on.
template <class T>
struct Inputs {
  const T *k, *q, *v, *dy;
  const float *decay, *beta;
  const int* reset;
  long long pairs, pair, batch, row;

  template <class Record, int K, int V>
  __device__ __forceinline__ Source source(int piece, int column) const {
    const int byte = piece * 16;
    auto of = [&](const void* base, long long size, int first, long long begin, bool wide) {
      // `size` bytes a head; `begin` of them before what is wanted.
      return Source{static_cast<const char*>(base) + pair * size + begin, pairs * size, first, wide};
    };
    if (byte < Record::kQuery) return of(k, K * sizeof(T), byte, byte, true);
    if (byte < Record::kValue) return of(q, K * sizeof(T), byte, byte - Record::kQuery, true);
    const long long skipped = static_cast<long long>(column) * sizeof(T);
    if (byte < Record::kShown) return of(v, V * sizeof(T), byte, skipped + byte - Record::kValue, true);
    if (byte < Record::kDecay) return of(dy, V * sizeof(T), byte, skipped + byte - Record::kShown, true);
    const int narrow = piece - (Record::kPieces - Record::kNarrow);
    if (narrow < 0) return of(decay, 4 * Record::kDecays, byte, byte - Record::kDecay, true);
    if (narrow == Record::kNarrow - 1)
      return {reinterpret_cast<const char*>(reset + row), 4 * batch, Record::kReset, false};
    if (narrow == Record::kNarrow - 2) return of(beta, 4, Record::kBeta, 0, false);
    return of(decay, 4, Record::kDecay, 0, false);
  }
};

__device__ __forceinline__ void copy(const Source& source, char* record, long long step) {
  const char* const from = source.from + step * source.stride;
  const u32 to = shared_address(record + source.to);
  if (source.wide)
    copy_async16(to, from);
  else
    copy_async4(to, from);
}

template <int kNumber, class T>
__device__ __forceinline__ void read(const char* from, float (&values)[kNumber]) {
  if constexpr (sizeof(T) == 4) {
    constexpr int kTogether = kNumber < 4 ? kNumber : 4;
#pragma unroll
    for (int i = 0; i < kNumber; i += kTogether) {
      const Floats<kTogether> some = *reinterpret_cast<const Floats<kTogether>*>(from + 4 * i);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) values[i + j] = some.at[j];
    }
  } else if constexpr (kNumber == 1) {
    values[0] = to_real(*reinterpret_cast<const T*>(from));
  } else {
    struct alignas(2 * kNumber) Words {
      u32 at[kNumber / 2];
    };
    const Words words = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int i = 0; i < kNumber / 2; ++i) values[2 * i] = T::low(words.at[i]), values[2 * i + 1] = T::high(words.at[i]);
  }
}

// Sums over lanes kStride apart, each lane's the sum of kLanes.
template <int kLanes, int kStride, int kNumber>
__device__ __forceinline__ void sum(float (&x)[kNumber]) {
#pragma unroll
  for (int apart = kStride; apart < kLanes * kStride; apart *= 2)
#pragma unroll
    for (int i = 0; i < kNumber; ++i) x[i] += __shfl_xor_sync(kAll, x[i], apart);
}

// The same sums, each left to one lane, or where lanes are more than numbers to several: the first `kept` of x are then
// those of numbers kept * (i / shared) on, i being the lane's place among the kLanes.
template <int kLanes, int kNumber>
struct Scattered {
  static constexpr int kKept = kNumber > kLanes ? kNumber / kLanes : 1;
  static constexpr int kShared = kLanes > kNumber ? kLanes / kNumber : 1;
};
template <int kLanes, int kStride, int kNumber, int kHalf = kNumber / 2, int kApart = kLanes / 2 * kStride>
__device__ __forceinline__ void sum_scattered(float (&x)[kNumber], int lane) {
  if constexpr (kApart >= kStride) {
    if constexpr (kHalf >= 1) {
      const bool upper = lane & kApart;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float given = upper ? x[i] : x[i + kHalf], kept = upper ? x[i + kHalf] : x[i];
        x[i] = kept + __shfl_xor_sync(kAll, given, kApart);
      }
    } else {
      x[0] += __shfl_xor_sync(kAll, x[0], kApart);
    }
    sum_scattered<kLanes, kStride, kNumber, kHalf / 2, kApart / 2>(x, lane);
  }
}

template <int kNumber, class To>
__device__ __forceinline__ void put(const float* x, To* to) {
#pragma unroll
  for (int i = 0; i < kNumber; ++i) from_real(x[i], to[i]);
}

// This lane's part of a state.
template <int K, int V>
struct State {
  using Shape = Tile<K, V>;
  static constexpr int kColumns = Shape::kColumns;
  using Row = Floats<kColumns>;
  float at[kRows][kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[i][j] = 0;
  }
  // The same, where it seldom happens: a branch, not a choice for every number.
  __device__ __forceinline__ void forget() {
    clear();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) settle(at[i][j]);
  }
  // Of a row of the state, how far apart they lie: in memory V floats, in shared memory a row of every lane.
  template <int kPitch>
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Row row = *reinterpret_cast<const Row*>(from + i * kPitch);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[i][j] = row.at[j];
    }
  }
  template <int kPitch>
  __device__ __forceinline__ void load(const fp16* from) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Pack<fp16, kColumns> row = ::load<kColumns>(from, i * kPitch);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[i][j] = to_real(row.at[j]);
    }
  }
  template <int kPitch>
  __device__ __forceinline__ void store(fp16* to) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Pack<fp16, kColumns> row;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float x = at[i][j];
        from_real(fabsf(x) > kMostKept ? copysignf(kMostKept, x) : x, row.at[j]);
      }
      ::store<kColumns>(to, i * kPitch, row);
    }
  }
  template <int kPitch>
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Row row;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) row.at[j] = at[i][j];
      *reinterpret_cast<Row*>(to + i * kPitch) = row;
    }
  }
};

template <bool kPerKey, int kDecay>
__device__ __forceinline__ void read_decay(const char* record, int row, float (&a)[kRows]) {
  if constexpr (kPerKey) {
    read<kRows, float>(record + kDecay + 4 * row, a);
  } else {
    const float one = *reinterpret_cast<const float*>(record + kDecay);
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = one;
  }
}

// A step but for its output: the state becomes what it is after it. Leaves u.
template <class T, class Cell, class Record, bool kAgain, bool kPerKey, int K, int V>
__device__ __forceinline__ void advance(State<K, V>& s, const char* record, int row, int column, bool cut,
                                        float (&u)[State<K, V>::kColumns]) {
  constexpr int kColumns = State<K, V>::kColumns;
  constexpr typename Arithmetic<T>::Math math{};
  constexpr float kScale = Cell::template scale<kAgain>(math);
  float k[kRows], a[kRows], v[kColumns];
  read<kRows, T>(record + row * sizeof(T), k);
  read_decay<kPerKey, Record::kDecay>(record, row, a);
  read<kColumns, T>(record + Record::kValue + column * sizeof(T), v);
  const float beta = *reinterpret_cast<const float*>(record + Record::kBeta);
  if constexpr (kScale != 1.0f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] *= kScale;
  }
  if (cut) s.forget();
#pragma unroll
  for (int j = 0; j < kColumns; ++j) u[j] = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      s.at[i][j] *= a[i];
      u[j] = fmaf(k[i], s.at[i][j], u[j]);
    }
  sum<Tile<K, V>::kRowLanes, 1>(u);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if constexpr (kScale != 1.0f) v[j] *= kScale;
    v[j] = beta * (v[j] - u[j]);
    if constexpr (kScale != 1.0f) u[j] *= 1.0f / kScale;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float x = fmaf(k[i], v[j], s.at[i][j]);
      s.at[i][j] = kAgain ? Cell::again(math, x) : Cell::forward(math, x);
    }
}

}  // namespace matrix

// Grid: a warp for every kWidth columns of every head of every row, kForwardWarps a block; dynamic shared memory
// kForwardWarps * kDepth records.
template <class T, class Cell, int K, int V, bool kPerKey>
__global__ void __launch_bounds__(32 * matrix::kForwardWarps, 5)
    matrix_forward(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                   const float* __restrict__ decay, const float* __restrict__ beta, const float* __restrict__ s0,
                   const int* __restrict__ reset, T* __restrict__ y, float* __restrict__ s_last,
                   matrix::Kept<T, Cell>* __restrict__ checkpoints, long long steps, long long pairs, long long heads) {
  using namespace matrix;
  using Shape = Tile<K, V>;
  using Step = Record<T, K, Shape::kWidth, false, kPerKey>;
  constexpr int kColumns = Shape::kColumns, kRounds = (Step::kPieces + 31) / 32;
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long unit = static_cast<long long>(blockIdx.x) * kForwardWarps + warp, pair = unit / Shape::kWarps;
  if (pair >= pairs) return;
  const int first = static_cast<int>(unit % Shape::kWarps) * Shape::kWidth;  // column of the warp
  const int row_lane = lane % Shape::kRowLanes, row = row_lane * kRows;
  const int column = lane / Shape::kRowLanes * kColumns;
  char* const ring = shared + warp * kDepth * Step::kBytes;

  const Inputs<T> inputs{k, q, v, nullptr, decay, beta, reset, pairs, pair, pairs / heads, pair / heads};
  Source sources[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i)
    sources[i] = inputs.template source<Step, K, V>(min(lane + 32 * i, Step::kPieces - 1), first);
  const int pieces = reset != nullptr ? Step::kPieces : Step::kPieces - 1;
  const u32 count = steps;
  auto bring = [&](u32 step) {
    if (step < count) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i)
        if (lane + 32 * i < pieces) copy(sources[i], ring + step % kDepth * Step::kBytes, step);
    }
    commit_copies();
  };
#pragma unroll 1
  for (u32 step = 0; step < kDepth - 1; ++step) bring(step);

  const long long place = (pair * K + row) * V + first + column;
  State<K, V> s;
  if (s0 != nullptr)
    s.template load<V>(s0 + place);
  else
    s.clear();
  using Mine = Scattered<Shape::kRowLanes, kColumns>;
  const int mine = column + row_lane / Mine::kShared * Mine::kKept;
  T* shown = y + pair * V + first + mine;
#pragma unroll 1
  for (u32 t = 0; t < count; ++t) {
    wait_copies<kDepth - 2>();
    __syncwarp();
    bring(t + kDepth - 1);
    const char* const record = ring + t % kDepth * Step::kBytes;
    if (checkpoints != nullptr && t % kInterval == 0)
      s.template store<V>(checkpoints + t / kInterval * pairs * K * V + place);
    const bool cut = reset != nullptr && *reinterpret_cast<const int*>(record + Step::kReset) != 0;
    float u[kColumns], query[kRows];
    advance<T, Cell, Step, false, kPerKey>(s, record, row, column, cut, u);
    read<kRows, T>(record + Step::kQuery + row * sizeof(T), query);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) u[j] = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) u[j] = fmaf(query[i], s.at[i][j], u[j]);
    sum_scattered<Shape::kRowLanes, 1>(u, lane);
    if (row_lane % Mine::kShared == 0) {
      Pack<T, Mine::kKept> pack;
#pragma unroll
      for (int j = 0; j < Mine::kKept; ++j) from_real(u[j], pack.at[j]);
      store<Mine::kKept>(shown, 0, pack);
    }
    shown += pairs * V;
  }
  s.template store<V>(s_last + place);
}

namespace matrix {

// How a backward block of kWarps warps uses shared memory: several add what each of them sums over its columns there, one
// alone has the sums. Where a head has more warps, its blocks leave sums of their own, in float.
template <class T, int K, int V, bool kPerKey, int kWarps>
struct Backward {
  using Shape = Tile<K, V>;
  static constexpr int kWidth = kWarps * Shape::kWidth, kParts = V / kWidth;
  static_assert(kParts * kWidth == V, "warps of a block divide those of a head");
  using Step = Record<T, K, kWidth, true, kPerKey>;
  using Sum = typename Either<kParts == 1, T, float>::Type;
  static constexpr int kLaneFloats = kRows * Shape::kColumns, kStateFloats = 32 * kLaneFloats;
  static constexpr bool kAlone = kWarps == 1;
  static constexpr int kSums = 2 * K + Step::kDecays + 1;  // of a step: dq, dk, ddecay, dbeta
  static constexpr int kStatesAt = 0, kRingAt = 4 * kWarps * kSlots * kStateFloats;
  static constexpr int kReadsAt = kRingAt + kInterval * Step::kBytes;
  static constexpr int kSumsAt = kReadsAt + 4 * kLongest * kWidth;
  static constexpr int kSharedBytes = kSumsAt + (kAlone ? 0 : 4 * kTogether * kWarps * kSums);
};

}  // namespace matrix

// Grid: pairs * kParts blocks of kWarps warps. Of kParts > 1, dq, dk, ddecay and dbeta are (kParts, ...), dq and dk in float.
template <class T, class Cell, int K, int V, bool kPerKey, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 8 / kWarps)
    matrix_backward(const T* __restrict__ dy, const float* __restrict__ ds_last, const T* __restrict__ q,
                    const T* __restrict__ k, const T* __restrict__ v, const float* __restrict__ decay,
                    const float* __restrict__ beta, const int* __restrict__ reset,
                    const matrix::Kept<T, Cell>* __restrict__ checkpoints,
                    typename matrix::Backward<T, K, V, kPerKey, kWarps>::Sum* __restrict__ dq,
                    typename matrix::Backward<T, K, V, kPerKey, kWarps>::Sum* __restrict__ dk, T* __restrict__ dv,
                    float* __restrict__ ddecay, float* __restrict__ dbeta, float* __restrict__ ds0, long long steps,
                    long long pairs, long long heads) {
  using namespace matrix;
  using Shape = Tile<K, V>;
  using Layout = Backward<T, K, V, kPerKey, kWarps>;
  using Step = typename Layout::Step;
  constexpr int kColumns = Shape::kColumns, kThreads = 32 * kWarps, kSums = Layout::kSums;
  constexpr int kLanePitch = 32 * kColumns;
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long pair = blockIdx.x / Layout::kParts, part = blockIdx.x % Layout::kParts;
  const int row_lane = lane % Shape::kRowLanes, row = row_lane * kRows, column_lane = lane / Shape::kRowLanes;
  const int column = warp * Shape::kWidth + column_lane * kColumns;  // among the block's
  const int first_column = static_cast<int>(part) * Layout::kWidth;
  char* const ring = shared + Layout::kRingAt;
  float* const reads = reinterpret_cast<float*>(shared + Layout::kReadsAt);
  float* const sums = reinterpret_cast<float*>(shared + Layout::kSumsAt);
  const long long place = (pair * K + row) * V + first_column + column;

  // Slots hold this lane's part alone: nobody waits for what is in them.
  auto slot = [&](int index) {
    return reinterpret_cast<float*>(shared) + (warp * kSlots + index) * Layout::kStateFloats + lane * kColumns;
  };
  auto record_of = [&](int step) { return ring + step * Step::kBytes; };
  auto meet = [&]() {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  };

  // Steps begin .. end - 1 of the interval that starts at `first`, into their places of the ring.
  const Inputs<T> inputs{k, q, v, dy, decay, beta, reset, pairs, pair, pairs / heads, pair / heads};
  const int pieces = reset != nullptr ? Step::kPieces : Step::kPieces - 1;
  // A thread has the same pieces of every step, or one of every kAtOnce-th.
  constexpr int kRounds = (Step::kPieces + kThreads - 1) / kThreads, kAtOnce = kRounds > 1 ? 1 : kThreads / Step::kPieces;
  const int ahead = kRounds > 1 ? 0 : threadIdx.x / Step::kPieces;
  const int first_piece = kRounds > 1 ? threadIdx.x : threadIdx.x % Step::kPieces;
  Source sources[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i)
    sources[i] = inputs.template source<Step, K, V>(min(first_piece + kThreads * i, Step::kPieces - 1), first_column);
  auto bring = [&](long long first, int begin, int end) {
#pragma unroll 1
    for (int step = ahead < kAtOnce ? begin + ahead : end; step < end; step += kAtOnce) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i)
        if (first_piece + kThreads * i < pieces) copy(sources[i], record_of(step), first + step);
    }
    commit_copies();
  };
  auto is_cut = [&](const char* record) {
    return reset != nullptr && *reinterpret_cast<const int*>(record + Step::kReset) != 0;
  };

  State<K, V> s, ds;
  if (ds_last != nullptr)
    ds.template load<V>(ds_last + place);
  else
    ds.clear();

  // Step `step`, number `offset` of its stretch, backwards: s is the state after it, and becomes the one before it.
  auto back = [&](int step, int offset, const float* before, long long t) {
    const char* const record = record_of(step);
    float query[kRows], key[kRows], a[kRows], given[kColumns], value[kColumns], through[kColumns];
    float to_query[kRows], to_key[kRows], to_decay[kRows];
    read<kRows, T>(record + Step::kQuery + row * sizeof(T), query);
    read<kRows, T>(record + row * sizeof(T), key);
    read<kColumns, T>(record + Step::kShown + column * sizeof(T), given);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) through[j] = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      to_query[i] = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        to_query[i] = fmaf(s.at[i][j], given[j], to_query[i]);
        ds.at[i][j] = fmaf(query[i], given[j], ds.at[i][j]) * Cell::slope(s.at[i][j]);
        through[j] = fmaf(key[i], ds.at[i][j], through[j]);
      }
    }
    sum<Shape::kRowLanes, 1>(through);

    read<kColumns, T>(record + Step::kValue + column * sizeof(T), value);
    read_decay<kPerKey, Step::kDecay>(record, row, a);
    const float share = *reinterpret_cast<const float*>(record + Step::kBeta);
    const Floats<kColumns> read_before = *reinterpret_cast<const Floats<kColumns>*>(reads + offset * Layout::kWidth + column);
    float written[kColumns], to_read[kColumns], to_share[1] = {0};
    Pack<T, kColumns> to_value;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float missed = value[j] - read_before.at[j];
      written[j] = share * missed, to_read[j] = -share * through[j];
      to_share[0] = fmaf(through[j], missed, to_share[0]);
      from_real(share * through[j], to_value.at[j]);
    }
    if (row_lane == 0) store<kColumns>(dv, (t * pairs + pair) * V + first_column + column, to_value);

    s.template load<kLanePitch>(before);
    if (is_cut(record)) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        to_key[i] = to_decay[i] = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) to_key[i] = fmaf(ds.at[i][j], written[j], to_key[i]);
      }
      ds.clear();
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float kept = 0;
        to_key[i] = to_decay[i] = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          to_key[i] = fmaf(ds.at[i][j], written[j], to_key[i]);
          kept = fmaf(s.at[i][j], to_read[j], kept);
          const float of_decayed = fmaf(key[i], to_read[j], ds.at[i][j]);
          to_decay[i] = fmaf(of_decayed, s.at[i][j], to_decay[i]);
          ds.at[i][j] = a[i] * of_decayed;
        }
        to_key[i] = fmaf(a[i], kept, to_key[i]);
      }
    }

    const long long of_step = (part * steps + t) * pairs + pair;
    float* const mine = sums + (offset % kTogether * kWarps + warp) * kSums;
    using Mine = Scattered<Shape::kColumnLanes, kRows>;
    sum_scattered<Shape::kColumnLanes, Shape::kRowLanes>(to_query, lane);
    sum_scattered<Shape::kColumnLanes, Shape::kRowLanes>(to_key, lane);
    float total[1] = {0};
    if constexpr (kPerKey) {
      sum_scattered<Shape::kColumnLanes, Shape::kRowLanes>(to_decay, lane);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) total[0] += to_decay[i];
      sum<32, 1>(total);
    }
    sum<Shape::kColumnLanes, Shape::kRowLanes>(to_share);
    if (column_lane % Mine::kShared == 0) {
      const int mine_from = row + column_lane / Mine::kShared * Mine::kKept;
      if constexpr (Layout::kAlone) {
        put<Mine::kKept>(to_query, dq + of_step * K + mine_from);
        put<Mine::kKept>(to_key, dk + of_step * K + mine_from);
        if constexpr (kPerKey) put<Mine::kKept>(to_decay, ddecay + of_step * K + mine_from);
      } else {
        put<Mine::kKept>(to_query, mine + mine_from);
        put<Mine::kKept>(to_key, mine + K + mine_from);
        if constexpr (kPerKey) put<Mine::kKept>(to_decay, mine + 2 * K + mine_from);
      }
    }
    if (lane == 0) {
      if constexpr (!kPerKey) *(Layout::kAlone ? ddecay + of_step : mine + 2 * K) = total[0];
      *(Layout::kAlone ? dbeta + of_step : mine + kSums - 1) = to_share[0];
    }
  };

  // What the block's warps left of steps `step` and after it, `number` of them.
  auto add = [&](long long step, int number) {
#pragma unroll 1
    for (int offset = 0; offset < number; ++offset) {
      const long long of_step = (part * steps + step + offset) * pairs + pair;
      auto total = [&](int which) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[(offset * kWarps + w) * kSums + which];
        return sum;
      };
#pragma unroll
      for (int i = threadIdx.x; i < K; i += kThreads) {
        from_real(total(i), dq[of_step * K + i]);
        from_real(total(K + i), dk[of_step * K + i]);
        if constexpr (kPerKey) ddecay[of_step * K + i] = total(2 * K + i);
      }
      if (threadIdx.x == 0) {
        if constexpr (!kPerKey) ddecay[of_step] = total(2 * K);
        dbeta[of_step] = total(kSums - 1);
      }
    }
  };

  const long long intervals = (steps - 1) / kInterval + 1;
  int number = static_cast<int>(steps - (intervals - 1) * kInterval);
  bring((intervals - 1) * kInterval, 0, number);
#pragma unroll 1
  for (long long interval = intervals - 1; interval >= 0; --interval, number = kInterval) {
    const long long first = interval * kInterval;
    const auto* const checkpoint = checkpoints + interval * pairs * K * V + place;
    wait_copies<0>();
    meet();
    if (number < kInterval && interval > 0) bring(first - kInterval, number, kInterval);
    s.template load<V>(checkpoint);
    int last = 0;
#pragma unroll 1
    for (; last + 1 < kStretches && start_of(last + 1) < number; ++last) {
#pragma unroll 1
      for (int step = start_of(last); step < start_of(last + 1); ++step) {
        float u[kColumns];
        advance<T, Cell, Step, false, kPerKey>(s, record_of(step), row, column, is_cut(record_of(step)), u);
      }
      s.template store<kLanePitch>(slot(last));
    }
#pragma unroll 1
    for (int stretch = last; stretch >= 0; --stretch) {
      // Slots before this one's first hold the starts of stretches still to come; the first stretch's is in memory.
      const int begin = start_of(stretch), end = min(start_of(stretch + 1), number), base = max(stretch - 1, 0);
      if (stretch < last) {
        if (stretch > 0)
          s.template load<kLanePitch>(slot(base));
        else
          s.template load<V>(checkpoint);
      }
#pragma unroll 1
      for (int step = begin; step < end; ++step) {
        const int offset = step - begin;
        if (offset > 0 || stretch == 0) s.template store<kLanePitch>(slot(base + offset));
        float u[kColumns];
        advance<T, Cell, Step, true, kPerKey>(s, record_of(step), row, column, is_cut(record_of(step)), u);
        if (row_lane == 0) {
          Floats<kColumns> row_of_reads;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) row_of_reads.at[j] = u[j];
          *reinterpret_cast<Floats<kColumns>*>(reads + offset * Layout::kWidth + column) = row_of_reads;
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int step = end - 1; step >= begin; --step) {
        const int offset = step - begin;
        back(step, offset, slot(base + offset), first + step);
        if constexpr (!Layout::kAlone) {
          if (offset % kTogether == 0) {
            meet();
            add(first + step, min(kTogether, end - step));
            meet();
          }
        }
      }
      if constexpr (Layout::kAlone) meet();
      if (interval > 0) bring(first - kInterval, begin, end);
    }
  }
  ds.template store<V>(ds0 + place);
}
