// SPDX-License-Identifier: Apache-2.0
// CUDA weight_only_gemm by mma.sync, for every architecture and any number of tokens. The contract
// is in lowbit/ops/weight_only_gemm.py.
//
// Weights are the A operand of m16n8k16, 16 channels of an instruction, and x the B operand, 8
// tokens: few tokens need no kernel of their own. A block has kChannels x kTokens of y and a range
// of K, cut into stages of kStageK columns; its warps lie kWarpsN x kWarpsM.
//   step 1  copy a stage, kStages - 1 ahead of its use: cp.async, 16 bytes a thread at a time.
//           Chunks of x are swizzled by their row: what is read together lies in different banks.
//           Weights keep their order, in which a lane's 8, 12 or 16 bytes are its codes of 4 steps
//           (2, 3 or 4 bits), or of 2. Scales and zero points go through registers, as fp32 and as
//           what step 3 adds. Zeros past M, N and K.
//   step 2  fragments of the next 16 columns, while step 3 multiplies those before: x by ldmatrix;
//           for weights as int_gemm reads them in the order of K that their registers have
//   step 3  code - zero_point in fp16 or bf16, exactly (common/float_weights.cuh), times x, summed
//           in fp32; at the end of a group, or of a stage, its sum times its scale: one FMA
//   step 4  split K: each block writes its sums, the last to arrive adds all, in order
//   step 5  sums through shared memory, tokens in rows; bias, residual; 16 bytes a store
// Few tokens: bound by the weights' bytes; many: by the matrix units (docs/notes/0006).

#include <algorithm>
#include <iterator>

#include "common/weight_only_gemm.cuh"

namespace lowbit {
namespace {

using namespace weight_only;

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kMinBlocks)
    weight_only_gemm_kernel(const __grid_constant__ Arguments a,
                            int4* __restrict__ workspace,  // [tiles, splits, parts, kThreads]
                            int* __restrict__ arrivals,    // [tiles] zeros, split K
                            int stages_per_split) {
  wait_for_earlier_kernels();
  gemm_block<G>(a, workspace, arrivals, stages_per_split);
}

// ---- the choice of a tile

// A kernel is one of AllOperands times one of Tiles that has a cost for its bits; tiles are tried
// in order.
using Tiles = std::tuple<Tile<64, 8, 256, 4, 1, 3, 4>, Tile<64, 16, 256, 4, 1, 3, 4>,
                         Tile<64, 64, 64, 2, 2, 3, 2>, Tile<128, 128, 64, 4, 2, 3, 1>>;
using AllOperands =
    std::tuple<Operands<__half, 2, 2>, Operands<__half, 3, 2>, Operands<__half, 4, 2>,
               Operands<__half, 8, 2>, Operands<__nv_bfloat16, 2, 2>, Operands<__nv_bfloat16, 3, 2>,
               Operands<__nv_bfloat16, 4, 2>, Operands<__nv_bfloat16, 8, 2>,
               Operands<__nv_bfloat16, 8, 2, true>, Operands<__half, 4, 4>, Operands<__half, 8, 4>,
               Operands<__nv_bfloat16, 4, 4>, Operands<__nv_bfloat16, 8, 4>, Operands<__half, 4, 8>,
               Operands<__nv_bfloat16, 4, 8>>;

// What a stage of each tile costs, in clocks of an SM, by the stored bits of its weights, and how
// many blocks an SM needs to be that fast: estimates, docs/notes/0006. 0: not compiled; of 2 and 3
// bits, which few tokens are for, the smaller of two tiles for prompts will do, and of the layouts
// of int_gemm too, whose prompts have their activations quantized.
struct TileCost {
  int clocks[4], blocks_to_fill;

