// SPDX-License-Identifier: BSD-3-Clause
// The pool: every block once, serial where it must be, and what forks, signals, polls and settings may not break.
#include "core/parallel.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

using fastops::parallel_run;
using fastops::worker_count;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;  // it does not follow a fork of a program with threads
#else
constexpr bool kThreadSanitizer = false;
#endif

constexpr double kLarge = 1e9;  // ns: worth the pool
constexpr fastops_poll kNoPoll = {nullptr, nullptr};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
void wait_ms(double ms) {
  for (const double end = seconds() + ms * 1e-3; seconds() < end;) std::this_thread::yield();
}

bool sums_right(std::size_t blocks, double work_ns = kLarge) {
  std::atomic<std::size_t> sum{0}, count{0};
  const fastops_status status = parallel_run(
      blocks,
      [&](std::size_t block, unsigned) {
        sum += block;
        ++count;
      },
      work_ns, kNoPoll);
  return status == FASTOPS_OK && count == blocks && sum == blocks * (blocks - (blocks > 0)) / 2;
}

void every_block_once() {
  for (unsigned threads : {1u, 2u, 3u, 4u, 7u}) {
    CHECK(fastops_set_num_threads(threads) == FASTOPS_OK, "%u threads", threads);
    CHECK(fastops_get_num_threads() == threads && worker_count() == threads, "%u threads", threads);
    for (std::size_t blocks : {0, 1, 2, 3, 5, 64, 1000})
      for (int round = 0; round < 20; ++round) {
        std::vector<std::atomic<int>> times(blocks);
        const fastops_status status = parallel_run(
            blocks,
            [&](std::size_t block, unsigned worker) {
              ++times[block];
              CHECK(worker < threads, "worker %u of %u", worker, threads);
            },
            kLarge, kNoPoll);
        CHECK(status == FASTOPS_OK, "status %d", int(status));
        for (std::size_t i = 0; i < blocks; ++i) CHECK(times[i] == 1, "block %zu ran %d times", i, times[i].load());
      }
  }
}

// Two threads never hold the same worker number at once, and none reaches `limit`.
void workers_apart() {
  fastops_set_num_threads(4);
  for (unsigned limit : {1u, 2u, 3u, 100u}) {
    std::atomic<int> inside[fastops::kMaxThreads] = {};
    for (int round = 0; round < 100; ++round)
      parallel_run(
          50,
          [&](std::size_t, unsigned worker) {
            CHECK(worker < limit && worker < 4, "worker %u, limit %u", worker, limit);
            CHECK(inside[worker].fetch_add(1) == 0, "worker %u twice", worker);
            inside[worker].fetch_sub(1);
          },
          kLarge, kNoPoll, limit);
  }
}

void really_parallel() {
  fastops_set_num_threads(2);
  std::atomic<int> arrived{0};
  // Each block waits for the other: one thread alone would wait in vain.
  const double start = seconds();
  parallel_run(
      2,
      [&](std::size_t, unsigned) {
        ++arrived;
        while (arrived < 2 && seconds() < start + 5) std::this_thread::yield();
      },
      kLarge, kNoPoll);
  CHECK(arrived == 2 && seconds() < start + 5, "the second thread did not come");
}

void serial_where_it_must_be() {
  fastops_set_num_threads(4);
  const pthread_t caller = pthread_self();
  const auto runs_here_in_order = [&](double work_ns) {
    std::size_t next = 0;
    bool right = true;
    parallel_run(
        100,
        [&](std::size_t block, unsigned worker) {
          right = right && block == next++ && worker == 0 && pthread_equal(caller, pthread_self());
        },
        work_ns, kNoPoll);
    return right && next == 100;
  };
  CHECK(runs_here_in_order(1e3), "little work");
  CHECK(runs_here_in_order(0.0), "no estimate");
  CHECK(runs_here_in_order(0.0 / 0.0 * (kNoPoll.function == nullptr)), "an estimate that is no number");
  fastops_set_num_threads(1);
  CHECK(runs_here_in_order(kLarge), "one thread");
  fastops_set_num_threads(4);
  // Nested: the inner run stays on the thread of the block.
  std::atomic<int> inner{0};
  parallel_run(
      8,
      [&](std::size_t, unsigned) {
        const pthread_t here = pthread_self();
        parallel_run(
            8,
            [&](std::size_t, unsigned worker) {
              CHECK(worker == 0 && pthread_equal(here, pthread_self()), "a nested block on another thread");
              ++inner;
            },
            kLarge, kNoPoll);
      },
      kLarge, kNoPoll);
  CHECK(inner == 64, "%d nested blocks", inner.load());
}

