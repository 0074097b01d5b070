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

constexpr bool is_binary(int op) { return op == FASTOPS_MUL || op == FASTOPS_DIV; }
// Operations that are a sum of logarithms, which the short path does on the bits alone.
constexpr bool is_sum(int op) { return op <= FASTOPS_RSQRT; }

// ---- dtypes: what lies in memory (S), the lanes (F) and the scalar (E) it is computed in ---------------------------
struct Float32 {
  using S = float;
  using F = f32;
  using E = float;
  static constexpr bool kStreams = true;
  static FASTOPS_INLINE F load(const S* p) { return simd::load<F>(p); }
  static FASTOPS_INLINE void store(S* p, F v) { simd::store(p, v); }
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
  static FASTOPS_INLINE E get(S s) { return s; }
  static FASTOPS_INLINE S put(E e) { return e; }
  static const MitchellConstants<std::int64_t>& constants(const fastops_mitchell& m) { return m.wide; }
};

// ---- one operation on lanes or on a scalar -------------------------------------------------------------------------
// log2 and exp2 know of the multiplier only whether it flushes.
template <class Int> struct Range {
  Int mantissa_mask, flush_below, lowest_exponent;
};

template <int op, class F, class Constants> FASTOPS_INLINE F log_form(F a, F b, const Constants& k) {
  if constexpr (op == FASTOPS_MUL) return mul(a, b, k);
  if constexpr (op == FASTOPS_DIV) return div(a, b, k);
  if constexpr (op == FASTOPS_SQUARE) return square(a, k);
  if constexpr (op == FASTOPS_RECIPROCAL) return reciprocal(a, k);
  if constexpr (op == FASTOPS_SQRT) return sqrt(a, k);
  if constexpr (op == FASTOPS_RSQRT) return rsqrt(a, k);
  const Range<decltype(k.c)> range{-1, k.flush_below, k.lowest_exponent};
  if constexpr (op == FASTOPS_LOG2) return log2(a, range);
  if constexpr (op == FASTOPS_EXP2) return exp2(a, range);
}
inline float other_form(float a, float b, const fastops_mitchell& m, const MitchellConstants<std::int32_t>& k) {
  return static_cast<float>(wide_product<double>(a, b, widen(m.params, k)));
}
inline double other_form(double a, double b, const fastops_mitchell& m, const MitchellConstants<std::int64_t>& k) {
  return exact_product(a, b, m.params, k);
}
template <int op, class F, class Constants>
FASTOPS_INLINE F full(F a, F b, const fastops_mitchell& m, const Constants& k) {
  if constexpr (op == FASTOPS_MUL || op == FASTOPS_SQUARE) {
    if (m.params.form != FASTOPS_FORM_LOG) {
      if constexpr (sizeof(F) == sizeof(k.c)) {
        return other_form(a, op == FASTOPS_MUL ? b : a, m, k);
      } else {
        F r = a;
        for (std::size_t i = 0; i < simd::kLanes<F>; ++i)
          r[i] = other_form(a[i], op == FASTOPS_MUL ? b[i] : a[i], m, k);
        return r;
      }
    }
  }
  return log_form<op>(a, b, k);
}

