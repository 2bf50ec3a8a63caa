// SPDX-License-Identifier: Apache-2.0
// The outputs of an op that quantizes, as lowbit/ops/quantize.py's fake has them.
#pragma once

#include "common/launch.h"

namespace lowbit {

struct RowCodes {
  Tensor codes, scales, zero_points;
};

// x [..., K]: codes [..., K], half as many when packed to 4 bits; scales [..., 1], or one for each
// `group_size` elements.
inline RowCodes new_row_codes(const Tensor& x, int64_t bits, bool symmetric, bool packed,
                              int64_t group_size = 0, ScalarType scale_dtype = ScalarType::Float) {
  const auto shape = x.sizes();
  std::vector<int64_t> code_shape(shape.begin(), shape.end()), scale_shape = code_shape;
  scale_shape.back() = group_size ? scale_shape.back() / group_size : 1;
  if (packed && bits == 4) code_shape.back() /= 2;
  return {new_empty(x, code_shape, symmetric && !packed ? ScalarType::Char : ScalarType::Byte),
          new_empty(x, scale_shape, scale_dtype),
          new_empty(x, symmetric ? std::vector<int64_t>{0} : scale_shape, ScalarType::Byte)};
}

}  // namespace lowbit