void many_callers() {
  fastops_set_num_threads(4);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 16; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) wrong += !sums_right(37);
    });
  for (int i = 0; i < 8; ++i)
    callers.emplace_back([&, i] {
      for (unsigned round = 0; round < 200; ++round) {
        fastops_set_num_threads(1 + (round + unsigned(i)) % 6);
        const unsigned now = fastops_get_num_threads();
        wrong += now < 1 || now > 6;
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0, "%d wrong sums", wrong.load());
}

void settings() {
  for (unsigned bad : {0u, 1025u, ~0u}) CHECK(fastops_set_num_threads(bad) == FASTOPS_INVALID, "%u threads", bad);
  CHECK(fastops_set_num_threads(1024) == FASTOPS_OK, "1024 threads");
  fastops_set_num_threads(2);
  const unsigned usual = fastops_default_num_threads();
  CHECK(usual >= 1 && usual <= 1024, "%u", usual);
#if defined(__linux__)
  cpu_set_t before, one;
  if (sched_getaffinity(0, sizeof before, &before) == 0) {
    CHECK(usual <= unsigned(CPU_COUNT(&before)), "%u threads on %d CPUs", usual, CPU_COUNT(&before));
    int cpu = 0;
    while (!CPU_ISSET(cpu, &before)) ++cpu;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0, "affinity");
    CHECK(fastops_default_num_threads() == 1, "%u threads on one CPU", fastops_default_num_threads());
    sched_setaffinity(0, sizeof before, &before);
  }
#endif
}

void write_text(const std::string& path, const char* text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  CHECK(fd >= 0 && write(fd, text, std::strlen(text)) == ssize_t(std::strlen(text)), "%s", path.c_str());
  close(fd);
}

void cgroups() {
  char pattern[] = "/tmp/fastops-cgroup-XXXXXX";
  const char* made = mkdtemp(pattern);
  CHECK(made != nullptr, "no temporary directory");
  if (made == nullptr) return;
  const std::string root = made, proc = root + "/proc";
  for (const char* name : {"/a", "/a/b", "/cpu", "/cpu/pod", "/cpu,cpuacct", "/unified"})
    mkdir((root + name).c_str(), 0700);
  const auto cpus = [&](const char* groups) {
    write_text(proc, groups);
    return fastops::cgroup_cpus(proc.c_str(), root.c_str());
  };
  CHECK(fastops::cgroup_cpus("/nonexistent", root.c_str()) == 1024, "no cgroup at all");
  CHECK(cpus("0::/a/b\n") == 1024, "no limit");
  write_text(root + "/a/b/cpu.max", "max 100000\n");
  CHECK(cpus("0::/a/b\n") == 1024, "max");
  write_text(root + "/a/cpu.max", "250000 100000\n");
  CHECK(cpus("0::/a/b\n") == 3, "an ancestor's 2.5 CPUs count as 3, got %u", cpus("0::/a/b\n"));
  write_text(root + "/a/b/cpu.max", "50000 100000\n");
  CHECK(cpus("1:name=x:/\n0::/a/b\n") == 1, "half a CPU");
  CHECK(cpus("0::/seen/from/outside\n") == 1024, "a path that is not here");
  write_text(root + "/cpu.max", "400000 100000\n");
  CHECK(cpus("0::/seen/from/outside\n") == 4, "the root's own limit");
  write_text(root + "/cpu/pod/cpu.cfs_quota_us", "-1\n");
  write_text(root + "/cpu/pod/cpu.cfs_period_us", "100000\n");
  CHECK(cpus("4:cpuset:/\n3:cpu,cpuacct:/pod\n") == 1024, "version 1 without a limit");
  write_text(root + "/cpu/pod/cpu.cfs_quota_us", "200000\n");
  CHECK(cpus("3:cpu,cpuacct:/pod\n") == 2 && cpus("3:cpuacct,cpu:/pod\n") == 2 && cpus("3:cpu:/pod\n") == 2,
        "version 1");
  CHECK(cpus("3:cpuset:/pod\n") == 1024 && cpus("3:cpuacct:/pod\n") == 1024, "other controllers");
  CHECK(cpus("garbage\n::\n:\n\n") <= 1024, "garbage");
  const std::string command = "rm -r " + root;
  CHECK(std::system(command.c_str()) == 0, "%s", command.c_str());
}

