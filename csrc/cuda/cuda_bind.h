// SPDX-License-Identifier: BSD-3-Clause
// What the parts of the module behind fastops.cuda share; each family adds its functions.
#ifndef FASTOPS_CUDA_CUDA_BIND_H
#define FASTOPS_CUDA_CUDA_BIND_H

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor_exchange.h"
#include "cuda/gpu.h"

namespace fastops::gpu {

constexpr std::int32_t kDlCuda = 2, kDlCudaManaged = 13;

void raise_unless_ok(Status status);
Stream stream_of(std::uintptr_t handle);
// Of the current device: raises where what the stream gets goes into a graph, which cannot have `what`.
void refuse_capture(Stream stream, const char* what);

// Memory of a device, in the order of the stream that it was made on until it is shared.
class Memory {
 public:
  Memory(std::size_t bytes, int device, std::uintptr_t stream);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  int device() const { return device_; }
  Stream stream() const { return stream_; }
  void share() { shared_ = true; }

 private:
  void* data_ = nullptr;
  int device_;
  Stream stream_;
  std::atomic<bool> shared_{false};
};

void bind_attention(pybind11::module_& m);
void bind_mitchell(pybind11::module_& m);
void bind_optim(pybind11::module_& m);

}  // namespace fastops::gpu
#endif
