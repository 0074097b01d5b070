// SPDX-License-Identifier: BSD-3-Clause
// Nystrom attention on a GPU: P1 = softmax(s Q Kt^T), A = softmax(s Qt Kt^T), B = softmax(s Qt K^T) V, out = P1 Z B,
// where Z stands for the inverse of A (Xiong et al. 2021) and Qt, Kt are means of segments. Rows attend to others in
// tiles with running maxima in three places: landmarks to keys, in parts that are added up, queries to landmarks, and,
// where there are as few rows as landmarks, queries to keys. Between landmarks there are products of small matrices.
#include <initializer_list>
#include <type_traits>

#include "attention/attention_blocks.h"
#include "attention/attention_math.h"
#include "cuda/device.h"

namespace fastops::FASTOPS_LEVEL {
namespace nystrom_kernels {

using namespace attention;

constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = ~0u;
// More steps than this need double for the matrices between landmarks.
constexpr std::size_t kSinglePrecisionSteps = 8;
constexpr float kLowest = -__builtin_huge_valf();

// Floats on tensor cores as sums of two numbers of TF32, the second of what the first leaves. Elements of the arrays
// need but one: those of float16 and bfloat16 are one, and those of float32, where TF32 is asked for, are rounded as
// they are read, which moves whole rows and columns of logits as other elements would. What is rounded number by
// number, as weights would be, is amplified by Z.
template <bool kSplitA, bool kSplitB> struct BySplitTf32 : ByFloats {
  static FASTOPS_DEVICE float rest(float x, float high) {
    const float low = x - high;
    return low == low ? to_tf32(low) : 0.0f;  // of infinity
  }
  template <bool kTurnedA, bool kTurnedB>
  static FASTOPS_DEVICE void product(Sums& d, const S* a, const S* b, int depth, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += 8) {
      const int k = k0 + t;
      float high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = at<kTurnedA>(a, g + i % 2 * 8, k + i / 2 * 4);
        high[i] = to_tf32(x);
        low[i] = kSplitA ? rest(x, high[i]) : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n * 8 >= columns) continue;
        const float x = at<kTurnedB>(b, n * 8 + g, k), y = at<kTurnedB>(b, n * 8 + g, k + 4);
        const float first[2] = {to_tf32(x), to_tf32(y)};
        if (kSplitB) {
          const float second[2] = {rest(x, first[0]), rest(y, first[1])};
          multiply_tile_tf32(d[n], high, second);
        }
        if (kSplitA) multiply_tile_tf32(d[n], low, first);
        multiply_tile_tf32(d[n], high, first);
      }
    }
  }
};
struct OnTensorCores {
  template <bool kSplitA, bool kSplitB> using Product = BySplitTf32<kSplitA, kSplitB>;
};
struct InFloats {
  template <bool, bool> using Product = ByFp32;
};

// What the kernels of a call share. Arrays of heads are C order: (batch, heads, rows, numbers).
struct Norms {
  double column, row;  // the largest sums of a matrix, which has no negative elements, and the first that are
  int column_at, row_at;
};
struct Call {
  gpu::NystromAttention of;
  std::int64_t heads_q, heads_kv;  // of all samples
  int group, landmarks, columns;   // query heads of a key head; columns of W and B, u beside them, in memory
  bool is_wide;                    // the matrices between landmarks are of double
  bool may_be_exact, masks_queries, with_sums;
  // With a mask: the keys that count before each, those that count in turn, and how many.
  std::int32_t *ranks, *numbers, *counts;
  float *q_means, *k_means;  // (heads, landmarks, dim)
  Norms* norms;
  double* starts;  // the coefficient of each matrix
  // Parts of softmax(s Qt K^T) V: the largest logit, the sum of exponentials and that of values; then those of all.
  int parts, tiles_of_part;
  float *part_tops, *part_sums, *part_values;
  float *key_tops, *key_sums;
  void *a, *b, *w;
  float* weights;  // sums of the weights of each query, for information

  // Of the gradient. Of each query's weights: the largest logit, 1 / sum, and the sum of weights times their gradients;
  // with `normalize` also what dy is multiplied by, and the gradient of the sum of weights.
  float *tops, *inverses, *dots, *factors, *more;
  float *key_inverses, *key_dots;  // of each landmark's weights of keys
  void *dw, *db, *da;
  float *dq_means, *dk_means;                  // (heads, landmarks, dim)
  float *dq_means_between, *dk_means_between;  // what comes by way of A, both of query heads
  bool of_means;                               // whether landmarks have gradients
  struct Parted {
    int parts, tiles;
    float* sums;                     // (heads, parts, landmarks, numbers)
  } of_keys, of_columns, of_values;  // sums over keys for Qt, over queries for Kt and for W
};

FASTOPS_DEVICE bool counts_queries(const Call& call) { return call.counts != nullptr && call.masks_queries; }
FASTOPS_DEVICE int count_of(const Call& call, std::int64_t batch, bool of_queries) {
  if (of_queries ? counts_queries(call) : call.counts != nullptr) return call.counts[batch];
  return static_cast<int>(of_queries ? call.of.queries : call.of.keys);
}
// Where landmarks do not stand for the sample, since there are no more rows than these.
FASTOPS_DEVICE bool is_exact(const Call& call, std::int64_t batch) {
  return call.may_be_exact &&
         (count_of(call, batch, true) <= call.landmarks || count_of(call, batch, false) <= call.landmarks);
}
FASTOPS_DEVICE const std::uint8_t* mask_of(const Call& call, std::int64_t batch) {
  if (call.of.mask.data == nullptr) return nullptr;
  return reinterpret_cast<const std::uint8_t*>(head_of(call.of.batch, call.of.mask, 1, batch, 0, 0));
}
FASTOPS_DEVICE bool is_seen(const Call& call, const std::uint8_t* mask, int i) {
  return mask == nullptr || mask[i * call.of.mask.row] != 0;
}

// Balanced segments of n rows: the first m - n mod m have n / m, the others one more.
struct Segment {
  int first, length;
};
FASTOPS_DEVICE Segment segment_of(int n, int m, int i) {
  const int length = n / m, shorter = m - n % m;
  return {i * length + (i > shorter ? i - shorter : 0), length + (i >= shorter ? 1 : 0)};
}

// A block for each sample: which keys count.
__global__ void __launch_bounds__(kThreads) ranks_kernel(const __grid_constant__ Call call) {
  __shared__ int before[kThreads + 1];
  const std::int64_t batch = blockIdx.x;
  const std::uint8_t* const mask = mask_of(call, batch);
  const auto keys = static_cast<int>(call.of.keys), t = static_cast<int>(threadIdx.x);
  const int own = (keys + kThreads - 1) / kThreads;
  const int first = smaller(t * own, keys), last = smaller(first + own, keys);
  int count = 0;
  for (int i = first; i < last; ++i) count += is_seen(call, mask, i);
  before[t + 1] = count;
  __syncthreads();
  if (t == 0) {
    before[0] = 0;
    for (int i = 1; i <= kThreads; ++i) before[i] += before[i - 1];
    call.counts[batch] = before[kThreads];
  }
  __syncthreads();
  int rank = before[t];
  for (int i = first; i < last; ++i) {
    call.ranks[batch * keys + i] = rank;
    if (is_seen(call, mask, i)) call.numbers[batch * keys + rank++] = i;
  }
}

// A block for each landmark: the mean of its segment, or the given row.
__global__ void __launch_bounds__(kThreads) means_kernel(const __grid_constant__ Call call, bool of_queries) {
  __shared__ float other[kTile];
  const gpu::NystromAttention& of = call.of;
  const auto m = static_cast<unsigned>(call.landmarks);
  const auto dim = static_cast<int>(of.dim), t = static_cast<int>(threadIdx.x);
  const auto i = static_cast<int>(blockIdx.x % m);
  const std::int64_t index = blockIdx.x / m, heads = static_cast<std::int64_t>(of_queries ? of.heads_q : of.heads_kv);
  const std::int64_t batch = index / heads, head = index - batch * heads;
  const std::ptrdiff_t row = (index * call.landmarks + i) * dim;
  float* const to = (of_queries ? call.q_means : call.k_means) + row;
  if (const void* const given = of_queries ? of.q_landmarks : of.k_landmarks; given != nullptr) {
    const fastops_dtype dtype = of_queries ? of.q_landmarks_dtype : of.k_landmarks_dtype;
    for (int d = t; d < dim; d += kThreads) to[d] = element_of(given, row + d, dtype);
    return;
  }
  if (is_exact(call, batch)) return;
  const gpu::Heads& x = of_queries ? of.q : of.k;
  const char* const data = head_of(of.batch, x, item_of(of.dtype), batch, head, 0);
  const Segment segment = segment_of(count_of(call, batch, of_queries), call.landmarks, i);
  const bool by_numbers = of_queries ? counts_queries(call) : call.counts != nullptr;
  const std::int32_t* const numbers = by_numbers ? call.numbers + batch * static_cast<std::int64_t>(of.keys) : nullptr;
  for (int d0 = 0; d0 < dim; d0 += kTile) {
    const int d = d0 + t % kTile;
    float sum = 0.0f;
    if (d < dim)
      for (int j = t / kTile; j < segment.length; j += kThreads / kTile) {
        const int at = segment.first + j;
        sum += element_of(data, (numbers == nullptr ? at : numbers[at]) * x.row + d * x.col, of.dtype);
      }
    if (t >= kTile) other[t - kTile] = sum;
    __syncthreads();
    if (t < kTile && d < dim) to[d] = (sum + other[t]) * (1.0f / static_cast<float>(segment.length));
    __syncthreads();
  }
}

// Matrices between landmarks.