int count_calls(void* context) { return ++*static_cast<int*>(context) > 1000000; }
int stop_at_once(void*) { return 1; }

void polls() {
  for (unsigned threads : {1u, 3u}) {
    fastops_set_num_threads(threads);
    int calls = 0;
    double start = seconds();
    parallel_run(100 * threads, [&](std::size_t, unsigned) { wait_ms(2); }, kLarge, {count_calls, &calls});
    const double took = seconds() - start;
    CHECK(calls >= 2 && calls <= took / 0.020 + 1, "%d polls in %.0f ms, %u threads", calls, took * 1e3, threads);

    std::atomic<int> begun{0};
    start = seconds();
    const fastops_status status = parallel_run(100000,
                                               [&](std::size_t, unsigned) {
                                                 ++begun;
                                                 wait_ms(1);
                                               },
                                               kLarge, {stop_at_once, nullptr});
    CHECK(status == FASTOPS_INTERRUPTED, "status %d", int(status));
    CHECK(begun < 5000, "%d blocks begun", begun.load());
    const int then = begun;
    wait_ms(20);
    CHECK(begun == then, "blocks begun after the end");
    CHECK(sums_right(100), "after an interruption");
  }
  // Long work may be many runs, each shorter than the interval.
  int over_runs = 0;
  for (int run = 0; run < 100; ++run)
    parallel_run(1 + run % 2, [&](std::size_t, unsigned) { wait_ms(1); }, kLarge, {count_calls, &over_runs});
  CHECK(over_runs >= 2, "%d polls in 100 runs of 1 ms", over_runs);
  // The caller has no block left and waits for another thread's: it polls there too.
  fastops_set_num_threads(2);
  int calls = 0;
  std::atomic<int> begun{0};
  parallel_run(2,
               [&](std::size_t, unsigned worker) {
                 ++begun;
                 for (const double end = seconds() + 5; begun < 2 && seconds() < end;) std::this_thread::yield();
                 if (worker != 0) wait_ms(200);
               },
               kLarge, {count_calls, &calls});
  CHECK(calls >= 1, "no poll while waiting");
}

// Whether this thread's arithmetic rounds up (fegetround would ask the x87 unit).
bool rounds_up() {
  volatile double one = 1.0, tiny = 0x1p-60;
  volatile double sum = one + tiny;
  return sum > 1.0;
}

