// SPDX-License-Identifier: BSD-3-Clause
// A matrix product as plain data, and the table of kernels that each level fills: what the blocking and the kernels
// share.
#ifndef FASTOPS_MITCHELL_MITCHELL_MATMUL_H
#define FASTOPS_MITCHELL_MITCHELL_MATMUL_H

#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "mitchell/mitchell_params.h"

namespace fastops {

// The patches of one group of an image: matrices (channels kernel_height kernel_width) x (out_height out_width).
struct Patches {
  std::size_t channels, height, width, kernel_height, kernel_width, out_height, out_width;
  std::size_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  std::ptrdiff_t image_stride;  // elements between images
};

enum class Layout : std::int32_t {
  kMatrix,   // strided
  kPatches,  // rows: channel and kernel position, columns: image and output position
};

struct Operand {
  const void* data;
  fastops_dtype dtype;
  Layout layout;
  bool flush;  // a half type's subnormals read as zero
  std::ptrdiff_t row_stride, col_stride;
  // Where not zero, row r of a matrix lies at (r / row_inner) row_outer_stride + (r % row_inner) row_stride.
  std::size_t row_inner;
  std::ptrdiff_t row_outer_stride;
  // Where not null, those of the rows of a matrix of T whose columns lie together, in place of the strides.
  const std::size_t* row_offsets;
  const Patches* patches;
  std::size_t first_col;  // kPatches: added to every column
};

// What a step of the tile does with an element of a (one per row) and a vector of b.
enum class TileBody : std::int32_t {
  kExact,          // acc += a b
  kLog,            // acc += scale(a) float(bits(b) + mantissa(a))
  kSegments,       // the same, the mantissa looked up by the segment of b
  kSlope,          // acc += a slope(point, b)
  kSlopeSegments,  // the same, the constant looked up
  kSlopeA,         // acc += slope(point, a) b
  kSlopeASegments,
};
inline constexpr int kBodies = 7;

// What packing makes of an operand of kExact; every form but kRaw reads subnormals as zero and cuts mantissas.
enum class Pack : std::int32_t {
  kRaw,
  kEquation,   // two steps: a (2^e, (x + c) 2^e), b (b, 2^e)
  kIterative,  // two steps: a (a - a', a'), b (b, b - b'); a' is a without its top bits
  kPower,      // s 2^e
  kTop,        // b - b'
};

template <class T> struct IntegerOf;
template <> struct IntegerOf<float> {
  using type = std::int32_t;
};
template <> struct IntegerOf<double> {
  using type = std::int64_t;
};

// out (rows x cols) = a (rows x depth) times b (depth x cols), computed in T.
template <class T> struct Product {
  using Int = typename IntegerOf<T>::type;
  TileBody body;
  Pack pack_a, pack_b;
  int steps;        // packed steps for one index of depth: 2 for kEquation and kIterative
  int corrections;  // kIterative, kTop
  std::size_t rows, cols, depth;
  Operand a, b;
  Operand point;     // shaped as out: where the slope is taken
  bool poison;       // a nan in `point` makes the element nan
  Int c;             // in units of the last mantissa bit
  Int keep;          // mantissa bits that count, and all others
  const Int* table;  // 16 x 16, row: the segment of a (of point); kSegments and kSlopeSegments
  void* out;
  fastops_dtype out_dtype;
  std::ptrdiff_t out_row_stride, out_col_stride;
};

// Tile sizes of a body: rows and columns of the register tile, steps of depth packed at once, rows packed at once.
struct TileShape {
  std::size_t rows, cols, depth, block;
  std::size_t scratch;  // bytes
};

// Rows row0 .. row1 and columns col0 .. col1 (col0 on a panel's edge) over depth0 .. depth1 (depth0 on a block's edge).
struct BlockRange {
  std::size_t row0, row1, col0, col1, depth0, depth1;
};

// b packed by panels of `cols` columns: block of depth d, panel p at data + (d panels + p) panel_size.
template <class T> struct PackedB {
  T* data;
  unsigned char* flags;  // one a panel: what its values allow
  std::size_t panels;    // of the columns packed
  std::size_t panel_size;
  std::size_t col0, depth0;  // where the packed part begins
  bool fresh;                // one panel for all: multiply packs into it what it needs next
};

template <class T> struct MatmulKernels {
  TileShape shape[kBodies];
  // Packs panel p of the depth block d.
  void (*pack_b)(const Product<T>& product, const PackedB<T>& packed, std::size_t p, std::size_t d, std::size_t depth1);
  // c, of leading dimension ldc and with (row0, col0) as its first element, becomes (first) or gains the product over
  // the range.
  void (*multiply)(const Product<T>& product, const PackedB<T>& packed, const BlockRange& range, void* scratch, T* c,
                   std::ptrdiff_t ldc, bool first);
  // Writes rounded accumulators to product.out.
  void (*finish)(const Product<T>& product, const BlockRange& range, const T* c, std::ptrdiff_t ldc);
};

// out[i, j] = sum over k of table[a[i, k]][b[k, j]] + depth * bias.
struct LutProduct {
  std::size_t rows, cols, depth;
  const std::uint8_t *a, *b;
  std::ptrdiff_t a_row_stride, a_col_stride, b_row_stride, b_col_stride;
  const void* table;  // 256 x 256 entries of `width` bytes, signed, `bias` taken off
  int width;          // 2, 4 or 8
  std::int64_t bias;
  std::size_t chunk;  // steps of depth that a 32-bit sum takes without overflow (width 2 and 4)
  void* out;
  bool wide_out;  // int64, else int32
  std::ptrdiff_t out_row_stride, out_col_stride;
};

struct LutKernels {
  std::size_t rows[3];  // computed at once, by log2(width) - 1
  std::size_t cols;     // at most so many columns at once
  std::size_t scratch;  // bytes
  // At most that many rows from row0 and columns from col0.
  void (*multiply)(const LutProduct& product, std::size_t row0, std::size_t row1, std::size_t col0, std::size_t col1,
                   void* scratch);
};

struct MatmulLevel {
  MatmulKernels<float> single;
  MatmulKernels<double> wide;
};

#define FASTOPS_DECLARE(level)           \
  namespace level {                      \
  extern const MatmulLevel kMatmulLevel; \
  extern const LutKernels kLutKernels;   \
  }
FASTOPS_FOR_EACH_LEVEL(FASTOPS_DECLARE)
#undef FASTOPS_DECLARE

}  // namespace fastops
#endif
