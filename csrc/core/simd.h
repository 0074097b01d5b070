// SPDX-License-Identifier: BSD-3-Clause
// Lane types of this level's native width, by GCC and Clang vector extensions. Intrinsics stand here, in half.h (the
// conversions) and in one load of mitchell_lut_kernels.cpp, nowhere else.
// Compiled once per level: everything lies in that level's namespace, so that no linker can mix levels. With
// FASTOPS_SCALAR the level's vector is one number: what a thread of a GPU computes with.
#ifndef FASTOPS_CORE_SIMD_H
#define FASTOPS_CORE_SIMD_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(FASTOPS_SCALAR)
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTOPS_LEVEL
#error "FASTOPS_LEVEL names the level's namespace"
#endif

// Functions for both sides where nvcc compiles them.
#if defined(__CUDACC__)
#define FASTOPS_HD __host__ __device__
#else
#define FASTOPS_HD
#endif
#define FASTOPS_INLINE FASTOPS_HD inline __attribute__((always_inline))

#if defined(FASTOPS_SCALAR)
#include "core/simd_scalar.h"
#else

namespace fastops::FASTOPS_LEVEL {

// FASTOPS_LANE_BYTES emulates lanes of another width by plain vector code: a test of loops and tiles, not of speed.
#if defined(FASTOPS_LANE_BYTES)
inline constexpr std::size_t kBytes = FASTOPS_LANE_BYTES;
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTOPS_AVX512 1
inline constexpr std::size_t kBytes = 64;
#elif defined(__AVX2__)
#define FASTOPS_AVX2 1
inline constexpr std::size_t kBytes = 32;
#elif defined(__x86_64__)
#define FASTOPS_SSE 1
inline constexpr std::size_t kBytes = 16;
#else
#define FASTOPS_NEON 1
inline constexpr std::size_t kBytes = 16;
#endif

// 32 vector registers, or the tiles meant for them.
#if defined(FASTOPS_AVX512) || defined(FASTOPS_NEON) || (defined(FASTOPS_LANE_BYTES) && FASTOPS_LANE_BYTES == 64)
#define FASTOPS_32_REGISTERS 1
#endif

// Whether fma rounds once at this level.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr bool kFusedMultiplyAdd = true;
#else
inline constexpr bool kFusedMultiplyAdd = false;
#endif

namespace simd {

template <class T, std::size_t Bytes = kBytes> struct LaneType {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T> using lanes = typename LaneType<T>::type;

using f32 = lanes<float>;
using f64 = lanes<double>;
using i32 = lanes<std::int32_t>;
using u32 = lanes<std::uint32_t>;
using i64 = lanes<std::int64_t>;
using u64 = lanes<std::uint64_t>;
using u16 = lanes<std::uint16_t>;
using u8 = lanes<std::uint8_t>;
// As many 16-bit elements as f32 has lanes.
using half_u16 = LaneType<std::uint16_t, kBytes / 2>::type;

template <class V> inline constexpr std::size_t kLanes = sizeof(V) / sizeof(V{}[0]);

template <class V, class T> FASTOPS_INLINE V load(const T* p) {
  static_assert(sizeof(V{}[0]) == sizeof(T));
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FASTOPS_INLINE void store(T* p, V v) {
  static_assert(sizeof(V{}[0]) == sizeof(T));
  std::memcpy(p, &v, sizeof v);
}
template <class V, class T> FASTOPS_INLINE V splat(T x) { return x - V{}; }
template <class To, class From> FASTOPS_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class M, class V> FASTOPS_INLINE V select(M mask, V yes, V no) { return mask ? yes : no; }
template <class To, class From> FASTOPS_INLINE To convert(From v) { return __builtin_convertvector(v, To); }
template <class V> using Element = decltype(V{}[0] + V{}[0]);

// 0, 1, 2 ... by lane.
FASTOPS_INLINE u32 lane_numbers() {
  u32 r{};
  for (std::size_t i = 0; i < kLanes<u32>; ++i) r[i] = static_cast<std::uint32_t>(i);
  return r;
}
FASTOPS_INLINE int leading_zeros(std::uint64_t v) { return __builtin_clzll(v); }  // v > 0

// The same value, of which the compiler knows nothing: arithmetic on it happens, and raises its flags, at run time.
// Volatile: otherwise the compiler computes it early, for the one arm of a later select that looks at the result.
template <class V> FASTOPS_INLINE V opaque(V v) {
#if defined(FASTOPS_LANE_BYTES)
  __asm__ volatile("" : "+m"(v));
#elif defined(__x86_64__)
  __asm__ volatile("" : "+x"(v));
#else
  __asm__ volatile("" : "+w"(v));
#endif
  return v;
}

// The first n < lanes elements; the rest is `fill`. Nothing past p + n is read.
template <class V, class T> FASTOPS_INLINE V load_first(const T* p, std::size_t n, T fill) {
#if defined(FASTOPS_AVX512)
  if constexpr (sizeof(T) == 4 && sizeof(V) == kBytes) {
    const V filled = splat<V>(fill);
    return (V)_mm512_mask_loadu_epi32((__m512i)filled, __mmask16((1u << n) - 1), p);
  } else if constexpr (sizeof(T) == 8 && sizeof(V) == kBytes) {
    const V filled = splat<V>(fill);
    return (V)_mm512_mask_loadu_epi64((__m512i)filled, __mmask8((1u << n) - 1), p);
  }
#elif defined(FASTOPS_AVX2)
  if constexpr (sizeof(T) == 4 && sizeof(V) == kBytes) {
    const i32 mask = lanes<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<std::int32_t>(n);
    return select(mask, (V)_mm256_maskload_epi32((const int*)p, (__m256i)mask), splat<V>(fill));
  } else if constexpr (sizeof(T) == 8 && sizeof(V) == kBytes) {
    const i64 mask = lanes<std::int64_t>{0, 1, 2, 3} < static_cast<std::int64_t>(n);
    return select(mask, (V)_mm256_maskload_epi64((const long long*)p, (__m256i)mask), splat<V>(fill));
  }
#endif
  // One by one: a copy of n bytes makes the compiler warn of an n beyond the lanes.
  alignas(sizeof(V)) T t[kLanes<V>];
  for (std::size_t i = 0; i < kLanes<V>; ++i) {
    t[i] = fill;
    if (i < n) std::memcpy(&t[i], p + i, sizeof(T));
  }
  return load<V>(t);
}
template <class V, class T> FASTOPS_INLINE void store_first(T* p, V v, std::size_t n) {
#if defined(FASTOPS_AVX512)
  if constexpr (sizeof(T) == 4 && sizeof(V) == kBytes)
    return _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), (__m512i)v);
  else if constexpr (sizeof(T) == 8 && sizeof(V) == kBytes)
    return _mm512_mask_storeu_epi64(p, __mmask8((1u << n) - 1), (__m512i)v);
#elif defined(FASTOPS_AVX2)
  // Masked stores take many steps on some CPUs: halves, quarters and eighths in their place.
  if constexpr (sizeof(T) >= 4 && sizeof(V) == kBytes) {
    constexpr std::size_t half = 16 / sizeof(T);
    __m128i part = _mm256_castsi256_si128((__m256i)v);
    if (n & half) {
      _mm_storeu_si128((__m128i*)p, part);
      part = _mm256_extracti128_si256((__m256i)v, 1);
      p += half;
    }
    if (n & (half / 2)) {
      _mm_storel_epi64((__m128i*)p, part);
      part = _mm_unpackhi_epi64(part, part);
      p += half / 2;
    }
    if (half == 4 && (n & 1)) {
      const int last = _mm_cvtsi128_si32(part);
      std::memcpy(p, &last, 4);
    }
    return;
  }
#endif
  alignas(sizeof(V)) T t[kLanes<V>];
  store(t, v);
  std::memcpy(p, t, n * sizeof(T));
}

// As many small integers as i32 has lanes, widened.
template <class T> FASTOPS_INLINE i32 load_widened(const T* p) {
  static_assert(sizeof(T) <= 2);
#if defined(FASTOPS_AVX512)
  if constexpr (sizeof(T) == 1) {
    const __m128i v = _mm_loadu_si128((const __m128i*)p);
    return T(-1) < T(0) ? (i32)_mm512_maskz_cvtepi8_epi32(__mmask16(-1), v)
                        : (i32)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), v);
  } else {
    const __m256i v = _mm256_loadu_si256((const __m256i*)p);
    return T(-1) < T(0) ? (i32)_mm512_maskz_cvtepi16_epi32(__mmask16(-1), v)
                        : (i32)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), v);
  }
