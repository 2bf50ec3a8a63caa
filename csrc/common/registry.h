// SPDX-License-Identifier: Apache-2.0
// Every kernel that a launcher can choose, as data: for `lowbit doctor`, benchmarks and tests.
//
// A .cu file registers its instantiations and, where there is a choice, its planner:
//
//   static const bool kRegistered = [] {
//     lowbit::register_kernel({"op", "64x128", (const void*)&kernel<64, 128>, 128, 49152, 80, 89});
//     lowbit::register_planner("op", &plan);
//     return true;
//   }();
//
// It is plain C++17: nvcc compiles it into the library, g++ into the emulator.
#pragma once

#include <cstdint>
#include <string>

namespace lowbit {

struct KernelInfo {
  const char* op;
  const char* name;      // of the instantiation, unique within the op
  const void* function;  // __global__
  int threads;           // a block
  int smem_bytes;        // dynamic shared memory of the largest launch
  int min_sm, max_sm;    // the architectures it is chosen on, e.g. 80 and 89
};

// Says what would be launched for a shape: instantiation, grid, shared memory, split. What the
// numbers mean is the op's own convention.
using Planner = std::string (*)(const int64_t* numbers, int n, int sm, int num_sms);

// What the compiler and a device make of a kernel.
struct KernelAttributes {
  int registers;               // a thread
  int local_bytes;             // a thread: spilled registers, and arrays that have an address
  int static_smem_bytes;       // a block
  int max_dynamic_smem_bytes;  // a block, on this device
  int blocks_per_sm;           // resident at once, with smem_bytes each
};

// Both keep the pointers that they are given.
void register_kernel(const KernelInfo& info);
void register_planner(const char* op, Planner planner);

}  // namespace lowbit

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

// In the order of registration; nullptr where there is no kernel i.
LOWBIT_EXPORT int lowbit_kernel_count();
LOWBIT_EXPORT const lowbit::KernelInfo* lowbit_kernel(int i);

// nullptr where the op has no planner. The text lives until the thread's next call.
LOWBIT_EXPORT const char* lowbit_plan(const char* op, const int64_t* numbers, int n, int sm,
                                      int num_sms);

// The architectures that the library holds code for, such as "80,90a"; "" in the emulator.
LOWBIT_EXPORT const char* lowbit_archs();

// Programmatic dependent launch, from now on and in every thread: a kernel's blocks are scheduled
// while the kernel before it ends. Off at first. Only on sm_90 and later does it change a launch.
LOWBIT_EXPORT void lowbit_overlap_launches(int enabled);

// nullptr, or why there are none: `attributes` is then as it was.
LOWBIT_EXPORT const char* lowbit_kernel_attributes(int i, int device,
                                                   lowbit::KernelAttributes* attributes);
