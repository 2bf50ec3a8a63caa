// SPDX-License-Identifier: Apache-2.0
// CUDA kv_attention. The contract is in lowbit/ops/kv_attention.py.
//
// A row is one query head of one query; the heads of a KV head and the queries of a sequence follow
// each other as rows. A block has a tile of rows of one sequence and KV head, and a split of the
// positions. Decode: 16 rows, and each of its warps takes every so many 32 positions, alone; warps
// meet at the end. Prefill: 64 rows, 16 a warp, and the warps share what they read.
//   step 1  find the tile's sequence; q as A registers, each row brought to the top of fp16
//   step 2  32 positions at a time by cp.async, one stage ahead: codes as they are, in rows of
//           shared memory; scales and zero points by a lane for each position, also one ahead; the
//           page of a position two ahead
//   step 3  scores = k_scale (q . codes - k_zero_point sum of q); codes are subnormal fp16 numbers
//           as they are (common/kv_attention.cuh): 5 instructions take 8 of them apart
//   step 4  online softmax in base 2; the running maximum is of scores without factors of rows
//   step 5  p v_scale in fp16, brought to its top by a power of two, times codes; ldmatrix.trans of
//           16-bit words gives positions 2 t and 2 t + 1 of one word, so of each of its codes a B
//           register; the zero points are one more column
//   step 6  prefill: positions that the call gives in full precision, likewise (common/kv_new.cuh)
//   step 7  warps' sums in order, through shared memory; out, or a split's share of it
// A second kernel adds the splits of a row in order: here, or in csrc/kv_attention_quant.cu, which
// then quantizes it. How many there are follows from shapes alone, so that a graph can be captured;
// splits beyond a sequence's length end at once.
// Decode is bound by reading K and V (136 bytes a position and KV head of 128 with 4 bits), prefill
// by issuing instructions: docs/notes/0007.

#include <algorithm>
#include <cmath>

#include "common/kv_combine.cuh"
#include "common/kv_launch.h"

