// SPDX-License-Identifier: Apache-2.0
// Rotation of a row by a Hadamard matrix. The contract is in lowbit/ops/hadamard.py.
//
// order = dense * 2^bits, so that a row is [A, dense, columns], columns = 2^bits * inner, and
//   H_order = H_dense (x) H_2^bits
// H_dense, +-1, is multiplied on matrix units: a number is the sum of three bf16, its upper, middle
// and lower 8 bits of mantissa, and +-1 is a bf16. The bits are butterflies, each wherever its two
// numbers are in one thread:
//   low      strides 1, 2, 4 within the 8 neighbours that a thread loads          (inner 1)
//   first    the largest strides, among the kUnits loads of a thread
//   middle   stride 8, between the two columns of a fragment                      (inner 1, kN 8)
//   last     the others, among the kUnits units that a thread takes from shared memory
// Between first, dense and last the row, fp32, is exchanged through shared memory.
//
// Shared memory: [A * dense, pitch] fp32 (one row when dense is 1), in slots of 16 bytes. Slot s of
// a row lies at s ^ (s / 8 % 8), and the pitch is 2 slots past a multiple of 4: neighbours 32 bytes
// apart, and the fragments' rows and columns, then fall on different banks.
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

// Which units, 8 neighbours each, a thread has: of every blockDim-th group of 2^bits, `stride`
// units apart, all. So its units u that differ in the lowest `bits` are each other's partners.
struct Strides {
  int bits;
  uint32_t stride, groups;
  Divisor by_stride;
};

constexpr uint32_t kNoUnit = ~0u;

// The same with kBits known to the compiler, which then computes a group's place once; -1: not.
template <int kBits>
struct Units {
  const Strides& strides;

