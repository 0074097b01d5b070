// SPDX-License-Identifier: BSD-3-Clause
// Loops of the element-wise Mitchell operations; compiled once per CPU level.
#include "mitchell/mitchell_kernels.h"

#include <limits>
#include <type_traits>

#include "core/half.h"
#include "core/simd.h"
#include "mitchell/mitchell_math.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace mitchell;
using simd::f32;
using simd::f64;

// Dtypes: what lies in memory (S), the lanes (F) and the scalar (E) it is computed in.

// store_normal: of a value known to be normal in its dtype. load_first fills up with ones.
struct Float32 {
  using S = float;
  using F = f32;
  using E = float;
  static constexpr bool kStreams = true;
  static FASTOPS_INLINE F load(const S* p) { return simd::load<F>(p); }
  static FASTOPS_INLINE void store(S* p, F v) { simd::store(p, v); }
  static FASTOPS_INLINE void store_normal(S* p, F v) { simd::store(p, v); }
  static FASTOPS_INLINE F load_first(const S* p, std::size_t n) { return simd::load_first<F>(p, n, S{1}); }
  static FASTOPS_INLINE void store_first(S* p, F v, std::size_t n) { simd::store_first(p, v, n); }
  static FASTOPS_INLINE E get(S s) { return s; }
  static FASTOPS_INLINE S put(E e) { return e; }
  static const MitchellConstants<std::int32_t>& constants(const fastops_mitchell& m) { return m.single[FASTOPS_F32]; }
};
struct Float16 {
  using S = std::uint16_t;
  using F = f32;
  using E = float;
  static constexpr bool kStreams = false;
  static FASTOPS_INLINE F load(const S* p) { return half::from_f16(simd::load<simd::half_u16>(p)); }
  static FASTOPS_INLINE void store(S* p, F v) { simd::store(p, half::to_f16(v)); }
  static FASTOPS_INLINE void store_normal(S* p, F v) { simd::store(p, half::to_f16(v)); }
  static FASTOPS_INLINE F load_first(const S* p, std::size_t n) {
    return half::from_f16(simd::load_first<simd::half_u16>(p, n, S{0x3c00}));
  }
  static FASTOPS_INLINE void store_first(S* p, F v, std::size_t n) { simd::store_first(p, half::to_f16(v), n); }
  static FASTOPS_INLINE E get(S s) { return half::from_f16(s); }
  static FASTOPS_INLINE S put(E e) { return half::to_f16(e); }
  static const MitchellConstants<std::int32_t>& constants(const fastops_mitchell& m) { return m.single[FASTOPS_F16]; }
};
struct BFloat16 {
  using S = std::uint16_t;
  using F = f32;
  using E = float;
  static constexpr bool kStreams = false;
  static FASTOPS_INLINE F load(const S* p) { return half::from_bf16(simd::load<simd::half_u16>(p)); }
  static FASTOPS_INLINE void store(S* p, F v) { simd::store(p, half::to_bf16(v)); }
  static FASTOPS_INLINE void store_normal(S* p, F v) { simd::store(p, half::finite_to_bf16(v)); }
  static FASTOPS_INLINE F load_first(const S* p, std::size_t n) {
    return half::from_bf16(simd::load_first<simd::half_u16>(p, n, S{0x3f80}));
  }
  static FASTOPS_INLINE void store_first(S* p, F v, std::size_t n) { simd::store_first(p, half::to_bf16(v), n); }
  static FASTOPS_INLINE E get(S s) { return half::from_bf16(s); }
  static FASTOPS_INLINE S put(E e) { return half::to_bf16(e); }
  static const MitchellConstants<std::int32_t>& constants(const fastops_mitchell& m) { return m.single[FASTOPS_BF16]; }
};
struct Float64 {
  using S = double;
  using F = f64;
  using E = double;
  static constexpr bool kStreams = true;
  static FASTOPS_INLINE F load(const S* p) { return simd::load<F>(p); }
  static FASTOPS_INLINE void store(S* p, F v) { simd::store(p, v); }
  static FASTOPS_INLINE void store_normal(S* p, F v) { simd::store(p, v); }
  static FASTOPS_INLINE F load_first(const S* p, std::size_t n) { return simd::load_first<F>(p, n, S{1}); }
  static FASTOPS_INLINE void store_first(S* p, F v, std::size_t n) { simd::store_first(p, v, n); }
  static FASTOPS_INLINE E get(S s) { return s; }
  static FASTOPS_INLINE S put(E e) { return e; }
  static const MitchellConstants<std::int64_t>& constants(const fastops_mitchell& m) { return m.wide; }
};

