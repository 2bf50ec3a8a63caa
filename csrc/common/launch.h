// SPDX-License-Identifier: Apache-2.0
// Host side of every op: library macros, memory-safety checks, and the launch of a kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/device.cuh"
#include "common/registry.h"

// Each .cu defines its schema in a fragment and registers its function for the device's key.
#ifdef LOWBIT_EMULATE
#define LOWBIT_LIBRARY_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_emulated, m)
#define LOWBIT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(lowbit_emulated, CPU, m)
#else
#define LOWBIT_LIBRARY_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cuda, m)
#define LOWBIT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CUDA, m)

// Weak: a CPU build of torch has no such function, and must be able to load the library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Part>
void append(std::string& out, const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    out += std::to_string(part);
  } else {
    out += part;
  }
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

// What would otherwise read or write where it must not; the contract is checked in Python. The
// parts of the message are put together where it does not hold alone: a call checks dozens.
template <class... Parts>
void check(bool holds, const Parts&... message) {
  if (!holds) throw std::runtime_error(text(message...));
}

// `t` lies on `device` and is of this dtype.
inline void check_place(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                        int device) {
#ifdef LOWBIT_EMULATE
  (void)device;
#else
  check(t.is_cuda() && t.get_device_index() == device, op, ": ", name, " must be on CUDA device ",
        device);
#endif
  check(t.scalar_type() == dtype, op, ": ", name, " has another dtype than its kernel reads");
}

// `t` lies on `device`, is contiguous, of this dtype, has `numel` elements and starts at a multiple
// of `alignment` bytes.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         int64_t numel, int device, int alignment = 16) {
  check_place(op, name, t, dtype, device);
  check(t.is_contiguous(), op, ": ", name, " must be contiguous");
  check(t.numel() == numel, op, ": ", name, " must have ", numel, " elements, got ", t.numel());
  check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0, op, ": ", name,
        " must start at a multiple of ", alignment, " bytes");
}

// `t` [..., K] lies on `device`, is of this dtype, and its rows are whole, start at multiples of 16
// bytes and are equally far apart; how far, in elements.
inline int64_t check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                          int device) {
  check_place(op, name, t, dtype, device);
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const size_t last = sizes.size() - 1;
  int64_t stride = 0, next = 0;  // 0: one row at most
  for (size_t i = last; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (stride == 0) stride = next = strides[i];
    check(strides[i] == next, op, ": rows of ", name, " must be equally far apart");
    next *= sizes[i];
  }
  const int64_t element_bytes = dtype == ScalarType::Float ? 4 : 2;
  check(strides[last] == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
            stride * element_bytes % 16 == 0,
        op, ": rows of ", name, " must be whole and start at multiples of 16 bytes");
  return stride == 0 ? sizes[last] : stride;
}

inline int device_of(const Tensor& t) {
#ifdef LOWBIT_EMULATE
  (void)t;
  return 0;
#else
  return t.get_device_index();
#endif
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class T>
T* pointer(const Tensor& t) {
  return reinterpret_cast<T*>(t.data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? reinterpret_cast<const T*>(t->data_ptr()) : nullptr;
}

// visit(zero), a zero of the type that t has: float, __half or __nv_bfloat16.
template <class Visit>
void visit_float_type(const char* op, const char* name, const Tensor& t, const Visit& visit) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return visit(float());
    case ScalarType::Half:
      return visit(__half());
    case ScalarType::BFloat16:
      return visit(__nv_bfloat16());
    default:
      check(false, op, ": ", name, " must be fp32, fp16 or bf16");
  }
}

inline FloatType float_type(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::Float) return FloatType::kFloat;
  if (type == ScalarType::Half) return FloatType::kHalf;
  check(type == ScalarType::BFloat16, op, ": ", name, " must be fp32, fp16 or bf16");
  return FloatType::kBFloat16;
}

// 80, 89, 90, ...: of the device, or what the emulator was told to be.
int device_sm(int device);
int device_num_sms(int device);

struct Launch {
  const char* op;
  std::string shape;  // shown in errors: "M=16 N=4096 K=4096"
  int device;
  dim3 grid;  // a multiple of `cluster` in x
  int threads;
  int smem_bytes = 0;
  int cluster = 1;
};

// What launch() hands on: `arguments` are pointers to the kernel's parameters.
void launch_on_device(const Launch& config, const void* kernel, void** arguments);

template <class T>
struct Same {  // keeps the arguments out of template deduction: the kernel decides the types
  using type = T;
};

// On the device's current stream. Does not wait; throws what the runtime says of the launch, with
// the op, the shape and the architecture.
template <class... Parameters>
void launch(const Launch& config, void (*kernel)(Parameters...),
            typename Same<Parameters>::type... arguments) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;  // nothing to do
#ifdef LOWBIT_EMULATE
  try {
    emulator::run({config.grid, dim3(config.threads), config.cluster, config.smem_bytes},
                  [&] { kernel(arguments...); });
  } catch (const std::exception& error) {
    throw std::runtime_error(text(config.op, " (", config.shape, ", emulated): ", error.what()));
  }
#else
  void* pointers[] = {static_cast<void*>(&arguments)...};
  launch_on_device(config, reinterpret_cast<const void*>(kernel), pointers);
#endif
}

}  // namespace lowbit
