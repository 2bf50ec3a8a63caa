// SPDX-License-Identifier: Apache-2.0
// How the splits of a row become one: what csrc/kv_attention.cu and csrc/kv_attention_quant.cu do,
// operation by operation, so that they give the same bits.
#pragma once

#include "common/kv_attention.cuh"

namespace lowbit::kv {

// `used` splits from `first` on.
struct SplitRange {
  int first, used;
};

// The splits in which a query of the call sees something; others are not written. All lanes of a
// warp.
__device__ __forceinline__ SplitRange splits_seen(const Arguments& a, int query) {
  const Sequence sequence = find(query, a, 1, 1);
  const int seen = sequence.length - sequence.queries + 1 + query - sequence.first_query;
  if (seen <= 0) return {0, 0};
  const int before = sequence_begin(sequence, a);
  const int first = (larger(seen - a.window, 0) - before) / a.split_length;
  return {first, ceil_div(seen - before, a.split_length) - first};
}

// The splits of a row that it sees, from the first on; numbers of one split and the next lie
// `stride` apart.
struct RowSplits {
  const float *max, *sum;
  int64_t stride;
  int used;

  __device__ __forceinline__ float top() const {
    float top = -INFINITY;
#pragma unroll 4
    for (int split = 0; split < used; ++split) top = fmaxf(top, max[split * stride]);
    return top == -INFINITY ? 0.0f : top;  // all nan, or nothing
  }

  __device__ __forceinline__ float weight(int split, float top) const {
    return exp2_approx(max[split * stride] - top);
  }

  // What the weighted sum of the partial rows is to be multiplied with.
  __device__ __forceinline__ float inverse(float top) const {
    float total = 0.0f;
#pragma unroll 4
    for (int split = 0; split < used; ++split) {
      total = add_rn(total, mul_rn(sum[split * stride], weight(split, top)));
    }
    return used > 0 ? div_rn(1.0f, total) : 0.0f;
  }
};

// y with the next split's share.
__device__ __forceinline__ float add_split(float y, float partial, float weight) {
  return add_rn(y, mul_rn(partial, weight));
}

}  // namespace lowbit::kv
