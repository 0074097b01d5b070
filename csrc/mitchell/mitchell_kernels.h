// SPDX-License-Identifier: BSD-3-Clause
// The table of element-wise kernels that each CPU level fills.
#ifndef FASTOPS_MITCHELL_KERNELS_H
#define FASTOPS_MITCHELL_KERNELS_H

#include <cstddef>

#include "core/dispatch.h"
#include "mitchell/mitchell_params.h"

namespace fastops {

inline constexpr int kMitchellOps = FASTOPS_EXP2 + 1;
inline constexpr int kMitchellTypes = FASTOPS_U64 + 1;

struct MitchellArrays {
  const char* a;
  const char* b;  // unary operations: not read
  char* out;
  std::ptrdiff_t stride_a, stride_b, stride_out;  // bytes
};

struct MitchellKernels {
  // Null where the type has no such operation. `stream`: write past the caches (contiguous float32 and float64 only).
  void (*apply[kMitchellOps][kMitchellTypes])(const fastops_mitchell* m, const MitchellArrays& arrays, std::size_t n,
                                              bool stream) noexcept;
  // By FASTOPS_F16 .. FASTOPS_F64; contiguous; op FASTOPS_MUL or FASTOPS_DIV.
  void (*grad[4])(const fastops_mitchell* m, fastops_mitchell_op op, fastops_gradient mode, const void* a,
                  const void* b, const void* dy, void* da, void* db, std::size_t n) noexcept;
};

#define FASTOPS_DECLARE(level)                   \
  namespace level {                              \
  extern const MitchellKernels kMitchellKernels; \
  }
FASTOPS_FOR_EACH_LEVEL(FASTOPS_DECLARE)
#undef FASTOPS_DECLARE

}  // namespace fastops
#endif
