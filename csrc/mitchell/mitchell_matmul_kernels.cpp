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
  static constexpr Int kOne = (kInfinity >> 1) & ~kFraction;
  // Half of the largest exponent: a product overflows only where an operand reaches it.
  static constexpr Int kLarge = kOne + (kInfinity >> kMantissa >> 2) * kSmallest - 2 * kSmallest;
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

template <class T> FASTOPS_INLINE void prefetch(const Operand& x, std::size_t row, std::size_t col) {
  if (x.layout == Layout::kMatrix)
    __builtin_prefetch(static_cast<const T*>(x.data) + static_cast<std::ptrdiff_t>(row) * x.row_stride +
                       static_cast<std::ptrdiff_t>(col) * x.col_stride);
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

// The output positions of a panel of b as runs within a row of the image, for patches in steps of one column.
template <class T, std::size_t kCols> class PatchRuns {
 public:
  PatchRuns(const Operand& b, PatchCol at, std::size_t n)
      : data_(static_cast<const T*>(b.data)),
        height_(static_cast<std::ptrdiff_t>(b.patches->height)),
        width_(static_cast<std::ptrdiff_t>(b.patches->width)),
        whole_(static_cast<std::ptrdiff_t>(b.patches->channels) * height_ * width_ - std::ptrdiff_t{kCols}) {
    const Patches& p = *b.patches;
    for (std::size_t done = 0; done < n; ++runs_) {
      const std::size_t size = min_of(n - done, p.out_width - at.x);
      run_[runs_] = {done, static_cast<std::ptrdiff_t>(size), static_cast<std::ptrdiff_t>(at.image) * p.image_stride,
                     static_cast<std::ptrdiff_t>(at.y * p.stride_h) - static_cast<std::ptrdiff_t>(p.padding_h),
                     static_cast<std::ptrdiff_t>(at.x) - static_cast<std::ptrdiff_t>(p.padding_w)};
      done += size;
      at.x = 0;
      if (++at.y == p.out_height) {
        at.y = 0;
        ++at.image;
      }
    }
  }
  // A row of the patches, by whole vectors: up to kCols elements after its end are written as well.
  void read(const Patches& p, const PatchRow& row, T* buffer) const {
    const std::ptrdiff_t down = static_cast<std::ptrdiff_t>(row.kernel_row * p.dilation_h);
    const std::ptrdiff_t right = static_cast<std::ptrdiff_t>(row.kernel_col * p.dilation_w);
    const std::ptrdiff_t first_row = static_cast<std::ptrdiff_t>(row.channel) * height_;
    for (std::size_t r = 0; r < runs_; ++r) {
      const Run& run = run_[r];
      const std::ptrdiff_t y = run.y + down, x = run.x + right, offset = (first_row + y) * width_ + x;
      const bool inside = y >= 0 && y < height_;
      const T* const from = data_ + run.image + offset;
      T* const to = buffer + run.first;
      if (inside && offset >= 0 && offset <= whole_) {
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kCols; i += Bits<T>::kWidth) store(to + i, load<typename Bits<T>::F>(from + i));
        for (std::ptrdiff_t i = 0; i < -x && i < run.size; ++i) to[i] = T{};
        for (std::ptrdiff_t i = run.size; i > 0 && i > width_ - x; --i) to[i - 1] = T{};
      } else {
        for (std::ptrdiff_t i = 0; i < run.size; ++i) to[i] = !inside || x + i < 0 || x + i >= width_ ? T{} : from[i];
      }
    }
  }

 private:
  struct Run {
    std::size_t first;
    std::ptrdiff_t size, image, y, x;  // y, x: of the image, for the first kernel position
  };
  const T* data_;
  std::ptrdiff_t height_, width_, whole_;  // the last offset from which kCols elements can be read
  std::size_t runs_ = 0;
  Run run_[kCols];
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

// Filled up with ones, which no product minds.
template <class T> FASTOPS_INLINE typename Bits<T>::F load_some(const T* p, std::size_t n) {
  using F = typename Bits<T>::F;
  return n >= Bits<T>::kWidth ? load<F>(p) : simd::load_first<F>(p, n, T(1));
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
FASTOPS_INLINE void log_entry(typename Bits<T>::I u, typename Bits<T>::Int c, typename Bits<T>::I* mantissa,
                              typename Bits<T>::I* scale) {
  using B = Bits<T>;
  using I = typename B::I;
  const I magnitude = u & B::kMagnitude;
  const I regular = (magnitude >= B::kSmallest) & (magnitude < B::kInfinity);
  const I m = select(regular, (u & B::kFraction) + c, I{});
  const I s = select(regular, u & ~B::kFraction, u);
  I move = select(m >= B::kSmallest, I{} + B::kSmallest, select(m < 0, I{} - B::kSmallest, I{}));
  const I moved = (s + move) & B::kInfinity;
  move = select((moved == B::kInfinity) | (moved == 0), I{}, move);
  *mantissa = m - move;
  *scale = s + move;
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

// Where no product can leave the exponent's range, a's exponent and sign are in the sum as well: the product is the
// float of these bits.
template <class T, int RowsOfPanel, int ColsOfPanel> struct SumBody {
  using Vector = typename Bits<T>::F;
  using Row = typename Bits<T>::I;
  using Column = Row;
  const typename Bits<T>::Int* a;
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
  if (kBody == TileBody::kLog) return {5, 2, 256, 120};
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
  static constexpr std::size_t kBytesA = kBody == TileBody::kSegments ? 17 * sizeof(T) : sizeof(T);
  // Scratch: packed a, for kLog also for LogBody and a panel of b with traces, a byte of flags for each panel.
  static constexpr std::size_t kPanels = kBlock * kDepth * kBytesA;
  static constexpr std::size_t kLogPanels = kBody == TileBody::kLog ? kBlock * kDepth * sizeof(LogEntry<T>) : 0;
  static constexpr std::size_t kTraced = kBody == TileBody::kLog ? kCols * kDepth * sizeof(T) : 0;
  static constexpr std::size_t kScratch = kPanels + kLogPanels + kTraced + kBlock;
};

// ---- packing ----

// Rows vectors, turned: lane l of all goes to to + l stride.
template <int Rows, class V, class E>
FASTOPS_INLINE void store_turned(const V (&x)[Rows], std::size_t lanes, E* to, std::size_t stride) {
  constexpr int kWidth = static_cast<int>(simd::kLanes<V>), kPart = 16 / sizeof(E);
  const int whole = lanes == kWidth ? Rows / kPart * kPart : 0;
#pragma GCC unroll 4
  for (int i = 0; i < Rows / kPart * kPart; i += kPart) {
    if (whole == 0) break;
    simd::i32 part[kPart];
#pragma GCC unroll 4
    for (int j = 0; j < kPart; ++j) part[j] = bits<simd::i32>(x[i + j]);
    simd::turn<sizeof(E)>(part);
#pragma GCC unroll 4
    for (int j = 0; j < kPart; ++j)
      simd::store_parts(reinterpret_cast<char*>(to + j * stride + i), kPart * stride * sizeof(E), part[j]);
  }
  alignas(64) E rest[Rows * kWidth];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
    if (i >= whole) store(rest + i * kWidth, x[i]);
  for (int i = whole; i < Rows; ++i)
    for (std::size_t l = 0; l < lanes; ++l) to[l * stride + i] = rest[i * kWidth + l];
}

// Columns from col of b over k0 .. k1 into a panel; its flags.
template <class T, TileBody kBody>
unsigned char pack_b(const Product<T>& product, std::size_t col, std::size_t k0, std::size_t k1, T* to) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  using S = Tile<T, kBody>;
  // Patches: so many rows are put together before any is packed. A vector that was just stored in pieces is slow to
  // load.
  constexpr std::size_t kReadAhead = 8;
  alignas(64) T buffer[(B::kWidth > 2 * kReadAhead ? B::kWidth : 2 * kReadAhead) * S::kCols];
  const std::size_t steps = static_cast<std::size_t>(product.steps), n = min_of(S::kCols, product.cols - col);
  I flagged{};
  Extremes<T> extremes;
  const auto pack_row = [&](const T* from, std::size_t width) {
#pragma GCC unroll 4
    for (std::size_t j = 0; j < static_cast<std::size_t>(S::kCols); j += B::kWidth) {
      const F x = j < width ? load_some(from + j, width - j) : F{} + T(1);
      if constexpr (kBody == TileBody::kExact) {
        const Pair<T> pair = pack_pair_b(product, x);
        store(to + j, pair.first);
        if (steps == 2) {
          store(to + S::kCols + j, pair.second);
          flagged |= is_large<T>(x);
        }
      } else if constexpr (kSlopeOfA<kBody>) {
        store(to + j, x);
      } else if constexpr (kBody == TileBody::kLog) {
        extremes.add(bits<I>(x));
        store(to + j, bits<F>(cut<T>(bits<I>(x), product.keep)));
      } else {
        I u;
        flagged |= log_b<T>(x, product.keep, &u);
        store(to + j, bits<F>(u));
      }
    }
    to += S::kCols * steps;
  };
  const Operand& b = product.b;
  if (b.layout == Layout::kPatches) {
    const Patches& patches = *b.patches;
    const PatchCol at(patches, b.first_col + col);
    PatchRow row(patches, k0);
    if (patches.stride_w == 1 && is_native<T>(b)) {
      const PatchRuns<T, S::kCols> runs(b, at, n);
      for (std::size_t k = k0; k < k1; k += kReadAhead) {
        const std::size_t some = min_of(kReadAhead, k1 - k);
        for (std::size_t q = 0; q < some; ++q, row.advance(patches)) runs.read(patches, row, buffer + q * 2 * S::kCols);
        for (std::size_t q = 0; q < some; ++q) pack_row(buffer + q * 2 * S::kCols, n);
      }
    } else {
      for (std::size_t k = k0; k < k1; ++k, row.advance(patches)) pack_row(read_patches(b, row, at, n, buffer), n);
    }
  } else if (n == S::kCols && b.row_stride == 1 && b.row_inner == 0 && is_native<T>(b)) {
    // Columns lie together: squares of them are turned.
    constexpr std::size_t kPart = 16 / sizeof(T);
    std::size_t k = k0;
    for (; k + B::kWidth <= k1; k += B::kWidth) {
#pragma GCC unroll 1
      for (std::size_t j = 0; j < S::kCols; j += kPart) {
        F x[kPart];
#pragma GCC unroll 4
        for (std::size_t q = 0; q < kPart; ++q)
          x[q] = load<F>(static_cast<const T*>(b.data) + k + static_cast<std::ptrdiff_t>(col + j + q) * b.col_stride);
        store_turned<kPart>(x, B::kWidth, buffer + j, S::kCols);
      }
      for (std::size_t q = 0; q < B::kWidth; ++q) pack_row(buffer + q * S::kCols, n);
    }
    for (; k < k1; ++k) pack_row(read(b, k, col, n, buffer), n);
  } else if (n == S::kCols && b.col_stride == 1 && b.row_inner == 0 && is_native<T>(b)) {
    const T* from = read(b, k0, col, n, buffer);
    for (std::size_t k = k0; k < k1; ++k, from += b.row_stride) {
      // Rows lie too far apart for the CPU to fetch them ahead. The last element: where the row crosses a cache line,
      // the panel before has read its first.
      __builtin_prefetch(from + 32 * b.row_stride + (S::kCols - 1));
      pack_row(from, S::kCols);
    }
  } else {
    for (std::size_t k = k0; k < k1; ++k) pack_row(read(b, k, col, n, buffer), n);
  }
  return extremes.flags() | flag_if(simd::any(flagged), kAny);
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

// Rows row .. row + rows of a over k0 .. k1 into a panel; its flags. For kLog the panel is that of SumBody.
template <class T, TileBody kBody>
unsigned char pack_a(const Product<T>& product, std::size_t row, std::size_t rows, std::size_t k0, std::size_t k1,
                     void* panel) {
  using B = Bits<T>;
  using F = typename B::F;
  using I = typename B::I;
  using Int = typename B::Int;
  using S = Tile<T, kBody>;
  constexpr std::size_t kChunk = 64;
  alignas(64) T buffer[S::kRows][kChunk];
  const T* from[S::kRows];
  const std::size_t steps = static_cast<std::size_t>(product.steps), n = k1 - k0, stride = S::kRows * steps;
  T* const values = static_cast<T*>(panel);
  I flagged{};
  bool segments_flagged = false;
  Extremes<T> extremes;
  const Int keep = product.keep, offset = product.c - B::kOne;
  const auto pack = [&](std::size_t chunk, std::size_t k, std::size_t lanes) __attribute__((always_inline)) {
    const std::size_t at = (chunk + k) * stride;
    F first[S::kRows], second[S::kRows];
#pragma GCC unroll 12
    for (int i = 0; i < S::kRows; ++i) {
      const F x = load_some(from[i] + k, lanes);
      if constexpr (kBody == TileBody::kLog) {
        const I u = bits<I>(x);
        extremes.add(u);
        first[i] = bits<F>(select((u & B::kMagnitude) == 0, I{} + Traces<T>::kForA, cut<T>(u, keep) + offset));
      } else if constexpr (kBody == TileBody::kSegments) {
        first[i] = clean<T>(x, keep);
      } else if constexpr (kSlopeOfA<kBody>) {
        I u;
        flagged |= log_b<T>(x, keep, &u);
        first[i] = bits<F>(u);
      } else {
        const Pair<T> pair = pack_pair_a(product, x);
        first[i] = pair.first;
        second[i] = pair.second;
        if (steps == 2) flagged |= is_large<T>(x);
      }
    }
    if constexpr (kBody == TileBody::kSegments) {
      alignas(64) T lane[S::kRows * B::kWidth];
      store_turned<S::kRows>(first, lanes, lane, S::kRows);
      for (std::size_t e = 0; e < lanes * S::kRows; ++e)
        pack_segments(product, lane[e], static_cast<Int*>(panel) + (at + e) * 16, values + n * S::kRows * 16 + at + e,
                      &segments_flagged);
    } else {
      store_turned<S::kRows>(first, lanes, values + at, stride);
      if (kBody == TileBody::kExact && steps == 2)
        store_turned<S::kRows>(second, lanes, values + at + S::kRows, stride);
    }
  };
  for (std::size_t chunk = 0; chunk < n; chunk += kChunk) {
    const std::size_t size = min_of(kChunk, n - chunk);
    // Rows that do not exist repeat the first.
    for (std::size_t i = 0; i < static_cast<std::size_t>(S::kRows); ++i)
      from[i] = i < rows ? read(product.a, row + i, k0 + chunk, size, buffer[i]) : from[0];
    std::size_t k = 0;
    for (; k + B::kWidth <= size; k += B::kWidth) pack(chunk, k, B::kWidth);
    if (k < size) pack(chunk, k, size - k);
  }
  return extremes.flags() | flag_if(simd::any(flagged) || segments_flagged, kAny);
}

// The same rows for LogBody.
template <class T>
__attribute__((noinline)) void pack_log(const Product<T>& product, std::size_t row, std::size_t rows, std::size_t k0,
                                        std::size_t k1, LogEntry<T>* panel) {
  using B = Bits<T>;
  using I = typename B::I;
  using S = Tile<T, TileBody::kLog>;
  T buffer[S::kDepth];
  const std::size_t n = k1 - k0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(S::kRows); ++i) {
    const T* from = i < rows ? read(product.a, row + i, k0, n, buffer) : buffer;
    for (std::size_t k = 0; k < n; k += B::kWidth) {
      const auto x = i < rows ? load_some(from + k, n - k) : typename B::F{};
      I m, s;
      log_entry<T>(bits<I>(clean<T>(x, product.keep)), product.c, &m, &s);
      alignas(64) typename B::Int mantissas[B::kWidth];
      alignas(64) T scales[B::kWidth];
      store(mantissas, m);
      store(scales, bits<typename B::F>(s));
      for (std::size_t l = 0; l < min_of(B::kWidth, n - k); ++l)
        panel[(k + l) * S::kRows + i] = {mantissas[l], scales[l]};
    }
  }
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
  settle(body, acc);
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
FASTOPS_INLINE void one_tile(const Product<T>& product, const unsigned char* a, bool flagged, const T* b,
                             const TileTarget& target, std::size_t row, std::size_t col, T* c) {
  using B = Bits<T>;
  using S = Tile<T, kBody>;
  constexpr int kR = S::kRows, kC = S::kCols, kV = S::kVectors;
  (void)product, (void)row, (void)col;
  if constexpr (kBody == TileBody::kExact) {
    const ExactBody<T, kR, kC> body{reinterpret_cast<const T*>(a), b};
    if (flagged) {
      TileTarget pairs = target;
      pairs.steps /= 2;
      tile<kR, kV>(AnyPairBody<T, kR, kC>{body}, pairs, c);
    } else {
      tile_any_size<T, kBody>(body, target, c);
    }
  } else if constexpr (kBody == TileBody::kLog) {
    const LogEntry<T>* entries = reinterpret_cast<const LogEntry<T>*>(a);
    if (flagged)
      tile<kR, kV>(AnyLogBody<T, kR, kC>{{entries, b}}, target, c);
    else
      tile_any_size<T, kBody>(LogBody<T, kR, kC>{entries, b}, target, c);
  } else if constexpr (kBody == TileBody::kSegments) {
    const typename B::Int* mantissas = reinterpret_cast<const typename B::Int*>(a);
    const T* scales = reinterpret_cast<const T*>(mantissas + target.steps * kR * 16);
    if (flagged)
      tile<kR, kV>(AnySegmentBody<T, kR, kC>{{mantissas, scales, b}}, target, c);
    else
      tile_of_rows<kR, kV>(SegmentBody<T, kR, kC>{mantissas, scales, b}, target, c);
  } else {
    alignas(64) typename B::Int mantissas[kR * kC];
    const T* values = reinterpret_cast<const T*>(a);
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

// A panel of b with traces in place of its zeros.
template <class T> __attribute__((noinline)) void add_traces(const T* from, std::size_t n, T* to) {
  using I = typename Bits<T>::I;
  for (std::size_t i = 0; i < n; i += Bits<T>::kWidth) {
    const I u = bits<I>(load<typename Bits<T>::F>(from + i));
    store(to + i, bits<typename Bits<T>::F>(select((u & Bits<T>::kMagnitude) == 0, I{} + Traces<T>::kForB, u)));
  }
}

// All rows of the range times the panel of b at column col.
template <class T, TileBody kBody>
__attribute__((noinline)) void multiply_panel(const Product<T>& product, const BlockRange& range, std::size_t col,
                                              std::size_t depth, unsigned char* scratch, const T* b,
                                              unsigned char flags_b, T* c, std::ptrdiff_t ldc, bool first) {
  using S = Tile<T, kBody>;
  const std::size_t steps = depth * static_cast<std::size_t>(product.steps), size_a = S::kRows * steps;
  const unsigned char* const flags_a = scratch + S::kScratch - S::kBlock;
  const T* const traced = flags_b == kZeros ? reinterpret_cast<const T*>(scratch + S::kPanels + S::kLogPanels) : b;
  for (std::size_t row = range.row0; row < range.row1; row += S::kRows, c += S::kRows * ldc) {
    const std::size_t i = (row - range.row0) / S::kRows;
    const TileTarget target{steps, min_of(S::kRows, range.row1 - row), min_of(S::kCols, range.col1 - col), ldc, first};
    for (std::size_t r = 0; r < target.rows; ++r) {
      __builtin_prefetch(c + static_cast<std::ptrdiff_t>(r) * ldc, 1);
      if constexpr (kBody >= TileBody::kSlope) prefetch<T>(product.point, row + S::kRows + r, col);
    }
    const unsigned char* a = scratch + i * size_a * S::kBytesA;
    if constexpr (kBody == TileBody::kLog) {
      if (sums_suffice(flags_a[i], flags_b)) {
        const SumBody<T, S::kRows, S::kCols> body{reinterpret_cast<const typename Bits<T>::Int*>(a), traced,
                                                  ((flags_a[i] | flags_b) & kZeros) != 0};
        tile_any_size<T, kBody>(body, target, c);
        continue;
      }
      a = scratch + S::kPanels + i * size_a * sizeof(LogEntry<T>);
    }
    one_tile<T, kBody>(product, a, ((flags_a[i] | flags_b) & kAny) != 0, b, target, row, col, c);
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
  unsigned char* const panels = static_cast<unsigned char*>(scratch);
  unsigned char* const flags = panels + S::kScratch - S::kBlock;
  for (std::size_t k0 = range.depth0; k0 < range.depth1; k0 += block) {
    const std::size_t k1 = min_of(k0 + block, range.depth1), size_a = S::kRows * (k1 - k0) * steps;
    for (std::size_t row = range.row0, i = 0; row < range.row1; row += S::kRows, ++i)
      flags[i] =
          pack_a<T, kBody>(product, row, min_of(S::kRows, range.row1 - row), k0, k1, panels + i * size_a * S::kBytesA);
    for (std::size_t col = range.col0; col < range.col1; col += S::kCols) {
      const std::size_t p =
          packed.fresh ? 0 : (k0 - packed.depth0) / block * packed.panels + (col - packed.col0) / S::kCols;
      T* const b = packed.data + p * packed.panel_size;
      if (packed.fresh) packed.flags[0] = pack_b<T, kBody>(product, col, k0, k1, b);
      const unsigned char flags_b = packed.flags[p];
      T* const to = c + (col - range.col0);
      if constexpr (kBody == TileBody::kLog) {
        if (flags_b == kZeros)
          add_traces(b, S::kCols * (k1 - k0), reinterpret_cast<T*>(panels + S::kPanels + S::kLogPanels));
        LogEntry<T>* entries = reinterpret_cast<LogEntry<T>*>(panels + S::kPanels);
        for (std::size_t row = range.row0, i = 0; row < range.row1; row += S::kRows, ++i, entries += size_a) {
          if (sums_suffice(flags[i], flags_b) || (flags[i] & kLogPacked) != 0) continue;
          pack_log(product, row, min_of(S::kRows, range.row1 - row), k0, k1, entries);
          flags[i] |= kLogPacked;
        }
      }
      if constexpr (kBody == TileBody::kLog || kBody == TileBody::kSegments) {
        // A zero in b leaves a mantissa without exponent, which must count as zero.
        const FlushSubnormals guard;
        multiply_panel<T, kBody>(product, range, col, k1 - k0, panels, b, flags_b, to, ldc, first);
      } else {
        multiply_panel<T, kBody>(product, range, col, k1 - k0, panels, b, flags_b, to, ldc, first);
      }
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

template <class T, TileBody kBody>
void pack_panel(const Product<T>& product, const PackedB<T>& packed, std::size_t p, std::size_t d, std::size_t depth1) {
  using S = Tile<T, kBody>;
  const std::size_t block = S::kDepth / static_cast<std::size_t>(product.steps), k0 = packed.depth0 + d * block;
  const std::size_t i = d * packed.panels + p;
  packed.flags[i] = pack_b<T, kBody>(product, packed.col0 + p * S::kCols, k0, min_of(k0 + block, depth1),
                                     packed.data + i * packed.panel_size);
}

// f(body) with the body as a constant.
template <class F> FASTOPS_INLINE void with_body(TileBody body, F&& f) {
  switch (body) {
    case TileBody::kExact:
      return f(std::integral_constant<TileBody, TileBody::kExact>());
    case TileBody::kLog:
      return f(std::integral_constant<TileBody, TileBody::kLog>());
    case TileBody::kSegments:
      return f(std::integral_constant<TileBody, TileBody::kSegments>());
    case TileBody::kSlope:
      return f(std::integral_constant<TileBody, TileBody::kSlope>());
    case TileBody::kSlopeSegments:
      return f(std::integral_constant<TileBody, TileBody::kSlopeSegments>());
    case TileBody::kSlopeA:
      return f(std::integral_constant<TileBody, TileBody::kSlopeA>());
    case TileBody::kSlopeASegments:
      return f(std::integral_constant<TileBody, TileBody::kSlopeASegments>());
  }
}

template <class T>
void pack_b_any(const Product<T>& product, const PackedB<T>& packed, std::size_t p, std::size_t d, std::size_t depth1) {
  with_body(product.body, [&](auto body) { pack_panel<T, body.value>(product, packed, p, d, depth1); });
}

template <class T>
void multiply_any(const Product<T>& product, const PackedB<T>& packed, const BlockRange& range, void* scratch, T* c,
                  std::ptrdiff_t ldc, bool first) {
  with_body(product.body, [&](auto body) { multiply<T, body.value>(product, packed, range, scratch, c, ldc, first); });
}

template <class T, TileBody kBody> constexpr TileShape shape() {
  using S = Tile<T, kBody>;
  return {S::kRows, S::kCols, S::kDepth, S::kBlock, S::kScratch};
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
