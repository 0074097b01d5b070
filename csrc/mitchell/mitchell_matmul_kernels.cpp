// SPDX-License-Identifier: BSD-3-Clause
// Packing and register tiles of the Mitchell, bilinear, exact and gradient matrix products, compiled once per CPU
// level.
#include <type_traits>

#include "core/half.h"
#include "core/simd.h"
#include "core/tile.h"
#include "mitchell/mitchell_matmul.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

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
  static constexpr int kMantissa = 23;
};
template <> struct Number<double> {
  using Int = std::int64_t;
  using F = simd::f64;
  using I = simd::i64;
  static constexpr int kMantissa = 52;
};

template <class T> struct Bits : Number<T> {
  using Int = typename Number<T>::Int;
  static constexpr int kMantissa = Number<T>::kMantissa;
  static constexpr std::size_t kWidth = kBytes / sizeof(T);
  static constexpr Int kSmallest = Int{1} << kMantissa;  // the smallest normal; one unit of the exponent
  static constexpr Int kFraction = kSmallest - 1;
  static constexpr Int kSign = static_cast<Int>(static_cast<std::uint64_t>(1) << (sizeof(T) * 8 - 1));
  static constexpr Int kMagnitude = ~kSign;
  static constexpr Int kInfinity = kMagnitude & ~kFraction;
  // Half of the largest exponent: a product overflows only where an operand reaches it.
  static constexpr Int kLarge =
      (kInfinity >> 1 & ~kFraction) + (kInfinity >> kMantissa >> 2) * kSmallest - 2 * kSmallest;
};

// ---- reading operands ----

template <class T> FASTOPS_INLINE T element(const Operand& x, std::ptrdiff_t offset) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const double*>(x.data)[offset];
  } else {
    if (x.dtype == FASTOPS_F32) return static_cast<const float*>(x.data)[offset];
    const std::uint16_t h = static_cast<const std::uint16_t*>(x.data)[offset];
    const bool f16 = x.dtype == FASTOPS_F16;
    if (x.flush && (h & (f16 ? 0x7c00 : 0x7f80)) == 0) return half::from_bf16(h & 0x8000);
    return f16 ? half::from_f16(h) : half::from_bf16(h);
  }
}

template <class T> FASTOPS_INLINE bool is_native(const Operand& x) { return sizeof(T) == 8 || x.dtype == FASTOPS_F32; }

template <class T>
FASTOPS_INLINE void read_strided(const Operand& x, std::ptrdiff_t offset, std::ptrdiff_t stride, std::size_t n, T* to) {
  if (is_native<T>(x)) {
    const T* from = static_cast<const T*>(x.data) + offset;
    if (stride == 1)
      for (std::size_t i = 0; i < n; ++i) to[i] = from[i];
    else
      for (std::size_t i = 0; i < n; ++i) to[i] = from[static_cast<std::ptrdiff_t>(i) * stride];
  } else if constexpr (sizeof(T) == 4) {
    std::size_t i = 0;
    if (stride == 1 && !x.flush) {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(x.data) + offset;
      constexpr std::size_t kWidth = simd::kLanes<simd::f32>;
      if (x.dtype == FASTOPS_F16)
        for (; i + kWidth <= n; i += kWidth) store(to + i, half::from_f16(load<simd::half_u16>(from + i)));
      else
        for (; i + kWidth <= n; i += kWidth) store(to + i, half::from_bf16(load<simd::half_u16>(from + i)));
    }
    for (; i < n; ++i) to[i] = element<T>(x, offset + static_cast<std::ptrdiff_t>(i) * stride);
  }
}

// A row of patches (channel and kernel position) that moves on without dividing.
struct PatchRow {
  std::size_t channel, kernel_row, kernel_col;

  PatchRow(const Patches& p, std::size_t row)
      : channel(row / (p.kernel_height * p.kernel_width)),
        kernel_row(row / p.kernel_width % p.kernel_height),
        kernel_col(row % p.kernel_width) {}
  void advance(const Patches& p) {
    if (++kernel_col < p.kernel_width) return;
    kernel_col = 0;
    if (++kernel_row < p.kernel_height) return;
    kernel_row = 0;
    ++channel;
  }
};
struct PatchCol {
  std::size_t image, y, x;

