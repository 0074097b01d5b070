// SPDX-License-Identifier: BSD-3-Clause
// Whether this machine runs the level a test was compiled for; included before any code of that level runs.
#ifndef FASTOPS_TESTS_LEVEL_H
#define FASTOPS_TESTS_LEVEL_H

#include "core/cpuid.h"

inline bool level_runs() {
#if defined(__AVX512F__)
  return fastops_x86_level() >= 4;
#elif defined(__AVX2__)
  return fastops_x86_level() >= 3;
#elif defined(__x86_64__)
  return fastops_x86_level() >= 2;
#else
  return true;
#endif
}
#endif
