// SPDX-License-Identifier: BSD-3-Clause
// Convolutions of few channels or filters a group on a GPU, and their gradients: a block has patches of some groups'
// planes in shared memory, and each thread a strip of pixels below one another, or of taps, in registers.
#include "mitchell/mitchell_depthwise.h"

#include <algorithm>

#include "mitchell/mitchell_tile.h"

namespace fastops::FASTOPS_LEVEL {
namespace depthwise_kernels {

using namespace matmul;

// Pixels of a strip, and taps below one another that share what a thread has read of a column.
constexpr int kStrip = 8, kTaps = 8;
constexpr int kWindow = kStrip + kTaps - 1, kShortWindow = kStrip + kTaps / 2 - 1;
// Threads of a block that sums up taps, and groups of taps in it.
constexpr int kMostThreads = 512, kMostUnits = 8;
// Rows of a matrix from which on its tiles are worth it; pairs of a channel and a filter.
constexpr std::size_t kFewRows = 16, kFewPairs = 64;

// A length below 2^16 by which numbers below 2^16 are divided without a division, of which each takes a thread as many
// instructions as a tap of its whole strip.
struct Divisor {
  unsigned length, reciprocal;
};
FASTOPS_DEVICE int over(int n, const Divisor& by) {
#if defined(__CUDA_ARCH__)
  const unsigned above = __umulhi(static_cast<unsigned>(n), by.reciprocal);
#else
  const auto above = static_cast<unsigned>(static_cast<std::uint64_t>(static_cast<unsigned>(n)) * by.reciprocal >> 32);
#endif
  return by.length == 1 ? n : static_cast<int>(above);
}
// The lowest digit of a number, which loses it.
FASTOPS_DEVICE int take_digit(int* number, const Divisor& by) {
  const int above = over(*number, by), digit = *number - above * static_cast<int>(by.length);
  *number = above;
  return digit;
}
FASTOPS_DEVICE unsigned take_digit(unsigned* number, unsigned length) {
  const unsigned above = *number / length, digit = *number - above * length;
  *number = above;
  return digit;
}

// How threads read patches: each in a column of them, and so many lines further.
struct Reading {
  bool near;  // groups lie closer together than columns
  int high, wide, plane;
  int step;              // lines that threads read at once
  Divisor column, line;  // columns that have a thread; the inner length of lines
};
// What a block covers: strips of `rows` pixels of the result below one another, `width` columns, of planes of `groups`
// groups.
struct Cover {
  int groups, filters, strips, rows, width;
  int taps;   // elements between the kernels of two planes, odd to spread them over the banks
  int patch;  // elements of all planes, and what a window reads beyond the last
  int step_y, step_x, tap_y, tap_x;
  Reading image, result;  // of patches, and of results as large
  std::ptrdiff_t pixel_row, pixel_col;
  Divisor by_groups, by_filters, by_strips, by_width, by_places, by_tap_rows, by_tap_cols;
  unsigned down, across, filter_blocks, group_blocks;
};
// Tiles of all images are cut in parts, taps in units of kTaps below one another.
struct Parts {
  std::size_t tiles, splits, part;
  int units, in_block;
  Divisor slots;  // threads of a unit
};

template <class T> struct DepthwiseCall {
  gpu::GatheredMatmul shape;
  Cover cover;
  Parts parts;
  T* sums;  // [part][group][tap][filter] where there are several parts
  Arithmetic<T> arithmetic;
};
static_assert(sizeof(DepthwiseCall<double>) <= 4096, "the parameters of a kernel");

FASTOPS_DEVICE int shorter(int a, int b) { return a < b ? a : b; }
// Planes in memory, from the first pixel of a patch on.
struct Source {
  const char* data;
  std::ptrdiff_t offset, group, row, col;
  int y, x, height, width;
  fastops_dtype dtype;
  bool flush;
};
// Puts high x wide pixels of each group to put(place, value, whether it is there). Threads run along what lies together
// and stay in their column of it: a division for each pixel would cost as much as its products. S: as pixels lie in
// memory.
template <class S, class T, class Put>
FASTOPS_DEVICE void stage_as(const Source& from, const Reading& to, int groups, int most_groups, Put&& put) {
  constexpr int kFlight = 32 / sizeof(T);  // loads under way
  const bool near = to.near;
  // Of three counters the first is the thread's, the others step together as one, `line`.
  const int n0 = near ? most_groups : to.wide, n1 = near ? to.wide : to.high;
  const int lines = near ? to.high * to.wide : groups * to.high;
  const std::ptrdiff_t far0 = near ? from.group : from.col, far1 = near ? from.col : from.row;
  const std::ptrdiff_t far2 = near ? from.row : from.group;
  const int at0 = near ? to.plane : 1, at1 = near ? 1 : to.wide, at2 = near ? to.wide : to.plane;
  // Those that are pixels of the plane, not groups, lie within it from `low` on for `size`.
  const int low1 = near ? -from.x : -from.y, low2 = near ? -from.y : 0;
  const auto size1 = static_cast<unsigned>(near ? from.width : from.height);
  const auto size2 = static_cast<unsigned>(near ? from.height : groups);
  int first = static_cast<int>(threadIdx.x);
  const int column = take_digit(&first, to.column), step = to.step;
  if (first >= step) return;
  int steps2 = step;
  const int steps1 = take_digit(&steps2, to.line);
  const std::ptrdiff_t far = steps1 * far1 + steps2 * far2, far_over = far2 - n1 * far1;
  const int on = steps1 * at1 + steps2 * at2, on_over = at2 - n1 * at1;
  for (int i0 = column; i0 < n0; i0 += static_cast<int>(to.column.length)) {
    int i2 = first;
    int i1 = take_digit(&i2, to.line), at = i0 * at0 + i1 * at1 + i2 * at2;
    const bool has_column = near ? i0 < groups : static_cast<unsigned>(from.x + i0) < static_cast<unsigned>(from.width);
    const S* p = reinterpret_cast<const S*>(from.data) + from.offset + i0 * far0 + i1 * far1 + i2 * far2;
    for (int line = first; line < lines;) {
      S value[kFlight];
      int places[kFlight];
      unsigned there = 0;
#pragma unroll
      for (int l = 0; l < kFlight; ++l) {
        const bool found = has_column && line < lines && static_cast<unsigned>(i1 - low1) < size1 &&
                           static_cast<unsigned>(i2 - low2) < size2;
        value[l] = found ? *p : S{};
        there |= found ? 1u << l : 0u;
        places[l] = line < lines ? at : -1;
        line += step;
        i1 += steps1;
        i2 += steps2;
        p += far;
        at += on;
        if (i1 >= n1) {
          i1 -= n1;
          ++i2;
          p += far_over;
          at += on_over;
        }
      }
#pragma unroll
      for (int l = 0; l < kFlight; ++l) {
        if (places[l] < 0) break;
        const bool found = (there >> l & 1) != 0;
        if constexpr (sizeof(S) == sizeof(T))
          put(places[l], value[l], found);
        else
          put(places[l], from_half(value[l], from.dtype, from.flush), found);
      }
    }
  }
}
template <class T, class Put>
FASTOPS_DEVICE void stage(const Source& from, const Reading& to, int groups, int most_groups, Put&& put) {
  if constexpr (sizeof(T) == 4)
    if (from.dtype != FASTOPS_F32) return stage_as<std::uint16_t, T>(from, to, groups, most_groups, put);
  stage_as<T, T>(from, to, groups, most_groups, put);
}

// Terms of entries, added to a sum. kAny: of any operands, and where a product may overflow, it does so before it is
// added.

// Of kPair; in the short step the caller adds the second products.
template <bool kAny, class T>
FASTOPS_DEVICE void add_pair(const Arithmetic<T>& arithmetic, T first_a, T second_a, T first_b, T second_b, T& sum) {
  if constexpr (kAny) {
    if (!is_skipped(arithmetic, first_b)) sum += simd::fma(second_a, second_b, first_a * first_b);
  } else {
    sum = simd::fma(first_a, first_b, sum);
  }
}
// Of kSlope and kSlopeSegments, whose short step leaves the point's factor to the caller.
template <bool kAny, bool kTables, class T, class Int>
FASTOPS_DEVICE void add_slope(const Arithmetic<T>& arithmetic, const Int* table, Int point, T factor, T a, T b,
                              T& sum) {
  using B = Bits<T>;
  const Int u = bits<Int>(a);
  if constexpr (kTables) point += table[(point >> (B::kMantissa - 4)) * 16 + ((u >> (B::kMantissa - 4)) & 15)];
  if constexpr (kAny) {
    if (!is_skipped(arithmetic, b)) sum += any_term<T>(u, point, b, ~B::kFraction, factor);
  } else {
    sum = simd::fma(bits<T>(added<T>(u, point) & ~B::kFraction), b, sum);
  }
}
// Of kLog and kSegments.
template <bool kAny, bool kTables, class T, class Int>
FASTOPS_DEVICE void add_log(const Arithmetic<T>& arithmetic, const Int* table, Int mantissa, T scale, Int row, T b,
                            T& sum) {
  const Int u = bits<Int>(b);
  if constexpr (kTables) mantissa += table[row + ((u >> (Bits<T>::kMantissa - 4)) & 15)];
  if constexpr (kAny) {
    if (!is_skipped(arithmetic, b)) sum += any_term<T>(u, mantissa, scale, -1);
  } else {
    sum = log_step(u, mantissa, scale, sum);
  }
}

// The products of entries in shared memory, added to a thread's sums.
template <class T, Body kBody> struct Term : Entry<T, kBody> {
  using E = Entry<T, kBody>;
  using Int = typename E::Int;
  struct A {
    T first, second;
    Int row;
  };
  struct B {
    T first, second;
  };
  const Arithmetic<T>& arithmetic;
  const Int* table;

  static FASTOPS_DEVICE A load_a(const T* at, int size) {
    A a{at[0], T{}, 0};
    if constexpr (E::kArraysA > 1) a.second = at[size];
    if constexpr (E::kArraysA > 2) a.row = bits<Int>(at[2 * size]);
    return a;
  }
  static FASTOPS_DEVICE B load_b(const T* at, int size) {
    B b{at[0], T{}};
    if constexpr (E::kArraysB > 1) b.second = at[size];
    return b;
  }
  template <bool kAny> FASTOPS_DEVICE void add(const A& a, const B& b, Int point, T factor, T& sum) const {
    if constexpr (kBody == Body::kPair) {
      add_pair<kAny>(arithmetic, a.first, a.second, b.first, b.second, sum);
      if (!kAny && arithmetic.steps == 2) sum = simd::fma(a.second, b.second, sum);
    } else if constexpr (is_slope(kBody)) {
      add_slope<kAny, E::kTables>(arithmetic, table, point, factor, a.first, b.first, sum);
    } else {
      add_log<kAny, E::kTables>(arithmetic, table, bits<Int>(a.first), a.second, a.row, b.first, sum);
    }
  }
};

// Slopes of some forms of the multiplier are exact products, which know of the point's nan alone.
template <Body kBody> constexpr bool kHasPoint = is_slope(kBody) || kBody == Body::kPair;

// N sums of a thread, with their points where slopes are taken.
template <class T, Body kBody, int N> struct Sums {
  T acc[N] = {};
  Points<T, kBody, is_slope(kBody) ? N : 1> points;
  bool factored = false;
  unsigned poisoned = 0;  // a nan in the point is the result

  FASTOPS_DEVICE void set_point(const Arithmetic<T>& arithmetic, int at, T x) {
    if constexpr (is_slope(kBody)) points.set(arithmetic, at, x);
    poisoned |= x == x ? 0u : 1u << at;
  }
  FASTOPS_DEVICE typename Bits<T>::Int point(int at) const { return points.mantissa[is_slope(kBody) ? at : 0]; }
  FASTOPS_DEVICE T factor(int at) const { return points.factor(at); }
  FASTOPS_DEVICE void apply_factors() {
    if constexpr (kBody == Body::kSlope)
      if (!factored) {
#pragma unroll
        for (int i = 0; i < N; ++i) acc[i] *= points.factor(i);
      }
    factored = true;
  }
  // Whether the terms to come need the long step; as TileProduct.
  FASTOPS_DEVICE bool any(const Arithmetic<T>& arithmetic, bool odd) {
    if constexpr (kBody == Body::kSlopeSegments) {
      return true;
    } else if constexpr (kBody == Body::kSlope) {
      if (odd || arithmetic.c < 0) apply_factors();
      return factored;
    } else {
      return odd;
    }
  }
  FASTOPS_DEVICE T result(int at) const {
    return (poisoned >> at & 1) != 0 ? bits<T>(Bits<T>::kInfinity | Bits<T>::kFraction) : acc[at];
  }
};

template <class T, Body kBody> FASTOPS_DEVICE T* set_table(const Arithmetic<T>& arithmetic, unsigned char* shared) {
  using Int = typename Bits<T>::Int;
  Int* const table = reinterpret_cast<Int*>(shared);
  if constexpr (!Entry<T, kBody>::kTables) {
    return reinterpret_cast<T*>(table);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x))
      table[i] = arithmetic.table[i];
    __syncthreads();
    return reinterpret_cast<T*>(table + 256);
  }
}

