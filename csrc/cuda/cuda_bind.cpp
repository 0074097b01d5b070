// SPDX-License-Identifier: BSD-3-Clause
// The module behind fastops.cuda: addresses, shapes and strides to calls of the kernels, and what protects memory.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/cuda_bind.h"

#ifndef FASTOPS_CUDA_MODULE
#define FASTOPS_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace fastops::gpu {

void raise_unless_ok(Status status) {
  if (status == 0) return;
  throw std::runtime_error(std::string("CUDA: ") + error_text(status));
}

Stream stream_of(std::uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

bool goes_into_graph(Stream stream) {
  const Capture capture = capture_of(stream);
  if (capture == Capture::kBroken)
    throw std::runtime_error("CUDA: the default stream cannot be used while a blocking stream is captured");
  return capture == Capture::kGraph;
}
void refuse_capture(Stream stream, const char* what) {
  if (goes_into_graph(stream)) throw std::runtime_error(std::string("CUDA graphs cannot capture ") + what);
}

Launching::Launching(int device) : on_(device) { raise_unless_ok(on_.status); }

OnReleased::OnReleased(int device) {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) unlocked_.emplace();
  on_.emplace(device);
}

Memory::Memory(std::size_t bytes, int device, std::uintptr_t stream) : device_(device), stream_(stream_of(stream)) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  raise_unless_ok(allocate(&data_, bytes, stream_));
}
Memory::~Memory() {
  const OnDevice on(device_);
  (void)release(data_, stream_);
}

namespace {

// By device: memory for which its device could not be waited for, as while a stream of it is captured.
struct Waiting {
  std::mutex mutex;
  std::vector<std::pair<int, void*>> memory;
};
Waiting& waiting() {
  static auto* const kept = new Waiting;  // outlives the driver's shutdown
  return *kept;
}

}  // namespace

void release_when_idle(void* p, int device) {
  std::vector<void*> all{p};
  {
    const std::lock_guard<std::mutex> lock(waiting().mutex);
    auto& memory = waiting().memory;
    const auto others = std::stable_partition(memory.begin(), memory.end(), [&](auto& x) { return x.first != device; });
    for (auto it = others; it != memory.end(); ++it) all.push_back(it->second);
    memory.erase(others, memory.end());
  }
  if (synchronize() == 0) {
    for (void* const each : all) release_unused(each);
    return;
  }
  const std::lock_guard<std::mutex> lock(waiting().mutex);
  for (void* const each : all) waiting().memory.emplace_back(device, each);
}

Status Uses::record(std::uintptr_t handle) {
  // The per-thread default stream is another one in each thread.
  static thread_local const char thread = 0;
  constexpr std::uintptr_t kPerThread = 2;
  const void* const stream = handle == kPerThread ? &thread : stream_of(handle);
  for (Use& use : uses_)
    if (use.stream == stream) {
      // The handle may have been that of another stream before.
      const Status status = use.event.precede(stream_of(handle));
      return status != 0 ? status : use.event.record(stream_of(handle));
    }
  uses_.remove_if([](Use& use) { return use.event.is_done(); });
  uses_.emplace_back();
  uses_.back().stream = stream;
  return uses_.back().event.record(stream_of(handle));
}
Status Uses::precede(std::uintptr_t handle) {
  for (Use& use : uses_)
    if (const Status status = use.event.precede(stream_of(handle))) return status;
  return 0;
}
void Uses::release(void* p, int device, Event* first) {
  const Stream stream = release_stream();
  const auto after = [&](Event& event) { return event.is_done() || event.precede(stream) == 0; };
  bool ordered = stream != nullptr && (first == nullptr || after(*first));
  for (Use& use : uses_) ordered = ordered && after(use.event);
  if (!ordered || gpu::release(p, stream) != 0) release_when_idle(p, device);
}