// Loops.

template <class S> FASTOPS_INLINE S read(const char* p) {
  S s;
  std::memcpy(&s, p, sizeof s);
  return s;
}
template <class S> FASTOPS_INLINE void write(char* p, S s) { std::memcpy(p, &s, sizeof s); }

// Operands of any kind. Whole vectors, then fewer elements than one.
template <int op, class T>
__attribute__((noinline)) void full_vectors(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b,
                                            typename T::S* out, std::size_t n) noexcept {
  using F = typename T::F;
  constexpr std::size_t lanes = simd::kLanes<F>;
  const auto& k = T::constants(m);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const F x = T::load(a + i), y = is_binary(op) ? T::load(b + i) : x;
    T::store(out + i, full<op>(x, y, m, k));
  }
  if (i == n) return;
  const F x = T::load_first(a + i, n - i), y = is_binary(op) ? T::load_first(b + i, n - i) : x;
  T::store_first(out + i, full<op>(x, y, m, k), n - i);
}

// Products and quotients of normal numbers and zeros; vectors with anything else take the full path. n in whole
// vectors.
template <int op, class T>
__attribute__((noinline)) void scaled_vectors(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b,
                                              typename T::S* out, std::size_t n) noexcept {
  using F = typename T::F;
  constexpr std::size_t lanes = simd::kLanes<F>;
  const auto& k = T::constants(m);
  if (!is_binary(op) || k.flush_below != 0) return full_vectors<op, T>(m, a, b, out, n);
  const Scaled<op, F> scaled(k);
  for (std::size_t i = 0; i < n; i += lanes) {
    const auto split = scaled(T::load(a + i), T::load(b + i));
    if (__builtin_expect(simd::any(split.rest), 0))
      full_vectors<op, T>(m, a + i, b + i, out + i, lanes);
    else
      T::store(out + i, split.significand * split.scale);
  }
}

// The short path as far as it goes: all of n, or up to the first block or vector with an operand that is not in range.
template <int op, class T, bool cut, bool streams>
FASTOPS_INLINE std::size_t short_vectors(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b,
                                         typename T::S* out, std::size_t n) noexcept {
  using F = typename T::F;
  constexpr std::size_t lanes = simd::kLanes<F>, block = 4 * lanes;
  const Short<op, F, cut> prototype(T::constants(m));
  std::size_t i = 0;
  for (; i + block <= n; i += block) {
    auto s = prototype;
    F r[4];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < 4; ++v) {
      const F x = T::load(a + i + v * lanes);
      r[v] = s(x, is_binary(op) ? T::load(b + i + v * lanes) : x);
    }
    if (__builtin_expect(!s.in_range(), 0)) return i;
#pragma GCC unroll 4
    for (std::size_t v = 0; v < 4; ++v) {
      if constexpr (streams)
        simd::stream(out + i + v * lanes, r[v]);
      else
        T::store_normal(out + i + v * lanes, r[v]);
    }
  }
#pragma GCC unroll 1
  for (; i + lanes <= n; i += lanes) {
    auto s = prototype;
    const F x = T::load(a + i), r = s(x, is_binary(op) ? T::load(b + i) : x);
    if (__builtin_expect(!s.in_range(), 0)) return i;
    T::store_normal(out + i, r);
  }
  if (i < n) {
    auto s = prototype;
    const F x = T::load_first(a + i, n - i), r = s(x, is_binary(op) ? T::load_first(b + i, n - i) : x);
    if (__builtin_expect(!s.in_range(), 0)) return i;
    T::store_first(out + i, r, n - i);
  }
  return n;
}

