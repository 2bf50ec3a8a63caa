// SPDX-License-Identifier: Apache-2.0
// CUDA int_gemm by mma.sync, for every architecture. The contract is in lowbit/ops/int_gemm.py.
//
// Weights are the A operand, 16 channels of an instruction, and activations the B operand, 8
// tokens: few tokens need no kernel of their own. A block has kChannels x kTokens of y and a range
// of K, cut into stages of 128 bytes of an activation row; its warps lie kWarpsN x kWarpsM.
//   step 1  copy a stage, kStages - 1 ahead of its use: cp.async, 16 bytes a thread at a time.
//           Rows of x are 128 bytes, chunk c of row r at c ^ (r % 8): eight rows' equal chunks,
//           what ldmatrix reads together, lie in different banks. Weights keep their order, in
//           which a lane's 16 bytes are its four registers. Zeros past M, N and K.
//   step 2  fragments of the next 32 bytes of K, while step 3 multiplies those before
//   step 3  expand nibbles (common/nibbles.cuh), sum weights where x has zero points, multiply
//   step 4  sums minus zero_point[token] * sum of the channel's weights
//   step 5  split K: each block writes its int32 sums, the last to arrive adds them (any order is
//           exact) and goes on
//   step 6  sums through shared memory, tokens in rows; fp32 arithmetic; 16 bytes a store
// Few tokens: bound by the weights' bytes; many: by the matrix units (docs/notes/0004).

#include <algorithm>
#include <iterator>

#include "common/fragments.cuh"
#include "common/int_gemm.cuh"
#include "common/nibbles.cuh"
#include "common/ptx.cuh"

