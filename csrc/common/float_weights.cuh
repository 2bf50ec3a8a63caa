// SPDX-License-Identifier: Apache-2.0
// Weights of a kernel layout (docs/formats.md) -> the A registers of mma.m16n8k16: two halves each,
// code - zero_point, exactly.
//
// `fragment_float` is made for this instruction, in whose registers a lane has runs of 2 neighbours
// in K. `fragment` and `fragment_int4`, which int_gemm reads, hold the runs of 4 and 8 that a lane
// has of m16n8k32.s8 and m16n8k64.s4, and so the codes of one row in a word. A product does not
// care in which order K is summed, so x is loaded in such runs too. What comes out of a word by one
// shift and mask is two bytes apart: of runs of 4 those are neighbours once the inner bytes have
// changed places, of runs of 8 they are j and j + 4, and x is paired alike (b_pairs). `place` says
// where in the words a register's pair is.
//
// Below, n is the code as an unsigned number: an asymmetric one as it is; a symmetric one plus
// 2^(b-1), which makes that its zero point and flips its top bit. The flip costs nothing, as one
// LOP3 is (word & mask) ^ magic and magic holds the flipped bits beside those of the exponent.
//
// Codes of 2 to 4 bits come as nibbles, eight to a step: of 2 bits two steps share a word and one
// shift parts them; of 3 bits the highest comes from a plane of its own, by one more shift and one
// LOP3 that takes 2 bits of a nibble from here and 2 from there. Bits above the code are masked.
//
// fp16 counts in steps of 1 from 1024 = 0x6400, bf16 from 128 = 0x4300 to 255. Four bits higher,
// where a byte's upper nibble is, a bit counts as much from 64 = 0x5400, or from 8 = 0x4100:
//   fp16           0x6400 |  n        = 1024 + n    - (1024 + z) = n - z    rows g
//                  0x5400 | (n << 4)  =   64 + n    -   (64 + z) = n - z    rows g + 8
//   bf16           0x4300 |  n        =  128 + n    -  (128 + z) = n - z    rows g, of 4 bits all
//     2, 3 bits    0x4100 | (n << 4)  =    8 + n    -    (8 + z) = n - z    rows g + 8
//   8 bits, fp16   0x6400 |  n        = 1024 + n    - (1024 + z) = n - z
//   8 bits, bf16   has no room for n, which it splits into l = its lowest 7 bits and the top bit h:
//                  0x4300 |  l        =  128 + l
//                  0xC380, or 0xC300 where h is set = -256 or -128: bit 7 is an exponent's lowest
//                  their sum          = l + 128 h - 128 = n - 128
//                  A zero point z is then 128 - z too small, in 9 bits with n: no bf16 number. So
//                  -(z - 128) is a second A operand, a product of its own (kTwoTerms).
// All within one FMA of two halves, exactly: results have at most 9 bits, of bf16 at most 8.
//
// Instructions for 8 weights, fp16 and bf16: 2 bits 9.5; 3 bits 11.25; 4 bits 9 and 11; 8 bits 10
// and 14, in runs of 2 or of more.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

namespace lowbit {

constexpr uint32_t kFp16x2_1024 = 0x64006400, kFp16x2_64 = 0x54005400, kFp16x2_One = 0x3C003C00;
constexpr uint32_t kBf16x2_128 = 0x43004300, kBf16x2_8 = 0x41004100, kBf16x2_One = 0x3F803F80,
                   kBf16x2_Minus256 = 0xC380C380;
constexpr uint32_t kOneOfHalves = 0x00010001, kTopBitOfHalves = 0x00800080;
constexpr uint32_t kLowPairs = 0x33333333;  // the lower two bits of every nibble

// What is set around the codes, the same for all weights of a matrix.
struct WeightMagic {
  uint32_t low, high;
};

// From shared memory: 4 words, or the first 2 of fewer.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], uint32_t from) {
  if constexpr (kWords == 4) {
    const uint4 four = load_shared_16(from);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else {
    const uint2 two = load_shared_8(from);
    words[0] = two.x, words[1] = two.y;
  }
}

// T: __half or __nv_bfloat16. kRun: of fragment_float 2, fragment 4, fragment_int4 8.
template <class T, int kBits, int kRun>
struct FloatWeights {
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr int kStepsOfLoad = kBits == 8 ? 2 : 4;           // whose codes a lane loads
  static constexpr int kLoadWords = kStepsOfLoad * kBits / 4;       // 8 codes a step
  static constexpr int kLoadBytes = kWarp * kLoadWords * 4;         // of a warp
  static constexpr int kPlaneBytes = kWarp * kStepsOfLoad / 2 * 4;  // of 3 bits, the lower two
  // both nibbles of a byte are numbers where they stand
  static constexpr bool kInPlace = kBits + 4 <= (kIsHalf ? 10 : 7);
  static constexpr uint32_t kMask = kOneOfHalves * ((1 << kBits) - 1);
  static constexpr uint32_t kLow = kIsHalf ? kFp16x2_1024 : kBf16x2_128;
  static constexpr uint32_t kHigh = kIsHalf ? kFp16x2_64 : kBf16x2_8;
  static constexpr uint32_t kMinusLow = 0x8000 | (kLow & 0xFFFF);
  static constexpr uint32_t kMinusHigh = 0x8000 | (kHigh & 0xFFFF);
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 8, "stored bits");
  static_assert(kRun == 2 || (kRun == 4 && kBits >= 4) || (kRun == 8 && kBits == 4), "layouts");