// The floating-point control of the caller neither reaches the blocks nor changes; the status flags come back.
void floating_point() {
  fastops_set_num_threads(4);
  std::fesetround(FE_UPWARD);
  std::feclearexcept(FE_ALL_EXCEPT);
  for (double work : {kLarge, 0.0}) {
    std::atomic<int> odd{0};
    parallel_run(64, [&](std::size_t, unsigned) { odd += rounds_up(); }, work, kNoPoll);
    CHECK(odd == 0, "%d blocks with the caller's rounding", odd.load());
    CHECK(rounds_up() && std::fegetround() == FE_UPWARD, "the caller's rounding is lost");
    CHECK(std::fetestexcept(FE_DIVBYZERO | FE_OVERFLOW | FE_INVALID) == 0, "flags from nowhere");
  }
  std::fesetround(FE_TONEAREST);
  for (int round = 0; round < 20; ++round) {
    std::feclearexcept(FE_ALL_EXCEPT);
    std::atomic<int> arrived{0};
    const pthread_t caller = pthread_self();
    parallel_run(
        2,
        [&](std::size_t, unsigned) {
          // Both blocks at once, and only the other thread divides by zero.
          ++arrived;
          for (const double end = seconds() + 5; arrived < 2 && seconds() < end;) std::this_thread::yield();
          volatile double zero = 0.0;
          if (!pthread_equal(caller, pthread_self())) {
            volatile double quotient = 1.0 / zero;
            (void)quotient;
          }
        },
        kLarge, kNoPoll);
    CHECK(std::fetestexcept(FE_DIVBYZERO) != 0, "the worker's flag did not arrive");
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  parallel_run(64, [](std::size_t, unsigned) {}, kLarge, kNoPoll);
  CHECK(std::fetestexcept(FE_DIVBYZERO) == 0, "a flag of the last run came again");
}

void signals() {
  fastops_set_num_threads(3);
  std::atomic<int> arrived{0}, unblocked{0};
  const pthread_t caller = pthread_self();
  parallel_run(
      3,
      [&](std::size_t, unsigned) {
        ++arrived;
        for (const double end = seconds() + 5; arrived < 3 && seconds() < end;) std::this_thread::yield();
        if (pthread_equal(caller, pthread_self())) return;
        sigset_t now;
        pthread_sigmask(SIG_BLOCK, nullptr, &now);
        for (int signal : {SIGINT, SIGTERM, SIGUSR1, SIGALRM, SIGCHLD, SIGPROF})
          unblocked += sigismember(&now, signal) == 0;
      },
      kLarge, kNoPoll);
  CHECK(arrived == 3 && unblocked == 0, "%d signals reach the pool's threads", unblocked.load());
  sigset_t mine;
  pthread_sigmask(SIG_BLOCK, nullptr, &mine);
  CHECK(sigismember(&mine, SIGINT) == 0, "the caller's mask changed");
}

// The child of a fork answers right within 10 s.
bool child_is_well(pid_t child) {
  int status = -1;
  for (const double end = seconds() + 10; seconds() < end; wait_ms(1))
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return false;
}
[[noreturn]] void answer_in_child() {
  bool right = true;
  for (int round = 0; round < 5; ++round) right = right && sums_right(100);
  _exit(right ? 0 : 1);
}

#if defined(__linux__)
// The pool's threads, by the name that they have.
std::vector<pid_t> pool_threads() {
  std::vector<pid_t> found;
  DIR* const tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return found;
  while (const dirent* const entry = readdir(tasks)) {
    char name[16] = {};
    const int file = open(("/proc/self/task/" + std::string(entry->d_name) + "/comm").c_str(), O_RDONLY);
    if (file >= 0 && read(file, name, sizeof name - 1) > 0 && std::strcmp(name, "fastops\n") == 0)
      found.push_back(std::atoi(entry->d_name));
    if (file >= 0) close(file);
  }
  closedir(tasks);
  return found;
}
cpu_set_t affinity(pid_t thread) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  sched_getaffinity(thread, sizeof cpus, &cpus);
  return cpus;
}
cpu_set_t only(int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  return cpus;
}

