// SPDX-License-Identifier: BSD-3-Clause
// The thread pool: blocks of work by atomic tickets; the split is the caller's.
#ifndef FASTOPS_CORE_PARALLEL_H
#define FASTOPS_CORE_PARALLEL_H

#include <cstddef>

#include "fastops/fastops.h"

namespace fastops {

// The largest `worker` index a body sees is below this; size per-worker workspaces by worker_count().
inline constexpr unsigned kMaxThreads = 1024;

// Runs body(context, block, worker) once for every block < blocks. Serial (worker 0, blocks in order) when one thread
// is set, when called from inside a body, when the pool is busy, or when work_ns (an estimate of the whole) is small.
// The calling thread works too. Polls after blocks on the calling thread, about every 20 ms over all the runs of a
// poll's context; FASTOPS_INTERRUPTED once the poll says so (blocks under way end first, others are not begun). A
// thread that cannot be started only makes it slower. `worker` stays below `limit`: pass the worker_count() that the
// workspaces were made for, since another thread may raise the number of threads in between. Bodies run with the
// default floating-point control (round to nearest, no flush to zero, no traps), whatever the caller's is; the status
// flags they raise arrive in the caller.
using Body = void (*)(void* context, std::size_t block, unsigned worker) noexcept;
fastops_status parallel_run(std::size_t blocks, Body body, void* context, double work_ns, fastops_poll poll,
                            unsigned limit = kMaxThreads) noexcept;

// For bodies that take long: asks the poll, at the same rate, from worker 0's body; true once the work is to end.
bool interrupted(fastops_poll poll) noexcept;

// How many distinct `worker` values a parallel_run begun now could use (>= 1).
unsigned worker_count() noexcept;

// The number of CPUs that the cgroups of `proc_file` (/proc/self/cgroup) allow by quota, below `root` (/sys/fs/cgroup);
// kMaxThreads where nothing limits it.
unsigned cgroup_cpus(const char* proc_file, const char* root) noexcept;

// A callable object in place of body and context: f(block, worker).
template <class F>
fastops_status parallel_run(std::size_t blocks, F&& f, double work_ns, fastops_poll poll,
                            unsigned limit = kMaxThreads) noexcept {
  auto* target = &f;
  return parallel_run(
      blocks,
      [](void* c, std::size_t block, unsigned worker) noexcept { (*static_cast<decltype(target)>(c))(block, worker); },
      const_cast<void*>(static_cast<const void*>(target)), work_ns, poll, limit);
}

}  // namespace fastops
#endif