  PatchCol(const Patches& p, std::size_t col)
      : image(col / (p.out_height * p.out_width)), y(col / p.out_width % p.out_height), x(col % p.out_width) {}
};

// n output positions from `at`; in place where they lie together in the image as T. What the padding covers is zero.
template <class T> const T* read_patches(const Operand& x, const PatchRow& row, PatchCol at, std::size_t n, T* buffer) {
  const Patches& p = *x.patches;
  const std::size_t down = row.kernel_row * p.dilation_h, right = row.kernel_col * p.dilation_w;
  for (std::size_t done = 0; done < n;) {
    const std::size_t run = min_of(n - done, p.out_width - at.x);
    const std::size_t y = at.y * p.stride_h + down - p.padding_h;  // wraps above the image
    T* const to = buffer + done;
    std::size_t begin = run, end = run;
    if (y < p.height) {
      // Column x stride + right - padding of the image, for x from at.x; begin and end bound those inside it.
      const std::size_t first = at.x * p.stride_w + right, limit = p.width + p.padding_w;
      begin = first >= p.padding_w ? 0 : min_of(run, (p.padding_w - first + p.stride_w - 1) / p.stride_w);
      if (first >= limit)
        end = begin;
      else if (first + (run - 1) * p.stride_w >= limit)
        end = (limit - first + p.stride_w - 1) / p.stride_w;
      if (end < begin) end = begin;
    }
    for (std::size_t i = 0; i < begin; ++i) to[i] = T{};
    if (begin < end) {
      const std::size_t column = (at.x + begin) * p.stride_w + right - p.padding_w;
      const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(at.image) * p.image_stride +
                                    static_cast<std::ptrdiff_t>((row.channel * p.height + y) * p.width + column);
      if (begin == 0 && end == n && p.stride_w == 1 && is_native<T>(x)) return static_cast<const T*>(x.data) + offset;
      read_strided(x, offset, static_cast<std::ptrdiff_t>(p.stride_w), end - begin, to + begin);
    }
    for (std::size_t i = end; i < run; ++i) to[i] = T{};
    done += run;
    at.x = 0;
    if (++at.y == p.out_height) {
      at.y = 0;
      ++at.image;
    }
  }
  return buffer;
}

// Elements (row, col) .. (row, col + n): in place where they lie together as T, else in `buffer`.
template <class T> const T* read(const Operand& x, std::size_t row, std::size_t col, std::size_t n, T* buffer) {
  if (x.layout == Layout::kPatches)
    return read_patches(x, PatchRow(*x.patches, row), PatchCol(*x.patches, x.first_col + col), n, buffer);
  std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(col) * x.col_stride;
  if (x.row_inner != 0) {
    offset += static_cast<std::ptrdiff_t>(row / x.row_inner) * x.row_outer_stride;
    row %= x.row_inner;
  }
  offset += static_cast<std::ptrdiff_t>(row) * x.row_stride;
  if (x.col_stride == 1 && is_native<T>(x)) return static_cast<const T*>(x.data) + offset;
  read_strided(x, offset, x.col_stride, n, buffer);
  return buffer;
}

template <class T> FASTOPS_INLINE typename Bits<T>::F load_some(const T* p, std::size_t n) {
  using F = typename Bits<T>::F;
  return n >= Bits<T>::kWidth ? load<F>(p) : simd::load_first<F>(p, n, T{});
}

// ---- what packing makes of the values ----

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

// The mantissa of a with the constant, brought into [0, 1) by moving a unit into the exponent of `scale`: then b = 0
// stays below the smallest normal (which the tile reads as zero) and no other b overflows but those flagged.
template <class T> struct LogEntry {
  typename Bits<T>::Int mantissa;
  T scale;
};