// One for each query head, or for each key head.
struct Matrix {
  void* data;
  std::ptrdiff_t head;
  int row;
  bool is_double, is_turned, of_keys;
};
Matrix turned(Matrix x) noexcept {
  x.is_turned = !x.is_turned;
  return x;
}
// c = factor a b + kept d + diagonal I.
struct Product {
  Matrix c, a, b;
  int rows, cols, depth;
  double factor;
  Matrix d;
  double kept, diagonal;
};
constexpr int kMostProducts = 12;
struct Products {
  int count;
  Product list[kMostProducts];
};
template <class T> FASTOPS_DEVICE T* element_at(const Call& call, const Matrix& x, std::int64_t head, int i, int j) {
  const std::ptrdiff_t offset =
      (x.of_keys ? head / call.group : head) * x.head +
      (x.is_turned ? static_cast<std::ptrdiff_t>(j) * x.row + i : static_cast<std::ptrdiff_t>(i) * x.row + j);
  return static_cast<T*>(x.data) + offset;
}
template <class T> FASTOPS_DEVICE T read_at(const Call& call, const Matrix& x, std::int64_t head, int i, int j) {
  if (std::is_same_v<T, double> && !x.is_double) return static_cast<T>(*element_at<float>(call, x, head, i, j));
  return *element_at<T>(call, x, head, i, j);
}

// Several products in turn where each is of one tile: a block sees what it has written.
template <class T>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const __grid_constant__ Call call, const __grid_constant__ Products products) {
  constexpr int kDepth = 32, kRows = 8, kCols = 4, kAcross = kTile / kCols;
  __shared__ T a[kDepth][kTile + 1], b[kDepth][kTile + 1];
  const int across = (products.list[0].cols + kTile - 1) / kTile, down = (products.list[0].rows + kTile - 1) / kTile;
  const auto tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(across * down));
  const std::int64_t head = blockIdx.x / static_cast<unsigned>(across * down);
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const int r0 = tile / across * kTile, c0 = tile % across * kTile;
  const int t = static_cast<int>(threadIdx.x), down_t = t / kAcross, across_t = t % kAcross;
  for (int index = 0; index < products.count; ++index) {
    const Product& p = products.list[index];
    T sum[kRows][kCols] = {};
    for (int k0 = 0; k0 < p.depth; k0 += kDepth) {
      for (int i = t; i < kDepth * kTile; i += kThreads) {
        // Along the rows of memory.
        const int row = p.a.is_turned ? i % kTile : i / kDepth, step = p.a.is_turned ? i / kTile : i % kDepth;
        a[step][row] =
            r0 + row < p.rows && k0 + step < p.depth ? read_at<T>(call, p.a, head, r0 + row, k0 + step) : T(0);
        const int col = p.b.is_turned ? i / kDepth : i % kTile, deep = p.b.is_turned ? i % kDepth : i / kTile;
        b[deep][col] =
            c0 + col < p.cols && k0 + deep < p.depth ? read_at<T>(call, p.b, head, k0 + deep, c0 + col) : T(0);
      }
      __syncthreads();
      const int depth = smaller(kDepth, p.depth - k0);
#pragma unroll 2
      for (int k = 0; k < depth; ++k) {
        T right[kCols];
#pragma unroll
        for (int j = 0; j < kCols; ++j) right[j] = b[k][across_t + j * kAcross];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const T left = a[k][down_t + i * (kTile / kRows)];
#pragma unroll
          for (int j = 0; j < kCols; ++j) sum[i][j] = simd::fma(left, right[j], sum[i][j]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int row = r0 + down_t + i * (kTile / kRows), col = c0 + across_t + j * kAcross;
        if (row >= p.rows || col >= p.cols) continue;
        T value = static_cast<T>(p.factor) * sum[i][j];
        if (p.kept != 0.0) value = simd::fma(static_cast<T>(p.kept), read_at<T>(call, p.d, head, row, col), value);
        if (row == col) value += static_cast<T>(p.diagonal);
        if (std::is_same_v<T, double> && !p.c.is_double)
          *element_at<float>(call, p.c, head, row, col) = static_cast<float>(value);
        else
          *element_at<T>(call, p.c, head, row, col) = value;
      }
    __syncthreads();
  }
}

// A warp for each row of A: weights from logits.
template <class T> __global__ void __launch_bounds__(kThreads) softmax_kernel(const __grid_constant__ Call call) {
  const auto m = static_cast<std::int64_t>(call.landmarks);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= call.heads_q * m || is_exact(call, index / m / static_cast<std::int64_t>(call.of.heads_q))) return;
  T* const row = static_cast<T*>(call.a) + index * m;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  T top = static_cast<T>(kLowest);
  for (int j = lane; j < m; j += 32) top = row[j] > top ? row[j] : top;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, top, step);
    top = other > top ? other : top;
  }
  T sum = 0;
  for (int j = lane; j < m; j += 32) {
    const T e = exp_nonpositive(row[j] - top);
    row[j] = e;
    sum += e;
  }
  const T inverse = T(1) / sum_of_warp(sum);
  for (int j = lane; j < m; j += 32) row[j] *= inverse;
}

// A block for each A: its norms and the coefficient that they make.
struct Largest {
  double sum;
  int at;
};
// nan is larger than any number.
FASTOPS_DEVICE bool is_larger(const Largest& x, const Largest& than) {
  if (x.sum != x.sum || than.sum != than.sum) return than.sum == than.sum || (x.sum != x.sum && x.at < than.at);
  return x.sum > than.sum || (x.sum == than.sum && x.at < than.at);
}
template <class T> __global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ Call call) {
  __shared__ Largest columns[kThreads], rows[kWarps];
  const std::int64_t head = blockIdx.x;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const int m = call.landmarks, t = static_cast<int>(threadIdx.x), lane = t % 32, warp = t / 32;
  const T* const a = static_cast<const T*>(call.a) + head * m * m;
  Largest best{-1.0, 0};
  for (int j = t; j < m; j += kThreads) {
    T sum = 0;
    for (int i = 0; i < m; ++i) sum += a[static_cast<std::ptrdiff_t>(i) * m + j];
    const Largest here{static_cast<double>(sum), j};
    if (is_larger(here, best)) best = here;
  }
  columns[t] = best;
  best = {-1.0, 0};
  for (int i = warp; i < m; i += kWarps) {
    T sum = 0;
    for (int j = lane; j < m; j += 32) sum += a[static_cast<std::ptrdiff_t>(i) * m + j];
    const Largest here{static_cast<double>(sum_of_warp(sum)), i};
    if (is_larger(here, best)) best = here;
  }
  if (lane == 0) rows[warp] = best;
  __syncthreads();
  if (t != 0) return;
  for (int i = 0; i < kWarps; ++i)
    if (is_larger(rows[i], best)) best = rows[i];
  Largest column = columns[0];
  for (int i = 1; i < kThreads; ++i)
    if (is_larger(columns[i], column)) column = columns[i];
  call.norms[head] = {column.sum, best.sum, column.at, best.at};
  call.starts[head] = 1.0 / (column.sum * best.sum);
}
// One block: the coefficient of all matrices that are finite.
__global__ void __launch_bounds__(kThreads) batch_start_kernel(const __grid_constant__ Call call) {
  __shared__ double columns[kThreads], rows[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  double column = 0.0, row = 0.0;
  for (std::int64_t i = t; i < call.heads_q; i += kThreads) {
    if (is_exact(call, i / static_cast<std::int64_t>(call.of.heads_q))) continue;
    const Norms n = call.norms[i];
    if (n.column > column) column = n.column;
    if (n.row > row) row = n.row;
  }
  columns[t] = column;
  rows[t] = row;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) {
    if (columns[i] > column) column = columns[i];
    if (rows[i] > row) row = rows[i];
  }
  if (column * row > 0.0)
    for (std::int64_t i = t; i < call.heads_q; i += kThreads) call.starts[i] = 1.0 / (column * row);
}

