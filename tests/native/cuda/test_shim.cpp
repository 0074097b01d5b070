// SPDX-License-Identifier: BSD-3-Clause
// The shim and the wrappers of device.h: barriers, shuffles, copies and the tensor cores' tile by fibers, and the
// kernels on buffers of exact size, for the sanitizers.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/device.h"
#include "fastops/fastops.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

int g_failed = 0;
void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++g_failed;
}

// Sums each block's part of x: by shuffles within warps, by shared memory between them.
__global__ void sum_kernel(const double* x, std::size_t n, double* sums, int* blocks) {
  __shared__ double of_warp[32];
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  double v = i < n ? x[i] : 0.0;
  for (unsigned d = 16; d != 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.0;
    for (unsigned d = 16; d != 0; d /= 2) v += __shfl_down_sync(~0u, v, d);
    if (threadIdx.x == 0) {
      sums[blockIdx.x] = v;
      atomicAdd(blocks, 1);
    }
  }
  if (__syncthreads_or(threadIdx.x == 77) != 1 || __syncthreads_or(0) != 0) sums[blockIdx.x] = -1.0;
}
void test_sums() {
  constexpr std::size_t n = 1000;
  std::vector<double> x(n), sums(8);
  for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<double>(i * i % 97);
  int blocks = 0;
  FASTOPS_LAUNCH(sum_kernel, 8, 128, 0, nullptr, x.data(), n, sums.data(), &blocks);
  for (std::size_t b = 0; b < 8; ++b) {
    double want = 0.0;
    for (std::size_t i = b * 128; i < (b + 1) * 128 && i < n; ++i) want += x[i];
    check(sums[b] == want, "the sum of a block");
  }
  check(blocks == 8, "atomicAdd");
}

// Turns a row around through shared memory, the next piece on its way while one is written.
__global__ void turn_kernel(const float* x, float* y, int pieces) {
  FASTOPS_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int t = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x) * 4;
  copy_async(shared + t * 4, x + t * 4);
  copy_async_close();
  for (int p = 0; p < pieces; ++p) {
    float* const now = shared + p % 2 * size;
    copy_async(shared + (p + 1) % 2 * size + t * 4, x + (p + 1) * size + t * 4, p + 1 < pieces);
    copy_async_close();
    copy_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) y[p * size + t * 4 + j] = now[size - 1 - (t * 4 + j)];
    __syncthreads();
  }
  copy_async_wait<0>();
}
void test_copies() {
  constexpr int size = 256, pieces = 3;
  // One piece more: what is not valid is not read, but its address must lie somewhere.
  std::vector<Vector<float, 4>> memory(size * (pieces + 1) / 4), turned(size * pieces / 4);
  float *const x = memory[0].v, *const y = turned[0].v;
  for (int i = 0; i < size * pieces; ++i) x[i] = static_cast<float>(i);
  FASTOPS_LAUNCH(turn_kernel, 1, size / 4, 2 * size * sizeof(float), nullptr, x, y, pieces);
  for (int i = 0; i < size * pieces; ++i)
    check(y[i] == x[i / size * size + size - 1 - i % size], "a copy to shared memory");
}

template <class H> __global__ void tile_kernel(const float* a, const float* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](float x, float y) {
    return static_cast<std::uint32_t>(H::put(x)) | static_cast<std::uint32_t>(H::put(y)) << 16;
  };
  std::uint32_t from_a[4], from_b[2];
  for (unsigned i = 0; i < 4; ++i) {
    const float* const row = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    from_a[i] = pair(row[0], row[1]);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const float* const column = b + (2 * t + i * 8) * 8 + g;
    from_b[i] = pair(column[0], column[8]);
  }
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_tile<H>(sums, from_a, from_b);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
template <class H> void test_tile() {
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 7 % 13 - 6);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 5 % 11 - 5);
  const auto kernel = tile_kernel<H>;
  FASTOPS_LAUNCH(kernel, 1, 32, 0, nullptr, a, b, d);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 1.0f;
      for (int k = 0; k < 16; ++k) want += a[i * 16 + k] * b[k * 8 + j];
      check(d[i * 8 + j] == want, "a tile of the tensor cores");
    }
}

