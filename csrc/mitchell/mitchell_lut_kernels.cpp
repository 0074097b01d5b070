// SPDX-License-Identifier: BSD-3-Clause
// The matrix product whose multiplication is a 256 x 256 table, compiled once per CPU level.
// Lanes run over rows of a: for one index k of depth, the table rows that a few rows of a name are transposed into a
// vector table, entry v holding what each row gives for b = v. A term of all rows is then one vector load. Where few
// rows or columns share a table and 8 registers hold a row of it, lanes run over columns of b, and permutes look up.
#include "core/simd.h"
#include "mitchell/mitchell_matmul.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using simd::i32;
using simd::i64;
using simd::interleave_high;
using simd::interleave_low;
using simd::load;
using simd::store;
using simd::u16;

// A transposition serves all columns at once; their accumulators share the second-level cache with the vector tables.
constexpr std::size_t kCols = 2048;
// Vector tables at once. Up to 32 bytes: 32 KiB of them, so that they share the first two cache levels with the
// accumulators. At 64 two of them are 32 KiB; loading and storing the accumulators for every two costs more than what
// eight take from the second level.
constexpr std::size_t kTables = kBytes >= 64 ? 8 : 4;
constexpr std::size_t kTableBytes = 256 * kBytes;
constexpr std::size_t kAccumulatorBytes = kCols * 2 * kBytes;

template <int Width> constexpr std::size_t kRows = kBytes / Width;

// The vectors whose 128-bit parts p hold the 16 bytes from rows[first + p * step] + offset and those after them.
FASTOPS_INLINE void load_parts(const char* const* rows, std::size_t first, std::size_t step, std::size_t offset,
                               i32* one, i32* two) {
  const auto from = [&](std::size_t p) { return rows[first + p * step] + offset; };
#if defined(FASTOPS_AVX512)
  const auto half = [&](std::size_t p) { return _mm256_loadu_si256((const __m256i*)from(p)); };
  const __m512i low = _mm512_maskz_inserti64x4(__mmask8(-1), _mm512_castsi256_si512(half(0)), half(1), 1);
  const __m512i high = _mm512_maskz_inserti64x4(__mmask8(-1), _mm512_castsi256_si512(half(2)), half(3), 1);
  *one = (i32)_mm512_maskz_shuffle_i64x2(__mmask8(-1), low, high, 0x88);
  *two = (i32)_mm512_maskz_shuffle_i64x2(__mmask8(-1), low, high, 0xdd);
#elif defined(FASTOPS_AVX2)
  const auto part = [&](std::size_t p, std::size_t at) { return _mm_loadu_si128((const __m128i*)(from(p) + at)); };
  *one = (i32)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0, 0)), part(1, 0), 1);
  *two = (i32)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0, 16)), part(1, 16), 1);
#else
  alignas(kBytes) char parts[2][kBytes];
  for (std::size_t p = 0; p < kBytes / 16; ++p)
    for (std::size_t h = 0; h < 2; ++h) std::memcpy(parts[h] + 16 * p, from(p) + 16 * h, 16);
  std::memcpy(one, parts[0], kBytes);
  std::memcpy(two, parts[1], kBytes);
#endif
}

