// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic: log2(1 + x) ~ x turns products into one addition of logarithms (Mitchell 1962).
#ifndef FASTOPS_MITCHELL_MATH_H
#define FASTOPS_MITCHELL_MATH_H

#include <type_traits>

#include "core/simd.h"
#include "mitchell/mitchell_params.h"

namespace fastops::FASTOPS_LEVEL::mitchell {

using simd::bits;
using simd::select;

// The format a kernel computes in, for F = float, double (S = F's integer) and their lane types.
template <class S_, class I_, class U_, int kMantissaBits_, int kExponentBits_> struct Format {
  using S = S_;
  using I = I_;
  using U = U_;
  static constexpr int kMantissaBits = kMantissaBits_;
  static constexpr int kBias = (1 << (kExponentBits_ - 1)) - 1;
  static constexpr S kMinNormal = S{1} << kMantissaBits;
  static constexpr S kMantissa = kMinNormal - 1;
  static constexpr S kInfinity = ((S{1} << kExponentBits_) - 1) << kMantissaBits;
  static constexpr S kMagnitude = kInfinity | kMantissa;
  static constexpr S kSign = ~kMagnitude;
  static constexpr S kOne = S{kBias} << kMantissaBits;
  // Exponents beyond which a result has surely become zero or infinity; two halves of either are normal.
  static constexpr S kLowest = -(kBias + kMantissaBits + 50);
  static constexpr S kHighest = 2 * kBias - 4;
  // Short path: operand a needs the top exponent bit of a + kShiftA set, b the top two of b + kShiftB. Then every sum
  // or difference of their logarithms is the logarithm of a normal number.
  static constexpr S kTopBit = S{1} << (kMantissaBits + kExponentBits_ - 1);
  static constexpr S kTopTwo = kTopBit | (kTopBit >> 1);
  static constexpr S kShiftA = kTopBit >> 1;
  static constexpr S kShiftB = 3 * (kTopBit >> 2);
};
template <class F> struct Unit;
template <> struct Unit<float> : Format<std::int32_t, std::int32_t, std::uint32_t, 23, 8> {};
template <> struct Unit<double> : Format<std::int64_t, std::int64_t, std::uint64_t, 52, 11> {};
#if !defined(FASTOPS_SCALAR)
template <> struct Unit<simd::f32> : Format<std::int32_t, simd::i32, simd::u32, 23, 8> {};
template <> struct Unit<simd::f64> : Format<std::int64_t, simd::i64, simd::u64, 52, 11> {};
#endif
template <class F> using IntOf = typename Unit<F>::I;
template <class F> using MaskOf = decltype(IntOf<F>{} < IntOf<F>{});

template <class F> FASTOPS_INLINE F constant_of(double value) {
  if constexpr (sizeof(typename Unit<F>::S) == 4)
    return F{} + static_cast<float>(value);
  else
    return F{} + value;
}

// A finite non-zero operand is 2^exponent (1 + mantissa / 2^M), subnormals included; `special` marks zero, inf and nan.
template <class F> struct Operand {
  F value;
  IntOf<F> exponent, mantissa, sign;
  MaskOf<F> special, zero;
};
template <class F, class Constants> FASTOPS_INLINE Operand<F> split(F a, const Constants& k) {
  using N = Unit<F>;
  using I = typename N::I;
  Operand<F> r;
  const I raw = bits<I>(a);
  r.sign = raw & N::kSign;
  I magnitude = raw & N::kMagnitude;
  magnitude = select(magnitude < k.flush_below, I{}, magnitude);
  const auto subnormal = magnitude < N::kMinNormal;
  // 1.mantissa - 1 is the subnormal's significand, normalised exactly and without reading a subnormal as a float.
  const F scaled = bits<F>((magnitude & N::kMantissa) | N::kOne) - constant_of<F>(1);
  const I normal = select(subnormal, bits<I>(scaled), magnitude);
  r.mantissa = normal & (N::kMantissa & k.mantissa_mask);
  r.exponent = (normal >> N::kMantissaBits) - N::kBias - select(subnormal, I{} + (N::kBias - 1), I{});
  r.zero = magnitude == 0;
  r.special = r.zero | (magnitude >= N::kInfinity);
  r.value = bits<F>(magnitude | r.sign);
  return r;
}

// sign 2^exponent (1 + fraction / 2^M), rounded once: the first factor is normal, so only the last product rounds.
template <class F> FASTOPS_INLINE F compose(IntOf<F> exponent, IntOf<F> fraction, IntOf<F> sign) {
  using N = Unit<F>;
  using I = typename N::I;
  exponent = select(exponent < N::kLowest, I{} + N::kLowest, exponent);
  exponent = select(exponent > N::kHighest, I{} + N::kHighest, exponent);
  const I half = exponent >> 1;
  return bits<F>(fraction + ((half + N::kBias) << N::kMantissaBits)) *
         bits<F>(((exponent - half + N::kBias) << N::kMantissaBits) | sign);
}

// The logarithm's last step: `sum` carries whole octaves above the mantissa bits. Special lanes and flushed ones
// compute with exponent 0, so that they raise nothing.
template <class F, class Constants>
FASTOPS_INLINE F finish(IntOf<F> exponent, IntOf<F> sum, IntOf<F> sign, MaskOf<F> special, F special_value,
                        const Constants& k) {
  using N = Unit<F>;
  using I = typename N::I;
  exponent = exponent + (sum >> N::kMantissaBits);
  const auto flushed = exponent < k.lowest_exponent;
  exponent = select(special | flushed, I{}, exponent);
  const F r = compose<F>(exponent, sum & N::kMantissa, sign);
  return select(special, special_value, select(flushed, bits<F>(sign), r));
}

template <class F, class Constants> FASTOPS_INLINE IntOf<F> offset(const Constants& k, IntOf<F> x) {
  if (k.segment_bits == 0) return IntOf<F>{} + k.c;
  return simd::gather(k.table, x >> (Unit<F>::kMantissaBits - k.segment_bits));
}
template <class F, class Constants> FASTOPS_INLINE IntOf<F> offset(const Constants& k, IntOf<F> x, IntOf<F> y) {
  if (k.segment_bits == 0) return IntOf<F>{} + k.c;
  const int shift = Unit<F>::kMantissaBits - k.segment_bits;
  return simd::gather(k.table, ((x >> shift) << k.segment_bits) + (y >> shift));
}

template <class F, class Constants> FASTOPS_INLINE F mul(F a, F b, const Constants& k) {
  const Operand<F> p = split(a, k), q = split(b, k);
  const auto special = p.special | q.special;
  const F one = constant_of<F>(1);
  const F ieee = select(special, p.value, one) * select(special, q.value, one);
  return finish<F>(p.exponent + q.exponent, p.mantissa + q.mantissa + offset<F>(k, p.mantissa, q.mantissa),
                   p.sign ^ q.sign, special, ieee, k);
}
template <class F, class Constants> FASTOPS_INLINE F div(F a, F b, const Constants& k) {
  const Operand<F> p = split(a, k), q = split(b, k);
  const auto special = p.special | q.special;
  const F one = constant_of<F>(1);
  const F ieee = select(special, p.value, one) / select(special, q.value, one);
  return finish<F>(p.exponent - q.exponent, p.mantissa - q.mantissa + offset<F>(k, p.mantissa, q.mantissa),
                   p.sign ^ q.sign, special, ieee, k);
}
template <class F, class Constants> FASTOPS_INLINE F square(F a, const Constants& k) {
  const Operand<F> p = split(a, k);
  const F v = select(p.special, p.value, constant_of<F>(1));
  return finish<F>(p.exponent + p.exponent, p.mantissa + p.mantissa + offset<F>(k, p.mantissa), IntOf<F>{}, p.special,
                   v * v, k);
}
template <class F, class Constants> FASTOPS_INLINE F reciprocal(F a, const Constants& k) {
  const Operand<F> p = split(a, k);
  const F one = constant_of<F>(1);
  return finish<F>(-p.exponent, offset<F>(k, p.mantissa) - p.mantissa, p.sign, p.special,
                   one / select(p.special, p.value, one), k);
}

// One where the operand is not negative, nan (raising invalid) where it is: -0 counts as zero.
template <class F> FASTOPS_INLINE F invalid_where(MaskOf<F> negative) {
  using N = Unit<F>;
  using I = typename N::I;
  const F z = simd::opaque(bits<F>(select(negative, I{} + N::kInfinity, I{})));
  return constant_of<F>(1) + (z - z);
}

// Halves a logarithm u = exponent 2^M + fraction (fraction any sign) to nearest even and returns the value of its half.
// The dtype's own last bit decides `even`; half types round when they are stored, and are exact here.
template <class F> FASTOPS_INLINE F half_log(IntOf<F> exponent, IntOf<F> fraction) {
  using N = Unit<F>;
  using I = typename N::I;
  const I u = bits<I>(bits<typename N::U>(exponent) << N::kMantissaBits) + fraction;
  const I t = (u + ((u >> 1) & 1)) >> 1;
  return bits<F>(t + N::kOne);
}
template <class F, class Constants> FASTOPS_INLINE F sqrt(F a, const Constants& k) {
  const Operand<F> p = split(a, k);
  const auto negative = (p.sign != 0) & (p.zero == 0);
  const auto special = p.special | negative;
  const IntOf<F> c = offset<F>(k, p.mantissa);
  const F ieee = select(p.special & (negative == 0), p.value, constant_of<F>(1)) * invalid_where<F>(negative);
  return select(special, ieee, half_log<F>(p.exponent, p.mantissa + c + c));
}
template <class F, class Constants> FASTOPS_INLINE F rsqrt(F a, const Constants& k) {
  const Operand<F> p = split(a, k);
  const auto negative = (p.sign != 0) & (p.zero == 0);
  const auto special = p.special | negative;
  const F one = constant_of<F>(1);
  const IntOf<F> c = offset<F>(k, p.mantissa);
  const F ieee = (one / select(p.special & (negative == 0), p.value, one)) * invalid_where<F>(negative);
  return select(special, ieee, half_log<F>(-p.exponent, c + c - p.mantissa));
}
// e + x, one rounding.
template <class F> FASTOPS_INLINE F log2_of_parts(IntOf<F> exponent, IntOf<F> mantissa) {
  using N = Unit<F>;
  using I = typename N::I;
  // The exponent as a float: 1.5 2^M + e, less 1.5 2^M.
  const F magic = constant_of<F>(1.5 * static_cast<double>(N::kMinNormal));
  const F whole = bits<F>(bits<I>(magic) + exponent) - magic;
  return whole + (bits<F>(mantissa | N::kOne) - constant_of<F>(1));
}
template <class F, class Constants> FASTOPS_INLINE F log2(F a, const Constants& k) {
  using N = Unit<F>;
  using I = typename N::I;
  if constexpr (!std::is_arithmetic_v<F>) {
    const I raw = bits<I>(a);
    if (__builtin_expect(!simd::any((raw < N::kMinNormal) | (raw < k.flush_below) | (raw >= N::kInfinity)), 1))
      return log2_of_parts<F>((raw >> N::kMantissaBits) - N::kBias, raw & N::kMantissa);
  }
  const Operand<F> p = split(a, k);
  const auto negative = (p.sign != 0) & (p.zero == 0);
  const auto special = p.special | negative;
  const F one = constant_of<F>(1);
  const F infinite = -(one / simd::opaque(select(p.zero, F{}, one)));  // -1 where the operand is not zero
  const F passed = select(p.special & (negative == 0), p.value, one);
  const F ieee = select(p.zero, infinite, passed) * invalid_where<F>(negative);
  return select(special, ieee, log2_of_parts<F>(p.exponent, p.mantissa));
}
// 2^floor(a) (1 + a - floor(a)); where 1 + a - floor(a) needs rounding the result is normal, so it rounds once.
template <class F, class Constants> FASTOPS_INLINE F exp2(F a, const Constants& k) {
  using N = Unit<F>;
  using I = typename N::I;
  const I raw = bits<I>(a);
  const I sign = raw & N::kSign;
  I magnitude = raw & N::kMagnitude;
  magnitude = select(magnitude < k.flush_below, I{}, magnitude);
  const auto special = magnitude >= N::kInfinity;
  const I limit = bits<I>(constant_of<F>(4 * N::kBias));
  const F x = bits<F>(select(magnitude > limit, limit, magnitude) | sign);
  const F magic = constant_of<F>(1.5 * static_cast<double>(N::kMinNormal));
  const F nearest = (x + magic) - magic;
  const F one = constant_of<F>(1);
  const F floor = nearest - select(nearest > x, one, F{});
  const I exponent = bits<I>(floor + magic) - bits<I>(magic);
  const F significand = (one - floor) + x;
  const F ieee = bits<F>(select(raw == (N::kInfinity | N::kSign), I{}, raw));
  return finish<F>(exponent, bits<I>(significand) - N::kOne, I{}, special, ieee, k);
}

FASTOPS_HD constexpr bool is_binary(int op) { return op == FASTOPS_MUL || op == FASTOPS_DIV; }
// Operations that are a sum of logarithms, which the short path does on the bits alone.
FASTOPS_HD constexpr bool is_sum(int op) { return op <= FASTOPS_RSQRT; }

// Forms 1 and 2.

// What is left of a significand after its highest set bit has been taken away; zero stays zero.
template <class F> FASTOPS_INLINE F without_top_bit(F v) { return v - bits<F>(bits<IntOf<F>>(v) & Unit<F>::kInfinity); }
// Constants of a float32 or half product computed in double lanes: all of it exact, one rounding when it is stored.
struct WideConstants {
  std::int64_t mantissa_mask, flush_below, lowest_exponent;
  double c;
  std::int32_t form, corrections;
};
template <class Params, class Constants> FASTOPS_INLINE WideConstants widen(const Params& params, const Constants& k) {
  WideConstants w;
  w.mantissa_mask = (static_cast<std::int64_t>(k.mantissa_mask) * (std::int64_t{1} << 29)) | 0x1fffffff;
  w.lowest_exponent = k.flush_below ? k.lowest_exponent : -5000;
  w.flush_below = k.flush_below ? (static_cast<std::int64_t>(k.lowest_exponent) + 1023) << 52 : 0;
  w.c = static_cast<double>(k.c) * 0x1p-23;
  w.form = params.form;
  w.corrections = params.corrections;
  return w;
}
template <class F> FASTOPS_INLINE F wide_product(F a, F b, const WideConstants& k) {
  using N = Unit<F>;
  using I = typename N::I;
  const Operand<F> p = split(a, k), q = split(b, k);
  const auto special = p.special | q.special;
  const F one = constant_of<F>(1);
  const F ieee = select(special, p.value, one) * select(special, q.value, one);
  const F x = bits<F>(p.mantissa | N::kOne), y = bits<F>(q.mantissa | N::kOne);
  F product;
  if (k.form == FASTOPS_FORM_EQUATION) {
    product = (x + (y - one)) + k.c;
  } else {
    F r = x, s = y;
    for (int i = 0; i <= k.corrections; ++i) {
      r = without_top_bit(r);
      s = without_top_bit(s);
    }
    product = x * y - r * s;
  }
  const I scale = select(special, I{}, p.exponent + q.exponent) + N::kBias;
  product = product * bits<F>(scale << N::kMantissaBits);
  product = select(bits<I>(product) < k.flush_below, F{}, product);
  return select(special, ieee, bits<F>(bits<I>(product) | (p.sign ^ q.sign)));
}

#if !defined(FASTOPS_SCALAR)
// Lanes of float32 as two vectors of float64, and back, rounding once.
typedef float HalfVector __attribute__((vector_size(kBytes / 2)));
FASTOPS_INLINE simd::f32 wide_product(simd::f32 a, simd::f32 b, const WideConstants& k) {
  simd::f32 r;
  for (std::size_t part = 0; part < 2; ++part) {
    HalfVector x, y;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + part * sizeof x, sizeof x);
    std::memcpy(&y, reinterpret_cast<const char*>(&b) + part * sizeof y, sizeof y);
    const simd::f64 product =
        wide_product<simd::f64>(__builtin_convertvector(x, simd::f64), __builtin_convertvector(y, simd::f64), k);
    const HalfVector narrow = __builtin_convertvector(product, HalfVector);
    std::memcpy(reinterpret_cast<char*>(&r) + part * sizeof narrow, &narrow, sizeof narrow);
  }
  return r;
}
#endif