namespace lowbit {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasInt4 = false;  // 4-bit products would be emulated: none in the machine code
#else
constexpr bool kHasInt4 = true;
#endif
constexpr int kLastInt4Sm = 89;

constexpr int kRowBytes = 128;  // of x in a stage
constexpr int kChunk = 16;      // bytes a cp.async copies
constexpr int kRowChunks = kRowBytes / kChunk;
constexpr int kSteps = 4;       // of a stage: the K of one instruction each, 32 bytes of a row,
constexpr int kGroupStep = 32;  // which are 32 codes where scales have two levels
constexpr int kRowPad = 4;      // int32; spreads step 6's writes over the banks
constexpr int kTokenTiles = 8;  // neighbours in M that share weights in L2

template <int kChannels_, int kTokens_, int kWarpsN_, int kWarpsM_, int kStages_, int kMinBlocks_>
struct Tile {
  static constexpr int kChannels = kChannels_, kTokens = kTokens_, kStages = kStages_;
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kMinBlocks = kMinBlocks_;
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
  static constexpr int kAllStages = Tile::kStages * kStageBytes;
  static constexpr int kFlagAt = kAllStages > kSumsBytes ? kAllStages : kSumsBytes;
  static constexpr int kSmemBytes = kFlagAt + 16;
  static_assert(kWBytes / kChunk % Tile::kThreads == 0, "threads copy the same number of chunks");
  static_assert(kStageBytes % 128 == 0, "rows keep their banks in every stage");
  static_assert(kSmemBytes <= 99 * 1024, "what a block can have on sm_86, sm_89 and sm_120");
};

// What a block computes.
struct Work {
  int m0, n0;         // its first token and channel
  int tile;           // its index among those of one split
  int stage, stages;  // the first of K, and how many
};

// Blocks of kTokenTiles neighbours in M and all of N follow each other, M fastest.
template <class G>
__device__ __forceinline__ Work work_of(const IntGemmArguments& a, int stages_per_split) {
  const int tiles_m = ceil_div(a.M, G::kTokens), tiles_n = ceil_div(a.N, G::kChannels);
  const int tile = blockIdx.x, first = tile / (kTokenTiles * tiles_n) * kTokenTiles;
  const int left = tiles_m - first, width = left < kTokenTiles ? left : kTokenTiles;
  const int within = tile % (kTokenTiles * tiles_n);
  const int stage = blockIdx.y * stages_per_split;
  const int stages = ceil_div(a.K, G::kStageK) - stage;
  return {(first + within % width) * G::kTokens, within / width * G::kChannels, tile, stage,
          stages < stages_per_split ? stages : stages_per_split};
}

// ---- step 1

template <class G>
__device__ __forceinline__ void copy_stage(const IntGemmArguments& a, const Work& work, int stage,
                                           uint32_t to, uint64_t policy) {
  const int thread = threadIdx.x, row_bytes = G::kIsInt4 ? a.K / 2 : a.K;
  const int chunk = thread % kRowChunks, column = stage * kRowBytes + chunk * kChunk;
  constexpr int kRowsAtOnce = G::kThreads / kRowChunks;
#pragma unroll
  for (int i = 0; i < G::kTokens / kRowsAtOnce; ++i) {
    const int row = thread / kRowChunks + i * kRowsAtOnce, m = work.m0 + row;
    const bool inside = m < a.M && column < row_bytes;
    const int64_t from = inside ? static_cast<int64_t>(m) * row_bytes + column : 0;
    cp_async_16(to + row * kRowBytes + (chunk ^ row % 8) * kChunk, a.x + from, inside ? kChunk : 0);
  }

  const int tiles_n = ceil_div(a.N, kFragmentTile), tiles_k = ceil_div(a.K, kFragmentTile);
#pragma unroll
  for (int i = 0; i < G::kWBytes / kChunk / G::kThreads; ++i) {
    const int byte = (thread + i * G::kThreads) * kChunk, in_panel = byte % G::kPanelBytes;
    const int tile_n = work.n0 / kFragmentTile + byte / G::kPanelBytes;
    const int tile_k = stage * G::kStageTiles + in_panel / G::kTileBytes;
    const bool inside = tile_n < tiles_n && tile_k < tiles_k;
    const int64_t tile = inside ? static_cast<int64_t>(tile_n) * tiles_k + tile_k : 0;
    cp_async_16_policy(to + G::kXBytes + byte,
                       a.w + tile * G::kTileBytes + (inside ? in_panel % G::kTileBytes : 0),
                       inside ? kChunk : 0, policy);
  }
}

// The scales of one channel in a stage, byte i for step i; 0 past N and K, where weights are zeros.
template <class G>
__device__ __forceinline__ uint32_t group_scales(const IntGemmArguments& a, const Work& work,
                                                 int stage) {
  const int n = work.n0 + threadIdx.x;
  if (threadIdx.x >= G::kChannels || n >= a.N) return 0;
  const uint8_t* row = a.w_group_scale + static_cast<int64_t>(n) * (a.K / a.group_size);
  uint32_t word = 0, scale = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int k = stage * G::kStageK + i * kGroupStep;
    if (i * kGroupStep % a.group_size == 0) scale = k < a.K ? row[k / a.group_size] : 0;
    word |= scale << (8 * i);
  }
  return word;
}

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

// ---- the kernel

