// SPDX-License-Identifier: BSD-3-Clause
// What the matrix products make of their operands, and their terms where a short step does not do.
#ifndef FASTOPS_MITCHELL_MITCHELL_MATMUL_MATH_H
#define FASTOPS_MITCHELL_MITCHELL_MATMUL_MATH_H

#include "core/simd.h"
#include "mitchell/mitchell_matmul.h"

namespace fastops::FASTOPS_LEVEL::matmul {

using simd::bits;
using simd::select;

template <class T> struct Number;
template <> struct Number<float> {
  using Int = std::int32_t;
  using F = simd::f32;
  using I = simd::i32;
  using U = simd::u32;
  static constexpr int kMantissa = 23;
};
template <> struct Number<double> {
  using Int = std::int64_t;
  using F = simd::f64;
  using I = simd::i64;
  using U = simd::u64;
  static constexpr int kMantissa = 52;
};

// Sums of whole bit patterns wrap.
template <class T> FASTOPS_INLINE typename Number<T>::I added(typename Number<T>::I a, typename Number<T>::I b) {
  using U = typename Number<T>::U;
  return bits<typename Number<T>::I>(bits<U>(a) + bits<U>(b));
}

template <class T> struct Bits : Number<T> {
  using Int = typename Number<T>::Int;
  static constexpr int kMantissa = Number<T>::kMantissa;
  static constexpr std::size_t kWidth = simd::kLanes<typename Number<T>::F>;
  static constexpr Int kSmallest = Int{1} << kMantissa;  // the smallest normal; one unit of the exponent
  static constexpr Int kFraction = kSmallest - 1;
  static constexpr Int kSign = static_cast<Int>(static_cast<std::uint64_t>(1) << (sizeof(T) * 8 - 1));
  static constexpr Int kMagnitude = ~kSign;
  static constexpr Int kInfinity = kMagnitude & ~kFraction;
  static constexpr Int kOne = (kInfinity >> 1) & ~kFraction;
  // Half of the largest exponent: a product overflows only where an operand reaches it.
  static constexpr Int kLarge = kOne + (kInfinity >> kMantissa >> 2) * kSmallest - 2 * kSmallest;
};

// What packing makes of the values.

// Subnormals become zero, mantissas are cut; a nan keeps all its bits.
template <class T> FASTOPS_INLINE typename Bits<T>::F clean(typename Bits<T>::F x, typename Bits<T>::Int keep) {
  using B = Bits<T>;
  using I = typename B::I;
  const I u = bits<I>(x), magnitude = u & B::kMagnitude;
  const I cut = select(magnitude < B::kSmallest, u & B::kSign, u & keep);
  return bits<typename B::F>(select(magnitude > B::kInfinity, u, cut));
}

// s 2^e; infinities and nan stay.
template <class T> FASTOPS_INLINE typename Bits<T>::F power(typename Bits<T>::F x) {
  using B = Bits<T>;
  using I = typename B::I;
  const I u = bits<I>(x);
  return bits<typename B::F>(select((u & B::kMagnitude) > B::kInfinity, u, u & ~B::kFraction));
}

// x without its top corrections + 1 set bits; exact, also where that is subnormal; zero for infinities and nan.
template <class T> FASTOPS_INLINE typename Bits<T>::F residue(typename Bits<T>::F x, int corrections) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  const I magnitude = bits<I>(x) & B::kMagnitude;
  const auto small = magnitude < (B::kMantissa + 2) * B::kSmallest;
  constexpr T kUp = T(18446744073709551616.0);  // 2^64
  F rest = select(magnitude >= B::kInfinity, F{}, select(small, x * kUp, x));
  for (int i = 0; i <= corrections; ++i) rest -= bits<F>(bits<I>(rest) & ~B::kFraction);
  return select(small, rest * (1 / kUp), rest);
}

// Whether a product with it could overflow.
template <class T> FASTOPS_INLINE typename Bits<T>::I is_large(typename Bits<T>::F x) {
  return (bits<typename Bits<T>::I>(x) & Bits<T>::kMagnitude) >= Bits<T>::kLarge;
}

// Values that the short step cannot multiply: they could overflow, or vanish, within it.
template <class T> FASTOPS_INLINE typename Bits<T>::I is_odd(typename Bits<T>::F x) {
  using B = Bits<T>;
  using I = typename B::I;
  const I magnitude = bits<I>(x) & B::kMagnitude;
  return (magnitude >= B::kLarge) | ((magnitude < 2 * B::kSmallest) & (magnitude != 0));
}

template <class T> struct Pair {
  typename Bits<T>::F first, second;
};

// Whether a value is packed as one number, which is the same on both sides, and that number.
FASTOPS_HD constexpr bool is_single(Pack pack) { return pack == Pack::kRaw || pack == Pack::kPower; }
template <class T>
FASTOPS_INLINE typename Bits<T>::F pack_single(Pack pack, typename Bits<T>::F x, typename Bits<T>::Int keep) {
  return pack == Pack::kRaw ? x : power<T>(clean<T>(x, keep));
}