// From element i, where the short path does not apply. Such operands seldom come alone: a stretch of the way is gone
// without looking for better ones.
template <int op, class T, bool cut, bool streams>
__attribute__((noinline)) fastops_status detour(const fastops_mitchell& m, const typename T::S* a,
                                                const typename T::S* b, typename T::S* out, std::size_t n,
                                                std::size_t i) noexcept {
  constexpr std::size_t lanes = simd::kLanes<typename T::F>;
  for (;;) {
    const std::size_t left = n - i;
    if (left < lanes) {
      full_vectors<op, T>(m, a + i, b + i, out + i, left);
      return FASTOPS_OK;
    }
    const std::size_t stretch = left < 32 * lanes ? left / lanes * lanes : 32 * lanes;
    scaled_vectors<op, T>(m, a + i, b + i, out + i, stretch);
    i += stretch;
    i += short_vectors<op, T, cut, streams>(m, a + i, b + i, out + i, n - i);
    if (i == n) return FASTOPS_OK;
  }
}

// Past the caches; the first elements up to a whole vector's boundary are not.
template <int op, class T, bool cut>
__attribute__((noinline)) fastops_status streamed(const fastops_mitchell& m, const typename T::S* a,
                                                  const typename T::S* b, typename T::S* out, std::size_t n) noexcept {
  std::size_t i = (-reinterpret_cast<std::uintptr_t>(out) % kBytes) / sizeof(typename T::S);
  if (i > n) i = n;
  full_vectors<op, T>(m, a, b, out, i);
  i += short_vectors<op, T, cut, true>(m, a + i, b + i, out + i, n - i);
  if (i < n) detour<op, T, cut, true>(m, a, b, out, n, i);
  simd::stream_fence();
  return FASTOPS_OK;
}
template <int op, class T>
__attribute__((noinline)) fastops_status cut_vectors(const fastops_mitchell& m, const typename T::S* a,
                                                     const typename T::S* b, typename T::S* out,
                                                     std::size_t n) noexcept {
  const std::size_t i = short_vectors<op, T, true, false>(m, a, b, out, n);
  return i < n ? detour<op, T, true, false>(m, a, b, out, n, i) : FASTOPS_OK;
}
template <int op, class T>
__attribute__((noinline)) fastops_status uncommon(const fastops_mitchell& m, const typename T::S* a,
                                                  const typename T::S* b, typename T::S* out, std::size_t n,
                                                  bool stream) noexcept {
  const auto& k = T::constants(m);
  if constexpr (is_sum(op)) {
    const bool cut = k.mantissa_mask != -1;
    if constexpr (T::kStreams)
      if (k.fast && stream)
        return cut ? streamed<op, T, true>(m, a, b, out, n) : streamed<op, T, false>(m, a, b, out, n);
    if (k.fast && cut) return cut_vectors<op, T>(m, a, b, out, n);
  }
  full_vectors<op, T>(m, a, b, out, n);
  return FASTOPS_OK;
}

template <int op, class T>
FASTOPS_INLINE fastops_status contiguous(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b,
                                         typename T::S* out, std::size_t n, bool stream) noexcept {
  if constexpr (is_sum(op)) {
    const auto& k = T::constants(m);
    // No call on the way of a short array of common numbers: it would cost as much as the array.
    if (__builtin_expect(k.fast && k.mantissa_mask == -1 && !(T::kStreams && stream), 1)) {
      const std::size_t i = short_vectors<op, T, false, false>(m, a, b, out, n);
      return __builtin_expect(i == n, 1) ? FASTOPS_OK : detour<op, T, false, false>(m, a, b, out, n, i);
    }
  }
  return uncommon<op, T>(m, a, b, out, n, stream);
}

