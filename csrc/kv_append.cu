// SPDX-License-Identifier: Apache-2.0
// CUDA kv_append. The contract is in lowbit/ops/kv_append.py.
//
// A row is one head of one token: those of q first, then those of k, then those of v, and a block
// has rows of one kind. A row belongs to 8, 16 or 32 lanes, each with 8 neighbouring elements (two
// thirds of the lanes have some where a head has 80 or 96).
//   step 1  load, and RoPE: what an element turns with is loaded as well, from L1 by then
//   step 2  rotation: 8 neighbours by butterflies in registers, lanes by shuffles; of 20 x 4 and
//           12 x 8 elements, the first factor as a sum of +- rows that lie in shared memory
//   step 3  q: store
//   step 4  k and v: range over the row's lanes, scale, codes; to slot * num_kv_heads + head
// Memory bound: reads and writes 2 D a head of q, reads 2 D and writes D / 2 + 3 of k and v.

#include <cmath>

#include "common/hadamard.cuh"
#include "common/launch.h"

namespace lowbit {
namespace {

constexpr int kThreads = 256;

template <int kHeadDim_>
struct Head {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kVectors = kHeadDim / kVector;
  static constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;
  static constexpr int kRows = kThreads / kLanes;  // of a block
  // kHeadDim = kBase * kPower as in lowbit/hadamard.py: element m * kPower + p
  static constexpr int kBase = kHeadDim == 80 ? 20 : kHeadDim == 96 ? 12 : 1;
  static constexpr int kPower = kHeadDim / kBase;
  static constexpr int kSmemBytes = kBase > 1 ? kRows * kHeadDim * 4 : 0;
  static_assert(kHeadDim % kVector == 0 && kVectors <= kWarp, "a row is one warp at most");
  static_assert((kPower & (kPower - 1)) == 0, "butterflies");
  static_assert(kBase == 1 || kVector % kPower == 0, "with a base, the power is of neighbours");
  static_assert(kBase <= 32, "the signs of a row of its matrix are one word");
};

struct HeadsIn {
  const void* x;  // [T, heads, kHeadDim]
  int64_t token_stride, head_stride;
  int heads;
};

struct CacheOut {
  uint8_t* codes;        // [num_pages * page_size, num_kv_heads, kHeadDim], half of it when packed
  void* scale;           // [num_pages * page_size, num_kv_heads] fp16
  uint8_t* zero_points;  // likewise
};

struct KvAppendArguments {
  HeadsIn q, k, v;
  void* q_out;  // [T, q.heads, kHeadDim]
  CacheOut k_out, v_out;
  const void *cos, *sin;  // [T, turned]
  int64_t cos_stride, sin_stride;
  FloatType angles;
  const int64_t* slot;    // [T]
  const uint32_t* signs;  // [kBase], bit b of word m: H[m, b] < 0; null where kBase is 1
  int64_t slots;          // num_pages * page_size
  int tokens, turned;     // `turned` elements of a head, a multiple of 16
  bool rotate;
  float factor;  // 1 / sqrt(kHeadDim)
  IntGrid grid;
};

__device__ __forceinline__ void load_angles(float (&x)[kVector], const void* from, int64_t at,
                                            FloatType angles) {
  if (angles == FloatType::kFloat) {
    load_vector(x, static_cast<const float*>(from) + at);
  } else if (angles == FloatType::kHalf) {
    load_vector(x, static_cast<const __half*>(from) + at);
  } else {
    load_vector(x, static_cast<const __nv_bfloat16*>(from) + at);
  }
}

// Step 1 for the 8 elements from `first` on.
template <class T>
__device__ __forceinline__ void load_turned(float (&x)[kVector], const T* row, int first, int token,
                                            const KvAppendArguments& a) {
  RawVector<T> along, across;
  along.load(row + first);
  if (first >= a.turned) {
    along.widen(x);
    return;
  }
  const bool is_first_half = first < a.turned / 2;
  across.load(row + (is_first_half ? first + a.turned / 2 : first - a.turned / 2));
  float cos[kVector], sin[kVector], partner[kVector];
  load_angles(cos, a.cos, token * a.cos_stride + first, a.angles);
  load_angles(sin, a.sin, token * a.sin_stride + first, a.angles);
  along.widen(x);
  across.widen(partner);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float turned = mul_rn(partner[i], sin[i]);
    x[i] = add_rn(mul_rn(x[i], cos[i]), is_first_half ? -turned : turned);
  }
}

// Step 2. `lane` of the row; lanes without elements have zeros, and keep them.
template <class H>
__device__ __forceinline__ void rotate_row(float (&x)[1][kVector], int lane, int block_row,
                                           const KvAppendArguments& a) {
  constexpr int kBits = H::kPower >= kVector ? 3 : 2;
  static_assert(H::kPower >= 1 << kBits, "butterflies among neighbours");
  low_butterflies(x, kBits);
  if constexpr (H::kBase > 1) {
    constexpr int kPower = H::kPower, kOwn = kVector / kPower;  // rows of the base's matrix
    float* row = reinterpret_cast<float*>(dynamic_smem()) + block_row * H::kHeadDim;
    const bool has_elements = lane < H::kVectors;
    if (has_elements) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        *reinterpret_cast<float4*>(row + lane * kVector + i) =
            make_float4(x[0][i], x[0][i + 1], x[0][i + 2], x[0][i + 3]);
      }
    }
    sync_warp();
    if (has_elements) {
      uint32_t signs[kOwn];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) signs[m] = a.signs[lane * kOwn + m];
      zero_unit(x[0]);
#pragma unroll
      for (int b = 0; b < H::kBase; ++b) {
        float term[kPower];
#pragma unroll
        for (int p = 0; p < kPower; p += 4) {
          const float4 four = *reinterpret_cast<const float4*>(row + b * kPower + p);
          term[p] = four.x, term[p + 1] = four.y, term[p + 2] = four.z, term[p + 3] = four.w;
        }
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          const float sign = signs[m] >> b & 1 ? -1.0f : 1.0f;
#pragma unroll
          for (int p = 0; p < kPower; ++p) {
            x[0][m * kPower + p] = fmaf(sign, term[p], x[0][m * kPower + p]);
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int mask = 1; mask < H::kVectors; mask *= 2) {
      const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[0][i] = fmaf(sign, x[0][i], shuffle_xor(x[0][i], mask));  // the product is exact
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[0][i] = mul_rn(x[0][i], a.factor);
}

template <class T, class H>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(KvAppendArguments a) {
  wait_for_earlier_kernels();
  const int q_blocks = ceil_div(a.tokens * a.q.heads, H::kRows);
  const int kv_blocks = ceil_div(a.tokens * a.k.heads, H::kRows);
  const bool is_q = blockIdx.x < q_blocks, is_v = blockIdx.x >= q_blocks + kv_blocks;
  const int block = blockIdx.x - (is_q ? 0 : is_v ? q_blocks + kv_blocks : q_blocks);
  const HeadsIn& in = is_q ? a.q : is_v ? a.v : a.k;
  const int block_row = threadIdx.x / H::kLanes, lane = threadIdx.x % H::kLanes;
  const int row = block * H::kRows + block_row, first = lane * kVector;
  const int token = row / in.heads, head = row % in.heads;
  const bool valid = token < a.tokens && lane < H::kVectors;

  // step 1
  float x[1][kVector];
  zero_unit(x[0]);
  if (valid) {
    const T* from = static_cast<const T*>(in.x) + token * in.token_stride + head * in.head_stride;
    if (is_v) {
      load_vector(x[0], from + first);
    } else {
      load_turned(x[0], from, first, token, a);
    }
  }

  // step 2
  if (a.rotate && !is_v) rotate_row<H>(x, lane, block_row, a);

  // step 3
  if (is_q) {
    if (valid) {
      store_vector(static_cast<T*>(a.q_out) + static_cast<int64_t>(row) * H::kHeadDim + first,
                   x[0]);
    }
    return;
  }

  // step 4
  Range range;
#pragma unroll
  for (int i = 0; i < kVector; ++i) range.include(x[0][i]);
#pragma unroll
  for (int mask = 1; mask < H::kLanes; mask *= 2) {
    Range other;
    other.lo = shuffle_xor(range.lo, mask);
    other.hi = shuffle_xor(range.hi, mask);
    range.include(other);
  }
  if (!valid) return;
  const int64_t slot = a.slot[token];
  if (slot < 0 || slot >= a.slots) return;
  const CacheOut& out = is_v ? a.v_out : a.k_out;
  const int64_t at = slot * in.heads + head;
  const Scale scale = scale_of(range, a.grid);
  if (lane == 0) store_scale(out.scale, out.zero_points, at, scale, a.grid);
  store_codes(out.codes, at * H::kHeadDim + first, x[0], scale, a.grid);
}

// ---- host --------------------------------------------------------------------------------------

void check_rows(const char* name, const Tensor& t, ScalarType dtype, int device) {
  check_place("kv_append", name, t, dtype, device);
  const auto strides = t.strides();
  check(strides[strides.size() - 1] == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
        "kv_append: ", name, " must have rows of neighbours at multiples of 16 bytes");
  for (size_t i = 0; i + 1 < strides.size(); ++i) {
    check(strides[i] % kVector == 0, "kv_append: rows of ", name, " must be 16 bytes apart");
  }
}

HeadsIn heads_in(const char* name, const Tensor& t, ScalarType dtype, int device) {
  check_rows(name, t, dtype, device);
  const auto strides = t.strides();
  return {t.data_ptr(), strides[0], strides[1], static_cast<int>(t.sizes()[1])};
}

CacheOut cache_out(const Tensor& codes, const Tensor& scale, const Tensor& zero_point,
                   int64_t tokens, int row_bytes, int device) {
  check_tensor("kv_append", "codes", codes, ScalarType::Byte, tokens * row_bytes, device);
  check_tensor("kv_append", "scale", scale, ScalarType::Half, tokens, device, 2);
  check_tensor("kv_append", "zero_point", zero_point, ScalarType::Byte, tokens, device, 1);
  return {pointer<uint8_t>(codes), pointer<void>(scale), pointer<uint8_t>(zero_point)};
}

template <class T, int kHeadDim>
void launch_append(const KvAppendArguments& a, int device) {
  using H = Head<kHeadDim>;
  check((a.signs != nullptr) == (a.rotate && H::kBase > 1), "kv_append: signs must be given where ",
        kHeadDim, " is no power of two");
  const int blocks =
      ceil_div(a.tokens * a.q.heads, H::kRows) + 2 * ceil_div(a.tokens * a.k.heads, H::kRows);
  launch({"kv_append",
          text("T=", a.tokens, " heads=", a.q.heads, "/", a.k.heads, " head_dim=", kHeadDim),
          device, dim3(blocks), kThreads, H::kSmemBytes},
         &kv_append_kernel<T, H>, a);
}

#define LOWBIT_HEAD_DIMS(visit) visit(64) visit(80) visit(96) visit(128) visit(256)

template <class T>
void append_of(const KvAppendArguments& a, int64_t head_dim, int device) {
  switch (head_dim) {
#define LOWBIT_VISIT(dim) \
  case dim:               \
    return launch_append<T, dim>(a, device);
    LOWBIT_HEAD_DIMS(LOWBIT_VISIT)
#undef LOWBIT_VISIT
    default:
      check(false, "kv_append: no kernel for heads of ", head_dim);
  }
}

Tensor kv_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                 const Tensor& sin, const Tensor& slot, const Tensor& k_codes,
                 const Tensor& k_scale, const Tensor& k_zero_point, const Tensor& v_codes,
                 const Tensor& v_scale, const Tensor& v_zero_point,
                 const std::optional<Tensor>& signs, bool rotate, int64_t bits, double clip) {
  const int64_t T = q.sizes()[0], num_q_heads = q.sizes()[1], D = q.sizes()[2];
  const int64_t num_kv_heads = k.sizes()[1];
  const int device = device_of(q);
  const auto dtype = q.scalar_type();
  Tensor q_out = new_empty(q, {T, num_q_heads, D}, dtype);
  if (T == 0) return q_out;
  check(T * num_q_heads < 1ll << 30, "kv_append: too many heads of tokens for one launch");

  KvAppendArguments a = {};
  a.grid = int_grid(bits, false, clip, true, true);
  a.q = heads_in("q", q, dtype, device);
  a.k = heads_in("k", k, dtype, device);
  a.v = heads_in("v", v, dtype, device);
  a.q_out = q_out.data_ptr();
  a.slots = k_scale.sizes()[0] * k_scale.sizes()[1];
  const int row_bytes = static_cast<int>(a.grid.packed ? D / 2 : D);
  a.k_out = cache_out(k_codes, k_scale, k_zero_point, a.slots * num_kv_heads, row_bytes, device);
  a.v_out = cache_out(v_codes, v_scale, v_zero_point, a.slots * num_kv_heads, row_bytes, device);
  check_rows("cos", cos, cos.scalar_type(), device);
  check_rows("sin", sin, cos.scalar_type(), device);
  a.angles = float_type("kv_append", "cos", cos.scalar_type());
  a.cos = cos.data_ptr(), a.cos_stride = cos.strides()[0];
  a.sin = sin.data_ptr(), a.sin_stride = sin.strides()[0];
  a.turned = static_cast<int>(cos.sizes()[1]);
  check(a.turned % (2 * kVector) == 0 && a.turned <= D, "kv_append: RoPE turns whole vectors");
  check_tensor("kv_append", "slot", slot, ScalarType::Long, T, device, 8);
  a.slot = pointer<const int64_t>(slot);
  if (signs.has_value()) {
    check_tensor("kv_append", "signs", *signs, ScalarType::Int, signs->numel(), device, 4);
  }
  a.signs = pointer<uint32_t>(signs);
  a.tokens = static_cast<int>(T);
  a.rotate = rotate;
  a.factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
  visit_float_type("kv_append", "q", q,
                   [&](auto zero) { append_of<decltype(zero)>(a, D, device); });
  return q_out;
}

template <class T, int kHeadDim>
void register_head(const char* name) {
  using H = Head<kHeadDim>;
  register_kernel({"kv_append", name, reinterpret_cast<const void*>(&kv_append_kernel<T, H>),
                   kThreads, H::kSmemBytes, 80, 120});
}

const bool kRegistered = [] {
#define LOWBIT_VISIT(dim)                   \
  register_head<float, dim>("fp32_" #dim);  \
  register_head<__half, dim>("fp16_" #dim); \
  register_head<__nv_bfloat16, dim>("bf16_" #dim);
  LOWBIT_HEAD_DIMS(LOWBIT_VISIT)
#undef LOWBIT_VISIT
  return true;
}();

}  // namespace
}  // namespace lowbit

LOWBIT_LIBRARY_FRAGMENT(m) {
  m.def(
      "kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slot, "
      "Tensor(a!) k_codes, Tensor(b!) k_scale, Tensor(c!) k_zero_point, Tensor(d!) v_codes, "
      "Tensor(e!) v_scale, Tensor(f!) v_zero_point, Tensor? signs, bool rotate, int bits, "
      "float clip) -> Tensor");
}

LOWBIT_LIBRARY_IMPL(m) { m.impl("kv_append", TORCH_BOX(&lowbit::kv_append)); }
