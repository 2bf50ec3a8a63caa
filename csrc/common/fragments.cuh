// SPDX-License-Identifier: Apache-2.0
// Which lane holds which element of a matrix instruction's operands (PTX ISA, "Matrix fragments").
//
// D[16, 8] += A[16, k] B[k, 8]. With g = lane / 4 and t = lane % 4:
//   s8, k = 32   A register i, byte b      row g + 8 (i & 1), k = 16 (i >> 1) + 4 t + b
//                B register i, byte b      k = 16 i + 4 t + b, column g
//   s4, k = 64   A register i, nibble b    row g + 8 (i & 1), k = 32 (i >> 1) + 8 t + b
//                B register i, nibble b    k = 32 i + 8 t + b, column g
//   b16, k = 16  A register i, half b      row g + 8 (i & 1), k = 8 (i >> 1) + 2 t + b
//                B register i, half b      k = 8 i + 2 t + b, column g
//   D register i (32 bits each)            row g + 8 (i >> 1), column 2 t + (i & 1)
// wgmma's A and D, m64: warp w of the warpgroup holds rows 16 w .. 16 w + 15 like one m16 above, D
// register i of column block j = i / 4 like D register i % 4 at column 8 j.
#pragma once

#include "common/device.cuh"

namespace lowbit {

constexpr int kFragmentTile = 64;  // FRAGMENT_TILE of lowbit/formats.py

struct Coordinate {
  int row, column;
};

// `per_register`: elements in 32 bits. Rows are M for A and D, k for B.
__host__ __device__ constexpr Coordinate a_fragment(int lane, int i, int b, int per_register) {
  return {lane / 4 + 8 * (i & 1), 4 * per_register * (i >> 1) + per_register * (lane % 4) + b};
}

__host__ __device__ constexpr Coordinate b_fragment(int lane, int i, int b, int per_register) {
  return {4 * per_register * i + per_register * (lane % 4) + b, lane / 4};
}

__host__ __device__ constexpr Coordinate d_fragment(int lane, int i) {
  return {lane / 4 + 8 * ((i >> 1) & 1), 8 * (i / 4) + 2 * (lane % 4) + (i & 1)};
}

}  // namespace lowbit
