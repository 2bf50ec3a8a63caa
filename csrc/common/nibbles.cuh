// SPDX-License-Identifier: Apache-2.0
// Eight 4-bit weights of the layout `fragment` (docs/formats.md) -> two registers of signed bytes.
//
// A word holds the nibbles of register f0 (columns k .. k + 31) in the high halves of its bytes and
// those of f1 (32 columns further) in the low halves, each nibble q in two's complement, -8 .. 7.
#pragma once

#include "common/device.cuh"

namespace lowbit {

constexpr uint32_t kHighNibbles = 0xF0F0F0F0, kLowNibbles = 0x0F0F0F0F;
constexpr uint32_t kByteOnes = 0x01010101, kByteEights = 0x08080808, kByteSigns = 0x80808080;

// One scale a channel. A nibble in the high half of a byte whose low half is 0 *is* the signed byte
// 16 q: two's complement is a sum of powers of two with weight -8 for the highest bit, and all
// weights are times 16. So no sign is extended, and sums are 16 times too large, which is exact:
//   f0 = w & F0F0F0F0         the high nibbles where they stand
//   f1 = (w << 4) & F0F0F0F0  the low ones, moved up; what crosses into the next byte is masked
// Three instructions for eight weights.
constexpr int kExpandX16Shift = 4;  // sum >> 4 takes the 16 away

__host__ __device__ __forceinline__ void expand_x16(uint32_t word, uint32_t& f0, uint32_t& f1) {
  f0 = word & kHighNibbles;
  f1 = (word << 4) & kHighNibbles;
}

// Two-level scales: the byte is q s, with the scale s = 1 .. 15 of the weight's group.
//   u = q + 8 = q ^ 8, in 0 .. 15        flips the nibble's sign bit
//   v = u s + (128 - 8 s) = q s + 128    in 8 .. 233, and u s in 0 .. 225: no byte carries into
//                                        the next, so one multiply and add does four bytes
//   v ^ 0x80 = v - 128 = q s             as a signed byte
// Seven instructions for eight weights; the offset is one more for every scale and four weights.
__host__ __device__ __forceinline__ uint32_t scale_bytes(uint32_t u, uint32_t scale) {
  const uint32_t offset = kByteSigns - scale * kByteEights;  // 128 - 8 s in every byte
#ifdef __CUDA_ARCH__
  uint32_t v;  // as written: nvcc makes it (u - 8) s + 128, one more addition for every register
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(u), "r"(scale), "r"(offset));
#else
  const uint32_t v = u * scale + offset;
#endif
  return v ^ kByteSigns;
}

// `scale0` belongs to the nibbles of f0, `scale1` to those of f1.
__host__ __device__ __forceinline__ void expand_two_level(uint32_t word, uint32_t scale0,
                                                          uint32_t scale1, uint32_t& f0,
                                                          uint32_t& f1) {
  f0 = scale_bytes(((word >> 4) & kLowNibbles) ^ kByteEights, scale0);
  f1 = scale_bytes((word & kLowNibbles) ^ kByteEights, scale1);
}

}  // namespace lowbit