ArrayMemory::ArrayMemory(std::size_t bytes, int device, std::uintptr_t stream) : device_(device) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  captured_ = goes_into_graph(stream_of(stream));
  raise_unless_ok(allocate(&data_, bytes, stream_of(stream)));
}
ArrayMemory::~ArrayMemory() {
  if (captured_) return;
  const OnReleased on(device_);
  if (calls_ == 0) {
    uses_.release(data_, device_);
  } else {
    release_when_idle(data_, device_);
  }
  uses_.clear();
}
void ArrayMemory::begin(std::optional<std::uintptr_t> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stream && !captured_) {
    const OnDevice on(device_);
    raise_unless_ok(on.status);
    if (!goes_into_graph(stream_of(*stream))) raise_unless_ok(uses_.precede(*stream));
  }
  ++calls_;
}
void ArrayMemory::end(std::uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (captured_) return;
  const OnDevice on(device_);
  raise_unless_ok(on.status);
  // A graph may be launched at any time.
  if (goes_into_graph(stream_of(stream))) return;
  raise_unless_ok(uses_.record(stream));
  --calls_;
}

Mark::Mark(int device, std::uintptr_t stream) : device_(device) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  refuse_capture(stream_of(stream), "the question when it is done");
  if (const Status status = event_.record(stream_of(stream))) {
    event_.reset();  // on its device
    raise_unless_ok(status);
  }
}
Mark::~Mark() {
  const OnReleased on(device_);
  event_.reset();
}
bool Mark::is_done() {
  const OnDevice on(device_);
  return on.status == 0 && event_.is_done();
}

namespace {

void refuse_capture_on(int device, std::uintptr_t stream, const char* what) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  refuse_capture(stream_of(stream), what);
}
bool is_captured_on(int device, std::uintptr_t stream) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  return is_captured(stream_of(stream));
}
void want_usable_on(int device, std::uintptr_t stream) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  (void)goes_into_graph(stream_of(stream));
}
void wait_on(std::uintptr_t later, std::uintptr_t earlier, int device) {
  const OnDevice on(device);
  raise_unless_ok(on.status);
  if (!is_captured(stream_of(later))) {
    // It would take `later` in until the capture ends, and with it what others launch there, which nobody joins.
    refuse_capture(
        stream_of(earlier),
        "a call on a stream outside of them: give stream= one that is captured, or let this one wait for it");
  } else if (!is_captured(stream_of(earlier))) {
    return;  // what a graph reads is there when it is launched
  }
  raise_unless_ok(wait(stream_of(later), stream_of(earlier)));
}

// DLPack, in and out.

// DLManagedTensor, for consumers that do not name a version.
struct DlUnversioned {
  DlTensor tensor;
  void* context;
  void (*destroy)(DlUnversioned* self);
};
template <class Managed> struct Export {
  Managed managed;
  std::shared_ptr<ArrayMemory> memory;
  std::vector<std::int64_t> shape;
};
template <class Managed> void destroy(Managed* managed) {
  if (managed != nullptr) delete static_cast<Export<Managed>*>(managed->context);
}
template <class Managed>
constexpr const char* kCapsuleName = std::is_same_v<Managed, DlManaged> ? "dltensor_versioned" : "dltensor";

template <class Managed>
py::object capsule_of(const std::shared_ptr<ArrayMemory>& memory, const std::vector<std::int64_t>& shape, int code,
                      int bits) {
  auto made = std::make_unique<Export<Managed>>();
  made->memory = memory;
  made->shape = shape;
  Managed& managed = made->managed;
  if constexpr (std::is_same_v<Managed, DlManaged>) managed.major = kDlMajor;
  managed.context = made.get();
  managed.destroy = &destroy<Managed>;
  managed.tensor = {memory->data(),
                    kDlCuda,
                    memory->device(),
                    static_cast<std::int32_t>(shape.size()),
                    static_cast<std::uint8_t>(code),
                    static_cast<std::uint8_t>(bits),
                    1,
                    made->shape.data(),
                    nullptr,
                    0};
  constexpr const char* name = kCapsuleName<Managed>;
  PyObject* capsule = PyCapsule_New(&managed, name, [](PyObject* self) {
    // Taken over by a consumer under another name.
    if (PyCapsule_IsValid(self, name)) destroy(static_cast<Managed*>(PyCapsule_GetPointer(self, name)));
  });
  if (capsule == nullptr) throw py::error_already_set();
  made.release();
  return py::reinterpret_steal<py::object>(capsule);
}
py::object to_dlpack(const std::shared_ptr<ArrayMemory>& memory, const std::vector<std::int64_t>& shape, int code,
                     int bits, bool versioned) {
  return (versioned ? capsule_of<DlManaged> : capsule_of<DlUnversioned>)(memory, shape, code, bits);
}

