// SPDX-License-Identifier: BSD-3-Clause
// The runtime's functions that the Python module needs.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda/gpu.h"

namespace fastops::gpu {
namespace {

cudaStream_t stream_of(Stream stream) noexcept { return static_cast<cudaStream_t>(stream); }
Status status_of(cudaError_t error) noexcept {
  // Otherwise the next question about a launch would find it.
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<Status>(error);
}
cudaError_t count_devices(int* count) noexcept {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    *count = 0;
  }
  return error;
}

// While any thread captures a graph in the global mode, calls that do not touch it are refused, too, and end it.
class WithinCaptures {
 public:
  WithinCaptures() noexcept { (void)status_of(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~WithinCaptures() { (void)status_of(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  WithinCaptures(const WithinCaptures&) = delete;
  WithinCaptures& operator=(const WithinCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A function of the driver, which is asked where the runtime would make a context; null where the driver lacks it.
template <class Function> Function driver_function(const char* name, unsigned since) noexcept {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const Status status = status_of(cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &result));
  return status == 0 && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}
// Whether the device has the context that all libraries of the process share; true where the driver does not tell.
bool has_context(int device) noexcept {
  static const auto state = driver_function<decltype(&cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState", 7000);
  unsigned flags = 0;
  int active = 0;
  return state == nullptr || state(device, &flags, &active) != CUDA_SUCCESS || active != 0;
}

// Pinned memory from which copies are under way or were.
struct Staging {
  void* memory;
  std::size_t size;
  int device;
  cudaEvent_t copied;
};
std::mutex g_mutex;
std::vector<Staging>& stagings() {
  static auto* const kept = new std::vector<Staging>();  // outlives the driver's shutdown
  return *kept;
}

// By device. Not under g_mutex, with which an upload may wait.
std::mutex g_release_mutex;
std::vector<cudaStream_t>& release_streams() {
  static auto* const kept = new std::vector<cudaStream_t>();
  return *kept;
}

}  // namespace

int device_count() noexcept {
  int count = 0;
  count_devices(&count);
  return count;
}
const char* problem() noexcept {
  int count = 0;
  const cudaError_t error = count_devices(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count == 0 ? "the driver lists none" : nullptr;
}
const char* error_text(Status status) noexcept { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
int device_of(const void* p) noexcept {
  static const auto ask = driver_function<decltype(&cuPointerGetAttributes)>("cuPointerGetAttributes", 7000);
  if (ask != nullptr) {
    CUpointer_attribute wanted[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
    unsigned type = 0, managed = 0;
    int device = -1;
    void* found[] = {&type, &managed, &device};
    if (ask(3, wanted, found, reinterpret_cast<CUdeviceptr>(p)) == CUDA_SUCCESS)
      return type == CU_MEMORYTYPE_DEVICE || managed != 0 ? device : -1;
  }
  cudaPointerAttributes attributes{};
  if (status_of(cudaPointerGetAttributes(&attributes, p)) != 0) return -1;
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged ? attributes.device : -1;
}

OnDevice::OnDevice(int device) noexcept {
  status = status_of(cudaGetDevice(&before_));
  if (status != 0 || before_ == device) {
    before_ = -1;
    return;
  }
  status = status_of(cudaSetDevice(device));
}
OnDevice::~OnDevice() {
  // As torch does: since CUDA 12 to set a device that nobody has used makes a context there, some hundred MB for a
  // process that works on another GPU alone. It stays unset then.
  if (before_ >= 0 && has_context(before_)) (void)status_of(cudaSetDevice(before_));
}

Status allocate(void** p, std::size_t bytes, Stream stream) noexcept {
  return status_of(cudaMallocAsync(p, bytes == 0 ? 1 : bytes, stream_of(stream)));
}
Status release(void* p, Stream stream) noexcept { return status_of(cudaFreeAsync(p, stream_of(stream))); }
void release_unused(void* p) noexcept {
  const WithinCaptures within;
  (void)status_of(cudaFree(p));
}
Stream release_stream() noexcept {
  const WithinCaptures within;
  int device = 0;
  if (status_of(cudaGetDevice(&device)) != 0) return nullptr;
  const std::lock_guard<std::mutex> lock(g_release_mutex);
  std::vector<cudaStream_t>& streams = release_streams();
  if (streams.size() <= static_cast<std::size_t>(device)) streams.resize(static_cast<std::size_t>(device) + 1);
  cudaStream_t& stream = streams[static_cast<std::size_t>(device)];
  if (stream == nullptr && status_of(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) != 0) stream = nullptr;
  return stream;
}
Status synchronize() noexcept {
  const WithinCaptures within;
  return status_of(cudaDeviceSynchronize());
}
Status upload(void* to, const void* from, std::size_t bytes, Stream stream) noexcept {
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::optional<WithinCaptures> within(std::in_place);
  int device = 0;
  if (const Status status = status_of(cudaGetDevice(&device))) return status;
  Staging* free = nullptr;
  for (Staging& staging : stagings())
    if (staging.device == device && staging.size >= bytes && cudaEventQuery(staging.copied) == cudaSuccess) {
      free = &staging;
      break;
    }
  (void)cudaGetLastError();
  if (free == nullptr) {
    Staging made{nullptr, 4096, device, nullptr};
    while (made.size < bytes) made.size *= 2;
    if (const Status status = status_of(cudaHostAlloc(&made.memory, made.size, cudaHostAllocPortable))) return status;
    if (const Status status = status_of(cudaEventCreateWithFlags(&made.copied, cudaEventDisableTiming))) {
      (void)status_of(cudaFreeHost(made.memory));
      return status;
    }
    stagings().push_back(made);
    free = &stagings().back();
  }
  within.reset();
  std::memcpy(free->memory, from, bytes);
  if (const Status status =
          status_of(cudaMemcpyAsync(to, free->memory, bytes, cudaMemcpyHostToDevice, stream_of(stream))))
    return status;
  return status_of(cudaEventRecord(free->copied, stream_of(stream)));
}
Status wait(Stream later, Stream earlier) noexcept {
  cudaEvent_t event = nullptr;
  if (const Status status = status_of(cudaEventCreateWithFlags(&event, cudaEventDisableTiming))) return status;
  Status status = status_of(cudaEventRecord(event, stream_of(earlier)));
  if (status == 0) status = status_of(cudaStreamWaitEvent(stream_of(later), event, 0));
  (void)status_of(cudaEventDestroy(event));  // when it has happened
  return status;
}

Event::~Event() { reset(); }
void Event::reset() noexcept {
  if (event_ != nullptr) (void)status_of(cudaEventDestroy(static_cast<cudaEvent_t>(event_)));
  event_ = nullptr;
}
Status Event::record(Stream stream) noexcept {
  if (event_ == nullptr) {
    cudaEvent_t made = nullptr;
    if (const Status status = status_of(cudaEventCreateWithFlags(&made, cudaEventDisableTiming))) return status;
    event_ = made;
  }
  return status_of(cudaEventRecord(static_cast<cudaEvent_t>(event_), stream_of(stream)));
}
bool Event::is_done() noexcept {
  if (event_ == nullptr) return true;
  const WithinCaptures within;
  return status_of(cudaEventQuery(static_cast<cudaEvent_t>(event_))) == 0;
}
Status Event::precede(Stream later) noexcept {
  if (event_ == nullptr) return 0;
  return status_of(cudaStreamWaitEvent(stream_of(later), static_cast<cudaEvent_t>(event_), 0));
}
Capture capture_of(Stream stream) noexcept {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const Status status = status_of(cudaStreamIsCapturing(stream_of(stream), &capture));
  if (status == cudaErrorStreamCaptureImplicit) return Capture::kBroken;
  return status == 0 && capture != cudaStreamCaptureStatusNone ? Capture::kGraph : Capture::kNone;
}

}  // namespace fastops::gpu
