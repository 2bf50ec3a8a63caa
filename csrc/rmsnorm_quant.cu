// SPDX-License-Identifier: Apache-2.0
// CUDA rmsnorm_quant. The contract is in lowbit/ops/rmsnorm_quant.py.
//
// A row belongs to kThreads threads (common/quantizer.cuh says which holds what): a warp for short
// rows, four of them a block, else a block.
//   step 1  h = x + residual, narrowed, stored; it stays in registers, as does what follows.
//           Without a residual h = x, and nothing is stored
//   step 2  mean of squares over the threads; y = h / sqrt(mean + eps), two IEEE roundings
//   step 3  y times weight; its range over the threads
//   step 4  scale and zero point, then codes, 8 a thread and store
// Memory bound: with a residual reads 4 K and writes 2 K + K or K / 2 bytes a row of 16-bit x, else
// 2 K in and K or K / 2 out; the weight comes from L2.

#include "common/row_codes.h"
#include "common/row_tiles.h"

namespace lowbit {
namespace {

// For each warp of a row a Range and a sum.
template <int kThreads, int kVectors>
using NormTile = RowTile<kThreads, kVectors, /*kWarpRows=*/4, sizeof(Range) + sizeof(float)>;

using Tiles = RowTiles<NormTile<32, 1>, NormTile<32, 2>, NormTile<128, 2>, NormTile<256, 2>,
                       NormTile<512, 2>, NormTile<1024, 2>>;

enum class Weight { kNone, kLikeX, kFloat };

// The sum over the row's kThreads threads, in all of them. `scratch`: as of reduce_range.
template <int kThreads>
__device__ __forceinline__ float reduce_sum(float sum, float* scratch) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if constexpr (kThreads > kWarp) {
    if (lane_id() == 0) scratch[threadIdx.x / kWarp] = sum;
    sync_block();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) sum += scratch[i];
  }
  return sum;
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kBlock)
    rmsnorm_quant_kernel(const T* __restrict__ x,            // [rows, length]
                         const T* __restrict__ residual,     // [rows, length] or null
                         const void* __restrict__ weight,    // [length] T or fp32
                         T* __restrict__ new_residual,       // [rows, length], with a residual
                         uint8_t* __restrict__ codes,        // [rows, length], or half when packed
                         void* __restrict__ scales,          // [rows] fp32
                         uint8_t* __restrict__ zero_points,  // [rows], unused when symmetric
                         int64_t rows, int length, float eps, Weight weight_kind, IntGrid grid) {
  wait_for_earlier_kernels();
  constexpr int kThreads = Tile::kThreads, kVectors = Tile::kVectors;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads;
  if (row >= rows) return;  // a whole warp, and only where no barrier follows
  Range* ranges = reinterpret_cast<Range*>(dynamic_smem());
  float* sums = reinterpret_cast<float*>(ranges + Tile::kWarps);

  // step 1
  RawVector<T> raw[kVectors], raw_residual[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) {
      raw[v].load(x + row * length + first);
      if (residual != nullptr) raw_residual[v].load(residual + row * length + first);
    }
  }
  float values[kVectors][kVector];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) {
      raw[v].widen(values[v]);
      if (residual != nullptr) {
        float other[kVector];
        raw_residual[v].widen(other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          values[v][i] = to_float(from_float<T>(add_rn(values[v][i], other[i])));
        }
        store_vector(new_residual + row * length + first, values[v]);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum = fmaf(values[v][i], values[v][i], sum);
    }
  }

  // step 2
  const float mean = div_rn(reduce_sum<kThreads>(sum, sums), static_cast<float>(length));
  const float norm = div_rn(1.0f, sqrt_rn(add_rn(mean, eps)));

  // step 3
  Range range;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) {
      float scaled[kVector];
      if (weight_kind == Weight::kFloat)
        load_vector(scaled, static_cast<const float*>(weight) + first);
      if (weight_kind == Weight::kLikeX) load_vector(scaled, static_cast<const T*>(weight) + first);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float y = mul_rn(values[v][i], norm);
        values[v][i] = weight_kind == Weight::kNone ? y : mul_rn(y, scaled[i]);
        range.include(values[v][i]);
      }
    }
  }
  range = reduce_range<kThreads>(range, ranges);

  // step 4
  const Scale scale = scale_of(range, grid);
  if (thread == 0) store_scale(scales, zero_points, row, scale, grid);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first < length) store_codes(codes, row * length + first, values[v], scale, grid);
  }
}

struct Kernels {
  template <class T, class Tile>
  static auto of() {
    return &rmsnorm_quant_kernel<T, Tile>;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> rmsnorm_quant(const Tensor& x,
                                                         const std::optional<Tensor>& residual,
                                                         const std::optional<Tensor>& weight,
                                                         double eps, int64_t bits, bool symmetric,
                                                         double clip, bool packed) {
  const auto shape = x.sizes();
  const int64_t K = shape[shape.size() - 1], rows = x.numel() / K;
  const int device = device_of(x);
  check_tensor("rmsnorm_quant", "x", x, x.scalar_type(), x.numel(), device);
  if (residual.has_value()) {
    check_tensor("rmsnorm_quant", "residual", *residual, x.scalar_type(), x.numel(), device);
  }
  Weight weight_kind = Weight::kNone;
  if (weight.has_value()) {
    const bool like_x = weight->scalar_type() == x.scalar_type();
    weight_kind = like_x ? Weight::kLikeX : Weight::kFloat;
    check_tensor("rmsnorm_quant", "weight", *weight, like_x ? x.scalar_type() : ScalarType::Float,
                 K, device);
  }
  check(K % kVector == 0, "rmsnorm_quant: rows must be whole vectors of ", kVector);

  RowCodes out = new_row_codes(x, bits, symmetric, packed);
  std::vector<int64_t> sum_shape = {0};
  if (residual.has_value()) sum_shape.assign(shape.begin(), shape.end());
  Tensor new_residual = new_empty(x, sum_shape, x.scalar_type());
  const IntGrid grid = int_grid(bits, symmetric, clip, packed);
  visit_float_type("rmsnorm_quant", "x", x, [&](auto zero) {
    using T = decltype(zero);
    launch_rows<T, Kernels>("rmsnorm_quant", Tiles(), device, rows, K, pointer<const T>(x),
                            pointer<T>(residual), pointer<void>(weight), pointer<T>(new_residual),
                            pointer<uint8_t>(out.codes), pointer<void>(out.scales),
                            pointer<uint8_t>(out.zero_points), rows, static_cast<int>(K),
                            static_cast<float>(eps), weight_kind, grid);
  });
  return {out.codes, out.scales, out.zero_points, new_residual};
}

const bool kRegistered = register_row_kernels<Kernels>("rmsnorm_quant", Tiles());

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "rmsnorm_quant(Tensor x, Tensor? residual, Tensor? weight, float eps, int bits, "
      "bool symmetric, float clip, bool packed) -> (Tensor, Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("rmsnorm_quant", TORCH_BOX(&lowbit::rmsnorm_quant)); }
