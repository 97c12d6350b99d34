// primitives.cuh for a host compiler, and a GPU of fibers to run the persistent kernels on: threads take turns in random
// order, warps multiply together, and what a CTA stores for others becomes visible as late as the memory model allows:
// stores to one word in their order, all before a fence before it ends. What the hardware copies by itself comes piece
// by piece, at any time. A shared address has the CTA of the cluster that is meant, and one more, from bit 20 on: 0 is
// one's own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <random>
#include <unordered_set>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

using namespace std;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __expf expf
#define __logf logf
#define __fdividef(x, y) ((x) / (y))

#include "cells.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(8) Words2 {
  u32 x, y;
};
struct alignas(16) Words4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline float __uint_as_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline u32 __float_as_uint(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}

namespace emulator {

struct Barrier {
  int arrived = 0, threads = 0;
  u32 generation = 0;
  bool any = false, any_before = false;  // of those that arrive says so, or did
};
struct Mbarrier {
  u32 count = 0, pending = 0;
  long long bytes = 0;  // that have not come yet
  u32 phase = 0;
};
struct Lane {
  u32 a[4], b[2];
};
struct Warp {
  Barrier barrier;
  Lane lanes[32];
};
struct Copy {
  u32 to;
  const void* from;
  int bytes;
};
struct Store {
  char* to;
  char bytes[8];
  int size;
  u64 number;  // among those of its CTA
};
struct Index {
  u32 x;
};
struct Cta {
  Index block;
  vector<char> shared;
  Barrier barriers[16];
  map<u32, Mbarrier> mbarriers;
  Barrier* cluster_barrier;
  Cta* cluster;  // the first one of it
  vector<Warp> warps;
  vector<Store> stores;  // that nobody sees yet
  u64 stored = 0;
};
struct Fiber {
  ucontext_t context;
  Cta* cta;
  Index thread;
  vector<vector<Copy>> copies = vector<vector<Copy>>(1);  // by groups; one happens when it is waited for, and not before
  vector<vector<function<void()>>> wgmmas = vector<vector<function<void()>>>(1);  // likewise
  int bulk_stores = 0;              // on their way
  const u32* generation = nullptr;  // what it waits for to change
  u32 awaited = 0;
  bool done = false;
};

inline Fiber* current;
inline ucontext_t scheduler;
inline Index grid, block_size, cluster_size;
inline mt19937 generator;
inline u64 progress;
inline char error[256];

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  if (!error[0]) vsnprintf(error, sizeof error, format, list);
  va_end(list);
  for (;;) yield();
}
inline void arrive(Barrier& barrier, int threads, bool mine = false) {
  if (barrier.arrived && barrier.threads != threads)
    fail("a barrier of %d threads is used for %d", barrier.threads, threads);
  barrier.threads = threads, barrier.any = barrier.any || mine, ++progress;
  if (++barrier.arrived == threads)
    barrier.arrived = 0, ++barrier.generation, barrier.any_before = barrier.any, barrier.any = false;
}
// Whether any of them says `mine`: nobody can be at the barrier again before all have left it.
inline bool wait(Barrier& barrier, int threads, bool mine = false) {
  const u32 generation = barrier.generation;
  arrive(barrier, threads, mine);
  while (barrier.generation == generation) {
    current->generation = &barrier.generation, current->awaited = generation;
    yield();
  }
  current->generation = nullptr;
  return barrier.any_before;
}
inline Warp& warp() { return current->cta->warps[current->thread.x / 32]; }
inline Lane* all_lanes() { return warp().lanes; }
inline void sync_warp() { wait(warp().barrier, 32); }
inline char* shared_memory() { return current->cta->shared.data(); }

constexpr u32 kPeerBit = 20;
inline Cta& cta_of(u32 address) {
  return address >> kPeerBit ? current->cta->cluster[(address >> kPeerBit) - 1] : *current->cta;
}
inline u32 offset_of(u32 address) { return address & (1u << kPeerBit) - 1; }
inline char* shared_at(u32 address) { return cta_of(address).shared.data() + offset_of(address); }
// What is read or written at once.
inline char* aligned(u32 address, u32 bytes) {
  if (address % bytes) fail("%u bytes of shared memory at %u", bytes, address);
  return shared_at(address);
}
inline Mbarrier& mbarrier(u32 address) { return cta_of(address).mbarriers[offset_of(address)]; }
inline void arrive_at(Mbarrier& barrier, u32 arrivals, long long bytes) {
  if (barrier.pending < arrivals) fail("more arrive at an mbarrier than it counts");
  barrier.pending -= arrivals, barrier.bytes += bytes, ++progress;
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.count, ++barrier.phase;
}