// One element after another, each reading what the ones before it wrote: reductions and accumulations.
template <int op, class T>
__attribute__((noinline)) void in_order(const fastops_mitchell& m, const MitchellArrays& p, std::size_t n) noexcept {
  using S = typename T::S;
  using E = typename T::E;
  const auto& k = T::constants(m);
  const char *a = p.a, *b = p.b;
  char* out = p.out;
  for (std::size_t i = 0; i < n; ++i) {
    const E x = T::get(read<S>(a)), y = is_binary(op) ? T::get(read<S>(b)) : x;
    write(out, T::put(full<op>(x, y, m, k)));
    a += p.stride_a;
    b += p.stride_b;
    out += p.stride_out;
  }
}

// True where writing `out` changes what is still to be read of an operand of another type or step.
FASTOPS_INLINE bool meets(const char* in, std::ptrdiff_t step, std::size_t size, const MitchellArrays& p,
                          std::size_t out_size, std::size_t n) {
  if (in == p.out && step == p.stride_out) return step == 0;
  const auto last = static_cast<std::ptrdiff_t>(n - 1);
  const auto i0 = reinterpret_cast<std::intptr_t>(in), o0 = reinterpret_cast<std::intptr_t>(p.out);
  const std::intptr_t i1 = i0 + last * step, o1 = o0 + last * p.stride_out;
  const std::intptr_t i_low = i0 < i1 ? i0 : i1, i_high = (i0 < i1 ? i1 : i0) + static_cast<std::intptr_t>(size);
  const std::intptr_t o_low = o0 < o1 ? o0 : o1, o_high = (o0 < o1 ? o1 : o0) + static_cast<std::intptr_t>(out_size);
  return i_low < o_high && o_low < i_high;
}

template <class S> FASTOPS_INLINE void collect(S* to, const char* from, std::ptrdiff_t stride, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = read<S>(from + static_cast<std::ptrdiff_t>(i) * stride);
}

template <int op, class T>
__attribute__((noinline)) void strided(const fastops_mitchell& m, const MitchellArrays& p, std::size_t n) noexcept {
  using S = typename T::S;
  constexpr std::size_t chunk = 1024 / sizeof(S);
  constexpr auto size = static_cast<std::ptrdiff_t>(sizeof(S));
  S buffer_a[chunk], buffer_b[chunk], buffer_out[chunk];
  if (p.stride_a == 0) collect(buffer_a, p.a, 0, n < chunk ? n : chunk);
  if (is_binary(op) && p.stride_b == 0) collect(buffer_b, p.b, 0, n < chunk ? n : chunk);
  for (std::size_t done = 0; done < n; done += chunk) {
    const std::size_t count = n - done < chunk ? n - done : chunk;
    const auto at = static_cast<std::ptrdiff_t>(done);
    const S *a = buffer_a, *b = buffer_b;
    if (p.stride_a == size)
      a = reinterpret_cast<const S*>(p.a + at * size);
    else if (p.stride_a != 0)
      collect(buffer_a, p.a + at * p.stride_a, p.stride_a, count);
    if constexpr (is_binary(op)) {
      if (p.stride_b == size)
        b = reinterpret_cast<const S*>(p.b + at * size);
      else if (p.stride_b != 0)
        collect(buffer_b, p.b + at * p.stride_b, p.stride_b, count);
    }
    if (p.stride_out == size) {
      contiguous<op, T>(m, a, b, reinterpret_cast<S*>(p.out + at * size), count, false);
    } else {
      contiguous<op, T>(m, a, b, buffer_out, count, false);
      for (std::size_t i = 0; i < count; ++i)
        write(p.out + (at + static_cast<std::ptrdiff_t>(i)) * p.stride_out, buffer_out[i]);
    }
  }
}

template <int op, class T>
__attribute__((noinline)) fastops_status general(const fastops_mitchell& m, const MitchellArrays& p,
                                                 std::size_t n) noexcept {
  using S = typename T::S;
  if (n == 0) return FASTOPS_OK;
  if (meets(p.a, p.stride_a, sizeof(S), p, sizeof(S), n) ||
      (is_binary(op) && meets(p.b, p.stride_b, sizeof(S), p, sizeof(S), n)))
    in_order<op, T>(m, p, n);
  else
    strided<op, T>(m, p, n);
  return FASTOPS_OK;
}

