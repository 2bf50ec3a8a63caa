// SPDX-License-Identifier: Apache-2.0
#include "common/tensor_map.h"

#include "common/launch.h"

namespace lowbit {

#ifdef LOWBIT_EMULATE

TensorMap make_tensor_map(int, const void* base, int element_bytes, int64_t rows, int64_t columns,
                          int box_rows, int box_columns, bool swizzled) {
  const int64_t stride_bytes = columns * element_bytes;
  check(reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_bytes % 16 == 0,
        "a tensor map needs rows that start at multiples of 16 bytes");
  check(box_rows <= 256 && box_columns <= 256, "a tensor map's box is at most 256 x 256");
  check(!swizzled || box_columns * element_bytes == 128, "a swizzled row is 128 bytes");
  return {const_cast<void*>(base), rows,     columns,     stride_bytes,
          element_bytes,           box_rows, box_columns, swizzled};
}

#else

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library does not link to the driver.
Encode encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  check(status == cudaSuccess && found == cudaDriverEntryPointSuccess,
        "the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap make_tensor_map(int device, const void* base, int element_bytes, int64_t rows,
                          int64_t columns, int box_rows, int box_columns, bool swizzled) {
  static const Encode encode = encode_function();
  // The driver reads the thread's CUDA context, which a thread that has not used CUDA lacks, even
  // where `device` is its current one: cudaSetDevice creates it.
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaError_t selected = cudaSetDevice(device);
  check(selected == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(selected));
  TensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns * element_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode(
      &map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, "a tensor map of ", rows, " x ", columns, " elements of ",
        element_bytes, " bytes was refused, CUDA driver error ", static_cast<int>(status));
  return map;
}

#endif

}  // namespace lowbit
