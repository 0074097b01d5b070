// SPDX-License-Identifier: BSD-3-Clause
// Products of small matrices that lie in a workspace, rows padded to whole vectors: what all attention kernels are made
// of.
#ifndef FASTOPS_ATTENTION_ATTENTION_TILE_H
#define FASTOPS_ATTENTION_ATTENTION_TILE_H

#include "core/half.h"
#include "core/simd.h"
#include "fastops/fastops.h"

#define FASTOPS_BODY __attribute__((always_inline))

namespace fastops::FASTOPS_LEVEL::attention {

using simd::kLanes;
using simd::load;
using simd::select;
using simd::splat;
using simd::store;

template <class T> using Vector = simd::lanes<T>;
template <class T> inline constexpr std::size_t kWidth = kLanes<Vector<T>>;

// Rows and vectors of the register tile, and the rows of a chunk of tokens: a multiple of both.
#if defined(FASTOPS_32_REGISTERS)
inline constexpr int kTileRows = 8, kTileVectors = 2;
inline constexpr std::size_t kChunk = 16;
#else
inline constexpr int kTileRows = 6, kTileVectors = 2;
inline constexpr std::size_t kChunk = 24;
#endif

template <class T> constexpr std::size_t padded(std::size_t n) { return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

// a b, with element (i, k) of a at a[i * a_row + k * a_step] and the rows of b contiguous.
template <class T> struct Term {
  const T* a;
  std::ptrdiff_t a_row, a_step;
  const T* b;
  std::ptrdiff_t b_row;
  std::size_t steps;
};

// Which elements of a square a there are: all, those with k <= i, those with k >= i.
enum class Band { kAll, kLower, kUpper };

// c = [keep[i] c +] the terms, times scale[i] where there is one. keep: null writes c anew; a keep_step of 0 takes one
// factor for all rows.
template <class T> struct Target {
  T* c;
  std::ptrdiff_t c_row;
  const T* keep = nullptr;
  std::ptrdiff_t keep_step = 0;
  const T* scale = nullptr;
};

template <int Rows, int Vectors, class T> FASTOPS_INLINE void add_term(Term<T> term, Vector<T> (&acc)[Rows][Vectors]) {
  const std::ptrdiff_t row = term.a_row;
  for (std::size_t k = 0; k < term.steps; ++k, term.a += term.a_step, term.b += term.b_row) {
    Vector<T> b[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) b[v] = load<Vector<T>>(term.b + v * static_cast<std::ptrdiff_t>(kWidth<T>));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vector<T> a = splat<Vector<T>>(term.a[i * row]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[i][v] = simd::fma(a, b[v], acc[i][v]);
    }
  }
}

template <int Rows, int Vectors, class T>
__attribute__((noinline)) void product_tile(const Term<T>* terms, int count, const Target<T>& to) noexcept {
  const Target<T> target = to;
  Vector<T> acc[Rows][Vectors] = {};
  for (int t = 0; t < count; ++t) add_term<Rows, Vectors>(terms[t], acc);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      T* const p = target.c + i * target.c_row + v * static_cast<std::ptrdiff_t>(kWidth<T>);
      Vector<T> r = acc[i][v];
      if (target.keep != nullptr)
        r = simd::fma(splat<Vector<T>>(target.keep[i * target.keep_step]), load<Vector<T>>(p), r);
      if (target.scale != nullptr) r *= target.scale[i];
      store(p, r);
    }
}

template <class T> using TileFunction = void (*)(const Term<T>*, int, const Target<T>&) noexcept;
template <class T>
inline constexpr TileFunction<T> kTiles[kTileVectors][8] = {
    {product_tile<1, 1, T>, product_tile<2, 1, T>, product_tile<3, 1, T>, product_tile<4, 1, T>, product_tile<5, 1, T>,
     product_tile<6, 1, T>, product_tile < kTileRows == 8 ? 7 : 1, 1, T >, product_tile < kTileRows == 8 ? 8 : 1, 1,
     T > },
    {product_tile<1, 2, T>, product_tile<2, 2, T>, product_tile<3, 2, T>, product_tile<4, 2, T>, product_tile<5, 2, T>,
     product_tile<6, 2, T>, product_tile < kTileRows == 8 ? 7 : 1, 2, T >, product_tile < kTileRows == 8 ? 8 : 1, 2,
     T > }};

// c (rows x cols, cols whole vectors) = [keep c +] first [+ second]; of the last term only the band is there.
template <class T>
void product(std::size_t rows, std::size_t cols, const Term<T>* terms, int count, const Target<T>& target,
             Band band = Band::kAll) noexcept {
  constexpr std::size_t kRows = kTileRows, kPanel = kTileVectors * kWidth<T>;
  for (std::size_t j = 0; j < cols; j += kPanel) {
    const int vectors = cols - j < kPanel ? 1 : kTileVectors;
    Term<T> part[2] = {terms[0], terms[count - 1]};
    part[0].b += j;
    part[1].b += j;
    Term<T>& last = part[count - 1];
    const std::size_t steps = last.steps;
    Target<T> to = target;
    to.c += j;
    // Field by field from here on: a copy of a whole struct that was just written waits for its parts.
    for (std::size_t i = 0; i < rows; i += kRows) {
      const std::size_t count_rows = rows - i < kRows ? rows - i : kRows;
      if (band == Band::kLower) last.steps = steps < i + count_rows ? steps : i + count_rows;
      kTiles<T>[vectors - 1][count_rows - 1](part, count, to);
      constexpr auto kStep = static_cast<std::ptrdiff_t>(kRows);
      part[0].a += kStep * part[0].a_row;
      if (count == 2) part[1].a += kStep * part[1].a_row;
      to.c += kStep * to.c_row;
      if (to.keep != nullptr) to.keep += kStep * to.keep_step;
      if (to.scale != nullptr) to.scale += kRows;
      if (band == Band::kUpper && i + kRows < rows) {
        last.a += kStep * last.a_step;
        last.b += kStep * last.b_row;
        last.steps -= kRows;
      }
    }
  }
}
template <class T>
FASTOPS_INLINE void product(std::size_t rows, std::size_t cols, const Term<T>& term, const Target<T>& target,
                            Band band = Band::kAll) noexcept {
  product<T>(rows, cols, &term, 1, target, band);
}

// p_ij = (a_i b_j + row_term_i) factor_ij for j <= i, zeros above the diagonal up to the vector that the tile of a row
// ends in; `term.b` is b transposed. factor is laid out as p; it and row_term may be null.
template <class T>
void lower_product(std::size_t rows, Term<T> term, T* p, std::ptrdiff_t p_row, const T* factor,
                   const T* row_term = nullptr) noexcept {
  using V = Vector<T>;
  constexpr std::size_t kRows = kTileRows;
  using Index = decltype(V{} < V{});
  using Int = decltype(Index{}[0] + 0);
  Index iota{};
  for (std::size_t l = 0; l < kWidth<T>; ++l) iota[l] = static_cast<Int>(l);
  for (std::size_t i = 0; i < rows; i += kRows) {
    const std::size_t count = rows - i < kRows ? rows - i : kRows;
    const std::size_t cols = padded<T>(i + count);
    Term<T> part = term;
    part.a += static_cast<std::ptrdiff_t>(i) * part.a_row;
    T* const c = p + static_cast<std::ptrdiff_t>(i) * p_row;
    product<T>(count, cols, part, {c, p_row});
    const std::size_t first = factor != nullptr || row_term != nullptr ? 0 : i / kWidth<T> * kWidth<T>;
    for (std::size_t r = 0; r < count; ++r)
      for (std::size_t j = first; j < cols; j += kWidth<T>) {
        T* const at = c + static_cast<std::ptrdiff_t>(r) * p_row + static_cast<std::ptrdiff_t>(j);
        V v = load<V>(at);
        if (row_term != nullptr) v += row_term[i + r];
        if (factor != nullptr) v *= load<V>(factor + (at - p));
        const auto last = static_cast<Int>(static_cast<std::ptrdiff_t>(i + r) - static_cast<std::ptrdiff_t>(j));
        store(at, select(iota <= last, v, V{}));
      }
  }
}

// to[c][r] = from[r][c] for whole vectors of columns; `rows` a multiple of 16 bytes of elements.
template <class T>
void transpose(const T* from, std::size_t from_row, std::size_t rows, std::size_t cols, T* to,
               std::size_t to_row) noexcept {
  constexpr std::size_t kPart = 16 / sizeof(T);
  for (std::size_t c = 0; c < cols; c += kWidth<T>)
    for (std::size_t r = 0; r < rows; r += kPart) {
      simd::i32 x[kPart];
      for (std::size_t i = 0; i < kPart; ++i)
        x[i] = simd::bits<simd::i32>(load<Vector<T>>(from + (r + i) * from_row + c));
      simd::turn<sizeof(T)>(x);
      // Part p of x[i] is column c + p kPart + i.
      for (std::size_t i = 0; i < kPart; ++i)
        simd::store_parts(reinterpret_cast<char*>(to + (c + i) * to_row + r), kPart * to_row * sizeof(T), x[i]);
    }
}

// The sum of all lanes, in pairs: a chain of additions would take longer than the rest of a row's work.
template <class T, class V> FASTOPS_INLINE T sum_pairs(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    using Half = typename simd::LaneType<T, sizeof(V) / 2>::type;
    Half half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_pairs<T>(half[0] + half[1]);
  }
}
template <class T> FASTOPS_INLINE T sum_lanes(Vector<T> v) { return sum_pairs<T>(v); }

