// SPDX-License-Identifier: Apache-2.0
// The dense factor of a rotation on matrix units: first of all factors, on the row as it comes.
//
//   d[m, n] = sum over k of H[m, k] x[k, n]         A is H, k and m are rows, n columns
// +-1 is exact in fp16 and bf16, and so is x of 16 bits: one product, sums in fp32. An fp32 number
// is the sum of three bf16, its upper, middle and lower 8 bits of mantissa: three products.
//
// A warp's share is kM x kN fragments of 16 x 8: kN groups of 8 neighbouring columns, neighbours
// themselves, of one block of the row or, where a block has fewer, of several.
// Which row is k is free, as long as A agrees: k = 8 i + 2 t + h of a lane is row 8 i + t + 4 h, so
// that the four t of a load of fp32 are neighbouring rows.
// `signs` has one bit a sign (1: -1): bit 15 - s + 16 h of word [m / 16][k / 64][lane], with
// s = 4 (k / 16 % 4) + i, is half h of A register i, so that a shift by s brings both halves' bits
// to their places. Of a power of two the first is enough: H_2^n[m, k] is (-1)^popcount(m & k), so
// that all of its tiles of 16 x 16 are one, or its negative.
#pragma once

#include "common/hadamard_row.cuh"

namespace lowbit {

constexpr uint32_t kBf16x2_One = 0x3F80'3F80, kFp16x2_One = 0x3C00'3C00;
constexpr uint32_t kSigns = 0x8000'8000;     // of both
constexpr uint32_t kBf16Bits = 0xFFFF'0000;  // of fp32

// Whether popcount(n) is odd, n < 16.
__host__ __device__ constexpr int parity(int n) { return 0x6996 >> n & 1; }

// What a warp multiplies: its first row of H, and its first group of columns, of a block.
struct Share {
  int row, block, group;

  __device__ __forceinline__ int block_of(const Rotation& r, int j) const {
    return block + (j >> r.group_bits);
  }
  __device__ __forceinline__ int group_of(const Rotation& r, int j) const {
    return group + (j & ((1 << r.group_bits) - 1));
  }
  __device__ __forceinline__ bool has(const Rotation& r, int j) const {
    return block_of(r, j) < r.blocks && group_of(r, j) < r.groups;
  }
};

template <class Tile>
__device__ __forceinline__ Share share_of(const Rotation& r, int warp) {
  const int columns = r.by_m_shares.quotient(warp), block = r.by_n_shares.quotient(columns);
  return {(warp - columns * r.m_shares) * 16 * Tile::kM, block * (Tile::kN >> r.group_bits),
          (columns - block * r.n_shares) << r.group_bits};
}

// A of the share's tiles.
template <class Tile, bool kSylvester>
struct Factor {
  const uint32_t* signs;
  uint32_t one;
  int first_tile, m_tiles, k_words;
  uint32_t words[kSylvester ? 1 : Tile::kM];  // shifted to k; kSylvester: of tile 0, 0

  __device__ __forceinline__ Factor(const uint32_t* __restrict__ signs, uint32_t one,
                                    const Rotation& r, const Share& share)
      : signs(signs),
        one(one),
        first_tile(share.row / 16),
        m_tiles(ceil_div(r.dense, 16)),
        k_words(ceil_div(r.dense, 64)) {
#pragma unroll
    for (uint32_t& word : words) word = kSylvester ? signs[lane_id()] : 0;
  }

  // To k, from k - 1.
  __device__ __forceinline__ void advance(int k) {
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
      words[m] <<= 4;
      const int tile = first_tile + m < m_tiles ? first_tile + m : 0;
      if (k % 4 == 0) words[m] = signs[(tile * k_words + k / 4) * kWarp + lane_id()];
    }
  }