// Elements of matrices of m x m, a thread each.
FASTOPS_DEVICE std::int64_t own_element() { return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
// The first Z: a multiple of A^T, or that itself.
template <class T>
__global__ void __launch_bounds__(kThreads) start_kernel(const __grid_constant__ Call call, void* z, bool is_plain) {
  const std::int64_t m = call.landmarks, i = own_element();
  if (i >= call.heads_q * m * m) return;
  const std::int64_t head = i / (m * m), row = i / m % m, col = i % m;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const T factor = is_plain ? T(1) : static_cast<T>(call.starts[head]);
  static_cast<T*>(z)[i] = factor * static_cast<const T*>(call.a)[(head * m + col) * m + row];
}

// A block for each matrix g of double: g + ridge |A|_1 |A|_inf I = U^T U, U in its place.
__global__ void __launch_bounds__(kThreads) factorize_kernel(const __grid_constant__ Call call, double* matrices) {
  const std::int64_t head = blockIdx.x;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const int m = call.landmarks, t = static_cast<int>(threadIdx.x), lane = t % 32, warp = t / 32;
  double* const g = matrices + head * m * m;
  const double added = call.of.ridge * call.norms[head].column * call.norms[head].row;
  for (int i = t; i < m; i += kThreads) g[static_cast<std::ptrdiff_t>(i) * (m + 1)] += added;
  for (int k = 0; k < m; ++k) {
    __syncthreads();
    double* const row = g + static_cast<std::ptrdiff_t>(k) * m;
    const double root = simd::sqrt(row[k]);
    __syncthreads();
    if (t == 0) row[k] = root;
    for (int j = k + 1 + t; j < m; j += kThreads) row[j] /= root;
    __syncthreads();
    for (int i = k + 1 + warp; i < m; i += kWarps) {
      double* const to = g + static_cast<std::ptrdiff_t>(i) * m;
      const double f = -row[i];
      for (int j = i + lane; j < m; j += 32) to[j] = simd::fma(f, row[j], to[j]);
    }
  }
}
// A thread for each column of `right`: (U^T U)^-1 of it in its place.
__global__ void __launch_bounds__(kThreads)
    solve_kernel(const __grid_constant__ Call call, const double* matrices, double* right, int cols, int pitch) {
  const std::int64_t blocks = (cols + kThreads - 1) / kThreads, head = blockIdx.x / blocks;
  const int m = call.landmarks, col = static_cast<int>(blockIdx.x % blocks) * kThreads + static_cast<int>(threadIdx.x);
  if (col >= cols || is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const double* const u = matrices + head * m * m;
  double* const x = right + head * m * pitch + col;
  for (int i = 0; i < m; ++i) {
    double sum = x[static_cast<std::ptrdiff_t>(i) * pitch];
    for (int k = 0; k < i; ++k)
      sum = simd::fma(-u[static_cast<std::ptrdiff_t>(k) * m + i], x[static_cast<std::ptrdiff_t>(k) * pitch], sum);
    x[static_cast<std::ptrdiff_t>(i) * pitch] = sum / u[static_cast<std::ptrdiff_t>(i) * (m + 1)];
  }
  for (int i = m; i-- > 0;) {
    double sum = x[static_cast<std::ptrdiff_t>(i) * pitch];
    for (int k = i + 1; k < m; ++k)
      sum = simd::fma(-u[static_cast<std::ptrdiff_t>(i) * m + k], x[static_cast<std::ptrdiff_t>(k) * pitch], sum);
    x[static_cast<std::ptrdiff_t>(i) * pitch] = sum / u[static_cast<std::ptrdiff_t>(i) * (m + 1)];
  }
}

// Rows that attend.

// Landmarks to keys, queries to landmarks, queries to keys.
enum class Pass { kKeys, kQueries, kExact };
enum Which { kOfRows, kOfColumns, kOfValues, kOfGradients, kSources };
// Rows that a block reads. In shared memory: all threads read the same.
struct Source {
  const char* data;
  std::ptrdiff_t row, col, mask_step;
  const std::uint8_t* mask;
  const float *factors, *more;  // of each row: what its numbers are multiplied by, and one number more
  int rows, columns;
  fastops_dtype dtype;
  bool packs, rounds;  // rounds: to TF32, which holds halves as they are
};
FASTOPS_DEVICE void set_array(Source* to, const Call& call, const gpu::Heads& x, std::int64_t batch, std::int64_t head,
                              std::size_t rows, std::size_t columns, bool is_masked) {
  *to = Source{};
  to->data = head_of(call.of.batch, x, item_of(call.of.dtype), batch, head, 0);
  to->row = x.row;
  to->col = x.col;
  to->mask = is_masked ? mask_of(call, batch) : nullptr;
  to->mask_step = call.of.mask.row;
  to->rows = static_cast<int>(rows);
  to->columns = static_cast<int>(columns);
  to->dtype = call.of.dtype;
  to->packs = x.packs;
  to->rounds = call.of.tf32;
}
FASTOPS_DEVICE void set_made(Source* to, const Call& call, const void* data, std::int64_t index, int pitch, int columns,
                             bool is_double) {
  *to = Source{};
  to->data = static_cast<const char*>(data) + index * call.landmarks * pitch * (is_double ? 8 : 4);
  to->row = pitch;
  to->col = 1;
  to->rows = call.landmarks;
  to->columns = columns;
  to->dtype = is_double ? FASTOPS_F64 : FASTOPS_F32;
  to->packs = !is_double && pitch % 4 == 0;
}
template <Pass kPass> FASTOPS_DEVICE void set_source(Source* to, const Call& call, Which which, std::int64_t index) {
  const gpu::NystromAttention& of = call.of;
  const auto heads = static_cast<std::int64_t>(of.heads_q);
  const std::int64_t batch = index / heads, head = index - batch * heads, head_k = head / call.group;
  const auto dim = static_cast<int>(of.dim);
  if (which == kOfRows) {
    if (kPass == Pass::kKeys)
      set_made(to, call, call.q_means, index, dim, dim, false);
    else
      set_array(to, call, of.q, batch, head, of.queries, of.dim, call.masks_queries);
  } else if (which == kOfColumns) {
    if (kPass == Pass::kQueries)
      set_made(to, call, call.k_means, index / call.group, dim, dim, false);
    else
      set_array(to, call, of.k, batch, head_k, of.keys, of.dim, true);
  } else if (which == kOfValues) {
    if (kPass == Pass::kQueries)
      set_made(to, call, call.w, index, call.columns, static_cast<int>(of.values) + of.normalize, call.is_wide);
    else
      set_array(to, call, of.v, batch, head_k, of.keys, of.values, true);
  } else if (kPass == Pass::kKeys) {
    set_made(to, call, call.db, index, call.columns, static_cast<int>(of.values), call.is_wide);
  } else {
    set_array(to, call, of.dy, batch, head, of.queries, of.values, call.masks_queries);
    if (kPass != Pass::kQueries || !of.normalize) return;
    to->factors = call.factors + index * static_cast<std::int64_t>(of.queries);
    to->more = call.more + index * static_cast<std::int64_t>(of.queries);
  }
}
FASTOPS_DEVICE bool lives(const Source& from, int row) {
  return row < from.rows && (from.mask == nullptr || from.mask[row * from.mask_step] != 0);
}
// Eight numbers that lie together.
FASTOPS_DEVICE void read_eight(const char* data, fastops_dtype dtype, float (&x)[8]) {
  if (dtype == FASTOPS_F32) {
    const auto v = load_vector<Vector<float, 4>>(data), w = load_vector<Vector<float, 4>>(data + 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < 4 ? v.v[i % 4] : w.v[i % 4];
  } else {
    const auto v = load_vector<Vector<std::uint16_t, 8>>(data);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = dtype == FASTOPS_BF16 ? half::from_bf16(v.v[i]) : half::from_f16(v.v[i]);
  }
}
// The rows from `first` and the columns from `column` on to shared memory, zeros where there are none.
FASTOPS_DEVICE void load_tile(float* to, const Source& from, int first, int column) {
  const int t = static_cast<int>(threadIdx.x), c = t % (kTile / 8) * 8, col = column + c;
#pragma unroll 2
  for (int row = t / (kTile / 8); row < kTile; row += kThreads * 8 / kTile) {
    const int i = first + row;
    float x[8] = {};
    if (lives(from, i)) {
      const std::ptrdiff_t at = i * from.row + col * from.col;
      if (from.packs && col + 8 <= from.columns) {
        read_eight(from.data + at * item_of(from.dtype), from.dtype, x);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (col + j < from.columns) x[j] = element_of(from.data, at + j * from.col, from.dtype);
      }
      if (from.rounds) {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = to_tf32(x[j]);
      }
      if (from.factors != nullptr) {
        const float factor = from.factors[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          x[j] *= factor;
          if (col + j == from.columns) x[j] = from.more[i];
        }
      }
    }
    Vector<float, 4> low, high;
#pragma unroll
    for (int j = 0; j < 4; ++j) low.v[j] = x[j], high.v[j] = x[4 + j];
    store_vector(to + row * ByFloats::kPitch + c, low);
    store_vector(to + row * ByFloats::kPitch + c + 4, high);
  }
}

// Whose numbers the types of halves hold exactly.
template <Pass kPass> constexpr bool kMadeRows = kPass == Pass::kKeys;
template <Pass kPass> constexpr bool kMadeColumns = kPass == Pass::kQueries;
template <class A, Pass kPass> using ByLogits = typename A::template Product<kMadeRows<kPass>, kMadeColumns<kPass>>;
template <class A, Pass kPass> using ByWeights = typename A::template Product<true, kMadeColumns<kPass>>;

// A tile of logits: the rows from `r0` and the columns from `c0` on, by all threads; x and y are free afterwards.
template <class P>
FASTOPS_DEVICE void take_logits(Sums& s, float* x, float* y, const Source& rows, const Source& columns, int r0,
                                int c0) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int d = 0; d < rows.columns; d += kTile) {
    load_tile(x, rows, r0, d);
    load_tile(y, columns, c0, d);
    __syncthreads();
    if (r0 + warp * 16 < rows.rows)
      P::template product<false, false>(s, x + warp * 16 * P::kPitch, y, smaller(rows.columns - d, kTile),
                                        smaller(columns.rows - c0, kTile));
    __syncthreads();
  }
}
// Where a thread's numbers of a tile are: (n, i) of its sums.
FASTOPS_DEVICE int own_row(int i) {
  const int t = static_cast<int>(threadIdx.x);
  return t / 32 * 16 + t % 32 / 4 + i / 2 * 8;
}
FASTOPS_DEVICE int own_column(int n, int i) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

// The running maximum and sum of the weights of two rows of a thread, one of four that have them.
struct Running {
  float top[2] = {kLowest, kLowest}, sum[2] = {};
};
// Logits become weights relative to the maxima; what came before has to be multiplied by the factors.
FASTOPS_DEVICE void take_weights(Running& running, Sums& s, float (&factor)[2], const Source& columns, int c0,
                                 float scale) {
  float most[2] = {running.top[0], running.top[1]};
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = lives(columns, c0 + own_column(n, i)) ? s[n][i] * scale : kLowest;
      if (s[n][i] > most[i / 2]) most[i / 2] = s[n][i];
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (unsigned step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(kAll, most[r], step);
      if (other > most[r]) most[r] = other;
    }
    const float base = most[r] == kLowest ? 0.0f : most[r];
    factor[r] = exp_nonpositive(running.top[r] - base);
    running.top[r] = most[r];
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[n][i] = exp_nonpositive(s[n][i] - base);
        sum += s[n][i];
      }
    running.sum[r] = simd::fma(running.sum[r], factor[r], sum);
  }
}
FASTOPS_DEVICE void put_tile(float* x, const Sums& s) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[own_row(i) * ByFloats::kPitch + own_column(n, i)] = s[n][i];
}
// The convolution at one element.
FASTOPS_DEVICE float convolved(const Call& call, const Source& values, std::int64_t head, int row, int e) {
  const auto taps = static_cast<int>(call.of.taps);
  float sum = 0.0f;
  for (int t = 0; t < taps; ++t) {
    const int j = row + t - taps / 2;
    if (j < 0 || !lives(values, j)) continue;
    sum = simd::fma(element_of(call.of.conv, head * taps + t, call.of.conv_dtype),
                    element_of(values.data, j * values.row + e * values.col, values.dtype), sum);
  }
  return sum;
}

