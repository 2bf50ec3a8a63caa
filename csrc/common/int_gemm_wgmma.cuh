// SPDX-License-Identifier: Apache-2.0
// The kernel of csrc/int_gemm_sm90.cu, which says what its threads do and in which steps.
#pragma once

#include <type_traits>

#include "common/gemm_tiles.cuh"
#include "common/int_gemm.cuh"
#include "common/nibbles.cuh"
#include "common/wgmma.cuh"

namespace lowbit {

constexpr int kStageK = kSwizzleRow;  // columns of a stage: one swizzled row of bytes
constexpr int kHalves = kStageK / kFragmentTile;
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kSmemLimit = 227 * 1024;  // of a block on sm_90
constexpr int kBarrierBytes = 1024;     // what the barriers take of it, and alignment
constexpr int kMaxCluster = 8;

// A block of 3 x 128 threads starts with 168 registers a thread, 64512 in all; the producer hands
// most of its own to the consumers, whose sums alone are 128.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

enum class Weights { k4, k4TwoLevel, k8 };

template <Weights kWeights_, int kRowTiles_, int kTokens_, bool kAsymmetric_>
struct WgmmaTile {
  static constexpr Weights kWeights = kWeights_;
  static constexpr int kRowTiles = kRowTiles_;  // of 64 channels, a warpgroup
  static constexpr int kTokens = kTokens_;
  static constexpr bool kAsymmetric = kAsymmetric_;  // activations: unsigned, with zero points

  static constexpr int kConsumers = 2;                            // warpgroups
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one produces
  static constexpr int kTiles64 = kConsumers * kRowTiles;         // of 64 channels, a block
  static constexpr int kChannels = kTiles64 * kFragmentTile;
  // Few tokens: K may be split over a cluster. Many: two blocks of a cluster compute neighbouring
  // channels of the same tokens, and each loads half of the activations for both.
  static constexpr bool kSplits = kTokens <= 64;
  static constexpr int kPair = kSplits ? 1 : 2;

  static constexpr int kFragmentBytes =  // of 64 channels x 64 columns
      fragment_tile_bytes(kWeights == Weights::k8 ? IntGemmKind::kBytes8 : IntGemmKind::kBytes4);
  static constexpr int kXBytes = kTokens * kStageK;
  static constexpr int kWBytes = kTiles64 * kHalves * kFragmentBytes;
  static constexpr int kOutBytes = kTokens * kSwizzleRow;  // 64 channels of 2 bytes, every token
  // Sums of a thread, those of its weights included, to 16 bytes.
  static constexpr int kSums = kRowTiles * (kTokens / 2 + (kAsymmetric ? 4 : 0));
  static constexpr int kExchangeBytes = kSplits ? kSums * 4 * kConsumers * kWarpgroup : 0;
  static constexpr int kFixedBytes = kTiles64 * kOutBytes + kExchangeBytes + kBarrierBytes;
  static constexpr int kMostStages = (kSmemLimit - kFixedBytes) / (kXBytes + kWBytes);
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kSmemBytes = kStages * (kXBytes + kWBytes) + kFixedBytes;
  static_assert(kStages >= 3, "loads must stay ahead of the products");
  static_assert((2 * kStages + kConsumers) * 8 <= kBarrierBytes, "the barriers have their place");
  static_assert(kXBytes % kSwizzleTile == 0 && kWBytes % kSwizzleTile == 0, "tiles are aligned");
};

// The arrangement of a block's shared memory, and what of the problem all of its threads know.
template <class Tile>
struct Block {
  uint32_t x, w, out, exchange, full, empty, residual;  // shared addresses
  int tiles_m, tiles_n, split, rank, cluster, clusters;
  int k_tiles;                 // of 64 columns
  int first_stage, end_stage;  // of 128 columns: this block's share of K

