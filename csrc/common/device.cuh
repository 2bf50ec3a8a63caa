// SPDX-License-Identifier: Apache-2.0
// What every kernel includes first: CUDA, or the emulator in its place (csrc/emulator/runtime.h).
#pragma once

#include <cstdint>

#ifdef LOWBIT_EMULATE
#include <cmath>
#include <cstring>

#include "emulator/runtime.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace lowbit {

constexpr int kWarp = 32;

// A type known at run time: of what takes little of a kernel's time, or of kernels that do much
// with a row and are compiled once for all three.
enum class FloatType { kFloat, kHalf, kBFloat16 };

template <class To, class From>
__host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
#ifdef LOWBIT_EMULATE
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));  // halves have constructors
  return to;
#else
  return *reinterpret_cast<const To*>(&from);
#endif
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// First in every kernel, but for barriers in shared memory of its own. Launched with
// overlap_launches (sm_90 and later, common/registry.h) its blocks are there before the kernel in
// front of it has ended: until here they may touch nothing that another kernel reads or writes.
// From here on the next kernel's blocks may come.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if !defined(LOWBIT_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// fp32 operations that are never contracted into an FMA: the reference rounds after each.
__device__ __forceinline__ float mul_rn(float a, float b) {
#ifdef LOWBIT_EMULATE
  return a * b;  // compiled with -ffp-contract=off
#else
  return __fmul_rn(a, b);
#endif
}

__device__ __forceinline__ float add_rn(float a, float b) {
#ifdef LOWBIT_EMULATE
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

__device__ __forceinline__ float div_rn(float a, float b) {
#ifdef LOWBIT_EMULATE
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}

__device__ __forceinline__ float sqrt_rn(float a) {
#ifdef LOWBIT_EMULATE
  return sqrtf(a);
#else
  return __fsqrt_rn(a);
#endif
}

template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Round to nearest even; out of range becomes inf.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace lowbit
