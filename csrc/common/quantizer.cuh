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
constexpr uint32_t kInfBits = 0x7F800000;      // of fp32; those of |nan| are above
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

// 16 bytes a load for fp16 and bf16, twice that for fp32; `from` is aligned to its vector.
template <class T>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const T* from) {
  constexpr int kLoads = sizeof(T) * kVector / 16;
  uint4 raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
  const T* elements = reinterpret_cast<const T*>(raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(elements[i]);
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

// What a scale is computed from. `worst` is the largest |x| by its bits, which for non-negative
// floats order as integers do, nan last: unlike fmaxf it does not lose a nan.
struct Range {
  uint32_t worst = 0;
  float lo = 0.0f, hi = 0.0f;

  __device__ __forceinline__ void include(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x) & 0x7FFFFFFF;
    worst = bits > worst ? bits : worst;
    lo = fminf(lo, x);
    hi = fmaxf(hi, x);
  }

  __device__ __forceinline__ void include(const Range& other) {
    worst = other.worst > worst ? other.worst : worst;
    lo = fminf(lo, other.lo);
    hi = fmaxf(hi, other.hi);
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
    other.worst = shuffle_xor(range.worst, mask);
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

struct Scale {
  float scale, zero_point;
};

// scale, rounded as it is stored, and zero_point (0 when symmetric). A row that is not finite has
// scale nan.
__device__ __forceinline__ Scale scale_of(const Range& range, const IntGrid& grid) {
  const float lo = mul_rn(range.lo, grid.clip), hi = mul_rn(range.hi, grid.clip);
  const float span =
      grid.symmetric ? mul_rn(bit_cast<float>(range.worst), grid.clip) : add_rn(hi, -lo);
  float scale = div_rn(span, grid.qmax);
  scale = fminf(fmaxf(scale, kMinScale), grid.half_scale ? kMaxFp16 : kMaxFp32);
  if (grid.half_scale) scale = __half2float(__float2half_rn(scale));
  if (range.worst >= kInfBits) return {bit_cast<float>(0x7FC00000u), 0.0f};
  if (grid.symmetric) return {scale, 0.0f};
  return {scale, fminf(fmaxf(rintf(div_rn(-lo, scale)), 0.0f), grid.qmax)};
}

// The code of x; 0 where x or the scale is nan, which fmaxf and fminf would drop.
__device__ __forceinline__ int code_of(float x, const Scale& scale, const IntGrid& grid) {
  const float steps = add_rn(rintf(div_rn(x, scale.scale)), scale.zero_point);
  const float code = fminf(fmaxf(steps, grid.qmin), grid.qmax);
  return steps == steps ? static_cast<int>(code) : 0;
}

// Codes of 8 neighbours: to 8 bytes, or to 4 when packed; `index` of the first in the tensor.
__device__ __forceinline__ void store_codes(uint8_t* codes, int64_t index,
                                            const float (&x)[kVector], const Scale& scale,
                                            const IntGrid& grid) {
  uint32_t low = 0, high = 0;  // codes 0..3 and 4..7
  const int bits = grid.packed ? 4 : 8;
  const uint32_t mask = grid.packed ? 0xF : 0xFF;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    low |= (code_of(x[i], scale, grid) & mask) << (i * bits);
    high |= (code_of(x[i + kVector / 2], scale, grid) & mask) << (i * bits);
  }
  if (grid.packed) {
    *reinterpret_cast<uint32_t*>(codes + index / 2) = low | high << 16;
  } else {
    *reinterpret_cast<uint2*>(codes + index) = make_uint2(low, high);
  }
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
