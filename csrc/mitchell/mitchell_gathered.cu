// SPDX-License-Identifier: BSD-3-Clause
// Convolutions, and the gradients of matrix products and convolutions, on a GPU: one matrix product whose operands are
// gathered from where they lie, so that no patches are written to memory.
#include "mitchell/mitchell_depthwise.h"
#include "mitchell/mitchell_tile.h"

namespace fastops::FASTOPS_LEVEL {
namespace gathered_kernels {

using namespace matmul;

// Where the step along one index leads. Beyond an index there is no pixel.
struct Place {
  std::ptrdiff_t offset;
  std::int32_t y, x;
};
constexpr std::int32_t kNowhere = -(std::int32_t{1} << 30);
static_assert(gpu::kMostPixels <= -(kNowhere / 2));
// Steps of depth whose places are in shared memory at once.
constexpr int kSteps = kThreads / 2;

template <class T> struct GatheredCall {
  gpu::GatheredMatmul shape;
  std::size_t rows, cols, depth, tiles_down, tiles_across;
  std::size_t splits, part;  // parts of the depth, and steps of one
  T* parts;                  // [part][matrix][row][column] where there are several
  Arithmetic<T> arithmetic;
};

static_assert(sizeof(GatheredCall<double>) <= 4096, "the parameters of a kernel");

template <class Int>
FASTOPS_DEVICE void walk_along(const gpu::Index& index, const gpu::Walk& walk, Int at, Place* place) {
  for (int d = index.axes - 1; d >= 0; --d) {
    const Int length = static_cast<Int>(index.length[d]), above = d == 0 ? 0 : at / length;
    const auto i = static_cast<std::ptrdiff_t>(at - above * length);
    place->offset += i * walk.stride[d];
    place->y += static_cast<std::int32_t>(i) * walk.y[d];
    place->x += static_cast<std::int32_t>(i) * walk.x[d];
    at = above;
  }
}
// Short divisions where they do. Called from many places: not inlined.
FASTOPS_DEVICE_CALL Place place_of(const gpu::Index& index, const gpu::Walk& walk, std::size_t at, std::size_t end,
                                   Place start) {
  if (at >= end) return {0, kNowhere, kNowhere};
  if (end <= 0xffffffffu)
    walk_along<std::uint32_t>(index, walk, static_cast<std::uint32_t>(at), &start);
  else
    walk_along<std::uint64_t>(index, walk, at, &start);
  return start;
}
FASTOPS_DEVICE Place start_of(const gpu::Gathered& x) { return {x.offset, x.y, x.x}; }
FASTOPS_DEVICE bool is_there(const gpu::Gathered& x, const Place& row, const Place& col) {
  return static_cast<std::uint32_t>(row.y + col.y) < static_cast<std::uint32_t>(x.height) &&
         static_cast<std::uint32_t>(row.x + col.x) < static_cast<std::uint32_t>(x.width);
}
FASTOPS_DEVICE const char* matrix_of(const gpu::Gathered& x, const gpu::GatheredMatmul& shape, std::size_t index,
                                     std::size_t item) {
  std::ptrdiff_t offset = 0;
  for (int d = gpu::kBatchDimensions - 1; d >= 0; --d) {
    const std::size_t above = index / shape.batch[d];
    offset += static_cast<std::ptrdiff_t>(index - above * shape.batch[d]) * x.batch[d];
    index = above;
  }
  return static_cast<const char*>(x.data) + offset * static_cast<std::ptrdiff_t>(item);
}

// Elements of a stage that a thread fetches, as Mover's.
template <int kLength> struct Fetcher {
  static constexpr int kLoads = kLength * kDepth / kThreads;
  int along, along_next, step, step_next;

  FASTOPS_DEVICE explicit Fetcher(bool steps_lie_together) {
    const int t = static_cast<int>(threadIdx.x);
    along = steps_lie_together ? t / kDepth : t % kLength;
    along_next = steps_lie_together ? kThreads / kDepth : 0;
    step = steps_lie_together ? t % kDepth : t / kLength;
    step_next = steps_lie_together ? 0 : kThreads / kLength;
  }
  FASTOPS_DEVICE int at(int e, int pitch) const { return (step + e * step_next) * pitch + along + e * along_next; }
  // Which of them are there, a bit each; zeros for the others.
  template <class T>
  FASTOPS_DEVICE unsigned fetch(const gpu::Gathered& x, const char* matrix, fastops_dtype dtype, const Place* along_at,
                                const Place* step_at, T (&to)[kLoads]) const {
    unsigned found = 0;
#pragma unroll
    for (int e = 0; e < kLoads; ++e) {
      const Place p = along_at[along + e * along_next], q = step_at[step + e * step_next];
      const bool there = is_there(x, p, q);
      to[e] = there ? read<T>(matrix, p.offset + q.offset, dtype, x.flush) : T{};
      found |= there ? 1u << e : 0u;
    }
    return found;
  }
};

// Whether a walk's last axis leads less far than another's: whose elements lie together.
FASTOPS_DEVICE bool is_nearer(const gpu::Index& index, const gpu::Walk& walk, const gpu::Index& other_index,
                              const gpu::Walk& other) {
  const auto last = [](const gpu::Index& i, const gpu::Walk& w) {
    const std::ptrdiff_t s = i.axes == 0 ? 0 : w.stride[i.axes - 1];
    return s < 0 ? -s : s;
  };
  return last(index, walk) < last(other_index, other);
}

template <class T, Body kBody, int kTile> struct GatheredTile : Tile<T, kBody, kTile> {
  using Base = Tile<T, kBody, kTile>;
  static constexpr std::size_t kTiles = (Base::kShared + 15) / 16 * 16;
  static constexpr std::size_t kAll = kTiles + (2 * Base::kLength + 2 * kSteps) * sizeof(Place);
};

// Blocks a multiprocessor: slopes of doubles take the registers of two.
template <class T, Body kBody> constexpr int kBlocks = sizeof(T) == 8 && is_slope(kBody) ? 1 : 2;

template <class T, Body kBody, int kTile>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kBody>)
    gathered_kernel(const __grid_constant__ GatheredCall<T> call) {
  using S = GatheredTile<T, kBody, kTile>;
  constexpr int kLength = S::kLength;
  FASTOPS_DYNAMIC_SHARED(shared);
  Place* const rows = reinterpret_cast<Place*>(shared + S::kTiles);
  Place *const cols = rows + kLength, *const steps_a = cols + kLength, *const steps_b = steps_a + kSteps;
  const gpu::GatheredMatmul& shape = call.shape;
  const int t = static_cast<int>(threadIdx.x);
  const std::size_t item = sizeof(T) == 8 ? 8 : shape.dtype == FASTOPS_F32 ? 4 : 2;
  const std::size_t split = blockIdx.x % call.splits, rest = blockIdx.x / call.splits;
  const std::size_t per_matrix = call.tiles_down * call.tiles_across;
  const std::size_t index = rest / per_matrix, tile = rest - index * per_matrix;
  const std::size_t row0 = tile / call.tiles_across * kLength, col0 = tile % call.tiles_across * kLength;
  const std::size_t first = split * call.part;
  const std::size_t last = first + call.part < call.depth ? first + call.part : call.depth;
  const char* const a = matrix_of(shape.a, shape, index, item);
  const char* const b = matrix_of(shape.b, shape, index, item);

  TileProduct<T, kBody, kTile> product(call.arithmetic, shared);
  // Every thread of the block calls.
  const auto set_places = [&](const gpu::Gathered& down, const gpu::Gathered& across) {
    __syncthreads();
    for (int i = t; i < kLength; i += kThreads) {
      rows[i] = place_of(shape.rows, down.row, row0 + i, call.rows, start_of(down));
      // Of one array, its start counts once.
      cols[i] =
          place_of(shape.cols, across.col, col0 + i, call.cols, &down == &across ? Place{0, 0, 0} : start_of(across));
    }
    __syncthreads();
  };

  // Where there is a point, a nan in it is the result, if that has any term.
  unsigned poisoned = 0;
  if (shape.point.data != nullptr) {
    if constexpr (kTile == 4) {
      set_places(shape.point, shape.point);
      const char* const point = matrix_of(shape.point, shape, index, item);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          const Place p = rows[position<kTile>(product.down, i)], q = cols[position<kTile>(product.across, j)];
          T x{};
          if (is_there(shape.point, p, q)) x = read<T>(point, p.offset + q.offset, shape.dtype, shape.point.flush);
          if constexpr (is_slope(kBody)) product.set_point(i, j, x);
          poisoned |= x == x ? 0u : 1u << (i * kTile + j);
        }
      for (int bit = 0; shape.taps != 0 && poisoned >> bit != 0; ++bit) {
        if ((poisoned >> bit & 1) == 0) continue;
        const std::size_t col = col0 + position<kTile>(product.across, bit % kTile);
        const Place at = place_of(shape.cols, shape.b.col, col, call.cols, start_of(shape.b));
        bool has_term = false;
        for (std::size_t k = 0; k < shape.taps && k < call.depth && !has_term; ++k)
          has_term = is_there(shape.b, place_of(shape.depth, shape.b.row, k, call.depth, {0, 0, 0}), at);
        if (!has_term) poisoned &= ~(1u << bit);
      }
      if (call.depth == 0) poisoned = 0;
    }
  }

