// SPDX-License-Identifier: BSD-3-Clause
// The matrix product whose multiplication is a 256 x 256 table, compiled once per CPU level.
// Lanes run over rows of a: for one index k of depth, the table rows that a few rows of a name are transposed into a
// vector table, entry v holding what each row gives for b = v. A term of all rows is then one vector load.
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

constexpr std::size_t kCols = 512;
// Vector tables at once: 32 KiB of them, so that they share the first two cache levels with the accumulators.
constexpr std::size_t kTables = kBytes >= 64 ? 2 : 4;
constexpr std::size_t kTableBytes = 256 * kBytes;
constexpr std::size_t kAccumulatorBytes = kCols * 2 * kBytes;

template <int Width> constexpr std::size_t kRows = kBytes / Width;

// The vector whose 128-bit part p holds 16 bytes from rows[first + p * step] + offset.
FASTOPS_INLINE i32 load_parts(const char* const* rows, std::size_t first, std::size_t step, std::size_t offset) {
  alignas(kBytes) char parts[kBytes];
#if defined(FASTOPS_AVX512)
  (void)parts;
  const auto part = [&](std::size_t p) { return _mm_loadu_si128((const __m128i*)(rows[first + p * step] + offset)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
  return (i32)_mm512_maskz_inserti64x4(__mmask8(-1), _mm512_castsi256_si512(low), high, 1);
#elif defined(FASTOPS_AVX2)
  (void)parts;
  const auto part = [&](std::size_t p) { return _mm_loadu_si128((const __m128i*)(rows[first + p * step] + offset)); };
  return (i32)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#else
  for (std::size_t p = 0; p < kBytes / 16; ++p) std::memcpy(parts + 16 * p, rows[first + p * step] + offset, 16);
  i32 v;
  std::memcpy(&v, parts, sizeof v);
  return v;
#endif
}

// table[v] = (rows[0][v], rows[1][v], ...) for v < 256.
template <int Width> FASTOPS_INLINE void build(const char* const* rows, char* table) {
  constexpr std::size_t kPart = 16 / Width;  // elements of a 128-bit part
  for (std::size_t v = 0; v < 256; v += kPart, table += kPart * kBytes) {
    i32 x[kPart];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kPart; ++r) x[r] = load_parts(rows, r, kPart, v * Width);
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
#pragma GCC unroll 4
  for (std::size_t q = 0; q < kTables; ++q) from[q] = b[q];
  for (std::size_t j = 0; j < cols; ++j) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(j) * (kTogether ? 1 : stride);
    if constexpr (Width == 2) {
      std::int32_t* acc = reinterpret_cast<std::int32_t*>(accumulators + j * 2 * kBytes);
      i32 low = load<i32>(acc), high = load<i32>(acc + kBytes / 4);
#pragma GCC unroll 2
      for (std::size_t q = 0; q < kTables; q += 2) {
        const i32 x = entry(tables + q * kTableBytes, from[q][at]),
                  y = entry(tables + (q + 1) * kTableBytes, from[q + 1][at]);
        low += simd::add_pairs16(interleave_low<2>(x, y));
        high += simd::add_pairs16(interleave_high<2>(x, y));
      }
      store(acc, low);
      store(acc + kBytes / 4, high);
    } else if constexpr (Width == 4) {
      std::int32_t* acc = reinterpret_cast<std::int32_t*>(accumulators + j * kBytes);
      i32 sum = load<i32>(acc);
#pragma GCC unroll 4
      for (std::size_t q = 0; q < kTables; ++q) sum += entry(tables + q * kTableBytes, from[q][at]);
      store(acc, sum);
    } else {
      std::int64_t* acc = reinterpret_cast<std::int64_t*>(accumulators + j * kBytes);
      i64 sum = load<i64>(acc);
#pragma GCC unroll 4
      for (std::size_t q = 0; q < kTables; ++q) sum += simd::bits<i64>(entry(tables + q * kTableBytes, from[q][at]));
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
  char* accumulators = scratch + kTables * kTableBytes;
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

void multiply_any(const LutProduct& p, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t col1,
                  void* scratch) {
  char* bytes = static_cast<char*>(scratch);
  if (p.width == 2)
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
