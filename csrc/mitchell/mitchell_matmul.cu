// SPDX-License-Identifier: BSD-3-Clause
// Matrix products under a multiplier on a GPU: tiles of a and b, split as for the CPU's packed panels, in shared
// memory, a square of sums in each thread's registers.
#include "cuda/device.h"
#include "mitchell/mitchell_matmul_math.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace matmul;

constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads along a side of the tile
constexpr int kDepth = 8;  // steps of depth in shared memory at once

enum class Body {
  kPair,      // one or two exact products
  kLog,       // scale(a) float(bits(b) + mantissa(a))
  kSegments,  // the same, with a constant by the segments of both
};

// What the multiplier decides; fields as those of Product.
template <class T> struct Arithmetic {
  using Int = typename IntegerOf<T>::type;
  Pack pack_a, pack_b;
  int steps, corrections;
  Int c, keep;
  Int table[256];  // 16 x 16, row: the segment of a
};
template <class T> struct MatmulCall {
  gpu::Matmul shape;
  bool flush;
  std::size_t tiles_down, tiles_across;
  Arithmetic<T> arithmetic;
};

FASTOPS_DEVICE const char* matrix_of(const gpu::Matrices& x, const gpu::Matmul& shape, std::size_t index,
                                     std::size_t item) {
  std::ptrdiff_t offset = 0;
  for (int d = gpu::kBatchDimensions - 1; d >= 0; --d) {
    const std::size_t above = index / shape.batch[d];
    offset += static_cast<std::ptrdiff_t>(index - above * shape.batch[d]) * x.batch[d];
    index = above;
  }
  return static_cast<const char*>(x.data) + offset * static_cast<std::ptrdiff_t>(item);
}

template <class T> FASTOPS_DEVICE T read(const char* matrix, std::ptrdiff_t offset, fastops_dtype dtype, bool flush) {
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<const double*>(matrix)[offset];
  } else {
    if (dtype == FASTOPS_F32) return reinterpret_cast<const float*>(matrix)[offset];
    const std::uint16_t h = reinterpret_cast<const std::uint16_t*>(matrix)[offset];
    const bool f16 = dtype == FASTOPS_F16;
    if (flush && (h & (f16 ? 0x7c00 : 0x7f80)) == 0) return half::from_bf16(h & 0x8000);
    return f16 ? half::from_f16(h) : half::from_bf16(h);
  }
}

// The elements of a tile of `kLength` rows (of columns, for b) by kDepth steps that a thread moves from global to
// shared memory: kLoads of them, equally far apart in both. Threads run along the axis whose elements lie together.
template <int kLength> struct Mover {
  static constexpr int kLoads = kLength * kDepth / kThreads;
  std::ptrdiff_t at, next, advance;  // in the matrix
  int shared, shared_next;
  int step, step_next;
  unsigned inside;  // bit e: element e lies in one of the matrix's rows

  FASTOPS_DEVICE Mover(bool steps_lie_together, std::size_t first, std::size_t end, std::ptrdiff_t along_stride,
                       std::ptrdiff_t step_stride, int pitch) {
    const int t = static_cast<int>(threadIdx.x);
    const int along = steps_lie_together ? t / kDepth : t % kLength;
    const int along_next = steps_lie_together ? kThreads / kDepth : 0;
    step = steps_lie_together ? t % kDepth : t / kLength;
    step_next = steps_lie_together ? 0 : kThreads / kLength;
    at = static_cast<std::ptrdiff_t>(first + along) * along_stride + step * step_stride;
    next = along_next * along_stride + step_next * step_stride;
    advance = kDepth * step_stride;
    shared = step * pitch + along;
    shared_next = step_next * pitch + along_next;
    inside = 0;
    for (int e = 0; e < kLoads; ++e) inside |= (first + along + e * along_next < end ? 1u : 0u) << e;
  }
  // The next kDepth steps, of which `left` exist; zeros beyond the matrix.
  template <class T>
  FASTOPS_DEVICE void fetch(const char* matrix, fastops_dtype dtype, bool flush, int left, T (&to)[kLoads]) {
#pragma unroll
    for (int e = 0; e < kLoads; ++e) {
      const bool exists = (inside >> e & 1) != 0 && step + e * step_next < left;
      to[e] = exists ? read<T>(matrix, at + e * next, dtype, flush) : T{};
    }
    at += advance;
  }
};

