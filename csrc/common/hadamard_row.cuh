// SPDX-License-Identifier: Apache-2.0
// A row that is rotated: in shared memory, in registers, and butterflies there.
// common/hadamard.cuh has the whole.
//
// Shared memory holds [blocks * dense, columns] (one row when dense is 1), after the dense factor,
// or for want of one, in fp32 in slots of 16 bytes. Slot s of a row lies at s ^ (s / 8 % 8), and
// the pitch is 2 slots past a multiple of 4: neighbours 32 bytes apart, and the fragments' rows and
// columns, then fall on different banks. Rows of 16-bit elements, for the dense factor, lie in the
// same place in slots of 8 elements, in an odd pitch: 8 rows of a slot fall on different banks.
#pragma once

#include <type_traits>

#include "common/quantizer.cuh"

namespace lowbit {

constexpr int kSlot = 4;  // fp32 in 16 bytes
constexpr int kLongestRow = 32768;

// n / divisor for n < 4096, divisor <= 4096: magic = ceil(2^24 / divisor) is less than
// divisor / 2^24 too large, which n makes less than 1 / divisor.
struct Divisor {
  uint32_t magic;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n << 8) * magic) >> 32);
  }
};

__host__ inline Divisor divisor(int d) { return {((1u << 24) + d - 1) / d}; }

__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Which units, 8 neighbours each, a thread has: of every blockDim-th group of 2^bits, `stride`
// units apart, all. So its units u that differ in the lowest `bits` are each other's partners.
// Past the end a thread has the last group again: it does what another does, and no branches.
struct Strides {
  int bits;
  uint32_t stride, groups;
  Divisor by_stride;
};

// The same with kBits known to the compiler, which then computes a group's place once; -1: not.
template <int kBits>
struct Units {
  const Strides& strides;

  __device__ __forceinline__ uint32_t partner(int u) const {
    return u & ((1u << (kBits < 0 ? strides.bits : kBits)) - 1);
  }
  __device__ __forceinline__ uint32_t group(int u) const {
    return smaller(unbounded(u), strides.groups - 1);
  }
  __device__ __forceinline__ bool has(int u) const { return unbounded(u) < strides.groups; }

  // Units of the row: the first of a group, and how far behind it u is.
  __device__ __forceinline__ uint32_t first(int u) const {
    const uint32_t mask = (1u << (kBits < 0 ? strides.bits : kBits)) - 1;
    return strides.by_stride.quotient(group(u)) * mask * strides.stride + group(u);
  }
  __device__ __forceinline__ uint32_t offset(int u) const { return partner(u) * strides.stride; }
  __device__ __forceinline__ uint32_t unit(int u) const { return first(u) + offset(u); }

 private:
  __device__ __forceinline__ uint32_t unbounded(int u) const {
    const int bits = kBits < 0 ? strides.bits : kBits;
    return (static_cast<uint32_t>(u) >> bits) * blockDim.x + threadIdx.x;
  }
};

struct Rotation {
  int length;          // of a row
  float factor;        // 1 / sqrt(order)
  int columns;         // of a row of shared memory
  int pitch;           // of it, in slots
  Divisor by_columns;  // in units
  Strides last;        // butterflies at the end, of units
  // without a dense factor
  int low_bits;   // among 8 neighbours
  Strides first;  // before the exchange; without one that of last
  bool exchange;
  // with a dense factor: common/hadamard_dense.cuh
  int dense, blocks;  // the order of the +-1 matrix, how many of it are in a row
  int groups;         // columns / 8
  int raw_pitch;      // of rows of 16-bit elements, in slots of 8
  int group_bits;     // of a share's fragments, how many are in one block
  bool mixed;         // columns are rotated: inner is 1
  bool sylvester;     // a power of two, whose rows are those of a share
  int shares;         // warps' shares of the product
  Divisor by_m_shares, by_n_shares;
  int m_shares, n_shares;
};

// kM x kN fragments of 16 x 8 are a warp's share of the dense product; kM 0: there is none.
template <int kM_, int kN_, int kUnits_, int kMaxThreads_>
struct RotationTile {
  static constexpr int kM = kM_, kN = kN_, kUnits = kUnits_, kMaxThreads = kMaxThreads_;
  static constexpr int kUnitBits = kUnits == 8 ? 3 : 2;
  static constexpr int kLongest = kMaxThreads * kUnits * kVector;
  static constexpr int kGroupBits = kN == 8 ? 3 : 2;  // of the kN groups of 8 columns
  static_assert(kN == 0 || 1 << kGroupBits == kN, "4 or 8 groups");
  static_assert(1 << kUnitBits == kUnits, "4 or 8 units");
};

