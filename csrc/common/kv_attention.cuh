// SPDX-License-Identifier: Apache-2.0
// What a block of csrc/kv_attention.cu does; its header has the map and the steps.
#pragma once

#include "common/kv_new.cuh"

namespace lowbit::kv {

// ---- step 1

struct Sequence {
  int b, first_query, queries, length, first_tile;
};

// Sequence b's tiles begin at the number of rows before it / tile_rows + b, which leaves gaps;
// where a tile is one query, at the number of queries before it.
__device__ __forceinline__ int tile_start(int query, int b, int heads, int tile_rows) {
  return tile_rows == heads ? query
                            : static_cast<int>(static_cast<int64_t>(query) * heads / tile_rows) + b;
}

// All lanes of a warp. The sequence after the last, of length 0, has the rows that nobody owns.
__device__ __forceinline__ Sequence find(int tile, const Arguments& a, int heads, int tile_rows) {
  int b = 0;
#pragma unroll 1
  for (int first = 1; first <= a.B; first += kWarp) {
    const int other = first + lane_id();
    b += other <= a.B && tile_start(a.query_start[other], other, heads, tile_rows) <= tile;
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) b += shuffle_xor(b, mask);
  const int start = a.query_start[b], end = b < a.B ? a.query_start[b + 1] : a.T;
  const int length = b < a.B ? smaller(a.seq_lens[b], a.pages_of_row * a.page_size) : 0;
  return {b, start, end - start, length, tile_start(start, b, heads, tile_rows)};
}

// The first position that any query of the sequence sees, at most kTokens - 1 earlier: tiles and
// splits begin at whole multiples, wherever a window ends.
__device__ __forceinline__ int sequence_begin(const Sequence& sequence, const Arguments& a) {
  return larger(sequence.length - sequence.queries + 1 - a.window, 0) / kTokens * kTokens;
}

// ---- step 2

// Lane's position of a tile: which row of the cache it is, -1: none.
__device__ __forceinline__ int cache_row(const Arguments& a, const int* pages, int position,
                                         int end, int kv_head) {
  if (position >= end) return -1;
  const int page = position / a.page_size;
  return (pages[page] * a.page_size + position - page * a.page_size) * a.num_kv_heads + kv_head;
}

struct TokenScales {
  uint16_t k_scale, v_scale;  // fp16
  uint8_t k_zero, v_zero;
};

__device__ __forceinline__ TokenScales load_scales(const Arguments& a, int row) {
  if (row < 0) return {0, 0, 0, 0};
  return {reinterpret_cast<const uint16_t*>(a.k.scale)[row],
          reinterpret_cast<const uint16_t*>(a.v.scale)[row], a.k.zero_points[row],
          a.v.zero_points[row]};
}

constexpr float kLargestHalf = 65504.0f;

// nan where it is not finite, so that it spreads.
__device__ __forceinline__ float finite(uint16_t scale) {
  const float x = __half2float(bit_cast<__half>(scale));
  return fabsf(x) <= kLargestHalf ? x : bit_cast<float>(0x7FC0'0000u);
}

// Codes of the tile's 32 positions to a stage, by all threads of the group. `row` is of the lane's
// own position. Zeros where there is no position, and no element in a row.
template <class T>
__device__ __forceinline__ void copy_codes(uint32_t stage, const Arguments& a, int row) {
  constexpr int kGroup = kWarp * T::kWarpsM;
  const int thread = T::kWarpsM == 1 ? lane_id() : static_cast<int>(threadIdx.x);
  const int row_bytes = a.head_dim * T::kBits / 8;
  const bool aligned = row_bytes % kChunk == 0;
#pragma unroll 4  // more would take registers that rows need
  for (int i = 0; i < ceil_div(kTokens * T::kChunks, kGroup); ++i) {
    const int index = i * kGroup + thread, token = index / T::kChunks;
    const int byte = index % T::kChunks * kChunk;
    const int from_row = shuffle(row, token % kTokens);
    if (kTokens * T::kChunks % kGroup != 0 && token >= kTokens) continue;
    const int left = from_row < 0 ? 0 : row_bytes - byte;
    const int64_t from = from_row < 0 ? 0 : static_cast<int64_t>(from_row) * row_bytes + byte;
    const uint32_t to = stage + token * T::kPitch + byte;
    if (aligned) {
      cp_async_16(to, a.k.codes + from, left > 0 ? 16 : 0);
      cp_async_16(to + T::kCodesBytes, a.v.codes + from, left > 0 ? 16 : 0);
    } else {
#pragma unroll
      for (int half = 0; half < 16; half += 8) {
        cp_async_8(to + half, a.k.codes + from + half, left > half ? 8 : 0);
        cp_async_8(to + T::kCodesBytes + half, a.v.codes + from + half, left > half ? 8 : 0);
      }
    }
  }
  cp_async_commit();
}

// ---- the block

template <class T>
__device__ __forceinline__ void kv_attention_block(const Arguments& a) {
  const int kv_head = blockIdx.x % a.num_kv_heads, tile = blockIdx.x / a.num_kv_heads;
  const int warp = threadIdx.x / kWarp, lane = lane_id(), g = lane / 4, t = lane % 4;
  const int warp_m = T::kWarpsN == 1 ? warp : 0, warp_n = T::kWarpsN == 1 ? 0 : warp;
  uint8_t* smem = dynamic_smem() + T::kQueriesBytes;
  const auto sync_group = [] {
    if constexpr (T::kWarpsM == 1) {
      sync_warp();
    } else {
      sync_block();
    }
  };

  // step 1
  const Sequence sequence = find(tile, a, a.heads, a.tile_rows);
  const Rows rows = {(tile - sequence.first_tile) * a.tile_rows, sequence.queries,
                     sequence.first_query, sequence.length - sequence.queries + 1};
  if (rows.first >= rows.queries * a.heads) return;  // a gap
  const int last_query = smaller((rows.first + a.tile_rows - 1) / a.heads, rows.queries - 1);
  const int split = sequence_begin(sequence, a) + blockIdx.y * a.split_length;
  const int tile_begin = rows.before + rows.first / a.heads - a.window;
  const int begin = larger(split, larger(tile_begin, 0) / kTokens * kTokens);
  const int end = smaller(rows.before + last_query, split + a.split_length);
  if (a.splits > 1 && begin >= end) return;
  int cached = sequence.length;  // from there on positions are not in the pages
  if constexpr (T::kTakesNew) {
    if (sequence.b < a.B) {
      cached = larger(a.cached_lens[sequence.b], sequence.length - sequence.queries);
    }
  }
  const int pages_end = smaller(end, cached);
  // Steps 6 and 7 find them there, so that they take no registers meanwhile.
  auto* kept_rows = reinterpret_cast<Rows*>(dynamic_smem() + T::kRowsAt);
  auto* kept_new = reinterpret_cast<NewPositions*>(kept_rows + 1);
  if (threadIdx.x == 0) {
    *kept_rows = rows;
    if constexpr (T::kTakesNew) {
      *kept_new = {larger(begin, cached), end, rows.first_query + 1 - rows.before};
    }
  }

  Queries<T> q;
  int seen_end[2];
  int64_t row_at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = warp_m * kTileRows + g + 8 * half, index = rows.index(a, kv_head, local);
    row_at[half] = index < 0 ? -1 : static_cast<int64_t>(index) * a.head_dim;
    seen_end[half] = index < 0 ? rows.before + last_query : rows.seen(a, local);
  }
  if constexpr (T::kSharedQueries) {
    constexpr int kWarpBytes = kTileRows * T::kDim * 2;
    q.shared = smem_address(dynamic_smem()) + warp_m * kWarpBytes + lane * 16;
  }
  load_queries<T>(q, a, row_at, warp_n == 0);
  if constexpr (T::kSharedQueries) sync_block();

  // step 2
  const int* pages = a.block_table + sequence.b * a.table_stride;
  const int step_length = kTokens * T::kWarpsN;
  const int first = begin + warp_n * kTokens;
  uint8_t* stages = smem + warp_n * kStages * T::kStageBytes;
  const uint32_t stages_at = smem_address(stages);
  State<T> state;
  clear(state);
  TokenScales next_scales = {0, 0, 0, 0};
  int next_row = -1;
  if (first < pages_end) {
    const int row = cache_row(a, pages, first + lane, pages_end, kv_head);
    copy_codes<T>(stages_at, a, row);
    next_scales = load_scales(a, row);
    next_row = cache_row(a, pages, first + step_length + lane, pages_end, kv_head);
  }
  int stage = 0;
#pragma unroll 1
  for (int start = first; start < pages_end; start += step_length, stage ^= 1) {
    uint8_t* here = stages + stage * T::kStageBytes;
    const uint32_t here_at = stages_at + stage * T::kStageBytes;
    const StageScales scales = StageScales::at<T>(here);
    const float v_scale = finite(next_scales.v_scale);
    int exponent = v_scale == v_scale ? exponent_of(v_scale) : kLeastExponent;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const int other = shuffle_xor(exponent, mask);
      exponent = exponent > other ? exponent : other;
    }
    exponent = exponent > state.exponent ? exponent : state.exponent;
    if (warp_m == 0) {
      scales.k_scale[lane] = finite(next_scales.k_scale) * a.k_factor;
      scales.k_zero[lane] = static_cast<float>(next_scales.k_zero) * kCodeUnit;
      scales.v_scale[lane] = v_scale * to_top(exponent);
      scales.v_zero[lane] = next_scales.v_zero;
    }
    cp_async_wait<0>();
    sync_group();  // all is there, and the other stage has been read
    if (start + step_length < pages_end) {
      copy_codes<T>(stages_at + (stage ^ 1) * T::kStageBytes, a, next_row);
      next_scales = load_scales(a, next_row);
      next_row = cache_row(a, pages, start + 2 * step_length + lane, pages_end, kv_head);
    }

    // steps 3 to 5
    float s[4][4];
    score<T>(s, q, here_at, scales);
    const int seen_here[2] = {seen_end[0] - start, seen_end[1] - start};
    soften<T>(state, s, q, seen_here, pages_end - start, a.window, exponent);
    accumulate<T>(state, s, here_at + T::kCodesBytes, scales);
  }
  settle<T>(state);

