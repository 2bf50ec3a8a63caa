// SPDX-License-Identifier: Apache-2.0
// What a block of csrc/int_gemm.cu does; its header has the map and the steps.
#pragma once

#include "common/fragments.cuh"
#include "common/gemm_tiles.cuh"
#include "common/int_gemm.cuh"
#include "common/nibbles.cuh"
#include "common/ptx.cuh"

namespace lowbit::mma_gemm {

constexpr int kRowBytes = 128;  // of x in a stage
constexpr int kChunk = 16;      // bytes a cp.async copies
constexpr int kRowChunks = kRowBytes / kChunk;
constexpr int kSteps = 4;       // of a stage: the K of one instruction each, 32 bytes of a row,
constexpr int kGroupStep = 32;  // which are 32 codes where scales have two levels
constexpr int kRowPad = 4;      // int32; spreads step 6's writes over the banks
constexpr int kMaxStages = 4;

template <int kChannels_, int kTokens_, int kWarpsN_, int kWarpsM_, int kMaxKilobytes_,
          int kMinBlocks_>
struct Tile {
  static constexpr int kChannels = kChannels_, kTokens = kTokens_;
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_;
  static constexpr int kMaxBytes = kMaxKilobytes_ * 1024;  // of shared memory
  static constexpr int kMinBlocks = kMinBlocks_;           // an SM, that registers must allow
  static constexpr int kThreads = kWarp * kWarpsN * kWarpsM;
  static constexpr int kSlabs = kChannels / kWarpsN / 16;  // of 16 channels, a warp's
  static constexpr int kPairs = kTokens / kWarpsM / 16;    // of 8 tokens, a warp's

  static std::string name() { return text(kChannels, "x", kTokens); }

  static_assert(kChannels % kFragmentTile == 0 && kChannels <= kThreads, "whole weight tiles");
  static_assert(kSlabs * kWarpsN * 16 == kChannels && kPairs * kWarpsM * 16 == kTokens, "");
  static_assert(kTokens % (kThreads / kRowChunks) == 0, "threads copy the same number of chunks");
  static_assert(kFragmentTile % (16 * kSlabs) == 0, "a warp's channels lie in one weight tile");
};

template <IntGemmKind kKind_, bool kAsymmetric_, bool kTwoLevel_>
struct Operands {
  static constexpr IntGemmKind kKind = kKind_;
  static constexpr bool kAsymmetric = kAsymmetric_, kTwoLevel = kTwoLevel_;
  static constexpr bool kIsInt4 = kKind == IntGemmKind::kInt4;
  static_assert(!kTwoLevel || kKind == IntGemmKind::kBytes4, "two levels are for nibbles");

  static std::string name() {
    const char* codes = kKind == IntGemmKind::kBytes4   ? "w4"
                        : kKind == IntGemmKind::kBytes8 ? "w8"
                                                        : "w4_int4";
    return text(codes, kTwoLevel ? "_two_level" : "", kAsymmetric ? "_asym" : "");
  }
};

template <class Operands_, class Tile>
struct Gemm : Operands_, Tile {
  using Operands_::kKind, Operands_::kAsymmetric, Operands_::kTwoLevel, Operands_::kIsInt4;
  using Operands_::name;
  static constexpr int kStageK = kRowBytes * (kIsInt4 ? 2 : 1);
  static constexpr int kStageTiles = kStageK / kFragmentTile;
  static constexpr int kTileBytes = fragment_tile_bytes(kKind);
  static constexpr int kSlabBytes = kTileBytes / 4;             // 16 channels of a tile
  static constexpr int kPanelBytes = kStageTiles * kTileBytes;  // 64 channels of a stage
  static constexpr int kWordSteps = kKind == IntGemmKind::kBytes4 ? 2 : 1;  // 16 bytes are enough

