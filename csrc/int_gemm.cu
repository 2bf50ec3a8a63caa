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

#include "common/int_gemm_mma.cuh"

namespace lowbit {
namespace {

using namespace mma_gemm;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasInt4 = false;  // 4-bit products would be emulated: none in the machine code
#else
constexpr bool kHasInt4 = true;
#endif
constexpr int kLastInt4Sm = 89;

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kMinBlocks)
    int_gemm_kernel(const __grid_constant__ IntGemmArguments a,
                    int4* __restrict__ workspace,  // [tiles, splits, kParts, kThreads], split K
                    int* __restrict__ arrivals,    // [tiles] zeros, split K
                    int stages_per_split) {
  wait_for_earlier_kernels();
  if constexpr (!G::kIsInt4 || kHasInt4) {
    int_gemm_block<G>(a, workspace, arrivals, stages_per_split);
  }
}

// ---- the choice of a tile

// A kernel is one of Tiles times one of AllOperands; both are tried in order.
using Tiles =
    std::tuple<Tile<64, 16, 4, 1, 40, 4>, Tile<64, 64, 2, 2, 49, 2>, Tile<128, 128, 4, 2, 98, 1>>;
using AllOperands = std::tuple<
    Operands<IntGemmKind::kBytes4, false, false>, Operands<IntGemmKind::kBytes4, true, false>,
    Operands<IntGemmKind::kBytes4, false, true>, Operands<IntGemmKind::kBytes4, true, true>,
    Operands<IntGemmKind::kBytes8, false, false>, Operands<IntGemmKind::kBytes8, true, false>,
    Operands<IntGemmKind::kInt4, false, false>, Operands<IntGemmKind::kInt4, true, false>>;

// Estimates, in clocks of an SM (docs/notes/0004): of a stage of each tile, at the rate that takes
// so many blocks an SM; and what a block costs besides, and a split.
struct TileCost {
  int stage_clocks, blocks_to_fill;
};
constexpr TileCost kTileCosts[] = {{320, 3}, {400, 2}, {1350, 1}};
static_assert(std::size(kTileCosts) == std::tuple_size_v<Tiles>, "a cost for each tile");
constexpr int kBlockStages = 2;     // as many stages: the first copies' latency, the epilogue
constexpr int kSplitStages = 2;     // a block's sums to L2, and from there
constexpr int kSplitClocks = 4000;  // once: the arrivals are zeroed, the last block waits for them

TilePlan plan(int64_t M, int64_t N, int64_t K, bool is_int4, int num_sms) {
  const int stages = static_cast<int>(ceil_div<int64_t>(K, kRowBytes * (is_int4 ? 2 : 1)));
  return fastest_plan<Tiles>(
      M, N, [&](auto, int) { return stages; },
      [&](auto, int tile, int64_t tiles, int splits, int stages_of_split) {
        const auto [stage_clocks, blocks_to_fill] = kTileCosts[tile];
        const int64_t rounds = ceil_div<int64_t>(tiles * splits, num_sms);
        const int64_t of_block = stages_of_split + kBlockStages + (splits > 1 ? kSplitStages : 0);
        return std::max<int64_t>(rounds, blocks_to_fill) * of_block * stage_clocks +
               (splits > 1 ? kSplitClocks : 0);
      });
}

template <class G>
void launch_gemm(const IntGemmArguments& a, const TilePlan& plan, const Tensor& like) {
  const SplitMemory<G> memory(plan, ScalarType::Int, like);
  launch({"int_gemm", text("M=", a.M, " N=", a.N, " K=", a.K), a.device,
          dim3(plan.tiles, plan.splits), G::kThreads, G::kSmemBytes},
         &int_gemm_kernel<G>, a, memory.workspace(), memory.counters(), plan.stages_per_split);
}

}  // namespace

void int_gemm_mma(const IntGemmArguments& a, const Tensor& like) {
  const TilePlan chosen = plan(a.M, a.N, a.K, a.kind == IntGemmKind::kInt4, a.num_sms);
  const bool asymmetric = a.x_zero_point != nullptr, two_level = a.w_group_scale != nullptr;
  bool found = false;
  for_each<AllOperands>([&](auto operands, int) {
    using O = decltype(operands);
    if (O::kKind != a.kind || O::kAsymmetric != asymmetric || O::kTwoLevel != two_level) return;
    for_each<Tiles>([&](auto tile, int index) {
      if (index == chosen.tile) launch_gemm<Gemm<O, decltype(tile)>>(a, chosen, like);
    });
    found = true;
  });
  check(found, "int_gemm: no kernel for two levels of scales with these weights");
}

namespace {

// ---- the op

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
    a.bias_type = float_type("int_gemm", "bias", bias->scalar_type());
    expect("bias", *bias, bias->scalar_type(), N);
  }
  a.y_type = float_type("int_gemm", "out_dtype", out_dtype);
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

// numbers: M, N, K, and of the weights 0: fragment of 4 bits, 1: fragment_int4, 2: fragment of 8
// bits, 3: fragment of 4 bits, two levels of scales
std::string describe(const int64_t* numbers, int n, int sm, int num_sms) {
  if (n != 4) return "numbers must be M, N, K and the kind of the weights";
  if (sm == 90 && int_gemm_wgmma_plan != nullptr && numbers[3] != 1) {
    return int_gemm_wgmma_plan(numbers, num_sms);
  }
  return describe_plan<Tiles>(plan(numbers[0], numbers[1], numbers[2], numbers[3] == 1, num_sms));
}

const bool kRegistered = [] {
  for_each<AllOperands>([](auto operands, int) {
    for_each<Tiles>([](auto tile, int) {
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
