/* SPDX-License-Identifier: BSD-3-Clause */
/* The control bits of the floating-point unit of the calling thread (MXCSR, FPCR), without the status flags. */
#include <stdint.h>

#if defined(__x86_64__)
uint64_t fp_control(void) {
  uint32_t state;
  __asm__ volatile("stmxcsr %0" : "=m"(state));
  return state & ~0x3fu;
}
void set_fp_control(uint64_t value) {
  const uint32_t state = (uint32_t)value;
  __asm__ volatile("ldmxcsr %0" : : "m"(state));
}
uint64_t flush_bits(void) { return 0x8040; }
uint64_t round_up_bits(void) { return 0x4000; }
#elif defined(__aarch64__)
uint64_t fp_control(void) {
  uint64_t state;
  __asm__ volatile("mrs %0, fpcr" : "=r"(state));
  return state;
}
void set_fp_control(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
uint64_t flush_bits(void) { return UINT64_C(1) << 24; }
uint64_t round_up_bits(void) { return UINT64_C(1) << 22; }
#endif