  __device__ __forceinline__ uint32_t partner(int u) const {
    return u & ((1u << (kBits < 0 ? strides.bits : kBits)) - 1);
  }
  __device__ __forceinline__ uint32_t group(int u) const {
    const int bits = kBits < 0 ? strides.bits : kBits;
    return (static_cast<uint32_t>(u) >> bits) * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ bool has(int u) const { return group(u) < strides.groups; }

  // Units of the row: the first of a group, and how far behind it u is.
  __device__ __forceinline__ uint32_t first(int u) const {
    const uint32_t mask = (1u << (kBits < 0 ? strides.bits : kBits)) - 1;
    return strides.by_stride.quotient(group(u)) * mask * strides.stride + group(u);
  }
  __device__ __forceinline__ uint32_t offset(int u) const { return partner(u) * strides.stride; }
  __device__ __forceinline__ uint32_t unit(int u) const { return first(u) + offset(u); }
};

struct Rotation {
  int length;          // of a row
  int dense;           // the order of the +-1 matrix; 1: none
  int columns;         // of a row of shared memory
  int pitch;           // of it, in slots
  Divisor by_columns;  // in units
  int low_bits;
  Strides first, last;  // one and the same where nothing is exchanged
  bool exchange, middle;
  int m_shares, n_shares, shares;  // warps' shares of the dense product: of a block, and of the row
  bool split;                      // a column belongs to several warps: m_shares is not 1
  float factor;
};

// kM x kN fragments of 16 x 8 are a warp's share of the dense product; kM 0: there is none.
template <int kM_, int kN_, int kUnits_, int kMaxThreads_>
struct RotationTile {
  static constexpr int kM = kM_, kN = kN_, kUnits = kUnits_, kMaxThreads = kMaxThreads_;
  static constexpr int kColumns = kN == 0 ? 1 : 8 * kN;
  static constexpr int kUnitBits = kUnits == 8 ? 3 : 2;
  static constexpr int kLongest = kMaxThreads * kUnits * kVector;
  static_assert(kN == 0 || kN == 2 || kN == 8, "a lane's columns are 8 or 32 bytes");
  static_assert(1 << kUnitBits == kUnits, "4 or 8 units");
};

// Shared memory: first a Range for each warp, then the row.
constexpr int kRowOffset = 512;
static_assert(kRowOffset >= kWarp * static_cast<int>(sizeof(Range)),
              "a block has 32 warps at most");

__device__ __forceinline__ float4* row_slots() {
  return reinterpret_cast<float4*>(dynamic_smem() + kRowOffset);
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

__device__ __forceinline__ void load_unit(float (&x)[kVector], const float4* slots, uint32_t at) {
  const float4 low = slots[at], high = slots[at ^ 1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
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

// Stages k < kBits: in straight lines, as a branch around each would cost moves to put the results
// where they were.
template <int kBits, int kUnits>
__device__ __forceinline__ void low_stages(float (&x)[kUnits][kVector]) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int k = 0; k < kBits; ++k) {
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
    low_stages<3>(x);
  } else {  // rare: small orders, and rows of heads, which have none
    if (bits == 2) low_stages<2>(x);
    if (bits == 1) low_stages<1>(x);
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

// ---- the dense factor --------------------------------------------------------------------------
//
// d[m, n] = sum over k of H[m, k] x[k, n]: A is H, k and m are rows of shared memory, n columns.
// Which row is k is free, as long as A agrees: k = 8 i + 2 t + h of a lane is row 8 i + t + 4 h, so
// that the four t of a load are neighbouring rows. Which column is n of fragment j is free too:
//   kN 8   8 n + (j ^ 4 (n & 1))   a lane loads 8 neighbours, odd n the second four first
//   kN 2   2 n + j
// `signs` has one bit a sign (1: -1): bit 15 - s + 16 h of word [m / 16][k / 64][lane], with
// s = 4 (k / 16 % 4) + i, is half h of A register i, so that a shift by s brings both halves' bits
// to their places.

constexpr uint32_t kBf16x2_One = 0x3F80'3F80, kBf16x2_Sign = 0x8000'8000;
constexpr uint32_t kBf16Bits = 0xFFFF'0000;  // of fp32

__device__ __forceinline__ uint32_t sign_fragment(uint32_t word, int k, int i) {
  return kBf16x2_One | ((word << (4 * (k % 4) + i)) & kBf16x2_Sign);
}

// b[term] of two numbers of a column, the first in the lower half.
__device__ __forceinline__ void cut(uint32_t (&b)[3], float x0, float x1) {
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    const uint32_t bits0 = bit_cast<uint32_t>(x0), bits1 = bit_cast<uint32_t>(x1);
    b[term] = upper_halves(bits0, bits1);
    x0 = add_rn(x0, -bit_cast<float>(bits0 & kBf16Bits));  // exact; nan for inf, as the row is then
    x1 = add_rn(x1, -bit_cast<float>(bits1 & kBf16Bits));
  }
}

// The share that begins at row `first_m` and column `first_n` of block `block` of the row.
template <class Tile>
__device__ __forceinline__ void multiply(float (&d)[Tile::kM][Tile::kN][4], const float4* slots,
                                         const uint32_t* __restrict__ signs, const Rotation& r,
                                         int block, int first_m, int first_n) {
  constexpr int kM = Tile::kM, kN = Tile::kN, kAtOnce = kN < 4 ? kN : 4;  // fragments a load
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int m_tiles = ceil_div(r.dense, 16), k_words = ceil_div(r.dense, 64);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kN; ++j) d[m][j][0] = d[m][j][1] = d[m][j][2] = d[m][j][3] = 0.0f;
  }
  const int column = first_n + g * kN;
  const int first_row = block * r.dense + t;
  constexpr bool kHoist = kM == 1;  // A of a k serves several pairs of columns
  uint32_t words[kM] = {}, hoisted[kHoist ? kM : 1][4];
#pragma unroll 1
  for (int k = 0; k < m_tiles; ++k) {
    if (k % 4 == 0) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int tile = first_m / 16 + m;
        if (tile < m_tiles) words[m] = signs[(tile * k_words + k / 4) * kWarp + lane_id()];
      }
    }
    if constexpr (kHoist) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) hoisted[m][i] = sign_fragment(words[m], k, i);
      }
    }