#elif defined(FASTOPS_AVX2)
  if constexpr (sizeof(T) == 1) {
    const __m128i v = _mm_loadl_epi64((const __m128i*)p);
    return T(-1) < T(0) ? (i32)_mm256_cvtepi8_epi32(v) : (i32)_mm256_cvtepu8_epi32(v);
  } else {
    const __m128i v = _mm_loadu_si128((const __m128i*)p);
    return T(-1) < T(0) ? (i32)_mm256_cvtepi16_epi32(v) : (i32)_mm256_cvtepu16_epi32(v);
  }
#elif defined(FASTOPS_SSE)
  if constexpr (sizeof(T) == 1) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    const __m128i v = _mm_cvtsi32_si128(four);
    return T(-1) < T(0) ? (i32)_mm_cvtepi8_epi32(v) : (i32)_mm_cvtepu8_epi32(v);
  } else {
    const __m128i v = _mm_loadl_epi64((const __m128i*)p);
    return T(-1) < T(0) ? (i32)_mm_cvtepi16_epi32(v) : (i32)_mm_cvtepu16_epi32(v);
  }
#else
  typedef T Packed __attribute__((vector_size(kLanes<i32> * sizeof(T))));
  return __builtin_convertvector(load<Packed>(p), i32);
#endif
}