// value 2^exponent rounded once to double; value > 0.
FASTOPS_HD inline double round_scaled(unsigned __int128 value, int exponent) {
  const auto high = static_cast<std::uint64_t>(value >> 64);
  const int top = high ? 127 - simd::leading_zeros(high) : 63 - simd::leading_zeros(static_cast<std::uint64_t>(value));
  int drop = top - 52;
  if (exponent + drop < -1074) drop = -1074 - exponent;
  if (drop > 120) drop = 120;  // far below the smallest subnormal: nothing is left either way
  if (drop > 0) {
    const unsigned __int128 unit = static_cast<unsigned __int128>(1) << drop, rest = value & (unit - 1);
    value >>= drop;
    value += rest > (unit >> 1) || (rest == (unit >> 1) && (value & 1)) ? 1 : 0;
    exponent += drop;
  }
  double r = static_cast<double>(static_cast<std::uint64_t>(value));
  // Exact steps, apart from overflow.
  for (; exponent > 1000; exponent -= 1000) r *= 0x1p1000;
  for (; exponent < -1000; exponent += 1000) r *= 0x1p-1000;
  return r * bits<double>(static_cast<std::int64_t>(exponent + 1023) << 52);
}
FASTOPS_HD inline std::uint64_t without_top_bit(std::uint64_t v) {
  return v ? v ^ (std::uint64_t{1} << (63 - simd::leading_zeros(v))) : 0;
}
// Forms 1 and 2 for float64: 128-bit integers.
template <class Params, class Constants>
FASTOPS_HD inline double exact_product(double a, double b, const Params& params, const Constants& k) {
  using N = Unit<double>;
  const Operand<double> p = split(a, k), q = split(b, k);
  if (p.special || q.special) return p.value * q.value;
  const std::uint64_t x = static_cast<std::uint64_t>(p.mantissa | N::kMinNormal);
  const std::uint64_t y = static_cast<std::uint64_t>(q.mantissa | N::kMinNormal);
  unsigned __int128 value;
  int exponent = static_cast<int>(p.exponent + q.exponent);
  if (params.form == FASTOPS_FORM_EQUATION) {
    value = x + static_cast<std::uint64_t>(q.mantissa) + static_cast<std::uint64_t>(k.c);
    exponent -= 52;
  } else {
    std::uint64_t r = x, s = y;
    for (int i = 0; i <= params.corrections; ++i) {
      r = without_top_bit(r);
      s = without_top_bit(s);
    }
    value = static_cast<unsigned __int128>(x) * y - static_cast<unsigned __int128>(r) * s;
    exponent -= 104;
  }
  if (k.flush_below) {
    const auto high = static_cast<std::uint64_t>(value >> 64);
    const int top =
        high ? 127 - simd::leading_zeros(high) : 63 - simd::leading_zeros(static_cast<std::uint64_t>(value));
    if (top + exponent < k.lowest_exponent) value = 0;
  }
  const double r = value ? round_scaled(value, exponent) : 0.0;
  return bits<double>(bits<std::int64_t>(r) | (p.sign ^ q.sign));
}