// The float of a sum of bits times the scale, added. A zero in b leaves a mantissa without exponent, which counts as
// zero.
FASTOPS_DEVICE float log_step(std::int32_t b, std::int32_t mantissa, float scale, float acc) {
  return fma_flushed(bits<float>(added<float>(b, mantissa)), scale, acc);
}
FASTOPS_DEVICE double log_step(std::int64_t b, std::int64_t mantissa, double scale, double acc) {
  const bool zero = (b & Bits<double>::kMagnitude) == 0;
  return simd::fma(bits<double>(zero ? b : added<double>(b, mantissa)), scale, acc);
}

template <class T, Body kBody, int kTile> struct Tile {
  using Int = typename IntegerOf<T>::type;
  static constexpr int kLength = kSide * kTile;  // rows and columns of a block's tile
  static constexpr int kPitch = kLength + 4;     // rows of shared memory; the pad spreads a column over the banks
  static constexpr int kLoads = Mover<kLength>::kLoads;
  static constexpr int kArraysA = kBody == Body::kSegments ? 3 : 2, kArraysB = kBody == Body::kPair ? 2 : 1;
  static constexpr int kSize = kDepth * kPitch;
  static constexpr std::size_t kShared = 2 * (kArraysA + kArraysB) * kSize * sizeof(T) + 256 * sizeof(Int);
};

// Position i of a thread's square: groups of four, each group of all threads beside that of the others.
template <int kTile> FASTOPS_DEVICE int position(int thread, int i) { return i / 4 * (kSide * 4) + thread * 4 + i % 4; }

template <class T, int kTile> FASTOPS_DEVICE void load_line(const T* line, int thread, T (&to)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; i += 4) {
    constexpr int kPart = 16 / sizeof(T) < 4 ? 16 / sizeof(T) : 4;
#pragma unroll
    for (int j = 0; j < 4; j += kPart) {
      const auto part = load_vector<Vector<T, kPart>>(line + position<kTile>(thread, i + j));
#pragma unroll
      for (int l = 0; l < kPart; ++l) to[i + j + l] = part.v[l];
    }
  }
}