  __device__ explicit Block(const IntGemmArguments& a, int split_) : split(split_) {
    x = smem_address(dynamic_smem());
    w = x + Tile::kStages * Tile::kXBytes;
    out = w + Tile::kStages * Tile::kWBytes;
    exchange = out + Tile::kTiles64 * Tile::kOutBytes;
    full = exchange + Tile::kExchangeBytes;
    empty = full + 8 * Tile::kStages;
    residual = empty + 8 * Tile::kStages;

    tiles_m = ceil_div(a.M, Tile::kTokens);
    tiles_n = ceil_div(a.N, Tile::kChannels * Tile::kPair);
    k_tiles = ceil_div(a.K, kFragmentTile);
    const int blocks = Tile::kSplits ? split : Tile::kPair;
    rank = blocks > 1 ? cluster_rank() : 0;
    cluster = blockIdx.x / blocks;
    clusters = gridDim.x / blocks;
    const int stages = ceil_div(a.K, kStageK);
    const int share = Tile::kSplits ? ceil_div(stages, split) : stages;
    first_stage = Tile::kSplits ? rank * share : 0;
    end_stage = stages < first_stage + share ? stages : first_stage + share;
  }

  // Whether this block ends the tile: of a cluster that splits K, the first one does.
  __device__ bool finishes() const { return !Tile::kSplits || rank == 0; }

  __device__ int tiles() const { return tiles_m * tiles_n; }
  __device__ int first_token(int tile) const {
    return place_of(tile, tiles_m, tiles_n).m * Tile::kTokens;
  }
  __device__ int first_channel(int tile) const {
    const int pair = place_of(tile, tiles_m, tiles_n).n;
    return (pair * Tile::kPair + rank % Tile::kPair) * Tile::kChannels;
  }
};

// A ring of stages: the slot, and the parity of the phase that its barrier is in.
template <class Tile>
struct Ring {
  int slot = 0, parity = 0;
  __device__ void next() {
    if (++slot == Tile::kStages) slot = 0, parity ^= 1;
  }
};

// step 1
template <class Tile>
__device__ __forceinline__ void produce(const Block<Tile>& block, const IntGemmArguments& a,
                                        const TensorMap* x_map, int tile, Ring<Tile>& ring) {
  const int tile64 = block.first_channel(tile) / kFragmentTile;
  const int left = ceil_div(a.N, kFragmentTile) - tile64;  // negative: a pair's odd one out
  const int tiles64 = left < 0 ? 0 : left < Tile::kTiles64 ? left : Tile::kTiles64;
  const int token = block.first_token(tile);
  for (int stage = block.first_stage; stage < block.end_stage; ++stage, ring.next()) {
    // Where K ends with 64 columns, the other half's weights are stale and meet zeros of x.
    const int k_tile = stage * kHalves, k_left = block.k_tiles - k_tile;
    const int w_bytes = (k_left < kHalves ? k_left : kHalves) * Tile::kFragmentBytes;
    const uint32_t full = block.full + 8 * ring.slot;
    mbarrier_wait(block.empty + 8 * ring.slot, ring.parity ^ 1);
    mbarrier_arrive_expect(full, Tile::kXBytes + tiles64 * w_bytes);
    const uint32_t x = block.x + ring.slot * Tile::kXBytes;
    if constexpr (Tile::kPair > 1) {
      constexpr int kEveryBlock = (1 << Tile::kPair) - 1;
      tma_load_multicast(x + block.rank * Tile::kXBytes / Tile::kPair, x_map, stage * kStageK,
                         token + block.rank * Tile::kTokens / Tile::kPair, full, kEveryBlock);
    } else {
      tma_load(x, x_map, stage * kStageK, token, full);
    }
#pragma unroll 1  // unrolled, this thread's few registers do not suffice
    for (int i = 0; i < tiles64; ++i) {
      const int64_t fragment = static_cast<int64_t>(tile64 + i) * block.k_tiles + k_tile;
      bulk_load(block.w + ring.slot * Tile::kWBytes + i * kHalves * Tile::kFragmentBytes,
                a.w + fragment * Tile::kFragmentBytes, w_bytes, full);
    }
  }
}

struct NoGroupScales {
  __device__ NoGroupScales(const IntGemmArguments&, int) {}
  template <class Scale>
  __device__ __forceinline__ void load(Scale&, int) const {}
};

template <class Tile>
struct Sums {
  int32_t acc[Tile::kRowTiles][Tile::kTokens / 2];
  int32_t w[Tile::kRowTiles][4];  // weights of rows g and g + 8, then padding; asymmetric only
};

// A's registers of the two products of 64 columns, from the lane's part of the fragments. `scale`:
// of rows g and g + 8, for weights of two levels.
template <class Tile>
__device__ __forceinline__ void load_weights(uint32_t (&a)[2][4], uint32_t fragment,
                                             const uint32_t (&scale)[2]) {
  if constexpr (Tile::kWeights == Weights::k8) {
    constexpr int kStepBytes = 512;  // of 32 columns of 16 rows
    const uint4 words[2] = {load_shared_16(fragment), load_shared_16(fragment + kStepBytes)};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      a[step][0] = words[step].x, a[step][1] = words[step].y;
      a[step][2] = words[step].z, a[step][3] = words[step].w;
    }
  } else {
    const uint4 loaded = load_shared_16(fragment);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // registers 1 and 3 are row g + 8
      if constexpr (Tile::kWeights == Weights::k4TwoLevel) {
        expand_two_level(words[i], scale[i & 1], scale[i & 1], a[0][i], a[1][i]);
      } else {
        expand_x16(words[i], a[0][i], a[1][i]);
      }
    }
  }
}