  static constexpr int kXBytes = Tile::kTokens * kRowBytes;
  static constexpr int kWBytes = Tile::kChannels / kFragmentTile * kPanelBytes;
  static constexpr int kScaleBytes = kTwoLevel ? Tile::kChannels * 4 : 0;
  static constexpr int kStageBytes = kXBytes + kWBytes + kScaleBytes;
  static constexpr int kSumsStride = Tile::kChannels + kRowPad;
  static constexpr int kSumsBytes = Tile::kTokens * kSumsStride * 4;
  static constexpr int kStages = smaller(kMaxStages, Tile::kMaxBytes / kStageBytes);
  static constexpr int kSmemBytes = kStages * kStageBytes;
  static_assert(kStages >= 3, "copies are under way while a stage is read");
  static_assert(kSumsBytes + static_cast<int>(sizeof(int)) <= kSmemBytes, "sums, and a flag");
  static_assert(kWBytes / kChunk % Tile::kThreads == 0, "threads copy the same number of chunks");
  static_assert(kStageBytes % 128 == 0, "rows keep their banks in every stage");
  static_assert(kSmemBytes <= 99 * 1024, "what a block can have on sm_86, sm_89 and sm_120");
};

// ---- step 1

// A thread's share of the copies, stage after stage. Copies of 0 bytes read nothing, wherever they
// point to, and write zeros.
template <class G>
struct Copies {
  static constexpr int kRows = G::kThreads / kRowChunks;  // at once
  static constexpr int kBytes = G::kThreads * kChunk;     // of weights, at once
  static_assert(kRows % 8 == 0, "a thread's rows have one swizzle");
  static_assert(G::kPanelBytes % kBytes == 0, "and its weights at once one panel");

  const uint8_t *x, *w;       // its first chunks of the next stage
  int64_t row_bytes, w_step;  // from a row of x, and from a panel of w, to the next
  int rows, columns;          // of x from its first chunk on: what there is, in rows and bytes
  int panels, tiles;          // of w from the stage's first tile on, along N and K
  int x_to;
  uint64_t policy;

  __device__ __forceinline__ Copies(const IntGemmArguments& a, const Work& work) {
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int column = work.stage * kRowBytes + chunk * kChunk;
    const int tiles_k = ceil_div(a.K, kFragmentTile), tile_k = work.stage * G::kStageTiles;
    const int end = work.stage + work.stages;  // of this split
    row_bytes = G::kIsInt4 ? a.K / 2 : a.K;
    x = a.x + (work.m0 + row) * row_bytes + column;
    rows = a.M - work.m0 - row;
    columns = smaller(static_cast<int>(row_bytes), end * kRowBytes) - column;
    x_to = row * kRowBytes + (chunk ^ row % 8) * kChunk;

    const int tile_n = work.n0 / kFragmentTile;
    w_step = static_cast<int64_t>(tiles_k) * G::kTileBytes;
    w = a.w + tile_n * w_step + static_cast<int64_t>(tile_k) * G::kTileBytes + threadIdx.x * kChunk;
    panels = ceil_div(a.N, kFragmentTile) - tile_n;
    tiles = smaller(tiles_k, end * G::kStageTiles) - tile_k;
    // weights that no other block reads need not stay
    policy = l2_policy(a.M <= G::kTokens ? Evict::kFirst : Evict::kNormal);
  }

  // The next stage, to shared memory at `to`; zeros past the last.
  __device__ __forceinline__ void start(uint32_t to) {
#pragma unroll
    for (int i = 0; i < G::kTokens / kRows; ++i) {
      const bool inside = i * kRows < rows && columns > 0;
      cp_async_16(to + x_to + i * kRows * kRowBytes, x + i * kRows * row_bytes,
                  inside ? kChunk : 0);
    }
#pragma unroll
    for (int i = 0; i < G::kWBytes / kBytes; ++i) {
      const int panel = i * kBytes / G::kPanelBytes, byte = i * kBytes % G::kPanelBytes;
      const int tile = (byte + static_cast<int>(threadIdx.x) * kChunk) / G::kTileBytes;
      const bool inside = panel < panels && tile < tiles;
      cp_async_16_policy(to + G::kXBytes + threadIdx.x * kChunk + i * kBytes,
                         w + panel * w_step + byte, inside ? kChunk : 0, policy);
    }
    cp_async_commit();
    x += kRowBytes;
    columns -= kRowBytes;
    w += G::kPanelBytes;
    tiles -= G::kStageTiles;
  }
};

// The scales of groups of this thread's channel, stage after stage; none past kChannels, N and K,
// where weights are zeros.
template <class G>
struct GroupScales {
  const uint8_t* row = nullptr;  // of the next stage
  int left = 0;                  // from there on
  int log = 0;                   // of the steps a group has: 0, 1, 2