  const bool a_by_depth = is_nearer(shape.depth, shape.a.col, shape.rows, shape.a.row);
  const bool b_by_depth = is_nearer(shape.depth, shape.b.row, shape.cols, shape.b.col);
  const Fetcher<kLength> fetch_a(a_by_depth), fetch_b(b_by_depth);
  T from_a[S::kLoads], from_b[S::kLoads];
  unsigned there = 0;
  const auto fetch = [&](std::size_t at) {
    const int step = static_cast<int>((at - first) % kSteps);
    if (step == 0) {
      // The places before were read before the last barrier.
      const bool of_a = t < kSteps;
      const std::size_t k = at + static_cast<std::size_t>(t % kSteps);
      (of_a ? steps_a : steps_b)[t % kSteps] =
          place_of(shape.depth, of_a ? shape.a.col : shape.b.row, k, last, {0, 0, 0});
      __syncthreads();
    }
    fetch_a.fetch(shape.a, a, shape.dtype, rows, steps_a + step, from_a);
    there = fetch_b.fetch(shape.b, b, shape.dtype, cols, steps_b + step, from_b);
  };
  const auto put = [&](int stage) {
    bool odd = false;
#pragma unroll
    for (int e = 0; e < S::kLoads; ++e) {
      odd = product.put_a(stage, fetch_a.at(e, S::kPitch), from_a[e]) || odd;
      odd = product.put_b(stage, fetch_b.at(e, S::kPitch), from_b[e], (there >> e & 1) != 0) || odd;
    }
    return odd;
  };