  // Of few tiles all are multiplied: products that are none are not stored.
  __device__ __forceinline__ bool has(int m) const {
    return kSylvester || Tile::kM <= 2 || first_tile + m < m_tiles;
  }

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSylvester) {
        a[i] = (one | ((words[0] << i) & kSigns)) ^ (parity(m & k) ? kSigns : 0);
      } else {
        a[i] = one | ((words[m] << i) & kSigns);
      }
    }
  }
};

template <class Tile>
__device__ __forceinline__ void zero_products(float (&d)[Tile::kM][Tile::kN][4]) {
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) d[m][j][0] = d[m][j][1] = d[m][j][2] = d[m][j][3] = 0.0f;
  }
}

// x, rows of 16-bit elements, as they are.
template <class Tile, bool kFp16, bool kSylvester>
__device__ __forceinline__ void multiply_halves(float (&d)[Tile::kM][Tile::kN][4],
                                                const uint32_t* __restrict__ signs,
                                                const Rotation& r, const Share& share) {
  constexpr int kM = Tile::kM, kN = Tile::kN, kPairs = kN / 2;
  Factor<Tile, kSylvester> factor(signs, kFp16 ? kFp16x2_One : kBf16x2_One, r, share);
  const int lane = lane_id(), m_tiles = ceil_div(r.dense, 16);

  // Addresses for ldmatrix: k of lane % 16, group j + lane / 16 of two. Rows past the order are
  // zeros, columns that are none are others.
  const uint32_t row_bytes = r.raw_pitch * 16, zeros = smem_address(dynamic_smem() + kZerosOffset);
  const int row = (lane & 8) + lane % 8 / 2 + 4 * (lane & 1);
  uint32_t from[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int j = 2 * p + lane / 16;
    const bool has = share.has(r, j);
    from[p] = slots_address() + (has ? share.group_of(r, j) * 16 : 0) +
              ((has ? share.block_of(r, j) * r.dense : 0) + row) * row_bytes;
  }
  const auto step = [&](int k) {
    const bool valid = kSylvester || k * 16 + row < r.dense;
    uint32_t b[kN][2];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      uint32_t loaded[4];
      ldmatrix_x4_trans(loaded, valid ? from[p] + k * 16 * row_bytes : zeros);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[2 * p + i / 2][i % 2] = loaded[i];
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (!factor.has(m)) continue;
      uint32_t a[4];
      factor.fragment(a, m, k);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float c[4] = {d[m][j][0], d[m][j][1], d[m][j][2], d[m][j][3]};
        mma_halves<kFp16>(d[m][j], a, b[j], c);
      }
    }
  };
  zero_products<Tile>(d);
  if constexpr (kSylvester) {
#pragma unroll
    for (int k = 0; k < kM; ++k) step(k);
  } else {
#pragma unroll 1
    for (int k = 0; k < m_tiles; ++k) {
      factor.advance(k);
      step(k);
    }
  }
}

// b[term] of two numbers of a column, the first in the lower half. Cut, not rounded: what is finite
// stays so.
__device__ __forceinline__ void cut(uint32_t (&b)[3], float x0, float x1) {
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    const uint32_t bits0 = bit_cast<uint32_t>(x0), bits1 = bit_cast<uint32_t>(x1);
    b[term] = upper_halves(bits0, bits1);
    x0 = add_rn(x0, -bit_cast<float>(bits0 & kBf16Bits));  // exact; nan for inf, as the row is then
    x1 = add_rn(x1, -bit_cast<float>(bits1 & kBf16Bits));
  }
}

