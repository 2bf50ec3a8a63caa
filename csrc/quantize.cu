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

#include "common/launch.h"
#include "common/quantizer.cuh"
#include "common/row_codes.h"

namespace lowbit {
namespace {

constexpr int kWarpRows = 8;  // rows of a block whose rows are warps

template <int kThreads_, int kVectors_>
struct QuantizeTile {
  static constexpr int kThreads = kThreads_, kVectors = kVectors_;
  static constexpr int kRows = kThreads == kWarp ? kWarpRows : 1;
  static constexpr int kLongest = kThreads * kVectors * kVector;
  static constexpr int kSmemBytes = kThreads / kWarp * static_cast<int>(sizeof(Range));
  static_assert(kThreads * kRows <= 1024, "a block has at most 1024 threads");
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads* Tile::kRows)
    quantize_kernel(const T* __restrict__ x,            // [rows, length]
                    uint8_t* __restrict__ codes,        // [rows, length], or half when packed
                    void* __restrict__ scales,          // [rows] fp32 or fp16
                    uint8_t* __restrict__ zero_points,  // [rows], unused when symmetric
                    int64_t rows, int length, IntGrid grid) {
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

struct QuantizeArguments {
  const Tensor& x;
  RowCodes& out;
  int64_t rows;
  int length;
  IntGrid grid;
};

template <class T, class Tile>
void launch_quantize(const QuantizeArguments& a) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(a.rows, Tile::kRows));
  launch({"quantize", text("rows=", a.rows, " length=", a.length), device_of(a.x), dim3(blocks),
          Tile::kThreads * Tile::kRows, Tile::kSmemBytes},
         &quantize_kernel<T, Tile>, pointer<const T>(a.x), pointer<uint8_t>(a.out.codes),
         pointer<void>(a.out.scales), pointer<uint8_t>(a.out.zero_points), a.rows, a.length,
         a.grid);
}

// Applies `visit` to the tiles in ascending order of the rows they hold.
#define LOWBIT_QUANTIZE_TILES(visit) \
  visit(32, 1) visit(32, 4) visit(128, 2) visit(256, 2) visit(512, 2) visit(1024, 2) visit(1024, 4)

template <class T>
void quantize_of(const QuantizeArguments& a) {
#define LOWBIT_VISIT(threads, vectors)                      \
  if (a.length <= QuantizeTile<threads, vectors>::kLongest) \
    return launch_quantize<T, QuantizeTile<threads, vectors>>(a);
  LOWBIT_QUANTIZE_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  check(false, text("quantize: rows of ", a.length, " are too long for its kernels"));
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, int64_t bits, int64_t group_size,
                                            bool symmetric, double clip, bool packed,
                                            ScalarType scale_dtype) {
  const auto shape = x.sizes();
  const int64_t K = shape[shape.size() - 1], length = group_size ? group_size : K;
  const int64_t rows = x.numel() / length;
  check_tensor("quantize", "x", x, x.scalar_type(), x.numel(), device_of(x));
  check(length % kVector == 0, text("quantize: groups must be whole vectors of ", kVector));

  RowCodes out = new_row_codes(x, bits, symmetric, packed, length, scale_dtype);
  const QuantizeArguments arguments{
      x, out, rows, static_cast<int>(length),
      int_grid(bits, symmetric, clip, packed, scale_dtype == ScalarType::Half)};
  visit_float_type("quantize", "x", x, [&](auto zero) { quantize_of<decltype(zero)>(arguments); });
  return {out.codes, out.scales, out.zero_points};
}

template <class T, class Tile>
void register_tile(const char* name) {
  register_kernel({"quantize", name, reinterpret_cast<const void*>(&quantize_kernel<T, Tile>),
                   Tile::kThreads * Tile::kRows, Tile::kSmemBytes, 80, 120});
}

const bool kRegistered = [] {
#define LOWBIT_VISIT(threads, vectors)                                                  \
  register_tile<float, QuantizeTile<threads, vectors>>("fp32_" #threads "x" #vectors);  \
  register_tile<__half, QuantizeTile<threads, vectors>>("fp16_" #threads "x" #vectors); \
  register_tile<__nv_bfloat16, QuantizeTile<threads, vectors>>("bf16_" #threads "x" #vectors);
  LOWBIT_QUANTIZE_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  return true;
}();

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "quantize(Tensor x, int bits, int group_size, bool symmetric, float clip, bool packed, "
      "ScalarType scale_dtype) -> (Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("quantize", TORCH_BOX(&lowbit::quantize)); }