// ---- the short path -----------------------------------------------------------------------------------------------
// The result's bits are a sum of the operands' bits, signs included, where operands and result lie well inside the
// normal range. `seen_*` collect by AND the bits that say so, for a whole block.
template <class U, class S> FASTOPS_INLINE bool all_bits(U v, S mask) {
  if constexpr (sizeof(U) == sizeof(S))
    return (v & static_cast<U>(mask)) == static_cast<U>(mask);
  else
    return simd::all_set(v, mask);
}
template <int op, class F, bool cut> struct Short {
  using N = Unit<F>;
  using U = typename N::U;
  using W = std::make_unsigned_t<typename N::S>;
  U seen_a, seen_b, c, keep;

  template <class Constants> FASTOPS_INLINE explicit Short(const Constants& k) : seen_a(~U{}), seen_b(~U{}) {
    const W one = N::kOne, shift = W{N::kShiftA} + W{N::kShiftB}, offset = static_cast<W>(k.c);
    W sum = 0;
    if constexpr (op == FASTOPS_MUL) sum = offset - one - shift;
    if constexpr (op == FASTOPS_DIV) sum = offset + one - shift;
    if constexpr (op == FASTOPS_SQUARE) sum = offset - one;
    if constexpr (op == FASTOPS_RECIPROCAL) sum = offset + one + one;
    if constexpr (op == FASTOPS_SQRT) sum = offset + offset + one;
    if constexpr (op == FASTOPS_RSQRT) sum = offset + offset + one + one + one;
    c = U{} + sum;
    keep = U{} + (static_cast<W>(k.mantissa_mask) | static_cast<W>(~N::kMantissa));
  }
  FASTOPS_INLINE F operator()(F a, F b) {
    U x = bits<U>(a), y = bits<U>(b);
    if constexpr (cut) {
      x = x & keep;
      y = y & keep;
    }
    if constexpr (op == FASTOPS_MUL) {
      const U s = x + W{N::kShiftA}, t = y + W{N::kShiftB};
      seen_a = seen_a & s;
      seen_b = seen_b & t;
      return bits<F>(s + t + c);
    }
    if constexpr (op == FASTOPS_DIV) {
      const U s = x + W{N::kShiftA}, t = W{N::kShiftB} - y;
      seen_a = seen_a & s;
      seen_b = seen_b & t;
      return bits<F>(s + t + c);
    }
    if constexpr (op == FASTOPS_SQUARE) {
      seen_b = seen_b & (x + W{N::kShiftB});
      return bits<F>(x + x + c);
    }
    if constexpr (op == FASTOPS_RECIPROCAL) {
      seen_a = seen_a & (x + W{N::kShiftA});
      return bits<F>(c - x);
    }
    // Roots: the shift by the sign bit asks for a positive operand. Half the logarithm, ties to even.
    seen_a = seen_a & (x + (W{N::kShiftA} + static_cast<W>(N::kSign)));
    const U u = op == FASTOPS_SQRT ? x + c : c - x;
    return bits<F>((u + ((u >> 1) & W{1})) >> 1);
  }
  FASTOPS_INLINE bool in_range() const {
    constexpr bool root = op == FASTOPS_SQRT || op == FASTOPS_RSQRT;
    bool r = true;
    if constexpr (op != FASTOPS_SQUARE) r = all_bits(seen_a, root ? N::kTopBit | N::kSign : N::kTopBit);
    if constexpr (is_binary(op) || op == FASTOPS_SQUARE) r = r && all_bits(seen_b, N::kTopTwo);
    return r;
  }
};

// ---- loops --------------------------------------------------------------------------------------------------------
template <class S> FASTOPS_INLINE S read(const char* p) {
  S s;
  std::memcpy(&s, p, sizeof s);
  return s;
}
template <class S> FASTOPS_INLINE void write(char* p, S s) { std::memcpy(p, &s, sizeof s); }

// Whole vectors, or fewer elements than one.
template <int op, class T>
__attribute__((noinline)) void full_vectors(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b,
                                            typename T::S* out, std::size_t n) noexcept {
  using F = typename T::F;
  constexpr std::size_t lanes = simd::kLanes<F>;
  const auto& k = T::constants(m);
  for (; n >= lanes; n -= lanes) {
    const F x = T::load(a), y = is_binary(op) ? T::load(b) : x;
    T::store(out, full<op>(x, y, m, k));
    a += lanes;
    b += lanes;
    out += lanes;
  }
  if (n == 0) return;
  typename T::S pad_a[lanes], pad_b[lanes], pad_out[lanes];
  for (std::size_t i = 0; i < lanes; ++i) {
    pad_a[i] = i < n ? a[i] : T::put(1);
    pad_b[i] = is_binary(op) && i < n ? b[i] : T::put(1);
  }
  T::store(pad_out, full<op>(T::load(pad_a), T::load(pad_b), m, k));
  std::memcpy(out, pad_out, n * sizeof(typename T::S));
}