// What the hardware copies: from where, or what was given with it.
struct LateCopy {
  char* to;
  const char* from;
  u32 bytes;
  Mbarrier* counts;
  Fiber* waits;
  Words4 given;
  u32 done = 0;
};
inline list<LateCopy> late_copies;

inline void copy_late(void* to, const void* from, u32 bytes, Mbarrier* counts, Fiber* waits) {
  late_copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, counts, waits, {}});
  ++progress;
  if (waits) ++waits->bulk_stores;
}
inline void go_on_copying() {
  for (auto copy = late_copies.begin(); copy != late_copies.end();) {
    const u32 pieces = generator() % 4 ? 0 : 1 + generator() % 32;
    for (u32 i = 0; i < pieces && copy->done < copy->bytes; ++i, copy->done += 16)
      memcpy(copy->to + copy->done, copy->from ? copy->from + copy->done : reinterpret_cast<const char*>(&copy->given), 16);
    progress += pieces;
    if (copy->done < copy->bytes) {
      ++copy;
      continue;
    }
    if (copy->counts) arrive_at(*copy->counts, 0, -static_cast<long long>(copy->bytes));
    if (copy->waits) --copy->waits->bulk_stores;
    copy = late_copies.erase(copy);
  }
}
inline void store_late(void* to, const void* from, int size) {
  Cta& cta = *current->cta;
  Store store{static_cast<char*>(to), {}, size, ++cta.stored};
  memcpy(store.bytes, from, size);
  cta.stores.push_back(store);
  ++progress;
}

// Some of those that may come next, or with `all` every one.
inline void show_stores(Cta& cta, bool all) {
  unordered_set<char*> waiting;
  size_t left = 0;
  for (const Store& store : cta.stores)
    if (!waiting.count(store.to) && (all || generator() % 8 == 0)) {
      memcpy(store.to, store.bytes, store.size);
      ++progress;
    } else {
      waiting.insert(store.to);
      cta.stores[left++] = store;
    }
  cta.stores.resize(left);
}

inline const function<void()>* kernel;
inline void start() {
  (*kernel)();
  current->done = true, ++progress;
  for (;;) yield();
}

