// SPDX-License-Identifier: Apache-2.0
// The tiles of csrc/kv_attention.cu and their arguments; codes and small numbers as fp16.
#pragma once

#include "common/ptx.cuh"

namespace lowbit::kv {

constexpr int kTileRows = 16;  // of a warp: M of an instruction
constexpr int kTokens = 32;    // positions at once: one a lane, and four columns of 8 as N
constexpr int kStages = 2;
constexpr int kChunk = 16;  // bytes of a row of codes that ldmatrix reads at once
constexpr int kMaxHeadDim = 256;
constexpr int kNoWindow = 1 << 30;  // longer than any sequence

// ---- codes as fp16 -----------------------------------------------------------------------------
//
// The bits of a code c < 1024 *are* the subnormal fp16 number 2^-24 c, which matrix units multiply
// exactly, like any other: so codes need no exponent, and no subtraction of what that would add.
//   4 bits, a word of nibbles n7 .. n0:  w & 000F000F        n4, n0
//                                        w & 00F000F0        16 times n5, n1
//                                        (w >> 8) likewise   n6, n2 and n7, n3
//   8 bits, bytes b3 .. b0:              w & 00FF00FF        b2, b0
//                                        (w >> 8) likewise   b3, b1
// What is multiplied with 16 times a code is divided by 16 beforehand (q) or afterwards (out).
constexpr float kCodeUnit = 5.9604644775390625e-08f;  // 2^-24
constexpr float kInverseCodeUnit = 16777216.0f;

template <int kBits>
__host__ __device__ __forceinline__ uint32_t pair_of_codes(uint32_t word, int i) {
  if constexpr (kBits == 4) {
    return (i & 2 ? word >> 8 : word) & (i & 1 ? 0x00F0'00F0u : 0x000F'000Fu);
  } else {
    return (i ? word >> 8 : word) & 0x00FF'00FFu;
  }
}

// What pair i of codes is to be divided by.
template <int kBits>
__host__ __device__ constexpr float inverse_factor(int i) {
  return kBits == 4 && i & 1 ? 1.0f / 16 : 1.0f;
}

// ---- powers of two -----------------------------------------------------------------------------
//
// fp16 has 30 binades below 2^15 where subnormal numbers count: enough for numbers of fp32's
// precision if the largest is brought there. `exponent` is a float's, as it stands in its bits.
constexpr int kExponentBias = 127, kTop = 14;  // largest numbers are 2^14 and up, below 2^15
constexpr int kLeastExponent = 40;             // 2^-87: keeps the factors below in range

__device__ __forceinline__ int exponent_of(float x) {
  const int exponent = static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 0xFF);
  return exponent > kLeastExponent ? exponent : kLeastExponent;
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return bit_cast<float>(static_cast<uint32_t>(exponent) << 23);
}

// Brings numbers of this exponent to 2^14, and back.
__device__ __forceinline__ float to_top(int exponent) {
  return power_of_two(2 * kExponentBias + kTop - exponent);
}

__device__ __forceinline__ float from_top(int exponent) { return power_of_two(exponent - kTop); }

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const uint32_t bits = bit_cast<uint16_t>(__float2half_rn(low));
  return bits | static_cast<uint32_t>(bit_cast<uint16_t>(__float2half_rn(high))) << 16;
}

// ---- what a call is of -------------------------------------------------------------------------

struct Pages {
  const uint8_t* codes;        // [num_pages * page_size, num_kv_heads, head_dim * kBits / 8]
  const __half* scale;         // [num_pages * page_size, num_kv_heads]
  const uint8_t* zero_points;  // likewise
};

struct Arguments {
  const uint16_t* q;  // [T, num_q_heads, head_dim] fp16 or bf16
  Pages k, v;
  const int* block_table;         // [B, pages_of_row], rows table_stride apart
  const int* seq_lens;            // [B]
  const int* query_start;         // [B + 1]
  const uint16_t *k_new, *v_new;  // [T, num_kv_heads, head_dim] as q; or null
  const int* cached_lens;         // [B]; or null
  uint16_t* out;                  // as q
  float* partial;                 // [splits, T, num_q_heads, head_dim], unused when splits is 1
  float *row_max, *row_sum;  // [splits, T, num_q_heads], likewise; the maximum in binary digits
  int T, B, pages_of_row, page_size, num_kv_heads, heads, head_dim;  // heads of a KV head
  int64_t table_stride;
  int tile_rows;  // kRows; or `heads`, where a tile is one query
  int window;     // positions that a query sees, or kNoWindow
  int splits, split_length;
  bool is_bf16;
  float factor;    // |scaling| log2(e)
  float k_factor;  // the sign of scaling, divided by kCodeUnit
};