__global__ void tf32_kernel(const float* a, const float* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float from_a[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                           to_tf32(a[(g + 8) * 8 + t + 4])};
  const float from_b[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_tile_tf32(sums, from_a, from_b);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
void test_tf32() {
  float a[16 * 8], b[8 * 8], d[16 * 8];
  // What TF32 has no room for is rounded away, to the nearest, ties away from zero.
  for (int i = 0; i < 128; ++i) a[i] = static_cast<float>(i * 7 % 13 - 6) * (1.0f + 0x1p-12f);
  for (int i = 0; i < 64; ++i) b[i] = static_cast<float>(i * 5 % 11 - 5);
  FASTOPS_LAUNCH(tf32_kernel, 1, 32, 0, nullptr, a, b, d);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 1.0f;
      for (int k = 0; k < 8; ++k) want += static_cast<float>((i * 8 + k) * 7 % 13 - 6) * b[k * 8 + j];
      check(d[i * 8 + j] == want, "a tile of TF32");
    }
  check(to_tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f && to_tf32(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f, "a tie");
  check(to_tf32(__builtin_inff()) == __builtin_inff() && to_tf32(__builtin_nanf("")) != 0.0f, "what is not finite");
}

// 1 and, in the first step, a term that rounding to nearest would see; -1 and its negative.
__global__ void rounding_kernel(float* d) {
  const bool is_first = threadIdx.x % 4 == 0;
  const float x = is_first ? 0x1.8p-12f : 0.0f, y = is_first ? 0x1p-12f : 0.0f;
  float of_floats[4] = {1.0f, 1.0f, -1.0f, -1.0f}, of_halves[4] = {1.0f, 1.0f, -1.0f, -1.0f};
  multiply_tile_tf32(of_floats, {x, -x, 0.0f, 0.0f}, {y, 0.0f});
  multiply_tile<F16>(of_halves, {F16::put(x), F16::put(-x), 0u, 0u}, {F16::put(y), 0u});
  for (unsigned i = 0; i < 4; ++i) {
    d[threadIdx.x * 8 + i] = of_floats[i];
    d[threadIdx.x * 8 + 4 + i] = of_halves[i];
  }
}
void test_rounding() {
  float d[32 * 8];
  FASTOPS_LAUNCH(rounding_kernel, 1, 32, 0, nullptr, d);
  for (int i = 0; i < 32 * 8; ++i) check(d[i] == (i % 4 < 2 ? 1.0f : -1.0f), "a sum rounded towards zero");
}

// Four matrices side by side in rows of 40 numbers.
template <bool kTransposed> __global__ void matrices_kernel(const std::uint16_t* from, std::uint32_t* to) {
  alignas(16) __shared__ std::uint16_t shared[8 * 40];
  for (unsigned i = threadIdx.x; i < 8 * 40; i += 32) shared[i] = from[i];
  __syncthreads();
  std::uint32_t r[4];
  load_matrices<kTransposed>(r, shared + threadIdx.x % 8 * 40 + threadIdx.x / 8 * 8);
  for (unsigned i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = r[i];
}
template <bool kTransposed> void test_matrices() {
  std::uint16_t from[8 * 40];
  std::uint32_t to[32 * 4];
  for (unsigned i = 0; i < 8 * 40; ++i) from[i] = static_cast<std::uint16_t>(i * 37);
  const auto kernel = matrices_kernel<kTransposed>;
  FASTOPS_LAUNCH(kernel, 1, 32, 0, nullptr, from, to);
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned g = lane / 4, k = lane % 4 * 2 + half;
        const std::uint16_t want = kTransposed ? from[k * 40 + i * 8 + g] : from[g * 40 + i * 8 + k];
        check((to[lane * 4 + i] >> 16 * half & 0xffff) == want, "a matrix from shared memory");
      }
}

// Buffers without an element to spare: a sanitizer sees what is read or written beside them.
void test_exact_buffers() {
  fastops_mitchell_params params{};
  fastops_mitchell* m = nullptr;
  if (fastops_mitchell_create(&params, &m) != FASTOPS_OK) return check(false, "a multiplier");
  for (const std::size_t n : {1u, 7u, 2048u, 2049u, 5000u}) {
    const std::vector<float> a(n, 3.0f), b(n, 5.0f);
    std::vector<float> out(n), want(n);
    gpu::Elementwise call{};
    call.dtype = FASTOPS_F32;
    call.ndim = 1;
    call.shape[0] = n;
    call.a.data = a.data();
    call.b.data = b.data();
    call.out = out.data();
    call.a.stride[0] = call.b.stride[0] = call.stride_out[0] = 1;
    check(gpu::mitchell_apply(*m, call, nullptr) == 0, "a launch");
    fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, a.data(), 4, b.data(), 4, want.data(), 4, n);
    check(out == want, "an element-wise product");
  }
  for (const std::size_t rows : {1u, 63u, 65u, 130u}) {
    const std::size_t depth = 11, cols = 67;
    std::vector<float> a(rows * depth), b(depth * cols), out(rows * cols), want(rows * cols);
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(1 << i % 5);
    for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 9);
    gpu::Matmul call{};
    call.dtype = FASTOPS_F32;
    for (std::size_t& length : call.batch) length = 1;
    call.rows = rows;
    call.cols = cols;
    call.depth = depth;
    call.a = {a.data(), {}, static_cast<std::ptrdiff_t>(depth), 1};
    call.b = {b.data(), {}, static_cast<std::ptrdiff_t>(cols), 1};
    call.out = {out.data(), {}, static_cast<std::ptrdiff_t>(cols), 1};
    check(gpu::mitchell_matmul(m, call, nullptr) == 0, "a launch");
    // One operand of powers of two: products and sums of small integers, exact.
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t k = 0; k < depth; ++k)
        for (std::size_t j = 0; j < cols; ++j) want[i * cols + j] += a[i * depth + k] * b[k * cols + j];
    check(out == want, "a matrix product");
  }
  fastops_mitchell_destroy(m);
  for (const std::size_t n : {1u, 3u, 4095u, 16384u, 16385u}) {
    std::vector<float> shadow(n, 1.0f);
    const std::vector<float> parameter(n, 2.0f);
    gpu::Tensor tensor{};
    tensor.at[0] = const_cast<float*>(parameter.data());
    tensor.at[1] = shadow.data();
    tensor.size = n;
    tensor.dtype[0] = tensor.dtype[1] = FASTOPS_F32;
    tensor.packs = 1;
    std::vector<gpu::Chunk> chunks;
    for (std::size_t first = 0; first < n; first += gpu::kChunk)
      chunks.push_back({0, static_cast<std::uint32_t>(first / gpu::kChunk)});
    check(gpu::ema_update({&tensor, chunks.data(), chunks.size()}, 0.25, nullptr, nullptr, nullptr) == 0, "a launch");
    check(shadow == std::vector<float>(n, 1.25f), "a moving average");
  }
}

