// SPDX-License-Identifier: Apache-2.0
// CUDA int_gemm for Hopper: int8 wgmma. The contract is in lowbit/ops/int_gemm.py.
//
// Hopper's matrix units have no 4-bit integers, so W4A4, W4A8 and W8A8 are one loop over bytes. The
// weights are wgmma's register operand: y^T [channels, tokens] = W [channels, K] x^T, 64 channels a
// warpgroup and product, the tokens on its free side of 8 to 256, so few tokens need no other
// kernel.
//
// A block is kConsumers warpgroups that multiply and one that loads; it computes tiles of kChannels
// x kTokens, one after the other (persistent), in stages of 128 columns. Where tokens are many, the
// blocks of a pair compute neighbouring channels and share their activations, or L2 would have to
// deliver more than it can; where they are few, a cluster shares the columns of a tile.
//   step 1  producer: activations [kTokens, 128] by TMA in the 128-byte swizzle, weights, whose
//           fragments of 64 channels x 128 columns are contiguous, by one bulk copy each
//   step 2  consumer: 16 bytes a lane are its weights of 16 channels x 64 columns; 4-bit ones are
//           expanded in registers (common/nibbles.cuh) while the products of the 64 columns before
//           are under way
//   step 3  K split over a cluster: the other blocks' sums are added from their shared memory
//   step 4  scale, bias, residual; transposed to [tokens, channels] in shared memory; TMA to y
// Large M is bound by the matrix units (int8: twice the rate of bf16), small M by reading W once:
// N K / 2 bytes, for which every SM must have some 30 KB under way (docs/notes/0004).

#include "common/int_gemm_wgmma.cuh"