FASTOPS_DEVICE Source source_of(const gpu::Gathered& x, const Cover& cover, fastops_dtype dtype, int row, int col) {
  return {static_cast<const char*>(x.data),
          x.offset + row * cover.pixel_row + col * cover.pixel_col,
          x.batch[gpu::kBatchDimensions - 1],
          cover.pixel_row,
          cover.pixel_col,
          x.y + row,
          x.x + col,
          x.height,
          x.width,
          dtype,
          x.flush};
}

// Registers for two blocks, slopes of doubles for one.
template <class T, Body kBody> constexpr int kBlocks = sizeof(T) == 4 ? 4 : is_slope(kBody) ? 1 : 2;

template <class T, Body kBody>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kBody>)
    pixels_kernel(const __grid_constant__ DepthwiseCall<T> call) {
  using Step = Term<T, kBody>;
  using Int = typename Bits<T>::Int;
  constexpr int kGroup = gpu::kBatchDimensions - 1;
  FASTOPS_DYNAMIC_SHARED(shared);
  T* const patch = set_table<T, kBody>(call.arithmetic, shared);
  const gpu::GatheredMatmul& shape = call.shape;
  const Cover& cover = call.cover;
  T* const kernels = patch + Step::kArraysB * cover.patch;
  const int kernels_size = cover.groups * cover.filters * cover.taps;
  const Step step{{}, call.arithmetic, reinterpret_cast<const Int*>(shared)};
  const int height = static_cast<int>(shape.cols.length[1]), width = static_cast<int>(shape.cols.length[2]);
  const int kernel_rows = static_cast<int>(shape.depth.length[1]),
            kernel_cols = static_cast<int>(shape.depth.length[2]);

  unsigned block = blockIdx.x;
  const int col0 = static_cast<int>(take_digit(&block, cover.across)) * cover.width;
  const int row0 = static_cast<int>(take_digit(&block, cover.down)) * cover.strips * cover.rows;
  const std::size_t filter0 = std::size_t{take_digit(&block, cover.filter_blocks)} * cover.by_filters.length;
  const std::size_t group0 = std::size_t{take_digit(&block, cover.group_blocks)} * cover.by_groups.length;
  const auto image = static_cast<std::ptrdiff_t>(block);
  const std::size_t groups_left = shape.batch[kGroup] - group0, filters_left = shape.rows.length[0] - filter0;
  const int groups =
      groups_left < static_cast<std::size_t>(cover.groups) ? static_cast<int>(groups_left) : cover.groups;
  const int filters =
      filters_left < static_cast<std::size_t>(cover.filters) ? static_cast<int>(filters_left) : cover.filters;

  int rest = static_cast<int>(threadIdx.x), g = 0;
  if (cover.result.near) g = take_digit(&rest, cover.by_groups);
  const int col = take_digit(&rest, cover.by_width), top = take_digit(&rest, cover.by_strips) * cover.rows;
  const int f = take_digit(&rest, cover.by_filters);
  if (!cover.result.near) g = take_digit(&rest, cover.by_groups);
  const bool active = rest == 0 && g < groups && f < filters && row0 + top < height && col0 + col < width;
  const int rows = shorter(cover.rows, height - row0 - top);
  // Of an array shaped as the result.
  const auto first_place = [&](const gpu::Gathered& x) {
    return x.offset + static_cast<std::ptrdiff_t>(group0 + g) * x.batch[kGroup] +
           static_cast<std::ptrdiff_t>(filter0 + f) * x.row.stride[0] + image * x.col.stride[0] +
           (row0 + top) * x.col.stride[1] + (col0 + col) * x.col.stride[2];
  };

  Sums<T, kBody, kStrip> sums;
  if constexpr (kHasPoint<kBody>) {
    if (active && shape.point.data != nullptr) {
      const std::ptrdiff_t place = first_place(shape.point);
      // Whether a tap meets a pixel of b.
      const auto meets = [](int from, int step, int taps, int size) {
        for (int i = 0; i < taps; ++i)
          if (static_cast<unsigned>(from + i * step) < static_cast<unsigned>(size)) return true;
        return false;
      };
#pragma unroll
      for (int r = 0; r < kStrip; ++r) {
        if (r >= rows) break;
        sums.set_point(call.arithmetic, r,
                       read<T>(static_cast<const char*>(shape.point.data), place + r * shape.point.col.stride[1],
                               shape.dtype, shape.point.flush));
      }
      for (int r = 0; sums.poisoned >> r != 0; ++r)
        if (shape.depth.length[0] == 0 ||
            !meets(shape.b.y + (row0 + top + r) * cover.step_y, cover.tap_y, kernel_rows, shape.b.height) ||
            !meets(shape.b.x + (col0 + col) * cover.step_x, cover.tap_x, kernel_cols, shape.b.width))
          sums.poisoned &= ~(1u << r);
    }
  }

  const T* const own = patch + g * cover.image.plane + top * cover.step_y * cover.image.wide + col * cover.step_x;
  const T* const own_kernel = kernels + (g * cover.filters + f) * cover.taps;
  for (std::size_t channel = 0; channel < shape.depth.length[0]; ++channel) {
    const auto q = static_cast<std::ptrdiff_t>(channel);
    // What the last channel left has been read.
    if (channel != 0) __syncthreads();
    bool odd = false;
    Source from = source_of(shape.b, cover, shape.dtype, row0 * cover.step_y, col0 * cover.step_x);
    from.offset +=
        static_cast<std::ptrdiff_t>(group0) * from.group + q * shape.b.row.stride[0] + image * shape.b.col.stride[0];
    stage<T>(from, cover.image, groups, cover.groups, [&](int at, T x, bool is_there) {
      odd = Step::put_b(call.arithmetic, x, is_there, patch + at, cover.patch) || odd;
    });
    const int taps = kernel_rows * kernel_cols;
    for (int e = static_cast<int>(threadIdx.x); e < groups * cover.filters * taps; e += kThreads) {
      int tap = e;
      // Taps of a column lie together.
      const int y = take_digit(&tap, cover.by_tap_rows), x = take_digit(&tap, cover.by_tap_cols), plane = tap;
      const int filter = take_digit(&tap, cover.by_filters);
      if (filter >= filters) continue;
      const std::ptrdiff_t place = shape.a.offset + static_cast<std::ptrdiff_t>(group0 + tap) * shape.a.batch[kGroup] +
                                   static_cast<std::ptrdiff_t>(filter0 + filter) * shape.a.row.stride[0] +
                                   q * shape.a.col.stride[0] + y * shape.a.col.stride[1] + x * shape.a.col.stride[2];
      const T w = read<T>(static_cast<const char*>(shape.a.data), place, shape.dtype, shape.a.flush);
      T* const to = kernels + plane * cover.taps + x * kernel_rows + y;
      odd = Step::put_a(call.arithmetic, step.table, w, to, kernels_size) || odd;
    }
    odd = __syncthreads_or(odd) != 0;
    const bool any = sums.any(call.arithmetic, odd);
    if (!active) continue;
    const int wide = cover.image.wide, down = cover.tap_y * wide, next = cover.step_y * wide;
    const T *column = own, *tap = own_kernel;
    // kFull: of a whole strip.
    const auto tap_by_tap = [&](auto is_any, auto is_full, int strip) {
      constexpr bool kAny = decltype(is_any)::value, kFull = decltype(is_full)::value;
#pragma unroll 1
      for (int x = 0; x < kernel_cols; ++x, column += cover.tap_x) {
        const T* at = column;
#pragma unroll 1
        for (int y = 0; y < kernel_rows; ++y, at += down, ++tap) {
          const typename Step::A a = Step::load_a(tap, kernels_size);
#pragma unroll
          for (int r = 0; r < kStrip; ++r) {
            if (!kFull && r >= strip) break;
            const typename Step::B b = Step::load_b(at + r * next, cover.patch);
            step.template add<kAny>(a, b, sums.point(r), sums.factor(r), sums.acc[r]);
          }
        }
      }
    };
    if (any) {
      tap_by_tap(std::true_type{}, std::false_type{}, rows);
    } else if (cover.rows != kStrip) {
      tap_by_tap(std::false_type{}, std::false_type{}, cover.rows);
    } else if (next != wide || down != wide) {
      tap_by_tap(std::false_type{}, std::true_type{}, kStrip);
    } else {
      // A column's pixels are read once for all its taps.
#pragma unroll 1
      for (int x = 0; x < kernel_cols; ++x, column += cover.tap_x) {
        const T* at = column;
#pragma unroll 1
        for (int y = 0; y < kernel_rows; y += kTaps, at += kTaps * wide) {
          const int count = shorter(kTaps, kernel_rows - y);
          typename Step::B window[kWindow] = {};
#pragma unroll
          for (int i = 0; i < kShortWindow; ++i) window[i] = Step::load_b(at + i * wide, cover.patch);
          if (count > kTaps / 2) {
#pragma unroll
            for (int i = kShortWindow; i < kWindow; ++i) window[i] = Step::load_b(at + i * wide, cover.patch);
          }
#pragma unroll
          for (int s = 0; s < kTaps; ++s) {
            if (s >= count) break;
            const typename Step::A a = Step::load_a(tap++, kernels_size);
#pragma unroll
            for (int r = 0; r < kStrip; ++r)
              step.template add<false>(a, window[r + s], sums.point(r), T(1), sums.acc[r]);
          }
        }
      }
    }
  }
  if (!active) return;
  sums.apply_factors();
  const std::ptrdiff_t place = first_place(shape.out);
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
    if (r < rows)
      write<T>(static_cast<char*>(const_cast<void*>(shape.out.data)), place + r * shape.out.col.stride[1], shape.dtype,
               sums.result(r));
}

