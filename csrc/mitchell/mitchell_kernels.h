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
  const char* b;  // unary operations: like a
  char* out;
  std::ptrdiff_t stride_a, stride_b, stride_out;  // bytes
};

// Added to a kernel's op: write past the caches where the arrays are contiguous.
inline constexpr int kMitchellStream = 0x100;

// fastops_mitchell_apply itself, so that it can hand its arguments on as they stand.
using MitchellApply = fastops_status (*)(const fastops_mitchell* m, int op, fastops_dtype dtype, const void* a,
                                         std::ptrdiff_t stride_a, const void* b, std::ptrdiff_t stride_b, void* out,
                                         std::ptrdiff_t stride_out, std::size_t n) noexcept;

struct MitchellKernels {
  // Null where the type has no such operation.
  MitchellApply apply[kMitchellOps][kMitchellTypes];
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
