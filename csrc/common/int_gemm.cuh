// SPDX-License-Identifier: Apache-2.0
// What the kernels of int_gemm share: arguments, fp32 arithmetic and stores of y, and the choice
// between them. The contract is in lowbit/ops/int_gemm.py.
#pragma once

#include "common/fragments.cuh"
#include "common/launch.h"
#include "common/outputs.cuh"

namespace lowbit {

// How the codes of weights and activations lie in memory.
enum class IntGemmKind {
  kBytes4,  // weights `fragment` of 4 bits, activations one a byte
  kBytes8,  // weights `fragment` of 8 bits, activations one a byte
  kInt4,    // weights `fragment_int4`, activations packed: sm_80 to sm_89
};

__host__ __device__ constexpr int fragment_tile_bytes(IntGemmKind kind) {
  return kFragmentTile * kFragmentTile / (kind == IntGemmKind::kBytes8 ? 1 : 2);
}

struct IntGemmArguments {
  const uint8_t* x;              // [M, K], or [M, K / 2] packed
  const float* x_scale;          // [M]
  const uint8_t* x_zero_point;   // [M]; nullptr: symmetric, and x is signed
  const uint8_t* w;              // [ceil(N / 64), ceil(K / 64), fragment_tile_bytes(kind)]
  const uint8_t* w_group_scale;  // [N, K / group_size]; nullptr: one level of scales
  const float* w_scale;          // [N], fp32 of each channel, of one level or of two
  const void* bias;              // [N] of bias_type; nullptr: none
  const void* residual;          // [M, N] of y_type; nullptr: none
  void* y;                       // [M, N] of y_type
  IntGemmKind kind;
  FloatType bias_type, y_type;
  int M, N, K;     // N a multiple of 8, K of 16, or of 32 packed
  int group_size;  // of w_group_scale
  int device;      // and what it is:
  int sm, num_sms;
};

// The kernel of mma.sync, for every architecture: csrc/int_gemm.cu. `like` is a tensor on the
// device, to allocate a workspace.
void int_gemm_mma(const IntGemmArguments& a, const Tensor& like);

// A kernel for one architecture sets this when the library is loaded. It returns false, having done
// nothing, for what it leaves to int_gemm_mma. Initialized before any code runs.
using IntGemmLauncher = bool (*)(const IntGemmArguments& a, const Tensor& like);
inline IntGemmLauncher int_gemm_wgmma = nullptr;  // sm_90: csrc/int_gemm_sm90.cu
inline std::string (*int_gemm_wgmma_plan)(const int64_t* numbers, int num_sms) = nullptr;

// ---- y
// -------------------------------------------------------------------------------------------

// Every operation rounded, in the order of the contract. `acc` is exact: no factor of 16 is left.
__device__ __forceinline__ float scaled(int32_t acc, float w_scale, float x_scale, float bias,
                                        float residual) {
  const float product = mul_rn(mul_rn(static_cast<float>(acc), w_scale), x_scale);
  return add_rn(add_rn(product, bias), residual);
}

// What eight channels n .. n + 7 add to each of their outputs, whichever the token.
struct ChannelTerms {
  float scale[kOutputs], bias[kOutputs];
};

__device__ __forceinline__ ChannelTerms channel_terms(const IntGemmArguments& a, int n) {
  ChannelTerms terms;
  load_outputs(terms.scale, a.w_scale, FloatType::kFloat, n);
  load_outputs(terms.bias, a.bias, a.bias_type, n);
  return terms;
}

// y[m, n .. n + 7] of the exact sums; n a multiple of 8 and below N, m below M.
__device__ __forceinline__ void store_y(const IntGemmArguments& a, const ChannelTerms& terms, int m,
                                        int n, const int32_t (&acc)[kOutputs]) {
  const int64_t index = static_cast<int64_t>(m) * a.N + n;
  const float x_scale = a.x_scale[m];
  float values[kOutputs];
  load_outputs(values, a.residual, a.y_type, index);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    values[i] = scaled(acc[i], terms.scale[i], x_scale, terms.bias[i], values[i]);
  }
  if (a.y_type == FloatType::kFloat) {
    store_outputs_as(static_cast<float*>(a.y) + index, values);
  } else if (a.y_type == FloatType::kHalf) {
    store_outputs_as(static_cast<__half*>(a.y) + index, values);
  } else {
    store_outputs_as(static_cast<__nv_bfloat16*>(a.y) + index, values);
  }
}

}  // namespace lowbit
