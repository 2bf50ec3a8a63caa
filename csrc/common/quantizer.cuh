// SPDX-License-Identifier: Apache-2.0
// A row in registers: loading, its range, its scale, its codes. Contract: lowbit/ops/quantize.py.
//
// A row of `length` elements belongs to kThreads threads, kVectors vectors of 8 elements each:
// vector v of thread t holds elements (v kThreads + t) 8 ... + 7, so that neighbouring threads
// access neighbouring 16 bytes. Vectors past the row hold zeros, which widen no range.
#pragma once

#include "common/ptx.cuh"

namespace lowbit {

constexpr int kVector = 8;                     // elements
constexpr float kMinScale = 1.0f / (1 << 24);  // MIN_SCALE of lowbit/formats.py
constexpr float kMaxFp16 = 65504.0f, kMaxFp32 = 3.402823466e+38f;

// The integer grid of a call.
struct IntGrid {
  float qmin, qmax, clip;
  bool symmetric;
  bool packed;      // two 4-bit codes a byte; else one code a byte
  bool half_scale;  // fp16 scales; else fp32
};

__host__ inline IntGrid int_grid(int64_t bits, bool symmetric, double clip, bool packed,
                                 bool half_scale = false) {
  const float levels = static_cast<float>(1 << bits), half = levels / 2;
  return {symmetric ? -half : 0.0f,
          symmetric ? half - 1 : levels - 1,
          static_cast<float>(clip),
          symmetric,
          packed && bits == 4,  // 8-bit containers are one byte either way
          half_scale};
}

// Whether no quotient rounds to more than the grid has: |x| <= max |x|, and that is qmax scales but
// for their rounding.
__device__ __forceinline__ bool quotients_fit(const IntGrid& grid) {
  return grid.symmetric && grid.clip == 1.0f && !grid.half_scale;
}

// 8 elements as they are in memory. Kernels load all that they need before they widen any, so that
// the loads are under way together.
template <class T>
struct RawVector {
  static constexpr int kLoads = sizeof(T) * kVector / 16;  // 1 for fp16 and bf16, 2 for fp32
  uint4 words[kLoads];

  __device__ __forceinline__ void load(const T* from) {  // aligned to 16 bytes
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  }

  __device__ __forceinline__ void widen(float (&x)[kVector]) const {
    const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(elements[i]);
  }
};

template <class T>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const T* from) {
  RawVector<T> raw;
  raw.load(from);
  raw.widen(x);
}

// The other way round; each narrowed once.
template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&x)[kVector]) {
  constexpr int kStores = sizeof(T) * kVector / 16;
  uint4 raw[kStores];
  T* elements = reinterpret_cast<T*>(raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) elements[i] = from_float<T>(x[i]);
#pragma unroll
  for (int i = 0; i < kStores; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
}

// 8 elements of a type known at run time, as they are in memory. fp32 takes both words, the others
// the first.
struct AnyVector {
  uint4 words[2];

  // `index` of the first in the tensor.
  __device__ __forceinline__ void load(const void* from, FloatType type, int64_t index) {
    if (type == FloatType::kFloat) {
      const uint4* vector = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + index);
      words[0] = vector[0], words[1] = vector[1];
    } else {
      words[0] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + index);
    }
  }

  template <class T>
  __device__ __forceinline__ void widen_as(float (&x)[kVector]) const {
    RawVector<T> raw;
#pragma unroll
    for (int i = 0; i < RawVector<T>::kLoads; ++i) raw.words[i] = words[i];
    raw.widen(x);
  }
};

// What a scale is computed from; nan where an element is.
struct Range {
  float lo = 0.0f, hi = 0.0f;

  __device__ __forceinline__ void include(float x) {
    lo = min_nan(lo, x);
    hi = max_nan(hi, x);
  }

  // Enough of a symmetric range, whose larger side counts.
  __device__ __forceinline__ void include_magnitude(float x) { hi = max_nan(hi, fabsf(x)); }