// This warp no longer reads a slot: its block's producer may fill it, and with a pair the other's,
// which loads half of it.
template <class Tile>
__device__ __forceinline__ void release(const Block<Tile>& block, int slot) {
  if (lane_id() != 0) return;
  const uint32_t empty = block.empty + 8 * slot;
  if constexpr (Tile::kPair > 1) {
#pragma unroll
    for (int rank = 0; rank < Tile::kPair; ++rank) mbarrier_arrive_at(empty, rank);
  } else {
    mbarrier_arrive(empty);
  }
}

// Two-level scales of the rows g and g + 8 that a lane expands, from memory; loaded a stage ahead
// of their use. Groups are 64 or 128 columns, rows and groups past the end are those before it:
// their products are dropped, or meet zeros of x.
template <class Tile>
struct GroupScales {
  const uint8_t* rows[Tile::kRowTiles][2];
  int tiles_log2, last;  // tiles of 64 columns in a group; the last group

  __device__ GroupScales(const IntGemmArguments& a, int first_row) {
    const int groups = a.K / a.group_size;
    tiles_log2 = a.group_size > kFragmentTile;
    last = groups - 1;
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + m * kFragmentTile + 8 * i;
        rows[m][i] = a.w_group_scale + static_cast<int64_t>(row < a.N ? row : a.N - 1) * groups;
      }
    }
  }

  __device__ __forceinline__ void load(uint32_t (&scale)[Tile::kRowTiles][2], int k_tile) const {
    const int group = k_tile >> tiles_log2, there = group < last ? group : last;
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[m][i] = rows[m][i][there];
    }
  }
};

