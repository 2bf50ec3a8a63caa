// SPDX-License-Identifier: Apache-2.0
// CUDA silu_mul_hadamard_quant. The contract is in lowbit/ops/silu_mul_hadamard_quant.py.
//
// hadamard_quant.cu of act(gate) * up, which step 1 of common/hadamard.cuh makes as it loads: in a
// loop, through shared memory, since unrolled over all units of a thread the activations would be
// thousands of instructions. The next 8 of each are loaded meanwhile. Order 0 rotates nothing.
// Bytes: 4 K in (8 K for fp32), K or K / 2 out. Bound by memory at best; shared memory moves 8
// bytes an element without a rotation and 16 with a dense factor.

#include "common/hadamard_plan.h"

namespace lowbit {
namespace {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

constexpr float kRootHalf = 0.70710678118654752f;       // sqrt(1 / 2)
constexpr float kRootTwoOverPi = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;                     // of gelu_tanh

// act(g), fp32; accurate functions, IEEE division.
__device__ __forceinline__ void activate(float (&g)[kVector], Activation activation) {
  if (activation == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] = g[i] <= 0.0f ? 0.0f : g[i];  // nan stays
  } else if (activation == Activation::kGelu) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[i] = mul_rn(mul_rn(0.5f, g[i]), add_rn(1.0f, erff(mul_rn(g[i], kRootHalf))));
    }
  } else {
    // g sigmoid(g), and (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3)
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float u = g[i];
      if (activation == Activation::kGeluTanh) {
        u = 2.0f * kRootTwoOverPi * (g[i] + kCubic * g[i] * g[i] * g[i]);
      }
      g[i] = div_rn(g[i], add_rn(1.0f, expf(-u)));
    }
  }
}

struct Gated {
  static constexpr bool kIsStaged = true;
  struct Raw {
    AnyVector gate, up;
  };
  const void* gate;  // [rows, length], rows `stride` elements apart
  const void* up;    // the same
  int64_t stride;
  FloatType type;
  Activation activation;

  __device__ __forceinline__ void fetch(Raw& raw, int64_t at) const {
    raw.gate.load(gate, type, at);
    raw.up.load(up, type, at);
  }

  template <class T>
  __device__ __forceinline__ static void widen(float (&g)[kVector], float (&u)[kVector],
                                               const Raw& raw) {
    raw.gate.template widen_as<T>(g);
    raw.up.template widen_as<T>(u);
  }

  // Of what was fetched; the next, if there is more, is loaded meanwhile.
  __device__ __forceinline__ void finish(float (&to)[kVector], Raw& raw, bool more,
                                         int64_t next) const {
    float other[kVector];
    if (type == FloatType::kFloat) {
      widen<float>(to, other, raw);
    } else if (type == FloatType::kHalf) {
      widen<__half>(to, other, raw);
    } else {
      widen<__nv_bfloat16>(to, other, raw);
    }
    if (more) fetch(raw, next);
    activate(to, activation);
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = mul_rn(to[i], other[i]);
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads) silu_mul_hadamard_quant_kernel(
    Gated source,
    const uint32_t* __restrict__ signs,  // see common/hadamard_dense.cuh, or null
    uint8_t* __restrict__ codes,         // [rows, length], or half when packed
    void* __restrict__ scales,           // [rows] fp32
    uint8_t* __restrict__ zero_points,   // [rows], unused when symmetric
    Rotation rotation, IntGrid grid) {
  wait_for_earlier_kernels();
  rotate_and_quantize<Tile>(source, signs, codes, scales, zero_points, rotation, grid);
}

struct Kernels {
  template <class Tile>
  static auto of() {
    return &silu_mul_hadamard_quant_kernel<Tile>;
  }
};

Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  check(name == "silu", "silu_mul_hadamard_quant: no activation " + name);
  return Activation::kSilu;
}

std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quant(const Tensor& gate, const Tensor& up,
                                                           const std::optional<Tensor>& signs,
                                                           int64_t order, int64_t dense,
                                                           const std::string& activation,
                                                           int64_t bits, bool symmetric,
                                                           double clip, bool packed) {
  const int64_t K = gate.sizes()[gate.sizes().size() - 1];
  const int device = device_of(gate);
  const char* op = "silu_mul_hadamard_quant";
  const int64_t stride = check_rows(op, "gate", gate, gate.scalar_type(), device);
  check(
      check_rows(op, "up", up, gate.scalar_type(), device) == stride && up.numel() == gate.numel(),
      op, ": up must lie as gate does");
  RowCodes out = new_row_codes(gate, bits, symmetric, packed);
  const RotationArguments arguments{op,
                                    gate,
                                    signs,
                                    K,
                                    order ? order : 1,
                                    1,
                                    dense,
                                    out,
                                    int_grid(bits, symmetric, clip, packed)};
  launch_rotation<Kernels>(
      arguments, Gated{pointer<void>(gate), pointer<void>(up), stride,
                       float_type(op, "gate", gate.scalar_type()), activation_named(activation)});
  return {out.codes, out.scales, out.zero_points};
}

const bool kRegistered = register_rotation_tiles<Kernels>("silu_mul_hadamard_quant");

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "silu_mul_hadamard_quant(Tensor gate, Tensor up, Tensor? signs, int order, int dense, "
      "str activation, int bits, bool symmetric, float clip, bool packed) "
      "-> (Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) {
  m.impl("silu_mul_hadamard_quant", TORCH_BOX(&lowbit::silu_mul_hadamard_quant));
}
