// hopper.cuh and wgmma.cuh for a host compiler: a wgmma happens when it is waited for, and not before; a bulk copy at any
// time after it has been asked for, in any order, and is counted when it is whole.
#pragma once

#include "primitives.cuh"

inline u32 load_strong4(const void* address) {
  u32 word;
  memcpy(&word, address, 4);
  return word;
}
inline void store_strong4(void* address, u32 word) { emulator::store_late(address, &word, 4); }
inline void store_stream16(void* address, const Words4& words) { memcpy(address, &words, 16); }
inline void copy_async16_if(u32 to, const void* from, bool wanted) {
  static const Words4 zeros{};
  copy_async16(to, wanted ? from : &zeros);
}

inline void mbarrier_init(u32 barrier, u32 count) { emulator::mbarrier(barrier) = {count, count}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(u32 barrier) { emulator::arrive_at(emulator::mbarrier(barrier), 1, 0); }
inline void mbarrier_arrive_peer(u32 barrier, u32) { mbarrier_arrive(barrier); }
inline void store_shared4(u32 address, u32 v) { memcpy(emulator::aligned(address, 4), &v, 4); }
template <u32 kPolls>
inline void wait_for_four(u32 address, u32 least) {
  for (;; emulator::yield()) {
    u32 words[4];
    memcpy(words, emulator::aligned(address, 16), 16);
    if (*min_element(words, words + 4) >= least) return;
  }
}
inline bool any_of(int barrier, int threads, bool mine) {
  return emulator::wait(emulator::current->cta->barriers[barrier], threads, mine);
}
inline bool mbarrier_passed(u32 barrier, u32 parity) { return (emulator::mbarrier(barrier).phase & 1) != parity; }
template <u32 kPolls>
inline void mbarrier_wait(u32 barrier, u32 parity) {
  while (!mbarrier_done(barrier, parity)) {
  }
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  emulator::copy_late(emulator::shared_at(to), from, bytes, &emulator::mbarrier(barrier), nullptr);
}
inline void store_bulk(void* to, u32 from, u32 bytes) {
  emulator::copy_late(to, emulator::shared_at(from), bytes, nullptr, emulator::current);
}
inline void wait_bulk_stores() {
  while (emulator::current->bulk_stores) emulator::yield();
}

// Lane l gives the address of row l % 8 of matrix l / 8, and has its own part of both matrices' column l / 4.
template <typename Do>
inline void at_transposed(u32 address, Do part) {
  emulator::Lane* lanes = emulator::all_lanes();
  const int lane = threadIdx.x % 32;
  lanes[lane].a[0] = address;
  emulator::sync_warp();
  for (int matrix = 0; matrix < 2; ++matrix)
    for (int i = 0; i < 2; ++i)
      part(reinterpret_cast<u16*>(emulator::shared_at(lanes[matrix * 8 + lane % 4 * 2 + i].a[0])) + lane / 4, matrix, i);
  emulator::sync_warp();
}
inline void load_transposed(u32 address, u32& first, u32& second) {
  u16 found[2][2];
  at_transposed(address, [&](const u16* at, int matrix, int i) { found[matrix][i] = *at; });
  memcpy(&first, found[0], 4), memcpy(&second, found[1], 4);
}
inline void store_transposed(u32 address, u32 first, u32 second) {
  const u32 words[2] = {first, second};
  at_transposed(address, [&](u16* at, int matrix, int i) { *at = static_cast<u16>(words[matrix] >> 16 * i); });
}
inline void fence_async_shared() {}
inline int uniform(int value) { return __shfl_sync(~0u, value, 0); }
inline void settle(u32&) {}

constexpr u32 matrix_low(u32 address, u32 depth_stride) { return (address & 0x3ffff) >> 4 | (depth_stride >> 4) << 16; }
constexpr u32 matrix_high(u32 row_stride) { return row_stride >> 4; }

// Where the core matrix is that holds this row, or column, and depth; eight times sixteen bytes.
inline const u16* core_of(u32 low, u32 high, int row, int depth) {
  return reinterpret_cast<const u16*>(emulator::shared_at((low & 0x3fff) << 4) + (depth / 8) * (low >> 16 << 4) +
                                      (row / 8) * (high << 4));
}

template <typename T>
struct Wgmma {
  template <int kSums>
  static void run(float (&d)[kSums], bool add, function<float(int half, int depth)> stationary, u32 low, u32 high) {
    emulator::current->wgmmas.back().push_back([&d, add, stationary, low, high]() {
      const int lane = threadIdx.x % 32;
      float a[2][16];
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) a[half][k] = stationary(half, k);
      for (int i = 0; i < kSums; ++i) {
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = add ? d[i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * T::low(core_of(low, high, column, k)[k % 8 * 8 + column % 8]);
        d[i] = sum;
      }
    });
  }
  // A lane has row l / 4, then that and 8, of depths 2 (l % 4) + {0, 1}, and of those 8 on.
  template <int kSums>
  static void multiply(float (&d)[kSums], const u32 (&a)[4], u32 low, u32 high, bool add) {
    emulator::Lane* lanes = emulator::all_lanes();
    const int lane = threadIdx.x % 32;
    memcpy(lanes[lane].a, a, 16);
    emulator::sync_warp();
    vector<emulator::Lane> row(lanes + lane / 4 * 4, lanes + lane / 4 * 4 + 4);
    emulator::sync_warp();
    run(d, add, [row](int half, int k) {
      const u32 word = row[k % 8 / 2].a[k / 8 * 2 + half];
      return k % 2 ? T::high(word) : T::low(word);
    }, low, high);
  }
  template <int kSums>
  static void multiply(float (&d)[kSums], u32 a_low, u32 a_high, u32 low, u32 high, bool add) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    run(d, add, [=](int half, int k) {
      return T::low(core_of(a_low, a_high, row + half * 8, k)[(row + half * 8) % 8 * 8 + k % 8]);
    }, low, high);
  }
};
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::current->wgmmas.emplace_back(); }
template <int kPending>
inline void wgmma_wait() {
  auto& groups = emulator::current->wgmmas;
  for (; groups.size() > kPending + 1; groups.erase(groups.begin()))
    for (const auto& each : groups.front()) each();
  emulator::sync_warp();
}
template <int kSums>
inline void wgmma_use(float (&)[kSums]) {}