  constexpr int of(int bits, int run) const {
    const bool compiled = run == 2 || clocks[0] > 0;
    return compiled ? clocks[bits == 8 ? 3 : bits - 2] : 0;
  }
};
constexpr TileCost kTileCosts[] = {{{310, 350, 440, 880}, 3},
                                   {{340, 380, 460, 900}, 3},
                                   {{230, 240, 230, 250}, 2},
                                   {{0, 0, 850, 890}, 1}};
static_assert(std::size(kTileCosts) == std::tuple_size_v<Tiles>, "a cost for each tile");
constexpr int kBlockColumns = 256, kSplitColumns = 128;  // what a block, and a split, costs besides

TilePlan plan(int64_t M, int64_t N, int64_t K, int bits, int run, int num_sms) {
  return fastest_plan<Tiles>(
      M, N,
      [&](auto tile, int index) {
        const bool compiled = kTileCosts[index].of(bits, run) > 0;
        return compiled ? static_cast<int>(ceil_div<int64_t>(K, tile.kStageK)) : 0;
      },
      [&](auto tile, int index, int64_t tiles, int splits, int stages_of_split) {
        const int clocks = kTileCosts[index].of(bits, run);
        const int64_t rounds = ceil_div<int64_t>(tiles * splits, num_sms);
        const int columns =
            stages_of_split * tile.kStageK + kBlockColumns + (splits > 1 ? kSplitColumns : 0);
        return std::max<int64_t>(rounds, kTileCosts[index].blocks_to_fill) * clocks * columns /
               tile.kStageK;
      });
}

template <class G>
void launch_gemm(const Arguments& a, const TilePlan& plan, int device, const Tensor& like) {
  const SplitMemory<G> memory(plan, ScalarType::Float, like);
  launch({"weight_only_gemm", text("M=", a.M, " N=", a.N, " K=", a.K), device,
          dim3(plan.tiles, plan.splits), G::kThreads, G::kSmemBytes},
         &weight_only_gemm_kernel<G>, a, memory.workspace(), memory.counters(),
         plan.stages_per_split);
}

// ---- the op

// log2 of a group's elements.
int group_shift(int64_t K, int64_t groups) {
  if (groups == 1) return kRowShift;
  for (int shift = 5; shift <= 7; ++shift) {
    if (groups << shift == K) return shift;
  }
  check(false, "weight_only_gemm: groups must be 32, 64 or 128 elements, or the whole row");
  return 0;
}

// kRun of Operands.
int run_of(const std::string& w_layout) {
  if (w_layout == "fragment_float") return 2;
  if (w_layout == "fragment") return 4;
  check(w_layout == "fragment_int4", "weight_only_gemm: w_layout must be a kernel layout");
  return 8;
}

Tensor weight_only_gemm(const Tensor& x, const Tensor& w_codes, const Tensor& w_scale,
                        const std::optional<Tensor>& w_zero_point,
                        const std::optional<Tensor>& bias, int64_t w_bits,
                        const std::string& w_layout, const std::optional<Tensor>& residual) {
  const int run = run_of(w_layout);
  check(w_bits >= 2 && w_bits <= 8, "weight_only_gemm: w_bits must be 2..8");
  check(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
        "weight_only_gemm: x must be fp16 or bf16");
  const bool is_half = x.scalar_type() == ScalarType::Half;
  const int bits = w_bits <= 4 ? static_cast<int>(w_bits) : 8, device = device_of(x);
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.size(0), G = w_scale.size(1);
  constexpr int64_t kLargest = INT32_MAX / 2;  // rounding up to whole stages stays below 2^31
  check(M < kLargest && N < kLargest && K < kLargest, "weight_only_gemm: a size is past 2^30");
  check(K > 0 && K % kChunkOfX == 0 && N % kOutputs == 0,
        "weight_only_gemm: rows of x and y must be multiples of 16 bytes");

  Arguments a = {};
  a.M = static_cast<int>(M);
  a.N = static_cast<int>(N);
  a.K = static_cast<int>(K);
  a.groups = static_cast<int>(G);
  a.group_shift = group_shift(K, G);
  check(run == 2 || G == 1, "weight_only_gemm: groups must be of weights fragment_float");
  const auto expect = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t numel,
                          int alignment = 16) {
    check_tensor("weight_only_gemm", name, t, dtype, numel, device, alignment);
  };
  const int64_t tiles = ceil_div<int64_t>(N, kFragmentTile) * ceil_div<int64_t>(K, kFragmentTile);
  expect("x", x, x.scalar_type(), M * K);
  expect("w_codes", w_codes, ScalarType::Byte, tiles * kFragmentTile * kFragmentTile * bits / 8);
  a.scale_type = float_type("weight_only_gemm", "w_scale", w_scale.scalar_type());
  check(a.scale_type != FloatType::kBFloat16, "weight_only_gemm: w_scale must be fp32 or fp16");
  expect("w_scale", w_scale, w_scale.scalar_type(), N * G, 4);
  if (w_zero_point) expect("w_zero_point", *w_zero_point, ScalarType::Byte, N * G, 1);
  if (bias) {
    a.bias_type = float_type("weight_only_gemm", "bias", bias->scalar_type());
    expect("bias", *bias, bias->scalar_type(), N);
  }
  if (residual) expect("residual", *residual, x.scalar_type(), M * N);
  Tensor y = new_empty(x, {M, N}, x.scalar_type());
  if (M == 0 || N == 0) return y;
  a.x = pointer<const void>(x);
  a.w = pointer<const uint8_t>(w_codes);
  a.w_scale = pointer<const void>(w_scale);
  a.w_zero_point = pointer<uint8_t>(w_zero_point);
  a.bias = pointer<char>(bias);
  a.residual = pointer<char>(residual);
  a.y = pointer<void>(y);