template <class T, Body kBody>
__global__ void __launch_bounds__(kMostThreads, sizeof(T) == 4 ? 2 : 1)
    taps_kernel(const __grid_constant__ DepthwiseCall<T> call) {
  using Step = Term<T, kBody>;
  using Int = typename Bits<T>::Int;
  constexpr int kGroup = gpu::kBatchDimensions - 1;
  FASTOPS_DYNAMIC_SHARED(shared);
  T* const patch = set_table<T, kBody>(call.arithmetic, shared);
  const gpu::GatheredMatmul& shape = call.shape;
  const Cover& cover = call.cover;
  const Parts& parts = call.parts;
  T* const result = patch + Step::kArraysA * cover.patch;
  const int result_size = cover.groups * cover.result.plane;
  const Step step{{}, call.arithmetic, reinterpret_cast<const Int*>(shared)};
  const int kernel_rows = static_cast<int>(shape.rows.length[1]);

  unsigned block = blockIdx.x;
  const std::size_t group0 = std::size_t{take_digit(&block, cover.group_blocks)} * cover.by_groups.length;
  const auto filter = static_cast<std::ptrdiff_t>(take_digit(&block, static_cast<unsigned>(shape.cols.length[0])));
  const auto channel = static_cast<std::ptrdiff_t>(take_digit(&block, static_cast<unsigned>(shape.rows.length[0])));
  const int unit_blocks = (parts.units + parts.in_block - 1) / parts.in_block;
  const int unit0 = static_cast<int>(take_digit(&block, static_cast<unsigned>(unit_blocks))) * parts.in_block;
  const std::size_t split = block, first = split * parts.part;
  const std::size_t last = first + parts.part < parts.tiles ? first + parts.part : parts.tiles;
  const std::size_t groups_left = shape.batch[kGroup] - group0;
  const int groups =
      groups_left < static_cast<std::size_t>(cover.groups) ? static_cast<int>(groups_left) : cover.groups;

  // A thread has a strip of one group's tile, and a unit of taps.
  const int t = static_cast<int>(threadIdx.x), places = cover.strips * cover.width;
  int own_unit = t, g = 0, rest = take_digit(&own_unit, parts.slots);
  const int unit = unit0 + own_unit;
  if (cover.image.near) g = take_digit(&rest, cover.by_groups);
  const int place = take_digit(&rest, cover.by_places);
  if (!cover.image.near) g = take_digit(&rest, cover.by_groups);
  const bool active = rest == 0 && g < groups && unit < parts.units;
  const int strips = (kernel_rows + kTaps - 1) / kTaps;
  const int tap_x = unit / strips, tap_y = unit % strips * kTaps, count = shorter(kTaps, kernel_rows - tap_y);
  int strip = place;
  const int col = take_digit(&strip, cover.by_width), top = strip * cover.rows;

  Sums<T, kBody, kTaps> sums;
  if constexpr (kHasPoint<kBody>) {
    if (active && shape.point.data != nullptr && parts.tiles != 0) {
      const gpu::Gathered& point = shape.point;
      const std::ptrdiff_t at = point.offset + static_cast<std::ptrdiff_t>(group0 + g) * point.batch[kGroup] +
                                channel * point.row.stride[0] + tap_y * point.row.stride[1] +
                                tap_x * point.row.stride[2] + filter * point.col.stride[0];
#pragma unroll
      for (int s = 0; s < kTaps; ++s) {
        if (s >= count) break;
        sums.set_point(
            call.arithmetic, s,
            read<T>(static_cast<const char*>(point.data), at + s * point.row.stride[1], shape.dtype, point.flush));
      }
    }
  }

  const T* const own = patch + g * cover.image.plane + (top * cover.step_y + tap_y * cover.tap_y) * cover.image.wide +
                       col * cover.step_x + tap_x * cover.tap_x;
  const T* const own_result = result + g * cover.result.plane + top * cover.width + col;
  for (std::size_t tile = first; tile < last; ++tile) {
    auto number = static_cast<unsigned>(tile);
    const int col0 = static_cast<int>(take_digit(&number, cover.across)) * cover.width;
    const int row0 = static_cast<int>(take_digit(&number, cover.down)) * cover.strips * cover.rows;
    const auto image = static_cast<std::ptrdiff_t>(number);
    if (tile != first) __syncthreads();
    bool odd = false;
    Source from = source_of(shape.a, cover, shape.dtype, row0 * cover.step_y, col0 * cover.step_x);
    from.offset += static_cast<std::ptrdiff_t>(group0) * from.group + channel * shape.a.row.stride[0] +
                   image * shape.a.col.stride[0];
    stage<T>(from, cover.image, groups, cover.groups, [&](int at, T x, bool) {
      odd = Step::put_a(call.arithmetic, step.table, x, patch + at, cover.patch) || odd;
    });
    const gpu::Gathered& b = shape.b;
    const Source results{static_cast<const char*>(b.data),
                         b.offset + static_cast<std::ptrdiff_t>(group0) * b.batch[kGroup] + filter * b.col.stride[0] +
                             image * b.row.stride[0] + row0 * b.row.stride[1] + col0 * b.row.stride[2],
                         b.batch[kGroup],
                         b.row.stride[1],
                         b.row.stride[2],
                         row0,
                         col0,
                         static_cast<int>(shape.depth.length[1]),
                         static_cast<int>(shape.depth.length[2]),
                         shape.dtype,
                         b.flush};
    stage<T>(results, cover.result, groups, cover.groups, [&](int at, T x, bool is_there) {
      odd = Step::put_b(call.arithmetic, x, is_there, result + at, result_size) || odd;
    });
    odd = __syncthreads_or(odd) != 0;
    const bool any = sums.any(call.arithmetic, odd);
    if (!active) continue;
    if (any) {
#pragma unroll 1
      for (int r = 0; r < cover.rows; ++r) {
        const typename Step::B b_r = Step::load_b(own_result + r * cover.width, result_size);
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
          if (s >= count) break;
          const typename Step::A a =
              Step::load_a(own + (r * cover.step_y + s * cover.tap_y) * cover.image.wide, cover.patch);
          step.template add<true>(a, b_r, sums.point(s), sums.factor(s), sums.acc[s]);
        }
      }
    } else if (cover.rows == kStrip && cover.step_y == 1 && cover.tap_y == 1) {
      typename Step::A window[kWindow] = {};
      typename Step::B of_strip[kStrip];
#pragma unroll
      for (int i = 0; i < kShortWindow; ++i) window[i] = Step::load_a(own + i * cover.image.wide, cover.patch);
      if (count > kTaps / 2) {
#pragma unroll
        for (int i = kShortWindow; i < kWindow; ++i) window[i] = Step::load_a(own + i * cover.image.wide, cover.patch);
      }
#pragma unroll
      for (int r = 0; r < kStrip; ++r) of_strip[r] = Step::load_b(own_result + r * cover.width, result_size);
#pragma unroll
      for (int s = 0; s < kTaps; ++s) {
        if (s >= count) break;
#pragma unroll
        for (int r = 0; r < kStrip; ++r)
          step.template add<false>(window[r + s], of_strip[r], sums.point(s), T(1), sums.acc[s]);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < cover.rows; ++r) {
        const typename Step::B b_r = Step::load_b(own_result + r * cover.width, result_size);
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
          if (s >= count) break;
          const typename Step::A a =
              Step::load_a(own + (r * cover.step_y + s * cover.tap_y) * cover.image.wide, cover.patch);
          step.template add<false>(a, b_r, sums.point(s), T(1), sums.acc[s]);
        }
      }
    }
  }
  sums.apply_factors();

  // The sums of all places of a group, in halves; the tiles have been read.
  __syncthreads();
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int s = 0; s < kTaps; ++s) patch[s * threads + t] = sums.acc[s];
  const int other = cover.image.near ? cover.groups : 1;  // the thread of the next place
  for (int left = places; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (active && place < left - half)
#pragma unroll
      for (int s = 0; s < kTaps; ++s) {
        sums.acc[s] += patch[s * threads + t + half * other];
        patch[s * threads + t] = sums.acc[s];
      }
    left = half;
  }
  if (!active || place != 0) return;
  const std::size_t group = group0 + g, tap_rows = shape.rows.length[1], tap_cols = shape.rows.length[2];
  const std::size_t rows = shape.rows.length[0] * tap_rows * tap_cols, cols = shape.cols.length[0];
