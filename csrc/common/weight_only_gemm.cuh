// SPDX-License-Identifier: Apache-2.0
// What a block of csrc/weight_only_gemm.cu does; its header has the map and the steps.
#pragma once

#include "common/float_weights.cuh"
#include "common/fragments.cuh"
#include "common/gemm_tiles.cuh"
#include "common/ptx.cuh"

namespace lowbit::weight_only {

constexpr int kStepK = 16;      // of an instruction
constexpr int kGroupMin = 32;   // elements
constexpr int kChunk = 16;      // bytes a cp.async copies
constexpr int kChunkOfX = 8;    // elements in them
constexpr int kRowPad = 4;      // fp32; spreads step 6's writes over the banks
constexpr int kLoadsAhead = 8;  // 16 bytes each, of other splits' sums
constexpr int kRowShift = 31;   // group_shift of one scale a row: k >> 31 is 0

struct Arguments {
  const void* x;                // [M, K] of T
  const uint8_t* w;             // [ceil(N / 64), ceil(K / 64), 64 * 64 * kBits / 8]
  const void* w_scale;          // [N, groups] of scale_type, fp32 or fp16
  const uint8_t* w_zero_point;  // [N, groups]; nullptr: symmetric codes, as of kRun > 2
  const void* bias;             // [N] of bias_type; nullptr: none
  const void* residual;         // [M, N] of T; nullptr: none
  void* y;                      // [M, N] of T
  FloatType scale_type, bias_type;
  int M, N, K;              // N and K multiples of 8
  int groups, group_shift;  // element k of a row is of group k >> group_shift
};

template <int kChannels_, int kTokens_, int kStageK_, int kWarpsN_, int kWarpsM_, int kStages_,
          int kMinBlocks_>
struct Tile {
  static constexpr int kChannels = kChannels_, kTokens = kTokens_, kStageK = kStageK_;
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_;
  static constexpr int kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = kWarp * kWarpsN * kWarpsM;
  static constexpr int kSlabs = kChannels / kWarpsN / 16;  // of 16 channels, a warp's
  static constexpr int kColumns = kTokens / kWarpsM / 8;   // of 8 tokens, a warp's
  static constexpr int kSteps = kStageK / kStepK;
  static constexpr int kSlots = kStageK / kGroupMin;  // for scales: the most groups of a stage

  static std::string name() { return text(kChannels, "x", kTokens); }

  static_assert(kSlabs * kWarpsN * 16 == kChannels && kColumns * kWarpsM * 8 == kTokens, "");
  static_assert(kColumns == 1 || kColumns % 2 == 0, "ldmatrix.x4 loads 2 columns, or 2 steps");
  static_assert(kStageK % kFragmentTile == 0 && kChannels % kFragmentTile == 0, "whole tiles");
  static_assert(kFragmentTile % (16 * kSlabs) == 0, "a warp's channels lie in one weight tile");
};

template <class T_, int kBits_, int kRun_, bool kTwoTerms_ = false>
struct Operands {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kRun = kRun_;            // of w's layout: common/float_weights.cuh
  static constexpr bool kInGroups = kRun == 2;  // of K; else a channel has one scale
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr bool kTwoTerms = kTwoTerms_;  // zero points of 8-bit codes times bf16
  static_assert(!kTwoTerms || (!kIsHalf && kBits == 8 && kRun == 2), "others need one");