template <class T>
FASTOPS_INLINE typename Bits<T>::I log_entry(typename Bits<T>::F x, typename Bits<T>::Int keep, typename Bits<T>::Int c,
                                             typename Bits<T>::I* mantissa, typename Bits<T>::I* scale) {
  using B = Bits<T>;
  using I = typename B::I;
  const I u = bits<I>(clean<T>(x, keep)), magnitude = u & B::kMagnitude;
  const I regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const I m = select(regular, (u & B::kFraction) + c, I{});
  const I s = select(regular, u & ~B::kFraction, u);
  I move = select(m >= B::kSmallest, I{} + B::kSmallest, select(m < 0, I{} - B::kSmallest, I{}));
  const I moved = (s + move) & B::kInfinity;
  const I stuck = (move != 0) & ((moved == B::kInfinity) | (moved == 0));
  move = select(stuck, I{}, move);
  *mantissa = m - move;
  *scale = s + move;
  return stuck | (regular & (magnitude >= B::kLarge));
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

// ---- tile bodies ----

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
    return simd::fma(bits<Vector>(c + r.mantissa), r.scale, acc);
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
  I t = (b + move + mantissa) & mask;
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
    return simd::fma(bits<Vector>(c.bits + simd::lookup16(r.mantissas, c.segment)), r.scale, acc);
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
    return simd::fma(bits<Vector>((c + mantissa(i, v)) & ~Bits<T>::kFraction), r, acc);
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
    return simd::fma(bits<Vector>((r + mantissa(i, v)) & ~Bits<T>::kFraction), c, acc);
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

// ---- tile sizes ----
// Chosen by measurement: all accumulators, the vectors of b and what a step holds fit the registers (32 at v4 and
// NEON, 16 at v3 and v2), and a panel of b (cols * depth) fits the first-level cache at v3, the second at v4.
struct Sizes {
  int rows, vectors;
  std::size_t depth, block;
};
template <TileBody kBody> constexpr Sizes sizes() {
#if defined(FASTOPS_32_REGISTERS)
  if (kBody == TileBody::kExact || kBody == TileBody::kLog) return {6, 4, 512, 120};
  if (kBody == TileBody::kSegments) return {5, 4, 128, 45};
  return {6, 4, 512, 120};
#else
  if (kBody == TileBody::kExact) return {6, 2, 256, 120};
  if (kBody == TileBody::kLog) return {3, 3, 256, 120};
  if (kBody == TileBody::kSegments) return {4, 2, 128, 48};
  return {4, 2, 256, 120};
#endif
}

template <class T, TileBody kBody> struct Tile {
  static constexpr Sizes kSizes = sizes<kBody>();
  static constexpr int kRows = kSizes.rows, kVectors = kSizes.vectors;
  static constexpr int kCols = kVectors * static_cast<int>(Bits<T>::kWidth);
  static constexpr std::size_t kDepth = kSizes.depth;
  static constexpr std::size_t kBlock = kSizes.block / kRows * kRows;
  static constexpr std::size_t kBytesA = kBody == TileBody::kLog        ? sizeof(LogEntry<T>)
                                         : kBody == TileBody::kSegments ? 17 * sizeof(T)
                                                                        : sizeof(T);
};

// ---- packing ----

template <class T, TileBody kBody>
void pack_b(const Product<T>& product, const PackedB<T>& packed, std::size_t p, std::size_t d, std::size_t depth1) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  using S = Tile<T, kBody>;
  T buffer[S::kCols];
  const std::size_t steps = static_cast<std::size_t>(product.steps), block = S::kDepth / steps;
  const std::size_t col = packed.col0 + p * S::kCols, n = min_of(S::kCols, product.cols - col);
  const std::size_t k0 = packed.depth0 + d * block, k1 = min_of(k0 + block, depth1);
  T* to = packed.data + (d * packed.panels + p) * packed.panel_size;
  I flagged{};
  const auto pack_row = [&](const T* from) {
    for (std::size_t j = 0; j < static_cast<std::size_t>(S::kCols); j += B::kWidth) {
      const F x = j < n ? load_some(from + j, n - j) : F{};
      if constexpr (kBody == TileBody::kExact) {
        const Pair<T> pair = pack_pair_b(product, x);
        store(to + j, pair.first);
        if (steps == 2) {
          store(to + S::kCols + j, pair.second);
          flagged |= is_large<T>(x);
        }
      } else if constexpr (kSlopeOfA<kBody>) {
        store(to + j, x);
      } else {
        I u;
        flagged |= log_b<T>(x, product.keep, &u);
        store(to + j, bits<F>(u));
      }
    }
    to += S::kCols * steps;
  };
  if (product.b.layout == Layout::kPatches) {
    const Patches& patches = *product.b.patches;
    const PatchCol at(patches, product.b.first_col + col);
    PatchRow row(patches, k0);
    for (std::size_t k = k0; k < k1; ++k, row.advance(patches)) pack_row(read_patches(product.b, row, at, n, buffer));
  } else {
    for (std::size_t k = k0; k < k1; ++k) pack_row(read(product.b, k, col, n, buffer));
  }
  packed.flags[d * packed.panels + p] = simd::any(flagged) ? 1 : 0;
}