// Where row `i` of an array of the dtype begins; the step in elements.
FASTOPS_INLINE const char* row_at(fastops_dtype dtype, const void* data, std::ptrdiff_t step, std::size_t i) {
  const std::ptrdiff_t size = dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2;
  return static_cast<const char*>(data) + static_cast<std::ptrdiff_t>(i) * step * size;
}

// body(i) for the vectors of `whole` elements, four between two tests: rows are short, and a vector is three
// instructions.
template <class T, class Body> FASTOPS_INLINE void by_vectors(std::size_t whole, Body body) {
  constexpr std::size_t W = kWidth<T>;
  std::size_t i = 0;
  for (; i + 4 * W <= whole; i += 4 * W) {
    body(i);
    body(i + W);
    body(i + 2 * W);
    body(i + 3 * W);
  }
  for (; i < whole; i += W) body(i);
}

// Rows of an array in memory as T, with zeros up to whole vectors.
template <class T> void read_row(fastops_dtype dtype, const void* from, std::size_t n, T* to) noexcept {
  const std::size_t whole = n / kWidth<T> * kWidth<T>;
  std::size_t i = whole;
  if constexpr (sizeof(T) == 4) {
    if (dtype == FASTOPS_F32) {
      const auto* const p = static_cast<const float*>(from);
      by_vectors<T>(whole, [=](std::size_t j) FASTOPS_BODY { store(to + j, load<simd::f32>(p + j)); });
      if (i < n) store(to + i, simd::load_first<simd::f32>(p + i, n - i, 0.0f));
      return;
    }
    const auto* const p = static_cast<const std::uint16_t*>(from);
    if (dtype == FASTOPS_F16) {
      by_vectors<T>(whole,
                    [=](std::size_t j) FASTOPS_BODY { store(to + j, half::from_f16(load<simd::half_u16>(p + j))); });
      for (; i < n; ++i) to[i] = half::from_f16(p[i]);
    } else {
      by_vectors<T>(whole,
                    [=](std::size_t j) FASTOPS_BODY { store(to + j, half::from_bf16(load<simd::half_u16>(p + j))); });
      for (; i < n; ++i) to[i] = half::from_bf16(p[i]);
    }
  } else {
    const auto* const p = static_cast<const double*>(from);
    by_vectors<T>(whole, [=](std::size_t j) FASTOPS_BODY { store(to + j, load<simd::f64>(p + j)); });
    if (i < n) store(to + i, simd::load_first<simd::f64>(p + i, n - i, 0.0));
    return;
  }
  for (; i < padded<T>(n); ++i) to[i] = 0;
}
// n rows, `step` elements apart, to rows of whole vectors.
template <class T>
void read_rows(fastops_dtype dtype, const char* from, std::ptrdiff_t step, std::size_t n, std::size_t width,
               T* to) noexcept {
  const std::size_t wide = padded<T>(width);
  if constexpr (sizeof(T) == 4) {
    if (dtype == FASTOPS_BF16 && width == wide) {
      const auto* p = reinterpret_cast<const std::uint16_t*>(from);
      for (; n > 0; --n, p += step, to += wide)
        by_vectors<T>(wide,
                      [=](std::size_t j) FASTOPS_BODY { store(to + j, half::from_bf16(load<simd::half_u16>(p + j))); });
      return;
    }
  }
  for (std::size_t i = 0; i < n; ++i, to += wide) read_row<T>(dtype, row_at(dtype, from, step, i), width, to);
}
template <class T> void write_row(fastops_dtype dtype, const T* from, std::size_t n, void* to) noexcept {
  const std::size_t whole = n / kWidth<T> * kWidth<T>;
  std::size_t i = whole;
  if constexpr (sizeof(T) == 4) {
    if (dtype == FASTOPS_F32) {
      auto* const p = static_cast<float*>(to);
      by_vectors<T>(whole, [=](std::size_t j) FASTOPS_BODY { store(p + j, load<simd::f32>(from + j)); });
      if (i < n) simd::store_first(p + i, load<simd::f32>(from + i), n - i);
      return;
    }
    auto* const p = static_cast<std::uint16_t*>(to);
    if (dtype == FASTOPS_F16) {
      by_vectors<T>(whole, [=](std::size_t j) FASTOPS_BODY { store(p + j, half::to_f16(load<simd::f32>(from + j))); });
      for (; i < n; ++i) p[i] = half::to_f16(from[i]);
    } else {
      // What rounds to infinity and nan are rare, and cost twice as much.
      simd::i32 most{};
      by_vectors<T>(whole, [&](std::size_t j) FASTOPS_BODY {
        const simd::f32 v = load<simd::f32>(from + j);
        const simd::i32 magnitude = simd::bits<simd::i32>(v) & 0x7fffffff;
        most = select(magnitude > most, magnitude, most);
        store(p + j, half::finite_to_bf16(v));
      });
      if (simd::any(most >= half::kLargeForBf16))
        for (std::size_t j = 0; j < whole; j += kWidth<T>) store(p + j, half::to_bf16(load<simd::f32>(from + j)));
      for (; i < n; ++i) p[i] = half::to_bf16(from[i]);
    }
  } else {
    auto* const p = static_cast<double*>(to);
    by_vectors<T>(whole, [=](std::size_t j) FASTOPS_BODY { store(p + j, load<simd::f64>(from + j)); });
    if (i < n) simd::store_first(p + i, load<simd::f64>(from + i), n - i);
  }
}