  static std::string name() {
    return text("w", kBits, kIsHalf ? "_fp16" : "_bf16", kTwoTerms ? "_asym" : "",
                kRun == 2 ? "" : text("_run", kRun));
  }
};

template <class Operands_, class Tile_>
struct Gemm : Operands_, Tile_ {
  using Operands_::kBits, Operands_::kRun, Operands_::name;
  using Tile_::kChannels, Tile_::kTokens, Tile_::kStageK, Tile_::kThreads, Tile_::kSlots;
  using Weights = FloatWeights<typename Operands_::T, kBits, kRun>;
  static constexpr int kRowBytes = kStageK * 2;  // of x in a stage
  static constexpr int kRowChunks = kRowBytes / kChunk;
  static constexpr int kTileBytes = kFragmentTile * kFragmentTile * kBits / 8;
  static constexpr int kSlabBytes = kTileBytes / 4;  // 16 channels of a tile
  static constexpr int kStageTiles = kStageK / kFragmentTile;
  static constexpr int kPanelBytes = kStageTiles * kTileBytes;  // 64 channels of a stage

  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kPanels = kChannels / kFragmentTile;
  static constexpr int kWBytes = kPanels * kPanelBytes;
  static constexpr int kScaleBytes = kSlots * kChannels * static_cast<int>(sizeof(uint2));
  static constexpr int kStageBytes = kXBytes + kWBytes + kScaleBytes;
  static constexpr int kSumsStride = kChannels + kRowPad;
  static constexpr int kSumsBytes = kTokens * kSumsStride * 4;
  static constexpr int kAllStages = Tile_::kStages * kStageBytes;
  static constexpr int kFlagAt = kAllStages > kSumsBytes ? kAllStages : kSumsBytes;
  static constexpr int kSmemBytes = kFlagAt + 16;

  // Chunk c of row r of x lies at c ^ swizzle(r). Of a row, four lanes read kRun / 2 chunks, and
  // the rows that are read with it lie in other banks.
  __host__ __device__ static constexpr int swizzle(int row) { return row * (kRun / 2) % 8; }

  // Which scales a thread fetches: of one channel, every kSlotStep-th group.
  static constexpr int kSlotStep = kThreads / kChannels, kThreadSlots = kSlots / kSlotStep;
  static_assert(kThreadSlots * kSlotStep == kSlots, "threads fetch the same number of scales");
  static_assert(kStageBytes % 128 == 0, "rows keep their banks in every stage");
  static_assert(kSmemBytes <= 99 * 1024, "what a block can have on sm_86, sm_89 and sm_120");
};

// ---- step 1

// A thread's share of the copies, stage after stage. Copies of 0 bytes read nothing, wherever they
// point to, and write zeros.
template <class G>
struct Copies {
  static constexpr int kRows = G::kThreads / G::kRowChunks;  // at once
  static constexpr int kBytes = G::kThreads * kChunk;        // of weights, at once
  static_assert((8 % kRows == 0 || kRows % 8 == 0) && G::kTokens % kRows == 0, "whole rows");
  static constexpr bool kAllCopy = G::kWBytes % kBytes == 0;  // in every round
  static_assert(G::kPanels == 1 || kAllCopy, "the rest of a round is of no panel");
  static_assert(G::kPanels == 1 || G::kPanelBytes % kBytes == 0 || kBytes % G::kPanelBytes == 0,
                "whole panels");

  const uint8_t *x, *w;       // its first chunks of the next stage
  int64_t row_bytes, w_step;  // from a row of x, and from a panel of w, to the next
  int rows, columns;          // of x from its first chunk on: what there is, in rows and elements
  int panels, tiles;          // of w from its first chunk's panel and the stage's first tile on
  int x_to;
  uint64_t policy;

  __device__ __forceinline__ Copies(const Arguments& a, const Work& work) {
    const int row = threadIdx.x / G::kRowChunks, chunk = threadIdx.x % G::kRowChunks;
    const int column = work.stage * G::kStageK + chunk * kChunkOfX;
    const int tiles_k = ceil_div(a.K, kFragmentTile), tile_k = work.stage * G::kStageTiles;
    const int end = work.stage + work.stages;  // of this split
    row_bytes = static_cast<int64_t>(a.K) * 2;
    x = static_cast<const uint8_t*>(a.x) + (work.m0 + row) * row_bytes + column * 2;
    rows = a.M - work.m0 - row;
    columns = smaller(a.K, end * G::kStageK) - column;
    x_to = row * G::kRowBytes + (chunk ^ G::swizzle(row)) * kChunk;

    const int first = threadIdx.x * kChunk;
    const int tile_n = work.n0 / kFragmentTile + first / G::kPanelBytes;
    w_step = static_cast<int64_t>(tiles_k) * G::kTileBytes;
    w = a.w + tile_n * w_step + static_cast<int64_t>(tile_k) * G::kTileBytes +
        first % G::kPanelBytes;
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
      const int between = G::swizzle(i * kRows) * kChunk;  // this row and the first
      cp_async_16(to + (x_to ^ between) + i * kRows * G::kRowBytes, x + i * kRows * row_bytes,
                  inside ? kChunk : 0);
    }
#pragma unroll
    for (int i = 0; i < ceil_div(G::kWBytes, kBytes); ++i) {
      if (!kAllCopy && static_cast<int>(threadIdx.x) * kChunk + i * kBytes >= G::kWBytes) break;
      const int panel = i * kBytes / G::kPanelBytes, byte = i * kBytes % G::kPanelBytes;
      const int tile =
          (byte + static_cast<int>(threadIdx.x) * kChunk % G::kPanelBytes) / G::kTileBytes;
      const bool inside = panel < panels && tile < tiles;
      cp_async_16_policy(to + G::kXBytes + threadIdx.x * kChunk + i * kBytes,
                         w + panel * w_step + byte, inside ? kChunk : 0, policy);
    }
    cp_async_commit();
    x += G::kRowBytes;
    columns -= G::kStageK;
    w += G::kPanelBytes;
    tiles -= G::kStageTiles;
  }
};

