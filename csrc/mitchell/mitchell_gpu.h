// SPDX-License-Identifier: BSD-3-Clause
// What the element-wise kernels on a GPU share: constants as a kernel keeps them, and packs of elements.
#ifndef FASTOPS_MITCHELL_MITCHELL_GPU_H
#define FASTOPS_MITCHELL_MITCHELL_GPU_H

#include "cuda/device.h"
#include "mitchell/mitchell_math.h"

namespace fastops::FASTOPS_LEVEL::mitchell {

inline constexpr int kThreads = 256;

// As MitchellConstants, with its table where the kernel keeps it.
template <class Int> struct Constants {
  Int c, mantissa_mask, flush_below, lowest_exponent;
  std::int32_t segment_bits;
  bool fast;
  const Int* table;
};
struct Form {
  struct {
    std::int32_t form, corrections;
  } params;
};

template <class T> using IntegerOf = typename Unit<typename T::E>::S;
template <class T> auto constants_of(const fastops_mitchell& m, fastops_dtype dtype) {
  const auto copy = [](const auto& k) {
    return Constants<IntegerOf<T>>{k.c,    k.mantissa_mask, k.flush_below, k.lowest_exponent, k.segment_bits,
                                   k.fast, nullptr};
  };
  if constexpr (sizeof(typename T::E) == 4)
    return copy(m.single[dtype]);
  else
    return copy(m.wide);
}

template <class T> inline constexpr int kItems = 16 / sizeof(typename T::S);
template <class T> using PackOf = Vector<typename T::S, kItems<T>>;

inline bool is_dense(int ndim, const std::size_t* shape, const std::ptrdiff_t* stride) noexcept {
  std::ptrdiff_t expected = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (stride[d] != expected) return false;
    expected *= static_cast<std::ptrdiff_t>(shape[d]);
  }
  return true;
}
// To a pack.
inline bool is_aligned(const void* p) noexcept { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace fastops::FASTOPS_LEVEL::mitchell
#endif