// A block has 64 rows of one head and 64 columns of the values; of landmarks, a part of the keys.
template <class A, Pass kPass>
__global__ void __launch_bounds__(kThreads) attend_kernel(const __grid_constant__ Call call) {
  using Logits = ByLogits<A, kPass>;
  using Weights = ByWeights<A, kPass>;
  alignas(16) __shared__ float x[kTile * ByFloats::kPitch], y[kTile * ByFloats::kPitch];
  __shared__ Source sources[kSources];
  const gpu::NystromAttention& of = call.of;
  const auto values = static_cast<int>(of.values);
  const int rows = kPass == Pass::kKeys ? call.landmarks : static_cast<int>(of.queries);
  const auto across = static_cast<unsigned>((values + kTile - 1) / kTile);
  const auto down = static_cast<unsigned>((rows + kTile - 1) / kTile);
  const unsigned parts = kPass == Pass::kKeys ? static_cast<unsigned>(call.parts) : 1u;
  const int e0 = static_cast<int>(blockIdx.x % across) * kTile,
            r0 = static_cast<int>(blockIdx.x / across % down) * kTile;
  const unsigned rest = blockIdx.x / across / down;
  const auto part = static_cast<int>(rest % parts);
  const std::int64_t index = rest / parts, batch = index / static_cast<std::int64_t>(of.heads_q);
  if (is_exact(call, batch) != (kPass == Pass::kExact)) return;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  if (t < kOfGradients) set_source<kPass>(&sources[t], call, static_cast<Which>(t), index);
  // The values of the convolution.
  if (t == kOfGradients && kPass != Pass::kKeys) set_source<Pass::kExact>(&sources[t], call, kOfValues, index);
  __syncthreads();

  const bool with_sums = kPass == Pass::kQueries && call.with_sums, is_alive = r0 + warp * 16 < rows;
  const int columns = sources[kOfColumns].rows, width = smaller(values - e0, kTile);
  const int first = kPass == Pass::kKeys ? part * call.tiles_of_part * kTile : 0;
  const int last = kPass == Pass::kKeys ? smaller(first + call.tiles_of_part * kTile, columns) : columns;
  const auto scale = static_cast<float>(of.scale);
  Running running;
  float weighted[2] = {};
  Sums d = {};
  for (int c0 = first; c0 < last; c0 += kTile) {
    Sums s = {};
    take_logits<Logits>(s, x, y, sources[kOfRows], sources[kOfColumns], r0, c0);
    if (is_alive) {
      float factor[2];
      take_weights(running, s, factor, sources[kOfColumns], c0, scale);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] *= factor[i / 2];
      if (with_sums) {
        weighted[0] *= factor[0];
        weighted[1] *= factor[1];
        const Source& w = sources[kOfValues];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = c0 + own_column(n, i);
            if (c < w.rows)
              weighted[i / 2] = simd::fma(s[n][i], element_of(w.data, c * w.row + values, w.dtype), weighted[i / 2]);
          }
      }
      put_tile(x, s);
    }
    load_tile(y, sources[kOfValues], c0, e0);
    __syncthreads();
    if (is_alive) {
      // A tile is summed by itself: terms are lost beside the sum of many, and the tensor cores round every step of a
      // sum towards zero.
      Sums own = {};
      Weights::template product<false, true>(own, x + warp * 16 * Weights::kPitch, y, smaller(columns - c0, kTile),
                                             width);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] += own[n][i];
    }
    __syncthreads();
  }
  if (is_alive) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_quad(running.sum[r]), whole = sum_of_quad(weighted[r]);
      const int row = r0 + own_row(2 * r);
      const float divisor = kPass == Pass::kQueries && of.normalize ? whole : sum;
      inverse[r] = kPass == Pass::kKeys ? 1.0f : divisor == 0.0f ? 0.0f : 1.0f / divisor;
      if (row >= rows || t % 4 != 0 || e0 != 0) continue;
      if (kPass == Pass::kKeys) {
        const std::ptrdiff_t at = (index * call.parts + part) * rows + row;
        call.part_tops[at] = running.top[r];
        call.part_sums[at] = sum;
      } else if (with_sums && call.weights != nullptr) {
        call.weights[index * rows + row] = whole / sum;
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] *= inverse[i / 2];
    put_tile(x, d);
  }
  __syncthreads();
  const std::int64_t head = index - batch * static_cast<std::int64_t>(of.heads_q);
  char* const out =
      kPass == Pass::kKeys ? nullptr : const_cast<char*>(head_of(of.batch, of.out, item_of(of.dtype), batch, head, 0));
#pragma unroll 1
  for (int i = t; i < kTile * kTile; i += kThreads) {
    const int row = r0 + i / kTile, e = e0 + i % kTile;
    if (row >= rows || e >= values) continue;
    float value = x[i / kTile * ByFloats::kPitch + i % kTile];
    if (kPass == Pass::kKeys) {
      call.part_values[((index * call.parts + part) * rows + row) * values + e] = value;
      continue;
    }
    if (of.conv != nullptr) value += convolved(call, sources[kOfGradients], head, row, e);
    if (!lives(sources[kOfRows], row)) value = 0.0f;
    set_element(out, row * of.out.row + e * of.out.col, of.dtype, value);
  }
}

// A block for each landmark: B = softmax(s Qt K^T) V of all parts, and the sum of those weights, 1 or 0, beside it.
template <class T> __global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Call call) {
  const auto m = static_cast<std::int64_t>(call.landmarks);
  const std::int64_t index = blockIdx.x, head = index / m, i = index % m;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const auto values = static_cast<int>(call.of.values);
  const auto at = [&](int part) { return (head * call.parts + part) * m + i; };
  float top = kLowest, sum = 0.0f;
  for (int p = 0; p < call.parts; ++p) top = call.part_tops[at(p)] > top ? call.part_tops[at(p)] : top;
  const float base = top == kLowest ? 0.0f : top;
  for (int p = 0; p < call.parts; ++p)
    sum = simd::fma(call.part_sums[at(p)], exp_nonpositive(call.part_tops[at(p)] - base), sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* const to = static_cast<T*>(call.b) + index * call.columns;
  for (int e = static_cast<int>(threadIdx.x); e < values; e += kThreads) {
    float value = 0.0f;
    for (int p = 0; p < call.parts; ++p)
      value = simd::fma(call.part_values[at(p) * values + e], exp_nonpositive(call.part_tops[at(p)] - base), value);
    to[e] = static_cast<T>(value * inverse);
  }
  if (threadIdx.x != 0) return;
  to[values] = static_cast<T>(sum == 0.0f ? 0.0f : 1.0f);
  call.key_tops[index] = top;
  call.key_sums[index] = sum;
}

// A block for each head: what is told of it. `product` is A Z A.
template <class T>
__global__ void __launch_bounds__(kThreads) info_kernel(const __grid_constant__ Call call, const void* product) {
  __shared__ double sums[kWarps];
  __shared__ float least[kThreads], largest[kThreads];
  const std::int64_t head = blockIdx.x, batch = head / static_cast<std::int64_t>(call.of.heads_q);
  const int t = static_cast<int>(threadIdx.x);
  const float nothing = __builtin_nanf("");
  const auto tell = [&](float residual, float coefficient, float low, float high) {
    if (t != 0) return;
    call.of.info[0][head] = residual;
    call.of.info[1][head] = coefficient;
    call.of.info[2][head] = low;
    call.of.info[3][head] = high;
  };
  if (is_exact(call, batch)) {
    tell(nothing, nothing, nothing, nothing);
    return;
  }
  const auto items = static_cast<std::int64_t>(call.landmarks) * call.landmarks;
  const T* const a = static_cast<const T*>(call.a) + head * items;
  const T* const aza = static_cast<const T*>(product) + head * items;
  double off = 0.0, size = 0.0;
  for (std::int64_t i = t; i < items; i += kThreads) {
    const double whole = static_cast<double>(a[i]), rest = static_cast<double>(aza[i]) - whole;
    off = simd::fma(rest, rest, off);
    size = simd::fma(whole, whole, size);
  }
  off = sum_of_block<kWarps>(off, sums);
  size = sum_of_block<kWarps>(size, sums);
  const std::uint8_t* const mask = call.masks_queries ? mask_of(call, batch) : nullptr;
  const auto queries = static_cast<int>(call.of.queries);
  const float* const weights = call.weights + head * queries;
  float low = -kLowest, high = kLowest;
  const auto take = [&](float below, float above) {
    if (low == low && !(low <= below)) low = below;
    if (high == high && !(high >= above)) high = above;
  };
  for (int i = t; i < queries; i += kThreads)
    if (is_seen(call, mask, i)) take(weights[i], weights[i]);
  least[t] = low;
  largest[t] = high;
  __syncthreads();
  if (t != 0) return;
  for (int i = 1; i < kThreads; ++i) take(least[i], largest[i]);
  const bool none = count_of(call, batch, true) == 0;
  tell(static_cast<float>(simd::sqrt(off / size)), static_cast<float>(call.starts[head]), none ? nothing : low,
       none ? nothing : high);
}

// Gradients.

// A block has 64 queries of one head: what their weights' gradients need.
template <class A, Pass kPass>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const __grid_constant__ Call call) {
  using Logits = ByLogits<A, kPass>;
  using OfWeights = typename A::template Product<false, kMadeColumns<kPass>>;
  alignas(16) __shared__ float x[kTile * ByFloats::kPitch], y[kTile * ByFloats::kPitch];
  __shared__ Source sources[kSources];
  const gpu::NystromAttention& of = call.of;
  const auto values = static_cast<int>(of.values), rows = static_cast<int>(of.queries);
  const auto down = static_cast<unsigned>((rows + kTile - 1) / kTile);
  const int r0 = static_cast<int>(blockIdx.x % down) * kTile;
  const std::int64_t index = blockIdx.x / down;
  if (is_exact(call, index / static_cast<std::int64_t>(of.heads_q)) != (kPass == Pass::kExact)) return;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  if (t < kSources) {
    set_source<kPass>(&sources[t], call, static_cast<Which>(t), index);
    sources[t].factors = nullptr;  // not known yet
  }
  __syncthreads();

  const bool divides = kPass == Pass::kQueries && of.normalize, is_alive = r0 + warp * 16 < rows;
  const int columns = sources[kOfColumns].rows;
  Running running;
  float dot[2] = {}, whole[2] = {};
  for (int c0 = 0; c0 < columns; c0 += kTile) {
    Sums s = {}, ds = {};
    take_logits<Logits>(s, x, y, sources[kOfRows], sources[kOfColumns], r0, c0);
    for (int e = 0; e < values; e += kTile) {
      load_tile(x, sources[kOfGradients], r0, e);
      load_tile(y, sources[kOfValues], c0, e);
      __syncthreads();
      if (is_alive)
        OfWeights::template product<false, false>(ds, x + warp * 16 * ByFloats::kPitch, y, smaller(values - e, kTile),
                                                  smaller(columns - c0, kTile));
      __syncthreads();
    }
    if (!is_alive) continue;
    float factor[2];
    take_weights(running, s, factor, sources[kOfColumns], c0, static_cast<float>(of.scale));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      dot[r] *= factor[r];
      whole[r] *= factor[r];
    }
    const Source& w = sources[kOfValues];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dot[i / 2] = simd::fma(s[n][i], ds[n][i], dot[i / 2]);
        const int c = c0 + own_column(n, i);
        if (divides && c < columns)
          whole[i / 2] = simd::fma(s[n][i], element_of(w.data, c * w.row + values, w.dtype), whole[i / 2]);
      }
  }
  if (!is_alive) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_quad(running.sum[r]), all = sum_of_quad(dot[r]), weights = sum_of_quad(whole[r]);
    const int row = r0 + own_row(2 * r);
    if (row >= rows || t % 4 != 0) continue;
    const std::int64_t at = index * rows + row;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    call.tops[at] = running.top[r];
    call.inverses[at] = inverse;
    call.dots[at] = all * inverse;
    if (!divides) continue;
    // out = p W / (p u): with f = 1 / (p u), the sum's gradient is -f^2 (p W) . dy, and what it adds to the weights'
    // cancels the sum of weights times gradients.
    const float share = weights * inverse, f = share == 0.0f ? 0.0f : 1.0f / share;
    call.factors[at] = f;
    call.more[at] = -(all * inverse * f) * f;
    call.dots[at] = simd::fma(call.more[at], share, all * inverse * f);
  }
}

