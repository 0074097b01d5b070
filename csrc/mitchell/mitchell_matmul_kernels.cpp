// SPDX-License-Identifier: BSD-3-Clause
// Packing and register tiles of the Mitchell, bilinear, exact and gradient matrix products, compiled once per CPU
// level.
#include <type_traits>

#include "core/tile.h"
#include "mitchell/mitchell_matmul_bodies.h"
#include "mitchell/mitchell_matmul_read.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace matmul;

// Tile sizes.
#if defined(FASTOPS_AVX512)
constexpr bool kSumsSegments = false;
#else
constexpr bool kSumsSegments = true;
#endif

// Chosen by measurement: all accumulators, the vectors of b and what a step holds fit the registers (32 at v4 and
// NEON, 16 at v3 and v2), and a panel of b (cols * depth) fits the first-level cache at v3, the second at v4.
struct Sizes {
  int rows, vectors;
  std::size_t depth, block;
};
template <TileBody kBody> constexpr Sizes sizes() {
  // The sums of a panel of b with 16 constants fit the first-level cache; making them takes many rows to be worth it.
  if (kBody == TileBody::kSegments && kSumsSegments) return {4, 3, 16, 960};
#if defined(FASTOPS_32_REGISTERS)
  if (kBody == TileBody::kExact || kBody == TileBody::kLog) return {6, 4, 512, 120};
  if (kBody == TileBody::kSegments) return {5, 4, 128, 45};
  return {6, 4, 512, 120};
#else
  if (kBody == TileBody::kExact) return {6, 2, 256, 120};
  if (kBody == TileBody::kLog) return {5, 2, 256, 120};
  return {4, 2, 256, 120};
#endif
}

template <class T, TileBody kBody> struct Tile {
  static constexpr Sizes kSizes = sizes<kBody>();
  static constexpr int kRows = kSizes.rows, kVectors = kSizes.vectors;
  static constexpr int kCols = kVectors * static_cast<int>(Bits<T>::kWidth);
  static constexpr std::size_t kDepth = kSizes.depth;
  static constexpr std::size_t kBlock = kSizes.block / kRows * kRows;
  static constexpr std::size_t kBytesA = kBody != TileBody::kSegments ? sizeof(T)
                                         : kSumsSegments              ? 3 * sizeof(T)
                                                                      : 17 * sizeof(T);
  // Scratch: packed a, for kLog also for LogBody, what is made of a panel of b (traces; sums with constants), a byte of
  // flags for each panel of a.
  static constexpr std::size_t kPanels = kBlock * kDepth * kBytesA;
  static constexpr std::size_t kLogPanels = kBody == TileBody::kLog ? kBlock * kDepth * sizeof(LogEntry<T>) : 0;
  static constexpr std::size_t kMade = kBody == TileBody::kLog ? 1 : kBody == TileBody::kSegments ? 16 : 0;
  static constexpr std::size_t kScratch = kPanels + kLogPanels + kMade * kCols * kDepth * sizeof(T) + kBlock;
};