// The rows of a block's tile.
struct Rows {
  int first;                 // of the sequence's
  int queries, first_query;  // of the sequence
  int before;                // + query: how much a query sees

  // Where what a row sees ends; it begins `window` before that.
  __device__ __forceinline__ int seen(const Arguments& a, int local) const {
    return before + (first + local) / a.heads;
  }

  // The place of row `local` of the tile among heads of queries; -1: there is none.
  __device__ __forceinline__ int index(const Arguments& a, int kv_head, int local) const {
    const int row = first + local, query = row / a.heads, head = row - query * a.heads;
    if (local >= a.tile_rows || query >= queries) return -1;
    return ((first_query + query) * a.num_kv_heads + kv_head) * a.heads + head;
  }
};

// Positions that a block takes from k_new and v_new: first .. end - 1, j is their row `own` + j.
struct NewPositions {
  int first, end, own;
};

// ---- shapes ------------------------------------------------------------------------------------

// kWarpsM warps share positions and have 16 rows each; kWarpsN share rows and take positions in
// turn, each from shared memory of its own. kDim: head_dim, or the next larger one there is.
// kTakesNew: k_new and v_new are given. Kernels apart: what is given takes registers.
template <int kBits_, int kDim_, int kWarpsM_, int kWarpsN_, bool kTakesNew_ = false>
struct Tile {
  static constexpr int kBits = kBits_, kDim = kDim_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr bool kTakesNew = kTakesNew_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kRows = kTileRows * kWarpsM;

  static constexpr int kChunks = kDim * kBits / 8 / kChunk;
  static constexpr int kElements = kDim / kChunks;  // of a chunk: 32 or 16
  static constexpr int kPairs = 16 / kBits;         // of codes in a word; n-tiles of a chunk of V
  static constexpr int kSteps = kElements / 16;     // K of an instruction
  static constexpr int kPitch = kChunk * (kChunks | 1);  // odd: 8 rows lie in different banks
  static constexpr int kCodesBytes = kTokens * kPitch;
  static constexpr int kScalesAt = 2 * kCodesBytes;  // after the codes of K and V
  static constexpr int kScalesBytes = kTokens * (3 * 4 + 2);
  static constexpr int kStageBytes = kScalesAt + ceil_div(kScalesBytes, kChunk) * kChunk;

  static constexpr bool kSharedQueries = kDim * kBits > 512;
  static constexpr int kQueriesBytes = kSharedQueries ? kRows * kDim * 2 : 0;
  static constexpr int kOutPitch = kDim + 8;  // fp32; pairs of rows g lie in different banks
  static constexpr int kOutBytes = kWarpsM * kWarpsN * kTileRows * (kOutPitch + 2) * 4;
  static constexpr int kAllStages = kWarpsN * kStages * kStageBytes;

  // Positions in full precision: K as B registers, V in rows, two scales each (common/kv_new.cuh).
  static constexpr int kNewValuesAt = kTokens * kDim * 2;
  static constexpr int kNewPitch = kDim * 2 + 16;  // odd, in 16 bytes
  static constexpr int kNewScalesAt = kNewValuesAt + kTokens * kNewPitch;
  static constexpr int kNewBytes = kNewScalesAt + kTokens * 2 * 4;

  static constexpr int kShared = kAllStages > kOutBytes ? kAllStages : kOutBytes;
  static constexpr int kRowsAt = kQueriesBytes + kShared;
  static constexpr int kSmemBytes = kRowsAt + sizeof(Rows) + sizeof(NewPositions);
  static_assert(kBits == 4 || kBits == 8, "what pair_of_codes takes apart");
  static_assert(kChunks * kChunk * 8 == kDim * kBits, "whole chunks");
  static_assert(kWarpsM == 1 || kWarpsN == 1, "a group of warps is a warp or the block");
  static_assert(!kTakesNew || kNewBytes <= kShared, "one after the other in the same memory");
  static_assert(!kTakesNew || kWarpsM * 8 == kTokens, "8 positions a warp");
  static_assert(kSmemBytes <= 99 * 1024, "what a block can have on sm_86, sm_89 and sm_120");
};

__device__ __forceinline__ float widen(uint32_t bits, bool is_bf16) {
  return is_bf16 ? bit_cast<float>(bits << 16)
                 : __half2float(bit_cast<__half>(static_cast<uint16_t>(bits)));
}

__device__ __forceinline__ uint16_t narrow(float x, bool is_bf16) {
  return is_bf16 ? bit_cast<uint16_t>(__float2bfloat16_rn(x))
                 : bit_cast<uint16_t>(__float2half_rn(x));
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

}  // namespace lowbit::kv