// A warp for each landmark: the same of its weights of keys.
template <class T> __global__ void __launch_bounds__(kThreads) key_dots_kernel(const __grid_constant__ Call call) {
  const auto m = static_cast<std::int64_t>(call.landmarks);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= call.heads_q * m || is_exact(call, index / m / static_cast<std::int64_t>(call.of.heads_q))) return;
  const T *const b = static_cast<const T*>(call.b) + index * call.columns, *const db = static_cast<const T*>(call.db) +
                                                                                       index * call.columns;
  T sum = 0;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < static_cast<int>(call.of.values); e += 32)
    sum = simd::fma(b[e], db[e], sum);
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 != 0) return;
  call.key_dots[index] = static_cast<float>(sum);
  call.key_inverses[index] = call.key_sums[index] == 0.0f ? 0.0f : 1.0f / call.key_sums[index];
}

// The gradients of rows, columns and values of a pass.
enum class Role { kRows, kColumns, kValues };
// What the mean of a row's segment gives it.
FASTOPS_DEVICE float share_of_mean(const Call& call, std::int64_t batch, std::int64_t index, int row, int d,
                                   bool of_queries) {
  const int n = count_of(call, batch, of_queries), m = call.landmarks;
  const bool by_ranks = of_queries ? counts_queries(call) : call.counts != nullptr;
  const int rank = by_ranks ? call.ranks[batch * static_cast<std::int64_t>(call.of.keys) + row] : row;
  const int length = n / m, shorter = (m - n % m) * length;
  const int i = rank < shorter ? rank / length : m - n % m + (rank - shorter) / (length + 1);
  const float* const means = of_queries ? call.dq_means : call.dk_means;
  return means[(index * m + i) * static_cast<std::int64_t>(call.of.dim) + d] *
         (1.0f / static_cast<float>(rank < shorter ? length : length + 1));
}
// What the convolution gives one element of the values.
FASTOPS_DEVICE float convolved_back(const Call& call, std::int64_t batch, std::int64_t head_k, int key, int e) {
  const gpu::NystromAttention& of = call.of;
  const auto taps = static_cast<int>(of.taps), queries = static_cast<int>(of.queries);
  const std::uint8_t* const mask = call.masks_queries ? mask_of(call, batch) : nullptr;
  float sum = 0.0f;
  for (int r = 0; r < call.group; ++r) {
    const std::int64_t head = head_k * call.group + r;
    const char* const dy = head_of(of.batch, of.dy, item_of(of.dtype), batch, head, 0);
    for (int t = 0; t < taps; ++t) {
      const int i = key - t + taps / 2;
      if (i < 0 || i >= queries || !is_seen(call, mask, i)) continue;
      sum = simd::fma(element_of(of.conv, head * taps + t, of.conv_dtype),
                      element_of(dy, i * of.dy.row + e * of.dy.col, of.dtype), sum);
    }
  }
  return sum;
}

// A block has 64 of the rows (or of the columns) of a pass and 64 columns of their gradient, and walks over the others:
// the columns (or the rows of all heads that share it). The weights are computed anew.
template <class A, Pass kPass>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const __grid_constant__ Call call, Role role) {
  using Both = typename A::template Product<true, true>;
  alignas(16) __shared__ float x[kTile * ByFloats::kPitch], y[kTile * ByFloats::kPitch];
  __shared__ Source sources[kSources];
  const gpu::NystromAttention& of = call.of;
  const bool of_rows = role == Role::kRows, of_values = role == Role::kValues;
  const int rows = kPass == Pass::kKeys ? call.landmarks : static_cast<int>(of.queries);
  const int columns = kPass == Pass::kQueries ? call.landmarks : static_cast<int>(of.keys);
  const int own = of_rows ? rows : columns, others = of_rows ? columns : rows;
  const int depth = static_cast<int>(of.values) + (kPass == Pass::kQueries && of.normalize ? 1 : 0);
  const int width = of_values ? depth : static_cast<int>(of.dim);
  const bool by_keys = !of_rows && !(kPass == Pass::kQueries && of_values);  // a block for each key head
  const auto heads = static_cast<std::int64_t>(by_keys ? of.heads_kv : of.heads_q);
  const Call::Parted* const parted = kPass == Pass::kKeys && of_rows                  ? &call.of_keys
                                     : kPass != Pass::kQueries || role == Role::kRows ? nullptr
                                     : of_values                                      ? &call.of_values
                                                                                      : &call.of_columns;
  const auto across = static_cast<unsigned>((width + kTile - 1) / kTile);
  const auto down = static_cast<unsigned>((own + kTile - 1) / kTile);
  const unsigned parts = parted == nullptr ? 1u : static_cast<unsigned>(parted->parts);
  const int d0 = static_cast<int>(blockIdx.x % across) * kTile,
            o0 = static_cast<int>(blockIdx.x / across % down) * kTile;
  const unsigned rest = blockIdx.x / across / down;
  const auto part = static_cast<int>(rest % parts);
  const std::int64_t index = rest / parts, batch = index / heads;
  if (is_exact(call, batch) != (kPass == Pass::kExact)) return;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  const int tiles = (others + kTile - 1) / kTile, steps = tiles * (by_keys ? call.group : 1);
  const int first = parted == nullptr ? 0 : part * parted->tiles;
  const int last = parted == nullptr ? steps : smaller(first + parted->tiles, steps);
  const bool is_alive = o0 + warp * 16 < own;
  const auto scale = static_cast<float>(of.scale);
  Sums d = {};
  std::int64_t head = -1;  // whose rows are at hand
  for (int step = first; step < last; ++step) {
    const std::int64_t wanted = by_keys ? index * call.group + step / tiles : index;
    if (wanted != head) {
      head = wanted;
      if (t < kSources) set_source<kPass>(&sources[t], call, static_cast<Which>(t), head);
      __syncthreads();
    }
    const int c0 = step % tiles * kTile;
    Sums s = {}, ds = {};
    take_logits<Both>(s, x, y, sources[of_rows ? kOfRows : kOfColumns], sources[of_rows ? kOfColumns : kOfRows], o0,
                      c0);
    if (!of_values)
      for (int e = 0; e < depth; e += kTile) {
        load_tile(x, sources[of_rows ? kOfGradients : kOfValues], o0, e);
        load_tile(y, sources[of_rows ? kOfValues : kOfGradients], c0, e);
        __syncthreads();
        if (is_alive)
          Both::template product<false, false>(ds, x + warp * 16 * ByFloats::kPitch, y, smaller(depth - e, kTile),
                                               smaller(others - c0, kTile));
        __syncthreads();
      }
    if (is_alive) {
      const std::int64_t of_head = head * rows;
      const float* const tops = (kPass == Pass::kKeys ? call.key_tops : call.tops) + of_head;
      const float* const inverses = (kPass == Pass::kKeys ? call.key_inverses : call.inverses) + of_head;
      const float* const dots = (kPass == Pass::kKeys ? call.key_dots : call.dots) + of_head;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int here = o0 + own_row(i), there = c0 + own_column(n, i);
          const int row = of_rows ? here : there, column = of_rows ? there : here;
          float value = 0.0f;
          if (row < rows && lives(sources[kOfColumns], column)) {
            const float top = tops[row] == kLowest ? 0.0f : tops[row];
            value = exp_nonpositive(s[n][i] * scale - top) * inverses[row];
            if (!of_values) value *= (ds[n][i] - dots[row]) * scale;
          }
          s[n][i] = value;
        }
      put_tile(x, s);
    }
    load_tile(y, sources[of_rows ? kOfColumns : of_values ? kOfGradients : kOfRows], c0, d0);
    __syncthreads();
    if (is_alive)
      Both::template product<false, true>(d, x + warp * 16 * ByFloats::kPitch, y, smaller(others - c0, kTile),
                                          smaller(width - d0, kTile));
    __syncthreads();
  }
  if (is_alive) put_tile(x, d);
  __syncthreads();
  const gpu::Heads& to = of_rows ? of.dq : of_values ? of.dv : of.dk;
  const std::int64_t own_head = index - batch * heads;
  char* const out =
      parted != nullptr ? nullptr : const_cast<char*>(head_of(of.batch, to, item_of(of.dtype), batch, own_head, 0));
  const std::uint8_t* const mask = of_rows && !call.masks_queries ? nullptr : mask_of(call, batch);
#pragma unroll 1
  for (int i = t; i < kTile * kTile; i += kThreads) {
    const int row = o0 + i / kTile, c = d0 + i % kTile;
    if (row >= own || c >= width) continue;
    float value = x[i / kTile * ByFloats::kPitch + i % kTile];
    if (parted != nullptr) {
      parted->sums[((index * parted->parts + part) * own + row) * width + c] = value;
      continue;
    }
    if (!is_seen(call, mask, row))
      value = 0.0f;
    else if (of_values)
      value += of.conv != nullptr ? convolved_back(call, batch, own_head, row, c) : 0.0f;
    else if (kPass != Pass::kExact && of.q_landmarks == nullptr)
      value += share_of_mean(call, batch, index, row, c, of_rows);
    set_element(out, row * to.row + c * to.col, of.dtype, value);
  }
}

