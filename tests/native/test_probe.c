/* SPDX-License-Identifier: BSD-3-Clause */
/* Prints the CPU level; with an argument, the level must be that one. Below v2 it says what fastops says then. */
#include "check.h"
#include "core/cpuid.h"

int main(int count, char** arguments) {
  const int level = fastops_x86_level();
  CHECK(level >= 1 && level <= 4, "level %d", level);
  if (count > 1) CHECK(level == atoi(arguments[1]), "level %d, wanted %s", level, arguments[1]);
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
  /* The compiler's own probe, where it knows the levels. */
  __builtin_cpu_init();
  CHECK((level >= 2) == !!__builtin_cpu_supports("x86-64-v2"), "level %d", level);
  CHECK((level >= 3) == !!__builtin_cpu_supports("x86-64-v3"), "level %d", level);
  CHECK((level >= 4) == !!__builtin_cpu_supports("x86-64-v4"), "level %d", level);
#endif
  if (level < 2)
    puts("fastops needs a CPU of level x86-64-v2 (SSE4.2, POPCNT) or above");
  else
    printf("x86-64-v%d\n", level);
  return check_result("test_probe");
}
