// SPDX-License-Identifier: BSD-3-Clause
// What the matrix products make of their operands, and the steps of their register tiles.
#ifndef FASTOPS_MITCHELL_MITCHELL_MATMUL_BODIES_H
#define FASTOPS_MITCHELL_MITCHELL_MATMUL_BODIES_H

#include <type_traits>

#include "core/simd.h"
#include "mitchell/mitchell_matmul.h"

namespace fastops::FASTOPS_LEVEL::matmul {

using simd::bits;
using simd::load;
using simd::select;
using simd::splat;
using simd::store;

constexpr std::size_t min_of(std::size_t a, std::size_t b) { return a < b ? a : b; }

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
  static constexpr std::size_t kWidth = kBytes / sizeof(T);
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

template <class T> struct Pair {
  typename Bits<T>::F first, second;
};

template <class T> FASTOPS_INLINE Pair<T> pack_pair_a(const Product<T>& product, typename Bits<T>::F x) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  if (product.pack_a == Pack::kRaw) return {x, F{}};
  x = clean<T>(x, product.keep);
  if (product.pack_a == Pack::kPower) return {power<T>(x), F{}};
  if (product.pack_a != Pack::kEquation) {
    const F rest = residue<T>(x, product.corrections);
    const auto special = (bits<I>(x) & B::kMagnitude) >= B::kInfinity;
    return {select(special, x, x - rest), rest};
  }
  const F top = power<T>(x);
  const I magnitude = bits<I>(x) & B::kMagnitude;
  const auto regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const F fraction = __builtin_convertvector((bits<I>(x) & B::kFraction) + product.c, F) * (T(1) / T(B::kSmallest));
  return {top, select(regular, fraction * top, F{})};
}

template <class T> FASTOPS_INLINE Pair<T> pack_pair_b(const Product<T>& product, typename Bits<T>::F x) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  if (product.pack_b == Pack::kRaw) return {x, F{}};
  x = clean<T>(x, product.keep);
  if (product.pack_b == Pack::kPower) return {power<T>(x), F{}};
  const auto special = (bits<I>(x) & B::kMagnitude) >= B::kInfinity;
  if (product.pack_b == Pack::kEquation) return {x, select(special, F{}, power<T>(x))};
  const F rest = residue<T>(x, product.corrections);
  if (product.pack_b == Pack::kTop) return {select(special, x, x - rest), F{}};
  return {x, select(special, F{}, x - rest)};
}

// What a panel holds, and so which bodies can multiply it.
constexpr unsigned char kZeros = 1;       // zeros
constexpr unsigned char kWide = 2;        // values outside [Traces::kLeast, kMost)
constexpr unsigned char kFar = 4;         // values whose product with another such leaves the exponent's range
constexpr unsigned char kAny = 8;         // huge, tiny, infinite or nan: only the body that takes every value
constexpr unsigned char kLogPacked = 16;  // the rows of a are packed for LogBody, too
constexpr unsigned char flag_if(bool found, unsigned char flag) { return found ? flag : 0; }

// SumBody has no zero: in a zero's place stands a power of two so small that its product, a trace, leaves every other
// sum of the panel as it is. Products of operands in [kLeast, kMost) are multiples of kUnit = 2^-(2 low + 1 +
// mantissa), so a sum of them is zero or at least kUnit, and a trace is below a quarter of its last bit. Only where the
// sum is zero do traces add up, to less than kUnit, and are taken off at the end. Zeros of one operand only: a trace of
// two would be too small for a number. With a constant in (-1, 1): 3 low + high <= bias - 2 mantissa - 6.
template <class T> struct Traces {
  using B = Bits<T>;
  using Int = typename B::Int;
  static constexpr Int kBias = B::kOne >> B::kMantissa;
  static constexpr Int kLow = kBias / 6, kHigh = kBias / 10;
  static_assert(3 * kLow + kHigh <= kBias - 2 * B::kMantissa - 6, "a trace would change a sum");
  static constexpr Int kLeast = B::kOne - kLow * B::kSmallest, kMost = B::kOne + kHigh * B::kSmallest;
  static constexpr Int kUnit = B::kOne - (2 * kLow + 1 + B::kMantissa) * B::kSmallest;
  static constexpr Int kForA = kLow * B::kSmallest - B::kOne + B::kSmallest;  // in units of SumBody's a
  static constexpr Int kForB = (kLow + 2) * B::kSmallest;
};

