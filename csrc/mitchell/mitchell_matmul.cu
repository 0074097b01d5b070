// SPDX-License-Identifier: BSD-3-Clause
// Matrix products on a GPU of strided operands, under a multiplier and by look-ups.
#include "mitchell/mitchell_tile.h"

namespace fastops::FASTOPS_LEVEL {
namespace products_kernels {

using namespace matmul;

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

template <class T, Body kBody, int kTile>
__global__ void __launch_bounds__(kThreads, 2) matmul_kernel(const __grid_constant__ MatmulCall<T> call) {
  using S = Tile<T, kBody, kTile>;
  FASTOPS_DYNAMIC_SHARED(shared);
  const gpu::Matmul& shape = call.shape;
  const std::size_t item = sizeof(T) == 8 ? 8 : shape.dtype == FASTOPS_F32 ? 4 : 2;
  const std::size_t per_matrix = call.tiles_down * call.tiles_across;
  const std::size_t index = blockIdx.x / per_matrix, tile = blockIdx.x - index * per_matrix;
  const std::size_t row0 = tile / call.tiles_across * S::kLength, col0 = tile % call.tiles_across * S::kLength;
  const char* const a = matrix_of(shape.a, shape, index, item);
  const char* const b = matrix_of(shape.b, shape, index, item);
  const bool a_by_depth = shape.a.col == 1 || shape.a.row != 1, b_by_depth = shape.b.row == 1 && shape.b.col != 1;

  TileProduct<T, kBody, kTile> product(call.arithmetic, shared);
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
    bool odd = false;
#pragma unroll
    for (int e = 0; e < S::kLoads; ++e) {
      odd = product.put_a(stage, move_a.shared + e * move_a.shared_next, from_a[e]) || odd;
      odd = product.put_b(stage, move_b.shared + e * move_b.shared_next, from_b[e]) || odd;
    }
    return odd;
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
      product.multiply(stage, odd != 0);
      // The other stage was read before the last barrier.
      if (more) odd = __syncthreads_or(split(stage ^ 1));
    }
  }

  char* const out = const_cast<char*>(matrix_of(shape.out, shape, index, item));
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const std::size_t row = row0 + position<kTile>(product.down, i);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const std::size_t col = col0 + position<kTile>(product.across, j);
      if (row >= shape.rows || col >= shape.cols) continue;
      const std::ptrdiff_t at =
          static_cast<std::ptrdiff_t>(row) * shape.out.row + static_cast<std::ptrdiff_t>(col) * shape.out.col;
      write<T>(out, at, shape.dtype, product.acc[i][j]);
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

bool fits_grid(std::size_t batch, std::size_t down, std::size_t across) noexcept {
  return down <= gpu::kMostBlocks && across <= gpu::kMostBlocks / down && batch <= gpu::kMostBlocks / (down * across);
}

template <class T, Body kBody, int kTile>
gpu::Status launch(MatmulCall<T>& call, std::size_t batch, gpu::Stream stream) noexcept {
  using S = Tile<T, kBody, kTile>;
  static_assert(S::kShared <= 48 * 1024, "more shared memory must be asked for");
  call.tiles_down = tiles_of(call.shape.rows, S::kLength);
  call.tiles_across = tiles_of(call.shape.cols, S::kLength);
  if (!fits_grid(batch, call.tiles_down, call.tiles_across)) return gpu::kTooLarge;
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
  call.flush = m != nullptr && m->params.flush != 0;
  const Body body = set_arithmetic<T>(m, shape.dtype, gpu::Terms::kProducts, false, &call.arithmetic);
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
  const std::size_t batch = batch_of(call.shape);
  if (!fits_grid(batch, call.tiles_down, call.tiles_across)) return gpu::kTooLarge;
  const auto kernel = lut_kernel<Entry, Out>;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>(batch * call.tiles_down * call.tiles_across), kThreads, 0, stream, call);
  return launched();
}

}  // namespace products_kernels
using namespace products_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

Status mitchell_matmul(const fastops_mitchell* m, const Matmul& call, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  return call.dtype == FASTOPS_F64 ? level::multiply<double>(m, call, stream) : level::multiply<float>(m, call, stream);
}

Status lut_matmul(const Matmul& shape, const void* table, bool wide_table, bool wide_out, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::LutCall call{shape, table, level::matmul::tiles_of(shape.rows, level::kLutTile),
                            level::matmul::tiles_of(shape.cols, level::kLutTile)};
  if (level::matmul::batch_of(shape) == 0 || shape.rows == 0 || shape.cols == 0) return 0;
  if (wide_table) return level::look_up<std::int64_t, std::int64_t>(call, stream);
  return wide_out ? level::look_up<std::int32_t, std::int64_t>(call, stream)
                  : level::look_up<std::int32_t, std::int32_t>(call, stream);
}

}  // namespace fastops::gpu