// The sum of the parts of (heads, landmarks, numbers), and of what is there from each of `group` heads.
struct Addition {
  Call::Parted of;
  const float* more;  // or null
  int group, numbers;
  std::int64_t heads;
  void* to;
  int pitch;
  bool is_double;
};
__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ Call call, const __grid_constant__ Addition addition) {
  const std::int64_t own = static_cast<std::int64_t>(call.landmarks) * addition.numbers, i = own_element();
  if (i >= addition.heads * own) return;
  const std::int64_t head = i / own, at = i - head * own;
  if (is_exact(call, head * addition.group / static_cast<std::int64_t>(call.of.heads_q))) return;
  float sum = 0.0f;
  for (int p = 0; p < addition.of.parts; ++p) sum += addition.of.sums[(head * addition.of.parts + p) * own + at];
  if (addition.more != nullptr)
    for (int r = 0; r < addition.group; ++r) sum += addition.more[(head * addition.group + r) * own + at];
  const std::int64_t row = at / addition.numbers,
                     to = (head * call.landmarks + row) * addition.pitch + (at - row * addition.numbers);
  if (addition.is_double)
    static_cast<double*>(addition.to)[to] = static_cast<double>(sum);
  else
    static_cast<float*>(addition.to)[to] = sum;
}

// A block for each matrix: what the first Z, c A^T, gives A, by its coefficient too. `is_first`: nothing is there yet.
template <class T>
__global__ void __launch_bounds__(kThreads)
    start_gradient_kernel(const __grid_constant__ Call call, const void* first, bool is_first) {
  __shared__ double sums[kWarps];
  const std::int64_t head = blockIdx.x;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const std::int64_t m = call.landmarks;
  const T *const a = static_cast<const T*>(call.a) + head * m * m, *const dz =
                                                                       static_cast<const T*>(first) + head * m * m;
  T* const da = static_cast<T*>(call.da) + head * m * m;
  double dot = 0.0;
  for (std::int64_t i = threadIdx.x; i < m * m; i += kThreads)
    dot = simd::fma(static_cast<double>(dz[i % m * m + i / m]), static_cast<double>(a[i]), dot);
  dot = sum_of_block<kWarps>(dot, sums);
  const Norms norms = call.norms[head];
  const double c = call.starts[head], share = call.of.batch_init ? 0.0 : -dot * c;
  const T column = static_cast<T>(share / norms.column), row = static_cast<T>(share / norms.row);
  for (std::int64_t i = threadIdx.x; i < m * m; i += kThreads) {
    T value = static_cast<T>(c) * dz[i % m * m + i / m];
    if (i % m == norms.column_at) value += column;
    if (i / m == norms.row_at) value += row;
    da[i] = is_first ? value : da[i] + value;
  }
}
// The same of the ridge, by the trace of -`product`.
__global__ void __launch_bounds__(kThreads)
    ridge_gradient_kernel(const __grid_constant__ Call call, const double* product) {
  __shared__ double sums[kWarps];
  const std::int64_t head = blockIdx.x;
  if (is_exact(call, head / static_cast<std::int64_t>(call.of.heads_q))) return;
  const std::int64_t m = call.landmarks;
  double trace = 0.0;
  for (std::int64_t i = threadIdx.x; i < m; i += kThreads) trace -= product[head * m * m + i * (m + 1)];
  trace = sum_of_block<kWarps>(trace, sums);
  const Norms norms = call.norms[head];
  const double dc = call.of.ridge * trace;
  double* const da = static_cast<double*>(call.da) + head * m * m;
  for (std::int64_t i = threadIdx.x; i < m; i += kThreads) da[i * m + norms.column_at] += dc * norms.row;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < m; i += kThreads) da[norms.row_at * m + i] += dc * norms.column;
}
// A warp for each row of A: gradients of logits from those of weights, times the scale.
template <class T>
__global__ void __launch_bounds__(kThreads) softmax_gradient_kernel(const __grid_constant__ Call call) {
  const auto m = static_cast<std::int64_t>(call.landmarks);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= call.heads_q * m || is_exact(call, index / m / static_cast<std::int64_t>(call.of.heads_q))) return;
  const T* const a = static_cast<const T*>(call.a) + index * m;
  T* const da = static_cast<T*>(call.da) + index * m;
  T sum = 0;
  for (std::int64_t j = threadIdx.x % 32; j < m; j += 32) sum = simd::fma(a[j], da[j], sum);
  sum = sum_of_warp(sum);
  for (std::int64_t j = threadIdx.x % 32; j < m; j += 32) da[j] = a[j] * (da[j] - sum) * static_cast<T>(call.of.scale);
}

// A block for each weight of the convolution.
__global__ void __launch_bounds__(kThreads) taps_kernel(const __grid_constant__ Call call, std::int64_t batches) {
  __shared__ double sums[kWarps];
  const gpu::NystromAttention& of = call.of;
  const auto taps = static_cast<int>(of.taps), tap = static_cast<int>(blockIdx.x % of.taps);
  const auto head = static_cast<std::int64_t>(blockIdx.x / of.taps);
  const auto values = static_cast<std::int64_t>(of.values), queries = static_cast<std::int64_t>(of.queries);
  const int shift = tap - taps / 2;
  double sum = 0.0;
  for (std::int64_t batch = 0; batch < batches; ++batch) {
    const std::uint8_t* const mask = mask_of(call, batch);
    const char *const dy = head_of(of.batch, of.dy, item_of(of.dtype), batch, head, 0), *const v = head_of(
                                                                                            of.batch, of.v,
                                                                                            item_of(of.dtype), batch,
                                                                                            head / call.group, 0);
    for (std::int64_t i = threadIdx.x; i < queries * values; i += kThreads) {
      const auto row = static_cast<int>(i / values);
      const std::int64_t e = i - row * values, key = static_cast<std::int64_t>(row) + shift;
      if (key < 0 || key >= queries || !is_seen(call, mask, row) || !is_seen(call, mask, static_cast<int>(key)))
        continue;
      sum += static_cast<double>(element_of(dy, row * of.dy.row + e * of.dy.col, of.dtype)) *
             static_cast<double>(element_of(v, key * of.v.row + e * of.v.col, of.dtype));
    }
  }
  sum = sum_of_block<kWarps>(sum, sums);
  if (threadIdx.x == 0) of.d_conv[head * taps + tap] = static_cast<float>(sum);
}

// Launches.

// Blocks that occupy a large GPU some times over: of a constant, so that results do not depend on the GPU.
constexpr std::int64_t kEnoughBlocks = 512;

struct Prepared {
  Call call;
  std::int64_t batches;
  void *z[2], *x, *t, *u, *g;
  // Of the gradient: every Z, and matrices of m x m.
  char* steps;
  void *dr, *dq, *e, *s, *dx, *dz[2];
  std::size_t bytes;
};
// Tiles of a part, and parts, of a sum over `rows` that `blocks` blocks would do alone.
std::int64_t tiles_of_part(std::int64_t rows, std::int64_t blocks) noexcept {
  const std::int64_t tiles = divided_up(rows, kTile);
  if (tiles < 2 || blocks < 1) return 1;
  const std::int64_t parts = blocks >= kEnoughBlocks ? 1 : kEnoughBlocks / blocks;
  return divided_up(tiles, parts < tiles ? parts : tiles);
}
std::int64_t parts_of(std::int64_t rows, std::int64_t tiles) noexcept {
  const std::int64_t parts = divided_up(divided_up(rows, kTile), tiles);
  return parts < 1 ? 1 : parts;
}
Prepared prepare(const gpu::NystromAttention& of, void* workspace, bool gradient) noexcept {
  Prepared p{};
  Call& call = p.call;
  call.of = of;
  p.batches = 1;
  for (const std::size_t length : of.batch) p.batches *= static_cast<std::int64_t>(length);
  call.heads_q = p.batches * static_cast<std::int64_t>(of.heads_q);
  call.heads_kv = p.batches * static_cast<std::int64_t>(of.heads_kv);
  call.group = static_cast<int>(of.heads_kv == 0 ? 1 : of.heads_q / of.heads_kv);
  call.landmarks = static_cast<int>(of.landmarks);
  call.columns = rounded_up(static_cast<int>(of.values) + 1, 4);
  call.is_wide = of.ridge_solve || of.iterations > kSinglePrecisionSteps;
  call.masks_queries = of.mask.data != nullptr && of.queries == of.keys;
  call.with_sums = of.normalize || of.info[0] != nullptr;
  const std::size_t fewest = of.queries < of.keys ? of.queries : of.keys;
  call.may_be_exact = of.q_landmarks == nullptr && (of.mask.data != nullptr || fewest <= of.landmarks);
  const auto keys = static_cast<std::int64_t>(of.keys), m = static_cast<std::int64_t>(of.landmarks),
             dim = static_cast<std::int64_t>(of.dim), values = static_cast<std::int64_t>(of.values);
  call.tiles_of_part =
      static_cast<int>(tiles_of_part(keys, call.heads_q * divided_up(m, kTile) * divided_up(values, kTile)));
  call.parts = static_cast<int>(parts_of(keys, call.tiles_of_part));
  Parts parts(workspace);
  const auto take = [&](auto*& to, std::int64_t n) {
    to = parts.take<std::remove_reference_t<decltype(*to)>>(static_cast<std::size_t>(n));
  };
  const auto matrices = [&](void*& to, std::int64_t n) {
    to = parts.take<char>(static_cast<std::size_t>(n * (call.is_wide ? 8 : 4)));
  };
  if (of.mask.data != nullptr) {
    take(call.ranks, p.batches * keys);
    take(call.numbers, p.batches * keys);
    take(call.counts, p.batches);
  }
  take(call.q_means, call.heads_q * m * dim);
  take(call.k_means, call.heads_kv * m * dim);
  take(call.norms, call.heads_q);
  take(call.starts, call.heads_q);
  const std::int64_t rows = call.heads_q * m;
  take(call.part_tops, rows * call.parts);
  take(call.part_sums, rows * call.parts);
  take(call.part_values, rows * call.parts * values);
  take(call.key_tops, rows);
  take(call.key_sums, rows);
  matrices(call.a, rows * m);
  matrices(call.b, rows * call.columns);
  matrices(call.w, rows * call.columns);
  const bool informs = of.info[0] != nullptr;
  if (informs) take(call.weights, call.heads_q * static_cast<std::int64_t>(of.queries));
  if (of.ridge_solve) matrices(p.g, rows * m);
  if (!of.ridge_solve || informs || gradient)
    for (void** const to : {&p.x, &p.t}) matrices(*to, rows * m);
  if (!of.ridge_solve) matrices(p.u, rows * m);
  if (!gradient) {
    if (!of.ridge_solve || informs) matrices(p.z[0], rows * m);
    if (!of.ridge_solve) matrices(p.z[1], rows * m);
    p.bytes = parts.used();
    return p;
  }
  call.of_means = of.q_landmarks == nullptr || of.d_q_landmarks != nullptr || of.d_k_landmarks != nullptr;
  const std::int64_t queries = call.heads_q * static_cast<std::int64_t>(of.queries);
  for (float** const to : {&call.tops, &call.inverses, &call.dots}) take(*to, queries);
  if (of.normalize)
    for (float** const to : {&call.factors, &call.more}) take(*to, queries);
  for (float** const to : {&call.key_inverses, &call.key_dots}) take(*to, rows);
  for (void** const to : {&call.dw, &call.db}) matrices(*to, rows * call.columns);
  const auto parted = [&](Call::Parted& of_sum, std::int64_t heads, std::int64_t others, std::int64_t numbers) {
    of_sum.tiles = static_cast<int>(tiles_of_part(others, heads * divided_up(m, kTile) * divided_up(numbers, kTile)));
    of_sum.parts = static_cast<int>(parts_of(others, of_sum.tiles));
    take(of_sum.sums, heads * of_sum.parts * m * numbers);
  };
  parted(call.of_values, call.heads_q, static_cast<std::int64_t>(of.queries), values + (of.normalize ? 1 : 0));
  if (!of.ridge_solve) {
    void* all = nullptr;
    matrices(all, static_cast<std::int64_t>(of.iterations + 1) * rows * m);
    p.steps = static_cast<char*>(all);
  }
  if (call.of_means) {
    parted(call.of_keys, call.heads_q, keys, dim);
    parted(call.of_columns, call.heads_kv,
           divided_up(static_cast<std::int64_t>(of.queries), kTile) * kTile * call.group, dim);
    take(call.dq_means, rows * dim);
    take(call.dk_means, call.heads_kv * m * dim);
    take(call.dq_means_between, rows * dim);
    take(call.dk_means_between, rows * dim);
    matrices(call.da, rows * m);
    for (void** const to : {&p.e, &p.s}) matrices(*to, rows * m);
    if (!of.ridge_solve)
      for (void** const to : {&p.dr, &p.dq, &p.dx, &p.dz[0], &p.dz[1]}) matrices(*to, rows * m);
  }
  p.bytes = parts.used();
  return p;
}

