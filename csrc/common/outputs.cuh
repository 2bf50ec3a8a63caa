// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring channels of a token in any float type, 16 bytes a load or store: what the
// epilogues of the GEMMs read and write.
#pragma once

#include "common/device.cuh"

namespace lowbit {

constexpr int kOutputs = 8;  // neighbouring channels of one token: what a thread stores at a time

// Stands for a bias or residual that is not there: x + -0 is x for every x, -0 included.
constexpr float kAbsent = -0.0f;

template <class T>
__device__ __forceinline__ void load_outputs_as(float (&values)[kOutputs], const T* from) {
  constexpr int kLoads = sizeof(T) * kOutputs / 16;
  uint4 raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
  const T* elements = reinterpret_cast<const T*>(raw);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) values[i] = to_float(elements[i]);
}

// from[index .. index + 7], index a multiple of 8; `from` nullptr: kAbsent.
__device__ __forceinline__ void load_outputs(float (&values)[kOutputs], const void* from,
                                             FloatType type, int64_t index) {
  if (from == nullptr) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) values[i] = kAbsent;
  } else if (type == FloatType::kFloat) {
    load_outputs_as(values, static_cast<const float*>(from) + index);
  } else if (type == FloatType::kHalf) {
    load_outputs_as(values, static_cast<const __half*>(from) + index);
  } else {
    load_outputs_as(values, static_cast<const __nv_bfloat16*>(from) + index);
  }
}

template <class T>
__device__ __forceinline__ void store_outputs_as(T* to, const float (&values)[kOutputs]) {
  constexpr int kStores = sizeof(T) * kOutputs / 16;
  uint4 raw[kStores];
  T* elements = reinterpret_cast<T*>(raw);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) elements[i] = from_float<T>(values[i]);
#pragma unroll
  for (int i = 0; i < kStores; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
}

}  // namespace lowbit
