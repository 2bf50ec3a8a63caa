// SPDX-License-Identifier: Apache-2.0
// The PTX that sm_80 and later share, one function an instruction; the emulator's twin of each is
// in csrc/emulator/instructions.h. Hopper's own are in common/hopper.cuh.
#pragma once

#include "common/device.cuh"

#ifdef LOWBIT_EMULATE
#include "emulator/instructions.h"
#endif

namespace lowbit {

// The block's dynamic shared memory; aligned to 1024 bytes, as no kernel has static shared memory.
__device__ __forceinline__ uint8_t* dynamic_smem() {
#ifdef LOWBIT_EMULATE
  return emulator::shared_memory();
#else
  extern __shared__ __align__(1024) uint8_t smem[];
  return smem;
#endif
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
#ifdef LOWBIT_EMULATE
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

__device__ __forceinline__ void sync_block() {
#ifdef LOWBIT_EMULATE
  emulator::block_barrier(0, blockDim.x * blockDim.y * blockDim.z);
#else
  __syncthreads();
#endif
}

// Barrier `id` (1..15) among `threads` threads of the block, a multiple of 32.
__device__ __forceinline__ void sync_threads_of(int id, int threads) {
#ifdef LOWBIT_EMULATE
  emulator::block_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void sync_warp() {
#ifdef LOWBIT_EMULATE
  emulator::sync_warp();
#else
  __syncwarp();
#endif
}

// All 32 lanes take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
#ifdef LOWBIT_EMULATE
  return emulator::shuffle(value, [mask](int lane) { return lane ^ mask; });
#else
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#endif
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
#ifdef LOWBIT_EMULATE
  return emulator::shuffle(value, [lane](int) { return lane; });
#else
  return __shfl_sync(0xFFFFFFFFu, value, lane);
#endif
}

// c + the sum of four products of signed bytes.
__device__ __forceinline__ int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
#ifdef LOWBIT_EMULATE
  return emulator::dp4a(a, b, c);
#else
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
#endif
}

// The lower halves of two words, and the upper ones, that of a below.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) {
#ifdef LOWBIT_EMULATE
  return (a & 0xFFFFu) | b << 16;
#else
  return __byte_perm(a, b, 0x5410);
#endif
}

__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) {
#ifdef LOWBIT_EMULATE
  return a >> 16 | (b & 0xFFFF0000u);
#else
  return __byte_perm(a, b, 0x7632);
#endif
}

// Bytes 0, 2, 1 and 3.
__device__ __forceinline__ uint32_t swap_inner_bytes(uint32_t a) {
#ifdef LOWBIT_EMULATE
  return (a & 0xFF0000FFu) | (a & 0xFF00u) << 8 | (a >> 8 & 0xFF00u);
#else
  return __byte_perm(a, 0, 0x3120);
#endif
}

// The bits of a where those of mask are set, of b where not: one LOP3, of which nvcc makes two.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef LOWBIT_EMULATE
  return (a & mask) | (b & ~mask);
#else
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
#endif
}

// (a & mask) ^ c: one LOP3, of which nvcc makes two where both are constants.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t c) {
#ifdef LOWBIT_EMULATE
  return (a & mask) ^ c;
#else
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
#endif
}

// a b + c of two pairs of halves, each rounded once.
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef LOWBIT_EMULATE
  return emulator::fma_halves<__half>(a, b, c);
#else
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef LOWBIT_EMULATE
  return emulator::fma_halves<__nv_bfloat16>(a, b, c);
#else
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// The smaller and the larger; nan where either is.
__device__ __forceinline__ float min_nan(float a, float b) {
#ifdef LOWBIT_EMULATE
  return emulator::min_nan(a, b);
#else
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

__device__ __forceinline__ float max_nan(float a, float b) {
#ifdef LOWBIT_EMULATE
  return -emulator::min_nan(-a, -b);
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

// 2^x within 2 units in the last place, 0 where it is below the normal range; of 0 exactly 1.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef LOWBIT_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- shared memory ---------------------------------------------------------------------------

// 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
// Register i: row lane / 4, elements 2 (lane % 4) and + 1 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef LOWBIT_EMULATE
  emulator::ldmatrix<4>(r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
#ifdef LOWBIT_EMULATE
  emulator::ldmatrix<2>(r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address));
#endif
}

// Register i: elements of rows 2 (lane % 4) and + 1, column lane / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef LOWBIT_EMULATE
  emulator::ldmatrix_trans<4>(r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
#endif
}

// 16 bytes of shared memory as four registers.
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
#ifdef LOWBIT_EMULATE
  return *reinterpret_cast<uint4*>(emulator::shared_pointer(address, 16, "ld.shared.v4"));
#else
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
#endif
}

// 8 and 4 bytes.
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
#ifdef LOWBIT_EMULATE
  return *reinterpret_cast<uint2*>(emulator::shared_pointer(address, 8, "ld.shared.v2"));
#else
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
#endif
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
#ifdef LOWBIT_EMULATE
  return *reinterpret_cast<uint32_t*>(emulator::shared_pointer(address, 4, "ld.shared"));
#else
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
#endif
}