// The least and the largest magnitude that were added, zeros apart.
template <class T> struct Extremes {
  using B = Bits<T>;
  using I = typename B::I;
  I least = I{} + B::kMagnitude, most{}, zero{};
  FASTOPS_INLINE void add(I u) {
    const I magnitude = u & B::kMagnitude, below = (magnitude - 1) & B::kMagnitude;
    zero |= magnitude == 0;
    least = select(below < least, below, least);
    most = select(magnitude > most, magnitude, most);
  }
  FASTOPS_INLINE unsigned char flags() const {
    const bool far = simd::any((least < 2 * B::kOne - B::kLarge - 1) | (most >= B::kLarge));
    const bool wide = simd::any((least < Traces<T>::kLeast - 1) | (most >= Traces<T>::kMost));
    const bool any = simd::any((least < 2 * B::kSmallest - 1) | (most >= B::kLarge));
    return flag_if(simd::any(zero), kZeros) | flag_if(wide, kWide) | flag_if(far, kFar) | flag_if(any, kAny);
  }
};

// Whether SumBody can multiply two panels.
constexpr bool sums_suffice(unsigned char a, unsigned char b) {
  return ((a | b) & (kFar | kAny)) == 0 && ((a | b) & (kZeros | kWide)) != (kZeros | kWide) && (a & b & kZeros) == 0;
}

// The mantissa of a with the constant, brought into [0, 1) by moving a unit into the exponent of `scale`: then b = 0
// stays below the smallest normal (which the tile reads as zero) and no other b overflows but those flagged.
template <class T> struct LogEntry {
  typename Bits<T>::Int mantissa;
  T scale;
};

// As clean(), but subnormals stay: kAny tells of them.
template <class T> FASTOPS_INLINE typename Bits<T>::I cut(typename Bits<T>::I u, typename Bits<T>::Int keep) {
  return select((u & Bits<T>::kMagnitude) > Bits<T>::kInfinity, u, u & keep);
}

template <class T>
FASTOPS_INLINE void log_entry(typename Bits<T>::I u, typename Bits<T>::I c, typename Bits<T>::I* mantissa,
                              typename Bits<T>::I* scale) {
  using B = Bits<T>;
  using I = typename B::I;
  const I magnitude = u & B::kMagnitude;
  const I regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const I m = (regular & u & B::kFraction) + c, s = u & ~B::kFraction;
  I move = select(m >= B::kSmallest, I{} + B::kSmallest, select(m < 0, I{} - B::kSmallest, I{}));
  const I moved = (s + (regular & move)) & B::kInfinity;
  move = select(regular & ((moved == B::kInfinity) | (moved == 0)), I{}, move);
  *mantissa = m - move;
  *scale = select(regular, s + (regular & move), u);
}

// b as bits; true where the short body cannot multiply it.
template <class T>
FASTOPS_INLINE typename Bits<T>::I log_b(typename Bits<T>::F x, typename Bits<T>::Int keep,
                                         typename Bits<T>::I* result) {
  using B = Bits<T>;
  using I = typename B::I;
  const I u = bits<I>(clean<T>(x, keep)), magnitude = u & B::kMagnitude;
  *result = u;
  return (magnitude >= B::kLarge) | ((magnitude < 2 * B::kSmallest) & (magnitude != 0));
}

// Tile bodies.

template <class T, int RowsOfPanel, int ColsOfPanel> struct ExactBody {
  using Vector = typename Bits<T>::F;
  using Row = Vector;
  using Column = Vector;
  const T* a;
  const T* b;
  FASTOPS_INLINE Row row(std::size_t k, int i) const { return splat<Vector>(a[k * RowsOfPanel + i]); }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth);
  }
  FASTOPS_INLINE Vector step(Row r, Column c, int, int, Vector acc) const { return simd::fma(r, c, acc); }
};

