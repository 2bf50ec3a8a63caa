// SPDX-License-Identifier: Apache-2.0
#include "common/launch.h"

#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace lowbit {

#ifdef LOWBIT_EMULATE

namespace {
int emulated_sm = 90, emulated_num_sms = 4;  // few: persistent kernels loop even on small shapes
}

extern "C" __attribute__((visibility("default"))) void lowbit_emulate(int sm, int num_sms) {
  emulated_sm = sm;
  emulated_num_sms = num_sms;
}

int device_sm(int) { return emulated_sm; }
int device_num_sms(int) { return emulated_num_sms; }

#else

namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more than this is granted on request
std::atomic<bool> overlaps_launches = false;

// Asked once: what a device is does not change, and a launch must cost little.
int attribute(cudaDeviceAttr what, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({what, device});
  if (found != known.end()) return found->second;
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, what, device);
  check(status == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(status));
  return known[{what, device}] = value;
}

void check_launch(const Launch& config, const char* step, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not the next caller's
  throw std::runtime_error(text(
      config.op, " (", config.shape, ", sm_", device_sm(config.device), ", grid ", config.grid.x,
      "x", config.grid.y, "x", config.grid.z, ", ", config.threads, " threads, ", config.smem_bytes,
      " bytes of shared memory): ", step, ": ", cudaGetErrorString(status)));
}

// The kernel may have the launch's shared memory from now on; asked for when it grows, so that a
// launch of the same size again costs a look-up.
void grant_shared_bytes(const Launch& config, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> granted;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most =
      granted.emplace(std::make_pair(kernel, config.device), kDefaultSharedBytes).first->second;
  if (config.smem_bytes <= most) return;
  check_launch(
      config, "shared memory",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.smem_bytes));
  most = config.smem_bytes;
}

}  // namespace

int device_sm(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int device_num_sms(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

void launch_on_device(const Launch& config, const void* kernel, void** arguments) {
  check(aoti_torch_get_current_cuda_stream != nullptr, config.op,
        ": this torch is built without CUDA");
  const torch::stable::accelerator::DeviceGuard guard(config.device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(config.device, &stream) == 0, config.op,
        ": torch has no current CUDA stream");
  grant_shared_bytes(config, kernel);
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (overlaps_launches && device_sm(config.device) >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t launch = {};
  launch.gridDim = config.grid;
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = config.smem_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  launch.numAttrs = count;
  check_launch(config, "launch", cudaLaunchKernelExC(&launch, kernel, arguments));
}

#endif

}  // namespace lowbit

void lowbit_overlap_launches([[maybe_unused]] int enabled) {
#ifndef LOWBIT_EMULATE
  lowbit::overlaps_launches = enabled != 0;
#endif
}
