// SPDX-License-Identifier: Apache-2.0
// CUDA kv_attention_quant. The contract is in lowbit/ops/kv_attention_quant.py.
//
// The attention of csrc/kv_attention.cu. Where it leaves a few splits, what adds them is step 1 of
// common/hadamard.cuh, whose header has the map of data to threads: a block has a token's row of
// all heads, so that the sum goes on to be rotated and quantized without a way through memory.
//   step 1  a  maxima and sums of the splits of every head, to shared memory
//           b  a thread a head: their weights, as common/kv_combine.cuh computes them
//           c  units of 8: the weighted sum over the splits in order, narrowed as kv_attention does
//   steps 2 to 4 as in csrc/hadamard_quant.cu
// One split writes the row itself, and csrc/hadamard_quant.cu has it from there. So do many splits,
// added by the kernel of kv_attention: a round of loads each is more than one block a row is fit
// for, where that kernel has a block a head.
// Bytes: 4 splits K in, K or K / 2 out. Bound by the latency of step c; saved are a launch and a
// round trip of the row: docs/notes/0007.

#include "common/hadamard_plan.h"
#include "common/kv_combine.cuh"
#include "common/kv_launch.h"

namespace lowbit {
namespace {

constexpr int kMostSplits = 8;     // that a block adds: predicted, docs/notes/0007
constexpr int kMostThreads = 512;  // with more, registers are too few for the loads of a split
constexpr int kLeastUnits = 4;     // of a tile

// Of a thread, whose loads are under way together: the sums of more spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kUnitsAtOnce = 2;
#else
constexpr int kUnitsAtOnce = 4;
#endif
constexpr int kLongestSum = kMostThreads * kLeastUnits * kVector;

struct Splits {
  static constexpr bool kIsStaged = false;
  FloatType type;  // of the row: q's
  kv::Arguments a;
  Divisor by_head;  // in units

  // Steps 1a and 1b, where the row will be: [used, heads] weights, as many sums, [heads] inverses.
  // first: where the numbers of its first split are.
  __device__ __forceinline__ void weigh(float* weights, int64_t first, int used, int heads) const {
    const int count = used * heads;
    const int64_t rows = static_cast<int64_t>(a.T) * heads;
    float *sums = weights + count, *inverses = sums + count;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int split = i / heads;
      const int64_t at = split * rows + first + (i - split * heads);
      weights[i] = a.row_max[at];
      sums[i] = a.row_sum[at];
    }
    sync_block();
#pragma unroll 1
    for (int head = threadIdx.x; head < heads; head += blockDim.x) {
      const kv::RowSplits splits{weights + head, sums + head, heads, used};
      const float top = splits.top();
      inverses[head] = splits.inverse(top);
#pragma unroll 1
      for (int split = 0; split < used; ++split) {
        weights[split * heads + head] = splits.weight(split, top);
      }
    }
    sync_block();
  }