#pragma unroll
  for (int s = 0; s < kTaps; ++s) {
    if (s >= count) break;
    if (parts.splits == 1) {
      const gpu::Gathered& out = shape.out;
      write<T>(static_cast<char*>(const_cast<void*>(out.data)),
               out.offset + static_cast<std::ptrdiff_t>(group) * out.batch[kGroup] + channel * out.row.stride[0] +
                   (tap_y + s) * out.row.stride[1] + tap_x * out.row.stride[2] + filter * out.col.stride[0],
               shape.dtype, sums.result(s));
    } else {
      const std::size_t row = (static_cast<std::size_t>(channel) * tap_rows + tap_y + s) * tap_cols + tap_x;
      call.sums[((split * shape.batch[kGroup] + group) * rows + row) * cols + filter] = sums.result(s);
    }
  }
}

// Launches.

struct Plan {
  bool fits;
  Cover cover;
  Parts parts;
  std::size_t blocks;
};
constexpr std::size_t kMostShared = 44 * 1024;  // of kernels with every array
// Blocks that occupy a large GPU.
constexpr std::size_t kEnough = 1024, kMostSplits = 256;

std::size_t parts_of(std::size_t n, std::size_t length) noexcept { return (n + length - 1) / length; }
Divisor divisor(std::size_t n) noexcept {
  return {static_cast<unsigned>(n), n == 1 ? 0 : static_cast<unsigned>(((std::uint64_t{1} << 32) + n - 1) / n)};
}
int even(std::size_t n, std::size_t most) noexcept { return static_cast<int>(parts_of(n, parts_of(n, most))); }
std::ptrdiff_t size_of(std::ptrdiff_t stride) noexcept { return stride < 0 ? -stride : stride; }