  // of symmetric codes
  static constexpr int kZeroPoint = 1 << (kBits - 1);

  __host__ __device__ static WeightMagic magic(bool symmetric) {
    const uint32_t flip = symmetric ? kOneOfHalves * kZeroPoint : 0;
    if (kBits == 8) return {kIsHalf ? kLow ^ flip : kLow, kBf16x2_Minus256 ^ flip};
    return {kLow ^ flip, kHigh ^ (flip << 4)};
  }

  // What is added to the weights of a group, twice: `upper` in rows g + 8, else in rows g. Of two
  // terms, the second.
  __device__ __forceinline__ static uint32_t offset(uint32_t zero_point, bool upper) {
    uint32_t half;
    if constexpr (kBits == 8 && !kIsHalf) {
      // 2^23 = 0x4B000000 counts in steps of 1; 128 - z has at most 8 bits
      const float number = 8388608.0f + 128.0f - bit_cast<float>(0x4B000000u | zero_point);
      half = bit_cast<uint32_t>(number) >> 16;
    } else {
      half = kInPlace && upper ? kMinusHigh + (zero_point << 4) : kMinusLow + zero_point;
    }
    return half * kOneOfHalves;
  }

  // This lane's codes of kStepsOfLoad steps; from: those of a slab, in shared memory.
  __device__ __forceinline__ static void load(uint32_t (&words)[kLoadWords], uint32_t from) {
    const int lane = lane_id();
    load_words(words, from + lane * (kLoadWords == 4 ? 16 : 8));
    if constexpr (kBits == 3) words[2] = load_shared_4(from + kPlaneBytes + lane * 4);
    if constexpr (kRun == 4) {
#pragma unroll
      for (uint32_t& word : words) word = swap_inner_bytes(word);
    }
  }

  // Nibbles whose lowest kBits are the codes of a step of the load.
  __device__ __forceinline__ static uint32_t nibbles(const uint32_t (&words)[kLoadWords],
                                                     int step) {
    static_assert(kBits <= 4, "others are bytes");
    if constexpr (kBits == 4) return words[step];
    const uint32_t low = words[step / 2] >> (step % 2 * 2);
    if constexpr (kBits == 2) return low;
    // bit `step` of its nibbles is the highest of the code: to bit 2, and not across bit 1
    const uint32_t plane = words[kLoadWords - 1];
    const uint32_t top = step < 2 ? plane << (2 - step) : plane >> (step - 2);
    return select_bits(kLowPairs, low, top);
  }

  // Which word of a load holds the codes of register i of a step, and from which nibble on. Of 4
  // bits, and fewer, the upper nibble of a byte is an odd one.
  struct Place {
    int word, nibble;
  };
  __host__ __device__ static constexpr Place place(int step, int i) {
    if (kBits == 8) {
      return kRun == 2 ? Place{2 * step + i / 2, 2 * (i % 2)} : Place{2 * step + i % 2, i / 2 * 2};
    }
    if (kRun == 2) return {step, i};
    if (kRun == 4) return {step % 2 * 2 + i % 2, i / 2 * 2 + (step < 2 ? 1 : 0)};
    return {step / 2 * 2 + i % 2, i / 2 * 2 + step % 2};
  }

  // The B registers of `step` for x[k], .. x[k + kRun - 1] of the lane's token, k its run.
  __device__ __forceinline__ static void b_pairs(uint32_t (&b)[2], const uint32_t (&x)[kRun / 2],
                                                 int step) {
    static_assert(kRun > 2, "ldmatrix loads the registers of runs of 2");
    if constexpr (kRun == 4) {
      b[0] = x[0];
      b[1] = x[1];
    } else {
      b[0] = step % 2 == 0 ? lower_halves(x[0], x[2]) : upper_halves(x[0], x[2]);
      b[1] = step % 2 == 0 ? lower_halves(x[1], x[3]) : upper_halves(x[1], x[3]);
    }
  }

  // a: the registers of a step of the load; offsets: of rows g and g + 8, of runs of 2.
  __device__ __forceinline__ static void expand(uint32_t (&a)[4],
                                                const uint32_t (&words)[kLoadWords], int step,
                                                const WeightMagic& magic,
                                                const uint32_t (&offsets)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Place at = place(step, i);
      const bool upper = kInPlace && at.nibble % 2 == 1;
      // weights in longer runs are symmetric: what is added is one of two constants
      const uint32_t offset = kRun == 2 ? offsets[i % 2] : FloatWeights::offset(kZeroPoint, upper);
      if constexpr (kBits == 8) {
        const uint32_t word = words[at.word] >> (4 * at.nibble);
        if constexpr (kIsHalf) {
          a[i] = fma_f16x2((word & kMask) ^ magic.low, kFp16x2_One, offset);
        } else {
          const uint32_t low = and_xor(word, kMask ^ kTopBitOfHalves, magic.low);
          a[i] = fma_bf16x2(low, kBf16x2_One, (word & kTopBitOfHalves) ^ magic.high);
        }
      } else {
        const uint32_t codes = kRun == 2 ? nibbles(words, step) : words[at.word];
        const uint32_t word = codes >> (kInPlace ? at.nibble / 2 * 8 : at.nibble * 4);
        const uint32_t number =
            upper ? (word & (kMask << 4)) ^ magic.high : (word & kMask) ^ magic.low;
        a[i] = kIsHalf ? fma_f16x2(number, kFp16x2_One, offset)
                       : fma_bf16x2(number, kBf16x2_One, offset);
      }
    }
  }
};

}  // namespace lowbit