// table[v] = (rows[0][v], rows[1][v], ...) for the v that x holds.
template <int Width> FASTOPS_INLINE void turn_part(i32 (&x)[16 / Width], char* table) {
  constexpr std::size_t kPart = 16 / Width;  // elements of a 128-bit part
  const auto put = [&](std::size_t i, i32 value) { std::memcpy(table + i * kBytes, &value, kBytes); };
  if constexpr (Width >= 4) {
    simd::turn<Width>(x);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kPart; ++i) put(i, x[i]);
  } else {
    i32 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = interleave_low<2>(x[2 * i], x[2 * i + 1]);
      t[i + 4] = interleave_high<2>(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      u[2 * i] = interleave_low<4>(t[2 * i], t[2 * i + 1]);
      u[2 * i + 1] = interleave_high<4>(t[2 * i], t[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        put(static_cast<std::size_t>(4 * h + 2 * i), interleave_low<8>(u[4 * h + i], u[4 * h + i + 2]));
        put(static_cast<std::size_t>(4 * h + 2 * i + 1), interleave_high<8>(u[4 * h + i], u[4 * h + i + 2]));
      }
  }
}

// The same for v < 256.
template <int Width> FASTOPS_INLINE void build(const char* const* rows, char* table) {
  constexpr std::size_t kPart = 16 / Width;
  for (std::size_t v = 0; v < 256; v += 2 * kPart, table += 2 * kPart * kBytes) {
    i32 x[kPart], y[kPart];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kPart; ++r) load_parts(rows, r, kPart, v * Width, &x[r], &y[r]);
    turn_part<Width>(x, table);
    turn_part<Width>(y, table + kPart * kBytes);
  }
}

FASTOPS_INLINE i32 entry(const char* table, std::uint8_t index) {
  i32 v;
  std::memcpy(&v, table + static_cast<std::size_t>(index) * kBytes, sizeof v);
  return v;
}

// One vector table a step of depth, kTables steps: adds their terms to the accumulators of every column.
template <int Width, bool kTogether>
__attribute__((noinline)) void add_terms(const char* tables, const std::uint8_t* const* b, std::ptrdiff_t stride,
                                         std::size_t cols, char* accumulators) {
  // Copies that no store can change.
  const std::uint8_t* from[kTables];
#pragma GCC unroll 8
  for (std::size_t q = 0; q < kTables; ++q) from[q] = b[q];
  for (std::size_t j = 0; j < cols; ++j) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(j) * (kTogether ? 1 : stride);
    const auto term = [&](std::size_t q) { return entry(tables + q * kTableBytes, from[q][at]); };
    if constexpr (Width == 2) {
      std::int32_t* acc = reinterpret_cast<std::int32_t*>(accumulators + j * 2 * kBytes);
      i32 low = load<i32>(acc), high = load<i32>(acc + kBytes / 4);
#pragma GCC unroll 8
      for (std::size_t q = 0; q < kTables; q += 2) {
        const i32 x = term(q), y = term(q + 1);
        low += simd::add_pairs16(interleave_low<2>(x, y));
        high += simd::add_pairs16(interleave_high<2>(x, y));
      }
      store(acc, low);
      store(acc + kBytes / 4, high);
    } else if constexpr (Width == 4) {
      std::int32_t* acc = reinterpret_cast<std::int32_t*>(accumulators + j * kBytes);
      i32 sum = load<i32>(acc);
#pragma GCC unroll 8
      for (std::size_t q = 0; q < kTables; ++q) sum += term(q);
      store(acc, sum);
    } else {
      std::int64_t* acc = reinterpret_cast<std::int64_t*>(accumulators + j * kBytes);
      i64 sum = load<i64>(acc);
#pragma GCC unroll 8
      for (std::size_t q = 0; q < kTables; ++q) sum += simd::bits<i64>(term(q));
      store(acc, sum);
    }
  }
}

// Where row r of the group lies among the accumulators of a column.
template <int Width> FASTOPS_INLINE std::size_t place(std::size_t r) {
  if constexpr (Width == 2)
    return r % 8 < 4 ? r / 8 * 4 + r % 4 : kBytes / 4 + r / 8 * 4 + r % 4;
  else
    return r;
}

template <int Width, class Out>
void write(const LutProduct& p, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t cols,
           std::int64_t constant, bool first, const char* accumulators) {
  for (std::size_t r = 0; r < row1 - row0; ++r) {
    Out* out = static_cast<Out*>(p.out) + static_cast<std::ptrdiff_t>(row0 + r) * p.out_row_stride +
               static_cast<std::ptrdiff_t>(col0) * p.out_col_stride;
    for (std::size_t j = 0; j < cols; ++j) {
      std::int64_t sum;
      if constexpr (Width == 8)
        sum = reinterpret_cast<const std::int64_t*>(accumulators + j * kBytes)[r];
      else
        sum = reinterpret_cast<const std::int32_t*>(accumulators + j * (Width == 2 ? 2 : 1) * kBytes)[place<Width>(r)];
      Out* to = out + static_cast<std::ptrdiff_t>(j) * p.out_col_stride;
      const std::uint64_t before = first ? 0 : static_cast<std::uint64_t>(*to);
      *to = static_cast<Out>(before + static_cast<std::uint64_t>(sum) + static_cast<std::uint64_t>(constant));
    }
  }
}

