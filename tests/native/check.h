/* SPDX-License-Identifier: BSD-3-Clause */
/* Checks for plain C and C++ test programs: print what failed, go on, fail at the end. */
#ifndef FASTOPS_TESTS_CHECK_H
#define FASTOPS_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* ctest's SKIP_RETURN_CODE: this machine cannot run the test. */
#define CHECK_SKIPPED 77

static int check_failures = 0;

/* printf's arguments follow the condition; only the first 20 failures are printed. */
#define CHECK(condition, ...)                                           \
  do {                                                                  \
    if (!(condition)) {                                                 \
      if (++check_failures <= 20) {                                     \
        fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        fprintf(stderr, __VA_ARGS__);                                   \
        fputc('\n', stderr);                                            \
      }                                                                 \
    }                                                                   \
  } while (0)

/* The last line of main. */
static inline int check_result(const char* name) {
  if (check_failures > 0) {
    fprintf(stderr, "%s: %d checks failed\n", name, check_failures);
    return EXIT_FAILURE;
  }
  printf("%s: passed\n", name);
  return EXIT_SUCCESS;
}

#if defined(__cplusplus)
#include <cstdint>

/* A small generator with the same sequence everywhere (Steele, Lea and Flood 2014, SplitMix64). */
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};
#endif
#endif
