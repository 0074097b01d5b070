// SPDX-License-Identifier: BSD-3-Clause
// The pool: detached threads that park between jobs. All state is static and trivially destructible, so that neither
// a failed allocation nor the end of the process, nor a fork at any moment, can hurt it.
#include "core/parallel.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/fp_control.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

namespace fastops {
namespace {

constexpr double kSerialBelowNs = 200e3;  // waking a parked thread costs 5 to 50 us
constexpr int kSpins = 100;               // some us; from then on other threads go first
constexpr std::int64_t kSpinNs = 50'000;  // as long as waking takes; longer spins slow the neighbours down
constexpr std::int64_t kPollNs = 20'000'000;
constexpr std::size_t kStackBytes = 512 * 1024;  // bodies use less than 16 KiB; the rest is thread-local data

#if defined(__x86_64__)
void pause() noexcept { __builtin_ia32_pause(); }
#else
void pause() noexcept { __asm__ volatile("yield" : : : "memory"); }
#endif

std::int64_t now_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

// park: sleeps while word == value, at most `ns` (for ever if negative); may return early. wake: ends `count` parks, of
// those whose `bits` have one in common.
using Word = std::atomic<std::uint32_t>;
constexpr std::uint32_t kAnyone = ~0u;
#if defined(__linux__)
void park(Word& word, std::uint32_t value, std::int64_t ns, std::uint32_t bits = kAnyone) noexcept {
  const std::int64_t end = ns < 0 ? 0 : now_ns() + ns;
  const timespec t{static_cast<time_t>(end / 1'000'000'000), static_cast<long>(end % 1'000'000'000)};
  syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, value, ns < 0 ? nullptr : &t, nullptr, bits);
}
void wake(Word& word, int count, std::uint32_t bits = kAnyone) noexcept {
  syscall(SYS_futex, &word, FUTEX_WAKE_BITSET_PRIVATE, count, nullptr, nullptr, bits);
}
void reset_parking() noexcept {}

// The CPUs that a thread may run on; a mask of fixed size fails on machines with more CPUs than it holds.
struct Affinity {
  static constexpr int kBits = 64;
  unsigned long bits[128];
  long bytes;
  bool get(int thread) noexcept {
    bytes = syscall(SYS_sched_getaffinity, thread, sizeof bits, bits);
    return bytes > 0;
  }
  void set(int thread) const noexcept { syscall(SYS_sched_setaffinity, thread, bytes, bits); }
  bool has(int cpu) const noexcept { return cpu / 8 < bytes && (bits[cpu / kBits] >> cpu % kBits & 1) != 0; }
  void add(int cpu) noexcept { bits[cpu / kBits] |= 1ul << cpu % kBits; }
  void remove(int cpu) noexcept { bits[cpu / kBits] &= ~(1ul << cpu % kBits); }
  bool empty() const noexcept {
    unsigned long any = 0;
    for (long i = 0; i < bytes / static_cast<long>(sizeof bits[0]); ++i) any |= bits[i];
    return any == 0;
  }
};
#else
pthread_mutex_t parking_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t parking = PTHREAD_COND_INITIALIZER;
void park(Word& word, std::uint32_t value, std::int64_t ns, std::uint32_t = kAnyone) noexcept {
  pthread_mutex_lock(&parking_lock);
  if (word.load() == value) {
    if (ns < 0) {
      pthread_cond_wait(&parking, &parking_lock);
    } else {
      timespec t;
      clock_gettime(CLOCK_REALTIME, &t);
      t.tv_nsec += static_cast<long>(ns);
      t.tv_sec += t.tv_nsec / 1'000'000'000;
      t.tv_nsec %= 1'000'000'000;
      pthread_cond_timedwait(&parking, &parking_lock, &t);
    }
  }
  pthread_mutex_unlock(&parking_lock);
}
void wake(Word&, int, std::uint32_t = kAnyone) noexcept {
  pthread_mutex_lock(&parking_lock);
  pthread_cond_broadcast(&parking);
  pthread_mutex_unlock(&parking_lock);
}
void reset_parking() noexcept {
  parking_lock = PTHREAD_MUTEX_INITIALIZER;
  parking = PTHREAD_COND_INITIALIZER;
}
#endif

// Waits for `done` without parking; false where that takes long.
template <class F> bool spin_until(F done) noexcept {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  for (const std::int64_t end = now_ns() + kSpinNs; now_ns() < end;) {
    sched_yield();
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause();
    }
  }
  return false;
}