#pragma unroll
    for (int half = 0; half < kN / kAtOnce; ++half) {
      // x of rows t, t + 4, t + 8 and t + 12, and kAtOnce columns
      const int at = column + 4 * (half ^ (kN == 8 ? g & 1 : 0));
      const int slot = slot_at(r, 0, at / kSlot);
      float x[4][kAtOnce];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = k * 16 + 4 * i;
        const float4* from = slots + slot_at(r, first_row + row, 0) + slot;
        const bool valid = row + t < r.dense && column < r.columns;
        if constexpr (kN == 8) {
          float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (valid) v = *from;
          x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
        } else {
          float2 v = make_float2(0.0f, 0.0f);
          if (valid) v = reinterpret_cast<const float2*>(from)[g & 1];
          x[i][0] = v.x, x[i][1] = v.y;
        }
      }
#pragma unroll
      for (int pair = 0; pair < kAtOnce; pair += 2) {
        uint32_t b[3][2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t terms[3];
            cut(terms, x[2 * i][pair + j], x[2 * i + 1][pair + j]);
#pragma unroll
            for (int term = 0; term < 3; ++term) b[term][j][i] = terms[term];
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if (first_m / 16 + m < m_tiles) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[i] = kHoist ? hoisted[m][i] : sign_fragment(words[m], k, i);
            }
#pragma unroll
            for (int term = 0; term < 3; ++term) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                mma_bf16(d[m][half * kAtOnce + pair + j], a, b[term][j]);
              }
            }
          }
        }
      }
    }
  }
}

// The products to where their factors were; with kMiddle after butterflies of stride 8.
template <class Tile, bool kMiddle>
__device__ __forceinline__ void store_products(float4* slots, float (&d)[Tile::kM][Tile::kN][4],
                                               const Rotation& r, int block, int first_m,
                                               int first_n) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_m + 16 * m + g + 8 * half;
      const int column = first_n + 2 * t * Tile::kN;  // n = 2 t, and 2 t + 1 beside it
      if (row >= r.dense || column >= r.columns) continue;
      const int at = block * r.dense + row;
      if constexpr (Tile::kN == 8) {
        float x[2][kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          x[0][i] = d[m][i][2 * half];
          x[1][i] = d[m][i ^ 4][2 * half + 1];
          if constexpr (kMiddle) butterfly(x[0][i], x[1][i]);
        }
        store_unit(slots, slot_at(r, at, column / kSlot), x[0]);
        if (column + 8 < r.columns) store_unit(slots, slot_at(r, at, column / kSlot + 2), x[1]);
      } else {
        slots[slot_at(r, at, column / kSlot)] = make_float4(
            d[m][0][2 * half], d[m][1][2 * half], d[m][0][2 * half + 1], d[m][1][2 * half + 1]);
      }
    }
  }
}

// All of the row's blocks, in place. Columns that one warp has whole are its own, and it takes one
// share after the other; otherwise each warp has one share, and all read before any writes.
template <class Tile>
__device__ __forceinline__ void dense_factor(float4* slots, const uint32_t* __restrict__ signs,
                                             const Rotation& r) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int first = 0; first < r.shares; first += warps) {
    const int share = first + warp, column = share / r.m_shares;
    const int block = column / r.n_shares;
    const int first_m = share % r.m_shares * 16 * Tile::kM;
    const int first_n = (column - block * r.n_shares) * Tile::kColumns;
    float d[Tile::kM][Tile::kN][4];
    if (share < r.shares) multiply<Tile>(d, slots, signs, r, block, first_m, first_n);
    if (r.split) {
      sync_block();
    } else {
      sync_warp();
    }
    if (share < r.shares) {
      if (Tile::kN == 8 && r.middle) {
        store_products<Tile, true>(slots, d, r, block, first_m, first_n);
      } else {
        store_products<Tile, false>(slots, d, r, block, first_m, first_n);
      }
    }
  }
}

// The thread's units; zeros where it has none, so that none is kept in registers until here.
template <int kUnits, int kBits>
__device__ __forceinline__ void load_units(float (&x)[kUnits][kVector], const float4* slots,
                                           const Rotation& r, const Units<kBits>& units) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    zero_unit(x[u]);
    if (units.has(u)) load_unit(x[u], slots, unit_at(r, units.first(u), units.offset(u)));
  }
}