// Shared memory: first a Range for each warp, then 16 bytes of zeros, then the row.
constexpr int kZerosOffset = kWarp * static_cast<int>(sizeof(Range)), kRowOffset = 512;
static_assert(kRowOffset >= kZerosOffset + 16, "a block has 32 warps at most");

__device__ __forceinline__ float4* row_slots() {
  return reinterpret_cast<float4*>(dynamic_smem() + kRowOffset);
}

__device__ __forceinline__ uint32_t slots_address() { return smem_address(row_slots()); }

// Of fp16 or bf16.
template <int kUnits>
__device__ __forceinline__ void widen_units(float (&x)[kUnits][kVector], const uint4 (&raw)[kUnits],
                                            FloatType type) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    AnyVector vector;
    vector.words[0] = raw[u];
    if (type == FloatType::kHalf) {
      vector.template widen_as<__half>(x[u]);
    } else {
      vector.template widen_as<__nv_bfloat16>(x[u]);
    }
  }
}

// Where slot `slot` of a row of shared memory lies.
__device__ __forceinline__ uint32_t slot_at(const Rotation& r, uint32_t row, uint32_t slot) {
  return row * r.pitch + (slot ^ ((slot >> 3) & 7));
}

// Where the first slot lies of the unit `offset` behind unit `first`, in its row of shared memory;
// the second slot is at ^ 1.
__device__ __forceinline__ uint32_t unit_at(const Rotation& r, uint32_t first, uint32_t offset) {
  const uint32_t row = r.by_columns.quotient(first);
  return slot_at(r, row, (first - row * (r.columns / kVector) + offset) * 2);
}

__device__ __forceinline__ void store_unit(float4* slots, uint32_t at, const float (&x)[kVector]) {
  slots[at] = make_float4(x[0], x[1], x[2], x[3]);
  slots[at ^ 1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void zero_unit(float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = 0.0f;
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = add_rn(a, b), difference = add_rn(a, -b);
  a = sum;
  b = difference;
}

// Stages kFirst <= k < kBits: in straight lines, as a branch around each would cost moves to put
// the results where they were.
template <int kFirst, int kBits, int kUnits>
__device__ __forceinline__ void low_stages(float (&x)[kUnits][kVector]) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int k = kFirst; k < kBits; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if ((i >> k & 1) == 0) butterfly(x[u][i], x[u][i | 1 << k]);
      }
    }
  }
}

template <int kBits, int kUnits>
__device__ __forceinline__ void strided_stages(float (&x)[kUnits][kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int k = 0; k < kBits; ++k) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if ((u >> k & 1) == 0) butterfly(x[u][i], x[u | 1 << k][i]);
      }
    }
  }
}

// Among 8 neighbours.
template <int kUnits>
__device__ __forceinline__ void low_butterflies(float (&x)[kUnits][kVector], int bits) {
  if (bits == 3) {
    low_stages<0, 3>(x);
  } else {  // rare: small orders, and rows of heads, which have none
    if (bits == 2) low_stages<0, 2>(x);
    if (bits == 1) low_stages<0, 1>(x);
  }
}

// body(std::integral_constant<int, bits>), bits 0 to kMost. One of them runs, as the compiler
// knows: what all of them write is not kept from before.
template <int kMost, class Body>
__device__ __forceinline__ void with_bits(int bits, const Body& body) {
  if constexpr (kMost == 0) {
    body(std::integral_constant<int, 0>());
  } else if (bits == kMost) {
    body(std::integral_constant<int, kMost>());
  } else {
    with_bits<kMost - 1>(bits, body);
  }
}

template <int kUnits, int kBits>
__device__ __forceinline__ void load_units(float (&x)[kUnits][kVector], const Rotation& r,
                                           const Units<kBits>& units) {
  const uint32_t slots = slots_address();
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const uint32_t at = slots + unit_at(r, units.first(u), units.offset(u)) * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 raw = load_shared_16(at ^ (half * 16));
      x[u][4 * half] = bit_cast<float>(raw.x), x[u][4 * half + 1] = bit_cast<float>(raw.y);
      x[u][4 * half + 2] = bit_cast<float>(raw.z), x[u][4 * half + 3] = bit_cast<float>(raw.w);
    }
  }
}

}  // namespace lowbit