// Set by the thread that owns the pool, read by the workers between entering and leaving the gate.
struct Job {
  Body body;
  void* context;
  std::size_t blocks;
  unsigned helpers;
} job;

std::atomic<bool> busy{false};         // whoever sets it owns the pool
std::atomic<unsigned> threads{0};      // as set; 0: not asked yet
std::atomic<std::uint32_t> forks{0};   // how often this process is the child of a fork
std::atomic<std::size_t> ticket{0};    // the next block
std::atomic<std::uint64_t> raised{0};  // the workers' floating-point status
std::atomic<int> parked{0};
Word epoch{0};  // one more for every job; idle workers wait for it to change
// The gate of the job: places left for workers (bits 16-30), workers inside (bits 0-15), the owner sleeps (bit 31).
// A worker that wakes late finds no place and sleeps on; the owner waits only for those inside.
Word gate{0};
constexpr std::uint32_t kPlace = 1u << 16, kPlaces = 0x7fffu << 16, kInside = 0xffffu, kOwnerSleeps = 1u << 31;
unsigned started = 0;  // the owner's
bool fork_handled = false;

#if defined(__linux__)
// Where a guest's CPUs are idle, a hypervisor shows them as taken away, and Linux starts a thread that is woken on the
// CPU of the thread that wakes it, behind it, for some milliseconds. So the owner bars its own CPU to the workers that
// it is about to wake, and they take it back when they are awake. It wakes no others and leaves none barred, since a
// user may set their masks too.
struct Worker {
  Word thread;  // its id while it sleeps; kHeld while the owner changes its mask; 0 while it is awake
  int barred;   // the CPU and one; 0: none
};
constexpr std::uint32_t kHeld = ~0u;
constexpr std::int64_t kHoldNs = 50'000;  // the owner holds a worker for two system calls
constexpr unsigned kSpread = 16;
Worker workers[kSpread];

std::uint32_t bit_of(unsigned worker) noexcept { return worker < kSpread ? 1u << worker : kAnyone; }
void fall_asleep(unsigned worker) noexcept {
  if (worker < kSpread) workers[worker].thread.store(static_cast<std::uint32_t>(syscall(SYS_gettid)));
}
void awake(unsigned worker) noexcept {
  if (worker >= kSpread) return;
  Worker& self = workers[worker];
  // A worker may wake before it is woken; it waits for the owner, or it would be barred for ever.
  for (std::uint32_t id = self.thread.load(std::memory_order_relaxed);
       id == kHeld || !self.thread.compare_exchange_weak(id, 0, std::memory_order_acquire);
       id = self.thread.load(std::memory_order_relaxed))
    park(self.thread, kHeld, kHoldNs);
  if (self.barred == 0) return;
  Affinity mask;
  if (mask.get(0)) {
    mask.add(self.barred - 1);
    mask.set(0);
  }
  self.barred = 0;
}
void bar(Worker& worker, int thread, int cpu) noexcept {
  Affinity mask;
  if (!mask.get(thread) || !mask.has(cpu)) return;
  mask.remove(cpu);
  if (mask.empty()) return;
  worker.barred = cpu + 1;
  mask.set(thread);
}
// Chooses up to `count` workers that sleep and bars this CPU to them; the bits to wake them by.
std::uint32_t make_room(unsigned count) noexcept {
  unsigned cpu;
  if (started > kSpread || syscall(SYS_getcpu, &cpu, nullptr, nullptr) != 0) return kAnyone;
  std::uint32_t chosen = 0;
  for (unsigned i = 0; i < started && count > 0; ++i) {
    Worker& worker = workers[i];
    std::uint32_t id = worker.thread.load();
    if (id == 0 || !worker.thread.compare_exchange_strong(id, kHeld, std::memory_order_acquire)) continue;
    if (worker.barred == 0) {  // else it was woken before and has not come yet
      bar(worker, static_cast<int>(id), static_cast<int>(cpu));
      chosen |= bit_of(i);
      --count;
    }
    worker.thread.store(id, std::memory_order_release);
  }
  return chosen;
}
void forget_workers() noexcept {
  for (Worker& worker : workers) worker.thread.store(0), worker.barred = 0;
}
#else
std::uint32_t bit_of(unsigned) noexcept { return kAnyone; }
void fall_asleep(unsigned) noexcept {}
void awake(unsigned) noexcept {}
std::uint32_t make_room(unsigned) noexcept { return kAnyone; }
void forget_workers() noexcept {}
#endif

