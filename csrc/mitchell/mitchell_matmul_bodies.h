// SPDX-License-Identifier: BSD-3-Clause
// What panels of the matrix products hold, and the steps of their register tiles.
#ifndef FASTOPS_MITCHELL_MITCHELL_MATMUL_BODIES_H
#define FASTOPS_MITCHELL_MITCHELL_MATMUL_BODIES_H

#include <type_traits>

#include "core/simd.h"
#include "mitchell/mitchell_matmul.h"
#include "mitchell/mitchell_matmul_math.h"

namespace fastops::FASTOPS_LEVEL::matmul {

using simd::load;
using simd::splat;
using simd::store;

constexpr std::size_t min_of(std::size_t a, std::size_t b) { return a < b ? a : b; }

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
    least = simd::min(least, below);
    most = simd::max(most, magnitude);
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
