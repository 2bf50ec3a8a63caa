// SPDX-License-Identifier: Apache-2.0
// The outputs of an op that quantizes, as lowbit/ops/quantize.py's fake has them.
#pragma once

#include "common/launch.h"

namespace lowbit {

struct RowCodes {
  Tensor codes, scales, zero_points;
};

// Of rows in `shape`, [..., K]: codes [..., K], half as many when packed to 4 bits; scales [...,
// 1], or one for each `group_size` elements. On the device of `x`.
inline RowCodes new_row_codes(const Tensor& x, const std::vector<int64_t>& shape, int64_t bits,
                              bool symmetric, bool packed, int64_t group_size = 0,
                              ScalarType scale_dtype = ScalarType::Float) {
  std::vector<int64_t> code_shape = shape, scale_shape = shape;
  scale_shape.back() = group_size ? scale_shape.back() / group_size : 1;
  if (packed && bits == 4) code_shape.back() /= 2;
  return {new_empty(x, code_shape, symmetric && !packed ? ScalarType::Char : ScalarType::Byte),
          new_empty(x, scale_shape, scale_dtype),
          new_empty(x, symmetric ? std::vector<int64_t>{0} : scale_shape, ScalarType::Byte)};
}

inline RowCodes new_row_codes(const Tensor& x, int64_t bits, bool symmetric, bool packed,
                              int64_t group_size = 0, ScalarType scale_dtype = ScalarType::Float) {
  const auto shape = x.sizes();
  return new_row_codes(x, {shape.begin(), shape.end()}, bits, symmetric, packed, group_size,
                       scale_dtype);
}

// csrc/hadamard_quant.cu, which other ops end with.
std::tuple<Tensor, Tensor, Tensor> hadamard_quant(const Tensor& x,
                                                  const std::optional<Tensor>& signs, int64_t order,
                                                  int64_t inner, int64_t dense, int64_t bits,
                                                  bool symmetric, double clip, bool packed);

}  // namespace lowbit
