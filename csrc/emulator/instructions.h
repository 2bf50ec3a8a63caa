// SPDX-License-Identifier: Apache-2.0
// What the instructions of common/ptx.cuh do, from the PTX ISA's tables (common/fragments.cuh).
#pragma once

#include <cmath>
#include <cstring>

#include "common/fragments.cuh"
#include "emulator/runtime.h"

namespace lowbit::emulator {

constexpr int kLanes = 32;

// body(lanes): the arguments of all lanes that meet, by pointer.
template <int kGroup, class Lane, class Body>
void meet(const char* what, Lane& lane, Body body) {
  collective(what, kGroup, &lane, [&](void* const* all) {
    Lane* lanes[kGroup];
    for (int i = 0; i < kGroup; ++i) lanes[i] = static_cast<Lane*>(all[i]);
    body(lanes);
  });
}

inline void sync_warp() {
  int nothing = 0;
  meet<kLanes>("bar.warp.sync", nothing, [](int**) {});
}

template <class T, class Source>
T shuffle(T value, Source source) {
  struct Lane {
    T in, out;
    int from;
  } self{value, value, source(current().linear % kLanes)};
  meet<kLanes>("shfl.sync", self, [](Lane** lanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i]->out = lanes[lanes[i]->from % kLanes]->in;
  });
  return self.out;
}

inline int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
  return c;
}

inline float min_nan(float a, float b) { return a != a || a < b ? a : b; }

template <int kMatrices>
void ldmatrix(uint32_t (&r)[kMatrices], uint32_t address) {
  struct Lane {
    uint32_t address;
    uint32_t* r;
  } self{address, r};
  meet<kLanes>("ldmatrix", self, [](Lane** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t row = lanes[8 * matrix + lane / 4]->address;
        memcpy(&lanes[lane]->r[matrix], shared_pointer(row, 16, "ldmatrix") + 4 * (lane % 4), 4);
      }
    }
  });
}

template <int kMatrices>
void ldmatrix_trans(uint32_t (&r)[kMatrices], uint32_t address) {
  struct Lane {
    uint32_t address;
    uint32_t* r;
  } self{address, r};
  meet<kLanes>("ldmatrix.trans", self, [](Lane** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      for (int lane = 0; lane < kLanes; ++lane) {
        uint16_t halves[2];
        for (int i = 0; i < 2; ++i) {
          const uint32_t row = lanes[8 * matrix + 2 * (lane % 4) + i]->address;
          memcpy(&halves[i], shared_pointer(row, 16, "ldmatrix.trans") + 2 * (lane / 4), 2);
        }
        memcpy(&lanes[lane]->r[matrix], halves, 4);
      }
    }
  });
}

template <int kBytes>
void cp_async(uint32_t to, const void* from, int bytes) {
  uint8_t* target = shared_pointer(to, kBytes, "cp.async");
  if (bytes != 0 && bytes != kBytes) misused("cp.async", "bytes must be 0 or all");
  if (bytes && reinterpret_cast<uintptr_t>(from) % kBytes) {
    misused("cp.async", "from is not aligned");
  }
  defer(Engine::kCopy, [=] {
    memset(target, 0, kBytes);
    if (bytes) memcpy(target, from, bytes);
  });
}

inline void cp_async_16(uint32_t to, const void* from, int bytes) { cp_async<16>(to, from, bytes); }

// Element `index` of `bits` bits of a register.
inline int element(uint32_t word, int index, int bits, bool is_unsigned) {
  const uint32_t raw = (word >> (index * bits)) & ((1u << bits) - 1);
  return is_unsigned || raw < (1u << (bits - 1)) ? int(raw) : int(raw) - (1 << bits);
}

template <int kBits, bool kUnsignedB>
void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kPer = 32 / kBits, kK = 8 * kPer;
  struct Lane {
    int32_t* d;
    const uint32_t *a, *b;
  } self{d, a, b};
  meet<kLanes>(kBits == 4 ? "mma.m16n8k64.s4" : "mma.m16n8k32.s8", self, [](Lane** lanes) {
    static thread_local int A[16][kK], B[8][kK];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < kPer; ++e) {
        for (int i = 0; i < 4; ++i) {
          const Coordinate at = a_fragment(lane, i, e, kPer);
          A[at.row][at.column] = element(lanes[lane]->a[i], e, kBits, false);
        }
        for (int i = 0; i < 2; ++i) {
          const Coordinate at = b_fragment(lane, i, e, kPer);
          B[at.column][at.row] = element(lanes[lane]->b[i], e, kBits, kUnsignedB);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Coordinate at = d_fragment(lane, i);
        int32_t sum = 0;
        for (int k = 0; k < kK; ++k) sum += A[at.row][k] * B[at.column][k];
        lanes[lane]->d[i] += sum;
      }
    }
  });
}

template <class T>  // __half or __nv_bfloat16
float half_of(uint32_t word, int index) {
  const uint16_t bits = uint16_t(word >> (16 * index));
  return float(reinterpret_cast<const T&>(bits));
}

// Rounded to fp32 on the way; a fused one rounds once, which differs where the sum is not exact.
template <class T>
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const T value = T(fmaf(half_of<T>(a, i), half_of<T>(b, i), half_of<T>(c, i)));
    uint16_t bits;
    memcpy(&bits, &value, 2);
    result |= uint32_t(bits) << (16 * i);
  }
  return result;
}

// Products are exact in fp32; the order in which a tensor core adds them is its own.
template <class T>
void mma_halves(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kPer = 2, kK = 16;
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } self{d, a, b};
  meet<kLanes>(what, self, [](Lane** lanes) {
    static thread_local float A[16][kK], B[8][kK];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < kPer; ++e) {
        for (int i = 0; i < 4; ++i) {
          const Coordinate at = a_fragment(lane, i, e, kPer);
          A[at.row][at.column] = half_of<T>(lanes[lane]->a[i], e);
        }
        for (int i = 0; i < 2; ++i) {
          const Coordinate at = b_fragment(lane, i, e, kPer);
          B[at.column][at.row] = half_of<T>(lanes[lane]->b[i], e);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Coordinate at = d_fragment(lane, i);
        float sum = 0;
        for (int k = 0; k < kK; ++k) sum += A[at.row][k] * B[at.column][k];
        lanes[lane]->d[i] += sum;
      }
    }
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_halves<__nv_bfloat16>("mma.m16n8k16.bf16", d, a, b);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_halves<__half>("mma.m16n8k16.f16", d, a, b);
}

}  // namespace lowbit::emulator