std::size_t shared_of(const Cover& cover, const Parts& parts, bool pixels, int arrays_a, int arrays_b, bool table,
                      std::size_t item) noexcept {
  const auto n = [](int x) { return static_cast<std::size_t>(x); };
  const std::size_t patch = n(cover.patch) * n(pixels ? arrays_b : arrays_a);
  const std::size_t others = pixels ? n(cover.groups) * n(cover.filters) * n(cover.taps) * n(arrays_a)
                                    : n(cover.groups) * n(cover.result.plane) * n(arrays_b);
  const std::size_t reduced = pixels ? 0 : n(kTaps) * n(parts.in_block) * parts.slots.length;
  return ((table ? 256 : 0) + std::max(patch + others, reduced)) * item;
}

Plan plan_of(const gpu::GatheredMatmul& shape) noexcept {
  constexpr int kGroup = gpu::kBatchDimensions - 1;
  Plan plan{};
  Cover& cover = plan.cover;
  Parts& parts = plan.parts;
  const bool pixels = shape.results == gpu::Results::kPixels;
  const gpu::Index &kernel = pixels ? shape.depth : shape.rows, &places = pixels ? shape.cols : shape.depth;
  const gpu::Gathered& image = pixels ? shape.b : shape.a;
  const gpu::Walk &taps = image.row, &positions = image.col;
  const gpu::Gathered& result = pixels ? shape.out : shape.b;
  const gpu::Walk& result_positions = pixels ? result.col : result.row;
  const std::size_t groups = shape.batch[kGroup], filters = pixels ? shape.rows.length[0] : 1;
  const std::size_t height = places.length[1], width = places.length[2];
  constexpr std::size_t kMost = std::size_t{1} << 14;  // of one side of a patch
  for (int d = 0; d < kGroup; ++d)
    if (shape.batch[d] != 1) return plan;
  if (shape.results == gpu::Results::kMatrix || groups == 0 || filters == 0 || height == 0 || width == 0 ||
      kernel.length[1] > kMost || kernel.length[2] > kMost || positions.y[1] > static_cast<std::int32_t>(kMost) ||
      positions.x[2] > static_cast<std::int32_t>(kMost) || taps.y[1] > static_cast<std::int32_t>(kMost) ||
      taps.x[2] > static_cast<std::int32_t>(kMost))
    return plan;
  cover.step_y = positions.y[1];
  cover.step_x = positions.x[2];
  cover.tap_y = taps.y[1];
  cover.tap_x = taps.x[2];
  cover.image.near = size_of(image.batch[kGroup]) < size_of(positions.stride[2] / cover.step_x);
  cover.result.near = size_of(result.batch[kGroup]) < size_of(result_positions.stride[2]);

  std::size_t most = kThreads;
  if (!pixels) {
    parts.units = static_cast<int>(kernel.length[2] * parts_of(kernel.length[1], kTaps));
    parts.in_block = even(static_cast<std::size_t>(parts.units), kMostUnits);
    most = std::min<std::size_t>(kThreads, kMostThreads / static_cast<std::size_t>(parts.in_block) / 32 * 32);
  }
  cover.rows = height > kStrip / 2 ? kStrip : static_cast<int>(height);
  const std::size_t all_strips = parts_of(height, static_cast<std::size_t>(cover.rows));
  // Sides that with a small kernel's leave few threads without a column to read.
  const std::size_t most_columns = std::max((most - 8) / all_strips, std::min<std::size_t>(62, most));
  cover.width = even(width, cover.image.near ? 8 : most_columns);
  cover.strips =
      cover.image.near ? 1 : even(all_strips, std::max<std::size_t>(1, most / static_cast<std::size_t>(cover.width)));
  const auto places_of = [&] { return static_cast<std::size_t>(cover.strips) * static_cast<std::size_t>(cover.width); };
  cover.filters = even(filters, std::max<std::size_t>(1, most / places_of()));
  cover.groups = static_cast<std::size_t>(cover.filters) < filters
                     ? 1
                     : even(groups, std::max<std::size_t>(1, most / places_of() / filters));
  const std::size_t item = shape.dtype == FASTOPS_F64 ? 8 : 4;
  for (;;) {
    const auto sides = [&](int results, int step, std::size_t count, int tap) {
      return (static_cast<std::size_t>(results) - 1) * static_cast<std::size_t>(step) +
             (count - 1) * static_cast<std::size_t>(tap) + 1;
    };
    const std::size_t high = sides(cover.strips * cover.rows, cover.step_y, kernel.length[1], cover.tap_y);
    const std::size_t wide = sides(cover.width, cover.step_x, kernel.length[2], cover.tap_x);
    if (high <= kMost && wide <= kMost && high * wide <= kMost && kernel.length[1] * kernel.length[2] <= kMost) {
      cover.image.high = static_cast<int>(high);
      cover.image.wide = static_cast<int>(wide);
      cover.result.high = cover.strips * cover.rows;
      cover.result.wide = cover.width;
      for (Reading* each : {&cover.image, &cover.result}) each->plane = (each->high * each->wide) | 1;
      cover.taps = static_cast<int>(kernel.length[1] * kernel.length[2]) | 1;
      cover.patch = cover.groups * cover.image.plane + (kTaps / 2 - 1) * cover.image.wide;
      parts.slots = divisor(parts_of(places_of() * static_cast<std::size_t>(cover.groups), 32) * 32);
      if (shared_of(cover, parts, pixels, 3, 2, true, item) <= kMostShared) break;
    }
    int* const longest = cover.groups > 1    ? &cover.groups
                         : cover.filters > 1 ? &cover.filters
                         : cover.strips > 1  ? &cover.strips
                                             : &cover.width;
    if (*longest == 1) return plan;
    *longest = (*longest + 1) / 2;
  }
  const auto n = [](int x) { return static_cast<std::size_t>(x); };
  const std::size_t threads = pixels ? kThreads : n(parts.in_block) * parts.slots.length;
  for (Reading* each : {&cover.image, &cover.result}) {
    const std::size_t columns = std::min(threads, n(each->near ? cover.groups : each->wide));
    each->column = divisor(columns);
    each->step = static_cast<int>(threads / columns);
    each->line = divisor(n(each->near ? each->wide : each->high));
  }
  cover.pixel_row = taps.stride[1] / cover.tap_y;
  cover.pixel_col = taps.stride[2] / cover.tap_x;
  cover.by_groups = divisor(n(cover.groups));
  cover.by_filters = divisor(n(cover.filters));
  cover.by_strips = divisor(n(cover.strips));
  cover.by_width = divisor(n(cover.width));
  cover.by_places = divisor(places_of());
  cover.by_tap_rows = divisor(kernel.length[1]);
  cover.by_tap_cols = divisor(kernel.length[2]);
  const std::size_t down =
      parts_of(height, static_cast<std::size_t>(cover.strips) * static_cast<std::size_t>(cover.rows));
  const std::size_t across = parts_of(width, static_cast<std::size_t>(cover.width));
  const std::size_t filter_blocks = parts_of(filters, static_cast<std::size_t>(cover.filters));
  const std::size_t group_blocks = parts_of(groups, static_cast<std::size_t>(cover.groups));
  parts.tiles = places.length[0] * down * across;
  if (pixels) {
    parts.splits = 1;
    plan.blocks = parts.tiles * filter_blocks * group_blocks;
  } else {
    const std::size_t blocks =
        group_blocks * shape.cols.length[0] * kernel.length[0] *
        parts_of(static_cast<std::size_t>(parts.units), static_cast<std::size_t>(parts.in_block));
    parts.splits = blocks == 0 ? 1 : std::max<std::size_t>(1, std::min({kEnough / blocks, kMostSplits, parts.tiles}));
    parts.part = std::max<std::size_t>(1, parts_of(parts.tiles, parts.splits));
    parts.splits = std::max<std::size_t>(1, parts_of(parts.tiles, parts.part));
    plan.blocks = blocks * parts.splits;
  }
  plan.fits = plan.blocks <= gpu::kMostBlocks && parts.tiles <= gpu::kMostBlocks && group_blocks <= gpu::kMostBlocks;
  cover.down = static_cast<unsigned>(down);
  cover.across = static_cast<unsigned>(across);
  cover.filter_blocks = static_cast<unsigned>(filter_blocks);
  cover.group_blocks = static_cast<unsigned>(group_blocks);
  return plan;
}