// Apart from `out`, or exactly `out`: `size` bytes each.
FASTOPS_INLINE bool is_clear(const void* in, const void* out, std::size_t size) {
  const auto distance = reinterpret_cast<std::uintptr_t>(out) - reinterpret_cast<std::uintptr_t>(in);
  return distance == 0 || distance + (size - 1) >= 2 * size - 1;
}

template <int op, class T>
fastops_status apply(const fastops_mitchell* m, int mode, fastops_dtype, const void* a, std::ptrdiff_t stride_a,
                     const void* b, std::ptrdiff_t stride_b, void* out, std::ptrdiff_t stride_out,
                     std::size_t n) noexcept {
  using S = typename T::S;
  constexpr auto size = static_cast<std::ptrdiff_t>(sizeof(S));
  const std::size_t bytes = n * sizeof(S);
  if (__builtin_expect(stride_a == size && stride_out == size && (!is_binary(op) || stride_b == size) && n != 0 &&
                           is_clear(a, out, bytes) && (!is_binary(op) || is_clear(b, out, bytes)),
                       1)) {
    return contiguous<op, T>(*m, static_cast<const S*>(a), static_cast<const S*>(b), static_cast<S*>(out), n,
                             (mode & kMitchellStream) != 0);
  }
  const auto *pa = static_cast<const char*>(a), *pb = is_binary(op) ? static_cast<const char*>(b) : pa;
  return general<op, T>(
      *m, {pa, pb, static_cast<char*>(out), stride_a, is_binary(op) ? stride_b : stride_a, stride_out}, n);
}

// Integers.

// Lanes of integers in the float format that holds them exactly, and the float products as integers.
template <class In> struct IntegerLanes {
  using F = std::conditional_t<(sizeof(In) <= 2), f32, f64>;
  static constexpr std::size_t lanes = simd::kLanes<F>;
  typedef In Packed __attribute__((vector_size(lanes * sizeof(In))));
  static FASTOPS_INLINE F load(const In* p) {
    using I = IntOf<F>;
    if constexpr (sizeof(In) <= 2) {
      return __builtin_convertvector(simd::load_widened(p), F);
    } else if constexpr (std::is_signed_v<In>) {
      return __builtin_convertvector(simd::load<Packed>(p), F);
    } else {
      const double magic = 0x1p52;  // its last bit is one
      return bits<F>(__builtin_convertvector(simd::load<Packed>(p), I) | bits<std::int64_t>(magic)) - magic;
    }
  }
};
template <class Out> FASTOPS_INLINE void store_integers(Out* p, f32 product, simd::i32 nonzero) {
  using I = simd::i32;
  // The sum of bits means nothing where an operand is zero: converting it could raise invalid.
  product = bits<f32>(bits<I>(product) & nonzero);
  I r;
  if constexpr (std::is_same_v<Out, std::uint32_t>) {
    // The conversion is to signed integers: the upper half is taken through zero. Beyond 2^32 it stays at the end.
    const I large = product >= 0x1p31f, most = product >= 0x1p32f;
    const f32 moved = select(large, product - 0x1p31f, product);
    r = __builtin_convertvector(select(most, f32{}, moved), I) ^ (large & std::numeric_limits<std::int32_t>::min());
    r = r | most;
  } else {
    r = __builtin_convertvector(product, I);
  }
  if constexpr (std::is_same_v<Out, std::uint16_t>) r = select(r > 0xffff, I{} + 0xffff, r);
  if constexpr (sizeof(Out) == 4)
    simd::store(reinterpret_cast<std::int32_t*>(p), r);
  else
    simd::store(reinterpret_cast<std::uint16_t*>(p), half::narrow_bits(r & 0xffff));
}
template <class Out> FASTOPS_INLINE void store_integers(Out* p, f64 product, simd::i64 nonzero) {
  using I = simd::i64;
  using N = Unit<f64>;
  const I raw = bits<I>(product), magnitude = raw & N::kMagnitude;
  const I exponent = (magnitude >> 52) - (N::kBias + 52);
  const I left = select(exponent > 11, I{} + 11, select(exponent > 0, exponent, I{}));
  const I right = select(exponent < -63, I{} + 63, select(exponent < 0, -exponent, I{}));
  const simd::u64 significand = bits<simd::u64>((magnitude & N::kMantissa) | N::kMinNormal);
  I r = bits<I>((significand << bits<simd::u64>(left)) >> bits<simd::u64>(right));
  if constexpr (std::is_signed_v<Out>) {
    const I sign = raw < 0;
    r = (r ^ sign) - sign;
  } else {
    r = select(exponent > 11, ~I{}, r);  // 2^64 and beyond
  }
  simd::store(reinterpret_cast<std::int64_t*>(p), r & nonzero);
}
// Shifts by different counts in each lane, which 32-bit operands need, are slow before AVX2.
template <class In> constexpr bool has_lanes() {
#if defined(FASTOPS_SSE)
  return sizeof(In) <= 2;
#else
  return sizeof(In) <= 4;
#endif
}
// Whole vectors of Mitchell's form with one constant; returns how many elements they were.
template <int op, class In, class Out>
__attribute__((noinline)) std::size_t integer_vectors(const fastops_mitchell& m, const In* a, const In* b, Out* out,
                                                      std::size_t n) noexcept {
  using L = IntegerLanes<In>;
  using F = typename L::F;
  using I = IntOf<F>;
  constexpr bool small = sizeof(In) <= 2;
  const auto constants = [&]() -> const auto& {
    if constexpr (small)
      return m.single[FASTOPS_F32];
    else
      return m.wide;
  };
  const I c = I{} + (constants().c - Unit<F>::kOne);
  const I keep = I{} + (constants().mantissa_mask | ~Unit<F>::kMantissa);
  std::size_t i = 0;
  for (; i + L::lanes <= n; i += L::lanes) {
    const F x = L::load(a + i), y = op == FASTOPS_MUL ? L::load(b + i) : x;
    // Of integers only zero has no bits.
    store_integers(out + i, float_product(x, y, c, keep), (bits<I>(x) != 0) & (bits<I>(y) != 0));
  }
  return i;
}

