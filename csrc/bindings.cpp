// SPDX-License-Identifier: Apache-2.0
// lowbit._launch: what is in the library beside it, for `lowbit doctor`, benchmarks and tests.
//
// It needs Python and is built for one; _cuda.so, which it is linked to, does not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/registry.h"

namespace py = pybind11;

namespace {

py::list kernels() {
  py::list all;
  for (int i = 0; i < lowbit_kernel_count(); ++i) {
    const lowbit::KernelInfo& kernel = *lowbit_kernel(i);
    py::dict entry;
    entry["op"] = kernel.op;
    entry["name"] = kernel.name;
    entry["threads"] = kernel.threads;
    entry["smem_bytes"] = kernel.smem_bytes;
    entry["min_sm"] = kernel.min_sm;
    entry["max_sm"] = kernel.max_sm;
    all.append(entry);
  }
  return all;
}

py::dict attributes(int i, int device) {
  lowbit::KernelAttributes found;
  if (const char* error = lowbit_kernel_attributes(i, device, &found)) {
    throw std::runtime_error(error);
  }
  py::dict entry;
  entry["registers"] = found.registers;
  entry["local_bytes"] = found.local_bytes;
  entry["static_smem_bytes"] = found.static_smem_bytes;
  entry["max_dynamic_smem_bytes"] = found.max_dynamic_smem_bytes;
  entry["blocks_per_sm"] = found.blocks_per_sm;
  return entry;
}

std::string plan(const std::string& op, const std::vector<int64_t>& numbers, int sm, int num_sms) {
  const int n = static_cast<int>(numbers.size());
  const char* text = lowbit_plan(op.c_str(), numbers.data(), n, sm, num_sms);
  if (text == nullptr) throw std::invalid_argument("no planner for " + op);
  return text;
}

}  // namespace

PYBIND11_MODULE(_launch, m) {
  m.def("kernels", &kernels, "Every kernel: op, name, threads, smem_bytes, min_sm, max_sm.");
  m.def("attributes", &attributes, py::arg("i"), py::arg("device") = 0,
        "Of kernel i on a GPU: registers, local and shared memory, resident blocks per SM.");
  m.def("plan", &plan, py::arg("op"), py::arg("numbers"), py::arg("sm"), py::arg("num_sms"),
        "What an op would launch for a shape, on an architecture with num_sms multiprocessors.");
}
