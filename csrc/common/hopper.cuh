// SPDX-License-Identifier: Apache-2.0
// The PTX of sm_90 and later: mbarriers, the bulk copy engine (TMA), clusters, stmatrix. The
// emulator's twin of each is in csrc/emulator/hopper.h; wgmma is in common/wgmma.cuh.
//
// Addresses are 32-bit shared addresses (smem_address) unless they are pointers.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.h"

#ifdef LOWBIT_EMULATE
#include "emulator/hopper.h"
#endif

namespace lowbit {

// ---- mbarrier: 8 bytes of shared memory -------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
#ifdef LOWBIT_EMULATE
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// After mbarrier_init, before a barrier of the block: the copy engine sees the barriers too.
__device__ __forceinline__ void fence_mbarrier_init() {
#ifndef LOWBIT_EMULATE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
#ifdef LOWBIT_EMULATE
  emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Arrives, and lets the phase last until `bytes` more have been copied.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
#ifdef LOWBIT_EMULATE
  emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity (0: the first) is over; then what the block's threads that arrived
// wrote is seen, and what was copied. What other blocks' threads wrote would need the scope of the
// cluster, which takes all of L1 with it; they have sync_cluster.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
#ifdef LOWBIT_EMULATE
  emulator::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// ---- bulk copies ------------------------------------------------------------------------------

// The map's box at (column, row), in elements, to shared memory; elements outside the tensor are
// zeros and count as copied. 128-byte swizzled boxes start at multiples of 1024 bytes.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, int column, int row,
                                         uint32_t barrier) {
#ifdef LOWBIT_EMULATE
  emulator::tma_load(to, *map, column, row, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// The same box for every block of the cluster whose bit is set in `blocks`: to the same address in
// each of them, and counted by each one's own barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const TensorMap* map, int column,
                                                   int row, uint32_t barrier, int blocks) {
#ifdef LOWBIT_EMULATE
  emulator::tma_load(to, *map, column, row, barrier, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
      : "memory");
#endif
}

// `bytes`, a multiple of 16, from global memory; both sides aligned to 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
#ifdef LOWBIT_EMULATE
  emulator::bulk_load(to, from, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// The box to global memory; elements outside the tensor are dropped. In order: the writers' stores,
// fence_async_proxy() in each of them, a barrier, then one thread's tma_store.
__device__ __forceinline__ void tma_store(const TensorMap* map, int column, int row,
                                          uint32_t from) {
#ifdef LOWBIT_EMULATE
  emulator::tma_store(*map, column, row, from);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
#endif
}

__device__ __forceinline__ void tma_store_commit() {
#ifdef LOWBIT_EMULATE
  emulator::commit(emulator::Engine::kStore);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all of this thread's stores have read their shared memory.
__device__ __forceinline__ void tma_store_wait_read() {
#ifdef LOWBIT_EMULATE
  emulator::wait_group(emulator::Engine::kStore, 0);
#else
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// This thread's ordinary accesses to shared memory, before those of the copy engine and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
#ifndef LOWBIT_EMULATE
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- registers: every warp of a warpgroup executes these, once, where its role begins ----------
// The kernel needs __launch_bounds__(threads, 1). kCount: a multiple of 8, 24 to 256, a thread.

template <int kCount>
__device__ __forceinline__ void give_registers() {
#ifndef LOWBIT_EMULATE
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
#ifndef LOWBIT_EMULATE
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- clusters ---------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
#ifdef LOWBIT_EMULATE
  return emulator::current().cluster_rank;
#else
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// All threads of all blocks of the cluster; what they wrote to shared memory is seen by all.
__device__ __forceinline__ void sync_cluster() {
#ifdef LOWBIT_EMULATE
  emulator::cluster_barrier();
#else
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// Arrives at the barrier of another block (or this one), where `barrier` is in this block's memory.
// Tells that block that this thread is done with something; what it wrote is not made visible
// there, which would wait for all of the thread's accesses, global ones too, at every arrival.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, int rank) {
#ifdef LOWBIT_EMULATE
  emulator::mbarrier_arrive_at(barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 peer;\n"
      "mapa.shared::cluster.u32 peer, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [peer];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}

// 16 bytes of another block's shared memory, where `address` is in this block's.
__device__ __forceinline__ int4 load_peer_16(uint32_t address, int rank) {
#ifdef LOWBIT_EMULATE
  return emulator::load_peer_16(address, rank);
#else
  int4 v;
  asm volatile(
      "{\n"
      ".reg .b32 peer;\n"
      "mapa.shared::cluster.u32 peer, %4, %5;\n"
      "ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [peer];\n"
      "}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
#endif
}

// ---- transposing 8 x 8 matrices of 16-bit elements: ldmatrix_x4_trans the other way ------------
// Lane l gives the address of memory row l % 8 of matrix l / 8. Register i of lane l: elements
// (rows 2 (l % 4) and + 1, column l / 4) of matrix i, rows as they lie in memory.

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
#ifdef LOWBIT_EMULATE
  emulator::stmatrix_trans<4>(address, r);
#else
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#endif
}

}  // namespace lowbit