template <class T, Body kBody, int kTile>
__global__ void __launch_bounds__(kThreads, 2) matmul_kernel(const __grid_constant__ MatmulCall<T> call) {
  using S = Tile<T, kBody, kTile>;
  using B = Bits<T>;
  using Int = typename B::Int;
  FASTOPS_DYNAMIC_SHARED(shared);
  T* const tiles = reinterpret_cast<T*>(shared);
  Int* const table = reinterpret_cast<Int*>(tiles + 2 * (S::kArraysA + S::kArraysB) * S::kSize);
  const gpu::Matmul& shape = call.shape;
  const Arithmetic<T>& arithmetic = call.arithmetic;
  const std::size_t item = sizeof(T) == 8 ? 8 : shape.dtype == FASTOPS_F32 ? 4 : 2;
  const std::size_t per_matrix = call.tiles_down * call.tiles_across;
  const std::size_t index = blockIdx.x / per_matrix, tile = blockIdx.x - index * per_matrix;
  const std::size_t row0 = tile / call.tiles_across * S::kLength, col0 = tile % call.tiles_across * S::kLength;
  const char* const a = matrix_of(shape.a, shape, index, item);
  const char* const b = matrix_of(shape.b, shape, index, item);
  const bool a_by_depth = shape.a.col == 1 || shape.a.row != 1, b_by_depth = shape.b.row == 1 && shape.b.col != 1;
  const int across = static_cast<int>(threadIdx.x) % kSide, down = static_cast<int>(threadIdx.x) / kSide;

  if constexpr (kBody == Body::kSegments) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) table[i] = arithmetic.table[i];
    __syncthreads();
  }

  Mover<S::kLength> move_a(a_by_depth, row0, shape.rows, shape.a.row, shape.a.col, S::kPitch);
  Mover<S::kLength> move_b(b_by_depth, col0, shape.cols, shape.b.col, shape.b.row, S::kPitch);
  T from_a[S::kLoads], from_b[S::kLoads];
  const auto fetch = [&](std::size_t left) {
    const int steps = left < kDepth ? static_cast<int>(left) : kDepth;
    move_a.fetch(a, shape.dtype, call.flush, steps, from_a);
    move_b.fetch(b, shape.dtype, call.flush, steps, from_b);
  };
  // Splits what was fetched into the tiles of a stage; whether the short step cannot multiply it.
  const auto split = [&](int stage) {
    T* const to = tiles + stage * (S::kArraysA + S::kArraysB) * S::kSize;
    bool odd = false;
#pragma unroll
    for (int e = 0; e < S::kLoads; ++e) {
      T* const at_a = to + move_a.shared + e * move_a.shared_next;
      T* const at_b = to + S::kArraysA * S::kSize + move_b.shared + e * move_b.shared_next;
      if constexpr (kBody == Body::kPair) {
        const Pair<T> x = pack_pair_a<T>(arithmetic, from_a[e]), y = pack_pair_b<T>(arithmetic, from_b[e]);
        odd = odd || is_large<T>(from_a[e]) || is_large<T>(from_b[e]);
        at_a[0] = x.first;
        at_a[S::kSize] = x.second;
        at_b[0] = y.first;
        at_b[S::kSize] = y.second;
      } else {
        const T x = clean<T>(from_a[e], arithmetic.keep), y = clean<T>(from_b[e], arithmetic.keep);
        odd = odd || is_odd<T>(x) || is_odd<T>(y);
        const Int u = bits<Int>(x);
        Int c = arithmetic.c, mantissa, scale;
        if constexpr (kBody == Body::kSegments) {
          const Int segment = (u >> (B::kMantissa - 4)) & 15;
          c = table[segment * 16];
          at_a[2 * S::kSize] = bits<T>(static_cast<Int>(segment * 16));
        }
        log_entry<T>(u, c, &mantissa, &scale);
        if constexpr (kBody == Body::kSegments) mantissa -= c;
        at_a[0] = bits<T>(mantissa);
        at_a[S::kSize] = bits<T>(scale);
        at_b[0] = y;
      }
    }
    return odd;
  };

  T acc[kTile][kTile] = {};
  const auto multiply = [&](int stage, auto any) {
    const T* const line_a = tiles + stage * (S::kArraysA + S::kArraysB) * S::kSize;
    const T* const line_b = line_a + S::kArraysA * S::kSize;
    [[maybe_unused]] constexpr int kUnroll = decltype(any)::value ? 1 : 4;
#pragma unroll kUnroll
    for (int k = 0; k < kDepth; ++k) {
      T first_a[kTile], second_a[kTile], first_b[kTile];
      load_line<T, kTile>(line_a + k * S::kPitch, down, first_a);
      load_line<T, kTile>(line_a + S::kSize + k * S::kPitch, down, second_a);
      load_line<T, kTile>(line_b + k * S::kPitch, across, first_b);
      if constexpr (kBody == Body::kPair) {
        T second_b[kTile];
        load_line<T, kTile>(line_b + S::kSize + k * S::kPitch, across, second_b);
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            // Where a product may overflow, it does so before it is added.
            if constexpr (decltype(any)::value)
              acc[i][j] += simd::fma(second_a[i], second_b[j], first_a[i] * first_b[j]);
            else
              acc[i][j] = simd::fma(second_a[i], second_b[j], simd::fma(first_a[i], first_b[j], acc[i][j]));
          }
      } else {
        [[maybe_unused]] Int row[kTile] = {};
        if constexpr (kBody == Body::kSegments) {
          T rows[kTile];
          load_line<T, kTile>(line_a + 2 * S::kSize + k * S::kPitch, down, rows);
#pragma unroll
          for (int i = 0; i < kTile; ++i) row[i] = bits<Int>(rows[i]);
        }
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const Int u = bits<Int>(first_b[j]);
            Int mantissa = bits<Int>(first_a[i]);
            if constexpr (kBody == Body::kSegments) mantissa += table[row[i] + ((u >> (B::kMantissa - 4)) & 15)];
            if constexpr (decltype(any)::value)
              acc[i][j] += any_term<T>(u, mantissa, second_a[i], -1);
            else
              acc[i][j] = log_step(u, mantissa, second_a[i], acc[i][j]);
          }
      }
    }
  };

  if (shape.depth != 0) {
    fetch(shape.depth);
    int odd = __syncthreads_or(split(0));
    int stage = 0;
    for (std::size_t left = shape.depth; left != 0; stage ^= 1) {
      left -= left < kDepth ? left : kDepth;
      const bool more = left != 0;
      // The next tile is on its way while this one is multiplied.
      if (more) fetch(left);
      if (odd)
        multiply(stage, std::true_type());
      else
        multiply(stage, std::false_type());
      // The other stage was read before the last barrier.
      if (more) odd = __syncthreads_or(split(stage ^ 1));
    }
  }

  char* const out = const_cast<char*>(matrix_of(shape.out, shape, index, item));
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const std::size_t row = row0 + position<kTile>(down, i);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const std::size_t col = col0 + position<kTile>(across, j);
      if (row >= shape.rows || col >= shape.cols) continue;
      const std::ptrdiff_t at =
          static_cast<std::ptrdiff_t>(row) * shape.out.row + static_cast<std::ptrdiff_t>(col) * shape.out.col;
      if constexpr (sizeof(T) == 8) {
        reinterpret_cast<double*>(out)[at] = acc[i][j];
      } else {
        if (shape.dtype == FASTOPS_F32)
          reinterpret_cast<float*>(out)[at] = acc[i][j];
        else
          reinterpret_cast<std::uint16_t*>(out)[at] =
              shape.dtype == FASTOPS_F16 ? half::to_f16(acc[i][j]) : half::to_bf16(acc[i][j]);
      }
    }
  }
}

