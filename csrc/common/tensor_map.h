// SPDX-License-Identifier: Apache-2.0
// What the bulk copy engine knows of a tensor: a kernel parameter, made on the host for each
// launch.
#pragma once

#include <cstdint>

#ifndef LOWBIT_EMULATE
#include <cuda.h>
#endif

namespace lowbit {

#ifdef LOWBIT_EMULATE
struct TensorMap {
  void* base;
  int64_t rows, columns, stride_bytes;
  int element_bytes, box_rows, box_columns;
  bool swizzled;
};
#else
using TensorMap = CUtensorMap;
#endif

// Of a row-major matrix whose elements have 1 or 2 bytes; boxes of at most 256 x 256, elements past
// its ends read as zeros. swizzled: 128-byte rows (common/swizzle.cuh), so box_columns is 128
// bytes. `base`, on `device`, and the row's bytes are multiples of 16. Throws what the driver says.
TensorMap make_tensor_map(int device, const void* base, int element_bytes, int64_t rows,
                          int64_t columns, int box_rows, int box_columns, bool swizzled);

}  // namespace lowbit