  const TilePlan chosen = plan(M, N, K, bits, run, device_num_sms(device));
  const bool two_terms = !is_half && bits == 8 && w_zero_point.has_value();
  for_each<AllOperands>([&](auto operands, int) {
    using O = decltype(operands);
    if (O::kIsHalf != is_half || O::kBits != bits || O::kRun != run) return;
    if (O::kTwoTerms != two_terms) return;
    for_each<Tiles>([&](auto tile, auto index) {
      if constexpr (kTileCosts[index].of(O::kBits, O::kRun) > 0) {
        if (index == chosen.tile) launch_gemm<Gemm<O, decltype(tile)>>(a, chosen, device, x);
      }
    });
  });
  return y;
}

// numbers: M, N, K, the stored bits of the weights, and kRun of their layout where it is not 2
std::string describe(const int64_t* numbers, int n, int, int num_sms) {
  const int64_t bits = n == 4 || n == 5 ? numbers[3] : 0, run = n == 5 ? numbers[4] : 2;
  bool known = false;
  for_each<AllOperands>(
      [&](auto operands, int) { known |= operands.kBits == bits && operands.kRun == run; });
  if (!known) {
    return "numbers must be M, N, K, the stored bits of the weights: 2, 3, 4 or 8, and the run of "
           "their layout: 2 (fragment_float), 4 (fragment) or 8 (fragment_int4)";
  }
  return describe_plan<Tiles>(plan(numbers[0], numbers[1], numbers[2], static_cast<int>(bits),
                                   static_cast<int>(run), num_sms));
}

const bool kRegistered = [] {
  for_each<AllOperands>([](auto operands, int) {
    for_each<Tiles>([](auto tile, auto index) {
      using O = decltype(operands);
      if constexpr (kTileCosts[index].of(O::kBits, O::kRun) > 0) {
        using G = Gemm<O, decltype(tile)>;
        static const std::string name = G::name() + "_" + tile.name();
        register_kernel({"weight_only_gemm", name.c_str(),
                         reinterpret_cast<const void*>(&weight_only_gemm_kernel<G>), G::kThreads,
                         G::kSmemBytes, 80, 120});
      }
    });
  });
  register_planner("weight_only_gemm", &describe);
  return true;
}();

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "weight_only_gemm(Tensor x, Tensor w_codes, Tensor w_scale, Tensor? w_zero_point, "
      "Tensor? bias, int w_bits, str w_layout=\"row_major\", Tensor? residual=None) -> Tensor");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("weight_only_gemm", TORCH_BOX(&lowbit::weight_only_gemm)); }