  // step 6
  if constexpr (T::kTakesNew) {
    sync_block();  // for what is kept
    attend_new<T>(state, q, a, smem, *kept_rows, *kept_new);
  }
  sync_block();  // shared memory is free

  // step 7
  float* sums = reinterpret_cast<float*>(smem);  // [warps][16][kOutPitch]
  float* tops = sums + T::kWarpsM * T::kWarpsN * kTileRows * T::kOutPitch;  // [warps][16][2]
  const float unit = from_top(state.exponent);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = state.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int row = warp * kTileRows + g + 8 * half;
    if (t == 0) {
      tops[2 * row] = state.top[half] == -INFINITY ? -INFINITY : state.top[half] * q.factor[half];
      tops[2 * row + 1] = total;
    }
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int d = chunk * T::kElements + (2 * t + j) * T::kPairs + i;
          sums[row * T::kOutPitch + d] = state.acc[chunk][i][2 * half + j] * unit;
        }
      }
    }
  }
  sync_block();
  const Rows kept = *kept_rows;
  const int split_rows = a.T * a.num_kv_heads * a.heads;
#pragma unroll 1
  for (int local = warp; local < T::kRows; local += T::kThreads / kWarp) {
    const int index = kept.index(a, kv_head, local);
    if (index < 0) continue;
    // Of the warps that share this row; those without positions have weight 0.
    float top = -INFINITY, total = 0.0f, weights[T::kWarpsN];
#pragma unroll
    for (int n = 0; n < T::kWarpsN; ++n) top = fmaxf(top, tops[2 * (n * kTileRows + local)]);
#pragma unroll
    for (int n = 0; n < T::kWarpsN; ++n) {
      const int row = n * kTileRows + local;
      weights[n] = top == -INFINITY ? 1.0f : exp2_approx(tops[2 * row] - top);
      total += tops[2 * row + 1] * weights[n];
    }
    const bool sees = kept.seen(a, local) > 0;
    const float inverse = sees ? div_rn(1.0f, total) : 0.0f;
#pragma unroll 1
    for (int d = lane; d < a.head_dim; d += kWarp) {
      float y = 0.0f;
#pragma unroll
      for (int n = 0; n < T::kWarpsN; ++n) {
        y += sums[(n * kTileRows + local) * T::kOutPitch + d] * weights[n];
      }
      const int64_t at = static_cast<int64_t>(index) * a.head_dim + d;
      if (a.splits > 1) {
        a.partial[static_cast<int64_t>(blockIdx.y) * split_rows * a.head_dim + at] = y;
      } else {
        a.out[at] = narrow(sees ? y * inverse : 0.0f, a.is_bf16);
      }
    }
    if (a.splits > 1 && lane == 0) {
      const int64_t at = static_cast<int64_t>(blockIdx.y) * split_rows + index;
      a.row_max[at] = top;
      a.row_sum[at] = total;
    }
  }
}

}  // namespace lowbit::kv