  if (first < last) {
    set_places(shape.a, shape.b);
    fetch(first);
    int odd = __syncthreads_or(put(0));
    int stage = 0;
    for (std::size_t at = first + kDepth;; at += kDepth, stage ^= 1) {
      const bool more = at < last;
      // The next tile is on its way while this one is multiplied.
      if (more) fetch(at);
      product.multiply(stage, odd != 0);
      if (!more) break;
      // The other stage was read before the last barrier.
      odd = __syncthreads_or(put(stage ^ 1));
    }
    product.finish();
  }

  set_places(shape.out, shape.out);
  char* const out = const_cast<char*>(matrix_of(shape.out, shape, index, item));
  const std::size_t matrix = split * batch_of(shape) + index;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int down = position<kTile>(product.down, i);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int across = position<kTile>(product.across, j);
      if (row0 + down >= call.rows || col0 + across >= call.cols) continue;
      T x = product.acc[i][j];
      if (kTile == 4 && (poisoned >> (i * kTile + j) & 1) != 0) x = bits<T>(Bits<T>::kInfinity | Bits<T>::kFraction);
      if (call.splits == 1)
        write<T>(out, rows[down].offset + cols[across].offset, shape.dtype, x);
      else
        call.parts[(matrix * call.rows + row0 + down) * call.cols + col0 + across] = x;
    }
  }
}