// step 2: the sums of a tile over this block's share of K.
template <class Tile>
__device__ __forceinline__ void consume(const Block<Tile>& block, const IntGemmArguments& a,
                                        int tile, Sums<Tile>& sums, Ring<Tile>& ring) {
  constexpr int kRowTiles = Tile::kRowTiles;
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4;
  const int lane = lane_id();
  const int first_tile64 = warpgroup * kRowTiles;
  // bytes of a lane, and of a warp, in a fragment
  constexpr int kWarpBytes = Tile::kFragmentBytes / 4;
  const uint32_t lane_offset =
      first_tile64 * kHalves * Tile::kFragmentBytes + warp * kWarpBytes + lane * 16;
  const int first_row =
      block.first_channel(tile) + first_tile64 * kFragmentTile + 16 * warp + lane / 4;
  constexpr bool kTwoLevel = Tile::kWeights == Weights::k4TwoLevel;

  uint32_t registers[kHalves][kRowTiles][2][4], scale[kHalves][kRowTiles][2];
  std::conditional_t<kTwoLevel, GroupScales<Tile>, NoGroupScales> group_scales(a, first_row);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    group_scales.load(scale[half], block.first_stage * kHalves + half);
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.w[m][i] = 0;
  }
  int released = -1;  // the slot of the stage before this one
  for (int stage = block.first_stage; stage < block.end_stage; ++stage, ring.next()) {
    mbarrier_wait(block.full + 8 * ring.slot, ring.parity);
    const uint32_t w = block.w + ring.slot * Tile::kWBytes + lane_offset;
    const uint32_t x = block.x + ring.slot * Tile::kXBytes;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_weights<Tile>(registers[half][m], w + (m * kHalves + half) * Tile::kFragmentBytes,
                           scale[half][m]);
      }
      if (Tile::kAsymmetric && stage * kHalves + half < block.k_tiles) {
        // No stale weights; and now, as a product's registers are its own until it is waited for.
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sums.w[m][i & 1] = dp4a(registers[half][m][i / 4][i % 4], kByteOnes, sums.w[m][i & 1]);
          }
        }
      }
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint64_t descriptor = wgmma_descriptor(x + half * kFragmentTile + step * 32);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const bool accumulate = stage > block.first_stage || half || step;
          wgmma_s8<Tile::kTokens, Tile::kAsymmetric>(sums.acc[m], registers[half][m][step],
                                                     descriptor, accumulate);
        }
      }
      wgmma_commit();
      group_scales.load(scale[half], (stage + 1) * kHalves + half);
      wgmma_wait<1>();  // the products before these: their registers, and after half 0 their stage
      if (half == 0 && released >= 0) release(block, released);
    }
    released = ring.slot;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) wgmma_fence_operand(sums.acc[m]);
  if (released >= 0) release(block, released);
}

// visit(piece, sum[4]) for every four of a thread's Tile::kSums sums.
template <class Tile, class Visit>
__device__ __forceinline__ void visit_sums(Sums<Tile>& sums, Visit visit) {
  constexpr int kAccPieces = Tile::kTokens / 8;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kAccPieces; ++i) {
      visit(m * kAccPieces + i, reinterpret_cast<int32_t (&)[4]>(sums.acc[m][4 * i]));
    }
    if constexpr (Tile::kAsymmetric) visit(Tile::kRowTiles * kAccPieces + m, sums.w[m]);
  }
}

// step 3: block 0 of the cluster gets the sums of all.
template <class Tile>
__device__ __forceinline__ void exchange(const Block<Tile>& block, Sums<Tile>& sums) {
  const uint32_t mine = block.exchange + threadIdx.x * 16;
  if (block.rank > 0) {
    visit_sums(sums, [&](int piece, int32_t (&sum)[4]) {
      const uint32_t at = mine + piece * Tile::kConsumers * kWarpgroup * 16;
      store_shared_16(at, make_int4(sum[0], sum[1], sum[2], sum[3]));
    });
  }
  sync_cluster();
  if (block.rank == 0) {
    for (int rank = 1; rank < block.split; ++rank) {
      visit_sums(sums, [&](int piece, int32_t (&sum)[4]) {
        const uint32_t at = mine + piece * Tile::kConsumers * kWarpgroup * 16;
        const int4 theirs = load_peer_16(at, rank);
        sum[0] += theirs.x, sum[1] += theirs.y, sum[2] += theirs.z, sum[3] += theirs.w;
      });
    }
  }
  sync_cluster();  // the others' memory is read
}

__device__ __forceinline__ float load_bias(const IntGemmArguments& a, int n) {
  if (a.bias == nullptr) return kAbsent;
  if (a.bias_type == FloatType::kFloat) return static_cast<const float*>(a.bias)[n];
  if (a.bias_type == FloatType::kHalf) return to_float(static_cast<const __half*>(a.bias)[n]);
  return to_float(static_cast<const __nv_bfloat16*>(a.bias)[n]);
}

// Two neighbouring tokens of one channel, as y stores them.
__device__ __forceinline__ uint32_t pack_y(float token0, float token1, FloatType type) {
  if (type == FloatType::kHalf) {
    return bit_cast<uint16_t>(__float2half_rn(token0)) |
           uint32_t{bit_cast<uint16_t>(__float2half_rn(token1))} << 16;
  }
  return bit_cast<uint16_t>(__float2bfloat16_rn(token0)) |
         uint32_t{bit_cast<uint16_t>(__float2bfloat16_rn(token1))} << 16;
}

