// SPDX-License-Identifier: Apache-2.0
// The attention of csrc/kv_attention.cu as a step of another op.
#pragma once

#include "common/kv_tile.cuh"
#include "common/launch.h"

namespace lowbit::kv {

// The arguments of lowbit/ops/kv_attention.py.
struct Call {
  const char* op;  // shown in errors
  const Tensor &q, &k_codes, &k_scale, &k_zero_point, &v_codes, &v_scale, &v_zero_point;
  const Tensor &block_table, &seq_lens, &query_start;
  const std::optional<Tensor>&k_new, &v_new, &cached_lens;
  int64_t bits;
  double scaling;
  int64_t window;
};

// What was launched: `out`, or the splits that are to be added (common/kv_combine.cuh). The memory
// must live until that is launched too; then it is reused in the stream's order.
struct Attention {
  std::optional<Tensor> out;  // q's elements
  Arguments arguments;
  std::optional<Tensor> partial, rows;
};

// Checks the call and launches its attention. More than one split, but not more than `most_left`,
// are left to the caller to add.
Attention launch_attention(const Call& call, const std::vector<int64_t>& out_shape,
                           int64_t most_left = 1);

}  // namespace lowbit::kv