// Look-ups.

constexpr int kLutTile = 64, kLutDepth = 32, kLutPitch = kLutTile + 4;

struct LutCall {
  gpu::Matmul shape;
  const void* table;
  std::size_t tiles_down, tiles_across;
};

// A thread sums 4 x 4 elements, whose steps are 16 reads of the table.
template <class Entry, class Out>
__global__ void __launch_bounds__(kThreads) lut_kernel(const __grid_constant__ LutCall call) {
  alignas(16) __shared__ std::uint8_t tile_a[kLutDepth * kLutPitch], tile_b[kLutDepth * kLutPitch];
  const gpu::Matmul& shape = call.shape;
  const Entry* const table = static_cast<const Entry*>(call.table);
  const std::size_t per_matrix = call.tiles_down * call.tiles_across;
  const std::size_t index = blockIdx.x / per_matrix, tile = blockIdx.x - index * per_matrix;
  const std::size_t row0 = tile / call.tiles_across * kLutTile, col0 = tile % call.tiles_across * kLutTile;
  const char* const a = matrix_of(shape.a, shape, index, 1);
  const char* const b = matrix_of(shape.b, shape, index, 1);
  const bool a_by_depth = shape.a.col == 1 || shape.a.row != 1, b_by_depth = shape.b.row == 1 && shape.b.col != 1;
  const int across = static_cast<int>(threadIdx.x) % kSide, down = static_cast<int>(threadIdx.x) / kSide;
  Out acc[4][4] = {};
  for (std::size_t depth0 = 0; depth0 < shape.depth; depth0 += kLutDepth) {
    const int steps = shape.depth - depth0 < kLutDepth ? static_cast<int>(shape.depth - depth0) : kLutDepth;
#pragma unroll
    for (int q = static_cast<int>(threadIdx.x); q < kLutTile * kLutDepth; q += kThreads) {
      const int step_a = a_by_depth ? q % kLutDepth : q / kLutTile, along_a = a_by_depth ? q / kLutDepth : q % kLutTile;
      const int step_b = b_by_depth ? q % kLutDepth : q / kLutTile, along_b = b_by_depth ? q / kLutDepth : q % kLutTile;
      const std::size_t row = row0 + along_a, col = col0 + along_b;
      const bool has_a = row < shape.rows && step_a < steps, has_b = col < shape.cols && step_b < steps;
      tile_a[step_a * kLutPitch + along_a] =
          has_a ? static_cast<std::uint8_t>(a[static_cast<std::ptrdiff_t>(row) * shape.a.row +
                                              static_cast<std::ptrdiff_t>(depth0 + step_a) * shape.a.col])
                : 0;
      tile_b[step_b * kLutPitch + along_b] =
          has_b ? static_cast<std::uint8_t>(b[static_cast<std::ptrdiff_t>(depth0 + step_b) * shape.b.row +
                                              static_cast<std::ptrdiff_t>(col) * shape.b.col])
                : 0;
    }
    __syncthreads();
    for (int k = 0; k < steps; ++k) {
      const auto x = load_vector<Vector<std::uint8_t, 4>>(tile_a + k * kLutPitch + down * 4);
      const auto y = load_vector<Vector<std::uint8_t, 4>>(tile_b + k * kLutPitch + across * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += static_cast<Out>(table[x.v[i] * 256 + y.v[j]]);
    }
    __syncthreads();
  }
  Out* const out = reinterpret_cast<Out*>(const_cast<char*>(matrix_of(shape.out, shape, index, sizeof(Out))));
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::size_t row = row0 + down * 4 + i, col = col0 + across * 4 + j;
      if (row < shape.rows && col < shape.cols)
        out[static_cast<std::ptrdiff_t>(row) * shape.out.row + static_cast<std::ptrdiff_t>(col) * shape.out.col] =
            acc[i][j];
    }
}

// Launches.