// Two steps are one product, which overflows before it is added: for panels with huge, infinite or nan values.
template <class T, int RowsOfPanel, int ColsOfPanel> struct AnyPairBody {
  using Vector = typename Bits<T>::F;
  using Row = Pair<T>;
  using Column = Pair<T>;
  ExactBody<T, RowsOfPanel, ColsOfPanel> one;
  FASTOPS_INLINE Row row(std::size_t k, int i) const { return {one.row(2 * k, i), one.row(2 * k + 1, i)}; }
  FASTOPS_INLINE Column column(std::size_t k, int v) const { return {one.column(2 * k, v), one.column(2 * k + 1, v)}; }
  FASTOPS_INLINE Vector step(const Row& r, const Column& c, int, int, Vector acc) const {
    return acc + simd::fma(r.second, c.second, r.first * c.first);
  }
};

// Where no product can leave the exponent's range, a's exponent and sign are in the sum as well: the product is the
// float of these bits.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SumBody {
  using Vector = typename Bits<T>::F;
  using Row = typename Bits<T>::U;
  using Column = Row;
  const std::make_unsigned_t<typename Bits<T>::Int>* a;
  const T* b;
  bool traces;
  FASTOPS_INLINE Row row(std::size_t k, int i) const { return splat<Row>(a[k * RowsOfPanel + i]); }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return bits<Row>(load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth));
  }
  FASTOPS_INLINE Vector step(Row r, Column c, int, int, Vector acc) const { return acc + bits<Vector>(c + r); }
};

// Takes traces off finished sums.
template <class Body, int Rows, int Vectors, class V> FASTOPS_INLINE void settle(const Body&, V (&)[Rows][Vectors]) {}
template <class T, int RowsOfPanel, int ColsOfPanel, int Rows, int Vectors, class V>
FASTOPS_INLINE void settle(const SumBody<T, RowsOfPanel, ColsOfPanel>& body, V (&acc)[Rows][Vectors]) {
  using I = typename Bits<T>::I;
  if (!body.traces) return;
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      acc[i][v] = select((bits<I>(acc[i][v]) & Bits<T>::kMagnitude) < Traces<T>::kUnit, V{}, acc[i][v]);
}

// The power of two multiplies exactly, so one rounding is left, that of the sum; it carries a's sign and specials.
template <class T, int RowsOfPanel, int ColsOfPanel> struct LogBody {
  using Vector = typename Bits<T>::F;
  using I = typename Bits<T>::I;
  struct Row {
    I mantissa;
    Vector scale;
  };
  using Column = I;
  const LogEntry<T>* a;
  const T* b;
  FASTOPS_INLINE Row row(std::size_t k, int i) const {
    const LogEntry<T>& entry = a[k * RowsOfPanel + i];
    return {splat<I>(entry.mantissa), splat<Vector>(entry.scale)};
  }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return bits<I>(load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth));
  }
  FASTOPS_INLINE Vector step(const Row& r, Column c, int, int, Vector acc) const {
    return simd::fma(bits<Vector>(added<T>(c, r.mantissa)), r.scale, acc);
  }
};

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
  const auto huge = (magnitude >= B::kInfinity - kMove) & ~special;
  const auto tiny = magnitude < B::kSmallest + kMove;
  const I move = select(huge, I{} - kMove, select(tiny, I{} + kMove, I{}));
  const F factor = select(huge, F{} + T(16), select(tiny, F{} + T(0.0625), F{} + T(1)));
  I t = added<T>(added<T>(b, move), mantissa) & mask;
  t = select(special, b, select(magnitude < B::kSmallest, b & B::kSign, t));
  return bits<F>(t) * unit * (scale * factor);
}

template <class T, int RowsOfPanel, int ColsOfPanel> struct AnyLogBody : LogBody<T, RowsOfPanel, ColsOfPanel> {
  using Base = LogBody<T, RowsOfPanel, ColsOfPanel>;
  using Vector = typename Base::Vector;
  FASTOPS_INLINE Vector step(const typename Base::Row& r, typename Base::Column c, int, int, Vector acc) const {
    return acc + any_term<T>(c, r.mantissa, r.scale, -1);
  }
};