template <int Width>
void multiply(const LutProduct& p, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t col1,
              char* scratch) {
  char* const accumulators = scratch + kTables * kTableBytes;
  const std::size_t cols = col1 - col0;
  for (std::size_t k0 = 0; k0 < p.depth;) {
    const std::size_t k1 = k0 + (p.depth - k0 < p.chunk ? p.depth - k0 : p.chunk);
    std::memset(accumulators, 0, cols * (Width == 2 ? 2 : 1) * kBytes);
    for (std::size_t k = k0; k < k1; k += kTables) {
      const std::uint8_t* b[kTables];
      for (std::size_t q = 0; q < kTables; ++q) {
        char* table = scratch + q * kTableBytes;
        const std::size_t step = k + q < k1 ? k + q : k1 - 1;
        b[q] = p.b + static_cast<std::ptrdiff_t>(step) * p.b_row_stride +
               static_cast<std::ptrdiff_t>(col0) * p.b_col_stride;
        if (k + q >= k1) {
          std::memset(table, 0, kTableBytes);
          continue;
        }
        const char* rows[kRows<Width>];
        for (std::size_t r = 0; r < kRows<Width>; ++r) {
          const std::size_t row = row0 + r < row1 ? row0 + r : row1 - 1;
          const std::uint8_t value = p.a[static_cast<std::ptrdiff_t>(row) * p.a_row_stride +
                                         static_cast<std::ptrdiff_t>(step) * p.a_col_stride];
          rows[r] = static_cast<const char*>(p.table) + static_cast<std::size_t>(value) * 256 * Width;
        }
        build<Width>(rows, table);
      }
      if (p.b_col_stride == 1)
        add_terms<Width, true>(scratch, b, 1, cols, accumulators);
      else
        add_terms<Width, false>(scratch, b, p.b_col_stride, cols, accumulators);
    }
    const std::int64_t constant = static_cast<std::int64_t>(k1 - k0) * p.bias;
    if (p.wide_out)
      write<Width, std::int64_t>(p, row0, row1, col0, cols, constant, k0 == 0, accumulators);
    else
      write<Width, std::int32_t>(p, row0, row1, col0, cols, constant, k0 == 0, accumulators);
    k0 = k1;
  }
}

// Lanes over columns of b.

constexpr bool kRowsInRegisters = kBytes >= 64;
// Where that is faster: transposing takes as long as 7000 terms here, and the terms of a column then as long as 14.
constexpr bool rows_in_registers(std::size_t rows, std::size_t cols) {
  return kRowsInRegisters && rows * cols < 14 * cols + 7000;
}
constexpr std::size_t kLanes16 = kBytes / 2, kRowVectors = 256 / kLanes16;
// Steps of depth at once: what is made of b for them shares the first-level cache with the sums of a row.
constexpr std::size_t kSteps = 8;
alignas(64) constexpr std::int16_t kNoRow[256] = {};

// Vectors of b, those of steps s and s + 1 side by side, and where bits 6 and 7 of their values are set.
struct IndexRows {
  std::uint16_t values[kSteps * kCols];
  std::uint32_t bits[kSteps * kCols / kLanes16 * 2];
};
static_assert(!kRowsInRegisters || sizeof(IndexRows) <= kTables * kTableBytes);