template <int op, class T, bool cut, bool streams>
void short_vectors(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b, typename T::S* out,
                   std::size_t n) noexcept {
  using F = typename T::F;
  using S = typename T::S;
  constexpr std::size_t lanes = simd::kLanes<F>, block = 4 * lanes;
  const Short<op, F, cut> prototype(T::constants(m));
  if constexpr (streams) {
    const std::size_t head = (-reinterpret_cast<std::uintptr_t>(out) % kBytes) / sizeof(S);
    full_vectors<op, T>(m, a, b, out, head);
    a += head;
    b += head;
    out += head;
    n -= head;
  }
  for (; n >= block; n -= block) {
    auto s = prototype;
    F r[4];
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      const F x = T::load(a + i * lanes);
      r[i] = s(x, is_binary(op) ? T::load(b + i * lanes) : x);
    }
    if (__builtin_expect(s.in_range(), 1)) {
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) {
        if constexpr (streams)
          simd::stream(out + i * lanes, r[i]);
        else
          T::store(out + i * lanes, r[i]);
      }
    } else {
      full_vectors<op, T>(m, a, b, out, block);
    }
    a += block;
    b += block;
    out += block;
  }
  for (; n >= lanes; n -= lanes) {
    auto s = prototype;
    const F x = T::load(a), r = s(x, is_binary(op) ? T::load(b) : x);
    if (__builtin_expect(s.in_range(), 1))
      T::store(out, r);
    else
      full_vectors<op, T>(m, a, b, out, lanes);
    a += lanes;
    b += lanes;
    out += lanes;
  }
  if (n) full_vectors<op, T>(m, a, b, out, n);
  if constexpr (streams) simd::stream_fence();
}

