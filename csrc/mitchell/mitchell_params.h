// SPDX-License-Identifier: BSD-3-Clause
// One operation's constants, rounded once per dtype: plain data that every level reads.
#ifndef FASTOPS_MITCHELL_PARAMS_H
#define FASTOPS_MITCHELL_PARAMS_H

#include <cstdint>

#include "fastops/fastops.h"

namespace fastops {

// The constants in the units of the type the kernel computes in: float32's 2^-23 for f16, bf16 and f32 (a half type's
// constant is a multiple of its own unit), float64's 2^-52 for f64. Masks clear the mantissa bits beyond mantissa_bits.
template <class Int> struct MitchellConstants {
  Int c;
  Int mantissa_mask;          // of the explicit mantissa, all ones where nothing is cut
  Int flush_below;            // bits of the dtype's smallest normal number, 0 where subnormals are kept
  Int lowest_exponent;        // of a result that is not flushed
  std::int32_t segment_bits;  // log2 of the segments a mantissa, 0 without a table
  bool fast;  // the kernels' short path applies: form 0, one constant, nothing to flush among its operands
  Int table[256];
};

}  // namespace fastops

struct fastops_mitchell {
  fastops_mitchell_params params;
  fastops::MitchellConstants<std::int32_t> single[3];  // by FASTOPS_F16, FASTOPS_BF16, FASTOPS_F32
  fastops::MitchellConstants<std::int64_t> wide;       // FASTOPS_F64
};

namespace fastops {

// Rounds the constants of valid parameters.
void set_constants(fastops_mitchell& m, const fastops_mitchell_params& params) noexcept;

}  // namespace fastops

#endif
