// SPDX-License-Identifier: Apache-2.0
// Host side of common/hadamard.cuh: which tile rotates a row, and with which strides.
// lowbit/ops/hadamard_quant.py (`dense_for_cuda`) chooses `dense` so that there is one.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/hadamard.cuh"
#include "common/row_codes.h"

namespace lowbit {

struct RotationPlan {
  Rotation rotation;
  int threads, smem_bytes;
};

constexpr int kLargestSmem = 227 * 1024;  // of a block, on sm_90 and sm_100

inline int log2_of(int64_t n) {
  int bits = 0;
  while (n > 1ll << bits) ++bits;
  return bits;
}

// Without butterflies units are in their order, as if they were one unit apart.
inline Strides strides(int bits, int stride, int length) {
  const int units = bits == 0 ? 1 : stride / kVector;
  return {bits, static_cast<uint32_t>(units), static_cast<uint32_t>(length / kVector >> bits),
          divisor(units)};
}

// Of a row of shared memory: such that 4 neighbouring rows begin on different banks, and with room
// for the slots' exchange in eights where there are as many.
inline int pitch_of(int columns) {
  const int slots = columns / kSlot;
  return slots < 8 ? slots + (slots % 4 == 0 ? 2 : 0) : ceil_div(slots, 8) * 8 + 2;
}

// How this tile rotates rows of `length` by order / dense butterflies; nothing if it cannot.
template <class Tile>
std::optional<RotationPlan> plan_rotation(int length, int order, int inner, int dense) {
  constexpr int kUnitBits = Tile::kUnitBits;
  const int columns = order / dense * inner, bits = log2_of(order / dense);
  if ((dense > 1) != (Tile::kM > 0) || length > Tile::kLongest) return {};
  if (dense > 1 && columns % kVector) return {};

  Rotation r = {};
  r.length = length, r.dense = dense;
  r.columns = dense > 1 ? columns : length;
  r.pitch = pitch_of(r.columns);
  r.by_columns = divisor(r.columns / kVector);
  r.low_bits = inner == 1 ? std::min(bits, 3) : 0;
  const int first = std::min(bits - r.low_bits, kUnitBits);
  int last = bits - r.low_bits - first;
  r.middle = Tile::kN == 8 && inner == 1 && last > 0;
  last -= r.middle;
  if (last > kUnitBits) return {};
  r.exchange = dense > 1 || last > 0;
  r.first = strides(first, columns >> first, length);
  // low bits cover 8 neighbours, and so does `inner` where there are none
  r.last = r.exchange ? strides(last, (inner == 1 ? kVector : inner) << r.middle, length) : r.first;
  r.factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(order)));

  int warps = ceil_div(length, Tile::kUnits * kVector * kWarp);
  if constexpr (Tile::kM > 0) {
    r.m_shares = ceil_div(dense, 16 * Tile::kM);
    r.n_shares = ceil_div(columns, Tile::kColumns);
    r.shares = length / (dense * columns) * r.m_shares * r.n_shares;
    r.split = r.m_shares > 1;
    if (r.split && r.shares * kWarp > Tile::kMaxThreads) return {};
    warps = std::max(warps, std::min(r.shares, Tile::kMaxThreads / kWarp));
  }
  const int rows = length / r.columns;
  return RotationPlan{r, warps * kWarp, kRowOffset + rows * r.pitch * 16};
}

// Applies `visit` to the tiles in order of preference: one product of 16 rows a warp, of 32, or of
// 128 but of fewer columns, beside the tile without a product.
#define LOWBIT_ROTATION_TILES(visit) \
  visit(0, 0, 4, 1024) visit(1, 8, 4, 512) visit(2, 8, 8, 512) visit(8, 2, 8, 512)

// Of the longest row in the columns that leave the widest gaps, as far as a block can have it.
template <class Tile>
int largest_smem_bytes() {
  const int longest = std::min(Tile::kLongest, kLongestRow);
  int slots = pitch_of(longest);
  if constexpr (Tile::kM > 0) {
    for (int columns = kVector; columns <= longest / 2; columns += kVector) {
      slots = std::max(slots, longest / columns * pitch_of(columns));
    }
  }
  return std::min(kRowOffset + slots * 16, kLargestSmem);
}

// Registers Kernels::of<Tile>() of every tile.
template <class Kernels>
bool register_rotation_tiles(const char* op) {
#define LOWBIT_VISIT(m, n, units, threads)                                                       \
  {                                                                                              \
    using Tile = RotationTile<m, n, units, threads>;                                             \
    const auto kernel = Kernels::template of<Tile>();                                            \
    register_kernel({op, #m "x" #n "_" #threads, reinterpret_cast<const void*>(kernel), threads, \
                     largest_smem_bytes<Tile>(), 80, 120});                                      \
  }
  LOWBIT_ROTATION_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  return true;
}

struct RotationArguments {
  const char* op;
  const Tensor& x;
  const std::optional<Tensor>& signs;
  int64_t length, order, inner, dense;
  RowCodes& out;
  IntGrid grid;
};

inline ElementType element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFp32;
    case ScalarType::Half:
      return ElementType::kFp16;
    default:
      check(x.scalar_type() == ScalarType::BFloat16, text(op, ": not fp32, fp16 or bf16"));
      return ElementType::kBf16;
  }
}

// Launches Kernels::of<Tile>() for the first tile that can.
template <class Kernels, class Source>
void launch_rotation(const RotationArguments& a, const Source& source) {
  const int64_t rows = a.x.numel() / a.length;
  check(a.length <= kLongestRow && a.length % kVector == 0,
        text(a.op, ": rows must be whole vectors of ", kVector, ", at most ", kLongestRow));
  check(a.order > 0 && a.inner > 0 && a.dense > 0 && a.order % a.dense == 0 &&
            a.length % (a.order * a.inner) == 0 &&
            (a.order / a.dense & (a.order / a.dense - 1)) == 0,
        text(a.op, ": order ", a.order, " is not ", a.dense, " times a power of two"));
  check(a.inner == 1 || a.inner % kVector == 0, text(a.op, ": inner must be 1 or whole vectors"));
  check((a.dense > 1) == a.signs.has_value(), text(a.op, ": signs must be given with dense"));
  if (a.signs.has_value()) {
    const int64_t words = ceil_div<int64_t>(a.dense, 16) * ceil_div<int64_t>(a.dense, 64) * kWarp;
    check_tensor(a.op, "signs", *a.signs, ScalarType::Int, words, device_of(a.x), 4);
  }
  const auto launch_with = [&](const RotationPlan& plan, auto kernel) {
    launch({a.op, text("M=", rows, " K=", a.length, " order=", a.order, " inner=", a.inner),
            device_of(a.x), dim3(static_cast<unsigned>(rows)), plan.threads, plan.smem_bytes},
           kernel, source, pointer<const uint32_t>(a.signs), pointer<uint8_t>(a.out.codes),
           pointer<void>(a.out.scales), pointer<uint8_t>(a.out.zero_points), plan.rotation, a.grid);
  };
#define LOWBIT_VISIT(m, n, units, threads)                                                     \
  if (const auto plan = plan_rotation<RotationTile<m, n, units, threads>>(a.length, a.order,   \
                                                                          a.inner, a.dense)) { \
    return launch_with(*plan, Kernels::template of<RotationTile<m, n, units, threads>>());     \
  }
  LOWBIT_ROTATION_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  check(false, text(a.op, ": no kernel for rows of ", a.length, ", order ", a.order, " = ", a.dense,
                    " x ", a.order / a.dense, ", inner ", a.inner));
}

}  // namespace lowbit