// Runs all threads of all blocks; what went wrong, or null.
inline const char* run(int blocks, int threads, int shared_bytes, int cluster, u32 seed, const function<void()>& work) {
  constexpr size_t kStack = 128 << 10;
  const size_t bytes = kStack * blocks * threads;
  char* stacks = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) return "no memory for the stacks";
  kernel = &work, error[0] = 0, generator.seed(seed), grid.x = blocks, block_size.x = threads;
  cluster_size.x = cluster, late_copies.clear();
  vector<Cta> ctas(blocks);
  vector<Barrier> cluster_barriers(blocks / cluster);
  vector<Fiber> fibers(static_cast<size_t>(blocks) * threads);
  for (int block = 0; block < blocks; ++block) {
    Cta& cta = ctas[block];
    cta.cluster = &ctas[block / cluster * cluster], cta.cluster_barrier = &cluster_barriers[block / cluster];
    cta.block.x = block, cta.warps.resize(threads / 32), cta.shared.resize(shared_bytes + 128);
    for (char& byte : cta.shared) byte = static_cast<char>(0x7f);  // NaN in every type, but an empty word in none
    for (int thread = 0; thread < threads; ++thread) {
      const size_t i = static_cast<size_t>(block) * threads + thread;
      fibers[i].cta = &cta, fibers[i].thread.x = thread;
      getcontext(&fibers[i].context);
      fibers[i].context.uc_stack.ss_sp = stacks + i * kStack, fibers[i].context.uc_stack.ss_size = kStack;
      makecontext(&fibers[i].context, start, 0);
    }
  }
  vector<u32> order(fibers.size() / 32);
  for (u32 i = 0; i < order.size(); ++i) order[i] = i;
  for (u64 idle = 0, before = 0, left = 1; left && !error[0];) {
    left = 0;
    shuffle(order.begin(), order.end(), generator);
    for (u32 warp : order)
      for (u32 i = warp * 32; i < warp * 32 + 32 && !error[0]; ++i) {
        Fiber& fiber = fibers[i];
        if (fiber.done) continue;
        ++left;
        if (fiber.generation && *fiber.generation == fiber.awaited) continue;
        current = &fiber;
        swapcontext(&scheduler, &fiber.context);
      }
    for (Cta& cta : ctas) show_stores(cta, false);
    go_on_copying();
    idle = progress == before ? idle + 1 : 0, before = progress;
    if (idle > 200 && !error[0]) {
      snprintf(error, sizeof error, "%llu threads wait for ever", static_cast<u64>(left));
      for (Cta& cta : ctas)
        for (int b = 0; b < 16; ++b)
          if (cta.barriers[b].arrived) {
            const size_t end = strlen(error);
            snprintf(error + end, sizeof error - end, "; block %u, barrier %d: %d of %d", cta.block.x, b,
                     cta.barriers[b].arrived, cta.barriers[b].threads);
          }
    }
  }
  for (Cta& cta : ctas) show_stores(cta, true);
  if (!late_copies.empty() && !error[0]) snprintf(error, sizeof error, "all threads are done before their copies are");
  munmap(stacks, bytes);
  return error[0] ? error : nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->cta->block)
#define gridDim (emulator::grid)
inline void __syncwarp() { emulator::sync_warp(); }
inline void __syncthreads() { emulator::wait(emulator::current->cta->barriers[0], emulator::block_size.x); }
inline void __trap() { emulator::fail("trap in block %u, thread %u", blockIdx.x, threadIdx.x); }
template <typename Word>
inline Word __shfl_xor_sync(u32, Word value, int mask) {
  static_assert(sizeof(Word) == 4, "one word a lane");
  emulator::Lane* lanes = emulator::all_lanes();
  memcpy(lanes[threadIdx.x % 32].a, &value, 4);
  emulator::sync_warp();
  memcpy(&value, lanes[threadIdx.x % 32 ^ mask].a, 4);
  emulator::sync_warp();
  return value;
}

template <typename Word>
inline Word __shfl_sync(u32, Word value, int lane) {
  static_assert(sizeof(Word) == 4, "one word a lane");
  emulator::Lane* lanes = emulator::all_lanes();
  memcpy(lanes[threadIdx.x % 32].a, &value, 4);
  emulator::sync_warp();
  memcpy(&value, lanes[lane].a, 4);
  emulator::sync_warp();
  return value;
}
inline u32 __ballot_sync(u32, bool mine) {
  emulator::Lane* lanes = emulator::all_lanes();
  lanes[threadIdx.x % 32].a[0] = mine;
  emulator::sync_warp();
  u32 votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= lanes[lane].a[0] << lane;
  emulator::sync_warp();
  return votes;
}

struct bf16 {
  using Math = Precise<float>;
  static u32 round(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  static u32 pack(float lo, float hi) { return round(lo) | round(hi) << 16; }
  static float low(u32 word) { return __uint_as_float(word << 16); }
  static float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::Lane* lanes = emulator::all_lanes();
    const int lane = threadIdx.x % 32;
    lanes[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::sync_warp();
    // Lane 4 g + t holds rows g and g + 8 of A at depths 2 t + {0, 1, 8, 9}, and those depths of column g of B.
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2 + i % 2;
      for (int t = 0; t < 4; ++t)
        for (int half = 0; half < 2; ++half) {
          const u32 x = lanes[row * 4 + t].a[half * 2 + i / 2], y = lanes[column * 4 + t].b[half];
          d[i] += low(x) * low(y) + high(x) * high(y);
        }
    }
    emulator::sync_warp();
  }
  u16 bits;
};
struct fp16 {
  using Math = Fast;
  static u32 round(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
  }
  static u32 pack(float lo, float hi) { return round(lo) | round(hi) << 16; }
  static float low(u32 word) {
    const u16 bits = word;
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
  }
  static float high(u32 word) { return low(word >> 16); }
  u16 bits;
};