// A thread's share of the scales and zero points of a stage: loaded into registers a stage before
// they are stored, as {fp32 scale, offset}. Zeros past N and K.
template <class G>
struct Scales {
  uint32_t scale[G::kThreadSlots];  // the bits of scale_type
  uint32_t zero_point[G::kThreadSlots];

  __device__ __forceinline__ void load(const Arguments& a, const Work& work, int stage) {
    const int channel = threadIdx.x % G::kChannels, n = work.n0 + channel;
    const int first = stage * G::kStageK >> a.group_shift;
    const int of_stage = G::kStageK >> a.group_shift;  // 0: one, or a part of one
#pragma unroll
    for (int i = 0; i < G::kThreadSlots; ++i) {
      if (i > 0 && i * G::kSlotStep >= of_stage) break;  // of all threads
      const int slot = threadIdx.x / G::kChannels + i * G::kSlotStep, group = first + slot;
      scale[i] = zero_point[i] = 0;
      if ((slot == 0 || slot < of_stage) && n < a.N && group < a.groups) {
        const int64_t at = static_cast<int64_t>(n) * a.groups + group;
        scale[i] = a.scale_type == FloatType::kHalf ? static_cast<const uint16_t*>(a.w_scale)[at]
                                                    : static_cast<const uint32_t*>(a.w_scale)[at];
        zero_point[i] = a.w_zero_point != nullptr ? a.w_zero_point[at] : G::Weights::kZeroPoint;
      }
    }
  }

  __device__ __forceinline__ void store(const Arguments& a, uint2* to) const {  // [slot, channel]
    const int channel = threadIdx.x % G::kChannels;
#pragma unroll
    for (int i = 0; i < G::kThreadSlots; ++i) {
      if (i > 0 && i * G::kSlotStep >= G::kStageK >> a.group_shift) break;
      const float value = a.scale_type == FloatType::kHalf
                              ? to_float(bit_cast<__half>(static_cast<uint16_t>(scale[i])))
                              : bit_cast<float>(scale[i]);
      const uint32_t offset = G::Weights::offset(zero_point[i], channel & 8);
      to[(threadIdx.x / G::kChannels + i * G::kSlotStep) * G::kChannels + channel] =
          make_uint2(bit_cast<uint32_t>(value), offset);
    }
  }
};

// ---- steps 2 and 3

// What a warp multiplies.
template <class G>
struct Fragments {
  // Of x, by ldmatrix two columns, or two steps of one; else a lane's run of each column.
  static constexpr bool kByMatrix = G::kRun == 2;
  static constexpr int kTokenLoads = kByMatrix && G::kColumns > 1 ? G::kColumns / 2 : G::kColumns;
  static constexpr int kTokenWords = kByMatrix ? 4 : G::kRun / 2;
  static constexpr int kTokenSteps = kByMatrix ? (G::kColumns == 1 ? 2 : 1) : G::kRun / 4;
  uint32_t weights[G::kSlabs][G::Weights::kLoadWords];  // codes of kStepsOfLoad steps
  uint32_t tokens[kTokenLoads][kTokenWords];            // of kTokenSteps steps