__device__ __forceinline__ void store_shared_16(uint32_t address, int4 v) {
#ifdef LOWBIT_EMULATE
  *reinterpret_cast<int4*>(emulator::shared_pointer(address, 16, "st.shared.v4")) = v;
#else
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// With `valid` alone, without a branch; else 0.
__device__ __forceinline__ float load_shared_4_if(bool valid, uint32_t address) {
#ifdef LOWBIT_EMULATE
  if (!valid) return 0.0f;
  return *reinterpret_cast<float*>(emulator::shared_pointer(address, 4, "ld.shared"));
#else
  float v = 0.0f;
  asm volatile("{ .reg .pred valid;  setp.ne.b32 valid, %2, 0;  @valid ld.shared.f32 %0, [%1]; }"
               : "+f"(v)
               : "r"(address), "r"(static_cast<int>(valid)));
  return v;
#endif
}

// With `valid` alone, without a branch.
__device__ __forceinline__ void store_shared_16_if(bool valid, uint32_t address, uint4 v) {
#ifdef LOWBIT_EMULATE
  if (valid) {
    *reinterpret_cast<uint4*>(emulator::shared_pointer(address, 16, "st.shared.v4")) = v;
  }
#else
  asm volatile(
      "{ .reg .pred valid; setp.ne.b32 valid, %5, 0; @valid st.shared.v4.u32 [%0], {%1, %2, %3, "
      "%4}; "
      "}" ::"r"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(valid))
      : "memory");
#endif
}

__device__ __forceinline__ void store_shared_8_if(bool valid, uint32_t address, float x0,
                                                  float x1) {
#ifdef LOWBIT_EMULATE
  if (!valid) return;
  float* to = reinterpret_cast<float*>(emulator::shared_pointer(address, 8, "st.shared.v2"));
  to[0] = x0, to[1] = x1;
#else
  asm volatile(
      "{ .reg .pred valid; setp.ne.b32 valid, %3, 0; @valid st.shared.v2.f32 [%0], {%1, %2}; }" ::
          "r"(address),
      "f"(x0), "f"(x1), "r"(static_cast<int>(valid))
      : "memory");
#endif
}

// ---- cp.async ----------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past L1; only the first `bytes` (0 or 16) are read, the
// others are zeros. Done when the group that cp_async_commit closes has been waited for.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, int bytes = 16) {
#ifdef LOWBIT_EMULATE
  emulator::cp_async_16(to, from, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
#endif
}

// 8 bytes, through L1; of them the first `bytes` (0 or 8) are read.
__device__ __forceinline__ void cp_async_8(uint32_t to, const void* from, int bytes = 8) {
#ifdef LOWBIT_EMULATE
  emulator::cp_async<8>(to, from, bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
#endif
}

// How long what is read stays in L2: kFirst for what is read once.
enum class Evict { kNormal, kFirst };

__device__ __forceinline__ uint64_t l2_policy(Evict evict) {
#ifdef LOWBIT_EMULATE
  return static_cast<uint64_t>(evict);
#else
  uint64_t policy;
  if (evict == Evict::kFirst) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  }
  return policy;
#endif
}

// cp_async_16 with a policy of l2_policy.
__device__ __forceinline__ void cp_async_16_policy(uint32_t to, const void* from, int bytes,
                                                   uint64_t policy) {
#ifdef LOWBIT_EMULATE
  (void)policy;
  emulator::cp_async_16(to, from, bytes);
#else
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(bytes), "l"(policy)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef LOWBIT_EMULATE
  emulator::commit(emulator::Engine::kCopy);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef LOWBIT_EMULATE
  emulator::wait_group(emulator::Engine::kCopy, kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- between blocks ----------------------------------------------------------------------------

// What this thread wrote or saw before is seen by whoever sees what it writes afterwards, after a
// fence of theirs. Not __threadfence, which is sequentially consistent and takes longer.
__device__ __forceinline__ void fence_device() {
#ifndef LOWBIT_EMULATE  // its blocks run one after the other
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// The value before; no ordering of other accesses.
__device__ __forceinline__ int atomic_add(int* to, int value) {
#ifdef LOWBIT_EMULATE
  const int before = *to;
  *to += value;
  return before;
#else
  return atomicAdd(to, value);
#endif
}

// From L2, where other blocks' stores are: an L1 is not coherent.
__device__ __forceinline__ int4 load_l2(const int4* from) {
#ifdef LOWBIT_EMULATE
  return *from;
#else
  return __ldcg(from);
#endif
}

// ---- matrix instructions: common/fragments.cuh has their operands
// --------------------------------

// d += a b, 16 x 8 x 32; signed bytes times signed or unsigned bytes.
template <bool kUnsignedB = false>
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
#ifdef LOWBIT_EMULATE
  emulator::mma<8, kUnsignedB>(d, a, b);
#else
  if constexpr (kUnsignedB) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a b, 16 x 8 x 64; signed nibbles times signed or unsigned nibbles. Native on sm_80 to sm_89
// only: later architectures emulate it in some 180 instructions, so there it must not be compiled.
template <bool kUnsignedB = false>
__device__ __forceinline__ void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
#ifdef LOWBIT_EMULATE
  emulator::mma<4, kUnsignedB>(d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900
  if constexpr (kUnsignedB) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.u4.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a b, 16 x 8 x 16; bf16 times bf16, sums in fp32.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#ifdef LOWBIT_EMULATE
  emulator::mma_bf16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d = a b + c of fp16, or of bf16: where c lives on, or is that of several d, nothing is copied.
template <bool kFp16>
__device__ __forceinline__ void mma_halves(float (&d)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef LOWBIT_EMULATE
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  kFp16 ? emulator::mma_f16(d, a, b) : emulator::mma_bf16(d, a, b);
#else
  if constexpr (kFp16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#endif
}

// The same of fp16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#ifdef LOWBIT_EMULATE
  emulator::mma_f16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace lowbit
