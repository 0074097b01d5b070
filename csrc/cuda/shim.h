// SPDX-License-Identifier: BSD-3-Clause
// Kernels on a CPU: a block's threads are fibers that run one after another up to their next barrier. For tests of
// logic; the order of the threads turns around from block to block, so that a missing barrier shows.
#ifndef FASTOPS_CUDA_SHIM_H
#define FASTOPS_CUDA_SHIM_H

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

namespace fastops {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT: as CUDA's
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace shim {

constexpr unsigned kWarp = 32;
constexpr std::size_t kSlot = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 1u << 18;
#else
constexpr std::size_t kStack = 1u << 16;
#endif

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "fastops shim: %s\n", why);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, group;
};
struct Fiber {
  enum State { kReady, kBlock, kWarpWide, kDone } state = kDone;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake = nullptr;
  dim3 index;
  unsigned char slot[kSlot];
  std::vector<Copy> copies;  // begun and not waited for
  std::size_t groups = 0;
};

struct Engine {
  std::mutex mutex;  // one kernel at a time: a block's shared memory is static
  ucontext_t scheduler;
  void* fake = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned count = 0, current = 0;
  const std::function<void()>* body = nullptr;
  std::vector<unsigned char> dynamic;
  int votes = 0;

  Fiber& self() { return *fibers[current]; }

  void run(unsigned t) {
    current = t;
    threadIdx = fibers[t]->index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, fibers[t]->stack.get(), kStack);
#endif
    swapcontext(&scheduler, &fibers[t]->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void entered(void* saved) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, &bottom, &size);
#else
    (void)saved;
#endif
  }
  void leave(Fiber::State state) {
    Fiber& fiber = self();
    fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.fake, bottom, size);
#endif
    swapcontext(&fiber.context, &scheduler);
    entered(fiber.fake);
  }
  static void main();

  bool release(unsigned first, unsigned last, Fiber::State state) {
    unsigned waiting = 0, alive = 0;
    for (unsigned t = first; t < last; ++t) {
      alive += fibers[t]->state != Fiber::kDone;
      waiting += fibers[t]->state == state;
    }
    if (waiting == 0 || waiting != alive) return false;
    for (unsigned t = first; t < last; ++t)
      if (fibers[t]->state == state) fibers[t]->state = Fiber::kReady;
    return true;
  }
  void run_block(bool backwards) {
    for (unsigned t = 0; t < count; ++t) {
      Fiber& fiber = *fibers[t];
      fiber.state = Fiber::kReady;
      fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
      fiber.copies.clear();
    }
    for (unsigned alive = count; alive != 0;) {
      bool moved = false;
      for (unsigned i = 0; i < count; ++i) {
        const unsigned t = backwards ? count - 1 - i : i;
        if (fibers[t]->state != Fiber::kReady) continue;
        run(t);
        moved = true;
        alive -= fibers[t]->state == Fiber::kDone;
      }
      for (unsigned t = 0; t < count; t += kWarp)
        moved = release(t, t + kWarp < count ? t + kWarp : count, Fiber::kWarpWide) || moved;
      moved = release(0, count, Fiber::kBlock) || moved;
      if (!moved && alive != 0) fail("the threads of a block wait at different barriers");
    }
  }
};
inline Engine engine;

inline void Engine::main() {
  engine.entered(nullptr);
  for (;;) {
    (*engine.body)();
    if (!engine.self().copies.empty()) fail("a kernel ended before its copies");
    engine.leave(Fiber::kDone);
  }
}

inline void launch(dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(engine.mutex);
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0) fail("a launch without threads");
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) fail("a launch of more blocks than a GPU takes");
  if (shared > 48 * 1024) fail("more shared memory than a kernel has without asking");
  while (engine.fibers.size() < count) {
    engine.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *engine.fibers.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Engine::main, 0);
  }
  engine.count = count;
  engine.body = &body;
  gridDim = grid;
  blockDim = block;
  bool backwards = false;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        engine.dynamic.assign(shared + 16, 0xa5);
        engine.run_block(backwards);
        backwards = !backwards;
      }
}
inline unsigned char* dynamic_memory() {
  const auto at = reinterpret_cast<std::uintptr_t>(engine.dynamic.data());
  return engine.dynamic.data() + (-at & 15);
}

inline unsigned lane() { return engine.current % kWarp; }

// Values that the lanes of a warp show each other: every lane calls, and the values stay until the object goes.
template <class T> class Shown {
 public:
  explicit Shown(const T& value) {
    static_assert(sizeof(T) <= kSlot);
    std::memcpy(engine.self().slot, &value, sizeof(T));
    engine.leave(Fiber::kWarpWide);
  }
  ~Shown() { engine.leave(Fiber::kWarpWide); }
  Shown(const Shown&) = delete;
  Shown& operator=(const Shown&) = delete;
  T of(unsigned source) const {
    const unsigned at = engine.current / kWarp * kWarp + source % kWarp;
    T result;
    std::memcpy(&result, engine.fibers[at < engine.count ? at : engine.current]->slot, sizeof(T));
    return result;
  }
};
// A float that is no further from zero.
inline float toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  const bool beyond = std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  return beyond ? std::nextafter(nearest, 0.0f) : nearest;
}

// The value that lane `source` gives; every lane of the warp calls.
template <class T> T exchange(const T& value, unsigned source) { return Shown<T>(value).of(source); }

}  // namespace shim

inline void __syncthreads() { shim::engine.leave(shim::Fiber::kBlock); }
inline void __syncwarp(unsigned = ~0u) { shim::engine.leave(shim::Fiber::kWarpWide); }
inline int __syncthreads_or(int predicate) {
  __syncthreads();
  shim::engine.votes = 0;
  __syncthreads();
  shim::engine.votes |= predicate != 0;
  __syncthreads();
  return shim::engine.votes;
}
template <class T> T __shfl_sync(unsigned, T v, unsigned lane) { return shim::exchange(v, lane); }
template <class T> T __shfl_xor_sync(unsigned, T v, unsigned mask) { return shim::exchange(v, shim::lane() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned delta) {
  const unsigned from = shim::lane() + delta;
  return shim::exchange(v, from < shim::kWarp ? from : shim::lane());
}
template <class T> T atomicAdd(T* p, T v) {
  const T before = *p;
  *p = before + v;
  return before;
}

}  // namespace fastops
#endif
