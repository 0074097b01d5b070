// SPDX-License-Identifier: BSD-3-Clause
// What the parts of the module behind fastops.cuda share; each family adds its functions.
#ifndef FASTOPS_CUDA_CUDA_BIND_H
#define FASTOPS_CUDA_CUDA_BIND_H

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor_exchange.h"
#include "cuda/gpu.h"

namespace fastops::gpu {

constexpr std::int32_t kDlCuda = 2, kDlCudaManaged = 13;

void raise_unless_ok(Status status);
Stream stream_of(std::uintptr_t handle);
// Of the current device: whether what the stream gets goes into a graph. Raises where it would end another's capture.
bool goes_into_graph(Stream stream);
// Raises where it does, too: the graph cannot have `what`.
void refuse_capture(Stream stream, const char* what);
// Elsewhere a load would end all that the process does on the device. The name becomes a text where it is wanted.
template <class Name> void want_aligned(std::uintptr_t address, std::size_t item, const Name& name) {
  if (address % item != 0) throw pybind11::value_error(std::string(name) + " must be aligned to its elements");
}
template <class Name> void want_aligned(const void* p, std::size_t item, const Name& name) {
  want_aligned(reinterpret_cast<std::uintptr_t>(p), item, name);
}

// A launch has no time for the interpreter: where a queue is full it waits, maybe for what a host function in that
// queue does in Python. No mutex is held when the interpreter is taken again.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
// The device is current meanwhile.
class Launching {
 public:
  explicit Launching(int device);

 private:
  pybind11::gil_scoped_release unlocked_;
  OnDevice on_;
};
// Likewise where memory ends, by whatever thread: consumers of DLPack do that without the interpreter, too.
class OnReleased {
 public:
  explicit OnReleased(int device);

 private:
  std::optional<pybind11::gil_scoped_release> unlocked_;
  std::optional<OnDevice> on_;
};

// Frees memory of the current device when that is idle. What cannot be waited for stays until a later release can.
void release_when_idle(void* p, int device);

// Memory of a device for the time of a call, whose stream lives as long.
class Memory {
 public:
  Memory(std::size_t bytes, int device, std::uintptr_t stream);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  int device_;
  Stream stream_;
};

// The same, where a call needs any.
class Workspace {
 public:
  Workspace(std::size_t bytes, int device, std::uintptr_t stream) {
    if (bytes != 0) memory_.emplace(bytes, device, stream);
  }
  void* data() const { return memory_ ? memory_->data() : nullptr; }

 private:
  std::optional<Memory> memory_;
};

// The latest use of something on each stream. It outlives streams, so it names none but that of a call under way.
class Uses {
 public:
  // All that the stream has got so far.
  Status record(std::uintptr_t handle);
  // What the stream gets from here on runs after all uses.
  Status precede(std::uintptr_t handle);
  // Frees memory of the current device after all uses, and after `first`; the host does not wait where that can be
  // avoided.
  void release(void* p, int device, Event* first = nullptr);
  void clear() { uses_.clear(); }  // on the device, without the interpreter

 private:
  struct Use {
    const void* stream;
    Event event;
  };
  std::list<Use> uses_;
};

// Memory of a device that stays after the call in which it is made.
class ArrayMemory {
 public:
  ArrayMemory(std::size_t bytes, int device, std::uintptr_t stream);
  ~ArrayMemory();
  ArrayMemory(const ArrayMemory&) = delete;
  ArrayMemory& operator=(const ArrayMemory&) = delete;
  void* data() const { return data_; }
  int device() const { return device_; }
  // From here to `end` a call uses it, on a stream (if given) that waits for those before. Who never says `end`, such
  // as other libraries, may use it on any stream at any time: its release waits for the device then.
  void begin(std::optional<std::uintptr_t> stream);
  void end(std::uintptr_t stream);
  // Made in the capture of a graph, whose memory it is.
  bool is_captured() const { return captured_; }

 private:
  void* data_ = nullptr;
  int device_;
  bool captured_;
  std::size_t calls_ = 1;  // without an end: that in which it is made is the first
  Uses uses_;
  std::mutex mutex_;
};

// All that a stream of a device had got at some moment, for Python.
class Mark {
 public:
  Mark(int device, std::uintptr_t stream);
  ~Mark();
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  bool is_done();

 private:
  int device_;
  Event event_;
};

void bind_attention(pybind11::module_& m);
void bind_mitchell(pybind11::module_& m);
void bind_optim(pybind11::module_& m);

}  // namespace fastops::gpu
#endif