// The child has neither workers nor another owner.
void after_fork_in_child() noexcept {
  reset_parking();
  forget_workers();
  gate.store(0);
  parked.store(0);
  started = 0;
  forks.fetch_add(1);
  busy.store(false);
}

void take_blocks(unsigned worker) noexcept {
  for (std::size_t block; (block = ticket.fetch_add(1, std::memory_order_relaxed)) < job.blocks;)
    job.body(job.context, block, worker);
}

void help_if_there_is_a_place() noexcept {
  std::uint32_t g = gate.load(std::memory_order_acquire);
  do {
    if ((g & kPlaces) == 0) return;
  } while (!gate.compare_exchange_weak(g, g - kPlace + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  set_fp_state(kDefaultControl);  // a new thread inherits its creator's
  take_blocks(job.helpers - (g & kPlaces) / kPlace + 1);
  raised.fetch_or(fp_state() & kStatus, std::memory_order_relaxed);
  const std::uint32_t before = gate.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kInside) == 1 && (before & kOwnerSleeps) != 0) wake(gate, 1);
}

void* work(void* first) noexcept {
#if defined(__linux__)
  prctl(PR_SET_NAME, "fastops");
#endif
  const auto birth = reinterpret_cast<std::uintptr_t>(first);  // the epoch, and above it the worker's number
  auto seen = static_cast<std::uint32_t>(birth);
  const auto self = static_cast<unsigned>(birth >> 32);
  for (;;) {
    std::uint32_t current;
    const auto called = [&] { return (current = epoch.load(std::memory_order_acquire)) != seen; };
    for (bool there = spin_until(called); !there; there = called()) {
      fall_asleep(self);
      parked.fetch_add(1);
      park(epoch, seen, -1, bit_of(self));
      parked.fetch_sub(1);
      awake(self);
    }
    seen = current;
    help_if_there_is_a_place();
  }
  return nullptr;
}

// Makes threads until there are `wanted`; returns how many there are. The owner's.
unsigned start_threads(unsigned wanted) noexcept {
  if (started >= wanted) return wanted;
  if (!fork_handled) {
    if (pthread_atfork(nullptr, nullptr, after_fork_in_child) != 0) return 0;
    fork_handled = true;
  }
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return started;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  // Signals are the business of the program's own threads; a fault in the thread itself must stay reportable.
  sigset_t all, before;
  sigfillset(&all);
  constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
  for (int fault : kFaults) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const std::uintptr_t seen = epoch.load();
  const auto birth = [seen] { return reinterpret_cast<void*>(seen | std::uintptr_t{started} << 32); };
  for (pthread_t id; started < wanted && pthread_create(&id, &attributes, work, birth()) == 0;) ++started;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  return started;
}

// Asks the caller's poll at most every kPollNs, counted over the runs of a context: long work may be many short runs.
class Poller {
 public:
  explicit Poller(fastops_poll poll) noexcept
      : poll_(poll), last_(polled_ns[reinterpret_cast<std::uintptr_t>(poll.context) / 64 % kContexts]) {}
  bool interrupted() noexcept {
    if (poll_.function == nullptr) return false;
    if (now_ns() - last_.load(std::memory_order_relaxed) < kPollNs) return false;
    const bool stop = poll_.function(poll_.context) != 0;
    last_.store(now_ns(), std::memory_order_relaxed);
    return stop;
  }

 private:
  static constexpr std::size_t kContexts = 64;  // contexts that share a slot share the rate
  static std::atomic<std::int64_t> polled_ns[kContexts];
  fastops_poll poll_;
  std::atomic<std::int64_t>& last_;
};
std::atomic<std::int64_t> Poller::polled_ns[kContexts];