FASTOPS_INLINE void index_row(const std::uint8_t* b, std::ptrdiff_t stride, std::size_t cols, std::uint16_t* values,
                              std::uint32_t* bits) {
  using Half = simd::LaneType<std::uint8_t, kLanes16>::type;
  const auto put = [&](const std::uint8_t* from, std::size_t vectors) {
    const simd::u8 bytes = load<simd::u8>(from);
    const std::uint64_t odd = simd::bits_of_bytes((bytes & 64) != 0), upper = simd::bits_of_bytes((bytes & 128) != 0);
    for (std::size_t h = 0; h < vectors; ++h, values += 2 * kLanes16, bits += 4) {
      store(values, simd::convert<u16>(load<Half>(from + h * kLanes16)));
      bits[0] = static_cast<std::uint32_t>(odd >> h * kLanes16);
      bits[1] = static_cast<std::uint32_t>(upper >> h * kLanes16);
    }
  };
  std::size_t j = 0;
  if (stride == 1)
    for (; j + kBytes <= cols; j += kBytes) put(b + j, 2);
  for (; j < cols; j += kBytes) {
    const std::size_t n = cols - j < kBytes ? cols - j : kBytes;
    alignas(64) std::uint8_t some[kBytes] = {};
    for (std::size_t i = 0; i < n; ++i) some[i] = b[static_cast<std::ptrdiff_t>(j + i) * stride];
    put(some, (n + kLanes16 - 1) / kLanes16);
  }
}

FASTOPS_INLINE i32 entries(const u16 (&row)[kRowVectors], const std::uint16_t* values, const std::uint32_t* bits) {
  const u16 at = load<u16>(values);
  u16 quarter[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) quarter[q] = simd::lookup_pair(row[2 * q], row[2 * q + 1], at);
  return simd::bits<i32>(simd::select_bits(bits[1], simd::select_bits(bits[0], quarter[3], quarter[2]),
                                           simd::select_bits(bits[0], quarter[1], quarter[0])));
}

// Two steps of depth: adds the terms of one row to its sums.
__attribute__((noinline)) void add_row_terms(const std::int16_t* row0, const std::int16_t* row1,
                                             const std::uint16_t* values, const std::uint32_t* bits,
                                             std::size_t vectors, std::int32_t* sums) {
  u16 x[kRowVectors], y[kRowVectors];
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kRowVectors; ++i) {
    x[i] = simd::bits<u16>(load<simd::lanes<std::int16_t>>(row0 + i * kLanes16));
    y[i] = simd::bits<u16>(load<simd::lanes<std::int16_t>>(row1 + i * kLanes16));
  }
  for (std::size_t v = 0; v < vectors; ++v, values += 2 * kLanes16, bits += 4, sums += kLanes16) {
    const i32 p = entries(x, values, bits), q = entries(y, values + kLanes16, bits + 2);
    store(sums, load<i32>(sums) + simd::add_pairs16(interleave_low<2>(p, q)));
    store(sums + kLanes16 / 2, load<i32>(sums + kLanes16 / 2) + simd::add_pairs16(interleave_high<2>(p, q)));
  }
}

template <class Out>
void write_row(const std::int32_t* sums, std::size_t cols, std::int64_t constant, bool first, Out* out,
               std::ptrdiff_t stride) {
  for (std::size_t j = 0; j < cols; j += kLanes16, sums += kLanes16) {
    alignas(64) std::int32_t sorted[kLanes16];
    simd::store_parts(reinterpret_cast<char*>(sorted), 32, load<i32>(sums));
    simd::store_parts(reinterpret_cast<char*>(sorted + 4), 32, load<i32>(sums + kLanes16 / 2));
    const std::size_t n = cols - j < kLanes16 ? cols - j : kLanes16;
    if (first && stride == 1) {
      for (std::size_t i = 0; i < n; ++i) out[j + i] = static_cast<Out>(sorted[i] + constant);
      continue;
    }
    for (std::size_t i = 0; i < n; ++i) {
      Out* const to = out + static_cast<std::ptrdiff_t>(j + i) * stride;
      const std::uint64_t before = first ? 0 : static_cast<std::uint64_t>(*to);
      *to = static_cast<Out>(before + static_cast<std::uint64_t>(sorted[i] + constant));
    }
  }
}