std::size_t batch_of(const gpu::Matmul& call) noexcept {
  std::size_t n = 1;
  for (const std::size_t length : call.batch) n *= length;
  return n;
}
std::size_t tiles_of(std::size_t n, std::size_t length) noexcept { return (n + length - 1) / length; }

template <class T, Body kBody, int kTile>
gpu::Status launch(MatmulCall<T>& call, std::size_t batch, gpu::Stream stream) noexcept {
  using S = Tile<T, kBody, kTile>;
  static_assert(S::kShared <= 48 * 1024, "more shared memory must be asked for");
  call.tiles_down = tiles_of(call.shape.rows, S::kLength);
  call.tiles_across = tiles_of(call.shape.cols, S::kLength);
  const auto kernel = matmul_kernel<T, kBody, kTile>;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>(batch * call.tiles_down * call.tiles_across), kThreads, S::kShared,
                 stream, call);
  return launched();
}

template <class T>
gpu::Status multiply(const fastops_mitchell* m, const gpu::Matmul& shape, gpu::Stream stream) noexcept {
  const std::size_t batch = batch_of(shape);
  if (batch == 0 || shape.rows == 0 || shape.cols == 0) return 0;
  MatmulCall<T> call{};
  call.shape = shape;
  Arithmetic<T>& arithmetic = call.arithmetic;
  arithmetic.pack_a = arithmetic.pack_b = Pack::kRaw;
  arithmetic.steps = 1;
  arithmetic.keep = -1;
  Body body = Body::kPair;
  if (m != nullptr) {
    const fastops_mitchell_params& params = m->params;
    const auto& k = [&]() -> const auto& {
      if constexpr (sizeof(T) == 4)
        return m->single[shape.dtype];
      else
        return m->wide;
    }();
    call.flush = params.flush != 0;
    arithmetic.keep = k.mantissa_mask | ~Bits<T>::kFraction;
    arithmetic.c = k.c;
    arithmetic.corrections = params.corrections;
    if (params.form == FASTOPS_FORM_LOG) {
      body = params.segments != 0 ? Body::kSegments : Body::kLog;
      for (int i = 0; i < 256 && params.segments != 0; ++i) {
        const int repeat = 16 / params.segments;
        arithmetic.table[i] = k.table[i / 16 / repeat * params.segments + i % 16 / repeat];
      }
    } else {
      arithmetic.pack_a = arithmetic.pack_b = params.form == FASTOPS_FORM_EQUATION ? Pack::kEquation : Pack::kIterative;
      arithmetic.steps = 2;
    }
  }
  if constexpr (sizeof(T) == 8) {
    if (body == Body::kLog) return launch<T, Body::kLog, 4>(call, batch, stream);
    if (body == Body::kSegments) return launch<T, Body::kSegments, 4>(call, batch, stream);
    return launch<T, Body::kPair, 4>(call, batch, stream);
  } else {
    // Large tiles where there are enough of them to occupy a large GPU.
    constexpr std::size_t kEnough = 128;
    if (body == Body::kSegments) return launch<T, Body::kSegments, 4>(call, batch, stream);
    if (body == Body::kPair) return launch<T, Body::kPair, 4>(call, batch, stream);
    if (batch * tiles_of(shape.rows, 128) * tiles_of(shape.cols, 128) >= kEnough)
      return launch<T, Body::kLog, 8>(call, batch, stream);
    return launch<T, Body::kLog, 4>(call, batch, stream);
  }
}

template <class Entry, class Out> gpu::Status look_up(const LutCall& call, gpu::Stream stream) noexcept {
  const auto kernel = lut_kernel<Entry, Out>;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>(batch_of(call.shape) * call.tiles_down * call.tiles_across), kThreads, 0,
                 stream, call);
  return launched();
}

}  // namespace
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

Status mitchell_matmul(const fastops_mitchell* m, const Matmul& call, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  return call.dtype == FASTOPS_F64 ? level::multiply<double>(m, call, stream) : level::multiply<float>(m, call, stream);
}

Status lut_matmul(const Matmul& shape, const void* table, bool wide_table, bool wide_out, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::LutCall call{shape, table, level::tiles_of(shape.rows, level::kLutTile),
                            level::tiles_of(shape.cols, level::kLutTile)};
  if (level::batch_of(shape) == 0 || shape.rows == 0 || shape.cols == 0) return 0;
  if (wide_table) return level::look_up<std::int64_t, std::int64_t>(call, stream);
  return wide_out ? level::look_up<std::int32_t, std::int64_t>(call, stream)
                  : level::look_up<std::int32_t, std::int32_t>(call, stream);
}

}  // namespace fastops::gpu