template <class T>
void pack_segments(const Product<T>& product, T x, typename Bits<T>::Int* mantissas, T* scale, bool* flagged) {
  using B = Bits<T>;
  using Int = typename B::Int;
  const Int u = bits<Int>(x), magnitude = u & B::kMagnitude;
  if (magnitude < B::kSmallest || magnitude >= B::kInfinity) {
    for (int j = 0; j < 16; ++j) mantissas[j] = 0;
    *scale = x;
    return;
  }
  const Int m = u & B::kFraction;
  const Int* constants = product.table + (m >> (B::kMantissa - 4)) * 16;
  // b = 0 lies in the first segment.
  const Int zero = m + constants[0];
  Int move = zero >= B::kSmallest ? B::kSmallest : zero < 0 ? -B::kSmallest : 0;
  const Int s = u & ~B::kFraction, moved = (s + move) & B::kInfinity;
  if (move != 0 && (moved == 0 || moved == B::kInfinity)) {
    move = 0;
    *flagged = true;
  }
  *flagged |= magnitude >= B::kLarge;
  for (int j = 0; j < 16; ++j) mantissas[j] = m + constants[j] - move;
  *scale = bits<T>(s + move);
}

// Rows row .. row + rows of a over k0 .. k1 into a panel; true where only the long body can multiply them.
template <class T, TileBody kBody>
bool pack_a(const Product<T>& product, std::size_t row, std::size_t rows, std::size_t k0, std::size_t k1, void* panel) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  using S = Tile<T, kBody>;
  alignas(64) T buffer[S::kDepth];
  const std::size_t n = k1 - k0;
  I flagged{};
  bool segments_flagged = false;
  for (std::size_t i = 0; i < static_cast<std::size_t>(S::kRows); ++i) {
    const T* from = buffer;
    if (i < rows) {
      from = read(product.a, row + i, k0, n, buffer);
    } else {
      for (std::size_t k = 0; k < n; ++k) buffer[k] = T{};
    }
    for (std::size_t k = 0; k < n; k += B::kWidth) {
      const std::size_t lanes = min_of(B::kWidth, n - k);
      const F x = load_some(from + k, n - k);
      if constexpr (kBody == TileBody::kLog) {
        I m, s;
        flagged |= log_entry<T>(x, product.keep, product.c, &m, &s);
        alignas(64) typename B::Int mantissas[B::kWidth];
        alignas(64) T scales[B::kWidth];
        store(mantissas, m);
        store(scales, bits<F>(s));
        LogEntry<T>* to = static_cast<LogEntry<T>*>(panel) + k * S::kRows + i;
        for (std::size_t l = 0; l < lanes; ++l) to[l * S::kRows] = {mantissas[l], scales[l]};
      } else if constexpr (kBody == TileBody::kSegments) {
        alignas(64) T values[B::kWidth];
        store(values, clean<T>(x, product.keep));
        typename B::Int* mantissas = static_cast<typename B::Int*>(panel);
        T* scales = reinterpret_cast<T*>(mantissas + n * S::kRows * 16);
        for (std::size_t l = 0; l < lanes; ++l) {
          const std::size_t at = (k + l) * S::kRows + i;
          pack_segments(product, values[l], mantissas + at * 16, scales + at, &segments_flagged);
        }
      } else if constexpr (kSlopeOfA<kBody>) {
        I u;
        flagged |= log_b<T>(x, product.keep, &u);
        alignas(64) T values[B::kWidth];
        store(values, bits<F>(u));
        T* to = static_cast<T*>(panel) + k * S::kRows + i;
        for (std::size_t l = 0; l < lanes; ++l) to[l * S::kRows] = values[l];
      } else {
        const Pair<T> pair = pack_pair_a(product, x);
        alignas(64) T first[B::kWidth], second[B::kWidth];
        store(first, pair.first);
        store(second, pair.second);
        T* to = static_cast<T*>(panel);
        if (product.steps == 2) {
          flagged |= is_large<T>(x);
          for (std::size_t l = 0; l < lanes; ++l) {
            to[(2 * (k + l)) * S::kRows + i] = first[l];
            to[(2 * (k + l) + 1) * S::kRows + i] = second[l];
          }
        } else {
          for (std::size_t l = 0; l < lanes; ++l) to[(k + l) * S::kRows + i] = first[l];
        }
      }
    }
  }
  return simd::any(flagged) || segments_flagged;
}