// The parts of each sum, in order.
template <class T> __global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ GatheredCall<T> call) {
  const gpu::GatheredMatmul& shape = call.shape;
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x, batch = batch_of(shape);
  const std::size_t size = batch * call.rows * call.cols;
  if (i >= size) return;
  T sum{};
  for (std::size_t part = 0; part < call.splits; ++part) sum += call.parts[part * size + i];
  const std::size_t line = i / call.cols, index = line / call.rows;
  const Place row = place_of(shape.rows, shape.out.row, line % call.rows, call.rows, start_of(shape.out));
  const Place col = place_of(shape.cols, shape.out.col, i % call.cols, call.cols, {0, 0, 0});
  const std::size_t item = sizeof(T) == 8 ? 8 : shape.dtype == FASTOPS_F32 ? 4 : 2;
  write<T>(const_cast<char*>(matrix_of(shape.out, shape, index, item)), row.offset + col.offset, shape.dtype, sum);
}

template <class S> __global__ void __launch_bounds__(kThreads) clear_kernel(S* p, std::size_t n) {
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) p[i] = S{};
}

// Launches.

std::size_t size_of(const gpu::Index& index) noexcept {
  std::size_t n = 1;
  for (int d = 0; d < index.axes; ++d) n *= index.length[d];
  return n;
}
// Blocks that occupy a large GPU, and steps of depth that are worth one.
constexpr std::size_t kEnough = 256, kWorthwhile = 256;
constexpr std::size_t kSmallTile = kSide * 4;

struct Cut {
  std::size_t splits, part;
};
// The depth in parts where there are few tiles.
Cut cut_of(const gpu::GatheredMatmul& shape) noexcept {
  const std::size_t depth = size_of(shape.depth);
  const std::size_t blocks =
      batch_of(shape) * tiles_of(size_of(shape.rows), kSmallTile) * tiles_of(size_of(shape.cols), kSmallTile);
  std::size_t splits = blocks == 0 || blocks >= kEnough ? 1 : kEnough / blocks;
  if (splits > depth / kWorthwhile) splits = depth < kWorthwhile ? 1 : depth / kWorthwhile;
  const std::size_t part = (depth + splits - 1) / splits;
  return {part == 0 ? 1 : (depth + part - 1) / part, part};
}

template <class T> GatheredCall<T> call_of(const gpu::GatheredMatmul& shape, void* workspace) noexcept {
  GatheredCall<T> call{};
  call.shape = shape;
  call.rows = size_of(shape.rows);
  call.cols = size_of(shape.cols);
  call.depth = size_of(shape.depth);
  call.parts = static_cast<T*>(workspace);
  return call;
}
template <class T> gpu::Status add(const GatheredCall<T>& call, gpu::Stream stream) noexcept {
  const auto kernel = add_parts<T>;
  const std::size_t size = batch_of(call.shape) * call.rows * call.cols;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0, stream, call);
  return launched();
}

