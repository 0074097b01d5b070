// SPDX-License-Identifier: BSD-3-Clause
// The runtime of the shim: two devices whose memory is the host's, and whose streams are done at once, though events of
// one say so only when a test has finished it. Tests may end a stream, after which no call may name it.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/gpu.h"

// The interpreter's, where there is one.
extern "C" __attribute__((weak)) int PyGILState_Check(void);

namespace fastops::gpu {
namespace {

constexpr int kDevices = 2;
constexpr Status kGone = 400;                  // cudaErrorInvalidResourceHandle
constexpr Status kCaptured = 900;              // cudaErrorStreamCaptureUnsupported
constexpr Status kImplicit = 906;              // cudaErrorStreamCaptureImplicit
constexpr std::uintptr_t kReleases = 1 << 20;  // the stream on which memory is freed
thread_local int g_device = 0;
std::vector<Stream> g_gone;
std::vector<Stream> g_finished;  // whose events are done
Stream g_captured = nullptr;     // whose work goes into a graph
bool g_blocking = false;         // for which the default stream waits
int g_faults = 0;
int g_idle_waits = 0;
int g_allocations = 0;
int g_releases = 0;
std::vector<Stream> g_waits;  // of events: the stream that waits, and the one that had been recorded, by turns

bool is_default(Stream stream) noexcept { return reinterpret_cast<std::uintptr_t>(stream) <= 1; }

// What a GPU may let wait has no time for the interpreter.
void want_unlocked() noexcept { g_faults += PyGILState_Check != nullptr && PyGILState_Check() != 0; }

Status use(Stream stream) noexcept {
  want_unlocked();
  if (capture_of(stream) == Capture::kBroken) {
    ++g_faults;
    return kImplicit;
  }
  if (std::find(g_gone.begin(), g_gone.end(), stream) == g_gone.end()) return 0;
  ++g_faults;
  return kGone;
}

}  // namespace

int device_count() noexcept { return kDevices; }
const char* problem() noexcept { return nullptr; }
const char* error_text(Status status) noexcept { return status == 0 ? "no error" : "an error of the shim"; }
int device_of(const void*) noexcept { return g_device; }

OnDevice::OnDevice(int device) noexcept : status(device < 0 || device >= kDevices), before_(g_device) {
  g_device = device;
}
OnDevice::~OnDevice() { g_device = before_; }

Status allocate(void** p, std::size_t bytes, Stream stream) noexcept {
  if (const Status status = use(stream)) return status;
  ++g_allocations;
  const std::size_t size = (bytes + 256) / 256 * 256;
  *p = std::aligned_alloc(256, size);
  if (*p == nullptr) return 2;
  std::memset(*p, 0xa5, size);  // what nobody writes shall show
  return 0;
}
Status release(void* p, Stream stream) noexcept {
  if (const Status status = use(stream)) return status;
  release_unused(p);
  return 0;
}
void release_unused(void* p) noexcept {
  ++g_releases;
  std::free(p);
}
Stream release_stream() noexcept { return reinterpret_cast<Stream>(kReleases); }
Status synchronize() noexcept {
  want_unlocked();
  if (g_captured != nullptr) return kCaptured;
  ++g_idle_waits;
  return 0;
}
Status upload(void* to, const void* from, std::size_t bytes, Stream stream) noexcept {
  g_faults += is_captured(stream);
  if (const Status status = use(stream)) return status;
  std::memcpy(to, from, bytes);
  return 0;
}
Status wait(Stream later, Stream earlier) noexcept {
  if (const Status status = use(later)) return status;
  if (const Status status = use(earlier)) return status;
  g_faults += is_captured(later) != is_captured(earlier);
  return 0;
}

Event::~Event() { reset(); }
void Event::reset() noexcept {
  if (event_ != nullptr) want_unlocked();
  event_ = nullptr;
}
Status Event::record(Stream stream) noexcept {
  g_faults += is_captured(stream);
  // Of the default stream, too, something that is not null.
  event_ = static_cast<char*>(stream) + 1;
  return use(stream);
}
bool Event::is_done() noexcept {
  want_unlocked();
  const Stream stream = static_cast<char*>(event_) - 1;
  return std::find(g_finished.begin(), g_finished.end(), stream) != g_finished.end();
}
Status Event::precede(Stream later) noexcept {
  g_faults += is_captured(later);
  if (event_ == nullptr) return 0;
  g_waits.push_back(later);
  g_waits.push_back(static_cast<char*>(event_) - 1);
  return use(later);
}
Capture capture_of(Stream stream) noexcept {
  if (g_captured == nullptr) return Capture::kNone;
  if (is_default(stream) && g_blocking) return Capture::kBroken;
  return stream == g_captured ? Capture::kGraph : Capture::kNone;
}

}  // namespace fastops::gpu

extern "C" {
__attribute__((visibility("default"))) void fastops_shim_end_stream(void* stream) {
  fastops::gpu::g_gone.push_back(stream);
}
// Its events are done from here on.
__attribute__((visibility("default"))) void fastops_shim_finish_stream(void* stream) {
  fastops::gpu::g_finished.push_back(stream);
}
// Null: nothing is captured any more.
__attribute__((visibility("default"))) void fastops_shim_capture(void* stream, int blocking) {
  fastops::gpu::g_captured = stream;
  fastops::gpu::g_blocking = blocking != 0;
}
// Copies the waits for events since the last call, at most so many handles; how many there were.
__attribute__((visibility("default"))) int fastops_shim_waits(void** to, int most) {
  std::vector<void*> waits;
  waits.swap(fastops::gpu::g_waits);
  std::copy_n(waits.begin(), std::min<std::size_t>(waits.size(), static_cast<std::size_t>(most)), to);
  return static_cast<int>(waits.size());
}
// Waits of the host for all that a device has got; counts anew.
__attribute__((visibility("default"))) int fastops_shim_idle_waits() {
  return std::exchange(fastops::gpu::g_idle_waits, 0);
}
// Allocations; counts anew.
__attribute__((visibility("default"))) int fastops_shim_allocations() {
  return std::exchange(fastops::gpu::g_allocations, 0);
}
// Memory freed; counts anew.
__attribute__((visibility("default"))) int fastops_shim_releases() {
  return std::exchange(fastops::gpu::g_releases, 0);
}
// Calls that named an ended stream, held the interpreter or would have ended a capture, and waits and events across the
// bounds of one; counts anew.
__attribute__((visibility("default"))) int fastops_shim_faults() {
  const int faults = fastops::gpu::g_faults;
  fastops::gpu::g_faults = 0;
  fastops::gpu::g_gone.clear();
  fastops::gpu::g_finished.clear();
  return faults;
}
}