template <class G>
__device__ __forceinline__ void int_gemm_block(const IntGemmArguments& a, int4* workspace,
                                               int* arrivals, int stages_per_split) {
  const Work work = work_of<G>(a, stages_per_split);
  const int warp = threadIdx.x / kWarp, warp_n = warp / G::kWarpsM, warp_m = warp % G::kWarpsM;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  uint8_t* smem = dynamic_smem();
  const uint32_t smem_base = smem_address(smem);
  // weights that no other block reads need not stay
  const uint64_t policy = l2_policy(a.M <= G::kTokens ? Evict::kFirst : Evict::kNormal);

  const auto start_copy = [&](int stage) {
    if (stage < work.stages) {
      const uint32_t to = smem_base + stage % G::kStages * G::kStageBytes;
      copy_stage<G>(a, work, work.stage + stage, to, policy);
    }
    cp_async_commit();  // an empty group too: waits count groups
  };
  const auto scales_of = [&](int stage) {  // [kChannels]
    return reinterpret_cast<uint32_t*>(smem + stage % G::kStages * G::kStageBytes + G::kXBytes +
                                       G::kWBytes);
  };

  // step 1, the first stages
  uint32_t next_scales = 0;  // this thread's channel, of the stage whose copy starts next
#pragma unroll
  for (int stage = 0; stage < G::kStages - 1; ++stage) {
    start_copy(stage);
    if constexpr (G::kTwoLevel) {
      if (threadIdx.x < G::kChannels) {
        scales_of(stage)[threadIdx.x] = group_scales<G>(a, work, work.stage + stage);
      }
    }
  }
  if constexpr (G::kTwoLevel) {
    next_scales = group_scales<G>(a, work, work.stage + G::kStages - 1);
  }
  cp_async_wait<G::kStages - 2>();
  sync_block();

  Sums<G> sums;
  Fragments<G> fragments;
  load_fragments<G>(fragments, smem_base, 0, warp_n, warp_m);
  for (int stage = 0; stage < work.stages; ++stage) {
    const uint32_t here = smem_base + stage % G::kStages * G::kStageBytes;
    const uint32_t next = smem_base + (stage + 1) % G::kStages * G::kStageBytes;
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
        start_copy(ahead);
        if constexpr (G::kTwoLevel) {
          if (threadIdx.x < G::kChannels) scales_of(ahead)[threadIdx.x] = next_scales;
          next_scales = group_scales<G>(a, work, work.stage + ahead + 1);
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
    fence_device();
    sync_block();
    int* arrived = reinterpret_cast<int*>(smem + G::kFlagAt);
    if (threadIdx.x == 0) *arrived = atomic_add(arrivals + work.tile, 1);
    sync_block();
    if (*arrived != splits - 1) return;
    fence_device();
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

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kMinBlocks)
    int_gemm_kernel(const __grid_constant__ IntGemmArguments a,
                    int4* __restrict__ workspace,  // [tiles, splits, kParts, kThreads], split K
                    int* __restrict__ arrivals,    // [tiles] zeros, split K
                    int stages_per_split) {
  if constexpr (!G::kIsInt4 || kHasInt4) {
    int_gemm_block<G>(a, workspace, arrivals, stages_per_split);
  }
}

// ---- the choice of a tile

// A kernel is one of Tiles times one of AllOperands; both are tried in order.
using Tiles = std::tuple<Tile<64, 16, 4, 1, 4, 4>, Tile<64, 32, 4, 1, 4, 3>,
                         Tile<64, 64, 2, 2, 4, 2>, Tile<128, 128, 2, 4, 3, 1>>;
using AllOperands = std::tuple<
    Operands<IntGemmKind::kBytes4, false, false>, Operands<IntGemmKind::kBytes4, true, false>,
    Operands<IntGemmKind::kBytes4, false, true>, Operands<IntGemmKind::kBytes4, true, true>,
    Operands<IntGemmKind::kBytes8, false, false>, Operands<IntGemmKind::kBytes8, true, false>,
    Operands<IntGemmKind::kInt4, false, false>, Operands<IntGemmKind::kInt4, true, false>>;

template <class Types, class Visit>
void for_each(Visit visit) {
  std::apply([&](auto... each) { (visit(each), ...); }, Types());
}

// What a stage of each tile costs, in clocks of an SM, and how many blocks an SM needs to be that
// fast: estimates, docs/notes/0004.
struct TileCost {
  int clocks, blocks_to_fill;
};
constexpr TileCost kTileCosts[] = {{320, 3}, {330, 3}, {400, 2}, {1350, 1}};
static_assert(std::size(kTileCosts) == std::tuple_size_v<Tiles>, "a cost for each tile");
constexpr int kBlockStages = 2, kSplitStages = 1;  // what a block, and a split, costs besides
constexpr int kMaxSplits = 32;

struct Plan {
  int tile, tiles;  // index in Tiles, and how many cover y
  int splits, stages_per_split;
};

// The tile and the split of K with the shortest estimated time.
Plan plan(int64_t M, int64_t N, int64_t K, bool is_int4, int num_sms) {
  const int stages = static_cast<int>(ceil_div<int64_t>(K, kRowBytes * (is_int4 ? 2 : 1)));
  Plan best = {};
  int64_t shortest = INT64_MAX;
  int index = 0, tokens_before = 0;
  for_each<Tiles>([&](auto tile) {
    const int this_index = index++;
    if (tokens_before >= M) return;  // a smaller tile holds all tokens
    tokens_before = tile.kTokens;
    const auto [clocks, blocks_to_fill] = kTileCosts[this_index];
    const int64_t tiles = ceil_div<int64_t>(M, tile.kTokens) * ceil_div<int64_t>(N, tile.kChannels);
    for (int splits = 1; splits <= kMaxSplits && splits <= stages; ++splits) {
      const int of_split = ceil_div(stages, splits);
      if (ceil_div(stages, of_split) != splits) continue;  // as fewer splits do
      const int64_t rounds = ceil_div<int64_t>(tiles * splits, num_sms);
      const int64_t time = std::max<int64_t>(rounds, blocks_to_fill) * clocks *
                           (of_split + kBlockStages + (splits > 1 ? kSplitStages : 0));
      if (time < shortest) {
        shortest = time;
        best = {this_index, static_cast<int>(tiles), splits, of_split};
      }
    }
  });
  return best;
}

template <class G>
void launch_gemm(const IntGemmArguments& a, const Plan& plan, const Tensor& like) {
  std::optional<Tensor> workspace, arrivals;
  if (plan.splits > 1) {
    workspace =
        new_empty(like, {plan.tiles, plan.splits, G::kChannels * G::kTokens}, ScalarType::Int);
    const std::vector<int64_t> sizes{plan.tiles};
    arrivals = torch::stable::new_zeros(like, sizes, ScalarType::Int);
  }
  launch({"int_gemm", text("M=", a.M, " N=", a.N, " K=", a.K), a.device,
          dim3(plan.tiles, plan.splits), G::kThreads, G::kSmemBytes},
         &int_gemm_kernel<G>, a, workspace ? pointer<int4>(*workspace) : nullptr,
         arrivals ? pointer<int>(*arrivals) : nullptr, plan.stages_per_split);
}

}  // namespace

void int_gemm_mma(const IntGemmArguments& a, const Tensor& like) {
  const Plan chosen = plan(a.M, a.N, a.K, a.kind == IntGemmKind::kInt4, a.num_sms);
  const bool asymmetric = a.x_zero_point != nullptr, two_level = a.w_group_scale != nullptr;
  bool found = false;
  for_each<AllOperands>([&](auto operands) {
    using O = decltype(operands);
    if (O::kKind != a.kind || O::kAsymmetric != asymmetric || O::kTwoLevel != two_level) return;
    int index = 0;
    for_each<Tiles>([&](auto tile) {
      if (index++ == chosen.tile) launch_gemm<Gemm<O, decltype(tile)>>(a, chosen, like);
    });
    found = true;
  });
  check(found, "int_gemm: no kernel for two levels of scales with these weights");
}

namespace {

// ---- the op

FloatType float_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return FloatType::kFloat;
  if (type == ScalarType::Half) return FloatType::kHalf;
  check(type == ScalarType::BFloat16, text("int_gemm: ", name, " must be fp32, fp16 or bf16"));
  return FloatType::kBFloat16;
}

Tensor int_gemm(const Tensor& x_codes, const Tensor& x_scale,
                const std::optional<Tensor>& x_zero_point, const Tensor& w_codes,
                const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t x_bits,
                bool x_packed, int64_t w_bits, ScalarType out_dtype,
                const std::optional<Tensor>& w_channel_scale, const std::string& w_layout,
                const std::optional<Tensor>& residual) {
  const bool is_int4 = w_layout == "fragment_int4", two_level = w_channel_scale.has_value();
  check(is_int4 || w_layout == "fragment", "int_gemm: w_layout must be a kernel layout");
  check(is_int4 ? x_packed && x_bits == 4 : !(x_packed && x_bits <= 4),
        "int_gemm: x must be packed with w of layout fragment_int4, and only then");
  IntGemmArguments a = {};
  a.kind = is_int4 ? IntGemmKind::kInt4 : w_bits <= 4 ? IntGemmKind::kBytes4 : IntGemmKind::kBytes8;
  a.device = device_of(x_codes);
  a.sm = device_sm(a.device);
  a.num_sms = device_num_sms(a.device);
  check(!is_int4 || a.sm <= kLastInt4Sm, "int_gemm: this GPU has no 4-bit matrix units");

  const int64_t M = x_codes.size(0), row = x_codes.size(1), K = is_int4 ? 2 * row : row;
  const int64_t N = w_scale.size(0), G = w_scale.size(1);
  constexpr int64_t kLargest = INT32_MAX - 256;  // rounding up to whole tiles stays below 2^31
  check(M < kLargest && N < kLargest && K < kLargest, "int_gemm: a size is past 2^31");
  check(K > 0 && row % kChunk == 0 && N % kOutputs == 0,
        "int_gemm: rows of x and y must be multiples of 16 bytes");
  check(two_level ? G > 0 && K % G == 0 && kGroupStep * 4 % (K / G) == 0 && K / G >= kGroupStep
                  : G == 1,
        "int_gemm: groups must be 32, 64 or 128 elements of two levels, or the whole row");
  a.M = static_cast<int>(M);
  a.N = static_cast<int>(N);
  a.K = static_cast<int>(K);
  a.group_size = static_cast<int>(K / G);

  const auto expect = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t numel,
                          int alignment = 16) {
    check_tensor("int_gemm", name, t, dtype, numel, a.device, alignment);
  };
  const int64_t tiles = ceil_div<int64_t>(N, kFragmentTile) * ceil_div<int64_t>(K, kFragmentTile);
  expect("x_codes", x_codes, x_codes.scalar_type(), M * row);
  expect("x_scale", x_scale, ScalarType::Float, M, 4);
  if (x_zero_point) expect("x_zero_point", *x_zero_point, ScalarType::Byte, M, 1);
  expect("w_codes", w_codes, ScalarType::Byte, tiles * fragment_tile_bytes(a.kind));
  if (two_level) expect("w_scale", w_scale, ScalarType::Byte, N * G, 1);
  const Tensor& channel_scale = two_level ? *w_channel_scale : w_scale;
  expect("the scale of w's channels", channel_scale, ScalarType::Float, N);
  if (bias) {
    a.bias_type = float_type("bias", bias->scalar_type());
    expect("bias", *bias, bias->scalar_type(), N);
  }
  a.y_type = float_type("out_dtype", out_dtype);
  if (residual) expect("residual", *residual, out_dtype, M * N);

  Tensor y = new_empty(x_codes, {M, N}, out_dtype);
  if (M == 0 || N == 0) return y;
  a.x = pointer<const uint8_t>(x_codes);
  a.x_scale = pointer<const float>(x_scale);
  a.x_zero_point = pointer<uint8_t>(x_zero_point);
  a.w = pointer<const uint8_t>(w_codes);
  a.w_group_scale = two_level ? pointer<const uint8_t>(w_scale) : nullptr;
  a.w_scale = pointer<const float>(channel_scale);
  a.bias = pointer<char>(bias);
  a.residual = pointer<char>(residual);
  a.y = pointer<void>(y);
  if (a.sm == 90 && int_gemm_wgmma != nullptr && int_gemm_wgmma(a, x_codes)) return y;
  int_gemm_mma(a, x_codes);
  return y;
}

