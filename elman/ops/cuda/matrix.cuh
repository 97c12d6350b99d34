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

#include "matrix_state.cuh"

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
