// Instructions of Hopper that the wide and the split kernels need beside wgmma: strong words, transposed matrices, bulk
// copies and the mbarriers that count them. `kPolls` ends a wait that is a bug.
#pragma once

#include "wgmma.cuh"

__device__ __forceinline__ u32 load_strong4(const void* address) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_strong4(void* address, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_stream16(void* address, const Words4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Sixteen zero bytes unless `wanted`.
__device__ __forceinline__ void copy_async16_if(u32 to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On a barrier of any CTA of the cluster, by its address there. Neither this nor a wait names the cluster as its scope,
// which would be a MEMBAR.GPU here, for every store on its way to global memory, and a CCTL.IVALL there: what is handed
// over so lies in shared memory, which no cache stands before.
//
// Of this scope an arrival may overtake loads that are on their way, whose place the peer then writes to while they have
// not read it yet. So what has been made of all that was loaded comes here, and the arrival waits until it is known:
// unless all its bits are set, which no sum of floats has.
__device__ __forceinline__ void mbarrier_arrive_peer(u32 barrier, u32 loaded) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0xffffffff;\n @p mbarrier.arrive.shared::cluster.b64 _, [%0];}" ::"r"(
                   barrier),
               "r"(loaded)
               : "memory");
}
__device__ __forceinline__ u32 load_shared4(u32 address) {
  u32 v;
  asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared4(u32 address, u32 v) {
  asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
// Until four words, of four warps, are that much. The lanes leave together, and no two neighbours read the same word:
// ptxas takes what a warp reads from one address to be the same in all lanes, and keeps what follows in registers that
// they share, but of a load of 16 bytes each half of a warp has its own moment.
template <u32 kPolls>
__device__ __forceinline__ void wait_for_four(u32 address, u32 least) {
  const u32 word = address + threadIdx.x % 4 * 4;
  for (u32 polls = 0; !__all_sync(~0u, load_shared4(word) >= least); ++polls)
    if (polls > kPolls) __trap();
}
// A named barrier that also tells whether any thread says so.
__device__ __forceinline__ bool any_of(int barrier, int threads, bool mine) {
  u32 any;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; barrier.cta.red.or.pred p, %1, %2, p; selp.u32 %0, 1, 0, p;}"
               : "=r"(any)
               : "r"(barrier), "r"(threads), "r"(static_cast<u32>(mine))
               : "memory");
  return any;
}
// In one block of PTX: the compiler would unroll the loop, and code that misses the instruction cache is slow.
template <u32 kPolls>
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p; .reg .u32 polls; mov.u32 polls, 0;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE; add.u32 polls, polls, 1; setp.lt.u32 p, polls, %2; @p bra WAIT; trap; DONE:}" ::"r"(barrier),
      "r"(parity), "n"(kPolls)
      : "memory");
}
// Whether a wait would end at once.
__device__ __forceinline__ bool mbarrier_passed(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
  return passed;
}
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store_bulk(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}
// Until what this thread has stored so is there.
__device__ __forceinline__ void wait_bulk_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Two 8 x 8 matrices, transposed: a lane gets two neighbouring batch rows of one unit where memory has units of a row.
__device__ __forceinline__ void load_transposed(u32 address, u32& first, u32& second) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_transposed(u32 address, u32 first, u32 second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(first), "r"(second)
               : "memory");
}
// What is written to shared memory before it is seen by wgmma and bulk copies after it.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same in all lanes, and the compiler is to know it: what wgmma is told of shared matrices must be.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }
// The compiler is not to keep what it derives from it before this point.
__device__ __forceinline__ void settle(u32& value) { asm volatile("" : "+r"(value)); }
