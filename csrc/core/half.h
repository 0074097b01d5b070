// SPDX-License-Identifier: BSD-3-Clause
// float16 and bfloat16 to float32 and back, lanes and scalars, rounding to nearest even; overflow raises its IEEE flag.
#ifndef FASTOPS_CORE_HALF_H
#define FASTOPS_CORE_HALF_H

#include "core/simd.h"

namespace fastops::FASTOPS_LEVEL {
namespace half {

// The mathematics of the software conversions, for F = float (I = int32_t) or a lane type.
template <class F, class I> FASTOPS_INLINE F widen_f16(I h) {
  const I magnitude = (h & 0x7fff) << 13;
  const I exponent = h & 0x7c00;
  // Subnormals: one float subtraction normalises them exactly.
  const F tiny = simd::bits<F>(magnitude + 0x38800000) - simd::bits<F>(I{} + 0x38800000);
  const I large = magnitude + 0x38000000;
  I r = simd::select(exponent == 0, simd::bits<I>(tiny), large);
  r = simd::select(exponent == 0x7c00, large + 0x38000000, r);
  return simd::bits<F>(r | ((h & 0x8000) << 16));
}
template <class F, class I> FASTOPS_INLINE I narrow_f16(F f) {
  const I u = simd::bits<I>(f);
  const I magnitude = u & 0x7fffffff;
  const auto is_small = magnitude < 0x38800000;   // below float16's smallest normal
  const auto is_large = magnitude >= 0x47800000;  // 2^16 and above, infinity, nan
  const I normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts the last kept bit of a subnormal result where float's rounding happens.
  const F sum = simd::bits<F>(simd::select(is_small, magnitude, I{})) + simd::bits<F>(I{} + 0x3f000000);
  I r = simd::select(is_small, simd::bits<I>(sum) - 0x3f000000, normal);
  r = simd::select(is_large, simd::select(magnitude > 0x7f800000, I{} + 0x7e00, I{} + 0x7c00), r);
  // A finite value that became infinity: the largest float, doubled, says so to the status flags.
  const auto overflow = (r >= 0x7c00) & (magnitude < 0x7f800000);
  const F raised = simd::opaque(simd::bits<F>(simd::select(overflow, I{} + 0x7f7fffff, I{} + 0x3f800000))) * 2.0f;
  r = simd::select(overflow, simd::bits<I>(raised) >> 13 & 0x7c00, r);
  return r | ((u >> 16) & 0x8000);
}
template <class F, class I> FASTOPS_INLINE I narrow_bf16(F f) {
  const I u = simd::bits<I>(f);
  const I magnitude = u & 0x7fffffff;
  I r = (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16;
  r = simd::select(magnitude > 0x7f800000, I{} + 0x7fc0, r);
  const auto overflow = (r == 0x7f80) & (magnitude < 0x7f800000);
  const F raised = simd::opaque(simd::bits<F>(simd::select(overflow, I{} + 0x7f7fffff, I{} + 0x3f800000))) * 2.0f;
  r = simd::select(overflow, simd::bits<I>(raised) >> 16 & 0x7f80, r);
  return r | ((u >> 16) & 0x8000);
}

FASTOPS_INLINE float from_f16(std::uint16_t h) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
#elif defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return widen_f16<float, std::int32_t>(h);
#endif
}
FASTOPS_INLINE std::uint16_t to_f16(float f) {
#if defined(__CUDA_ARCH__)
  std::uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
#elif defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  return static_cast<std::uint16_t>(narrow_f16<float, std::int32_t>(f));
#endif
}
FASTOPS_INLINE float from_bf16(std::uint16_t h) {
  return simd::bits<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(h) << 16));
}
FASTOPS_INLINE std::uint16_t to_bf16(float f) {
#if defined(__CUDA_ARCH__)
  std::uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
#else
  return static_cast<std::uint16_t>(narrow_bf16<float, std::int32_t>(f));
#endif
}

#if !defined(FASTOPS_SCALAR)
FASTOPS_INLINE simd::i32 widen_bits(simd::half_u16 h) {
#if defined(FASTOPS_AVX512)
  return (simd::i32)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)h);
#elif defined(FASTOPS_AVX2)
  return (simd::i32)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, simd::i32);
#endif
}
// Lanes hold 0 .. 65535. (GCC 12 warns about the unmasked AVX-512 intrinsics; all-ones masks cost nothing.)
FASTOPS_INLINE simd::half_u16 narrow_bits(simd::i32 v) {
#if defined(FASTOPS_AVX512)
  return (simd::half_u16)_mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)v);
#elif defined(FASTOPS_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (simd::half_u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, simd::half_u16);
#endif
}

FASTOPS_INLINE simd::f32 from_f16(simd::half_u16 h) {
#if defined(FASTOPS_AVX512)
  return (simd::f32)_mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)h);
#elif defined(FASTOPS_AVX2)
  return (simd::f32)_mm256_cvtph_ps((__m128i)h);
#elif defined(FASTOPS_NEON)
  return (simd::f32)vcvt_f32_f16((float16x4_t)h);
#else
  return widen_f16<simd::f32, simd::i32>(widen_bits(h));
#endif
}
FASTOPS_INLINE simd::half_u16 to_f16(simd::f32 f) {
#if defined(FASTOPS_AVX512)
  return (simd::half_u16)_mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(FASTOPS_AVX2)
  return (simd::half_u16)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(FASTOPS_NEON)
  return (simd::half_u16)vcvt_f16_f32((float32x4_t)f);
#else
  return narrow_bits(narrow_f16<simd::f32, simd::i32>(f));
#endif
}
FASTOPS_INLINE simd::f32 from_bf16(simd::half_u16 h) { return simd::bits<simd::f32>(widen_bits(h) << 16); }
// Magnitudes whose bits are from here on round to infinity, or are infinity or nan.
inline constexpr std::int32_t kLargeForBf16 = 0x7f7f8000;
// Of values below that.
FASTOPS_INLINE simd::half_u16 finite_to_bf16(simd::f32 f) {
  const simd::u32 u = simd::bits<simd::u32>(f);
  return narrow_bits(simd::bits<simd::i32>((u + 0x7fff + ((u >> 16) & 1)) >> 16));
}
FASTOPS_INLINE simd::half_u16 to_bf16(simd::f32 f) { return narrow_bits(narrow_bf16<simd::f32, simd::i32>(f)); }
#endif

}  // namespace half
}  // namespace fastops::FASTOPS_LEVEL
#endif