template <class T, Body kBody> gpu::Status launch(const DepthwiseCall<T>& call, const Plan& plan, gpu::Stream stream) {
  using E = Entry<T, kBody>;
  const bool pixels = call.shape.results == gpu::Results::kPixels;
  const std::size_t shared = shared_of(call.cover, call.parts, pixels, E::kArraysA, E::kArraysB, E::kTables, sizeof(T));
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (pixels) {
    const auto kernel = pixels_kernel<T, kBody>;
    FASTOPS_LAUNCH(kernel, blocks, kThreads, shared, stream, call);
  } else {
    const auto kernel = taps_kernel<T, kBody>;
    FASTOPS_LAUNCH(kernel, blocks, static_cast<unsigned>(call.parts.in_block) * call.parts.slots.length, shared, stream,
                   call);
  }
  return launched();
}

template <class T>
gpu::Status multiply(const fastops_mitchell* m, const gpu::GatheredMatmul& shape, void* workspace,
                     gpu::Stream stream) noexcept {
  const Plan plan = plan_of(shape);
  if (plan.blocks == 0) return 0;
  DepthwiseCall<T> call{};
  call.shape = shape;
  call.cover = plan.cover;
  call.parts = plan.parts;
  call.sums = static_cast<T*>(workspace);
  const Body body = set_arithmetic<T>(m, shape.dtype, shape.terms, shape.transposed, &call.arithmetic);
  if (shape.terms != gpu::Terms::kSlopes) call.shape.point.data = nullptr;
  // Results beyond the last have no term.
  call.arithmetic.skips = shape.skips || shape.results == gpu::Results::kTaps;
  const auto status = [&] {
    switch (body) {
      case Body::kPair:
        return launch<T, Body::kPair>(call, plan, stream);
      case Body::kSegments:
        return launch<T, Body::kSegments>(call, plan, stream);
      case Body::kSlope:
        return launch<T, Body::kSlope>(call, plan, stream);
      case Body::kSlopeSegments:
        return launch<T, Body::kSlopeSegments>(call, plan, stream);
      default:
        return launch<T, Body::kLog>(call, plan, stream);
    }
  }();
  if (status != 0 || plan.parts.splits == 1) return status;
  return gpu::mitchell_add_parts(shape, workspace, plan.parts.splits, stream);
}

}  // namespace depthwise_kernels
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

namespace level = fastops::FASTOPS_LEVEL::depthwise_kernels;

bool mitchell_is_depthwise(const GatheredMatmul& call) noexcept {
  const std::size_t few = call.results == Results::kPixels ? level::kFewRows : level::kFewPairs;
  const std::size_t rows = call.rows.length[0] * (call.results == Results::kPixels ? 1 : call.cols.length[0]);
  return rows <= few && level::plan_of(call).fits;
}
std::size_t mitchell_depthwise_workspace(const GatheredMatmul& call) noexcept {
  const std::size_t splits = level::plan_of(call).parts.splits;
  if (splits <= 1) return 0;
  std::size_t n = call.batch[kBatchDimensions - 1] * call.cols.length[0];
  for (int d = 0; d < call.rows.axes; ++d) n *= call.rows.length[d];
  return splits * n * (call.dtype == FASTOPS_F64 ? 8 : 4);
}
Status mitchell_depthwise(const fastops_mitchell* m, const GatheredMatmul& call, void* workspace,
                          Stream stream) noexcept {
  return call.dtype == FASTOPS_F64 ? level::multiply<double>(m, call, workspace, stream)
                                   : level::multiply<float>(m, call, workspace, stream);
}

}  // namespace fastops::gpu