  // Of `step` of the stage at `stage`; `warp_n` and `warp_m` place the warp in the block.
  __device__ __forceinline__ void load(uint32_t stage, int step, int warp_n, int warp_m) {
    if (step % kTokenSteps == 0) load_tokens(stage, step, warp_m);
    constexpr int kStepsOfLoad = G::Weights::kStepsOfLoad, kStepsOfTile = kFragmentTile / kStepK;
    if (step % kStepsOfLoad != 0) return;
    const int slab0 = warp_n * G::kSlabs;  // 4 slabs are a tile
    const uint32_t tile = stage + G::kXBytes + slab0 / 4 * G::kPanelBytes +
                          step / kStepsOfTile * G::kTileBytes + slab0 % 4 * G::kSlabBytes +
                          step % kStepsOfTile / kStepsOfLoad * G::Weights::kLoadBytes;
#pragma unroll
    for (int slab = 0; slab < G::kSlabs; ++slab) {
      G::Weights::load(weights[slab], tile + slab * G::kSlabBytes);
    }
  }

  __device__ __forceinline__ void load_tokens(uint32_t stage, int step, int warp_m) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kTokenLoads; ++i) {
      if constexpr (kByMatrix) {
        const int matrix = lane / 8, of_row = G::kColumns == 1 ? 0 : matrix / 2,
                  chunk = G::kColumns == 1 ? matrix : matrix % 2;
        const int row = (warp_m * G::kColumns + 2 * i + of_row) * 8 + lane % 8;
        ldmatrix_x4(tokens[i],
                    stage + row * G::kRowBytes + ((2 * step + chunk) ^ G::swizzle(row)) * kChunk);
      } else {
        const int row = (warp_m * G::kColumns + i) * 8 + lane / 4, k = lane % 4 * G::kRun;
        const int chunk = 2 * step + k / kChunkOfX, byte = k % kChunkOfX * 2;
        load_words(tokens[i],
                   stage + row * G::kRowBytes + (chunk ^ G::swizzle(row)) * kChunk + byte);
      }
    }
  }

  __device__ __forceinline__ void b_registers(uint32_t (&b)[2], int step, int column) const {
    if constexpr (kByMatrix) {
      const uint32_t (&four)[4] = tokens[column / 2];
      const int first = 2 * (G::kColumns == 1 ? step % 2 : column % 2);
      b[0] = four[first];
      b[1] = four[first + 1];
    } else {
      G::Weights::b_pairs(b, tokens[column], step);
    }
  }
};

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_f16(d, a, b);
  } else {
    mma_bf16(d, a, b);
  }
}

template <class G>
struct Sums {
  float acc[G::kSlabs][G::kColumns][4] = {};    // D registers
  float group[G::kSlabs][G::kColumns][4] = {};  // of the group under way, not scaled
  float scale[G::kSlabs][2];                    // of that group, rows g and g + 8
  uint32_t offset[G::kSlabs][2];

  // from [kChannels]: the scales of a group, from the warp's first channel on
  __device__ __forceinline__ void start_group(const uint2* from) {
#pragma unroll
    for (int i = 0; i < 2 * G::kSlabs; ++i) {
      const uint2 both = from[8 * i + lane_id() / 4];
      scale[i / 2][i % 2] = bit_cast<float>(both.x);
      offset[i / 2][i % 2] = both.y;
    }
  }

  __device__ __forceinline__ void multiply(const Fragments<G>& fragments, int step,
                                           const WeightMagic& magic) {
    using T = typename G::T;
#pragma unroll
    for (int slab = 0; slab < G::kSlabs; ++slab) {
      uint32_t a[4];
      G::Weights::expand(a, fragments.weights[slab], step % G::Weights::kStepsOfLoad, magic,
                         offset[slab]);
#pragma unroll
      for (int column = 0; column < G::kColumns; ++column) {
        uint32_t b[2];
        fragments.b_registers(b, step, column);
        mma<T>(group[slab][column], a, b);
        if constexpr (G::kTwoTerms) {
          const uint32_t zeros[4] = {offset[slab][0], offset[slab][1], offset[slab][0],
                                     offset[slab][1]};
          mma<T>(group[slab][column], zeros, b);
        }
      }
    }
  }