// Of ones every mean is one, and so are its parts' sums; rows of any length in buffers without an element to spare.
void test_exact_attention() {
  const auto rows = [](const void* data, std::size_t tokens, std::size_t numbers) {
    const auto row = static_cast<std::ptrdiff_t>(numbers), head = static_cast<std::ptrdiff_t>(tokens * numbers);
    return gpu::Heads{data, {}, head, row, 1, numbers % 4 == 0};
  };
  for (const fastops_feature_map map : {FASTOPS_MAP_ELU, FASTOPS_MAP_COSINE, FASTOPS_MAP_EXP, FASTOPS_MAP_SOFTMAX})
    for (const std::size_t tokens : {1u, 63u, 130u})
      for (const std::size_t dim : {3u, 8u, 65u})
        for (const bool causal : {false, true}) {
          const std::vector<float> x(tokens * dim, 0.5f), v(tokens * 5, 1.0f);
          std::vector<float> y(tokens * 5), dx(tokens * dim), dk(tokens * dim), dv(tokens * 5);
          gpu::LinearAttention call{};
          call.dtype = FASTOPS_F32;
          call.map = map;
          call.causal = causal;
          call.normalize = true;
          for (std::size_t& length : call.batch) length = 1;
          call.heads_q = call.heads_kv = 1;
          call.queries = call.keys = tokens;
          call.dim = dim;
          call.features = dim + (map == FASTOPS_MAP_COSINE);
          call.values = 5;
          call.scale = 1.0f;
          call.q = call.k = rows(x.data(), tokens, dim);
          call.v = call.dy = rows(v.data(), tokens, 5);
          call.out = call.y = rows(y.data(), tokens, 5);
          std::vector<char> workspace(gpu::linear_attention_workspace(call, false) + 16);
          const auto aligned = [&] {
            return workspace.data() + (-reinterpret_cast<std::uintptr_t>(workspace.data()) & 15);
          };
          check(gpu::linear_attention(call, aligned(), nullptr) == 0, "a launch");
          for (const float mean : y) check(std::fabs(mean - 1.0f) < 1e-5f, "a mean of ones");
          call.dq = rows(dx.data(), tokens, dim);
          call.dk = rows(dk.data(), tokens, dim);
          call.dv = rows(dv.data(), tokens, 5);
          workspace.assign(gpu::linear_attention_workspace(call, true) + 16, 0);
          check(gpu::linear_attention_backward(call, aligned(), nullptr) == 0, "a launch");
          float sum = 0.0f;
          for (const float d : dv) sum += d;
          check(std::fabs(sum - 5.0f * static_cast<float>(tokens)) < 1e-2f,
                "gradients of values, whose weights are ones");
          for (const float d : dx) check(std::fabs(d) < 1e-4f, "a gradient of what changes nothing");
          for (const float d : dk) check(std::fabs(d) < 1e-4f, "a gradient of what changes nothing");
        }
}

}  // namespace
}  // namespace fastops::FASTOPS_LEVEL

int main() {
  using namespace fastops::FASTOPS_LEVEL;
  test_sums();
  test_copies();
  test_tile<F16>();
  test_tile<BF16>();
  test_tf32();
  test_rounding();
  test_matrices<false>();
  test_matrices<true>();
  test_exact_buffers();
  test_exact_attention();
  return g_failed == 0 ? 0 : 1;
}
