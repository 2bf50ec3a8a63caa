// SPDX-License-Identifier: Apache-2.0
// wgmma of bytes (sm_90a): 64 x kN x 32, A in registers, B in shared memory, sums in int32.
//
// A warpgroup is 128 threads that begin at a multiple of 128. common/fragments.cuh has A and D. B
// is [kN, 32] bytes, K-major, within rows of 128 bytes in the 128-byte swizzle
// (common/swizzle.cuh). Between wgmma_fence and the wait for its group, a product's registers must
// be left alone.
#pragma once

#include "common/hopper.cuh"
#include "common/swizzle.cuh"

namespace lowbit {

// Describes B to wgmma. `address`: of its first row, a multiple of 1024, plus the first of the 32
// bytes within the row (0, 32, 64 or 96: the swizzle works on addresses). Fields, in units of 16
// bytes: bits 0-13 the address, 16-29 not used by this layout, 32-45 the distance of groups of 8
// rows; 62-63 the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kLayout = uint64_t{1} << 62 | uint64_t{kSwizzleTile / 16} << 32 | 1 << 16;
  return kLayout | (address & 0x3FFFF) >> 4;
}

__device__ __forceinline__ void wgmma_fence() {
#ifndef LOWBIT_EMULATE
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef LOWBIT_EMULATE
  emulator::commit(emulator::Engine::kMatrix);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most `kPending` groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef LOWBIT_EMULATE
  emulator::wait_group(emulator::Engine::kMatrix, kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving uses of `d` to before a wait.
template <int kCount>
__device__ __forceinline__ void wgmma_fence_operand(int32_t (&d)[kCount]) {
#ifndef LOWBIT_EMULATE
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
#else
  (void)d;
#endif
}

#ifndef LOWBIT_EMULATE
// Operand lists, each the one before and as much again: LOWBIT_D<n> names registers 0 .. n - 1,
// LOWBIT_R<n>(i) binds d[i] .. d[i + n - 1] to them.
#define LOWBIT_D4 "%0, %1, %2, %3"
#define LOWBIT_D8 \
  LOWBIT_D4       \
  ", %4, %5, %6, %7"
#define LOWBIT_D16 \
  LOWBIT_D8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LOWBIT_D32 \
  LOWBIT_D16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_D64                                                                   \
  LOWBIT_D32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_D128                                                                              \
  LOWBIT_D64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define LOWBIT_R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define LOWBIT_R8(i) LOWBIT_R4(i), LOWBIT_R4(i + 4)
#define LOWBIT_R16(i) LOWBIT_R8(i), LOWBIT_R8(i + 8)
#define LOWBIT_R32(i) LOWBIT_R16(i), LOWBIT_R16(i + 16)
#define LOWBIT_R64(i) LOWBIT_R32(i), LOWBIT_R32(i + 32)
#define LOWBIT_R128(i) LOWBIT_R64(i), LOWBIT_R64(i + 64)

// The numbers after D's: A's four registers, the descriptor, whether to accumulate.
#define LOWBIT_WGMMA(n, type, names, bound, a0, a1, a2, a3, desc, scale)                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" scale                                     \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8." type " {" names "}, {%" a0 \
               ", %" a1 ", %" a2 ", %" a3 "}, %" desc ", p;\n}"                               \
               : bound(0)                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor),                 \
                 "r"(int(accumulate)))
#endif

// d (+)= a b; see the head of this file. Without `accumulate`, d's old value is not read.
template <int kN, bool kUnsignedB>
__device__ __forceinline__ void wgmma_s8(int32_t (&d)[kN / 2], const uint32_t (&a)[4],
                                         uint64_t descriptor, bool accumulate) {
  static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256,
                "no such product is written out below");
#ifdef LOWBIT_EMULATE
  emulator::wgmma_s8<kN, kUnsignedB>(d, a, descriptor, accumulate);
#else
  if constexpr (kN == 8 && !kUnsignedB) {
    LOWBIT_WGMMA("8", "s8", LOWBIT_D4, LOWBIT_R4, "4", "5", "6", "7", "8", "9");
  } else if constexpr (kN == 8 && kUnsignedB) {
    LOWBIT_WGMMA("8", "u8", LOWBIT_D4, LOWBIT_R4, "4", "5", "6", "7", "8", "9");
  } else if constexpr (kN == 16 && !kUnsignedB) {
    LOWBIT_WGMMA("16", "s8", LOWBIT_D8, LOWBIT_R8, "8", "9", "10", "11", "12", "13");
  } else if constexpr (kN == 16 && kUnsignedB) {
    LOWBIT_WGMMA("16", "u8", LOWBIT_D8, LOWBIT_R8, "8", "9", "10", "11", "12", "13");
  } else if constexpr (kN == 32 && !kUnsignedB) {
    LOWBIT_WGMMA("32", "s8", LOWBIT_D16, LOWBIT_R16, "16", "17", "18", "19", "20", "21");
  } else if constexpr (kN == 32 && kUnsignedB) {
    LOWBIT_WGMMA("32", "u8", LOWBIT_D16, LOWBIT_R16, "16", "17", "18", "19", "20", "21");
  } else if constexpr (kN == 64 && !kUnsignedB) {
    LOWBIT_WGMMA("64", "s8", LOWBIT_D32, LOWBIT_R32, "32", "33", "34", "35", "36", "37");
  } else if constexpr (kN == 64 && kUnsignedB) {
    LOWBIT_WGMMA("64", "u8", LOWBIT_D32, LOWBIT_R32, "32", "33", "34", "35", "36", "37");
  } else if constexpr (kN == 128 && !kUnsignedB) {
    LOWBIT_WGMMA("128", "s8", LOWBIT_D64, LOWBIT_R64, "64", "65", "66", "67", "68", "69");
  } else if constexpr (kN == 128 && kUnsignedB) {
    LOWBIT_WGMMA("128", "u8", LOWBIT_D64, LOWBIT_R64, "64", "65", "66", "67", "68", "69");
  } else if constexpr (kN == 256 && !kUnsignedB) {
    LOWBIT_WGMMA("256", "s8", LOWBIT_D128, LOWBIT_R128, "128", "129", "130", "131", "132", "133");
  } else if constexpr (kN == 256 && kUnsignedB) {
    LOWBIT_WGMMA("256", "u8", LOWBIT_D128, LOWBIT_R128, "128", "129", "130", "131", "132", "133");
  }
#endif
}

}  // namespace lowbit
