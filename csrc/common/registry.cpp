// SPDX-License-Identifier: Apache-2.0
#include "common/registry.h"

#include <map>
#include <vector>

#ifndef LOWBIT_EMULATE
#include <cuda_runtime_api.h>
#endif

#ifndef LOWBIT_ARCHS  // what the build compiles for
#define LOWBIT_ARCHS ""
#endif

namespace lowbit {
namespace {

// Inside functions: other files register before this file's own statics would be constructed.
std::vector<KernelInfo>& kernels() {
  static std::vector<KernelInfo> all;
  return all;
}

std::map<std::string, Planner>& planners() {
  static std::map<std::string, Planner> all;
  return all;
}

}  // namespace

void register_kernel(const KernelInfo& info) { kernels().push_back(info); }

void register_planner(const char* op, Planner planner) { planners()[op] = planner; }

}  // namespace lowbit

int lowbit_kernel_count() { return static_cast<int>(lowbit::kernels().size()); }

const lowbit::KernelInfo* lowbit_kernel(int i) {
  return 0 <= i && i < lowbit_kernel_count() ? &lowbit::kernels()[i] : nullptr;
}

const char* lowbit_plan(const char* op, const int64_t* numbers, int n, int sm, int num_sms) {
  static thread_local std::string text;
  const auto found = lowbit::planners().find(op);
  if (found == lowbit::planners().end()) return nullptr;
  text = found->second(numbers, n, sm, num_sms);
  return text.c_str();
}

const char* lowbit_archs() { return LOWBIT_ARCHS; }

#ifdef LOWBIT_EMULATE

const char* lowbit_kernel_attributes(int, int, lowbit::KernelAttributes*) {
  return "the emulator has no registers";
}

#else

namespace {

// The attributes of the kernel on the current device.
cudaError_t query(const lowbit::KernelInfo& kernel, int device, lowbit::KernelAttributes* out) {
  cudaFuncAttributes found;
  cudaError_t error = cudaFuncGetAttributes(&found, kernel.function);
  if (error != cudaSuccess) return error;
  int most_smem = 0, blocks = 0;
  error = cudaDeviceGetAttribute(&most_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // As its launcher does: a kernel may have 48 KiB unless it asks for more.
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kernel.smem_bytes);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                        kernel.smem_bytes);
  if (error != cudaSuccess) return error;
  *out = {found.numRegs, static_cast<int>(found.localSizeBytes),
          static_cast<int>(found.sharedSizeBytes),
          most_smem - static_cast<int>(found.sharedSizeBytes), blocks};
  return cudaSuccess;
}

}  // namespace

const char* lowbit_kernel_attributes(int i, int device, lowbit::KernelAttributes* attributes) {
  const lowbit::KernelInfo* kernel = lowbit_kernel(i);
  if (kernel == nullptr) return "there is no such kernel";
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = query(*kernel, device, attributes);
    cudaSetDevice(before);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch would report it
  return cudaGetErrorString(error);
}

#endif  // LOWBIT_EMULATE
