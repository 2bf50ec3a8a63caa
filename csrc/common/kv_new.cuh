// SPDX-License-Identifier: Apache-2.0
// Step 6 of csrc/kv_attention.cu: positions that the call gives in full precision.
//   a  8 positions a warp, 4 lanes each, which have a row's elements as they have q's: K and V are
//      brought to the top of fp16, a power of two each row, and go to shared memory: K as the B
//      registers of scores, V in rows whose columns stand in the order of the sums
//   b  scores, softmax and weighted sums of these 32 positions as of those in pages
// Nothing is under way meanwhile: other blocks of the SM are to hide that.
#pragma once

#include "common/kv_softmax.cuh"

namespace lowbit::kv {

// The memory of 32 positions.
template <class T>
struct NewStage {
  uint8_t* memory;

  // This lane's words of a chunk, for the scores of 8 positions.
  __device__ __forceinline__ uint32_t* keys(int chunk, int eight) const {
    const int fragment = (chunk * (kTokens / 8) + eight) * kWarp + lane_id();
    return reinterpret_cast<uint32_t*>(memory) + fragment * 2 * T::kSteps;
  }
  // Of a position; columns 8 (chunk kPairs + i) + c hold elements chunk kElements + c kPairs + i.
  __device__ __forceinline__ uint8_t* values(int position) const {
    return memory + T::kNewValuesAt + position * T::kNewPitch;
  }
  __device__ __forceinline__ float* k_scale() const {
    return reinterpret_cast<float*>(memory + T::kNewScalesAt);
  }
  __device__ __forceinline__ float* v_scale() const { return k_scale() + kTokens; }
};

// Rows of K or V, each to the top of fp16: put(chunk, pairs) takes what a lane has of them, times
// `factor` of a pair. Returns the exponent from which it was brought there.
template <class T, class Factor, class Put>
__device__ __forceinline__ int bring_to_top(const Arguments& a, const uint16_t* rows,
                                            int64_t row_at, Factor factor, Put put) {
  const int exponent = row_exponent<T>(a, rows, row_at);
  const float scale = to_top(exponent);
#pragma unroll 1  // more would take registers that rows need
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    float x[4 * T::kSteps];
    load_elements<T>(x, a, rows, row_at, chunk);
    uint32_t pairs[T::kPairs];
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
      const float by = scale * factor(i);
      pairs[i] = pack_half2(x[i] * by, x[i + T::kPairs] * by);
    }
    put(chunk, pairs);
  }
  return exponent;
}

// Step a. `row_at`: where the lane's row begins in k_new and v_new, -1: none.
template <class T>
__device__ __forceinline__ void stage_new(const NewStage<T>& stage, const Arguments& a,
                                          int64_t row_at) {
  const int lane = lane_id(), t = lane % 4, warp = threadIdx.x / kWarp;
  const int position = 8 * warp + lane / 4;
  // q is divided by inverse_factor of its pair, K by that of the other one: all products alike.
  const int k_exponent = bring_to_top<T>(
      a, a.k_new, row_at, [](int i) { return inverse_factor<T::kBits>(i ^ 1); },
      [&](int chunk, const uint32_t (&pairs)[T::kPairs]) {
        uint32_t* to = stage.keys(chunk, warp);
#pragma unroll
        for (int i = 0; i < T::kPairs; ++i) to[i] = pairs[i];
      });
  const int v_exponent = bring_to_top<T>(
      a, a.v_new, row_at, [](int) { return 1.0f; },
      [&](int chunk, const uint32_t (&pairs)[T::kPairs]) {
        uint8_t* to = stage.values(position) + (chunk * T::kElements + 2 * t) * 2;
#pragma unroll
        for (int i = 0; i < T::kPairs; ++i) {
          *reinterpret_cast<uint32_t*>(to + 8 * i * 2) = pairs[i];
        }
      });
  if (t == 0) {
    const float products = kCodeUnit / inverse_factor<T::kBits>(1);
    stage.k_scale()[position] = from_top(k_exponent) * products * a.k_factor;
    stage.v_scale()[position] = from_top(v_exponent);
  }
}

// As `score`.
template <class T>
__device__ __forceinline__ void score_new(float (&s)[4][4], const Queries<T>& q,
                                          const NewStage<T>& stage) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
  }
#pragma unroll(T::kSharedQueries ? 1 : T::kChunks)
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    uint32_t a[T::kSteps][4];
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) q.fragment(a[step], chunk, step);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const auto* keys = reinterpret_cast<const uint2*>(stage.keys(chunk, n));
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        const uint2 pair = keys[step];
        const uint32_t b[2] = {pair.x, pair.y};
        mma_f16(s[n], a[step], b);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const auto* scales = reinterpret_cast<const float2*>(stage.k_scale() + 8 * n);
    const float2 scale = scales[lane_id() % 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= i % 2 ? scale.y : scale.x;
  }
}

// As `accumulate`, onto settled sums.
template <class T>
__device__ __forceinline__ void accumulate_new(State<T>& state, const float (&p)[4][4],
                                               const NewStage<T>& stage) {
  uint32_t weights[2][4];
  weigh(weights, p, stage.v_scale(), to_top(state.exponent));
  const uint32_t row = smem_address(stage.values(lane_id()));
#pragma unroll
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    // Loads of later chunks would come earlier, and take registers that these heads do not have.
    if constexpr (T::kSharedQueries) sync_block();
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
      uint32_t words[4];  // positions 8 j + 2 t and + 1 of column g
      ldmatrix_x4_trans(words, row + (chunk * T::kPairs + i) * 16);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {words[2 * step], words[2 * step + 1]};
        mma_f16(state.acc[chunk][i], weights[step], b);
      }
    }
  }
}

// By all warps of the block.
template <class T>
__device__ __forceinline__ void attend_new(State<T>& state, const Queries<T>& q, const Arguments& a,
                                           uint8_t* memory, const Rows& rows,
                                           const NewPositions& given) {
  const NewStage<T> stage = {memory};
  const int kv_head = blockIdx.x % a.num_kv_heads;
  const int lane = lane_id(), warp = threadIdx.x / kWarp, position = 8 * warp + lane / 4;
#pragma unroll 1
  for (int start = given.first; start < given.end; start += kTokens) {
    int64_t row_at = -1;
    if (start + position < given.end) {
      row_at = static_cast<int64_t>(given.own + start + position) * a.num_kv_heads + kv_head;
      row_at *= a.head_dim;
    }
    sync_block();  // what was there has been read
    stage_new<T>(stage, a, row_at);
    sync_block();
    int exponent = exponent_of(stage.v_scale()[lane]);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const int other = shuffle_xor(exponent, mask);
      exponent = exponent > other ? exponent : other;
    }
    exponent = exponent > state.exponent ? exponent : state.exponent;
    float s[4][4];
    score_new<T>(s, q, stage);
    const int end = given.end;
    int seen_here[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = warp * kTileRows + lane / 4 + 8 * half;
      seen_here[half] = rows.seen(a, local) - start;
    }
    soften<T>(state, s, q, seen_here, end - start, a.window, exponent);
    accumulate_new<T>(state, s, stage);
  }
}

}  // namespace lowbit::kv