  template <int kUnits>
  __device__ __forceinline__ void load(uint4 (&to)[kUnits], int64_t start,
                                       const uint32_t (&places)[kUnits]) const {
    const int heads = a.num_kv_heads * a.heads;
    const auto [first_split, used] = kv::splits_seen(a, blockIdx.x);
    const int64_t stride = static_cast<int64_t>(a.T) * heads * a.head_dim;
    float* weights = reinterpret_cast<float*>(row_slots());
    weigh(weights, (static_cast<int64_t>(a.T) * first_split + blockIdx.x) * heads, used, heads);

    // step 1c
    static_assert(kUnits % kUnitsAtOnce == 0, "whole rounds");
    const float* inverses = weights + 2 * used * heads;
#pragma unroll
    for (int first = 0; first < kUnits; first += kUnitsAtOnce) {
      float sum[kUnitsAtOnce][kVector];
#pragma unroll
      for (int u = 0; u < kUnitsAtOnce; ++u) zero_unit(sum[u]);
      const float *row = a.partial + first_split * stride + start, *weight = weights;
#pragma unroll 1
      for (int split = 0; split < used; ++split, row += stride, weight += heads) {
#pragma unroll
        for (int u = 0; u < kUnitsAtOnce; ++u) {
          const uint32_t place = places[first + u];
          float share[kVector];
          load_vector(share, row + place * kVector);
          const float w = weight[by_head.quotient(place)];
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[u][i] = kv::add_split(sum[u][i], share[i], w);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnitsAtOnce; ++u) {
        const float inverse = inverses[by_head.quotient(places[first + u])];
        uint32_t words[kVector / 2];
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
          const uint32_t low = kv::narrow(sum[u][2 * i] * inverse, a.is_bf16);
          const uint32_t high = kv::narrow(sum[u][2 * i + 1] * inverse, a.is_bf16);
          words[i] = low | high << 16;
        }
        to[first + u] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    sync_block();  // all have read what the row now overwrites
  }
};

// One block an SM is enough. Not told so, ptxas aims at two, with 64 registers, and spills.
template <class Tile>
__global__ void __launch_bounds__(kMostThreads, 1) kv_attention_quant_kernel(
    Splits source,
    const uint32_t* __restrict__ signs,  // see common/hadamard.cuh, or null
    uint8_t* __restrict__ codes,         // [T, K], or half when packed
    void* __restrict__ scales,           // [T] fp32
    uint8_t* __restrict__ zero_points,   // [T], unused when symmetric
    Rotation rotation, IntGrid grid) {
  wait_for_earlier_kernels();
  static_assert(Tile::kUnits >= kLeastUnits && (Tile::kM == 0 || Tile::kMaxThreads <= kMostThreads),
                "rows up to kLongestSum take kMostThreads at most");
  rotate_and_quantize<Tile>(source, signs, codes, scales, zero_points, rotation, grid);
}

struct Kernels {
  template <class Tile>
  static auto of() {
    return &kv_attention_quant_kernel<Tile>;
  }
};

std::tuple<Tensor, Tensor, Tensor> kv_attention_quant(
    const Tensor& q, const Tensor& k_codes, const Tensor& k_scale, const Tensor& k_zero_point,
    const Tensor& v_codes, const Tensor& v_scale, const Tensor& v_zero_point,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start,
    const std::optional<Tensor>& k_new, const std::optional<Tensor>& v_new,
    const std::optional<Tensor>& cached_lens, int64_t kv_bits, double scaling, int64_t window,
    const std::optional<Tensor>& signs, int64_t order, int64_t inner, int64_t dense, int64_t bits,
    bool symmetric, double clip, bool packed) {
  const int64_t T = q.sizes()[0], D = q.sizes()[2], K = q.sizes()[1] * D;
  order = order ? order : 1;
  const kv::Call call{"kv_attention_quant",
                      q,
                      k_codes,
                      k_scale,
                      k_zero_point,
                      v_codes,
                      v_scale,
                      v_zero_point,
                      block_table,
                      seq_lens,
                      query_start,
                      k_new,
                      v_new,
                      cached_lens,
                      kv_bits,
                      scaling,
                      window};
  // Two numbers a split and one more, of every head, fit where its row will be.
  const int64_t most_splits = K > kLongestSum ? 1 : std::min<int64_t>(kMostSplits, (D - 1) / 2);
  const kv::Attention attention = kv::launch_attention(call, {T, K}, most_splits);
  if (attention.out.has_value()) {
    return hadamard_quant(*attention.out, signs, order, inner, dense, bits, symmetric, clip,
                          packed);
  }
  RowCodes out = new_row_codes(q, {T, K}, bits, symmetric, packed);
  const RotationArguments arguments{
      call.op, q, signs, K, order, inner, dense, out, int_grid(bits, symmetric, clip, packed)};
  launch_rotation<Kernels>(arguments,
                           Splits{float_type(call.op, "q", q.scalar_type()), attention.arguments,
                                  divisor(static_cast<int>(D / kVector))});
  return {out.codes, out.scales, out.zero_points};
}

const bool kRegistered =
    register_rotation_tiles<Kernels>("kv_attention_quant", kLongestSum, kMostThreads);

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "kv_attention_quant(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_zero_point, "
      "Tensor v_codes, Tensor v_scale, Tensor v_zero_point, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start, Tensor? k_new, Tensor? v_new, Tensor? cached_lens, int kv_bits, float "
      "scaling, int window, Tensor? signs, int order, int inner, "
      "int dense, int bits, bool symmetric, float clip, bool packed) "
      "-> (Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("kv_attention_quant", TORCH_BOX(&lowbit::kv_attention_quant)); }