fastops_status run_serial(std::size_t blocks, Body body, void* context, Poller& poller) noexcept {
  for (std::size_t block = 0; block < blocks; ++block) {
    body(context, block, 0);
    if (poller.interrupted()) return FASTOPS_INTERRUPTED;
  }
  return FASTOPS_OK;
}

fastops_status run_shared(std::size_t blocks, Body body, void* context, unsigned helpers, Poller& poller) noexcept {
  const std::uint32_t generation = forks.load();
  job = {body, context, blocks, helpers};
  ticket.store(0, std::memory_order_relaxed);
  raised.store(0, std::memory_order_relaxed);
  gate.store(helpers * kPlace, std::memory_order_release);
  epoch.fetch_add(1);
  if (parked.load() > 0) {
    const std::uint32_t chosen = make_room(helpers);
    if (chosen != 0) wake(epoch, static_cast<int>(helpers), chosen);
  }

  fastops_status status = FASTOPS_OK;
  // True where a handler that the poll ran has forked and this is the child: the workers and their blocks are lost.
  const auto lost = [&] {
    if (status == FASTOPS_OK && poller.interrupted()) {
      status = FASTOPS_INTERRUPTED;
      ticket.store(blocks, std::memory_order_relaxed);
    }
    return forks.load(std::memory_order_relaxed) != generation;
  };
  for (std::size_t block; (block = ticket.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
    body(context, block, 0);
    if (lost()) return FASTOPS_INTERRUPTED;
  }
  gate.fetch_and(~kPlaces, std::memory_order_acq_rel);
  const auto left = [] { return (gate.load(std::memory_order_acquire) & kInside) == 0; };
  for (bool alone = spin_until(left); !alone; alone = left()) {
    std::uint32_t g = gate.fetch_or(kOwnerSleeps, std::memory_order_acq_rel) | kOwnerSleeps;
    if ((g & kInside) != 0) park(gate, g, kPollNs);
    if (lost()) return FASTOPS_INTERRUPTED;
  }
  set_fp_state(fp_state() | raised.load(std::memory_order_relaxed));
  busy.store(false, std::memory_order_release);
  return status;
}

// How many threads.

// Reads a small file whole, as a C string; false where there is none. No allocation, EINTR retried.
bool read_file(const char* path, char* text, std::size_t size) noexcept {
  int fd;
  do fd = open(path, O_RDONLY | O_CLOEXEC);
  while (fd < 0 && errno == EINTR);
  if (fd < 0) return false;
  std::size_t used = 0;
  for (;;) {
    const ssize_t got = read(fd, text + used, size - 1 - used);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    used += static_cast<std::size_t>(got);
  }
  close(fd);
  text[used] = '\0';
  return used > 0;
}

unsigned quota_cpus(double quota, double period) noexcept {
  if (!(quota > 0) || !(period > 0)) return kMaxThreads;
  const double cpus = (quota + period - 1) / period;  // rounded up: half a CPU more is better used than idle
  return cpus < 1 ? 1 : cpus > kMaxThreads ? kMaxThreads : static_cast<unsigned>(cpus);
}

// The quota of one directory of a hierarchy: version 2's cpu.max, version 1's pair of files.
unsigned directory_cpus(const char* directory, bool version2) noexcept {
  char path[1100], text[64];
  if (version2) {
    std::snprintf(path, sizeof path, "%s/cpu.max", directory);
    if (!read_file(path, text, sizeof text) || std::strncmp(text, "max", 3) == 0) return kMaxThreads;
    char* rest;
    const double quota = std::strtod(text, &rest);
    return quota_cpus(quota, std::strtod(rest, nullptr));
  }
  std::snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
  if (!read_file(path, text, sizeof text)) return kMaxThreads;
  const double quota = std::strtod(text, nullptr);
  std::snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
  return read_file(path, text, sizeof text) ? quota_cpus(quota, std::strtod(text, nullptr)) : kMaxThreads;
}

}  // namespace