  __device__ __forceinline__ GroupScales(const IntGemmArguments& a, const Work& work) {
    if constexpr (G::kTwoLevel) {
      const int thread = threadIdx.x, n = work.n0 + thread;
      log = a.group_size / (2 * kGroupStep);  // of 32, 64, 128
      const int groups = (a.K / kGroupStep) >> log, first = (work.stage * kSteps) >> log;
      row = a.w_group_scale + static_cast<int64_t>(n) * groups + first;
      left = thread < G::kChannels && n < a.N ? groups - first : 0;
    }
  }

  // Byte i for step i of the next stage.
  __device__ __forceinline__ uint32_t next() {
    uint32_t word = 0, scale = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int group = i >> log;
      if ((group << log) == i) scale = group < left ? row[group] : 0;
      word |= scale << (8 * i);
    }
    row += kSteps >> log;
    left -= kSteps >> log;
    return word;
  }
};

// ---- steps 2 and 3

// What a warp multiplies: two buffers, one being loaded while the other is used.
template <class G>
struct Fragments {
  uint4 weights[2][G::kSlabs];
  uint32_t tokens[2][G::kPairs][4];  // B registers of 8 tokens and of the next 8
};

// Of `step` of the stage at `stage`; `warp_n` and `warp_m` place the warp in the block.
template <class G>
__device__ __forceinline__ void load_fragments(Fragments<G>& fragments, uint32_t stage, int step,
                                               int warp_n, int warp_m) {
  const int lane = lane_id();
  const int matrix = lane / 8, chunk = 2 * step + matrix % 2;  // of ldmatrix
#pragma unroll
  for (int pair = 0; pair < G::kPairs; ++pair) {
    const int row = (warp_m * G::kPairs + pair) * 16 + matrix / 2 * 8 + lane % 8;
    ldmatrix_x4(fragments.tokens[step % 2][pair],
                stage + row * kRowBytes + (chunk ^ row % 8) * kChunk);
  }
  if (step % G::kWordSteps != 0) return;
  constexpr int kStepsPerTile = kSteps / G::kStageTiles;
  constexpr int kStepBytesOfSlab = kWarp * kChunk;
  const int slab0 = warp_n * G::kSlabs;  // 4 slabs are a tile
  const uint32_t tile = stage + G::kXBytes + slab0 / 4 * G::kPanelBytes +
                        step / kStepsPerTile * G::kTileBytes + slab0 % 4 * G::kSlabBytes +
                        step % kStepsPerTile / G::kWordSteps * kStepBytesOfSlab;
#pragma unroll
  for (int slab = 0; slab < G::kSlabs; ++slab) {
    fragments.weights[step / G::kWordSteps % 2][slab] =
        load_shared_16(tile + slab * G::kSlabBytes + lane * kChunk);
  }
}

// The A registers of a step. scales: of rows g and g + 8 of the slab.
template <class G>
__device__ __forceinline__ void expand(uint32_t (&a)[4], const uint4& weights, int step,
                                       const uint32_t (&scales)[2]) {
  const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t f0 = words[i], f1 = words[i];
    if constexpr (G::kTwoLevel) {
      const uint32_t scale = scales[i % 2] >> (8 * step) & 0xFF;
      expand_two_level(words[i], scale, scale, f0, f1);
    } else if constexpr (G::kKind == IntGemmKind::kBytes4) {
      expand_x16(words[i], f0, f1);
    }
    a[i] = step % 2 ? f1 : f0;
  }
}

// Adds the weights of a register; those of kInt4 times 16.
template <class G>
__device__ __forceinline__ int32_t add_weights(uint32_t a, int32_t sum) {
  if constexpr (G::kIsInt4) {
    uint32_t high, low;
    expand_x16(a, high, low);
    return dp4a(high, kByteOnes, dp4a(low, kByteOnes, sum));
  } else {
    return dp4a(a, kByteOnes, sum);
  }
}