// (address, shape, strides or None, (code, bits, lanes), read only); the capsule stays the caller's and keeps the
// memory.
py::tuple from_dlpack(const py::object& capsule) {
  const DlTensor* tensor = nullptr;
  bool read_only = false;
  if (const char* name = kCapsuleName<DlManaged>; PyCapsule_IsValid(capsule.ptr(), name)) {
    const auto* managed = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule.ptr(), name));
    if (managed->major != kDlMajor) throw py::type_error("the DLPack version must be 1");
    tensor = &managed->tensor;
    read_only = (managed->flags & 1) != 0;
  } else if (const char* old = kCapsuleName<DlUnversioned>; PyCapsule_IsValid(capsule.ptr(), old)) {
    // It cannot say that it is read-only.
    tensor = &static_cast<DlUnversioned*>(PyCapsule_GetPointer(capsule.ptr(), old))->tensor;
  } else {
    throw py::type_error("__dlpack__ must return a capsule that nobody has taken yet");
  }
  py::tuple shape(static_cast<std::size_t>(tensor->ndim));
  py::object strides = py::none();
  for (std::int32_t d = 0; d < tensor->ndim; ++d) shape[static_cast<std::size_t>(d)] = py::int_(tensor->shape[d]);
  if (tensor->strides != nullptr) {
    py::tuple given(static_cast<std::size_t>(tensor->ndim));
    for (std::int32_t d = 0; d < tensor->ndim; ++d) given[static_cast<std::size_t>(d)] = py::int_(tensor->strides[d]);
    strides = given;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(tensor->data) + tensor->byte_offset;
  return py::make_tuple(address, shape, strides, py::make_tuple(tensor->code, tensor->bits, tensor->lanes), read_only);
}

}  // namespace
}  // namespace fastops::gpu

using namespace fastops::gpu;

PYBIND11_MODULE(FASTOPS_CUDA_MODULE, m) {
  m.def("device_count", &device_count, Unlocked());
  m.def("problem", &problem, Unlocked(), "Why there is no device, or None.");
  m.def(
      "device_of", [](std::uintptr_t p) { return device_of(reinterpret_cast<const void*>(p)); }, py::arg("address"),
      Unlocked(), "The device whose memory this is, -1 for the host's.");
  m.def("wait", &wait_on, py::arg("later"), py::arg("earlier"), py::arg("device"), Unlocked(),
        "Lets one stream wait for what another has got so far.");
  m.def("want_usable", &want_usable_on, py::arg("device"), py::arg("stream"), Unlocked(),
        "Raises where what a stream gets would end the capture of another.");
  m.def("is_captured", &is_captured_on, py::arg("device"), py::arg("stream"), Unlocked(),
        "Whether what a stream gets goes into a graph.");
  m.def("refuse_capture", &refuse_capture_on, py::arg("device"), py::arg("stream"), py::arg("what"), Unlocked(),
        "Raises where what a stream gets goes into a graph, which cannot have `what`.");
  py::class_<Mark>(m, "Mark", "All that a stream has got so far.", py::module_local())
      .def(py::init<int, std::uintptr_t>(), py::arg("device"), py::arg("stream"), Unlocked())
      .def("is_done", &Mark::is_done, Unlocked());
  // Local: the module of the tests has the same classes, over the shim.
  py::class_<ArrayMemory, std::shared_ptr<ArrayMemory>>(m, "ArrayMemory", "Memory of a device that outlives streams.",
                                                        py::module_local())
      .def(py::init<std::size_t, int, std::uintptr_t>(), py::arg("nbytes"), py::arg("device"), py::arg("stream"),
           Unlocked())
      .def_property_readonly("address",
                             [](const ArrayMemory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); })
      .def_property_readonly("is_captured", &ArrayMemory::is_captured, "Whether it is the memory of a graph.")
      .def("begin", &ArrayMemory::begin, py::arg("stream"), Unlocked(),
           "A call uses it, on a stream that waits for those before.")
      .def("end", &ArrayMemory::end, py::arg("stream"), Unlocked(), "The stream has got all of a call that uses it.");
  m.def("to_dlpack", &to_dlpack, py::arg("memory"), py::arg("shape"), py::arg("code"), py::arg("bits"),
        py::arg("versioned"));
  m.def("from_dlpack", &from_dlpack, py::arg("capsule"));
  bind_attention(m);
  bind_mitchell(m);
  bind_optim(m);
}