class Launches : Launcher {
 public:
  Launches(const Prepared& p, gpu::Stream stream) noexcept
      : Launcher(stream), p_(p), call_(p.call), of_(p.call.of), m_(p.call.landmarks) {}

  gpu::Status forward() noexcept {
    before();
    if (landmarks_stand()) {
      absorb();
      by_type([&](auto type) { solve<decltype(type)>(); });
      attend<Pass::kQueries>();
    }
    if (call_.may_be_exact) attend<Pass::kExact>();
    if (of_.info[0] != nullptr) by_type([&](auto type) { inform<decltype(type)>(); });
    return status_;
  }
  gpu::Status backward() noexcept {
    before();
    if (landmarks_stand()) {
      absorb();
      by_type([&](auto type) { through_landmarks<decltype(type)>(); });
    }
    if (call_.may_be_exact) {
      statistics<Pass::kExact>();
      for (const Role role : {Role::kRows, Role::kColumns, Role::kValues}) gradient<Pass::kExact>(role);
    }
    if (of_.conv != nullptr)
      run(static_cast<std::int64_t>(of_.heads_q * of_.taps),
          [&](unsigned blocks) { FASTOPS_LAUNCH(taps_kernel, blocks, kThreads, 0, stream_, call_, p_.batches); });
    return status_;
  }