  __device__ __forceinline__ void include(const Range& other) {
    lo = min_nan(lo, other.lo);
    hi = max_nan(hi, other.hi);
  }
};

// The range of the whole row in all of its kThreads threads. `scratch`: shared, one Range for each
// warp of the row, unused when the row is one warp; all threads of the block call it.
template <int kThreads>
__device__ __forceinline__ Range reduce_range(Range range, Range* scratch) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "a row is whole warps");
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Range other;
    other.lo = shuffle_xor(range.lo, mask);
    other.hi = shuffle_xor(range.hi, mask);
    range.include(other);
  }
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    if (lane_id() == 0) scratch[threadIdx.x / kWarp] = range;
    sync_block();
#pragma unroll
    for (int i = 0; i < kWarps; ++i) range.include(scratch[i]);
  }
  return range;
}

// The same where a row is the whole block, of any number of warps.
__device__ __forceinline__ Range reduce_range(Range range, Range* scratch) {
  range = reduce_range<kWarp>(range, nullptr);
  if (lane_id() == 0) scratch[threadIdx.x / kWarp] = range;
  sync_block();
  const int warps = blockDim.x / kWarp;
  if (lane_id() < warps) range = scratch[lane_id()];
  return reduce_range<kWarp>(range, nullptr);
}

// A quotient x / s from y = 1 / s and z = (1 - s y) / s, each correctly rounded: y + z is 1 / s
// within 2^-49 of it, and
//   q = x y + RN(x z)                                       (a fused multiply-add, rounded once)
// What is rounded last is within 2^-24 units in the last place of x / s, so q could differ from
// RN(x / s) only where x / s lies that close to the middle between two numbers. It rounds to
// another integer then if one of the two is a half step, k + 1 / 2 with |k| < 256: all such pairs
// of mantissas, 7999, were tried, and none does (docs/notes/0003). Nothing may leave the normal
// range: s is 2^-24 or more, multiplied by 2^-64 with x where it is large, and |x / s| < 2^100 as
// clip is not tiny (CUDA_MIN_CLIP of lowbit/ops/quantize.py).
struct Scale {
  float scale, zero_point;  // as they are stored
  float inverse, rest;      // y and z
  float factor;             // of x and s: 2^-64 where s is large, else 1
  uint32_t keep;            // all bits; none where the row is not finite, whose codes are 0
};

constexpr float kLargeScale = 18446744073709551616.0f;  // 2^64

// scale, rounded as it is stored, and zero_point (0 when symmetric). A row that is not finite has
// scale nan, by the bits that torch writes.
__device__ __forceinline__ Scale scale_of(const Range& range, const IntGrid& grid) {
  const float worst = max_nan(-range.lo, range.hi);
  const float lo = mul_rn(range.lo, grid.clip), hi = mul_rn(range.hi, grid.clip);
  const float span = grid.symmetric ? mul_rn(worst, grid.clip) : add_rn(hi, -lo);
  float scale = div_rn(span, grid.qmax);
  scale = fminf(fmaxf(scale, kMinScale), grid.half_scale ? kMaxFp16 : kMaxFp32);
  if (grid.half_scale) scale = __half2float(__float2half_rn(scale));
  float zero_point = 0.0f;
  if (!grid.symmetric) zero_point = fminf(fmaxf(rintf(div_rn(-lo, scale)), 0.0f), grid.qmax);
  const bool finite = worst <= kMaxFp32, is_large = scale > kLargeScale;
  const float divisor = is_large ? scale / kLargeScale : scale;
  const float inverse = div_rn(1.0f, divisor);
  return {finite ? scale : bit_cast<float>(0x7FC00000u),
          finite ? zero_point : 0.0f,
          inverse,
          div_rn(fmaf(-divisor, inverse, 1.0f), divisor),
          is_large ? 1.0f / kLargeScale : 1.0f,
          finite ? ~0u : 0u};
}