// a * b + c, rounded once wherever the level has FMA (all but v2).
FASTOPS_INLINE f32 fma(f32 a, f32 b, f32 c) {
#if defined(FASTOPS_AVX512)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTOPS_AVX2)
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FASTOPS_NEON)
  return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  if constexpr (!kFusedMultiplyAdd) return a * b + c;
  f32 r = a;
  for (std::size_t i = 0; i < kLanes<f32>; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
FASTOPS_INLINE f64 fma(f64 a, f64 b, f64 c) {
#if defined(FASTOPS_AVX512)
  return (f64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FASTOPS_AVX2)
  return (f64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(FASTOPS_NEON)
  return (f64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  if constexpr (!kFusedMultiplyAdd) return a * b + c;
  f64 r = a;
  for (std::size_t i = 0; i < kLanes<f64>; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
#endif
}

// Correctly rounded square roots. (AVX-512: the unmasked intrinsics warn of an uninitialised value with GCC 12.)
FASTOPS_INLINE f32 sqrt(f32 a) {
#if defined(FASTOPS_AVX512)
  return (f32)_mm512_mask_sqrt_ps((__m512)a, 0xffff, (__m512)a);
#elif defined(FASTOPS_AVX2)
  return (f32)_mm256_sqrt_ps((__m256)a);
#elif defined(FASTOPS_SSE)
  return (f32)_mm_sqrt_ps((__m128)a);
#elif defined(FASTOPS_NEON)
  return (f32)vsqrtq_f32((float32x4_t)a);
#else
  f32 r = a;
  for (std::size_t i = 0; i < kLanes<f32>; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}
FASTOPS_INLINE f64 sqrt(f64 a) {
#if defined(FASTOPS_AVX512)
  return (f64)_mm512_mask_sqrt_pd((__m512d)a, 0xff, (__m512d)a);
#elif defined(FASTOPS_AVX2)
  return (f64)_mm256_sqrt_pd((__m256d)a);
#elif defined(FASTOPS_SSE)
  return (f64)_mm_sqrt_pd((__m128d)a);
#elif defined(FASTOPS_NEON)
  return (f64)vsqrtq_f64((float64x2_t)a);
#else
  f64 r = a;
  for (std::size_t i = 0; i < kLanes<f64>; ++i) r[i] = __builtin_sqrt(a[i]);
  return r;
#endif
}

// The larger of each pair of lanes; of a nan either.
FASTOPS_INLINE f32 max(f32 a, f32 b) {
#if defined(FASTOPS_AVX512)
  return (f32)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(FASTOPS_AVX2)
  return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(FASTOPS_SSE)
  return (f32)_mm_max_ps((__m128)a, (__m128)b);
#elif defined(FASTOPS_NEON)
  return (f32)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}
FASTOPS_INLINE f64 max(f64 a, f64 b) {
#if defined(FASTOPS_AVX512)
  return (f64)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
#elif defined(FASTOPS_AVX2)
  return (f64)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(FASTOPS_SSE)
  return (f64)_mm_max_pd((__m128d)a, (__m128d)b);
#elif defined(FASTOPS_NEON)
  return (f64)vmaxq_f64((float64x2_t)a, (float64x2_t)b);
#else
  return a > b ? a : b;
#endif
}

// Of integers; by comparisons and masks the compiler makes a chain of them three times as long.
FASTOPS_INLINE i32 max(i32 a, i32 b) {
#if defined(FASTOPS_AVX512)
  return (i32)_mm512_maskz_max_epi32(__mmask16(-1), (__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}
FASTOPS_INLINE i32 min(i32 a, i32 b) {
#if defined(FASTOPS_AVX512)
  return (i32)_mm512_maskz_min_epi32(__mmask16(-1), (__m512i)a, (__m512i)b);
#else
  return a < b ? a : b;
#endif
}
FASTOPS_INLINE i64 max(i64 a, i64 b) {
#if defined(FASTOPS_AVX512)
  return (i64)_mm512_maskz_max_epi64(__mmask8(-1), (__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}
FASTOPS_INLINE i64 min(i64 a, i64 b) {
#if defined(FASTOPS_AVX512)
  return (i64)_mm512_maskz_min_epi64(__mmask8(-1), (__m512i)a, (__m512i)b);
#else
  return a < b ? a : b;
#endif
}

// True where any lane of a comparison's result is set.
template <class M> FASTOPS_INLINE bool any(M mask) {
#if defined(FASTOPS_AVX512)
  if constexpr (sizeof(mask[0]) == 4)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
  else
    return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(FASTOPS_AVX2)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(FASTOPS_SSE)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#elif defined(FASTOPS_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  bool found = false;
  for (std::size_t i = 0; i < kLanes<M>; ++i) found |= mask[i] != 0;
  return found;
#endif
}

// Bit i: whether byte i of a comparison's result is set.
template <class M> FASTOPS_INLINE std::uint64_t bits_of_bytes(M mask) {
  static_assert(sizeof(mask[0]) == 1);
#if defined(FASTOPS_AVX512)
  return _mm512_movepi8_mask((__m512i)mask);
#elif defined(FASTOPS_AVX2)
  return static_cast<std::uint32_t>(_mm256_movemask_epi8((__m256i)mask));
#elif defined(FASTOPS_SSE)
  return static_cast<std::uint32_t>(_mm_movemask_epi8((__m128i)mask));
#elif defined(FASTOPS_NEON)
  const uint8x16_t place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t set = vandq_u8((uint8x16_t)mask, place);
  return vaddv_u8(vget_low_u8(set)) | static_cast<std::uint64_t>(vaddv_u8(vget_high_u8(set))) << 8;
#else
  std::uint64_t found = 0;
  for (std::size_t i = 0; i < kLanes<M>; ++i) found |= std::uint64_t{mask[i] != 0} << i;
  return found;
#endif
}

// Store past the caches; p is aligned to kBytes. stream_fence() before other threads may read.
FASTOPS_INLINE void stream(float* p, f32 v) {
#if defined(FASTOPS_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(FASTOPS_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(FASTOPS_SSE)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
FASTOPS_INLINE void stream(double* p, f64 v) { stream(reinterpret_cast<float*>(p), bits<f32>(v)); }
FASTOPS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// table[index] for a table of 16 entries; index lanes in 0 .. 15.
FASTOPS_INLINE i32 lookup16(const std::int32_t* table, i32 index) {
#if defined(FASTOPS_AVX512)
  return (i32)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)index, _mm512_loadu_si512(table));
#elif defined(FASTOPS_AVX2)
  const __m256i low = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)table), (__m256i)index);
  const __m256i high = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)(table + 8)), (__m256i)index);
  return select(index > 7, (i32)high, (i32)low);
#else
  i32 r{};
  for (std::size_t i = 0; i < kLanes<i32>; ++i) r[i] = table[index[i]];
  return r;
#endif
}

// table[index], lane by lane; the whole table is the caller's.
FASTOPS_INLINE i32 gather(const std::int32_t* table, i32 index) {
#if defined(FASTOPS_AVX512)
  return (i32)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), __mmask16(-1), (__m512i)index, table, 4);
#elif defined(FASTOPS_AVX2)
  return (i32)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
  i32 r{};
  for (std::size_t i = 0; i < kLanes<i32>; ++i) r[i] = table[index[i]];
  return r;
#endif
}
FASTOPS_INLINE i64 gather(const std::int64_t* table, i64 index) {
#if defined(FASTOPS_AVX512)
  return (i64)_mm512_mask_i64gather_epi64(_mm512_setzero_si512(), __mmask8(-1), (__m512i)index, table, 8);
#elif defined(FASTOPS_AVX2)
  return (i64)_mm256_i64gather_epi64(reinterpret_cast<const long long*>(table), (__m256i)index, 8);
#else
  i64 r{};
  for (std::size_t i = 0; i < kLanes<i64>; ++i) r[i] = table[index[i]];
  return r;
#endif
}
FASTOPS_INLINE std::int32_t gather(const std::int32_t* table, std::int32_t index) { return table[index]; }
FASTOPS_INLINE std::int64_t gather(const std::int64_t* table, std::int64_t index) { return table[index]; }