template <int op, class In, class Out>
fastops_status apply_integer(const fastops_mitchell* m, int, fastops_dtype, const void* pa, std::ptrdiff_t stride_a,
                             const void* pb, std::ptrdiff_t stride_b, void* pout, std::ptrdiff_t stride_out,
                             std::size_t n) noexcept {
  using W = std::make_unsigned_t<Out>;
  constexpr bool small = sizeof(In) <= 2, wraps = sizeof(In) == sizeof(Out);
  constexpr auto limit = static_cast<std::uint64_t>(std::numeric_limits<Out>::max());
  const fastops_mitchell_params& params = m->params;
  IntegerConstants k;
  k.c = small ? m->single[FASTOPS_F32].c : m->wide.c;
  k.unit_bits = small ? 23 : 52;
  k.form = params.form;
  k.corrections = params.corrections;
  k.mantissa_bits = params.mantissa_bits;
  k.segment_bits = m->wide.segment_bits;
  k.unary = op == FASTOPS_SQUARE;
  const bool plain = params.form == FASTOPS_FORM_LOG && k.c == 0 && k.mantissa_bits == 0 && k.segment_bits == 0;
  const auto *a = static_cast<const char*>(pa), *b = op == FASTOPS_MUL ? static_cast<const char*>(pb) : a;
  auto* out = static_cast<char*>(pout);
  std::size_t i = 0;
  if constexpr (has_lanes<In>()) {
    constexpr auto in_size = static_cast<std::ptrdiff_t>(sizeof(In));
    const MitchellArrays arrays{a, b, out, stride_a, op == FASTOPS_MUL ? stride_b : stride_a, stride_out};
    if (n != 0 && params.form == FASTOPS_FORM_LOG && k.segment_bits == 0 && stride_a == in_size &&
        arrays.stride_b == in_size && stride_out == static_cast<std::ptrdiff_t>(sizeof(Out)) &&
        !meets(a, in_size, sizeof(In), arrays, sizeof(Out), n) &&
        !meets(b, in_size, sizeof(In), arrays, sizeof(Out), n)) {
      i = integer_vectors<op>(*m, reinterpret_cast<const In*>(a), reinterpret_cast<const In*>(b),
                              reinterpret_cast<Out*>(out), n);
      a += i * sizeof(In);
      b += i * sizeof(In);
      out += i * sizeof(Out);
    }
  }
  for (; i < n; ++i) {
    const In x = read<In>(a), y = op == FASTOPS_MUL ? read<In>(b) : x;
    const std::uint64_t u = x < 0 ? 0 - static_cast<std::uint64_t>(x) : static_cast<std::uint64_t>(x);
    const std::uint64_t v = y < 0 ? 0 - static_cast<std::uint64_t>(y) : static_cast<std::uint64_t>(y);
    std::uint64_t r;
    if (plain)
      r = plain_product(u, v);
    else if constexpr (small)
      r = integer_product(u, v, k, m->single[FASTOPS_F32].table, limit, wraps);
    else
      r = integer_product(u, v, k, m->wide.table, limit, wraps);
    if ((x < 0) != (y < 0)) r = 0 - r;
    write(out, static_cast<Out>(static_cast<W>(r)));
    a += stride_a;
    b += stride_b;
    out += stride_out;
  }
  return FASTOPS_OK;
}