// fp32 counts in steps of 1 from 2^23 to 2^24, so adding 1.5 * 2^23 rounds every |x| < 2^22 to an
// integer, half to even, and leaves it in the low bits: kRounderBits + the integer.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4B40'0000;

// The sum of kCodes numbers, `first` the first, each kBits above the one before; what overflows is
// lost.
template <int kCodes, int kBits>
__host__ __device__ constexpr uint32_t repeated(uint32_t first) {
  uint32_t sum = 0;
  for (int i = 0; i < kCodes; ++i) sum += first << (i * kBits);
  return sum;
}

// kCodes codes of kBits bits from `rounded`, integers c on kRounderBits. Their sum is one of whole
// words, with carries. Asymmetric: the zero point makes each c >= 0, so that none is left.
// Symmetric: half of 2^kBits does; c and c + half differ, in kBits bits, in the highest.
template <int kCodes, int kBits>
__device__ __forceinline__ uint32_t join(const uint32_t* rounded, const Scale& scale,
                                         const IntGrid& grid) {
  constexpr uint32_t kHalves = repeated<kCodes, kBits>(1u << (kBits - 1));
  const uint32_t zero_points = static_cast<uint32_t>(scale.zero_point) * repeated<kCodes, kBits>(1);
  uint32_t word = (grid.symmetric ? kHalves : zero_points) - repeated<kCodes, kBits>(kRounderBits);
#pragma unroll
  for (int i = 0; i < kCodes; ++i) word += rounded[i] << (i * kBits);
  return (word ^ (grid.symmetric ? kHalves : 0u)) & scale.keep;
}

// Codes of 8 neighbours: to 8 bytes, or to 4 when packed; of vector `vector` of `codes`. kClamp
// false: where quotients_fit.
template <bool kClamp, class Index>
__device__ __forceinline__ void store_vector_codes(uint8_t* codes, Index vector,
                                                   const float (&x)[kVector], const Scale& scale,
                                                   const IntGrid& grid) {
  const float lo = grid.qmin - scale.zero_point, hi = grid.qmax - scale.zero_point;
  uint32_t rounded[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float y = mul_rn(x[i], scale.factor);
    const float q = fmaf(y, scale.inverse, mul_rn(y, scale.rest));
    rounded[i] = bit_cast<uint32_t>(add_rn(kClamp ? fminf(fmaxf(q, lo), hi) : q, kRounder));
  }
  if (grid.packed) {
    reinterpret_cast<uint32_t*>(codes)[vector] = join<8, 4>(rounded, scale, grid);
  } else {
    reinterpret_cast<uint2*>(codes)[vector] =
        make_uint2(join<4, 8>(rounded, scale, grid), join<4, 8>(rounded + 4, scale, grid));
  }
}

// `index` of the first in the tensor, a multiple of 8.
__device__ __forceinline__ void store_codes(uint8_t* codes, int64_t index,
                                            const float (&x)[kVector], const Scale& scale,
                                            const IntGrid& grid) {
  store_vector_codes<true>(codes, index / kVector, x, scale, grid);
}

// By one thread of a row.
__device__ __forceinline__ void store_scale(void* scales, uint8_t* zero_points, int64_t row,
                                            const Scale& scale, const IntGrid& grid) {
  if (grid.half_scale) {
    // a conversion gives nan 0x7FFF; the reference stores the quiet nan
    const bool is_nan = scale.scale != scale.scale;
    const __half half = __float2half_rn(scale.scale);
    static_cast<uint16_t*>(scales)[row] = is_nan ? 0x7E00 : bit_cast<uint16_t>(half);
  } else {
    static_cast<float*>(scales)[row] = scale.scale;
  }
  if (!grid.symmetric) zero_points[row] = static_cast<uint8_t>(scale.zero_point);
}

}  // namespace lowbit