void multiply_rows(const LutProduct& p, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t col1,
                   char* scratch) {
  const std::int16_t* const table = static_cast<const std::int16_t*>(p.table);
  IndexRows* const index = reinterpret_cast<IndexRows*>(scratch);
  std::int32_t* const all = reinterpret_cast<std::int32_t*>(scratch + kTables * kTableBytes);
  const std::size_t cols = col1 - col0, vectors = (cols + kLanes16 - 1) / kLanes16, width = vectors * kLanes16;
  for (std::size_t k0 = 0; k0 < p.depth;) {
    const std::size_t k1 = k0 + (p.depth - k0 < p.chunk ? p.depth - k0 : p.chunk);
    std::memset(all, 0, (row1 - row0) * width * sizeof *all);
    for (std::size_t k = k0; k < k1; k += kSteps) {
      const std::size_t steps = k1 - k < kSteps ? k1 - k : kSteps;
      // An odd number of steps: the last is there twice, the second time with a row of zeros.
      for (std::size_t s = 0; s < (steps + 1) / 2 * 2; ++s) {
        const std::size_t pair = s / 2 * vectors;
        index_row(p.b + static_cast<std::ptrdiff_t>(k + (s < steps ? s : s - 1)) * p.b_row_stride +
                      static_cast<std::ptrdiff_t>(col0) * p.b_col_stride,
                  p.b_col_stride, cols, index->values + (2 * pair + s % 2) * kLanes16,
                  index->bits + 4 * pair + s % 2 * 2);
      }
      const std::uint8_t* a =
          p.a + static_cast<std::ptrdiff_t>(row0) * p.a_row_stride + static_cast<std::ptrdiff_t>(k) * p.a_col_stride;
      for (std::size_t row = row0; row < row1; ++row, a += p.a_row_stride) {
        const auto table_row = [&](std::size_t s) {
          return s < steps ? table + a[static_cast<std::ptrdiff_t>(s) * p.a_col_stride] * 256 : kNoRow;
        };
        for (std::size_t s = 0; s < steps; s += 2)
          add_row_terms(table_row(s), table_row(s + 1), index->values + s * width, index->bits + s * vectors * 2,
                        vectors, all + (row - row0) * width);
      }
    }
    const std::int64_t constant = static_cast<std::int64_t>(k1 - k0) * p.bias;
    for (std::size_t row = row0; row < row1; ++row) {
      const std::int32_t* const sums = all + (row - row0) * width;
      const std::ptrdiff_t offset =
          static_cast<std::ptrdiff_t>(row) * p.out_row_stride + static_cast<std::ptrdiff_t>(col0) * p.out_col_stride;
      if (p.wide_out)
        write_row(sums, cols, constant, k0 == 0, static_cast<std::int64_t*>(p.out) + offset, p.out_col_stride);
      else
        write_row(sums, cols, constant, k0 == 0, static_cast<std::int32_t*>(p.out) + offset, p.out_col_stride);
    }
    k0 = k1;
  }
}

void multiply_any(const LutProduct& p, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t col1,
                  void* scratch) {
  char* bytes = static_cast<char*>(scratch);
  if (p.width == 2 && rows_in_registers(row1 - row0, col1 - col0))
    multiply_rows(p, row0, row1, col0, col1, bytes);
  else if (p.width == 2)
    multiply<2>(p, row0, row1, col0, col1, bytes);
  else if (p.width == 4)
    multiply<4>(p, row0, row1, col0, col1, bytes);
  else
    multiply<8>(p, row0, row1, col0, col1, bytes);
}

}  // namespace

extern const LutKernels kLutKernels;
constexpr LutKernels kLutKernels = {
    {kRows<2>, kRows<4>, kRows<8>}, kCols, kTables * kTableBytes + kAccumulatorBytes, &multiply_any};

}  // namespace fastops::FASTOPS_LEVEL
