// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels on a CPU, for tests: every thread of a block is a fiber of one host thread.
//
// Compiled with LOWBIT_EMULATE the kernels' own source runs here, so an index, a fragment layout, a
// swizzle or a barrier that is wrong on a GPU is wrong here too. What makes it more than a loop:
//   * shared memory is poisoned before each block, and fibers take turns in a shuffled order;
//   * asynchronous copies and wgmma are queued and happen late, in an order that only the waits of
//     the kernel constrain: a wait that is missing reads poison, a buffer reused early is found;
//   * collective instructions check that all their lanes execute the same one;
//   * when nothing can go on, the launch ends with what every fiber waits for.
// What it does not model: memory ordering between ordinary accesses, bank conflicts, time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (::lowbit::emulator::current().thread_idx)
#define blockIdx (::lowbit::emulator::current().block_idx)
#define blockDim (::lowbit::emulator::launched().block)
#define gridDim (::lowbit::emulator::launched().grid)

namespace lowbit::emulator {

struct Launched {
  dim3 grid, block;
  int cluster, smem_bytes;
};

struct Thread {
  uint3 thread_idx, block_idx;
  int linear;        // within the block
  int cluster_rank;  // of the block
};

const Thread& current();
const Launched& launched();

// One launch, block after block, a cluster's blocks together. Throws what a thread threw, and
// std::runtime_error for a deadlock or a misused instruction, with the instruction's name.
void run(const Launched& launch, const std::function<void()>& thread_body);

// Dynamic shared memory of the current block, and of another block of its cluster.
uint8_t* shared_memory(int cluster_rank = -1);
uint32_t shared_address(const void* pointer);  // offset in the current block's shared memory
uint8_t* shared_pointer(uint32_t address, int bytes, const char* what);  // checked, and aligned

// Blocks the current thread until `ready()`. `what` is shown when it never happens.
void wait(const char* what, const std::function<bool()>& ready);

// All `lanes` threads around the current one (warp: 32, warpgroup: 128) meet; the last to come
// runs `body` with the lanes' arguments in order, and all go on.
void collective(const char* what, int lanes, void* argument,
                const std::function<void(void* const*)>& body);
void block_barrier(int id, int threads);
void cluster_barrier();

// `copy` happens some time later, after those queued before it in the same `order` (0: no order).
void queue_async(uint64_t order, std::function<void()> copy);

// Per-thread groups of deferred work: cp.async, wgmma, bulk stores.
enum class Engine { kCopy, kMatrix, kStore };
void defer(Engine engine, std::function<void()> work);
void commit(Engine engine);
void wait_group(Engine engine, int pending);  // until at most `pending` groups are left

[[noreturn]] void misused(const char* what, const std::string& why);

}  // namespace lowbit::emulator