namespace lowbit {
namespace {

struct Plan {
  int row_tiles, tokens, split, blocks, cluster;
};

// Up to 64 tokens are one tile, so that weights are read once. Else the tile that takes the fewest
// rounds of blocks, weighed by its size; the largest of equals, whose loads serve most products.
// Where it can be, K is split until the blocks fill the SMs, four stages each at least.
Plan plan_for(bool with_row_tiles, int M, int N, int K, int num_sms) {
  struct Shape {
    int row_tiles, tokens;
  };
  const Shape shapes[] = {{2, 128}, {1, 256}, {1, 128}, {1, 64}, {1, 32}, {1, 16}};
  Plan best = {};
  int64_t least = 0, tiles = 0;
  for (const Shape& shape : shapes) {
    const bool too_small = shape.tokens < 64 && shape.tokens < M;
    if (too_small || (shape.row_tiles == 2 && !with_row_tiles)) continue;
    const int pair = shape.tokens <= 64 ? 1 : 2;
    const int channels = 2 * kFragmentTile * shape.row_tiles;
    const int64_t pairs = ceil_div(N, channels * pair);
    const int64_t here = pairs * ceil_div(M, shape.tokens);
    const int64_t cost = ceil_div<int64_t>(here * pair, num_sms) * channels * shape.tokens;
    if (best.tokens == 0 || cost < least) {
      best = {shape.row_tiles, shape.tokens, 1, 0, pair};
      least = cost, tiles = here;
    }
  }
  if (best.tokens <= 64) {
    constexpr int kFewestStages = 4;
    const int stages = ceil_div(K, kStageK);
    while (best.split < kMaxCluster && tiles * best.split * 2 <= num_sms &&
           stages >= kFewestStages * best.split * 2) {
      best.split *= 2;
    }
    best.split = ceil_div(stages, ceil_div(stages, best.split));  // no block without a stage
    best.cluster = best.split;
  }
  const int64_t clusters = num_sms / best.cluster > 0 ? num_sms / best.cluster : 1;
  best.blocks = static_cast<int>(tiles < clusters ? tiles : clusters) * best.cluster;
  return best;
}

// numbers as those of int_gemm.cu's planner, whose kind 0 is Weights::k4.
std::string describe(const int64_t* numbers, int num_sms) {
  const Plan plan = plan_for(numbers[3] == 0, numbers[0], numbers[1], numbers[2], num_sms);
  return text("wgmma ", plan.row_tiles, "x", plan.tokens, ": ", plan.blocks,
              " blocks in clusters of ", plan.cluster, ", K in ", plan.split, " parts");
}

template <class Tile>
bool launch_tile(const IntGemmArguments& a, const Plan& plan) {
  const TensorMap x_map =
      make_tensor_map(a.device, a.x, 1, a.M, a.K, Tile::kTokens / Tile::kPair, kStageK, true);
  const TensorMap y_map =
      make_tensor_map(a.device, a.y, 2, a.M, a.N, Tile::kTokens, kFragmentTile, true);
  const TensorMap residual_map =
      a.residual == nullptr
          ? y_map
          : make_tensor_map(a.device, a.residual, 2, a.M, a.N, Tile::kTokens, kFragmentTile, true);
  launch({"int_gemm", text("M=", a.M, " N=", a.N, " K=", a.K), a.device,
          dim3(static_cast<unsigned>(plan.blocks)), Tile::kThreads, Tile::kSmemBytes, plan.cluster},
         &int_gemm_wgmma_kernel<Tile>, x_map, y_map, residual_map, a, plan.split);
  return true;
}

// Applies visit(weights, row tiles, tokens) to every tile.
#define LOWBIT_WGMMA_TILES(visit)                                                         \
  visit(k4, 2, 128) visit(k4, 1, 256) visit(k4, 1, 128) visit(k4, 1, 64) visit(k4, 1, 32) \
      visit(k4, 1, 16) visit(k4TwoLevel, 1, 256) visit(k4TwoLevel, 1, 128)                \
          visit(k4TwoLevel, 1, 64) visit(k4TwoLevel, 1, 32) visit(k4TwoLevel, 1, 16)      \
              visit(k8, 1, 256) visit(k8, 1, 128) visit(k8, 1, 64) visit(k8, 1, 32)       \
                  visit(k8, 1, 16)

bool int_gemm_sm90(const IntGemmArguments& a, const Tensor&) {
  constexpr int kArchitecture = 90;
  const bool whole_tiles = a.w_group_scale == nullptr || a.group_size % kFragmentTile == 0;
  if (a.sm != kArchitecture || a.kind == IntGemmKind::kInt4 || !whole_tiles ||
      a.y_type == FloatType::kFloat) {
    return false;
  }
  const Weights weights = a.kind == IntGemmKind::kBytes8 ? Weights::k8
                          : a.w_group_scale != nullptr   ? Weights::k4TwoLevel
                                                         : Weights::k4;
  const bool asymmetric = a.x_zero_point != nullptr;
  const Plan plan = plan_for(weights == Weights::k4, a.M, a.N, a.K, a.num_sms);
#define LOWBIT_VISIT(w, r, t)                                                     \
  if (weights == Weights::w && plan.row_tiles == r && plan.tokens == t) {         \
    return asymmetric ? launch_tile<WgmmaTile<Weights::w, r, t, true>>(a, plan)   \
                      : launch_tile<WgmmaTile<Weights::w, r, t, false>>(a, plan); \
  }
  LOWBIT_WGMMA_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  throw std::logic_error("int_gemm: the plan names a tile that is not compiled");
}

template <class Tile>
void register_tile(const char* name) {
  register_kernel({"int_gemm", name, reinterpret_cast<const void*>(&int_gemm_wgmma_kernel<Tile>),
                   Tile::kThreads, Tile::kSmemBytes, 90, 90});
}

const bool kRegistered = [] {
  int_gemm_wgmma = &int_gemm_sm90;
  int_gemm_wgmma_plan = &describe;
#define LOWBIT_VISIT(w, r, t)                                                   \
  register_tile<WgmmaTile<Weights::w, r, t, false>>("wgmma_" #w "_" #r "x" #t); \
  register_tile<WgmmaTile<Weights::w, r, t, true>>("wgmma_" #w "_" #r "x" #t "_asym");
  LOWBIT_WGMMA_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  return true;
}();

}  // namespace
}  // namespace lowbit