__device__ __forceinline__ float unpack_y(uint32_t pair, int token, FloatType type) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * token));
  return type == FloatType::kHalf ? __half2float(bit_cast<__half>(bits))
                                  : __bfloat162float(bit_cast<__nv_bfloat16>(bits));
}

// step 4: a warpgroup's part of y's tile. Tile m of 64 channels lies at out + m kOutBytes, a row of
// 128 swizzled bytes for each token; the residual was copied there before.
template <bool kHasResidual, FloatType kType, class Tile>
__device__ __forceinline__ void finish_as(const Block<Tile>& block, const IntGemmArguments& a,
                                          const TensorMap* y_map, int tile, Sums<Tile>& sums,
                                          int residual_parity) {
  constexpr int kRowTiles = Tile::kRowTiles,
                kShift = Tile::kWeights == Weights::k4 ? kExpandX16Shift : 0;
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const bool leads = threadIdx.x % kWarpgroup == 0;
  const uint32_t out = block.out + warpgroup * kRowTiles * Tile::kOutBytes;
  const int token0 = block.first_token(tile);
  const int channel0 = block.first_channel(tile) + warpgroup * kRowTiles * kFragmentTile;

  if constexpr (kHasResidual) {
    mbarrier_wait(block.residual + 8 * warpgroup, residual_parity);
  } else {
    if (leads) tma_store_wait_read();  // of the tile before
    sync_threads_of(1 + warpgroup, kWarpgroup);
  }

  float w_scale[kRowTiles][2], bias[kRowTiles][2];
  int32_t w_sum[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = channel0 + m * kFragmentTile + 16 * warp + g + 8 * i;
      w_scale[m][i] = n < a.N ? a.w_scale[n] : 0.0f;
      bias[m][i] = n < a.N ? load_bias(a, n) : kAbsent;
      int32_t sum = sums.w[m][i];  // of a quarter of the columns
      if constexpr (Tile::kAsymmetric) {
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
      }
      w_sum[m][i] = sum;
    }
  }

  // Two blocks of 8 tokens at a time are four 8 x 8 matrices: lane l addresses row l % 8, a token,
  // of channels 8 (l / 8 % 2) and tokens 8 (l / 16).
  const int row = lane % 8 + 8 * (lane / 16);
  const uint32_t piece = 2 * warp + lane / 8 % 2;  // 16 bytes: 8 channels
#pragma unroll
  for (int j = 0; j < Tile::kTokens / 8; j += 2) {
    float x_scale[2][2];
    int zero_point[2][2] = {};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int m = token0 + 8 * (j + b) + 2 * t + e;
        x_scale[b][e] = m < a.M ? a.x_scale[m] : 0.0f;
        if constexpr (Tile::kAsymmetric) zero_point[b][e] = m < a.M ? a.x_zero_point[m] : 0;
      }
    }
    const uint32_t at = out + swizzle_128((8 * j + row) * kSwizzleRow + piece * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint32_t matrices = at + m * Tile::kOutBytes;
      uint32_t packed[4], residual[4] = {};
      if constexpr (kHasResidual) ldmatrix_x4_trans(residual, matrices);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // register i: tokens j + i / 2, channels g + 8 (i % 2)
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // Wrapping: both terms may leave int32, the difference does not.
          const uint32_t shift = static_cast<uint32_t>(zero_point[i / 2][e]) * w_sum[m][i % 2];
          const int32_t sum = static_cast<int32_t>(
              static_cast<uint32_t>(sums.acc[m][4 * (j + i / 2) + 2 * (i % 2) + e]) - shift);
          const float extra = kHasResidual ? unpack_y(residual[i], e, kType) : kAbsent;
          y[e] = scaled(sum >> kShift, w_scale[m][i % 2], x_scale[i / 2][e], bias[m][i % 2], extra);
        }
        packed[i] = pack_y(y[0], y[1], kType);
      }
      stmatrix_x4_trans(matrices, packed);
    }
  }
  fence_async_proxy();
  sync_threads_of(1 + warpgroup, kWarpgroup);
  if (leads) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int n = channel0 + m * kFragmentTile;
      if (n < a.N) tma_store(y_map, n, token0, out + m * Tile::kOutBytes);
    }
    tma_store_commit();
  }
}

