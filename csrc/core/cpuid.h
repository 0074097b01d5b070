/* SPDX-License-Identifier: BSD-3-Clause */
/* The CPU level this machine runs, by cpuid and xgetbv alone: plain C, so that it can answer where NumPy cannot start.
 */
#ifndef FASTOPS_CORE_CPUID_H
#define FASTOPS_CORE_CPUID_H

#if defined(__x86_64__)
#include <cpuid.h>

/* Highest x86-64 psABI level that CPU and operating system run: 1, 2, 3 or 4. */
static inline int fastops_x86_level(void) {
  unsigned a = 0, b = 0, c = 0, d = 0, c1, b7 = 0, cx = 0, lo, hi;
  unsigned long long state = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
  c1 = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) b7 = b;
  if (__get_cpuid(0x80000001u, &a, &b, &c, &d)) cx = c;
  if (c1 & (1u << 27)) { /* OSXSAVE: which registers the system saves */
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    state = ((unsigned long long)hi << 32) | lo;
  }
  {
    const unsigned v2 = (1u << 0) | (1u << 9) | (1u << 13) | (1u << 19) | (1u << 20) | (1u << 23);
    const unsigned v3_1 = (1u << 12) | (1u << 22) | (1u << 28) | (1u << 29);              /* FMA MOVBE AVX F16C */
    const unsigned v3_7 = (1u << 3) | (1u << 5) | (1u << 8);                              /* BMI1 AVX2 BMI2 */
    const unsigned v4_7 = (1u << 16) | (1u << 17) | (1u << 28) | (1u << 30) | (1u << 31); /* F DQ CD BW VL */
    if ((c1 & v2) != v2 || !(cx & 1u)) return 1;
    if ((c1 & v3_1) != v3_1 || (b7 & v3_7) != v3_7 || !(cx & (1u << 5)) || (state & 0x6) != 0x6) return 2;
    if ((b7 & v4_7) != v4_7 || (state & 0xe6) != 0xe6) return 3;
    return 4;
  }
}
#endif
#endif