// Integers.

struct IntegerConstants {
  std::int64_t c;          // in units of 2^-(52 or 23)
  std::int32_t unit_bits;  // 52 or 23
  std::int32_t form, corrections, mantissa_bits, segment_bits;
  bool unary;  // the table has one row, by the first operand
};
// The product of two magnitudes, truncated to an integer: at most `limit`, or modulo 2^64.
template <class TableEntry>
FASTOPS_HD inline std::uint64_t integer_product(std::uint64_t a, std::uint64_t b, const IntegerConstants& k,
                                                const TableEntry* table, std::uint64_t limit, bool wraps) {
  if (a == 0 || b == 0) return 0;
  const int ka = 63 - simd::leading_zeros(a), kb = 63 - simd::leading_zeros(b);
  if (k.mantissa_bits > 0) {
    if (ka > k.mantissa_bits) a = a >> (ka - k.mantissa_bits) << (ka - k.mantissa_bits);
    if (kb > k.mantissa_bits) b = b >> (kb - k.mantissa_bits) << (kb - k.mantissa_bits);
  }
  using Wide = unsigned __int128;
  Wide value;
  if (k.form == FASTOPS_FORM_ITERATIVE) {
    std::uint64_t r = a, s = b;
    for (int i = 0; i <= k.corrections; ++i) {
      r = without_top_bit(r);
      s = without_top_bit(s);
    }
    value = static_cast<Wide>(a) * b - static_cast<Wide>(r) * s;
  } else {
    // Fractions in units of 2^-63.
    const std::uint64_t x = a << (63 - ka) << 1 >> 1, y = b << (63 - kb) << 1 >> 1;
    std::int64_t c = k.c;
    if (k.segment_bits) {
      const std::uint64_t row = x >> (63 - k.segment_bits), column = y >> (63 - k.segment_bits);
      c = table[k.unary ? row : (row << k.segment_bits) + column];
    }
    const __int128 sum =
        static_cast<__int128>(x) + y + static_cast<__int128>(c) * (std::int64_t{1} << (63 - k.unit_bits));
    Wide significand;
    int shift = ka + kb - 63;
    if (k.form == FASTOPS_FORM_EQUATION) {
      significand = static_cast<Wide>(sum + (static_cast<__int128>(1) << 63));
    } else {
      significand = (static_cast<Wide>(sum) & ~(~Wide{0} << 63)) | (Wide{1} << 63);
      shift += static_cast<int>(sum >> 63);
    }
    // The shift to the left reaches 65: bits beyond 2^128 vanish, which only 64-bit results (modulo 2^64) can meet.
    if (shift >= 0)
      value = shift >= 128 ? 0 : significand << shift;
    else
      value = shift <= -128 ? 0 : significand >> -shift;
  }
  if (!wraps && value > limit) return limit;
  return static_cast<std::uint64_t>(value);
}
// The plain multiplier modulo 2^64: the fractions of both logarithms as 64-bit numbers, whose sum's carry is an octave.
FASTOPS_INLINE std::uint64_t plain_product(std::uint64_t a, std::uint64_t b) {
  if (a == 0 || b == 0) return 0;
  const int ka = 63 - simd::leading_zeros(a), kb = 63 - simd::leading_zeros(b);
  const std::uint64_t x = a << (63 - ka) << 1, sum = x + (b << (63 - kb) << 1);
  const int octave = ka + kb + (sum < x ? 1 : 0);
  if (octave >= 64) return sum << (octave - 64);
  // An integer: no bit is lost.
  return (std::uint64_t{1} << octave) + (octave == 0 ? 0 : sum >> (64 - octave));
}

