// SPDX-License-Identifier: BSD-3-Clause
// exp, exp2, log, log2 and rsqrt of simd lanes: no branches, no tables, every input right (subnormals, infinities,
// nan).
//
// Largest error in units in the last place of the exact result (of 2^-149, 2^-1074 where that is subnormal), to which
// tests/native/test_math.cpp holds the functions. float32: over all 2^32 inputs; float64: bounds, over 10^7 samples.
//
//              exp    exp2   log    log2   rsqrt
//   float32    0.81   0.94   0.77   0.88   0.51    where fma rounds once (v3, v4, NEON)
//              0.81   1.21   0.85   1.96   1.50    v2
//   float64    1      1      1      1      1       where fma rounds once
//              2      2      2      2      2       v2
//
// Needs the default rounding mode and subnormals kept (no FlushSubnormals around it).
#ifndef FASTOPS_CORE_MATH_H
#define FASTOPS_CORE_MATH_H

#include "core/simd.h"

namespace fastops::FASTOPS_LEVEL::math {

using simd::bits;
using simd::select;
using simd::splat;

// The polynomials are minimax (Remez) in the stated form; ln2_high has so few bits that n * ln2_high is exact.
struct Single {
  using Lane = simd::f32;
  using Unsigned = simd::u32;
  using Signed = simd::i32;
  using T = float;
  using U = std::uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr T kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr T kLog2E = 0x1.715476p+0f, kLog2ELow = 0x1.4ae0cp-26f;
  static constexpr T kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  static constexpr T kSqrtHalf = 0x1.6a09e6p-1f;
  static constexpr T kSmallestNormal = 0x1p-126f, kInfinity = __builtin_inff(), kNan = __builtin_nanf("");
  static constexpr T kExpLow = -104.0f, kExpHigh = 89.0f, kExp2Low = -151.0f, kExp2High = 129.0f;
  // exp(r) = 1 + r + r^2 p(r), |r| <= ln2 / 2
  struct Exp {
    static constexpr int kTerms = 5;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.fffffcp-2f, 0x1.555498p-3f, 0x1.5558cap-5f, 0x1.1235fcp-7f, 0x1.6a2f50p-10f};
      return c[i];
    }
  };
  // 2^r = 1 + r p(r), |r| <= 1 / 2
  struct Exp2 {
    static constexpr int kTerms = 6;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aef8p-5f,
                         0x1.3b2d56p-7f, 0x1.5f38a0p-10f, 0x1.41f076p-13f};
      return c[i];
    }
  };
  // log(1 + f) = f - f^2 / 2 + f^3 p(f), sqrt(1/2) <= 1 + f < sqrt(2)
  struct Log {
    static constexpr int kTerms = 9;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.55554ap-2f,  -0x1.ffffeap-3f, 0x1.99a3c4p-3f,  -0x1.5562bcp-3f, 0x1.234d7ap-3f,
                         -0x1.fb6118p-4f, 0x1.e5037ep-4f,  -0x1.e1dab0p-4f, 0x1.1cc9acp-4f};
      return c[i];
    }
  };
};