template <class G>
struct Sums {
  int32_t acc[G::kSlabs][2 * G::kPairs][4] = {};  // D registers
  int32_t weights[G::kSlabs][2] = {};             // this lane's part, rows g and g + 8
};

template <class G>
__device__ __forceinline__ void multiply(Sums<G>& sums, const Fragments<G>& fragments, int step,
                                         const uint32_t (&scales)[G::kSlabs][2]) {
#pragma unroll
  for (int slab = 0; slab < G::kSlabs; ++slab) {
    uint32_t a[4];
    expand<G>(a, fragments.weights[step / G::kWordSteps % 2][slab], step, scales[slab]);
    if constexpr (G::kAsymmetric) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.weights[slab][i % 2] = add_weights<G>(a[i], sums.weights[slab][i % 2]);
      }
    }
#pragma unroll
    for (int column = 0; column < 2 * G::kPairs; ++column) {
      const uint32_t (&pair)[4] = fragments.tokens[step % 2][column / 2];
      const uint32_t b[2] = {pair[column % 2 * 2], pair[column % 2 * 2 + 1]};
      if constexpr (G::kIsInt4) {
        mma_s4<G::kAsymmetric>(sums.acc[slab][column], a, b);
      } else {
        mma_s8<G::kAsymmetric>(sums.acc[slab][column], a, b);
      }
    }
  }
}

// ---- the block

template <class G>
__device__ __forceinline__ void int_gemm_block(const IntGemmArguments& a, int4* workspace,
                                               int* arrivals, int stages_per_split) {
  const Work work = work_of<G>(a.M, a.N, a.K, stages_per_split);
  const int warp = threadIdx.x / kWarp, warp_n = warp / G::kWarpsM, warp_m = warp % G::kWarpsM;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  uint8_t* smem = dynamic_smem();
  const uint32_t smem_base = smem_address(smem);
  const auto stage_at = [&](int stage) { return smem_base + stage % G::kStages * G::kStageBytes; };
  const auto scales_of = [&](int stage) {  // [kChannels]
    return reinterpret_cast<uint32_t*>(smem + stage % G::kStages * G::kStageBytes + G::kXBytes +
                                       G::kWBytes);
  };

  // step 1, the first stages
  Copies<G> copies(a, work);
  GroupScales<G> group_scales(a, work);
  uint32_t next_scales = 0;  // of the stage whose copy starts next
#pragma unroll
  for (int stage = 0; stage < G::kStages - 1; ++stage) {
    copies.start(stage_at(stage));
    if constexpr (G::kTwoLevel) {
      const uint32_t scales = group_scales.next();
      if (threadIdx.x < G::kChannels) scales_of(stage)[threadIdx.x] = scales;
    }
  }
  if constexpr (G::kTwoLevel) next_scales = group_scales.next();
  cp_async_wait<G::kStages - 2>();
  sync_block();

  Sums<G> sums;
  Fragments<G> fragments;
  load_fragments<G>(fragments, smem_base, 0, warp_n, warp_m);
#pragma unroll 1
  for (int stage = 0; stage < work.stages; ++stage) {
    const uint32_t here = stage_at(stage), next = stage_at(stage + 1);
    uint32_t scales[G::kSlabs][2];
    if constexpr (G::kTwoLevel) {
#pragma unroll
      for (int slab = 0; slab < G::kSlabs; ++slab) {
        const uint32_t* of_slab = scales_of(stage) + (warp_n * G::kSlabs + slab) * 16;
        scales[slab][0] = of_slab[g];
        scales[slab][1] = of_slab[g + 8];
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == 0) {  // into the stage that the last barrier found read by all
        const int ahead = stage + G::kStages - 1;
        copies.start(stage_at(ahead));
        if constexpr (G::kTwoLevel) {
          if (threadIdx.x < G::kChannels) scales_of(ahead)[threadIdx.x] = next_scales;
          next_scales = group_scales.next();
        }
      }
      if (step == kSteps - 1) {
        cp_async_wait<G::kStages - 2>();
        sync_block();
      }
      // after the last stage: of what lies there, and not used
      load_fragments<G>(fragments, step == kSteps - 1 ? next : here, (step + 1) % kSteps, warp_n,
                        warp_m);
      multiply<G>(sums, fragments, step, scales);
    }
  }
  cp_async_wait<0>();
  sync_block();  // shared memory is free

  // step 4
  const int warp_token = warp_m * G::kPairs * 16, warp_channel = warp_n * G::kSlabs * 16;
  const int m = work.m0 + warp_token + 2 * t;  // tokens m + 8 column and + 1 are this lane's
  if constexpr (G::kAsymmetric) {
    constexpr int kShift = G::kIsInt4 ? kExpandX16Shift : 0;
#pragma unroll
    for (int slab = 0; slab < G::kSlabs; ++slab) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t& sum = sums.weights[slab][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        sum >>= kShift;
      }
    }
#pragma unroll
    for (int column = 0; column < 2 * G::kPairs; ++column) {
      const int token = m + 8 * column;
      const int32_t zero_points[2] = {token < a.M ? a.x_zero_point[token] : 0,
                                      token + 1 < a.M ? a.x_zero_point[token + 1] : 0};
#pragma unroll
      for (int slab = 0; slab < G::kSlabs; ++slab) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums.acc[slab][column][i] -= zero_points[i % 2] * sums.weights[slab][i / 2];
        }
      }
    }
  }

  // step 5
  const int splits = gridDim.y;
  if (splits > 1) {
    constexpr int kParts = G::kSlabs * 2 * G::kPairs;  // 16 bytes a thread each
    const auto part_of = [&](int split, int part) {
      const int64_t first = (static_cast<int64_t>(work.tile) * splits + split) * kParts + part;
      return workspace + first * G::kThreads + threadIdx.x;
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = part % (2 * G::kPairs);
      const auto& acc = sums.acc[part / (2 * G::kPairs)][column];
      if (m + 8 * column < a.M) {
        *part_of(blockIdx.y, part) = make_int4(acc[0], acc[1], acc[2], acc[3]);
      }
    }
    int* flag = reinterpret_cast<int*>(smem + G::kSumsBytes);
    if (!is_last(arrivals + work.tile, splits, flag)) return;
#pragma unroll 1
    for (int split = 0; split < splits; ++split) {
      if (split == static_cast<int>(blockIdx.y)) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int column = part % (2 * G::kPairs);
        if (m + 8 * column >= a.M) continue;
        const int4 other = load_l2(part_of(split, part));
        auto& acc = sums.acc[part / (2 * G::kPairs)][column];
        acc[0] += other.x;
        acc[1] += other.y;
        acc[2] += other.z;
        acc[3] += other.w;
      }
    }
  }

  // step 6
  constexpr bool kX16 = G::kKind == IntGemmKind::kBytes4 && !G::kTwoLevel;
  auto* rows = reinterpret_cast<int32_t*>(smem);  // [kTokens, kSumsStride]