// ---- the product over a range ----

struct TileTarget {
  std::size_t steps;
  std::size_t rows, cols;
  std::ptrdiff_t ldc;
  bool first;
};

template <int Rows, int Vectors, class BodyType, class T>
FASTOPS_INLINE void tile(const BodyType& body, const TileTarget& target, T* c) {
  typename BodyType::Vector acc[Rows][Vectors];
  run_tile<Rows, Vectors>(body, target.steps, acc);
  store_tile<Rows, Vectors>(acc, c, target.ldc, target.rows, target.cols, target.first);
}

template <int Rows, int MaxVectors, class BodyType, class T>
FASTOPS_INLINE void tile_of_rows(const BodyType& body, const TileTarget& target, T* c) {
  const std::size_t vectors = (target.cols + Bits<T>::kWidth - 1) / Bits<T>::kWidth;
  if constexpr (MaxVectors > 2) {
    if (vectors == 1) return tile<Rows, 1>(body, target, c);
    if (vectors == 2) return tile<Rows, 2>(body, target, c);
    if (vectors == 3) return tile<Rows, 3>(body, target, c);
  } else if constexpr (MaxVectors > 1) {
    if (vectors == 1) return tile<Rows, 1>(body, target, c);
  }
  tile<Rows, MaxVectors>(body, target, c);
}

template <class T, TileBody kBody, class BodyType>
FASTOPS_INLINE void tile_any_size(const BodyType& body, const TileTarget& target, T* c) {
  using S = Tile<T, kBody>;
  if (target.rows == S::kRows) return tile_of_rows<S::kRows, S::kVectors>(body, target, c);
  if (target.rows == 1) return tile_of_rows<1, S::kVectors>(body, target, c);
  if (S::kRows > 2 && target.rows == 2) return tile_of_rows<2, S::kVectors>(body, target, c);
  if constexpr (S::kRows > 4) {
    if (target.rows <= 4) return tile_of_rows<4, S::kVectors>(body, target, c);
  }
  tile_of_rows<S::kRows, S::kVectors>(body, target, c);
}

