// SPDX-License-Identifier: Apache-2.0
// The rows of a warp of csrc/kv_attention.cu: q, scores, online softmax, weighted sums of V.
#pragma once

#include "common/fragments.cuh"
#include "common/kv_tile.cuh"

namespace lowbit::kv {

// What all rows need of a stage's positions: K's scale, times k_factor; its zero point in code
// units; V's scale, brought to the top of fp16; its zero point as if it was a code.
struct StageScales {
  float *k_scale, *k_zero, *v_scale;
  uint16_t* v_zero;

  template <class T>
  __device__ static __forceinline__ StageScales at(uint8_t* stage) {
    float* first = reinterpret_cast<float*>(stage + T::kScalesAt);
    return {first, first + kTokens, first + 2 * kTokens,
            reinterpret_cast<uint16_t*>(first + 3 * kTokens)};
  }
};

// ---- the rows of a warp

// q as A registers, each row brought to the top of fp16. Where they would be too many they lie in
// shared memory, [kWarpsM][chunk][step][lane] of 16 bytes.
template <class T>
struct Queries {
  uint32_t a[T::kSharedQueries ? 1 : T::kChunks][T::kSteps][4];
  uint32_t shared;  // this lane's, of its warp's rows
  float factor[2];  // rows g and g + 8: scores to binary digits
  float sum[2];     // of q, as it is here

  __device__ __forceinline__ void fragment(uint32_t (&out)[4], int chunk, int step) const {
    if constexpr (T::kSharedQueries) {
      const uint4 v = load_shared_16(shared + (chunk * T::kSteps + step) * kWarp * 16);
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = a[chunk][step][i];
    }
  }
};

// A lane's elements of a chunk in its row of `rows`, as a word of codes has them: fp16 or bf16
// bits, two a register; zeros where there is no row (row_at -1) or no element.
template <class T>
__device__ __forceinline__ void load_elements(float (&x)[4 * T::kSteps], const Arguments& a,
                                              const uint16_t* rows, int64_t row_at, int chunk) {
  const int d = chunk * T::kElements + lane_id() % 4 * 4 * T::kSteps;
  const bool valid = row_at >= 0 && d < a.head_dim;
  const auto* from = reinterpret_cast<const uint2*>(rows + row_at + d);
#pragma unroll
  for (int i = 0; i < T::kSteps; ++i) {
    uint2 four = make_uint2(0, 0);
    if (valid) four = from[i];
    x[4 * i] = widen(four.x & 0xFFFF, a.is_bf16), x[4 * i + 1] = widen(four.x >> 16, a.is_bf16);
    x[4 * i + 2] = widen(four.y & 0xFFFF, a.is_bf16), x[4 * i + 3] = widen(four.y >> 16, a.is_bf16);
  }
}

// The exponent of the largest element of a row, which 4 lanes have.
template <class T>
__device__ __forceinline__ int row_exponent(const Arguments& a, const uint16_t* rows,
                                            int64_t row_at) {
  float amax = 0.0f;
#pragma unroll(T::kSharedQueries ? 1 : T::kChunks)
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    float x[4 * T::kSteps];
    load_elements<T>(x, a, rows, row_at, chunk);
#pragma unroll
    for (int i = 0; i < 4 * T::kSteps; ++i) amax = max_nan(amax, fabsf(x[i]));
  }
  amax = max_nan(amax, shuffle_xor(amax, 1));
  amax = max_nan(amax, shuffle_xor(amax, 2));
  return exponent_of(amax);
}

// So little that what it makes of any two scores, below 2^44, is the same p; but not 0, which would
// make nan of what a row does not see, -inf.
constexpr float kLeastFactor = 7.52316384526264e-37f;  // 2^-120

// `row_at`: where rows g and g + 8 begin in q, -1: none. q is read twice, the second time from L1.
template <class T>
__device__ __forceinline__ void load_queries(Queries<T>& q, const Arguments& a,
                                             const int64_t (&row_at)[2], bool stores) {
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int exponent = row_exponent<T>(a, a.q, row_at[half]);
    scale[half] = to_top(exponent);
    q.factor[half] = fmaxf(a.factor * from_top(exponent), kLeastFactor);
    q.sum[half] = 0.0f;
  }
#pragma unroll(T::kSharedQueries ? 1 : T::kChunks)
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    uint32_t registers[T::kSteps][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[4 * T::kSteps];
      load_elements<T>(x, a, a.q, row_at[half], chunk);
#pragma unroll
      for (int i = 0; i < 4 * T::kSteps; ++i) {
        x[i] *= scale[half];
        q.sum[half] += x[i];
      }
#pragma unroll
      for (int i = 0; i < T::kPairs; ++i) {  // codes i and i + kPairs are in one register
        const float factor = inverse_factor<T::kBits>(i);
        registers[i / 2][2 * (i % 2) + half] = pack_half2(x[i] * factor, x[i + T::kPairs] * factor);
      }
    }
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      const uint32_t (&r)[4] = registers[step];
      if constexpr (T::kSharedQueries) {
        if (stores) {
          store_shared_16(q.shared + (chunk * T::kSteps + step) * kWarp * 16,
                          make_int4(r[0], r[1], r[2], r[3]));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q.a[chunk][step][i] = r[i];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    q.sum[half] += shuffle_xor(q.sum[half], 1);
    q.sum[half] += shuffle_xor(q.sum[half], 2);
  }
}

// Online softmax of rows g and g + 8.
template <class T>
struct State {
  float top[2];                         // the largest score so far, without factor
  float total[2];                       // this lane's share of the sum of p
  float acc[T::kChunks][T::kPairs][4];  // D registers: codes weighted by p and V's scale
  float zero[4];                        // likewise the zero points, the same in all columns
  int exponent;                         // of V's scales so far
};