template <int op, class T>
void contiguous(const fastops_mitchell& m, const typename T::S* a, const typename T::S* b, typename T::S* out,
                std::size_t n, bool stream) noexcept {
  if constexpr (is_sum(op)) {
    const auto& k = T::constants(m);
    if (k.fast) {
      const bool cut = k.mantissa_mask != -1;
      if constexpr (T::kStreams) {
        if (stream)
          return cut ? short_vectors<op, T, true, true>(m, a, b, out, n)
                     : short_vectors<op, T, false, true>(m, a, b, out, n);
      }
      return cut ? short_vectors<op, T, true, false>(m, a, b, out, n)
                 : short_vectors<op, T, false, false>(m, a, b, out, n);
    }
  }
  full_vectors<op, T>(m, a, b, out, n);
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
void apply(const fastops_mitchell* m, const MitchellArrays& p, std::size_t n, bool stream) noexcept {
  using S = typename T::S;
  constexpr auto size = static_cast<std::ptrdiff_t>(sizeof(S));
  if (n == 0) return;
  if (meets(p.a, p.stride_a, sizeof(S), p, sizeof(S), n) ||
      (is_binary(op) && meets(p.b, p.stride_b, sizeof(S), p, sizeof(S), n)))
    return in_order<op, T>(*m, p, n);
  if (p.stride_a == size && p.stride_out == size && (!is_binary(op) || p.stride_b == size))
    return contiguous<op, T>(*m, reinterpret_cast<const S*>(p.a), reinterpret_cast<const S*>(p.b),
                             reinterpret_cast<S*>(p.out), n, stream);
  strided<op, T>(*m, p, n);
}

// ---- integers -----------------------------------------------------------------------------------------------------
template <int op, class In, class Out>
void apply_integer(const fastops_mitchell* m, const MitchellArrays& p, std::size_t n, bool) noexcept {
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
  const char *a = p.a, *b = p.b;
  char* out = p.out;
  for (std::size_t i = 0; i < n; ++i) {
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
    a += p.stride_a;
    b += p.stride_b;
    out += p.stride_out;
  }
}

// ---- gradients ----------------------------------------------------------------------------------------------------
FASTOPS_INLINE double times_power(double v, std::int64_t exponent) {
  if (exponent > 2100) exponent = 2100;
  if (exponent < -2200) exponent = -2200;
  // Steps towards the result's own range, so that at most the last one rounds.
  for (; exponent > 1000; exponent -= 1000) v *= 0x1p1000;
  for (; exponent < -900; exponent += 900) v *= 0x1p-900;
  return v * bits<double>((exponent + 1023) << 52);
}

template <class T>
void grad(const fastops_mitchell* m, fastops_mitchell_op op, fastops_gradient mode, const void* pa, const void* pb,
          const void* pdy, void* pda, void* pdb, std::size_t n) noexcept {
  using S = typename T::S;
  using E = typename T::E;
  using N = Unit<E>;
  const auto& k = T::constants(*m);
  const auto* a = static_cast<const S*>(pa);
  const auto* b = static_cast<const S*>(pb);
  const auto* dy = static_cast<const S*>(pdy);
  auto* da = static_cast<S*>(pda);
  auto* db = static_cast<S*>(pdb);
  const bool is_mul = op == FASTOPS_MUL;
  for (std::size_t i = 0; i < n; ++i) {
    const E x = T::get(a[i]), y = T::get(b[i]), g = T::get(dy[i]);
    if (mode == FASTOPS_GRADIENT_MIMIC) {
      const auto product = [&](E u, E v) { return T::get(T::put(full<FASTOPS_MUL>(u, v, *m, k))); };
      const auto quotient = [&](E u, E v) { return T::get(T::put(full<FASTOPS_DIV>(u, v, *m, k))); };
      da[i] = T::put(is_mul ? product(g, y) : quotient(g, y));
      db[i] = T::put(is_mul ? product(g, x) : -quotient(product(g, x), product(y, y)));
      continue;
    }
    const auto xd = static_cast<double>(x), yd = static_cast<double>(y), gd = static_cast<double>(g);
    if (mode == FASTOPS_GRADIENT_STE) {
      da[i] = T::put(static_cast<E>(is_mul ? gd * yd : gd / yd));
      db[i] = T::put(static_cast<E>(is_mul ? gd * xd : -gd * xd / (yd * yd)));
      continue;
    }
    // exact: zeros and infinities have the mantissa of a power of two; their exponent is never used.
    const auto p = split(x, k), q = split(y, k);
    const auto px = p.special ? 0 : p.mantissa, qx = q.special ? 0 : q.mantissa;
    const double u = static_cast<double>(p.value), v = static_cast<double>(q.value);
    const double sign_u = p.sign ? -1.0 : 1.0, sign_v = q.sign ? -1.0 : 1.0;
    const auto carry = [&](auto s, auto t) {
      return static_cast<std::int64_t>((is_mul ? s + t : s - t) + offset<E>(k, s, t)) >> N::kMantissaBits;
    };
    double ga, gb;
    if (is_mul) {
      const auto slope = [&](const Operand<E>& other, auto own_mantissa, auto other_mantissa, double sign, bool first) {
        const double value = static_cast<double>(other.value);
        if (other.special) return gd * value;
        if (m->params.form == FASTOPS_FORM_LOG)
          return times_power(gd * sign, other.exponent + (first ? carry(own_mantissa, other_mantissa)
                                                                : carry(other_mantissa, own_mantissa)));
        if (m->params.form == FASTOPS_FORM_EQUATION) return times_power(gd * sign, other.exponent);
        const double significand = static_cast<double>(bits<E>(static_cast<typename N::S>(other.mantissa | N::kOne)));
        double rest = significand;
        for (int c = 0; c <= m->params.corrections; ++c) rest = without_top_bit(rest);
        return times_power(gd * (sign * (significand - rest)), other.exponent);
      };
      ga = slope(q, px, qx, sign_v, true);
      gb = slope(p, qx, px, sign_u, false);
    } else {
      const std::int64_t e = carry(px, qx);
      ga = q.special ? gd / v : times_power(gd * sign_v, e - q.exponent);
      gb = q.special || p.special ? -gd * u / (v * v) : times_power(gd * -sign_u, e + p.exponent - 2 * q.exponent);
    }
    if (u != u) ga = u;
    if (is_mul && v != v) gb = v;
    da[i] = T::put(static_cast<E>(ga));
    db[i] = T::put(static_cast<E>(gb));
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