unsigned cgroup_cpus(const char* proc_file, const char* root) noexcept {
  char groups[3072];
  if (!read_file(proc_file, groups, sizeof groups)) return kMaxThreads;
  unsigned cpus = kMaxThreads;
  char* save;
  for (char* line = strtok_r(groups, "\n", &save); line != nullptr; line = strtok_r(nullptr, "\n", &save)) {
    // "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1.
    char* const controllers = std::strchr(line, ':');
    char* const colon = controllers ? std::strchr(controllers + 1, ':') : nullptr;
    if (colon == nullptr) continue;
    *colon = '\0';
    const char* const names = controllers + 1;
    const bool version2 = *names == '\0';
    if (!version2 && std::strcmp(names, "cpu") != 0 && std::strncmp(names, "cpu,", 4) != 0 &&
        std::strstr(names, ",cpu,") == nullptr && (colon - names < 4 || std::strcmp(colon - 4, ",cpu") != 0))
      continue;
    const char* const mounts[] = {version2 ? "" : "/cpu", version2 ? "/unified" : "/cpu,cpuacct"};
    for (const char* mount : mounts) {
      // Every ancestor limits too; a path seen from outside a container exists only near the root.
      char directory[1024];
      const int length = std::snprintf(directory, sizeof directory, "%s%s%s", root, mount, colon + 1);
      if (length < 0 || static_cast<std::size_t>(length) >= sizeof directory) continue;
      const std::size_t base = std::strlen(root) + std::strlen(mount);
      for (;;) {
        const unsigned here = directory_cpus(directory, version2);
        if (here < cpus) cpus = here;
        char* const slash = std::strrchr(directory + base, '/');
        if (slash == nullptr) break;
        *slash = '\0';
      }
    }
  }
  return cpus;
}

unsigned worker_count() noexcept {
  unsigned count = threads.load(std::memory_order_relaxed);
  if (count == 0) {
    // Another thread's setting in the meantime stands.
    unsigned unset = 0;
    threads.compare_exchange_strong(unset, fastops_default_num_threads());
    count = threads.load(std::memory_order_relaxed);
  }
  return count;
}

bool interrupted(fastops_poll poll) noexcept { return Poller(poll).interrupted(); }

fastops_status parallel_run(std::size_t blocks, Body body, void* context, double work_ns, fastops_poll poll,
                            unsigned limit) noexcept {
  if (blocks == 0) return FASTOPS_OK;
  const DefaultControl control;
  Poller poller(poll);
  unsigned helpers = 0;
  bool owner = false;
  if (blocks > 1 && limit > 1 && work_ns >= kSerialBelowNs) {
    unsigned workers = worker_count();
    if (workers > limit) workers = limit;
    helpers = blocks < workers ? static_cast<unsigned>(blocks) - 1 : workers - 1;
    owner = helpers > 0 && !busy.exchange(true, std::memory_order_acquire);
  }
  if (owner && (helpers = start_threads(helpers)) == 0) {
    busy.store(false, std::memory_order_release);
    owner = false;
  }
  return owner ? run_shared(blocks, body, context, helpers, poller) : run_serial(blocks, body, context, poller);
}

}  // namespace fastops

using namespace fastops;

unsigned fastops_get_num_threads(void) noexcept { return worker_count(); }

fastops_status fastops_set_num_threads(unsigned count) noexcept {
  if (count < 1 || count > kMaxThreads) return FASTOPS_INVALID;
  threads.store(count, std::memory_order_relaxed);
  return FASTOPS_OK;
}

unsigned fastops_default_num_threads(void) noexcept {
  unsigned cpus = 0;
#if defined(__linux__)
  // The plain system call, because a mask of fixed size fails on machines with more CPUs than it holds.
  unsigned long mask[256];
  const long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
  for (long i = 0; i < bytes / static_cast<long>(sizeof mask[0]); ++i)
    cpus += static_cast<unsigned>(__builtin_popcountl(mask[i]));
#endif
  if (cpus == 0) {
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    cpus = online > 0 ? static_cast<unsigned>(online) : 1;
  }
  const unsigned allowed = cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
  if (cpus > allowed) cpus = allowed;
  return cpus < kMaxThreads ? cpus : kMaxThreads;
}