// ---- rotate and quantize a row -----------------------------------------------------------------
//
//   step 1  units from memory, low and first butterflies
//   step 2  exchange; the dense factor, in shared memory
//   step 3  last butterflies, 1 / sqrt(order), the range over the block
//   step 4  scale and zero point, then codes, 8 a thread and store
// A source gives the row to registers, by load(x, start, places), before any butterfly; or,
// where kIsStaged, to shared memory, after the low butterflies: one that computes a lot runs in a
// loop that is not unrolled, and registers have no run-time index. That one has fetch(at), which
// begins to load 8 elements, and finish(), which gives what was fetched and fetches the next 8.
template <class Tile, class Source>
__device__ __forceinline__ void rotate_and_quantize(const Source& source,
                                                    const uint32_t* __restrict__ signs,
                                                    uint8_t* __restrict__ codes,
                                                    void* __restrict__ scales,
                                                    uint8_t* __restrict__ zero_points,
                                                    const Rotation& r, const IntGrid& grid) {
  constexpr int kUnits = Tile::kUnits, kUnitBits = Tile::kUnitBits;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * r.length;
  float4* slots = row_slots();
  float x[kUnits][kVector];
  uint32_t places[kUnits];  // units of the row

  // step 1
  if constexpr (Source::kIsStaged) {
    const Units<-1> units{r.first};
    typename Source::Raw raw;
    uint32_t first = units.first(0), offset = units.offset(0);
    bool has = units.has(0);
    if (has) source.fetch(raw, start + (first + offset) * kVector);
#pragma unroll 1
    for (int u = 1; has; ++u) {
      const uint32_t at = unit_at(r, first, offset);
      first = units.first(u), offset = units.offset(u);
      has = u < kUnits && units.has(u);
      float unit[1][kVector];
      source.finish(unit[0], raw, has, start + (first + offset) * kVector);
      low_butterflies(unit, r.low_bits);
      store_unit(slots, at, unit[0]);
    }
  } else {
    with_bits<kUnitBits>(r.first.bits, [&](auto bits) {
      const Units<decltype(bits)::value> units{r.first};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) places[u] = units.has(u) ? units.unit(u) : kNoUnit;
    });
    source.load(x, start, places);
    low_butterflies(x, r.low_bits);
  }
  if (!Source::kIsStaged || r.first.bits > 0 || !r.exchange) {
    with_bits<kUnitBits>(r.first.bits, [&](auto bits) {
      const Units<decltype(bits)::value> units{r.first};
      if constexpr (Source::kIsStaged) load_units(x, slots, r, units);
      strided_stages<decltype(bits)::value>(x);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        places[u] = units.has(u) ? units.unit(u) : kNoUnit;
        if (r.exchange && units.has(u)) {
          store_unit(slots, unit_at(r, units.first(u), units.offset(u)), x[u]);
        }
      }
    });
  }

  if (r.exchange) {
    // step 2
    sync_block();
    if constexpr (Tile::kM > 0) {
      dense_factor<Tile>(slots, signs, r);
      sync_block();
    }

    // step 3
    with_bits<kUnitBits>(r.last.bits, [&](auto bits) {
      const Units<decltype(bits)::value> units{r.last};
      load_units(x, slots, r, units);
      strided_stages<decltype(bits)::value>(x);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) places[u] = units.has(u) ? units.unit(u) : kNoUnit;
    });
  }
  Range range;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[u][i] = mul_rn(x[u][i], r.factor);
  }
  if (grid.symmetric) {  // zeros where the thread has no unit
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) range.include_magnitude(x[u][i]);
    }
  } else {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) range.include(x[u][i]);
    }
  }
  range = reduce_range(range, reinterpret_cast<Range*>(dynamic_smem()));

  // step 4
  const Scale scale = scale_of(range, grid);
  if (threadIdx.x == 0) store_scale(scales, zero_points, blockIdx.x, scale, grid);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (places[u] != kNoUnit) {
      store_codes(codes, start + places[u] * kVector, x[u], scale, grid);
    }
  }
}

}  // namespace lowbit