struct Double {
  using Lane = simd::f64;
  using Unsigned = simd::u64;
  using Signed = simd::i64;
  using T = double;
  using U = std::uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr T kRound = 0x1.8p52;
  static constexpr T kLog2E = 0x1.71547652b82fep+0, kLog2ELow = 0x1.777d0ffda0d24p-56;
  static constexpr T kLn2High = 0x1.62e42fefa2p-1, kLn2Low = 0x1.9ef35793c7673p-41;
  static constexpr T kSqrtHalf = 0x1.6a09e667f3bcdp-1;
  static constexpr T kSmallestNormal = 0x1p-1022, kInfinity = __builtin_inf(), kNan = __builtin_nan("");
  static constexpr T kExpLow = -746.0, kExpHigh = 710.0, kExp2Low = -1076.0, kExp2High = 1025.0;
  struct Exp {
    static constexpr int kTerms = 10;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.0000000000007p-1,  0x1.5555555555502p-3,  0x1.55555555512e3p-5,  0x1.1111111126ad1p-7,
                         0x1.6c16c18236591p-10, 0x1.a01a012c0463cp-13, 0x1.a0199eba439a8p-16, 0x1.71df286559a4ep-19,
                         0x1.28a98d07c9ab9p-22, 0x1.ad7240b12a12fp-26};
      return c[i];
    }
  };
  struct Exp2 {
    static constexpr int kTerms = 11;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a2p-3,  0x1.c6b08d7049ff9p-5,  0x1.3b2ab6fba0519p-7,
                         0x1.5d87fe78cb9aep-10, 0x1.4309130e26d9ap-13, 0x1.ffcbfbae29778p-17, 0x1.62bfc92d68f37p-20,
                         0x1.b52678a8cbabep-24, 0x1.e618d9f32f509p-28, 0x1.e79c5d1b76710p-32};
      return c[i];
    }
  };
  // log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + z p(z)), s = f / (2 + f), z = s^2
  struct Log {
    static constexpr int kTerms = 7;
    static FASTOPS_HD constexpr T at(int i) {
      constexpr T c[] = {0x1.5555555555581p-1, 0x1.999999998486dp-2, 0x1.2492493e6df1dp-2, 0x1.c71c548e64941p-3,
                         0x1.7465c7424da55p-3, 0x1.39acd08eeac76p-3, 0x1.2e9d78366f52bp-3};
      return c[i];
    }
  };
};

template <class V> struct FormatOf;
template <> struct FormatOf<simd::f32> {
  using type = Single;
};
template <> struct FormatOf<simd::f64> {
  using type = Double;
};
template <class V> using Format = typename FormatOf<V>::type;

// c_I + c_(I + 1) x + ... by Horner's rule, unrolled. (The terms are a function: GPU code has no constant arrays of a
// class.)
template <class Terms, int I = 0, class V> FASTOPS_INLINE V polynomial(V x) {
  if constexpr (I + 1 == Terms::kTerms)
    return splat<V>(Terms::at(I));
  else
    return simd::fma(polynomial<Terms, I + 1>(x), x, splat<V>(Terms::at(I)));
}

// y 2^n, rounded once, for an n that is an integer in kRound's low bits and |n| <= 2 kBias.
template <class V> FASTOPS_INLINE V scale(V y, V n_rounded) {
  using F = Format<V>;
  using Unsigned = typename F::Unsigned;
  using U = typename F::U;
  constexpr U kOffset = 4 * F::kBias + 4;  // even, keeps the halved exponent positive
  const Unsigned n = bits<Unsigned>(n_rounded) - bits<Unsigned>(splat<V>(F::kRound)) + kOffset;
  const Unsigned half = n >> 1;
  const Unsigned first = (half - kOffset / 2 + U{F::kBias}) << F::kMantissa;
  const Unsigned second = (n - half - kOffset / 2 + U{F::kBias}) << F::kMantissa;
  return y * bits<V>(first) * bits<V>(second);
}

template <class V> FASTOPS_INLINE V exp(V x) {
  using F = Format<V>;
  const V low = splat<V>(F::kExpLow), high = splat<V>(F::kExpHigh), round = splat<V>(F::kRound);
  x = select(x < low, low, x);
  x = select(x > high, high, x);
  const V n_rounded = simd::fma(x, splat<V>(F::kLog2E), round);
  const V n = n_rounded - round;
  const V r = simd::fma(-n, splat<V>(F::kLn2Low), simd::fma(-n, splat<V>(F::kLn2High), x));
  // 1 + r with its rounding error, which alone could cost a quarter of a unit.
  const V high_sum = 1 + r, low_sum = r - (high_sum - 1);
  return scale(high_sum + simd::fma(r * r, polynomial<typename F::Exp>(r), low_sum), n_rounded);
}

template <class V> FASTOPS_INLINE V exp2(V x) {
  using F = Format<V>;
  const V low = splat<V>(F::kExp2Low), high = splat<V>(F::kExp2High), round = splat<V>(F::kRound);
  x = select(x < low, low, x);
  x = select(x > high, high, x);
  const V n_rounded = x + round;
  const V r = x - (n_rounded - round);
  return scale(simd::fma(r, polynomial<typename F::Exp2>(r), splat<V>(typename F::T(1))), n_rounded);
}

