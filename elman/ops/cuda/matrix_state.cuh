// A warp's part of a matrix state, the inputs of its steps in shared memory, and the step itself; see matrix.cuh.
#pragma once

#include "matrix_cells.cuh"

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