template <class T, class Product> FASTOPS_INLINE Pair<T> pack_pair_a(const Product& product, typename Bits<T>::F x) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  if (is_single(product.pack_a)) return {pack_single<T>(product.pack_a, x, product.keep), F{}};
  x = clean<T>(x, product.keep);
  if (product.pack_a != Pack::kEquation) {
    const F rest = residue<T>(x, product.corrections);
    const auto special = (bits<I>(x) & B::kMagnitude) >= B::kInfinity;
    return {select(special, x, x - rest), rest};
  }
  const F top = power<T>(x);
  const I magnitude = bits<I>(x) & B::kMagnitude;
  const auto regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const F fraction = simd::convert<F>((bits<I>(x) & B::kFraction) + product.c) * (T(1) / T(B::kSmallest));
  return {top, select(regular, fraction * top, F{})};
}

template <class T, class Product> FASTOPS_INLINE Pair<T> pack_pair_b(const Product& product, typename Bits<T>::F x) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  if (is_single(product.pack_b)) return {pack_single<T>(product.pack_b, x, product.keep), F{}};
  x = clean<T>(x, product.keep);
  const auto special = (bits<I>(x) & B::kMagnitude) >= B::kInfinity;
  if (product.pack_b == Pack::kEquation) return {x, select(special, F{}, power<T>(x))};
  const F rest = residue<T>(x, product.corrections);
  if (product.pack_b == Pack::kTop) return {select(special, x, x - rest), F{}};
  return {x, select(special, F{}, x - rest)};
}

// As clean(), but subnormals stay: kAny tells of them.
template <class T> FASTOPS_INLINE typename Bits<T>::I cut(typename Bits<T>::I u, typename Bits<T>::Int keep) {
  return select((u & Bits<T>::kMagnitude) > Bits<T>::kInfinity, u, u & keep);
}

template <class T> struct LogEntry {
  typename Bits<T>::Int mantissa;
  T scale;
};

// The mantissa of a with the constant, brought into [0, 1) by moving a unit into the exponent of `scale`: then b = 0
// stays below the smallest normal (which the tile reads as zero) and no other b overflows but those flagged.
template <class T>
FASTOPS_INLINE void log_entry(typename Bits<T>::I u, typename Bits<T>::I c, typename Bits<T>::I* mantissa,
                              typename Bits<T>::I* scale) {
  using B = Bits<T>;
  using I = typename B::I;
  const I magnitude = u & B::kMagnitude;
  const I regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const I m = select(regular, u & B::kFraction, I{}) + c, s = u & ~B::kFraction;
  I move = select(m >= B::kSmallest, I{} + B::kSmallest, select(m < 0, I{} - B::kSmallest, I{}));
  const I moved = (s + select(regular, move, I{})) & B::kInfinity;
  move = select(regular & ((moved == B::kInfinity) | (moved == 0)), I{}, move);
  *mantissa = m - move;
  *scale = select(regular, s + select(regular, move, I{}), u);
}

// b as bits; true where the short body cannot multiply it.
template <class T>
FASTOPS_INLINE typename Bits<T>::I log_b(typename Bits<T>::F x, typename Bits<T>::Int keep,
                                         typename Bits<T>::I* result) {
  x = clean<T>(x, keep);
  *result = bits<typename Bits<T>::I>(x);
  return is_odd<T>(x);
}

// A term with any operands, for panels that hold huge, tiny, infinite or nan values: b is moved away from the ends of
// the exponent's range and the scale moved against it, what overflows does so before it is added. `unit` is a power of
// two that belongs to the mantissa.
template <class T>
FASTOPS_INLINE typename Bits<T>::F any_term(typename Bits<T>::I b, typename Bits<T>::I mantissa,
                                            typename Bits<T>::F scale, typename Bits<T>::Int mask,
                                            typename Bits<T>::F unit = typename Bits<T>::F{} + T(1)) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  constexpr typename B::Int kMove = 4 * B::kSmallest;
  const I magnitude = b & B::kMagnitude;
  const auto special = magnitude >= B::kInfinity;
  const auto huge = (magnitude >= B::kInfinity - kMove) & (special == 0);
  const auto tiny = magnitude < B::kSmallest + kMove;
  const I move = select(huge, I{} - kMove, select(tiny, I{} + kMove, I{}));
  const F factor = select(huge, F{} + T(16), select(tiny, F{} + T(0.0625), F{} + T(1)));
  I t = added<T>(added<T>(b, move), mantissa) & mask;
  t = select(special, b, select(magnitude < B::kSmallest, b & B::kSign, t));
  return bits<F>(t) * unit * (scale * factor);
}

}  // namespace fastops::FASTOPS_LEVEL::matmul
#endif
