// SPDX-License-Identifier: Apache-2.0
// CUDA quantize. The contract is in lowbit/ops/quantize.py.
//
// A row (a group of a row is a row of its own: codes, scales and zero points of groups lie one
// after the other) belongs to kThreads threads: a warp for short rows, eight of them a block, else
// a block.
//   step 1  load the row into registers, once; its range over the threads
//   step 2  scale and zero point, IEEE division; one thread stores them
//   step 3  codes, 8 a thread and store
// Memory bound: reads 2 K (4 K for fp32), writes K or K / 2 bytes a row, and 4 or 5 for its scale.

#include "common/row_codes.h"
#include "common/row_tiles.h"

namespace lowbit {
namespace {

template <int kThreads, int kVectors>
using QuantizeTile = RowTile<kThreads, kVectors, /*kWarpRows=*/8, sizeof(Range)>;

using Tiles =
    RowTiles<QuantizeTile<32, 1>, QuantizeTile<32, 4>, QuantizeTile<128, 2>, QuantizeTile<256, 2>,
             QuantizeTile<512, 2>, QuantizeTile<1024, 2>, QuantizeTile<1024, 4>>;

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kBlock)
    quantize_kernel(const T* __restrict__ x,            // [rows, length]
                    uint8_t* __restrict__ codes,        // [rows, length], or half when packed
                    void* __restrict__ scales,          // [rows] fp32 or fp16
                    uint8_t* __restrict__ zero_points,  // [rows], unused when symmetric
                    int64_t rows, int length, IntGrid grid) {
  wait_for_earlier_kernels();
  constexpr int kThreads = Tile::kThreads, kVectors = Tile::kVectors;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads;
  if (row >= rows) return;  // a whole warp, and only where no barrier follows

  // step 1
  RawVector<T> raw[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) raw[v].load(x + row * length + first);
  }
  float values[kVectors][kVector];
  Range range;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) {
      raw[v].widen(values[v]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) range.include(values[v][i]);
    }
  }
  range = reduce_range<kThreads>(range, reinterpret_cast<Range*>(dynamic_smem()));

  // step 2
  const Scale scale = scale_of(range, grid);
  if (thread == 0) store_scale(scales, zero_points, row, scale, grid);

  // step 3
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) store_codes(codes, row * length + first, values[v], scale, grid);
  }
}

struct Kernels {
  template <class T, class Tile>
  static auto of() {
    return &quantize_kernel<T, Tile>;
  }
};

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, int64_t bits, int64_t group_size,
                                            bool symmetric, double clip, bool packed,
                                            ScalarType scale_dtype) {
  const auto shape = x.sizes();
  const int64_t K = shape[shape.size() - 1], length = group_size ? group_size : K;
  const int64_t rows = x.numel() / length;
  check_tensor("quantize", "x", x, x.scalar_type(), x.numel(), device_of(x));
  check(length % kVector == 0, "quantize: groups must be whole vectors of ", kVector);

  RowCodes out = new_row_codes(x, bits, symmetric, packed, length, scale_dtype);
  const IntGrid grid = int_grid(bits, symmetric, clip, packed, scale_dtype == ScalarType::Half);
  visit_float_type("quantize", "x", x, [&](auto zero) {
    using T = decltype(zero);
    launch_rows<T, Kernels>("quantize", Tiles(), device_of(x), rows, length, pointer<const T>(x),
                            pointer<uint8_t>(out.codes), pointer<void>(out.scales),
                            pointer<uint8_t>(out.zero_points), rows, static_cast<int>(length),
                            grid);
  });
  return {out.codes, out.scales, out.zero_points};
}

const bool kRegistered = register_row_kernels<Kernels>("quantize", Tiles());

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "quantize(Tensor x, int bits, int group_size, bool symmetric, float clip, bool packed, "
      "ScalarType scale_dtype) -> (Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("quantize", TORCH_BOX(&lowbit::quantize)); }