template <typename T>
inline void unpack(const Words2& words, float (&values)[4]) {
  values[0] = T::low(words.x), values[1] = T::high(words.x);
  values[2] = T::low(words.y), values[3] = T::high(words.y);
}
template <typename T>
inline Words2 pack(const float (&values)[4]) {
  return {T::pack(values[0], values[1]), T::pack(values[2], values[3])};
}

// A word that has not come lets the others go on.
inline Words4 load_strong(const void* address) {
  Words4 words;
  memcpy(&words, address, 16);
  if (max(max(words.x, words.y), max(words.z, words.w)) == 0xffffffffu) {
    emulator::yield();
    memcpy(&words, address, 16);
  }
  return words;
}
inline void store_strong(void* address, const Words2& words) { emulator::store_late(address, &words, 8); }
inline void fence_gpu() {
  emulator::Cta& cta = *emulator::current->cta;
  const u64 last = cta.stored;
  while (any_of(cta.stores.begin(), cta.stores.end(), [=](const emulator::Store& store) { return store.number <= last; }))
    emulator::yield();
}

inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const char*>(pointer) - emulator::shared_memory());
}
inline void copy_async(u32 to, const void* from) { memcpy(emulator::shared_memory() + to, from, 8); }
inline void copy_async_if(u32 to, const void* from, bool wanted) {
  if (wanted)
    copy_async(to, from);
  else
    memset(emulator::shared_memory() + to, 0, 8);
}
inline void copy_async16(u32 to, const void* from) { emulator::current->copies.back().push_back({to, from, 16}); }
inline void copy_async4(u32 to, const void* from) { emulator::current->copies.back().push_back({to, from, 4}); }
inline void commit_copies() { emulator::current->copies.emplace_back(); }
template <int kPending>
inline void wait_copies() {
  auto& groups = emulator::current->copies;
  for (; groups.size() > kPending + 1; groups.erase(groups.begin()))
    for (const emulator::Copy& copy : groups.front())
      memcpy(emulator::shared_memory() + copy.to, copy.from, copy.bytes);
}
inline Words4 load_shared(u32 address) {
  Words4 words;
  memcpy(&words, emulator::aligned(address, 16), 16);
  return words;
}
inline void store_shared(u32 address, const Words4& words) { memcpy(emulator::aligned(address, 16), &words, 16); }
inline Words2 load_shared8(u32 address) {
  Words2 words;
  memcpy(&words, emulator::aligned(address, 8), 8);
  return words;
}
inline void settle(float&) {}
inline void store_stream(void* address, const Words2& words) { memcpy(address, &words, 8); }
inline void barrier_sync(int id, int threads) { emulator::wait(emulator::current->cta->barriers[id], threads); }
inline void barrier_arrive(int id, int threads) { emulator::arrive(emulator::current->cta->barriers[id], threads); }
template <int kCount>
inline void give_registers() {}
template <int kCount>
inline void take_registers() {}

inline void cluster_barrier() {
  emulator::wait(*emulator::current->cta->cluster_barrier, emulator::cluster_size.x * emulator::block_size.x);
}
inline void mbarrier_init(u32 barrier) { emulator::mbarrier(barrier) = {1, 1}; }
inline void mbarrier_expect(u32 barrier, u32 bytes) { emulator::arrive_at(emulator::mbarrier(barrier), 1, bytes); }
inline bool mbarrier_done(u32 barrier, u32 parity) {
  const emulator::Mbarrier& counts = emulator::mbarrier(barrier);
  if ((counts.phase & 1) == parity) emulator::yield();
  return (counts.phase & 1) != parity;
}
inline u32 peer_address(u32 address, int rank) { return address | (rank + 1) << emulator::kPeerBit; }
inline void push(u32 address, const Words4& words, u32 barrier) {
  emulator::copy_late(emulator::shared_at(address), nullptr, 16, &emulator::mbarrier(barrier), nullptr);
  emulator::late_copies.back().given = words;
}