// x, rows of fp32.
template <class Tile>
__device__ __forceinline__ void multiply_floats(float (&d)[Tile::kM][Tile::kN][4],
                                                const uint32_t* __restrict__ signs,
                                                const Rotation& r, const Share& share) {
  constexpr int kM = Tile::kM, kN = Tile::kN;
  Factor<Tile, false> factor(signs, kBf16x2_One, r, share);
  const int g = lane_id() / 4, t = lane_id() % 4;
  zero_products<Tile>(d);
  uint32_t from[kN];  // rows t, t + 4, t + 8 and t + 12 of k = 0
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const bool has = share.has(r, j);  // else any column
    const int row = (has ? share.block_of(r, j) * r.dense : 0) + t;
    const int slot = (has ? share.group_of(r, j) * 2 : 0) + g / 4;
    from[j] = slots_address() + slot_at(r, row, slot) * 16 + g % 4 * 4;
  }
#pragma unroll 1
  for (int k = 0; k < ceil_div(r.dense, 16); ++k) {
    factor.advance(k);
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) factor.fragment(a[m], m, k);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * k + 4 * i;
        x[i] = load_shared_4_if(row + t < r.dense, from[j] + row * r.pitch * 16);
      }
      uint32_t terms[2][3];
      cut(terms[0], x[0], x[1]);
      cut(terms[1], x[2], x[3]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (!factor.has(m)) continue;
#pragma unroll
        for (int term = 0; term < 3; ++term) {
          const uint32_t b[2] = {terms[0][term], terms[1][term]};
          mma_bf16(d[m][j], a[m], b);
        }
      }
    }
  }
}

// Butterflies of the columns that a lane has: 2 neighbours (strides 1), and kBits of its groups.
template <int kBits, class Tile>
__device__ __forceinline__ void column_butterflies(float (&d)[Tile::kM][Tile::kN][4]) {
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      butterfly(d[m][j][0], d[m][j][1]);
      butterfly(d[m][j][2], d[m][j][3]);
    }
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) {
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if ((j >> bit & 1) == 0) butterfly(d[m][j][i], d[m][j | 1 << bit][i]);
        }
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ void store_products(const float (&d)[Tile::kM][Tile::kN][4],
                                               const Rotation& r, const Share& share) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t at[Tile::kN];  // row g of the share
  bool valid[Tile::kN];
#pragma unroll
  for (int j = 0; j < Tile::kN; ++j) {
    const int row = share.block_of(r, j) * r.dense + share.row + g;
    const uint32_t slot = slot_at(r, row, share.group_of(r, j) * 2 + t / 2);
    at[j] = slots_address() + slot * 16 + t % 2 * 8;
    valid[j] = share.has(r, j);
  }
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half;
      const bool has_row = share.row + g + row < r.dense;
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        store_shared_8_if(has_row && valid[j], at[j] + row * r.pitch * 16, d[m][j][2 * half],
                          d[m][j][2 * half + 1]);
      }
    }
  }
}

// Of the row in shared memory, in place, with the first butterflies of columns. kFloats: of fp32,
// else of 16-bit elements. Every warp has one share, and all are read before any is written.
template <class Tile, bool kFloats>
__device__ __forceinline__ void dense_factor(const uint32_t* __restrict__ signs, const Rotation& r,
                                             bool is_fp16) {
  const int warp = threadIdx.x / kWarp;
  const bool has = warp < r.shares;
  const Share share = share_of<Tile>(r, warp);
  float d[Tile::kM][Tile::kN][4];
  if (has) {
    if constexpr (kFloats) {
      multiply_floats<Tile>(d, signs, r, share);
    } else if (is_fp16) {
      if (r.sylvester) {
        multiply_halves<Tile, true, true>(d, signs, r, share);
      } else {
        multiply_halves<Tile, true, false>(d, signs, r, share);
      }
    } else if (r.sylvester) {
      multiply_halves<Tile, false, true>(d, signs, r, share);
    } else {
      multiply_halves<Tile, false, false>(d, signs, r, share);
    }
    if (r.mixed) {
      with_bits<Tile::kGroupBits>(
          r.group_bits, [&](auto bits) { column_butterflies<decltype(bits)::value, Tile>(d); });
    }
  }
  sync_block();
  if (has) store_products<Tile>(d, r, share);
}

}  // namespace lowbit