namespace lowbit {
namespace {

using kv::Arguments, kv::Attention, kv::Call, kv::Pages, kv::Tile;

constexpr int kBlocksPerSm = 3;      // that splits of decode are to fill
constexpr int kShortestSplit = 256;  // positions
constexpr int kMostSplits = 128;
constexpr int kManyRows = 32;  // of a sequence, on average, that are prefill
constexpr int kCombineThreads = 128;
constexpr double kLog2E = 1.4426950408889634;

template <class T>
__global__ void __launch_bounds__(T::kThreads) kv_attention_kernel(Arguments a) {
  wait_for_earlier_kernels();
  kv::kv_attention_block<T>(a);
}

// A block a row.
__global__ void __launch_bounds__(kCombineThreads) kv_attention_combine_kernel(Arguments a) {
  wait_for_earlier_kernels();
  const int num_q_heads = a.num_kv_heads * a.heads, rows = a.T * num_q_heads;
  const int row = blockIdx.x;
  const kv::SplitRange seen = kv::splits_seen(a, row / num_q_heads);
  const int64_t first = seen.first * int64_t{rows} + row;
  const kv::RowSplits splits{a.row_max + first, a.row_sum + first, rows, seen.used};
  const float top = splits.top(), inverse = splits.inverse(top);
#pragma unroll 1
  for (int d = threadIdx.x; d < a.head_dim; d += kCombineThreads) {
    float y = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits.used; ++split) {
      const int64_t at = first + split * int64_t{rows};
      y = kv::add_split(y, a.partial[at * a.head_dim + d], splits.weight(split, top));
    }
    a.out[int64_t{row} * a.head_dim + d] = kv::narrow(y * inverse, a.is_bf16);
  }
}

// ---- host --------------------------------------------------------------------------------------

// Two warps where four would have more shared memory than a block can.
template <int kBits, int kDim>
using Decode = Tile<kBits, kDim, 1, kBits * kDim == 8 * kv::kMaxHeadDim ? 2 : 4>;
template <int kBits, int kDim>
using Prefill = Tile<kBits, kDim, 4, 1>;
template <int kBits, int kDim>
using PrefillNew = Tile<kBits, kDim, 4, 1, true>;

// Applies `visit` to bits and the head_dim up to which a tile goes, in ascending order.
#define LOWBIT_KV_TILES(visit) \
  visit(4, 64) visit(4, 128) visit(4, 256) visit(8, 64) visit(8, 128) visit(8, 256)

struct Plan {
  bool has_new, is_decode, one_query;  // one_query: a tile is one query
  int64_t tiles;                       // of rows, with gaps, of a KV head
  int splits, split_length;
};

Plan plan_for(int64_t T, int64_t B, int64_t heads, int64_t num_kv_heads, int64_t longest,
              int64_t window, bool has_new, int num_sms) {
  // What any sequence's queries see: no more than T of them are of one, and it may begin early.
  longest = std::min(longest, window + T + kv::kTokens);
  Plan plan;
  plan.has_new = has_new;
  plan.is_decode = !has_new && T * heads <= kManyRows * std::max<int64_t>(B, 1);
  const int64_t rows = plan.is_decode ? kv::kTileRows : 4 * kv::kTileRows;
  plan.one_query = T <= B && heads <= rows;
  const int64_t tile_rows = plan.one_query ? heads : rows;
  plan.tiles = plan.one_query ? T : T * heads / tile_rows + B + 1;
  const int64_t busy =
      std::max<int64_t>({ceil_div(T * heads, tile_rows), std::min(T, B), 1}) * num_kv_heads;
  const int64_t wanted = std::clamp<int64_t>(kBlocksPerSm * num_sms / busy, 1, kMostSplits);
  const int64_t length = ceil_div(ceil_div(longest, wanted), int64_t{kShortestSplit});
  plan.split_length = static_cast<int>(std::max<int64_t>(length, 1) * kShortestSplit);
  plan.splits =
      static_cast<int>(std::max<int64_t>(ceil_div<int64_t>(longest, plan.split_length), 1));
  return plan;
}

template <class T>
void launch_tile(const char* op, Arguments a, const Plan& plan, int device) {
  a.tile_rows = plan.one_query ? a.heads : T::kRows;
  const auto blocks = static_cast<unsigned>(plan.tiles * a.num_kv_heads);
  launch({op,
          text("T=", a.T, " B=", a.B, " heads=", a.heads, "x", a.num_kv_heads,
               " head_dim=", a.head_dim, " splits=", plan.splits),
          device, dim3(blocks, plan.splits), T::kThreads, T::kSmemBytes},
         &kv_attention_kernel<T>, a);
}

Pages pages_of(const char* op, const Tensor& codes, const Tensor& scale, const Tensor& zero_point,
               int64_t rows, int64_t row_bytes, int device) {
  check_tensor(op, "codes", codes, ScalarType::Byte, rows * row_bytes, device);
  check_tensor(op, "scale", scale, ScalarType::Half, rows, device, 2);
  check_tensor(op, "zero_point", zero_point, ScalarType::Byte, rows, device, 1);
  return {pointer<uint8_t>(codes), pointer<__half>(scale), pointer<uint8_t>(zero_point)};
}

void check_table(const char* op, const Tensor& t, int device) {
#ifdef LOWBIT_EMULATE
  (void)device;
#else
  check(t.is_cuda() && t.get_device_index() == device, op, ": block_table must be on CUDA device ",
        device);
#endif
  check(t.scalar_type() == ScalarType::Int, op, ": block_table must be int32");
  check(t.sizes()[1] <= 1 || t.strides()[1] == 1, op, ": rows of block_table are apart");
}

// Without out and what splits need.
Arguments arguments_of(const Call& c, int device) {
  const int64_t T = c.q.sizes()[0], num_q_heads = c.q.sizes()[1], D = c.q.sizes()[2];
  const int64_t B = c.block_table.sizes()[0], P = c.block_table.sizes()[1];
  const int64_t page_size = c.k_scale.sizes()[1], num_kv_heads = c.k_scale.sizes()[2];
  const int64_t cache_rows = c.k_scale.numel(), row_bytes = D * (c.bits == 4 ? 4 : 8) / 8;
  check(D % 16 == 0 && D <= kv::kMaxHeadDim, c.op, ": head_dim is a multiple of 16 to ",
        kv::kMaxHeadDim);
  check(T * num_q_heads < 1ll << 30 && cache_rows < 1ll << 31 && P * page_size < 1ll << 30, c.op,
        ": q or the cache is too large for its kernel's 32-bit numbers");
  const bool is_bf16 = c.q.scalar_type() == ScalarType::BFloat16;
  check(is_bf16 || c.q.scalar_type() == ScalarType::Half, c.op, ": q must be fp16 or bf16");
  check_tensor(c.op, "q", c.q, c.q.scalar_type(), c.q.numel(), device);
  check_table(c.op, c.block_table, device);
  check_tensor(c.op, "seq_lens", c.seq_lens, ScalarType::Int, B, device, 4);
  check_tensor(c.op, "query_start", c.query_start, ScalarType::Int, B + 1, device, 4);

  Arguments a = {};
  a.q = pointer<uint16_t>(c.q);
  a.k = pages_of(c.op, c.k_codes, c.k_scale, c.k_zero_point, cache_rows, row_bytes, device);
  a.v = pages_of(c.op, c.v_codes, c.v_scale, c.v_zero_point, cache_rows, row_bytes, device);
  a.block_table = pointer<int>(c.block_table);
  a.table_stride = c.block_table.strides()[0];
  a.seq_lens = pointer<int>(c.seq_lens);
  a.query_start = pointer<int>(c.query_start);
  if (c.k_new.has_value() && c.v_new.has_value() && c.cached_lens.has_value()) {
    const int64_t numbers = T * num_kv_heads * D;
    check_tensor(c.op, "k_new", *c.k_new, c.q.scalar_type(), numbers, device);
    check_tensor(c.op, "v_new", *c.v_new, c.q.scalar_type(), numbers, device);
    check_tensor(c.op, "cached_lens", *c.cached_lens, ScalarType::Int, B, device, 4);
    a.k_new = pointer<uint16_t>(*c.k_new), a.v_new = pointer<uint16_t>(*c.v_new);
    a.cached_lens = pointer<int>(*c.cached_lens);
  }
  a.T = static_cast<int>(T), a.B = static_cast<int>(B), a.pages_of_row = static_cast<int>(P);
  a.page_size = static_cast<int>(page_size), a.num_kv_heads = static_cast<int>(num_kv_heads);
  a.heads = static_cast<int>(num_q_heads / num_kv_heads), a.head_dim = static_cast<int>(D);
  a.is_bf16 = is_bf16;
  a.window =
      static_cast<int>(c.window ? std::min<int64_t>(c.window, kv::kNoWindow) : kv::kNoWindow);
  a.factor = static_cast<float>(std::abs(c.scaling) * kLog2E);
  a.k_factor = c.scaling < 0 ? -kv::kInverseCodeUnit : kv::kInverseCodeUnit;
  return a;
}

void launch_splits(const Call& c, const Arguments& a, const Plan& plan, int device) {
  const int code_bits = c.bits == 4 ? 4 : 8;
#define LOWBIT_VISIT(bits, dim)                                                         \
  if (code_bits == bits && a.head_dim <= dim) {                                         \
    return plan.has_new     ? launch_tile<PrefillNew<bits, dim>>(c.op, a, plan, device) \
           : plan.is_decode ? launch_tile<Decode<bits, dim>>(c.op, a, plan, device)     \
                            : launch_tile<Prefill<bits, dim>>(c.op, a, plan, device);   \
  }
  LOWBIT_KV_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
}

Tensor kv_attention(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                    const Tensor& k_zero_point, const Tensor& v_codes, const Tensor& v_scale,
                    const Tensor& v_zero_point, const Tensor& block_table, const Tensor& seq_lens,
                    const Tensor& query_start, const std::optional<Tensor>& k_new,
                    const std::optional<Tensor>& v_new, const std::optional<Tensor>& cached_lens,
                    int64_t bits, double scaling, int64_t window) {
  const Call call{"kv_attention", q,       k_codes,      k_scale,     k_zero_point,
                  v_codes,        v_scale, v_zero_point, block_table, seq_lens,
                  query_start,    k_new,   v_new,        cached_lens, bits,
                  scaling,        window};
  const auto shape = q.sizes();
  return *kv::launch_attention(call, {shape.begin(), shape.end()}).out;
}

// ---- registration ------------------------------------------------------------------------------

template <class T>
void register_tile(const char* name) {
  register_kernel({"kv_attention", name, reinterpret_cast<const void*>(&kv_attention_kernel<T>),
                   T::kThreads, T::kSmemBytes, 80, 120});
}

// numbers: T, B, num_q_heads, num_kv_heads, head_dim, bits, pages of a row, page_size, window
std::string describe_plan(const int64_t* numbers, int n, int, int num_sms) {
  if (n != 9) return "kv_attention: 9 numbers";
  const int64_t heads = numbers[2] / numbers[3];
  const Plan plan = plan_for(numbers[0], numbers[1], heads, numbers[3], numbers[6] * numbers[7],
                             numbers[8] ? numbers[8] : int64_t{kv::kNoWindow}, false, num_sms);
  return text(plan.is_decode ? "decode" : "prefill", plan.one_query ? ", a tile is a query" : "",
              ", grid ", plan.tiles * numbers[3], "x", plan.splits, ", splits of ",
              plan.split_length);
}

const bool kRegistered = [] {
#define LOWBIT_VISIT(bits, dim)                                 \
  register_tile<Decode<bits, dim>>("decode_" #bits "x" #dim);   \
  register_tile<Prefill<bits, dim>>("prefill_" #bits "x" #dim); \
  register_tile<PrefillNew<bits, dim>>("prefill_new_" #bits "x" #dim);
  LOWBIT_KV_TILES(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  register_kernel({"kv_attention", "combine",
                   reinterpret_cast<const void*>(&kv_attention_combine_kernel), kCombineThreads, 0,
                   80, 120});
  register_planner("kv_attention", &describe_plan);
  return true;
}();

}  // namespace

Attention kv::launch_attention(const Call& call, const std::vector<int64_t>& out_shape,
                               int64_t most_left) {
  const int device = device_of(call.q);
  Attention found = {{}, arguments_of(call, device), {}, {}};
  Arguments& a = found.arguments;
  const auto give_out = [&] {
    found.out = new_empty(call.q, out_shape, call.q.scalar_type());
    a.out = pointer<uint16_t>(*found.out);
  };
  if (call.q.numel() == 0) {
    give_out();
    return found;
  }
  const int64_t T = a.T, num_q_heads = a.num_kv_heads * a.heads;
  const Plan plan = plan_for(T, a.B, a.heads, a.num_kv_heads, int64_t{a.pages_of_row} * a.page_size,
                             a.window, a.k_new != nullptr, device_num_sms(device));
  a.splits = plan.splits, a.split_length = plan.split_length;
  if (plan.splits == 1 || plan.splits > most_left) give_out();
  if (plan.splits > 1) {
    found.partial = new_empty(call.q, {plan.splits, T, num_q_heads, a.head_dim}, ScalarType::Float);
    found.rows = new_empty(call.q, {2, plan.splits, T, num_q_heads}, ScalarType::Float);
    a.partial = pointer<float>(*found.partial);
    a.row_max = pointer<float>(*found.rows);
    a.row_sum = a.row_max + plan.splits * T * num_q_heads;
  }
  launch_splits(call, a, plan, device);
  if (plan.splits > 1 && found.out.has_value()) {
    launch({call.op, text("combine, T=", T, " splits=", plan.splits), device,
            dim3(static_cast<unsigned>(T * num_q_heads)), kCombineThreads},
           &kv_attention_combine_kernel, a);
  }
  return found;
}

}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "kv_attention(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_zero_point, "
      "Tensor v_codes, Tensor v_scale, Tensor v_zero_point, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start, Tensor? k_new, Tensor? v_new, Tensor? cached_lens, int bits, "
      "float scaling, int window) -> Tensor");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("kv_attention", TORCH_BOX(&lowbit::kv_attention)); }
