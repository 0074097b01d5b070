// SPDX-License-Identifier: BSD-3-Clause
// The CPU levels compiled in and the one in force; each family keeps one table of kernels per level.
#ifndef FASTOPS_CORE_DISPATCH_H
#define FASTOPS_CORE_DISPATCH_H

#include <atomic>
#include <cstddef>

namespace fastops {

#if defined(__x86_64__)
inline constexpr const char* kLevelNames[] = {"v2", "v3", "v4"};
#elif defined(__aarch64__)
inline constexpr const char* kLevelNames[] = {"neon"};
#else
#error "fastops is written for x86-64 and aarch64"
#endif
inline constexpr int kLevels = sizeof(kLevelNames) / sizeof(kLevelNames[0]);

// Index into kLevelNames of the level in force; inline, because every call of an element-wise operation asks.
extern std::atomic<int> g_level;  // below 0 before the first question
int choose_level() noexcept;
inline int active_level() noexcept {
  const int level = g_level.load(std::memory_order_relaxed);
  return level >= 0 ? level : choose_level();
}

// A family declares its table of every level with this, and picks from an array of them by active_level().
#if defined(__x86_64__)
#define FASTOPS_FOR_EACH_LEVEL(X) X(v2) X(v3) X(v4)
#else
#define FASTOPS_FOR_EACH_LEVEL(X) X(neon)
#endif

}  // namespace fastops
#endif
