// SPDX-License-Identifier: BSD-3-Clause
// Lanes of one number, for GPU threads and the host code beside them: what simd.h offers to the mathematics, on
// scalars.
#ifndef FASTOPS_CORE_SIMD_SCALAR_H
#define FASTOPS_CORE_SIMD_SCALAR_H

#ifndef FASTOPS_CORE_SIMD_H
#error "include core/simd.h"
#endif

namespace fastops::FASTOPS_LEVEL {

inline constexpr bool kFusedMultiplyAdd = true;

namespace simd {

using f32 = float;
using f64 = double;
using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;
using u64 = std::uint64_t;

template <class V> inline constexpr std::size_t kLanes = 1;
template <class V> using Element = V;

template <class V, class T> FASTOPS_INLINE V load(const T* p) {
  static_assert(sizeof(V) == sizeof(T));
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FASTOPS_INLINE void store(T* p, V v) {
  static_assert(sizeof(V) == sizeof(T));
  std::memcpy(p, &v, sizeof v);
}
template <class V, class T> FASTOPS_INLINE V splat(T x) { return static_cast<V>(x); }
template <class To, class From> FASTOPS_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class M, class V> FASTOPS_INLINE V select(M mask, V yes, V no) { return mask ? yes : no; }
template <class To, class From> FASTOPS_INLINE To convert(From v) { return static_cast<To>(v); }
template <class V> FASTOPS_INLINE V opaque(V v) { return v; }  // there are no status flags to raise
FASTOPS_INLINE u32 lane_numbers() { return 0; }
FASTOPS_INLINE int leading_zeros(std::uint64_t v) {
#if defined(__CUDA_ARCH__)
  return __clzll(static_cast<long long>(v));
#else
  return __builtin_clzll(v);
#endif
}

FASTOPS_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FASTOPS_INLINE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}
FASTOPS_INLINE float sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}
FASTOPS_INLINE double sqrt(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return __builtin_sqrt(a);
#endif
}
template <class V> FASTOPS_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class M> FASTOPS_INLINE bool any(M mask) { return mask; }
template <class T> FASTOPS_INLINE T gather(const T* table, T index) { return table[index]; }
template <class T> FASTOPS_INLINE T lookup16(const T* table, T index) { return table[index]; }
template <class V, class T> FASTOPS_INLINE bool all_set(V v, T mask) {
  return (v & static_cast<V>(mask)) == static_cast<V>(mask);
}

}  // namespace simd
}  // namespace fastops::FASTOPS_LEVEL
#endif