// x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and log(1 + f) = f - half_square + rest; for 0 < x < inf.
template <class V> struct Reduced {
  V k, f, half_square, rest;
};
template <class V> FASTOPS_INLINE Reduced<V> reduce(V x) {
  using F = Format<V>;
  using Unsigned = typename F::Unsigned;
  using T = typename F::T;
  constexpr int kShift = F::kMantissa + 1;
  const auto subnormal = x < splat<V>(F::kSmallestNormal);
  x = select(subnormal, x * T(std::uint64_t{1} << kShift), x);
  // The exponent above sqrt(1/2)'s bits, biased so that it stays positive.
  const Unsigned root = bits<Unsigned>(splat<V>(F::kSqrtHalf)), one = bits<Unsigned>(splat<V>(T(1)));
  const Unsigned biased = (bits<Unsigned>(x) + (one - root)) >> F::kMantissa;
  // The integer as the low bits of kRound, which is exact and needs no conversion instruction.
  V k = bits<V>(bits<Unsigned>(splat<V>(F::kRound)) + biased) - splat<V>(F::kRound + T(F::kBias));
  k = select(subnormal, k - T(kShift), k);
  const V f = bits<V>(bits<Unsigned>(x) - ((biased << F::kMantissa) - one)) - 1;
  const V half_f = T(0.5) * f, half_square = half_f * f;
  const V missing = kFusedMultiplyAdd ? simd::fma(half_f, f, -half_square) : V{};  // the rounding error of half_square
  V rest;
  if constexpr (sizeof(T) == 4) {
    rest = simd::fma(f * (f * f), polynomial<typename F::Log>(f), -missing);
  } else {
    const V s = f / (2 + f), z = s * s;
    rest = simd::fma(s, simd::fma(z, polynomial<typename F::Log>(z), half_square), -missing);
  }
  return {k, f, half_square, rest};
}

template <class V> FASTOPS_INLINE V log_specials(V x, V y) {
  using F = Format<V>;
  using T = typename F::T;
  const V zero = V{};
  y = select(x == splat<V>(F::kInfinity), x, y);
  y = select(x == zero, splat<V>(-F::kInfinity), y);
  y = select(x < zero, splat<V>(F::kNan), y);
  return select(x != x, x + T(1), y);
}

template <class V> FASTOPS_INLINE V log(V x) {
  using F = Format<V>;
  const auto [k, f, half_square, rest] = reduce(x);
  const V whole = k * splat<V>(F::kLn2High);
  const V high = whole + f;
  const V low = f - (high - whole);  // exact: |whole| >= |f|, or whole is zero
  return log_specials(x, high + (low + (simd::fma(k, splat<V>(F::kLn2Low), rest) - half_square)));
}

template <class V> FASTOPS_INLINE V log2(V x) {
  using F = Format<V>;
  const auto [k, f, half_square, rest] = reduce(x);
  const V c = splat<V>(F::kLog2E);
  const V product = f * c;
  V low = kFusedMultiplyAdd ? simd::fma(f, c, -product) : V{};
  low = simd::fma(-half_square, c, simd::fma(rest, c, simd::fma(f, splat<V>(F::kLog2ELow), low)));
  const V high = k + product;
  return log_specials(x, high + ((product - (high - k)) + low));
}

// 1 / sqrt(x); +-0 gives +-inf, a negative x gives nan.
template <class V> FASTOPS_INLINE V rsqrt(V x) {
  using F = Format<V>;
  using T = typename F::T;
  const V y = T(1) / simd::sqrt(x);
  if constexpr (!kFusedMultiplyAdd) return y;
  // One Newton step on x y^2 = 1 with the product x y kept to twice the precision.
  const V high = x * y, low = simd::fma(x, y, -high);
  const V residual = simd::fma(-low, y, simd::fma(-high, y, splat<V>(T(1))));
  const V better = simd::fma(T(0.5) * y, residual, y);
  return select((x > V{}) & (x < splat<V>(F::kInfinity)), better, y);
}

}  // namespace fastops::FASTOPS_LEVEL::math
#endif