// Gradients.

template <class T>
void grad(const fastops_mitchell* m, fastops_mitchell_op op, fastops_gradient mode, const void* pa, const void* pb,
          const void* pdy, void* pda, void* pdb, std::size_t n) noexcept {
  using S = typename T::S;
  const auto& k = T::constants(*m);
  const auto* a = static_cast<const S*>(pa);
  const auto* b = static_cast<const S*>(pb);
  const auto* dy = static_cast<const S*>(pdy);
  auto* da = static_cast<S*>(pda);
  auto* db = static_cast<S*>(pdb);
  for (std::size_t i = 0; i < n; ++i) {
    const auto g = gradient<T>(op, mode, T::get(a[i]), T::get(b[i]), T::get(dy[i]), *m, k, k);
    da[i] = T::put(g.a);
    db[i] = T::put(g.b);
  }
}

}  // namespace

#define FASTOPS_FLOATS(op) {apply<op, Float16>, apply<op, BFloat16>, apply<op, Float32>, apply<op, Float64>}
#define FASTOPS_NUMBERS(op)                         \
  {apply<op, Float16>,                              \
   apply<op, BFloat16>,                             \
   apply<op, Float32>,                              \
   apply<op, Float64>,                              \
   apply_integer<op, std::int8_t, std::int16_t>,    \
   apply_integer<op, std::uint8_t, std::uint16_t>,  \
   apply_integer<op, std::int16_t, std::int32_t>,   \
   apply_integer<op, std::uint16_t, std::uint32_t>, \
   apply_integer<op, std::int32_t, std::int64_t>,   \
   apply_integer<op, std::uint32_t, std::uint64_t>, \
   apply_integer<op, std::int64_t, std::int64_t>,   \
   apply_integer<op, std::uint64_t, std::uint64_t>}

extern const MitchellKernels kMitchellKernels = {
    {FASTOPS_NUMBERS(FASTOPS_MUL), FASTOPS_FLOATS(FASTOPS_DIV), FASTOPS_NUMBERS(FASTOPS_SQUARE),
     FASTOPS_FLOATS(FASTOPS_RECIPROCAL), FASTOPS_FLOATS(FASTOPS_SQRT), FASTOPS_FLOATS(FASTOPS_RSQRT),
     FASTOPS_FLOATS(FASTOPS_LOG2), FASTOPS_FLOATS(FASTOPS_EXP2)},
    {grad<Float16>, grad<BFloat16>, grad<Float32>, grad<Float64>}};

}  // namespace fastops::FASTOPS_LEVEL
