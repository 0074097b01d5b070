// SPDX-License-Identifier: BSD-3-Clause
// Level selection behind the C interface.
#include "core/dispatch.h"

#include <cstring>

#include "core/cpuid.h"
#include "fastops/fastops.h"

namespace fastops {
namespace {

int best_level() noexcept {
#if defined(__x86_64__)
  const int level = fastops_x86_level() - 2;
  return level < 0 ? 0 : level;
#else
  return 0;
#endif
}

int find_level(const char* name) noexcept {
  for (int i = 0; name != nullptr && i < kLevels; ++i)
    if (std::strcmp(name, kLevelNames[i]) == 0) return i;
  return -1;
}

}  // namespace

std::atomic<int> g_level{-1};

int choose_level() noexcept {
  const int level = best_level();
  g_level.store(level, std::memory_order_relaxed);
  return level;
}

}  // namespace fastops

using namespace fastops;

int fastops_abi_version(void) noexcept { return FASTOPS_ABI_VERSION; }

const char* fastops_compiled_target(int index) noexcept {
  return index >= 0 && index < kLevels ? kLevelNames[index] : nullptr;
}

int fastops_target_runs(const char* name) noexcept {
  const int level = find_level(name);
  if (level < 0) return -1;
#if defined(__x86_64__)
  return fastops_x86_level() - 2 >= level ? 1 : 0;
#else
  return 1;
#endif
}

const char* fastops_get_target(void) noexcept { return kLevelNames[active_level()]; }

fastops_status fastops_set_target(const char* name) noexcept {
  const int level = find_level(name);
  if (level < 0) return FASTOPS_INVALID;
  if (fastops_target_runs(name) != 1) return FASTOPS_UNSUPPORTED_TARGET;
  g_level.store(level, std::memory_order_relaxed);
  return FASTOPS_OK;
}
