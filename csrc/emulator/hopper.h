// SPDX-License-Identifier: Apache-2.0
// What the instructions of common/hopper.cuh and common/wgmma.cuh do.
#pragma once

#include <memory>

#include "common/swizzle.cuh"
#include "common/tensor_map.h"
#include "emulator/instructions.h"

namespace lowbit::emulator {

// ---- mbarrier ---------------------------------------------------------------------------------

struct Mbarrier {
  uint64_t phase : 1, pending : 12, expected : 12;
  int64_t bytes : 36;  // still to be copied
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is 8 bytes");

inline Mbarrier* mbarrier_at(uint32_t address) {
  return reinterpret_cast<Mbarrier*>(shared_pointer(address, 8, "mbarrier"));
}

inline void mbarrier_init(uint32_t address, int arrivals) {
  *mbarrier_at(address) = Mbarrier{0, uint64_t(arrivals), uint64_t(arrivals), 0};
}

inline void end_phase_if_due(Mbarrier* barrier) {
  if (barrier->pending || barrier->bytes) return;
  barrier->phase ^= 1;
  barrier->pending = barrier->expected;
}

inline void arrive(Mbarrier* barrier, int bytes) {
  if (barrier->pending == 0) misused("mbarrier.arrive", "more arrivals than it was made for");
  barrier->bytes += bytes;
  --barrier->pending;
  end_phase_if_due(barrier);
}

inline void mbarrier_arrive(uint32_t address, int bytes) { arrive(mbarrier_at(address), bytes); }

inline void mbarrier_arrive_at(uint32_t address, int rank) {
  arrive(reinterpret_cast<Mbarrier*>(shared_memory(rank) + address), 0);
}

inline void mbarrier_complete(Mbarrier* barrier, int bytes) {
  barrier->bytes -= bytes;
  end_phase_if_due(barrier);
}

inline void mbarrier_wait(uint32_t address, int parity) {
  Mbarrier* barrier = mbarrier_at(address);
  wait("mbarrier.try_wait", [=] { return int(barrier->phase) != parity; });
}

// ---- bulk copies ------------------------------------------------------------------------------

// Visits the box's rows of 16-byte pieces: piece(shared offset, global pointer or null outside).
template <class Piece>
void visit_box(const TensorMap& map, int column, int row, Piece piece) {
  const int row_bytes = map.box_columns * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int b = 0; b < row_bytes; b += map.element_bytes) {
      const int64_t x = column + b / map.element_bytes, y = row + r;
      const bool inside = x >= 0 && x < map.columns && y >= 0 && y < map.rows;
      uint32_t offset = r * row_bytes + b;
      if (map.swizzled) offset = swizzle_128(offset);
      uint8_t* at = static_cast<uint8_t*>(map.base) + y * map.stride_bytes + x * map.element_bytes;
      piece(offset, inside ? at : nullptr);
    }
  }
}

inline uint8_t* box_at(uint32_t address, const TensorMap& map, const char* what) {
  if (address % (map.swizzled ? 1024 : 128)) misused(what, "the box is not aligned");
  return shared_pointer(address, map.box_rows * map.box_columns * map.element_bytes, what);
}

// `blocks`: a bit for each block of the cluster that gets the box, at the same address; 0: this
// one.
inline void tma_load(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier,
                     int blocks = 0) {
  box_at(to, map, "cp.async.bulk.tensor");
  if (blocks == 0) blocks = 1 << current().cluster_rank;
  for (int rank = 0; rank < launched().cluster; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    uint8_t* box = shared_memory(rank) + to;
    auto* done = reinterpret_cast<Mbarrier*>(shared_memory(rank) + barrier);
    queue_async(0, [=] {
      visit_box(map, column, row, [&](uint32_t offset, const uint8_t* from) {
        if (from) {
          memcpy(box + offset, from, map.element_bytes);
        } else {
          memset(box + offset, 0, map.element_bytes);
        }
      });
      mbarrier_complete(done, map.box_rows * map.box_columns * map.element_bytes);
    });
  }
}

inline void tma_store(const TensorMap& map, int column, int row, uint32_t from) {
  const uint8_t* box = box_at(from, map, "cp.async.bulk.tensor");
  defer(Engine::kStore, [=] {
    visit_box(map, column, row, [&](uint32_t offset, uint8_t* to) {
      if (to) memcpy(to, box + offset, map.element_bytes);
    });
  });
}

inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (bytes % 16 || bytes <= 0 || reinterpret_cast<uintptr_t>(from) % 16) {
    misused("cp.async.bulk", "bytes or source are no multiple of 16");
  }
  uint8_t* target = shared_pointer(to, bytes, "cp.async.bulk");
  Mbarrier* done = mbarrier_at(barrier);
  queue_async(0, [=] {
    memcpy(target, from, bytes);
    mbarrier_complete(done, bytes);
  });
}

inline int4 load_peer_16(uint32_t address, int rank) {
  shared_pointer(address, 16, "ld.shared::cluster");
  return *reinterpret_cast<const int4*>(shared_memory(rank) + address);
}

// ---- transposed matrices ----------------------------------------------------------------------

template <int kMatrices>
void stmatrix_trans(uint32_t address, const uint32_t (&r)[kMatrices]) {
  struct Lane {
    uint32_t address;
    const uint32_t* r;
  } self{address, r};
  meet<kLanes>("stmatrix.trans", self, [](Lane** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int half = 0; half < 2; ++half) {
          const uint16_t element = lanes[lane]->r[matrix] >> (16 * half);
          const uint32_t row = lanes[8 * matrix + 2 * (lane % 4) + half]->address;
          memcpy(shared_pointer(row, 16, "stmatrix.trans") + 2 * (lane / 4), &element, 2);
        }
      }
    }
  });
}

// ---- wgmma ------------------------------------------------------------------------------------

// D[64, kN] (+)= A[64, 32] B[32, kN], signed bytes in registers times bytes in shared memory, whose
// descriptor must say: K-major, 128-byte swizzle. It happens when a lane waits for its group.
template <int kN, bool kUnsignedB>
void wgmma_s8(int32_t* d, const uint32_t* a, uint64_t descriptor, bool accumulate) {
  struct Lane {
    int32_t* d;
    const uint32_t* a;
    uint64_t descriptor;
    bool accumulate;
    std::shared_ptr<std::function<void()>> work;
  } self{d, a, descriptor, accumulate, nullptr};
  meet<128>("wgmma", self, [](Lane** lanes) {
    const uint64_t bits = lanes[0]->descriptor;
    if (bits >> 62 != 1) misused("wgmma", "the descriptor has no 128-byte swizzle");
    const uint32_t start = (bits & 0x3FFF) << 4, group_bytes = (bits >> 32 & 0x3FFF) << 4;
    for (int i = 0; i < 128; ++i) {
      if (lanes[i]->descriptor != bits || lanes[i]->accumulate != lanes[0]->accumulate) {
        misused("wgmma", "lanes differ in what must be uniform");
      }
    }
    const uint8_t* smem = shared_memory();
    shared_pointer(start & ~1023u, kN / 8 * group_bytes, "wgmma");
    int32_t* d[128];
    const uint32_t* a[128];
    for (int i = 0; i < 128; ++i) d[i] = lanes[i]->d, a[i] = lanes[i]->a;
    const bool accumulate = lanes[0]->accumulate;
    auto work = std::make_shared<std::function<void()>>([=] {
      static thread_local int8_t A[64][32];
      static thread_local int16_t B[kN][32];
      for (int lane = 0; lane < 128; ++lane) {
        for (int i = 0; i < 4; ++i) {
          for (int b = 0; b < 4; ++b) {
            const Coordinate at = a_fragment(lane % 32, i, b, 4);
            A[16 * (lane / 32) + at.row][at.column] = int8_t(a[lane][i] >> (8 * b));
          }
        }
      }
      for (int n = 0; n < kN; ++n) {
        for (int k = 0; k < 32; ++k) {
          const uint8_t byte = smem[swizzle_128(start + n / 8 * group_bytes + n % 8 * 128 + k)];
          B[n][k] = kUnsignedB ? int16_t(byte) : int16_t(int8_t(byte));
        }
      }
      for (int lane = 0; lane < 128; ++lane) {
        for (int i = 0; i < kN / 2; ++i) {
          const Coordinate at = d_fragment(lane % 32, i);
          const int8_t* row = A[16 * (lane / 32) + at.row];
          const int16_t* column = B[at.column];
          int32_t sum = 0;
          for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
          d[lane][i] = accumulate ? d[lane][i] + sum : sum;
        }
      }
    });
    for (int i = 0; i < 128; ++i) lanes[i]->work = work;
  });
  const auto work = self.work;
  defer(Engine::kMatrix, [work] {  // the first of the lanes does it for all
    if (*work) {
      std::function<void()> once = std::move(*work);
      *work = nullptr;
      once();
    }
  });
}

}  // namespace lowbit::emulator
