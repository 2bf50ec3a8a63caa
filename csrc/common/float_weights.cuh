// SPDX-License-Identifier: Apache-2.0
// Weights of the layout `fragment_float` (docs/formats.md) -> the A registers of mma.m16n8k16: two
// halves each, code - zero_point, exactly.
//
// Below, n is the code as an unsigned number: an asymmetric one as it is; a symmetric one plus
// 2^(b-1), which makes that its zero point and flips its top bit. The flip costs nothing, as one
// LOP3 is (word & mask) ^ magic and magic holds the flipped bits beside those of the exponent.
//
//   fp16 counts in steps of 1 from 1024 = 0x6400, bf16 from 128 = 0x4300 to 255:
//   4 bits, fp16   0x6400 |  n        = 1024 +    n    times 1    - (1024 + z) = n - z    rows g
//                  0x6400 | (n << 4)  = 1024 + 16 n    times 1/16 - (64 + z)   = n - z    rows g +
//                  8
//   4 bits, bf16   0x4300 |  n        =  128 +    n    times 1    - (128 + z)  = n - z
//   8 bits, fp16   0x6400 |  n        = 1024 +    n    times 1    - (1024 + z) = n - z
//   8 bits, bf16   has no room for n, which it splits into l = its lowest 7 bits and the top bit h:
//                  0x4300 |  l        =  128 + l
//                  0xC380, or 0xC300 where h is set = -256 or -128: bit 7 is an exponent's lowest
//                  their sum          = l + 128 h - 128 = n - 128
//                  A zero point z is then 128 - z too small, in 9 bits with n: no bf16 number. So
//                  -(z - 128) is a second A operand, a product of its own (kTwoTerms).
// All within one FMA of two halves, exactly: results have at most 9 bits, of bf16 at most 8.
//
// Instructions for 8 weights: 9, 11, 10, 14.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

namespace lowbit {

constexpr uint32_t kFp16x2_1024 = 0x64006400, kFp16x2_One = 0x3C003C00, kFp16x2_16th = 0x2C002C00;
constexpr uint32_t kBf16x2_128 = 0x43004300, kBf16x2_One = 0x3F803F80,
                   kBf16x2_Minus256 = 0xC380C380;
constexpr uint32_t kLowNibbleOfHalves = 0x000F000F, kHighNibbleOfHalves = 0x00F000F0;
constexpr uint32_t kByteOfHalves = 0x00FF00FF, kTopBitOfHalves = 0x00800080;

// What is set around the codes, the same for all weights of a matrix.
struct WeightMagic {
  uint32_t low, high;
};

template <class T, int kBits>  // __half or __nv_bfloat16
struct FloatWeights {
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr int kWords = kBits / 4;         // of 8 weights, the A registers of a step
  static constexpr int kStepsOfLoad = 4 / kWords;  // in the 16 bytes that a lane loads
  static_assert(kBits == 4 || kBits == 8, "stored bits");

  // of symmetric codes
  static constexpr int kZeroPoint = 1 << (kBits - 1);

  __host__ __device__ static WeightMagic magic(bool symmetric) {
    const uint32_t flip = symmetric ? 0x00010001u * kZeroPoint : 0;
    if (kIsHalf) return {kFp16x2_1024 ^ flip, kFp16x2_1024 ^ (flip << 4)};
    if (kBits == 4) return {kBf16x2_128 ^ flip, 0};
    return {kBf16x2_128, kBf16x2_Minus256 ^ flip};
  }

  // What is added to the weights of a group, twice: `upper` in rows g + 8, else in rows g. Of two
  // terms, the second.
  __device__ __forceinline__ static uint32_t offset(uint32_t zero_point, bool upper) {
    uint32_t half;
    if constexpr (kIsHalf) {  // -1024 = 0xE400 counts in steps of 1, -64 = 0xD400 of 1/16
      half = kBits == 4 && upper ? 0xD400 + 16 * zero_point : 0xE400 + zero_point;
    } else if constexpr (kBits == 4) {
      half = 0xC300 + zero_point;
    } else {  // 2^23 = 0x4B000000 counts in steps of 1; 128 - z has at most 8 bits
      const float number = 8388608.0f + 128.0f - bit_cast<float>(0x4B000000u | zero_point);
      half = bit_cast<uint32_t>(number) >> 16;
    }
    return half * 0x00010001u;
  }

  // a: the registers of a step, of words[0 .. kWords - 1]; offsets: of rows g and g + 8.
  __device__ __forceinline__ static void expand(uint32_t (&a)[4], const uint32_t* words,
                                                const WeightMagic& magic,
                                                const uint32_t (&offsets)[2]) {
    if constexpr (kIsHalf && kBits == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = words[0] >> (8 * i);
        a[2 * i] = fma_f16x2((word & kLowNibbleOfHalves) ^ magic.low, kFp16x2_One, offsets[0]);
        a[2 * i + 1] =
            fma_f16x2((word & kHighNibbleOfHalves) ^ magic.high, kFp16x2_16th, offsets[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kBits == 4) {
          const uint32_t number = ((words[0] >> (4 * i)) & kLowNibbleOfHalves) ^ magic.low;
          a[i] = fma_bf16x2(number, kBf16x2_One, offsets[i % 2]);
        } else {
          const uint32_t word = words[i / 2] >> (8 * (i % 2));
          if constexpr (kIsHalf) {
            a[i] = fma_f16x2((word & kByteOfHalves) ^ magic.low, kFp16x2_One, offsets[i % 2]);
          } else {
            const uint32_t low = (word & (kByteOfHalves ^ kTopBitOfHalves)) ^ magic.low;
            a[i] = fma_bf16x2(low, kBf16x2_One, (word & kTopBitOfHalves) ^ magic.high);
          }
        }
      }
    }
  }
};

}  // namespace lowbit