// Chosen here and not for each y, of which a warp has thousands.
template <class Tile>
__device__ __forceinline__ void finish(const Block<Tile>& block, const IntGemmArguments& a,
                                       const TensorMap* y_map, int tile, Sums<Tile>& sums,
                                       int residual_parity) {
  constexpr auto kHalf = FloatType::kHalf, kBFloat16 = FloatType::kBFloat16;
  const bool is_half = a.y_type == kHalf;
  if (a.residual != nullptr && is_half) {
    finish_as<true, kHalf>(block, a, y_map, tile, sums, residual_parity);
  } else if (a.residual != nullptr) {
    finish_as<true, kBFloat16>(block, a, y_map, tile, sums, residual_parity);
  } else if (is_half) {
    finish_as<false, kHalf>(block, a, y_map, tile, sums, residual_parity);
  } else {
    finish_as<false, kBFloat16>(block, a, y_map, tile, sums, residual_parity);
  }
}

// The residual's tile to where y's will be, by a warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void load_residual(const Block<Tile>& block, const TensorMap* map,
                                              int tile) {
  const int warpgroup = threadIdx.x / kWarpgroup;
  const uint32_t barrier = block.residual + 8 * warpgroup;
  tma_store_wait_read();
  mbarrier_arrive_expect(barrier, Tile::kRowTiles * Tile::kOutBytes);
  for (int m = 0; m < Tile::kRowTiles; ++m) {
    const int tile64 = warpgroup * Tile::kRowTiles + m;
    tma_load(block.out + tile64 * Tile::kOutBytes, map,
             block.first_channel(tile) + tile64 * kFragmentTile, block.first_token(tile), barrier);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    int_gemm_wgmma_kernel(const __grid_constant__ TensorMap x_map,         // [M, K] bytes
                          const __grid_constant__ TensorMap y_map,         // [M, N]
                          const __grid_constant__ TensorMap residual_map,  // [M, N]
                          const IntGemmArguments a, int split) {
  const Block<Tile> block(a, split);
  const bool produces = threadIdx.x >= Tile::kConsumers * kWarpgroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(block.full + 8 * i, 1);
      mbarrier_init(block.empty + 8 * i, Tile::kPair * Tile::kConsumers * kWarpgroup / kWarp);
    }
    for (int i = 0; i < Tile::kConsumers; ++i) mbarrier_init(block.residual + 8 * i, 1);
    fence_mbarrier_init();
  }
  if constexpr (Tile::kPair > 1) {
    sync_cluster();  // the other's copies and arrivals need this block's barriers
  } else {
    sync_block();
  }
  wait_for_earlier_kernels();

  Ring<Tile> ring;
  if (produces) {
    give_registers<kProducerRegisters>();
    const bool elected = threadIdx.x == Tile::kConsumers * kWarpgroup;
    for (int tile = block.cluster; tile < block.tiles(); tile += block.clusters) {
      if (elected) produce(block, a, &x_map, tile, ring);
      if (Tile::kSplits && split > 1) {  // exchange() of the consumers
        sync_warp();
        sync_cluster();
        sync_cluster();
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const bool leads = threadIdx.x % kWarpgroup == 0;
    int residual_parity = 0;
    for (int tile = block.cluster; tile < block.tiles(); tile += block.clusters) {
      if (a.residual != nullptr && leads && block.finishes()) {
        load_residual(block, &residual_map, tile);
      }
      Sums<Tile> sums;
      consume(block, a, tile, sums, ring);
      if constexpr (Tile::kSplits) {
        if (split > 1) exchange(block, sums);
      }
      if (block.finishes()) finish(block, a, &y_map, tile, sums, residual_parity);
      residual_parity ^= 1;
    }
    if (leads) tma_store_wait_read();  // shared memory lasts until it is read
  }
  if constexpr (Tile::kPair > 1) {
    sync_warp();
    sync_cluster();  // and until the other has filled and released its last stages
  }
}

}  // namespace lowbit