 private:
  // Whether there may be a sample with more rows than landmarks.
  bool landmarks_stand() const noexcept {
    const std::size_t fewest = of_.queries < of_.keys ? of_.queries : of_.keys;
    return of_.q_landmarks != nullptr || fewest > of_.landmarks;
  }
  template <class F> void by_type(const F& f) noexcept {
    if (call_.is_wide)
      f(double{});
    else
      f(float{});
  }
  template <class F> void by_arithmetic(const F& f) noexcept {
    if (of_.dtype == FASTOPS_F32 && !of_.tf32)
      f(InFloats());
    else
      f(OnTensorCores());
  }
  Matrix square(void* data) const noexcept {
    return {data, static_cast<std::ptrdiff_t>(m_) * m_, m_, call_.is_wide, false, false};
  }
  Matrix with_values(void* data) const noexcept {
    return {data, static_cast<std::ptrdiff_t>(m_) * call_.columns, call_.columns, call_.is_wide, false, false};
  }
  Matrix rows(float* data, bool of_keys) const noexcept {
    const auto dim = static_cast<int>(of_.dim);
    return {data, static_cast<std::ptrdiff_t>(m_) * dim, dim, false, false, of_keys};
  }
  // c = factor a b + kept d + diagonal I of m x m.
  Product times(Matrix c, Matrix a, Matrix b, double factor = 1.0, double diagonal = 0.0, Matrix d = {},
                double kept = 0.0) const noexcept {
    return {c, a, b, m_, m_, m_, factor, d, kept, diagonal};
  }
  template <class T> void multiply(std::initializer_list<Product> list) noexcept {
    const auto kernel = products_kernel<T>;
    Products products{0, {}};
    bool fits = true;
    for (const Product& p : list) fits = fits && p.rows <= kTile && p.cols <= kTile;
    const auto send = [&](std::int64_t tiles) {
      run(call_.heads_q * tiles,
          [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, products); });
      products.count = 0;
    };
    for (const Product& p : list) {
      products.list[products.count++] = p;
      if (!fits) send(divided_up(p.rows, kTile) * divided_up(p.cols, kTile));
    }
    if (products.count > 0) send(1);
  }

  void before() noexcept {
    if (of_.mask.data != nullptr)
      run(p_.batches, [&](unsigned blocks) { FASTOPS_LAUNCH(ranks_kernel, blocks, kThreads, 0, stream_, call_); });
    if (!landmarks_stand()) return;
    for (const bool of_queries : {true, false})
      run((of_queries ? call_.heads_q : call_.heads_kv) * m_,
          [&](unsigned blocks) { FASTOPS_LAUNCH(means_kernel, blocks, kThreads, 0, stream_, call_, of_queries); });
    by_type([&](auto type) { weigh<decltype(type)>(); });
  }
  // A and its norms.
  template <class T> void weigh() noexcept {
    Product logits = times(square(call_.a), rows(call_.q_means, false), turned(rows(call_.k_means, true)), of_.scale);
    logits.depth = static_cast<int>(of_.dim);
    multiply<T>({logits});
    const auto softmax = softmax_kernel<T>;
    run(divided_up(call_.heads_q * m_, kWarps),
        [&](unsigned blocks) { FASTOPS_LAUNCH(softmax, blocks, kThreads, 0, stream_, call_); });
    const auto norms = norms_kernel<T>;
    run(call_.heads_q, [&](unsigned blocks) { FASTOPS_LAUNCH(norms, blocks, kThreads, 0, stream_, call_); });
    if (of_.batch_init && call_.heads_q > 0)
      run(1, [&](unsigned) { FASTOPS_LAUNCH(batch_start_kernel, 1, kThreads, 0, stream_, call_); });
  }
  void absorb() noexcept {
    attend<Pass::kKeys>();
    by_type([&](auto type) {
      const auto merge = merge_kernel<decltype(type)>;
      run(call_.heads_q * m_, [&](unsigned blocks) { FASTOPS_LAUNCH(merge, blocks, kThreads, 0, stream_, call_); });
    });
  }
  template <Pass kPass> void attend() noexcept {
    const std::int64_t tiles = divided_up(static_cast<std::int64_t>(of_.values), kTile) *
                               divided_up(kPass == Pass::kKeys ? m_ : static_cast<std::int64_t>(of_.queries), kTile) *
                               (kPass == Pass::kKeys ? call_.parts : 1);
    by_arithmetic([&](auto arithmetic) {
      const auto kernel = attend_kernel<decltype(arithmetic), kPass>;
      run(call_.heads_q * tiles, [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_); });
    });
  }

  int width() const noexcept { return static_cast<int>(of_.values) + (call_.with_sums ? 1 : 0); }
  // W = Z B and, beside it, u = Z 1.
  template <class T> void solve() noexcept {
    if (of_.ridge_solve) {
      ridge();
      return;
    }
    start<T>(p_.z[0]);
    for (std::size_t i = 0; i < of_.iterations; ++i) step<T>(p_.z[i % 2], p_.z[(i + 1) % 2]);
    multiply<T>({of_values(with_values(call_.w), square(p_.z[of_.iterations % 2]), with_values(call_.b))});
  }
  Product of_values(Matrix c, Matrix a, Matrix b) const noexcept {
    Product p = times(c, a, b);
    p.cols = width();
    return p;
  }
  std::int64_t by_elements() const noexcept {
    return divided_up(call_.heads_q * static_cast<std::int64_t>(m_) * m_, kThreads);
  }
  template <class T> void start(void* z, bool is_plain = false) noexcept {
    const auto kernel = start_kernel<T>;
    run(by_elements(),
        [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, z, is_plain); });
  }
  // Z' = Z (13 I - X (15 I - X (7 I - X))) / 4 with X = A Z.
  template <class T> void step(void* from, void* to) noexcept {
    const Matrix z = square(from), x = square(p_.x), u = square(p_.u), t = square(p_.t);
    multiply<T>({times(x, square(call_.a), z), times(u, x, x, 1.0, 15.0, x, -7.0), times(t, x, u, 1.0, -13.0),
                 times(square(to), z, t, -0.25)});
  }
  // W = (A^T A + ridge |A|_1 |A|_inf I)^-1 A^T B.
  void ridge() noexcept {
    factorize();
    multiply<double>({of_values(with_values(call_.w), turned(square(call_.a)), with_values(call_.b))});
    divide(call_.w, width(), call_.columns);
  }
  void factorize() noexcept {
    multiply<double>({times(square(p_.g), turned(square(call_.a)), square(call_.a))});
    run(call_.heads_q, [&](unsigned blocks) {
      FASTOPS_LAUNCH(factorize_kernel, blocks, kThreads, 0, stream_, call_, static_cast<double*>(p_.g));
    });
  }
  void divide(void* right, int cols, int pitch) noexcept {
    run(call_.heads_q * divided_up(cols, kThreads), [&](unsigned blocks) {
      FASTOPS_LAUNCH(solve_kernel, blocks, kThreads, 0, stream_, call_, static_cast<const double*>(p_.g),
                     static_cast<double*>(right), cols, pitch);
    });
  }

  // The gradient.

  template <Pass kPass> void statistics() noexcept {
    by_arithmetic([&](auto arithmetic) {
      const auto kernel = statistics_kernel<decltype(arithmetic), kPass>;
      run(call_.heads_q * divided_up(static_cast<std::int64_t>(of_.queries), kTile),
          [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_); });
    });
  }
  template <Pass kPass> void gradient(Role role) noexcept {
    const bool of_rows = role == Role::kRows, of_values = role == Role::kValues, of_queries = kPass == Pass::kQueries;
    const auto rows = kPass == Pass::kKeys ? m_ : static_cast<std::int64_t>(of_.queries),
               columns = of_queries ? m_ : static_cast<std::int64_t>(of_.keys);
    const std::size_t width = of_values ? of_.values + (of_queries && of_.normalize ? 1 : 0) : of_.dim;
    const std::int64_t parts = kPass == Pass::kKeys && of_rows ? call_.of_keys.parts
                               : !of_queries || of_rows        ? 1
                               : of_values                     ? call_.of_values.parts
                                                               : call_.of_columns.parts;
    const std::int64_t heads = of_rows || (of_queries && of_values) ? call_.heads_q : call_.heads_kv;
    by_arithmetic([&](auto arithmetic) {
      const auto kernel = gradient_kernel<decltype(arithmetic), kPass>;
      run(heads * parts * divided_up(of_rows ? rows : columns, kTile) *
              divided_up(static_cast<std::int64_t>(width), kTile),
          [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, role); });
    });
  }
  void add(const Addition& addition) noexcept {
    run(divided_up(addition.heads * m_ * addition.numbers, kThreads),
        [&](unsigned blocks) { FASTOPS_LAUNCH(add_kernel, blocks, kThreads, 0, stream_, call_, addition); });
  }
  void* step_at(std::size_t i) const noexcept {
    return p_.steps + i * static_cast<std::size_t>(call_.heads_q * m_ * m_ * (call_.is_wide ? 8 : 4));
  }
  template <class T> void through_landmarks() noexcept {
    if (of_.ridge_solve) {
      ridge();
    } else {
      start<T>(step_at(0));
      for (std::size_t i = 0; i < of_.iterations; ++i) step<T>(step_at(i), step_at(i + 1));
      multiply<T>({of_values(with_values(call_.w), square(step_at(of_.iterations)), with_values(call_.b))});
    }
    statistics<Pass::kQueries>();
    gradient<Pass::kQueries>(Role::kValues);
    add({call_.of_values, nullptr, 1, width(), call_.heads_q, call_.dw, call_.columns, call_.is_wide});
    if (of_.ridge_solve)
      ridge_backward();
    else
      newton_backward<T>();
    const auto dots = key_dots_kernel<T>;
    run(divided_up(call_.heads_q * m_, kWarps),
        [&](unsigned blocks) { FASTOPS_LAUNCH(dots, blocks, kThreads, 0, stream_, call_); });
    if (call_.of_means) {
      between<T>();
      const auto dim = static_cast<int>(of_.dim);
      gradient<Pass::kKeys>(Role::kRows);
      float* const to_q = of_.d_q_landmarks != nullptr ? of_.d_q_landmarks : call_.dq_means;
      add({call_.of_keys, call_.dq_means_between, 1, dim, call_.heads_q, to_q, dim, false});
      gradient<Pass::kQueries>(Role::kColumns);
      float* const to_k = of_.d_k_landmarks != nullptr ? of_.d_k_landmarks : call_.dk_means;
      add({call_.of_columns, call_.dk_means_between, call_.group, dim, call_.heads_kv, to_k, dim, false});
    }
    gradient<Pass::kQueries>(Role::kRows);
    gradient<Pass::kKeys>(Role::kColumns);
    gradient<Pass::kKeys>(Role::kValues);
  }
  // What the logits of A give the landmarks.
  template <class T> void between() noexcept {
    const auto softmax = softmax_gradient_kernel<T>;
    run(divided_up(call_.heads_q * m_, kWarps),
        [&](unsigned blocks) { FASTOPS_LAUNCH(softmax, blocks, kThreads, 0, stream_, call_); });
    const Matrix ds = square(call_.da);
    Product dq = times(rows(call_.dq_means_between, false), ds, rows(call_.k_means, true));
    Product dk = times(rows(call_.dk_means_between, false), turned(ds), rows(call_.q_means, false));
    dq.cols = dk.cols = static_cast<int>(of_.dim);
    multiply<T>({dq, dk});
  }
  // Through the steps from Z' back to Z and A: Z' = Z R / 4, R = 13 - X Q, Q = 15 - X P, P = 7 - X, X = A Z; so dR =
  // Z^T dZ' / 4, dQ = -X^T dR, dP = -X^T dQ, dX = -dR Q^T - dQ P^T - dP, and e is dP + 7 dQ.
  template <class T> void newton_backward() noexcept {
    const Matrix a = square(call_.a), da = square(call_.da), x = square(p_.x), q = square(p_.u), r = square(p_.t);
    const Matrix dw = with_values(call_.dw), b = with_values(call_.b), dr = square(p_.dr), dq = square(p_.dq);
    const Matrix e = square(p_.e), s = square(p_.s), dx = square(p_.dx);
    Product db = of_values(with_values(call_.db), turned(square(step_at(of_.iterations))), dw);
    multiply<T>({db});
    if (!call_.of_means) return;
    Product first = times(square(p_.dz[of_.iterations % 2]), dw, turned(b));
    first.depth = width();
    multiply<T>({first});
    for (std::size_t i = of_.iterations; i-- > 0;) {
      const Matrix z = square(step_at(i)), after = square(p_.dz[(i + 1) % 2]), before = square(p_.dz[i % 2]);
      const double kept = i + 1 == of_.iterations ? 0.0 : 1.0;
      multiply<T>({times(x, a, z), times(q, x, x, 1.0, 15.0, x, -7.0), times(r, x, q, -1.0, 13.0),
                   times(dr, turned(z), after, 0.25), times(dq, turned(x), dr, -1.0),
                   times(e, turned(x), dq, -1.0, 0.0, dq, 7.0), times(s, dr, turned(q), -1.0, 0.0, e, -1.0),
                   times(dx, dq, turned(x), 1.0, 0.0, s, 1.0), times(e, after, turned(r), 0.25),
                   times(before, turned(a), dx, 1.0, 0.0, e, 1.0), times(da, dx, turned(z), 1.0, 0.0, da, kept)});
    }
    const auto kernel = start_gradient_kernel<T>;
    run(call_.heads_q, [&](unsigned blocks) {
      FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, static_cast<const void*>(p_.dz[0]),
                     of_.iterations == 0);
    });
  }
  // G = A^T A + ridge c I, W = G^-1 A^T B: dR = G^-1 dW (in the place of dW), dG = -dR W^T, dB = A dR, dA = B dR^T + A
  // (dG + dG^T) and the norms' share.
  void ridge_backward() noexcept {
    const Matrix a = square(call_.a), da = square(call_.da), t = square(p_.t), s = square(p_.s), e = square(p_.e);
    const Matrix dr = with_values(call_.dw), w = with_values(call_.w), b = with_values(call_.b);
    divide(call_.dw, width(), call_.columns);
    multiply<double>({of_values(with_values(call_.db), a, dr)});
    if (!call_.of_means) return;
    Product outer = times(t, dr, turned(w)), direct = times(s, b, turned(dr));
    outer.depth = direct.depth = width();
    multiply<double>({outer, direct, times(e, a, t, -1.0, 0.0, s, 1.0), times(da, a, turned(t), -1.0, 0.0, e, 1.0)});
    run(call_.heads_q, [&](unsigned blocks) {
      FASTOPS_LAUNCH(ridge_gradient_kernel, blocks, kThreads, 0, stream_, call_, static_cast<const double*>(p_.t));
    });
  }

  template <class T> void inform() noexcept {
    if (landmarks_stand()) {
      void* z = p_.z[of_.iterations % 2];
      if (of_.ridge_solve) {
        z = p_.z[0];
        start<T>(z, true);
        divide(z, m_, m_);
      }
      multiply<T>(
          {times(square(p_.x), square(call_.a), square(z)), times(square(p_.t), square(p_.x), square(call_.a))});
    }
    const auto kernel = info_kernel<T>;
    run(call_.heads_q, [&](unsigned blocks) {
      FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, static_cast<const void*>(p_.t));
    });
  }

  const Prepared& p_;
  const Call& call_;
  const gpu::NystromAttention& of_;
  const int m_;
};

}  // namespace nystrom_kernels
using namespace nystrom_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

std::size_t nystrom_attention_workspace(const NystromAttention& call, bool gradient) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  return level::prepare(call, nullptr, gradient).bytes;
}
Status nystrom_attention(const NystromAttention& call, void* workspace, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::Prepared prepared = level::prepare(call, workspace, false);
  return level::Launches(prepared, stream).forward();
}
Status nystrom_attention_backward(const NystromAttention& call, void* workspace, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::Prepared prepared = level::prepare(call, workspace, true);
  return level::Launches(prepared, stream).backward();
}

}  // namespace fastops::gpu
