// All T steps of a recurrence in one launch, h_t = f(pre_t, W h_{t-1}, memory_{t-1}) with a cell f, and its gradient.
//
// The grid is heads x groups x columns. A group owns some batch rows of a head, and its CTAs split the hidden units.
// Each CTA keeps its rows of W on chip for the whole launch, as fragments of the tensor cores' stationary operand: in
// registers as far as they go, the rest in shared memory. A step computes v^T = W h^T, so that W is that operand and
// the few batch rows of a tile are the narrow one. The eight product warps split the depth K of the product: every word
// of the state enters a CTA once, straight into the fragment that uses it, and partial sums meet in shared memory.
//
// Batch rows are independent, so each tile of 8 or 16 rows runs at its own pace: while one tile's state travels between
// the CTAs (exchange.cuh), the tensor cores work on the next.
//
// Roles of the 16 warps: 0-7 products; then one a row tile of W sums, applies the cell, publishes and stores; the last
// fences; any between have nothing to do.
//
// Four files: persistent_layout.cuh has what is worked on and who does what, persistent_products.cuh and
// persistent_cells.cuh the two kinds of warps, and this one puts them together.
#pragma once

#include "persistent_cells.cuh"
#include "persistent_products.cuh"

namespace persistent {

template <typename S, typename Cell, template <typename, int, int> class Exchange, typename T, typename M>
__device__ __forceinline__ void run(const Problem<T, M>& p) {
  extern __shared__ __align__(128) char shared[];
  const Part part = part_of<S>(p);
  // Backwards, the gradient of h0 is one more product, with no cell behind it.
  const int products = p.steps + (S::kBackward && p.initial_gradient ? 1 : 0);

  Exchange<T, S::kUnits, S::kBlocks> exchange(p.ring, shared + S::exchange_offset(p.tiles), part,
                                              gridDim.x / part.peers * p.tiles * S::kTileRows, S::kIn * p.hidden);
  exchange.open();
  const int warp = threadIdx.x >> 5;
  if (warp < kProductWarps) {
    take_registers<S::kProductRegisters>();
    run_products<S>(p, exchange, shared, part, products);
  } else {
    give_registers<S::kOtherRegisters>();
    if (warp < kProductWarps + S::kAllCells / 32)
      run_cells<S, Cell>(p, exchange, shared, part, products);
    else if (S::kSpareWarp && warp == kLastWarp)
      run_fences<S, Exchange<T, S::kUnits, S::kBlocks>>(products);
  }
  __syncwarp();
  exchange.close();
}

}  // namespace persistent

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks,
          template <typename, int, int> class Exchange, typename Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_forward(const T* pre, const T* weight, const T* bias, const T* h0, const Memory* c0, const u8* reset, T* h,
                       T* saved, Memory* c, Memory* c_last, char* ring, int steps, int batch, int hidden, int pitch,
                       int tiles) {
  using S = persistent::Shape<Cell, false, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::Problem<T, Memory> p{};
  p.input = pre, p.weight = weight, p.bias = bias, p.initial = h0, p.reset = reset, p.output = h, p.saved = saved;
  p.memory = c, p.memory_last = c_last;
  if constexpr (S::kOtherState)
    p.memory_before = c0;
  else
    p.memory_before = h0;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  persistent::run<S, Cell, Exchange>(p);
}

template <typename T, typename Cell, int kRowTiles, int kRegisterUnits, int kSharedUnits, int kBlocks,
          template <typename, int, int> class Exchange, typename Memory = MemoryOf<Cell, T>>
__global__ void __launch_bounds__(persistent::kThreads, 1)
    persistent_backward(const T* dh, const T* weight, const T* dh_last, Memory* dc_last, const u8* reset, T* saved,
                        const Memory* memory0, Memory* memory, T* dpre, T* drec, T* dh0, Memory* dc0, char* ring,
                        int steps, int batch, int hidden, int pitch, int tiles) {
  using S = persistent::Shape<Cell, true, kRowTiles, kRegisterUnits, kSharedUnits, kBlocks>;
  persistent::Problem<T, Memory> p{};
  p.input = dh, p.weight = weight, p.last_gradient = dh_last, p.reset = reset, p.output = dpre, p.saved = saved;
  p.initial_gradient = dh0, p.memory_before = memory0, p.memory = memory, p.memory_last = dc_last;
  p.memory_gradient = dc0, p.products_gradient = drec;
  p.ring = ring, p.steps = steps, p.batch = batch, p.hidden = hidden, p.pitch = pitch, p.tiles = tiles;
  persistent::run<S, Cell, Exchange>(p);
}
