// SPDX-License-Identifier: Apache-2.0
// The 128-byte swizzle of TMA, wgmma and ldmatrix: in rows of 128 bytes, eight of them 1024 bytes,
// the 16-byte piece c of row r lies where piece c ^ (r % 8) would. Eight rows' pieces c, which an 8
// x 8 matrix reads together, are then in different banks.
#pragma once

#include "common/device.cuh"

namespace lowbit {

constexpr int kSwizzleRow = 128;    // bytes
constexpr int kSwizzleTile = 1024;  // bytes: the pattern's period, and its alignment

// Where the byte at `offset` of a tile of 128-byte rows lies; offsets count from a multiple of
// 1024.
__host__ __device__ constexpr uint32_t swizzle_128(uint32_t offset) {
  return offset ^ ((offset >> 3) & 0x70);  // bits 4..6 ^= bits 7..9
}

}  // namespace lowbit