// The point's tile: mantissas with the constant in [0, 1), and the powers of two that were taken off them.
template <class T, TileBody kBody>
__attribute__((noinline)) void slope_point(const Product<T>& product, std::size_t row, std::size_t col,
                                           const TileTarget& target, typename Bits<T>::Int* mantissas,
                                           typename Bits<T>::Int* rows, T* factors) {
  using B = Bits<T>;
  using I = typename B::I;
  using S = Tile<T, kBody>;
  T buffer[S::kCols];
  for (std::size_t i = 0; i < static_cast<std::size_t>(S::kRows); ++i) {
    const T* from = i < target.rows ? read(product.point, row + i, col, target.cols, buffer) : buffer;
    for (std::size_t j = 0; j < static_cast<std::size_t>(S::kCols); j += B::kWidth) {
      using F = typename B::F;
      const F x = i < target.rows && j < target.cols ? load_some(from + j, target.cols - j) : F{};
      const I u = bits<I>(clean<T>(x, product.keep));
      const I m = select((u & B::kMagnitude) >= B::kInfinity, I{}, u & B::kFraction);
      const std::size_t at = i * S::kCols + j;
      if constexpr (!kSlopeOfTable<kBody>) {
        const I sum = m + product.c;
        const auto up = sum >= B::kSmallest, down = sum < 0;
        store(mantissas + at, sum - select(up, I{} + B::kSmallest, select(down, I{} - B::kSmallest, I{})));
        store(factors + at, select(up, F{} + T(2), select(down, F{} + T(0.5), F{} + T(1))));
      } else {
        store(mantissas + at, m);
        store(rows + at, (m >> (B::kMantissa - 4)) * 16);
      }
    }
  }
}

template <class T, TileBody kBody>
FASTOPS_INLINE void one_tile(const Product<T>& product, const void* a, bool flagged, const T* b,
                             const TileTarget& target, std::size_t row, std::size_t col, T* c) {
  using B = Bits<T>;
  using S = Tile<T, kBody>;
  constexpr int kR = S::kRows, kC = S::kCols, kV = S::kVectors;
  (void)product, (void)row, (void)col, (void)flagged;
  if constexpr (kBody == TileBody::kExact) {
    const ExactBody<T, kR, kC> body{static_cast<const T*>(a), b};
    if (flagged) {
      TileTarget pairs = target;
      pairs.steps /= 2;
      tile<kR, kV>(AnyPairBody<T, kR, kC>{body}, pairs, c);
    } else {
      tile_any_size<T, kBody>(body, target, c);
    }
  } else if constexpr (kBody == TileBody::kLog) {
    const LogEntry<T>* entries = static_cast<const LogEntry<T>*>(a);
    if (flagged)
      tile<kR, kV>(AnyLogBody<T, kR, kC>{{entries, b}}, target, c);
    else
      tile_any_size<T, kBody>(LogBody<T, kR, kC>{entries, b}, target, c);
  } else if constexpr (kBody == TileBody::kSegments) {
    const typename B::Int* mantissas = static_cast<const typename B::Int*>(a);
    const T* scales = reinterpret_cast<const T*>(mantissas + target.steps * kR * 16);
    if (flagged)
      tile<kR, kV>(AnySegmentBody<T, kR, kC>{{mantissas, scales, b}}, target, c);
    else
      tile_of_rows<kR, kV>(SegmentBody<T, kR, kC>{mantissas, scales, b}, target, c);
  } else {
    alignas(64) typename B::Int mantissas[kR * kC];
    const T* values = static_cast<const T*>(a);
    using F = typename B::F;
    F acc[kR][kV];
    if constexpr (kSlopeOfTable<kBody>) {
      alignas(64) typename B::Int rows[kR * kC];
      slope_point<T, kBody>(product, row, col, target, mantissas, rows, nullptr);
      if constexpr (kSlopeOfA<kBody>)
        run_tile<kR, kV>(SegmentSlopeABody<T, kR, kC>{{values, b, mantissas}, rows, product.table}, target.steps, acc);
      else
        run_tile<kR, kV>(SegmentSlopeBody<T, kR, kC>{{values, b, mantissas}, rows, product.table}, target.steps, acc);
    } else {
      alignas(64) T factors[kR * kC];
      slope_point<T, kBody>(product, row, col, target, mantissas, nullptr, factors);
      using Short = std::conditional_t<kSlopeOfA<kBody>, SlopeABody<T, kR, kC>, SlopeBody<T, kR, kC>>;
      using Any = std::conditional_t<kSlopeOfA<kBody>, AnySlopeABody<T, kR, kC>, AnySlopeBody<T, kR, kC>>;
      const Short body{values, b, mantissas};
      // A factor below 1 must not wait for the end: what it halves could be infinite by then.
      if (flagged || product.c < 0) {
        run_tile<kR, kV>(Any{body, factors}, target.steps, acc);
      } else {
        run_tile<kR, kV>(body, target.steps, acc);
#pragma GCC unroll 12
        for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) acc[i][v] *= load<F>(factors + i * kC + v * B::kWidth);
      }
    }
    store_tile<kR, kV>(acc, c, target.ldc, target.rows, target.cols, target.first);
  }
}

