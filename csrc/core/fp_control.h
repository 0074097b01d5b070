// SPDX-License-Identifier: BSD-3-Clause
// The control and status of the floating-point unit, which belong to the thread: a caller's rounding mode, flush to
// zero (libraries linked with -ffast-math set it) and traps are no business of the kernels.
#ifndef FASTOPS_CORE_FP_CONTROL_H
#define FASTOPS_CORE_FP_CONTROL_H

#include <cstdint>

namespace fastops {

// Round to nearest, no flush to zero, no traps; and the bits of the state that are status flags.
#if defined(__x86_64__)
inline constexpr std::uint64_t kDefaultControl = 0x1f80, kStatus = 0x3f;
inline std::uint64_t fp_state() noexcept {
  unsigned state;
  __asm__ volatile("stmxcsr %0" : "=m"(state) : : "memory");
  return state;
}
inline void set_fp_state(std::uint64_t value) noexcept {
  const unsigned state = static_cast<unsigned>(value);
  __asm__ volatile("ldmxcsr %0" : : "m"(state) : "memory");
}
inline bool has_default_control() noexcept { return (fp_state() & ~kStatus) == kDefaultControl; }
#else  // aarch64: control register in the upper half, status register in the lower
inline constexpr std::uint64_t kDefaultControl = 0, kStatus = 0x9f;
inline std::uint64_t fp_state() noexcept {
  std::uint64_t control, status;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control) : : "memory");
  __asm__ volatile("mrs %0, fpsr" : "=r"(status) : : "memory");
  return control << 32 | status;
}
inline void set_fp_state(std::uint64_t value) noexcept {
  __asm__ volatile("msr fpcr, %0" : : "r"(value >> 32) : "memory");
  __asm__ volatile("msr fpsr, %0" : : "r"(value & 0xffffffffu) : "memory");
}
inline bool has_default_control() noexcept {
  std::uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control) : : "memory");
  return control == kDefaultControl;
}
#endif

// The default control while the object lives; then the former one, with the status flags that were raised meanwhile.
// The work belongs in a function of another file or a noinline one: compilers move arithmetic across a write of the
// register.
class DefaultControl {
 public:
  DefaultControl() noexcept : caller_(fp_state()) { set_fp_state(kDefaultControl | (caller_ & kStatus)); }
  ~DefaultControl() { set_fp_state(caller_ | (fp_state() & kStatus)); }
  DefaultControl(const DefaultControl&) = delete;
  DefaultControl& operator=(const DefaultControl&) = delete;

 private:
  std::uint64_t caller_;
};

}  // namespace fastops
#endif
