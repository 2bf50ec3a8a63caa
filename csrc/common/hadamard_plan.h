// SPDX-License-Identifier: Apache-2.0
// Host side of common/hadamard.cuh: which tile rotates a row, and with which strides.
// lowbit/ops/cuda_rotation.py (`dense_for_cuda`) chooses `dense` so that there is one.
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

// Where the butterflies without a dense factor are.
template <class Tile>
bool plan_butterflies(Rotation& r, int bits, int inner) {
  r.columns = r.length;
  r.low_bits = inner == 1 ? std::min(bits, 3) : 0;
  const int first = std::min(bits - r.low_bits, Tile::kUnitBits), last = bits - r.low_bits - first;
  r.exchange = last > 0;
  r.first = strides(first, (inner << bits) >> first, r.length);
  // low bits cover 8 neighbours, and so does `inner` where there are none
  r.last = r.exchange ? strides(last, inner == 1 ? kVector : inner, r.length) : r.first;
  return last <= Tile::kUnitBits;
}

// Which warp has which share of the dense factor, and where the butterflies are.
template <class Tile>
bool plan_product(Rotation& r, int bits, int inner) {
  const bool too_tall = Tile::kM > 1 && r.dense <= 8 * Tile::kM;
  r.columns = inner << bits;
  if (too_tall || r.columns % kVector || (inner > 1 && bits > 0)) return false;
  r.groups = r.columns / kVector;
  r.raw_pitch = r.groups | 1;
  r.blocks = r.length / (r.dense * r.columns);
  const bool several = Tile::kN % r.groups == 0;  // blocks in a share
  r.group_bits = several ? log2_of(r.groups) : Tile::kGroupBits;
  r.m_shares = ceil_div(r.dense, 16 * Tile::kM);
  r.n_shares = ceil_div(r.groups, 1 << r.group_bits);
  r.by_m_shares = divisor(r.m_shares), r.by_n_shares = divisor(r.n_shares);
  r.shares = ceil_div(r.blocks, Tile::kN >> r.group_bits) * r.n_shares * r.m_shares;
  r.mixed = inner == 1;
  r.sylvester = r.dense == 16 * Tile::kM;
  const int last = r.mixed ? log2_of(r.groups) - r.group_bits : 0;
  r.last = strides(last, r.columns >> last, r.length);
  return last <= Tile::kUnitBits && r.shares * kWarp <= Tile::kMaxThreads;
}

// How this tile rotates rows of `length` by order / dense butterflies; nothing if it cannot.
template <class Tile>
std::optional<RotationPlan> plan_rotation(int length, int order, int inner, int dense) {
  const int bits = log2_of(order / dense);
  Rotation r = {};
  r.length = length, r.dense = dense;
  r.factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(order)));
  if ((dense > 1) != (Tile::kM > 0) || length > Tile::kLongest) return {};
  if constexpr (Tile::kM > 0) {
    if (!plan_product<Tile>(r, bits, inner)) return {};
  } else {
    if (!plan_butterflies<Tile>(r, bits, inner)) return {};
  }
  r.pitch = pitch_of(r.columns);
  r.by_columns = divisor(r.columns / kVector);
  const int warps = std::max(r.shares, ceil_div(length, Tile::kUnits * kVector * kWarp));
  return RotationPlan{r, warps * kWarp, kRowOffset + length / r.columns * r.pitch * 16};
}

// Applies `visit` to the tiles in order of preference: without a product, then of 64, 32, 16 rows a
// warp, since a warp that has more rows reads fewer columns.
#define LOWBIT_ROTATION_TILES(visit) \
  visit(0, 0, 4, 1024) visit(4, 4, 8, 512) visit(2, 8, 8, 512) visit(1, 8, 4, 512)

// Of the longest row in the columns that leave the widest gaps, as far as a block can have it.
template <class Tile>
int largest_smem_bytes(int longest) {
  longest = std::min(Tile::kLongest, longest);
  int slots = pitch_of(longest);
  if constexpr (Tile::kM > 0) {
    for (int columns = kVector; columns <= longest / 2; columns += kVector) {
      slots = std::max(slots, longest / columns * pitch_of(columns));
    }
  }
  return std::min(kRowOffset + slots * 16, kLargestSmem);
}

// Registers Kernels::of<Tile>() of every tile, for rows up to `longest` and blocks of
// `most_threads`.
template <class Kernels>
bool register_rotation_tiles(const char* op, int longest = kLongestRow, int most_threads = 1024) {
#define LOWBIT_VISIT(m, n, units, threads)                                                   \
  {                                                                                          \
    using Tile = RotationTile<m, n, units, threads>;                                         \
    const auto kernel = Kernels::template of<Tile>();                                        \
    register_kernel({op, #m "x" #n "_" #threads, reinterpret_cast<const void*>(kernel),      \
                     std::min(threads, most_threads), largest_smem_bytes<Tile>(longest), 80, \
                     120});                                                                  \
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

// Launches Kernels::of<Tile>() for the first tile that can.
template <class Kernels, class Source>
void launch_rotation(const RotationArguments& a, const Source& source) {
  const int64_t rows = a.x.numel() / a.length;
  check(a.length <= kLongestRow && a.length % kVector == 0, a.op,
        ": rows must be whole vectors of ", kVector, ", at most ", kLongestRow);
  check(a.order > 0 && a.inner > 0 && a.dense > 0 && a.order % a.dense == 0 &&
            a.length % (a.order * a.inner) == 0 &&
            (a.order / a.dense & (a.order / a.dense - 1)) == 0,
        a.op, ": order ", a.order, " is not ", a.dense, " times a power of two");
  check(a.inner == 1 || a.inner % kVector == 0, a.op, ": inner must be 1 or whole vectors");
  check((a.dense > 1) == a.signs.has_value(), a.op, ": signs must be given with dense");
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
  check(false, a.op, ": no kernel for rows of ", a.length, ", order ", a.order, " = ", a.dense,
        " x ", a.order / a.dense, ", inner ", a.inner);
}

}  // namespace lowbit
