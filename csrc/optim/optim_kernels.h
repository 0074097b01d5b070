// SPDX-License-Identifier: BSD-3-Clause
// The table of optimizer kernels that each CPU level fills.
#ifndef FASTOPS_OPTIM_OPTIM_KERNELS_H
#define FASTOPS_OPTIM_OPTIM_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "fastops/fastops.h"

namespace fastops {

inline constexpr int kOptimTypes = FASTOPS_F64 + 1;  // F16, BF16, F32, F64
inline constexpr std::size_t kProfilesAtOnce = 4;

// A run of elements of one tensor, in the memory of every role.
struct Piece {
  char* at[FASTOPS_MAX_ROLES];
  std::size_t n;
  std::size_t first;  // index of the run in its tensor, a multiple of 32
  std::size_t tensor;
};

// Sums of the first pass of the adaptive exponentiated gradient, in chains that take every eighth element each.
inline constexpr std::size_t kSumChains = 8;
struct Angle {
  double dot[kSumChains], update[kSumChains], gradient[kSumChains];
};

struct OptimKernels {
  // [shadow][parameter]: Piece.at = parameter, shadow.
  void (*ema[kOptimTypes][kOptimTypes])(const Piece&, double w, const std::uint64_t* seed) noexcept;
  // [profiles][parameter], float32 shadows: Piece.at = parameter, shadows. Weights are neither 0 nor 1.
  void (*ema_profiles[kProfilesAtOnce + 1][kOptimTypes])(const Piece&, const double* w) noexcept;
  // [gradient] beside float32; F64 beside float64.
  void (*sgd[kOptimTypes])(const Piece&, const fastops_sgd&) noexcept;
  void (*adamw[kOptimTypes])(const Piece&, const fastops_adamw&) noexcept;
  void (*eg[kOptimTypes])(const Piece&, double lr) noexcept;
  void (*angle[kOptimTypes])(const Piece&, Angle*) noexcept;  // adds to the sums
  void (*adaptive_eg[kOptimTypes])(const Piece&, const fastops_adaptive_eg&, double scale) noexcept;
  // F32 and F64.
  void (*lookahead[kOptimTypes])(const Piece&, double alpha) noexcept;
  void (*decay_moments[kOptimTypes])(const Piece&, const fastops_adamw&) noexcept;
  bool (*all_zero[kOptimTypes])(const char* p, std::size_t n) noexcept;
  bool (*all_finite[kOptimTypes])(const char* p, std::size_t n) noexcept;
};

#define FASTOPS_DECLARE_OPTIM(level)       \
  namespace level {                        \
  extern const OptimKernels kOptimKernels; \
  }
FASTOPS_FOR_EACH_LEVEL(FASTOPS_DECLARE_OPTIM)
#undef FASTOPS_DECLARE_OPTIM

}  // namespace fastops
#endif