template <class T, Body kBody, int kTile>
gpu::Status launch(GatheredCall<T>& call, const Cut& cut, gpu::Stream stream) noexcept {
  using S = GatheredTile<T, kBody, kTile>;
  static_assert(S::kAll <= 48 * 1024, "more shared memory must be asked for");
  call.tiles_down = tiles_of(call.rows, S::kLength);
  call.tiles_across = tiles_of(call.cols, S::kLength);
  call.splits = cut.splits;
  call.part = cut.part;
  const std::size_t batch = batch_of(call.shape), blocks = batch * call.tiles_down * call.tiles_across * call.splits;
  if (blocks > gpu::kMostBlocks) return gpu::kTooLarge;
  const auto kernel = gathered_kernel<T, kBody, kTile>;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, S::kAll, stream, call);
  const gpu::Status status = launched();
  return status != 0 || call.splits == 1 ? status : add(call, stream);
}

template <class T>
gpu::Status multiply(const fastops_mitchell* m, const gpu::GatheredMatmul& shape, void* workspace,
                     gpu::Stream stream) noexcept {
  GatheredCall<T> call = call_of<T>(shape, workspace);
  const std::size_t batch = batch_of(shape);
  if (batch == 0 || call.rows == 0 || call.cols == 0) return 0;
  const Body body = set_arithmetic<T>(m, shape.dtype, shape.terms, shape.transposed, &call.arithmetic);
  call.arithmetic.skips = shape.skips;
  // Exact products have no point.
  if (shape.terms != gpu::Terms::kSlopes) call.shape.point.data = nullptr;
  const Cut cut = cut_of(shape);
  switch (body) {
    case Body::kPair:
      return launch<T, Body::kPair, 4>(call, cut, stream);
    case Body::kSegments:
      return launch<T, Body::kSegments, 4>(call, cut, stream);
    case Body::kSlope:
      return launch<T, Body::kSlope, 4>(call, cut, stream);
    case Body::kSlopeSegments:
      return launch<T, Body::kSlopeSegments, 4>(call, cut, stream);
    default:
      if constexpr (sizeof(T) == 4)
        if (batch * tiles_of(call.rows, 128) * tiles_of(call.cols, 128) >= kEnough / 2)
          return launch<T, Body::kLog, 8>(call, {1, call.depth}, stream);
      return launch<T, Body::kLog, 4>(call, cut, stream);
  }
}

}  // namespace gathered_kernels
using namespace gathered_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

std::size_t mitchell_gathered_workspace(const GatheredMatmul& call) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  if (call.results != Results::kMatrix) return mitchell_depthwise_workspace(call);
  const std::size_t splits = level::cut_of(call).splits;
  if (splits == 1) return 0;
  return splits * level::matmul::batch_of(call) * level::size_of(call.rows) * level::size_of(call.cols) *
         (call.dtype == FASTOPS_F64 ? 8 : 4);
}

Status mitchell_gathered(const fastops_mitchell* m, const GatheredMatmul& call, void* workspace,
                         Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  if (call.results != Results::kMatrix) return mitchell_depthwise(m, call, workspace, stream);
  return call.dtype == FASTOPS_F64 ? level::multiply<double>(m, call, workspace, stream)
                                   : level::multiply<float>(m, call, workspace, stream);
}

Status mitchell_add_parts(const GatheredMatmul& call, void* parts, std::size_t splits, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const auto add = [&](auto made) {
    made.splits = splits;
    return level::add(made, stream);
  };
  return call.dtype == FASTOPS_F64 ? add(level::call_of<double>(call, parts)) : add(level::call_of<float>(call, parts));
}

Status clear(void* p, std::size_t bytes, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  if (bytes == 0) return 0;
  const auto launch = [&](auto item) {
    using S = decltype(item);
    const std::size_t n = bytes / sizeof(S);
    const auto kernel = level::clear_kernel<S>;
    FASTOPS_LAUNCH(kernel, static_cast<unsigned>((n + level::matmul::kThreads - 1) / level::matmul::kThreads),
                   level::matmul::kThreads, 0, stream, static_cast<S*>(p), n);
  };
  if (bytes % 4 == 0)
    launch(std::uint32_t{});
  else
    launch(std::uint16_t{});
  return level::launched();
}

}  // namespace fastops::gpu