// The same in lanes, for operands that the format F holds exactly: the float whose bits are the sum of the operands'
// bits is the product, zeros apart, with whatever fraction a constant brings.
template <class F> FASTOPS_INLINE F float_product(F a, F b, IntOf<F> c, IntOf<F> keep) {
  using U = typename Unit<F>::U;
  const U k = bits<U>(keep);
  return bits<F>((bits<U>(a) & k) + (bits<U>(b) & k) + bits<U>(c));
}

// One operation on lanes or on a scalar.

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
template <class Multiplier, class Constants>
FASTOPS_HD inline float other_form(float a, float b, const Multiplier& m, const Constants& k) {
  return static_cast<float>(wide_product<double>(a, b, widen(m.params, k)));
}
template <class Multiplier, class Constants>
FASTOPS_HD inline double other_form(double a, double b, const Multiplier& m, const Constants& k) {
  return exact_product(a, b, m.params, k);
}
template <int op, class F, class Multiplier, class Constants>
FASTOPS_INLINE F full(F a, F b, const Multiplier& m, const Constants& k) {
  if constexpr (op == FASTOPS_MUL || op == FASTOPS_SQUARE) {
    if (m.params.form != FASTOPS_FORM_LOG) {
      if constexpr (sizeof(F) == sizeof(k.c)) {
        return other_form(a, op == FASTOPS_MUL ? b : a, m, k);
      } else if constexpr (sizeof(k.c) == 4) {
        return wide_product(a, op == FASTOPS_MUL ? b : a, widen(m.params, k));
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

// The short path.

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
    if constexpr (is_binary(op))
      return all_bits(seen_a, N::kTopBit) && all_bits(seen_b, N::kTopTwo);
    else if constexpr (op == FASTOPS_SQUARE)
      return all_bits(seen_b, N::kTopTwo);
    else
      return all_bits(seen_a, root ? N::kTopBit | N::kSign : N::kTopBit);
  }
};

// Products and quotients by a power of two.

// One operand's exponent and sign become a float by which the sum of the rest is multiplied: exactly, or with the one
// rounding of a subnormal result. `rest` marks lanes for the full path: subnormals, inf, nan and the outermost octaves.
template <int op, class F> struct Scaled {
  using N = Unit<F>;
  using U = typename N::U;
  using W = std::make_unsigned_t<typename N::S>;
  struct Split {
    F significand, scale;
    decltype(U{} < U{}) rest;
  };
  U c, keep;

  template <class Constants> FASTOPS_INLINE explicit Scaled(const Constants& k) {
    c = U{} + static_cast<W>(k.c);
    keep = U{} + (static_cast<W>(k.mantissa_mask) | static_cast<W>(~N::kMantissa));
  }
  FASTOPS_INLINE Split operator()(F a, F b) const {
    constexpr W mantissa = N::kMantissa, octave = N::kMinNormal, one = N::kOne;
    const U x = bits<U>(a), y = bits<U>(b);
    // The operand that gives its exponent: normal. The other: room for the sum, which is
    // within two octaves either way. Zeros beside. Which is which shows
    // before mantissas are cut: a subnormal's leading bits are not where they are cut.
    const U power = op == FASTOPS_MUL ? x : y, other = op == FASTOPS_MUL ? y : x;
    const U part = power & keep & mantissa, twice_power = power + power, twice_other = other + other;
    Split r;
    U sum = op == FASTOPS_MUL ? (other & keep) + part + c : (other & keep) - part + c;
    sum = select(twice_other == 0, other, sum);
    r.significand = bits<F>(sum);
    const auto far = twice_other - 6 * octave >= U{} + (2 * (2 * W{N::kBias} - 4)) * octave;
    r.rest = far & (twice_other != 0);
    if constexpr (op == FASTOPS_MUL) {
      r.scale = bits<F>(power & ~mantissa);
      const auto odd = twice_power - 2 * octave >= U{} + (4 * W{N::kBias}) * octave;
      r.rest = r.rest | (odd & (twice_power != 0));
    } else {
      r.scale = bits<F>((one + one) - (power & ~mantissa));
      r.rest = r.rest | (twice_power - 2 * octave >= U{} + (4 * W{N::kBias} - 2) * octave);
    }
    return r;
  }
};

// Gradients.

// v 2^exponent, rounded at most once.
FASTOPS_HD inline double times_power(double v, std::int64_t exponent) {
  if (exponent > 2100) exponent = 2100;
  if (exponent < -2200) exponent = -2200;
  // Steps towards the result's own range, so that at most the last one rounds.
  for (; exponent > 1000; exponent -= 1000) v *= 0x1p1000;
  for (; exponent < -900; exponent += 900) v *= 0x1p-900;
  return v * bits<double>((exponent + 1023) << 52);
}

template <class E> struct Gradients {
  E a, b;
};
// Those of a product or quotient of x and y, g that of the result; T rounds to the dtype. One number at a time. Of a
// quotient FASTOPS_GRADIENT_MIMIC needs products as well, by constants of their own.
template <class T, class E, class Multiplier, class Constants>
FASTOPS_HD inline Gradients<E> gradient(int op, fastops_gradient mode, E x, E y, E g, const Multiplier& m,
                                        const Constants& k, const Constants& k_product) {
  using N = Unit<E>;
  const bool is_mul = op == FASTOPS_MUL;
  if (mode == FASTOPS_GRADIENT_MIMIC) {
    const auto product = [&](E u, E v) { return T::get(T::put(full<FASTOPS_MUL>(u, v, m, k_product))); };
    const auto quotient = [&](E u, E v) { return T::get(T::put(full<FASTOPS_DIV>(u, v, m, k))); };
    if (is_mul) return {product(g, y), product(g, x)};
    return {quotient(g, y), -quotient(product(g, x), product(y, y))};
  }
  // One rounding, as of the double product, which is exact.
  if (mode == FASTOPS_GRADIENT_STE && is_mul) return {g * y, g * x};
  const auto xd = static_cast<double>(x), yd = static_cast<double>(y), gd = static_cast<double>(g);
  if (mode == FASTOPS_GRADIENT_STE) return {static_cast<E>(gd / yd), static_cast<E>(-gd * xd / (yd * yd))};
  // Exact: zeros and infinities have the mantissa of a power of two; their exponent is never used.
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
      if (m.params.form == FASTOPS_FORM_LOG)
        return times_power(gd * sign, other.exponent + (first ? carry(own_mantissa, other_mantissa)
                                                              : carry(other_mantissa, own_mantissa)));
      if (m.params.form == FASTOPS_FORM_EQUATION) return times_power(gd * sign, other.exponent);
      const double significand = static_cast<double>(bits<E>(static_cast<typename N::S>(other.mantissa | N::kOne)));
      double rest = significand;
      for (int c = 0; c <= m.params.corrections; ++c) rest = without_top_bit(rest);
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
  return {static_cast<E>(ga), static_cast<E>(gb)};
}

}  // namespace fastops::FASTOPS_LEVEL::mitchell
#endif