  __device__ __forceinline__ void end_group() {
#pragma unroll
    for (int slab = 0; slab < G::kSlabs; ++slab) {
#pragma unroll
      for (int column = 0; column < G::kColumns; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = group[slab][column][i];
          acc[slab][column][i] = fmaf(sum, scale[slab][i / 2], acc[slab][column][i]);
          sum = 0;
        }
      }
    }
  }
};

// ---- the block

template <class G>
__device__ __forceinline__ void gemm_block(const Arguments& a, int4* workspace, int* arrivals,
                                           int stages_per_split) {
  const Work work = work_of<G>(a.M, a.N, a.K, stages_per_split);
  const int warp = threadIdx.x / kWarp, warp_n = warp / G::kWarpsM, warp_m = warp % G::kWarpsM;
  const int lane = lane_id(), t = lane % 4;
  const int warp_token = warp_m * G::kColumns * 8, warp_channel = warp_n * G::kSlabs * 16;
  uint8_t* smem = dynamic_smem();
  const uint32_t smem_base = smem_address(smem);
  const auto stage_at = [&](int buffer) { return smem_base + buffer * G::kStageBytes; };
  const auto scales_of = [&](int buffer) {  // [kSlots, kChannels]
    return reinterpret_cast<uint2*>(smem + buffer * G::kStageBytes + G::kXBytes + G::kWBytes);
  };

  // step 1, the first stages
  Copies<G> copies(a, work);
  Scales<G> first[G::kStages - 1], scales;  // `scales`: of the stage whose copy starts next
#pragma unroll
  for (int stage = 0; stage < G::kStages - 1; ++stage) copies.start(stage_at(stage));
#pragma unroll
  for (int stage = 0; stage < G::kStages - 1; ++stage) {
    first[stage].load(a, work, work.stage + stage);
  }
  scales.load(a, work, work.stage + G::kStages - 1);
#pragma unroll
  for (int stage = 0; stage < G::kStages - 1; ++stage) first[stage].store(a, scales_of(stage));
  cp_async_wait<G::kStages - 2>();
  sync_block();

  // groups in steps, where they are shorter than a stage
  const int steps_of_group = smaller(G::kStageK, 1 << smaller(a.group_shift, 30)) / kStepK;
  const WeightMagic magic = G::Weights::magic(a.w_zero_point == nullptr);
  Sums<G> sums;
  Fragments<G> fragments;
  fragments.load(smem_base, 0, warp_n, warp_m);
#pragma unroll 1
  for (int stage = 0, buffer = 0; stage < work.stages; ++stage) {
    const int next = buffer == G::kStages - 1 ? 0 : buffer + 1;
    const uint2* scales_here = scales_of(buffer) + warp_channel;
#pragma unroll
    for (int step = 0; step < G::kSteps; ++step) {
      if (step == 0) {
        sums.start_group(scales_here);
        // into the stage that the last barrier found read by all
        const int free = buffer == 0 ? G::kStages - 1 : buffer - 1;
        copies.start(stage_at(free));
        scales.store(a, scales_of(free));
        scales.load(a, work, work.stage + stage + G::kStages);
      }
      if (step == G::kSteps - 1) {
        cp_async_wait<G::kStages - 2>();
        sync_block();
      }
      const Fragments<G> loaded = fragments;
      // after the last stage: of what lies there, and not used
      fragments.load(stage_at(step == G::kSteps - 1 ? next : buffer), (step + 1) % G::kSteps,
                     warp_n, warp_m);
      sums.multiply(loaded, step, magic);
      if (step == G::kSteps - 1) {
        sums.end_group();
      } else if (G::kInGroups && step % 2 == 1 && ((step + 1) & (steps_of_group - 1)) == 0) {
        // both in one place: ptxas then branches over them, and only predicates either alone
        sums.end_group();
        scales_here += G::kChannels;
        sums.start_group(scales_here);
      }
    }
    buffer = next;
  }
  cp_async_wait<0>();
  sync_block();  // shared memory is free

  // step 4
  const int m = work.m0 + warp_token + 2 * t;  // tokens m + 8 column and + 1 are this lane's
  const int splits = gridDim.y;
  if (splits > 1) {
    constexpr int kParts = G::kSlabs * G::kColumns;  // 16 bytes a thread each
    const auto part_of = [&](int split, int part) {
      const int64_t first = (static_cast<int64_t>(work.tile) * splits + split) * kParts + part;
      return workspace + first * G::kThreads + threadIdx.x;
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const auto& acc = sums.acc[part / G::kColumns][part % G::kColumns];
      if (m + 8 * (part % G::kColumns) < a.M) {
        *part_of(blockIdx.y, part) = make_int4(bit_cast<int>(acc[0]), bit_cast<int>(acc[1]),
                                               bit_cast<int>(acc[2]), bit_cast<int>(acc[3]));
      }
    }
    int* flag = reinterpret_cast<int*>(smem + G::kFlagAt);
    if (!is_last(arrivals + work.tile, splits, flag)) return;
    // All of them, its own too, in ascending order: the same bits whichever block is the last.
    constexpr int kAhead = kParts < kLoadsAhead ? kLoadsAhead / kParts : 1;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.acc[part / G::kColumns][part % G::kColumns][i] = 0;
    }
#pragma unroll 1
    for (int first = 0; first < splits; first += kAhead) {
      int4 loaded[kAhead][kParts];
#pragma unroll
      for (int i = 0; i < kAhead * kParts; ++i) {
        const int split = first + i / kParts, part = i % kParts;
        const bool inside = split < splits && m + 8 * (part % G::kColumns) < a.M;
        loaded[i / kParts][part] = inside ? load_l2(part_of(split, part)) : make_int4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kAhead * kParts; ++i) {
        const int part = i % kParts;
        const int4& four = loaded[i / kParts][part];
        auto& acc = sums.acc[part / G::kColumns][part % G::kColumns];
        acc[0] += bit_cast<float>(four.x);
        acc[1] += bit_cast<float>(four.y);
        acc[2] += bit_cast<float>(four.z);
        acc[3] += bit_cast<float>(four.w);
      }
    }
  }

  // step 5
  auto* rows = reinterpret_cast<float*>(smem);  // [kTokens, kSumsStride]