// True where every lane of `v` has all the bits of `mask` set.
template <class V, class T> FASTOPS_INLINE bool all_set(V v, T mask) {
  const V wanted = splat<V>(mask);
#if defined(FASTOPS_AVX512)
  const V missing = ~v & wanted;
  if constexpr (sizeof(T) == 4)
    return _mm512_test_epi32_mask((__m512i)missing, (__m512i)missing) == 0;
  else
    return _mm512_test_epi64_mask((__m512i)missing, (__m512i)missing) == 0;
#elif defined(FASTOPS_AVX2)
  return _mm256_testc_si256((__m256i)v, (__m256i)wanted) != 0;
#elif defined(FASTOPS_SSE)
  return _mm_testc_si128((__m128i)v, (__m128i)wanted) != 0;
#elif defined(FASTOPS_NEON)
  return vmaxvq_u32((uint32x4_t)(~v & wanted)) == 0;
#else
  return !any((~v & wanted) != V{});
#endif
}
FASTOPS_INLINE i64 lookup16(const std::int64_t* table, i64 index) {
#if defined(FASTOPS_AVX512)
  return (i64)_mm512_permutex2var_epi64(_mm512_loadu_si512(table), (__m512i)index, _mm512_loadu_si512(table + 8));
#else
  return gather(table, index);
#endif
}