// Packing.

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
        const Pair<T> pair = pack_pair_b<T>(product, x);
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
      if constexpr (kBody == TileBody::kLog) {
        if (n == S::kCols) {
          // Elements past the end of a run are looked at as well: the flags may forbid what they need not.
          Extremes<T> seen;
          bool zeros = false;
          const auto change = [&](F x) {
            seen.add(bits<I>(x));
            return bits<F>(cut<T>(bits<I>(x), product.keep));
          };
          // The last row by way of the buffer: another panel may begin where this one ends.
          for (std::size_t k = k0; k < k1; ++k, row.advance(patches), to += S::kCols) {
            for (std::size_t j = 0; j < S::kCols; j += 64 / sizeof(T)) __builtin_prefetch(to + 16 * S::kCols + j, 1);
            zeros |= runs.write(patches, row, k + 1 < k1 ? to : buffer, change);
          }
          std::memcpy(to - S::kCols, buffer, S::kCols * sizeof(T));
          return seen.flags() | flag_if(zeros, kZeros);
        }
      }
      for (std::size_t k = k0; k < k1; k += kReadAhead) {
        const std::size_t some = min_of(kReadAhead, k1 - k);
        for (std::size_t q = 0; q < some; ++q, row.advance(patches)) runs.read(patches, row, buffer + q * 2 * S::kCols);
        for (std::size_t q = 0; q < some; ++q) pack_row(buffer + q * 2 * S::kCols, n);
      }
    } else {
      for (std::size_t k = k0; k < k1; ++k, row.advance(patches)) pack_row(read_patches(b, row, at, n, buffer), n);
    }
  } else if (n == S::kCols && b.row_offsets != nullptr) {
    const T* const from = static_cast<const T*>(b.data) + col;
    for (std::size_t k = k0; k < k1; ++k) pack_row(from + b.row_offsets[k], S::kCols);
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
  // What each segment adds to b = 0, which lies in the first.
  alignas(64) Int zeros[16];
  if constexpr (kBody == TileBody::kSegments)
    for (int s = 0; s < 16; ++s) zeros[s] = product.table[s * 16];
  Extremes<T> extremes;
  const Int keep = product.keep, offset = product.c - B::kOne;
  const auto pack = [&](std::size_t chunk, std::size_t k, std::size_t lanes) __attribute__((always_inline)) {
    const std::size_t at = (chunk + k) * stride;
    F first[S::kRows], second[S::kRows], third[S::kRows];
#pragma GCC unroll 12
    for (int i = 0; i < S::kRows; ++i) {
      const F x = load_some(from[i] + k, lanes);
      if constexpr (kBody == TileBody::kLog) {
        const I u = bits<I>(x);
        extremes.add(u);
        first[i] =
            bits<F>(select((u & B::kMagnitude) == 0, I{} + Traces<T>::kForA, added<T>(cut<T>(u, keep), I{} + offset)));
      } else if constexpr (kBody == TileBody::kSegments) {
        const I u = bits<I>(clean<T>(x, keep));
        extremes.add(u);
        const I segment = (u >> (B::kMantissa - 4)) & 15, c = simd::lookup16(zeros, segment);
        I m, s;
        log_entry<T>(u, c, &m, &s);
        first[i] = bits<F>(m - c);
        second[i] = bits<F>(s);
        third[i] = bits<F>(segment * static_cast<Int>(kSumsSegments ? S::kCols : 16));
      } else if constexpr (kSlopeOfA<kBody>) {
        I u;
        flagged |= log_b<T>(x, keep, &u);
        first[i] = bits<F>(u);
      } else {
        const Pair<T> pair = pack_pair_a<T>(product, x);
        first[i] = pair.first;
        second[i] = pair.second;
        if (steps == 2) flagged |= is_large<T>(x);
      }
    }
    if constexpr (kBody == TileBody::kSegments) {
      if constexpr (kSumsSegments) {
        store_turned<S::kRows>(first, lanes, values + at, stride);
        store_turned<S::kRows>(second, lanes, values + n * stride + at, stride);
        store_turned<S::kRows>(third, lanes, values + 2 * n * stride + at, stride);
      } else {
        Int* const sums = static_cast<Int*>(panel);
        alignas(64) T mantissas[S::kRows * B::kWidth], tables[S::kRows * B::kWidth];
        store_turned<S::kRows>(first, lanes, mantissas, stride);
        store_turned<S::kRows>(second, lanes, values + n * stride * 16 + at, stride);
        store_turned<S::kRows>(third, lanes, tables, stride);
        for (std::size_t e = 0; e < lanes * S::kRows; ++e)
          for (std::size_t j = 0; j < 16; ++j)
            sums[(at + e) * 16 + j] =
                bits<Int>(mantissas[e]) + product.table[bits<Int>(tables[e]) + static_cast<Int>(j)];
      }
    } else {
      store_turned<S::kRows>(first, lanes, values + at, stride);
      if (kBody == TileBody::kExact && steps == 2)
        store_turned<S::kRows>(second, lanes, values + at + S::kRows, stride);
    }
  };
  for (std::size_t chunk = 0; chunk < n; chunk += kChunk) {
    const std::size_t size = min_of(kChunk, n - chunk);
    // Rows that do not exist repeat the first.
    for (std::size_t i = 0; i < static_cast<std::size_t>(S::kRows); ++i) {
      from[i] = i < rows ? read(product.a, row + i, k0 + chunk, size, buffer[i]) : from[0];
      if (n <= 2 * kChunk) prefetch<T>(product.a, row + 4 * S::kRows + i, k0 + chunk);
    }
    std::size_t k = 0;
    for (; k + B::kWidth <= size; k += B::kWidth) pack(chunk, k, B::kWidth);
    if (k < size) pack(chunk, k, size - k);
  }
  return extremes.flags() | flag_if(simd::any(flagged), kAny);
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
      log_entry<T>(bits<I>(clean<T>(x, product.keep)), I{} + product.c, &m, &s);
      alignas(64) typename B::Int mantissas[B::kWidth];
      alignas(64) T scales[B::kWidth];
      store(mantissas, m);
      store(scales, bits<typename B::F>(s));
      for (std::size_t l = 0; l < min_of(B::kWidth, n - k); ++l)
        panel[(k + l) * S::kRows + i] = {mantissas[l], scales[l]};
    }
  }
}