// numbers: M, N, K, and whether the weights are fragment_int4
std::string describe(const int64_t* numbers, int n, int, int num_sms) {
  if (n != 4) return "numbers must be M, N, K and 1 for fragment_int4, else 0";
  const Plan chosen = plan(numbers[0], numbers[1], numbers[2], numbers[3] != 0, num_sms);
  std::string name;
  int index = 0;
  for_each<Tiles>([&](auto tile) {
    if (index++ == chosen.tile) name = tile.name();
  });
  return text(name, ", ", chosen.tiles, " tiles, ", chosen.splits, " splits of ",
              chosen.stages_per_split, " stages");
}

const bool kRegistered = [] {
  for_each<AllOperands>([](auto operands) {
    for_each<Tiles>([&](auto tile) {
      using G = Gemm<decltype(operands), decltype(tile)>;
      static const std::string name = G::name() + "_" + tile.name();
      register_kernel({"int_gemm", name.c_str(), reinterpret_cast<const void*>(&int_gemm_kernel<G>),
                       G::kThreads, G::kSmemBytes, 80, G::kIsInt4 ? kLastInt4Sm : 120});
    });
  });
  register_planner("int_gemm", &describe);
  return true;
}();

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "int_gemm(Tensor x_codes, Tensor x_scale, Tensor? x_zero_point, Tensor w_codes, "
      "Tensor w_scale, Tensor? bias, int x_bits, bool x_packed, int w_bits, ScalarType out_dtype, "
      "Tensor? w_channel_scale=None, str w_layout=\"row_major\", Tensor? residual=None) -> Tensor");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("int_gemm", TORCH_BOX(&lowbit::int_gemm)); }