#if !defined(FASTOPS_AVX512) && !defined(FASTOPS_AVX2) && !defined(FASTOPS_SSE) && !defined(FASTOPS_NEON)
template <int Size, int Offset> FASTOPS_INLINE i32 interleave_generic(i32 a, i32 b) {
  unsigned char from_a[kBytes], from_b[kBytes], to[kBytes];
  std::memcpy(from_a, &a, kBytes);
  std::memcpy(from_b, &b, kBytes);
  for (std::size_t part = 0; part < kBytes; part += 16)
    for (std::size_t i = 0; i < 8; i += Size) {
      std::memcpy(to + part + 2 * i, from_a + part + Offset + i, Size);
      std::memcpy(to + part + 2 * i + Size, from_b + part + Offset + i, Size);
    }
  return load<i32>(reinterpret_cast<const std::int32_t*>(to));
}
#endif

// Interleaves elements of Size bytes within each 128-bit part: a0 b0 a1 b1 ... of the lower or the upper halves.
template <int Size> FASTOPS_INLINE i32 interleave_low(i32 a, i32 b) {
  static_assert(Size == 2 || Size == 4 || Size == 8);
#if defined(FASTOPS_AVX512)
  if constexpr (Size == 2) return (i32)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  if constexpr (Size == 4) return (i32)_mm512_maskz_unpacklo_epi32(__mmask16(-1), (__m512i)a, (__m512i)b);
  if constexpr (Size == 8) return (i32)_mm512_maskz_unpacklo_epi64(__mmask8(-1), (__m512i)a, (__m512i)b);
#elif defined(FASTOPS_AVX2)
  if constexpr (Size == 2) return (i32)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
  if constexpr (Size == 4) return (i32)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  if constexpr (Size == 8) return (i32)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#elif defined(FASTOPS_SSE)
  if constexpr (Size == 2) return (i32)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
  if constexpr (Size == 4) return (i32)_mm_unpacklo_epi32((__m128i)a, (__m128i)b);
  if constexpr (Size == 8) return (i32)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
#elif defined(FASTOPS_NEON)
  if constexpr (Size == 2) return (i32)vzip1q_s16((int16x8_t)a, (int16x8_t)b);
  if constexpr (Size == 4) return (i32)vzip1q_s32((int32x4_t)a, (int32x4_t)b);
  if constexpr (Size == 8) return (i32)vzip1q_s64((int64x2_t)a, (int64x2_t)b);
#else
  return interleave_generic<Size, 0>(a, b);
#endif
}
template <int Size> FASTOPS_INLINE i32 interleave_high(i32 a, i32 b) {
  static_assert(Size == 2 || Size == 4 || Size == 8);
#if defined(FASTOPS_AVX512)
  if constexpr (Size == 2) return (i32)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
  if constexpr (Size == 4) return (i32)_mm512_maskz_unpackhi_epi32(__mmask16(-1), (__m512i)a, (__m512i)b);
  if constexpr (Size == 8) return (i32)_mm512_maskz_unpackhi_epi64(__mmask8(-1), (__m512i)a, (__m512i)b);
#elif defined(FASTOPS_AVX2)
  if constexpr (Size == 2) return (i32)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
  if constexpr (Size == 4) return (i32)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  if constexpr (Size == 8) return (i32)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#elif defined(FASTOPS_SSE)
  if constexpr (Size == 2) return (i32)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
  if constexpr (Size == 4) return (i32)_mm_unpackhi_epi32((__m128i)a, (__m128i)b);
  if constexpr (Size == 8) return (i32)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
#elif defined(FASTOPS_NEON)
  if constexpr (Size == 2) return (i32)vzip2q_s16((int16x8_t)a, (int16x8_t)b);
  if constexpr (Size == 4) return (i32)vzip2q_s32((int32x4_t)a, (int32x4_t)b);
  if constexpr (Size == 8) return (i32)vzip2q_s64((int64x2_t)a, (int64x2_t)b);
#else
  return interleave_generic<Size, 8>(a, b);
#endif
}
// Transposes, within each 128-bit part, the elements of Size bytes of as many vectors as a part has elements.
template <int Size> FASTOPS_INLINE void turn(i32 (&x)[16 / Size]) {
  static_assert(Size == 4 || Size == 8);
  const i32 a = interleave_low<Size>(x[0], x[1]), b = interleave_high<Size>(x[0], x[1]);
  if constexpr (Size == 8) {
    x[0] = a;
    x[1] = b;
  } else {
    const i32 c = interleave_low<4>(x[2], x[3]), d = interleave_high<4>(x[2], x[3]);
    x[0] = interleave_low<8>(a, c);
    x[1] = interleave_high<8>(a, c);
    x[2] = interleave_low<8>(b, d);
    x[3] = interleave_high<8>(b, d);
  }
}