template <class T>
__device__ __forceinline__ void clear(State<T>& s) {
#pragma unroll
  for (int half = 0; half < 2; ++half) s.top[half] = -INFINITY, s.total[half] = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) s.zero[i] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s.acc[chunk][i][j] = 0.0f;
    }
  }
  s.exponent = kLeastExponent;
}

// Step 3: scores of 32 positions, D registers of four columns of 8, without the rows' factors.
template <class T>
__device__ __forceinline__ void score(float (&s)[4][4], const Queries<T>& q, uint32_t k_codes,
                                      const StageScales& scales) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 zero = *reinterpret_cast<const float2*>(scales.k_zero + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = -(i % 2 ? zero.y : zero.x) * q.sum[i / 2];
  }
#pragma unroll(T::kSharedQueries ? 1 : T::kChunks)
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    uint32_t a[T::kSteps][4];
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) q.fragment(a[step], chunk, step);
    uint32_t words[4];  // of position g of each column of 8
    ldmatrix_x4(words, k_codes + lane_id() * T::kPitch + chunk * kChunk);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        const uint32_t b[2] = {pair_of_codes<T::kBits>(words[n], 2 * step),
                               pair_of_codes<T::kBits>(words[n], 2 * step + 1)};
        mma_f16(s[n], a[step], b);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 scale = *reinterpret_cast<const float2*>(scales.k_scale + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= i % 2 ? scale.y : scale.x;
  }
}

// Step 4: scores to p, with the state's maximum and sum; then what is before times `shrink`.
// seen_end: where what rows g and g + 8 see ends; there_end: the positions; both from the tile's
// first position on; row g + 8 sees no less far than row g.
template <class T>
__device__ __forceinline__ void soften(State<T>& state, float (&s)[4][4], const Queries<T>& q,
                                       const int (&seen_end)[2], int there_end, int window,
                                       int exponent) {
  const int t = lane_id() % 4;
  if (kTokens > smaller(seen_end[0], there_end) || seen_end[1] > window) {  // not all are seen
    // One comparison a score: what is before a window is a large unsigned number.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = seen_end[half] - window;
      const unsigned count = larger(smaller(seen_end[half], there_end) - begin, 0);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned from_begin = 8 * n + 2 * t + i - begin;
          if (from_begin >= count) s[n][2 * half + i] = -INFINITY;
        }
      }
    }
  }
  float shrink[2], base[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half];
#pragma unroll
    for (int n = 0; n < 4; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    base[half] = top == -INFINITY ? 0.0f : top;  // of a row that saw nothing so far
    shrink[half] = state.top[half] == -INFINITY
                       ? 0.0f
                       : exp2_approx((state.top[half] - base[half]) * q.factor[half]);
    state.top[half] = top;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = exp2_approx((s[n][i] - base[i / 2]) * q.factor[i / 2]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 4; ++n) sum += s[n][2 * half] + s[n][2 * half + 1];
    state.total[half] = state.total[half] * shrink[half] + sum;
    if (exponent != state.exponent) {  // larger: what is before was brought to the top of less
      shrink[half] *= power_of_two(kExponentBias + state.exponent - exponent);
    }
  }
  state.exponent = exponent;
  if (shrink[0] != 1.0f || shrink[1] != 1.0f) {
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) state.acc[chunk][i][j] *= shrink[j / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) state.zero[j] *= shrink[j / 2];
  }
}

// D registers of scores are A registers of p, each times its position's scale; both of 16
// positions.
__device__ __forceinline__ void weigh(uint32_t (&weights)[2][4], const float (&p)[4][4],
                                      const float* v_scale, float unit) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 scale = *reinterpret_cast<const float2*>(v_scale + 8 * n + 2 * t);
    const float x = scale.x * unit, y = scale.y * unit;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights[n / 2][2 * (n % 2) + half] = pack_half2(p[n][2 * half] * x, p[n][2 * half + 1] * y);
    }
  }
}

// Step 5
template <class T>
__device__ __forceinline__ void accumulate(State<T>& state, const float (&p)[4][4],
                                           uint32_t v_codes, const StageScales& scales) {
  const int t = lane_id() % 4;
  uint32_t weights[2][4];
  weigh(weights, p, scales.v_scale, 1.0f);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const auto* zeros = reinterpret_cast<const uint32_t*>(scales.v_zero + 16 * step + 2 * t);
    const uint32_t b[2] = {zeros[0], zeros[4]};
    mma_f16(state.zero, weights[step], b);
  }
#pragma unroll
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    uint32_t words[4];  // 16 bits of positions 8 i + 2 t and + 1 each: kPairs codes
    ldmatrix_x4_trans(words, v_codes + lane_id() * T::kPitch + chunk * kChunk);
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {pair_of_codes<T::kBits>(words[2 * step], i),
                               pair_of_codes<T::kBits>(words[2 * step + 1], i)};
        mma_f16(state.acc[chunk][i], weights[step], b);
      }
    }
  }
}

// Sums of codes to sums of numbers: zero points off, and what pairs of codes were multiplied with.
template <class T>
__device__ __forceinline__ void settle(State<T>& state) {
#pragma unroll
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float codes = state.acc[chunk][i][j] * inverse_factor<T::kBits>(i);
        state.acc[chunk][i][j] = (codes - state.zero[j & 2]) * kInverseCodeUnit;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) state.zero[j] = 0.0f;
}

}  // namespace lowbit::kv
