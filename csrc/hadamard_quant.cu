// SPDX-License-Identifier: Apache-2.0
// CUDA hadamard_quant. The contract is in lowbit/ops/hadamard_quant.py.
//
// A block has one row, read once and written once as codes; in between it is rotated by
// common/hadamard.cuh, whose header has the map of data to threads and whose steps these are:
//   step 1  load, 16-bit elements as they are
//   step 2  the dense factor of the order on matrix units, on the way through shared memory
//   step 3  butterflies in registers, the range
//   step 4  scale and codes
// Bytes: 2 K in, K or K / 2 out. Bound by memory at best; shared memory moves 12 bytes an element,
// and docs/notes/0003 counts instructions.

#include "common/hadamard_plan.h"

namespace lowbit {
namespace {

struct Plain {
  static constexpr bool kIsStaged = false;
  const void* x;  // [rows, length] of `type`, fp16 or bf16
  FloatType type;

  template <int kUnits>
  __device__ __forceinline__ void load(uint4 (&to)[kUnits], int64_t start,
                                       const uint32_t (&places)[kUnits]) const {
    const uint4* row = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + start);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) to[u] = row[places[u]];
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads) hadamard_quant_kernel(
    Plain source,
    const uint32_t* __restrict__ signs,  // see common/hadamard_dense.cuh, or null
    uint8_t* __restrict__ codes,         // [rows, length], half when packed
    void* __restrict__ scales,           // [rows] fp32
    uint8_t* __restrict__ zero_points,   // [rows], unused when symmetric
    Rotation rotation, IntGrid grid) {
  wait_for_earlier_kernels();
  rotate_and_quantize<Tile>(source, signs, codes, scales, zero_points, rotation, grid);
}

struct Kernels {
  template <class Tile>
  static auto of() {
    return &hadamard_quant_kernel<Tile>;
  }
};

const bool kRegistered = register_rotation_tiles<Kernels>("hadamard_quant");

}  // namespace

std::tuple<Tensor, Tensor, Tensor> hadamard_quant(const Tensor& x,
                                                  const std::optional<Tensor>& signs, int64_t order,
                                                  int64_t inner, int64_t dense, int64_t bits,
                                                  bool symmetric, double clip, bool packed) {
  const int64_t K = x.sizes()[x.sizes().size() - 1];
  check_tensor("hadamard_quant", "x", x, x.scalar_type(), x.numel(), device_of(x));
  RowCodes out = new_row_codes(x, bits, symmetric, packed);
  const RotationArguments arguments{"hadamard_quant",
                                    x,
                                    signs,
                                    K,
                                    order,
                                    inner,
                                    dense,
                                    out,
                                    int_grid(bits, symmetric, clip, packed)};
  const FloatType type = float_type("hadamard_quant", "x", x.scalar_type());
  check(type != FloatType::kFloat, "hadamard_quant: x is fp32, not fp16 or bf16");
  launch_rotation<Kernels>(arguments, Plain{pointer<void>(x), type});
  return {out.codes, out.scales, out.zero_points};
}

}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "hadamard_quant(Tensor x, Tensor? signs, int order, int inner, int dense, int bits, "
      "bool symmetric, float clip, bool packed) -> (Tensor, Tensor, Tensor)");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("hadamard_quant", TORCH_BOX(&lowbit::hadamard_quant)); }