// The 128-bit parts, `stride` bytes apart.
FASTOPS_INLINE void store_parts(char* to, std::size_t stride, i32 v) {
#if defined(FASTOPS_AVX512)
  _mm_storeu_si128((__m128i*)to, _mm512_maskz_extracti32x4_epi32(__mmask8(-1), (__m512i)v, 0));
  _mm_storeu_si128((__m128i*)(to + stride), _mm512_maskz_extracti32x4_epi32(__mmask8(-1), (__m512i)v, 1));
  _mm_storeu_si128((__m128i*)(to + 2 * stride), _mm512_maskz_extracti32x4_epi32(__mmask8(-1), (__m512i)v, 2));
  _mm_storeu_si128((__m128i*)(to + 3 * stride), _mm512_maskz_extracti32x4_epi32(__mmask8(-1), (__m512i)v, 3));
#elif defined(FASTOPS_AVX2)
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128((__m256i)v));
  _mm_storeu_si128((__m128i*)(to + stride), _mm256_extracti128_si256((__m256i)v, 1));
#else
  alignas(kBytes) char parts[kBytes];
  std::memcpy(parts, &v, kBytes);
  for (std::size_t p = 0; p < kBytes / 16; ++p) std::memcpy(to + p * stride, parts + 16 * p, 16);