// A worker that sleeps is barred from its waker's CPU. It has its own mask again when it is awake: the one that it was
// started with, at whatever moment it is woken, or what the user has given it since.
void affinities() {
  const cpu_set_t all = affinity(0);
  if (CPU_COUNT(&all) < 2) return;
  int first = 0;
  while (!CPU_ISSET(first, &all)) ++first;
  int second = first + 1;
  while (!CPU_ISSET(second, &all)) ++second;
  const cpu_set_t one = only(first), other = only(second);

  fastops_set_num_threads(5);
  std::atomic<int> fewer{0};
  for (int round = 0; round < 2000; ++round) {
    parallel_run(
        5,
        [&](std::size_t, unsigned worker) {
          const cpu_set_t mine = affinity(0);
          if (worker != 0 && !CPU_EQUAL(&mine, &all)) ++fewer;
          for (const double end = seconds() + 5e-6; seconds() < end;) {
          }
        },
        kLarge, kNoPoll);
    // So that the next call comes while workers are falling asleep.
    for (const double end = seconds() + round % 40 * 1e-6; seconds() < end;) {
    }
  }
  CHECK(fewer == 0, "%d blocks were run with fewer CPUs", fewer.load());

  // Those that were woken and have not come yet may still be barred.
  const auto barred = [&] {
    bool any = false;
    for (pid_t thread : pool_threads()) {
      const cpu_set_t its = affinity(thread);
      any = any || !CPU_EQUAL(&its, &all);
    }
    return any;
  };
  for (const double end = seconds() + 5; barred() && seconds() < end;) wait_ms(5);
  if (sched_setaffinity(0, sizeof one, &one) != 0) return;
  for (pid_t thread : pool_threads()) sched_setaffinity(thread, sizeof other, &other);
  for (int round = 0; round < 20; ++round) {
    sums_right(100);
    wait_ms(2);
  }
  for (pid_t thread : pool_threads()) {
    const cpu_set_t its = affinity(thread);
    CHECK(CPU_EQUAL(&its, &other), "a worker has left the CPU that it was given");
    sched_setaffinity(thread, sizeof all, &all);
  }
  sched_setaffinity(0, sizeof all, &all);
}
#else
void affinities() {}
#endif

void forks() {
  fastops_set_num_threads(4);
  CHECK(sums_right(100), "before");
  int ill = 0;
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) answer_in_child();
    ill += !child_is_well(child);
    CHECK(sums_right(100), "the parent after a fork");
  }
  CHECK(ill == 0, "%d children after use", ill);
  // While other threads hold the pool.
  std::atomic<bool> stop{false};
  std::vector<std::thread> users;
  for (int i = 0; i < 3; ++i)
    users.emplace_back([&] {
      while (!stop) sums_right(50);
    });
  for (int round = 0; round < 100; ++round) {
    const pid_t child = fork();
    if (child == 0) answer_in_child();
    ill += !child_is_well(child);
  }
  stop = true;
  for (auto& user : users) user.join();
  CHECK(ill == 0, "%d children of forks in the middle", ill);
}

// A poll that forks, as a Python signal handler may.
pid_t forked_by_poll = -1;
int fork_once(void*) {
  if (forked_by_poll == -1) forked_by_poll = fork();
  return 0;
}
void fork_in_poll() {
  fastops_set_num_threads(3);
  const pid_t parent = getpid();
  const fastops_status status =
      parallel_run(300, [](std::size_t, unsigned) { wait_ms(1); }, kLarge, {fork_once, nullptr});
  if (getpid() != parent) {
    alarm(10);
    if (status != FASTOPS_INTERRUPTED) _exit(2);
    answer_in_child();
  }
  CHECK(status == FASTOPS_OK, "the parent: status %d", int(status));
  CHECK(forked_by_poll > 0 && child_is_well(forked_by_poll), "the child of a poll that forks");
}

}  // namespace

int main() {
  every_block_once();
  workers_apart();
  really_parallel();
  serial_where_it_must_be();
  many_callers();
  settings();
  cgroups();
  polls();
  floating_point();
  signals();
  affinities();
  // qemu-user 7.2 stops with an assertion of its own when a program with threads forks.
  if (!kThreadSanitizer && std::getenv("FASTOPS_EMULATED") == nullptr) {
    forks();
    fork_in_poll();
  }
  return check_result("test_parallel");
}