template <class T, TileBody kBody>
__attribute__((noinline)) void multiply_packed(const Product<T>& product, const PackedB<T>& packed,
                                               const BlockRange& range, std::size_t k0, std::size_t k1,
                                               const unsigned char* panels_a, const unsigned char* flags_a, T* c,
                                               std::ptrdiff_t ldc, bool first) {
  using S = Tile<T, kBody>;
  const std::size_t steps = static_cast<std::size_t>(product.steps);
  const std::size_t d = (k0 - packed.depth0) / (S::kDepth / steps);
  const std::size_t size_a = S::kRows * (k1 - k0) * steps * S::kBytesA;
  for (std::size_t col = range.col0; col < range.col1; col += S::kCols) {
    const std::size_t p = (col - packed.col0) / S::kCols;
    const T* b = packed.data + (d * packed.panels + p) * packed.panel_size;
    const bool flagged_b = packed.flags[d * packed.panels + p] != 0;
    for (std::size_t row = range.row0; row < range.row1; row += S::kRows) {
      const std::size_t i = (row - range.row0) / S::kRows;
      const TileTarget target{(k1 - k0) * steps, min_of(S::kRows, range.row1 - row), min_of(S::kCols, range.col1 - col),
                              ldc, first};
      one_tile<T, kBody>(product, panels_a + i * size_a, flagged_b || flags_a[i] != 0, b, target, row, col,
                         c + static_cast<std::ptrdiff_t>(row - range.row0) * ldc + (col - range.col0));
    }
  }
}

template <class T> void poison(const Product<T>& product, const BlockRange& range, T* c, std::ptrdiff_t ldc) {
  constexpr std::size_t kRun = 256;
  T buffer[kRun];
  for (std::size_t row = range.row0; row < range.row1; ++row, c += ldc)
    for (std::size_t col = range.col0; col < range.col1; col += kRun) {
      const std::size_t n = min_of(kRun, range.col1 - col);
      const T* point = read(product.point, row, col, n, buffer);
      T* to = c + (col - range.col0);
      for (std::size_t j = 0; j < n; ++j) to[j] = point[j] != point[j] ? point[j] : to[j];
    }
}

template <class T, TileBody kBody>
void multiply(const Product<T>& product, const PackedB<T>& packed, const BlockRange& range, void* scratch, T* c,
              std::ptrdiff_t ldc, bool first) {
  using S = Tile<T, kBody>;
  const std::size_t steps = static_cast<std::size_t>(product.steps), block = S::kDepth / steps;
  unsigned char* panels = static_cast<unsigned char*>(scratch);
  unsigned char* flags = panels + S::kBlock * S::kDepth * S::kBytesA;
  for (std::size_t k0 = range.depth0; k0 < range.depth1; k0 += block) {
    const std::size_t k1 = min_of(k0 + block, range.depth1);
    for (std::size_t row = range.row0; row < range.row1; row += S::kRows) {
      const std::size_t i = (row - range.row0) / S::kRows;
      void* panel = panels + i * S::kRows * (k1 - k0) * steps * S::kBytesA;
      flags[i] = pack_a<T, kBody>(product, row, min_of(S::kRows, range.row1 - row), k0, k1, panel) ? 1 : 0;
    }
    if constexpr (kBody == TileBody::kLog || kBody == TileBody::kSegments) {
      // A zero in b leaves a mantissa without exponent, which must count as zero.
      const FlushSubnormals guard;
      multiply_packed<T, kBody>(product, packed, range, k0, k1, panels, flags, c, ldc, first);
    } else {
      multiply_packed<T, kBody>(product, packed, range, k0, k1, panels, flags, c, ldc, first);
    }
    first = false;
  }
  if (product.poison && range.depth1 == product.depth) poison(product, range, c, ldc);
}