#endif
}

// Of as many entries as two vectors have, the one that each index names; bits of the index above that are ignored.
FASTOPS_INLINE u16 lookup_pair(u16 low, u16 high, u16 index) {
#if defined(FASTOPS_AVX512)
  return (u16)_mm512_permutex2var_epi16((__m512i)low, (__m512i)index, (__m512i)high);
#else
  u16 r{};
  for (std::size_t i = 0; i < kLanes<u16>; ++i) {
    const std::size_t at = index[i] % (2 * kLanes<u16>);
    r[i] = at < kLanes<u16> ? low[at] : high[at - kLanes<u16>];
  }
  return r;
#endif
}
// `yes` where the lane's bit is set.
FASTOPS_INLINE u16 select_bits(std::uint32_t mask, u16 yes, u16 no) {
#if defined(FASTOPS_AVX512)
  return (u16)_mm512_mask_blend_epi16(mask, (__m512i)no, (__m512i)yes);
#else
  for (std::size_t i = 0; i < kLanes<u16>; ++i) no[i] = (mask >> i & 1) != 0 ? yes[i] : no[i];
  return no;
#endif
}

// Sums of neighbouring signed 16-bit elements.
FASTOPS_INLINE i32 add_pairs16(i32 v) {
#if defined(FASTOPS_AVX512)
  return (i32)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#elif defined(FASTOPS_AVX2)
  return (i32)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#elif defined(FASTOPS_SSE)
  return (i32)_mm_madd_epi16((__m128i)v, _mm_set1_epi16(1));
#elif defined(FASTOPS_NEON)
  return (i32)vpaddlq_s16((int16x8_t)v);
#else
  const i32 low = (v << 16) >> 16;
  return low + (v >> 16);
#endif
}

}  // namespace simd

// Subnormal operands and results are zero in this thread while the object lives. The work belongs in a noinline
// function called inside its scope: compilers move arithmetic across a write of the control register.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() noexcept : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr((saved_ & ~0x3fu) | (_mm_getcsr() & 0x3fu)); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (std::uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace fastops::FASTOPS_LEVEL
#endif  // FASTOPS_SCALAR
#endif