// Packed a: for every element the 16 sums of its mantissa and the constants of its segment; after them the scales.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SegmentBody {
  using Int = typename Bits<T>::Int;
  using Vector = typename Bits<T>::F;
  using I = typename Bits<T>::I;
  struct Row {
    const Int* mantissas;
    Vector scale;
  };
  struct Column {
    I bits, segment;
  };
  const Int* a;
  const T* scales;
  const T* b;
  FASTOPS_INLINE Row row(std::size_t k, int i) const {
    return {a + (k * RowsOfPanel + i) * 16, splat<Vector>(scales[k * RowsOfPanel + i])};
  }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    const I u = bits<I>(load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth));
    return {u, (u >> (Bits<T>::kMantissa - 4)) & 15};
  }
  FASTOPS_INLINE Vector step(const Row& r, const Column& c, int, int, Vector acc) const {
    return simd::fma(bits<Vector>(added<T>(c.bits, simd::lookup16(r.mantissas, c.segment))), r.scale, acc);
  }
};

// Where a permute of 16 entries takes many steps: the sums of b with the constants of all 16 segments of a are made
// once for all rows (`sums`: step, segment, column), and the segment of a says which to load.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SummedSegmentBody {
  using Int = typename Bits<T>::Int;
  using Vector = typename Bits<T>::F;
  using I = typename Bits<T>::I;
  struct Row {
    I mantissa;
    Vector scale;
    const Int* sums;
  };
  using Column = I;
  const Int* a;
  const T* scales;
  const Int* first;  // of the segment's sums
  const Int* sums;
  const T* b;
  FASTOPS_INLINE Row row(std::size_t k, int i) const {
    const std::size_t at = k * RowsOfPanel + i;
    return {splat<I>(a[at]), splat<Vector>(scales[at]), sums + k * 16 * ColsOfPanel + first[at]};
  }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return bits<I>(load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth));
  }
  FASTOPS_INLINE I sum(const Row& r, int v) const {
    return added<T>(load<I>(r.sums + v * Bits<T>::kWidth), r.mantissa);
  }
  FASTOPS_INLINE Vector step(const Row& r, Column, int, int v, Vector acc) const {
    return simd::fma(bits<Vector>(sum(r, v)), r.scale, acc);
  }
};

template <class T, int RowsOfPanel, int ColsOfPanel>
struct AnySummedSegmentBody : SummedSegmentBody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SummedSegmentBody<T, RowsOfPanel, ColsOfPanel>;
  using Vector = typename Base::Vector;
  FASTOPS_INLINE Vector step(const typename Base::Row& r, typename Base::Column c, int, int v, Vector acc) const {
    return acc + any_term<T>(c, added<T>(added<T>(this->sum(r, v), ~c), typename Base::I{} + 1), r.scale, -1);
  }
};

template <class T, int RowsOfPanel, int ColsOfPanel> struct AnySegmentBody : SegmentBody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SegmentBody<T, RowsOfPanel, ColsOfPanel>;
  using Vector = typename Base::Vector;
  FASTOPS_INLINE Vector step(const typename Base::Row& r, const typename Base::Column& c, int, int, Vector acc) const {
    return acc + any_term<T>(c.bits, simd::lookup16(r.mantissas, c.segment), r.scale, -1);
  }
};

// The slope in the point is b's power of two, doubled where the mantissas carry. `mantissas` (in [0, 1)) is the tile
// of the point, which no step changes.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SlopeBody {
  using Int = typename Bits<T>::Int;
  using Vector = typename Bits<T>::F;
  using I = typename Bits<T>::I;
  using Row = Vector;
  using Column = I;
  const T* a;
  const T* b;
  const Int* mantissas;
  FASTOPS_INLINE Row row(std::size_t k, int i) const { return splat<Vector>(a[k * RowsOfPanel + i]); }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return bits<I>(load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth));
  }
  FASTOPS_INLINE I mantissa(int i, int v) const { return load<I>(mantissas + i * ColsOfPanel + v * Bits<T>::kWidth); }
  FASTOPS_INLINE Vector step(Row r, Column c, int i, int v, Vector acc) const {
    return simd::fma(bits<Vector>(added<T>(c, mantissa(i, v)) & ~Bits<T>::kFraction), r, acc);
  }
};