// The product over a range.

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
                             const void* made, const TileTarget& target, std::size_t row, std::size_t col, T* c) {
  using B = Bits<T>;
  using S = Tile<T, kBody>;
  constexpr int kR = S::kRows, kC = S::kCols, kV = S::kVectors;
  (void)product, (void)row, (void)col, (void)made;
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
  } else if constexpr (kBody == TileBody::kSegments && kSumsSegments) {
    const std::size_t n = target.steps * kR;
    const typename B::Int* mantissas = reinterpret_cast<const typename B::Int*>(a);
    const SummedSegmentBody<T, kR, kC> body{mantissas, reinterpret_cast<const T*>(mantissas + n), mantissas + 2 * n,
                                            static_cast<const typename B::Int*>(made), b};
    if (flagged)
      tile<kR, kV>(AnySummedSegmentBody<T, kR, kC>{body}, target, c);
    else
      tile_of_rows<kR, kV>(body, target, c);
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

// The sums of a panel of b with the constants of each segment of a.
template <class T>
__attribute__((noinline)) void add_constants(const typename Bits<T>::Int* table, const T* b, std::size_t depth,
                                             std::size_t cols, typename Bits<T>::Int* to) {
  using I = typename Bits<T>::I;
  for (std::size_t k = 0; k < depth; ++k, to += 16 * cols)
    for (std::size_t j = 0; j < cols; j += Bits<T>::kWidth) {
      const I u = bits<I>(load<typename Bits<T>::F>(b + k * cols + j)), segment = (u >> (Bits<T>::kMantissa - 4)) & 15;
      for (std::size_t s = 0; s < 16; ++s)
        store(to + s * cols + j, added<T>(u, simd::lookup16(table + s * 16, segment)));
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
  const void* const made = scratch + S::kPanels + S::kLogPanels;
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
        const SumBody<T, S::kRows, S::kCols> body{
            reinterpret_cast<const std::make_unsigned_t<typename Bits<T>::Int>*>(a),
            flags_b == kZeros ? static_cast<const T*>(made) : b, ((flags_a[i] | flags_b) & kZeros) != 0};
        tile_any_size<T, kBody>(body, target, c);
        continue;
      }
      a = scratch + S::kPanels + i * size_a * sizeof(LogEntry<T>);
    }
    one_tile<T, kBody>(product, a, ((flags_a[i] | flags_b) & kAny) != 0, b, made, target, row, col, c);
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
      if constexpr (kBody == TileBody::kSegments && kSumsSegments)
        add_constants(product.table, b, k1 - k0, S::kCols,
                      reinterpret_cast<typename Bits<T>::Int*>(panels + S::kPanels));
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