template <class T> void finish(const Product<T>& product, const BlockRange& range, const T* c, std::ptrdiff_t ldc) {
  for (std::size_t row = range.row0; row < range.row1; ++row, c += ldc) {
    const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(row) * product.out_row_stride +
                                  static_cast<std::ptrdiff_t>(range.col0) * product.out_col_stride;
    const std::ptrdiff_t stride = product.out_col_stride;
    const std::size_t n = range.col1 - range.col0;
    if (sizeof(T) == 8 || product.out_dtype == FASTOPS_F32) {
      T* to = static_cast<T*>(product.out) + offset;
      for (std::size_t j = 0; j < n; ++j) to[static_cast<std::ptrdiff_t>(j) * stride] = c[j];
    } else if constexpr (sizeof(T) == 4) {
      std::uint16_t* to = static_cast<std::uint16_t*>(product.out) + offset;
      if (product.out_dtype == FASTOPS_F16)
        for (std::size_t j = 0; j < n; ++j) to[static_cast<std::ptrdiff_t>(j) * stride] = half::to_f16(c[j]);
      else
        for (std::size_t j = 0; j < n; ++j) to[static_cast<std::ptrdiff_t>(j) * stride] = half::to_bf16(c[j]);
    }
  }
}

template <class T>
void pack_b_any(const Product<T>& product, const PackedB<T>& packed, std::size_t p, std::size_t d, std::size_t depth1) {
  switch (product.body) {
    case TileBody::kExact:
      return pack_b<T, TileBody::kExact>(product, packed, p, d, depth1);
    case TileBody::kLog:
      return pack_b<T, TileBody::kLog>(product, packed, p, d, depth1);
    case TileBody::kSegments:
      return pack_b<T, TileBody::kSegments>(product, packed, p, d, depth1);
    case TileBody::kSlope:
      return pack_b<T, TileBody::kSlope>(product, packed, p, d, depth1);
    case TileBody::kSlopeSegments:
      return pack_b<T, TileBody::kSlopeSegments>(product, packed, p, d, depth1);
    case TileBody::kSlopeA:
      return pack_b<T, TileBody::kSlopeA>(product, packed, p, d, depth1);
    case TileBody::kSlopeASegments:
      return pack_b<T, TileBody::kSlopeASegments>(product, packed, p, d, depth1);
  }
}

template <class T>
void multiply_any(const Product<T>& product, const PackedB<T>& packed, const BlockRange& range, void* scratch, T* c,
                  std::ptrdiff_t ldc, bool first) {
  switch (product.body) {
    case TileBody::kExact:
      return multiply<T, TileBody::kExact>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kLog:
      return multiply<T, TileBody::kLog>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kSegments:
      return multiply<T, TileBody::kSegments>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kSlope:
      return multiply<T, TileBody::kSlope>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kSlopeSegments:
      return multiply<T, TileBody::kSlopeSegments>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kSlopeA:
      return multiply<T, TileBody::kSlopeA>(product, packed, range, scratch, c, ldc, first);
    case TileBody::kSlopeASegments:
      return multiply<T, TileBody::kSlopeASegments>(product, packed, range, scratch, c, ldc, first);
  }
}

template <class T, TileBody kBody> constexpr TileShape shape() {
  using S = Tile<T, kBody>;
  return {S::kRows, S::kCols, S::kDepth, S::kBlock, S::kBytesA};
}
template <class T> constexpr MatmulKernels<T> kernels() {
  return {{shape<T, TileBody::kExact>(), shape<T, TileBody::kLog>(), shape<T, TileBody::kSegments>(),
           shape<T, TileBody::kSlope>(), shape<T, TileBody::kSlopeSegments>(), shape<T, TileBody::kSlopeA>(),
           shape<T, TileBody::kSlopeASegments>()},
          &pack_b_any<T>,
          &multiply_any<T>,
          &finish<T>};
}

}  // namespace

extern const MatmulLevel kMatmulLevel;
constexpr MatmulLevel kMatmulLevel = {kernels<float>(), kernels<double>()};

}  // namespace fastops::FASTOPS_LEVEL