#pragma unroll
  for (int slab = 0; slab < G::kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < 4 * G::kColumns; ++i) {
      const Coordinate at = d_fragment(lane, i);
      rows[(warp_token + at.column) * G::kSumsStride + warp_channel + slab * 16 + at.row] =
          sums.acc[slab][i / 4][i % 4];
    }
  }
  sync_block();
  constexpr int kThreadsOfRow = G::kChannels / kOutputs;
  const int channel = threadIdx.x % kThreadsOfRow * kOutputs, n = work.n0 + channel;
  if (n >= a.N) return;
  float bias[kOutputs];
  load_outputs(bias, a.bias, a.bias_type, n);
#pragma unroll 1
  for (int row = threadIdx.x / kThreadsOfRow; row < G::kTokens;
       row += G::kThreads / kThreadsOfRow) {
    if (work.m0 + row >= a.M) break;
    const int64_t at = static_cast<int64_t>(work.m0 + row) * a.N + n;
    float values[kOutputs], residual[kOutputs];
    load_outputs(residual, a.residual, G::kIsHalf ? FloatType::kHalf : FloatType::kBFloat16, at);
    const auto* from = reinterpret_cast<const float4*>(rows + row * G::kSumsStride + channel);
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      const float4 four = from[i];
      values[4 * i] = four.x + bias[4 * i] + residual[4 * i];
      values[4 * i + 1] = four.y + bias[4 * i + 1] + residual[4 * i + 1];
      values[4 * i + 2] = four.z + bias[4 * i + 2] + residual[4 * i + 2];
      values[4 * i + 3] = four.w + bias[4 * i + 3] + residual[4 * i + 3];
    }
    store_outputs_as(static_cast<typename G::T*>(a.y) + at, values);
  }
}

}  // namespace lowbit::weight_only