#pragma unroll
  for (int slab = 0; slab < G::kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < 8 * G::kPairs; ++i) {
      const int32_t sum = sums.acc[slab][i / 4][i % 4];
      const Coordinate at = d_fragment(lane, i);
      rows[(warp_token + at.column) * G::kSumsStride + warp_channel + slab * 16 + at.row] =
          kX16 ? sum >> kExpandX16Shift : sum;
    }
  }
  sync_block();
  constexpr int kThreadsOfRow = G::kChannels / kOutputs;
  const int channel = threadIdx.x % kThreadsOfRow * kOutputs;
  if (work.n0 + channel >= a.N) return;
  const ChannelTerms terms = channel_terms(a, work.n0 + channel);
#pragma unroll 1
  for (int row = threadIdx.x / kThreadsOfRow; row < G::kTokens;
       row += G::kThreads / kThreadsOfRow) {
    if (work.m0 + row >= a.M) break;
    int32_t acc[kOutputs];
    const auto* from = reinterpret_cast<const int4*>(rows + row * G::kSumsStride + channel);
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      const int4 four = from[i];
      acc[4 * i] = four.x, acc[4 * i + 1] = four.y, acc[4 * i + 2] = four.z,
              acc[4 * i + 3] = four.w;
    }
    store_y(a, terms, work.m0 + row, work.n0 + channel, acc);
  }
}

}  // namespace lowbit::mma_gemm