// Asks for rows that come later: lines of rows that lie apart are nothing the CPU would fetch by itself.
FASTOPS_INLINE void fetch_rows(fastops_dtype dtype, const void* data, std::ptrdiff_t step, std::size_t first,
                               std::size_t last, std::size_t width) {
  const std::size_t bytes = width * (dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2);
  for (std::size_t i = first; i < last; ++i) {
    const char* const row = row_at(dtype, data, step, i);
    for (std::size_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
  }
}

// Rows of T, `step` elements apart.
template <class T> struct Block {
  const T* data;
  std::ptrdiff_t step;
  FASTOPS_INLINE const T* operator[](std::size_t i) const { return data + static_cast<std::ptrdiff_t>(i) * step; }
};
// Whether rows of n elements can be worked on where they are.
template <class T> FASTOPS_INLINE bool is_plain(fastops_dtype dtype, std::size_t n) {
  return dtype == (sizeof(T) == 8 ? FASTOPS_F64 : FASTOPS_F32) && n % kWidth<T> == 0;
}

// Hands out the parts of a workspace; with a null base it only counts.
template <class T> class Parts {
 public:
  explicit Parts(void* base) noexcept : base_(static_cast<T*>(base)) {}
  T* take(std::size_t n) noexcept {
    T* const part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (n + 15) / 16 * 16;
    return part;
  }
  std::size_t used() const noexcept { return used_; }

 private:
  T* base_;
  std::size_t used_ = 0;
};

template <class T> void fill(T* to, std::size_t n, T value) noexcept {
  for (std::size_t i = 0; i < n; ++i) to[i] = value;
}
template <class T> T power_of_2(T n) noexcept {
  return static_cast<T>(__builtin_ldexp(1.0, n > T(20000) ? 20000 : n >= T(-20000) ? static_cast<int>(n) : -20000));
}
template <class T> T dot(const T* a, const T* b, std::size_t n) noexcept {
  Vector<T> sum{};
  for (std::size_t i = 0; i < n; i += kWidth<T>) sum = simd::fma(load<Vector<T>>(a + i), load<Vector<T>>(b + i), sum);
  return sum_lanes<T>(sum);
}
template <class T> void scale_row(T* row, std::size_t n, T factor) noexcept {
  for (std::size_t i = 0; i < n; i += kWidth<T>) store(row + i, load<Vector<T>>(row + i) * factor);
}
}  // namespace fastops::FASTOPS_LEVEL::attention
#endif