template <class T, int RowsOfPanel, int ColsOfPanel> struct AnySlopeBody : SlopeBody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SlopeBody<T, RowsOfPanel, ColsOfPanel>;
  using Vector = typename Base::Vector;
  const T* factors;
  FASTOPS_INLINE Vector step(typename Base::Row r, typename Base::Column c, int i, int v, Vector acc) const {
    return acc + any_term<T>(c, this->mantissa(i, v), r, ~Bits<T>::kFraction,
                             load<Vector>(factors + i * ColsOfPanel + v * Bits<T>::kWidth));
  }
};

// With a table: `rows` holds the first index of the point's row of constants.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SegmentSlopeBody : SlopeBody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SlopeBody<T, RowsOfPanel, ColsOfPanel>;
  using Int = typename Base::Int;
  using Vector = typename Base::Vector;
  using I = typename Base::I;
  const Int* rows;
  const Int* table;
  FASTOPS_INLINE Vector step(typename Base::Row r, typename Base::Column c, int i, int v, Vector acc) const {
    const I row = load<I>(rows + i * ColsOfPanel + v * Bits<T>::kWidth);
    const I constant = simd::gather(table, row + ((c >> (Bits<T>::kMantissa - 4)) & 15));
    return acc + any_term<T>(c, this->mantissa(i, v) + constant, r, ~Bits<T>::kFraction);
  }
};

// The same with a and b in each other's place: a is where the other operand's power of two comes from.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SlopeABody {
  using Int = typename Bits<T>::Int;
  using Vector = typename Bits<T>::F;
  using I = typename Bits<T>::I;
  using Row = I;
  using Column = Vector;
  const T* a;
  const T* b;
  const Int* mantissas;
  FASTOPS_INLINE Row row(std::size_t k, int i) const { return splat<I>(bits<Int>(a[k * RowsOfPanel + i])); }
  FASTOPS_INLINE Column column(std::size_t k, int v) const {
    return load<Vector>(b + k * ColsOfPanel + v * Bits<T>::kWidth);
  }
  FASTOPS_INLINE I mantissa(int i, int v) const { return load<I>(mantissas + i * ColsOfPanel + v * Bits<T>::kWidth); }
  FASTOPS_INLINE Vector step(Row r, Column c, int i, int v, Vector acc) const {
    return simd::fma(bits<Vector>(added<T>(r, mantissa(i, v)) & ~Bits<T>::kFraction), c, acc);
  }
};

template <class T, int RowsOfPanel, int ColsOfPanel> struct AnySlopeABody : SlopeABody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SlopeABody<T, RowsOfPanel, ColsOfPanel>;
  using Vector = typename Base::Vector;
  const T* factors;
  FASTOPS_INLINE Vector step(typename Base::Row r, typename Base::Column c, int i, int v, Vector acc) const {
    return acc + any_term<T>(r, this->mantissa(i, v), c, ~Bits<T>::kFraction,
                             load<Vector>(factors + i * ColsOfPanel + v * Bits<T>::kWidth));
  }
};

template <class T, int RowsOfPanel, int ColsOfPanel>
struct SegmentSlopeABody : SlopeABody<T, RowsOfPanel, ColsOfPanel> {
  using Base = SlopeABody<T, RowsOfPanel, ColsOfPanel>;
  using Int = typename Base::Int;
  using Vector = typename Base::Vector;
  using I = typename Base::I;
  const Int* rows;
  const Int* table;
  FASTOPS_INLINE Vector step(typename Base::Row r, typename Base::Column c, int i, int v, Vector acc) const {
    const I row = load<I>(rows + i * ColsOfPanel + v * Bits<T>::kWidth);
    const I constant = simd::gather(table, row + ((r >> (Bits<T>::kMantissa - 4)) & 15));
    return acc + any_term<T>(r, this->mantissa(i, v) + constant, c, ~Bits<T>::kFraction);
  }
};

template <TileBody kBody> constexpr bool kSlopeOfA = kBody == TileBody::kSlopeA || kBody == TileBody::kSlopeASegments;
template <TileBody kBody>
constexpr bool kSlopeOfTable = kBody == TileBody::kSlopeSegments || kBody == TileBody::kSlopeASegments;

}  // namespace fastops::FASTOPS_LEVEL::matmul
#endif
