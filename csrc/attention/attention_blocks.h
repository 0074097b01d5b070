// SPDX-License-Identifier: BSD-3-Clause
// What the attention kernels for GPUs share: products of tiles by the warps of a block, elements of arrays of any
// dtype, and where rows of heads lie.
#ifndef FASTOPS_ATTENTION_ATTENTION_BLOCKS_H
#define FASTOPS_ATTENTION_ATTENTION_BLOCKS_H

#include "cuda/device.h"

namespace fastops::FASTOPS_LEVEL::attention {

constexpr int kThreads = 128;
constexpr int kTile = 64;    // rows and columns of a block's result; a warp has 16 rows
constexpr int kColumns = 8;  // tiles of 8 columns, of which a thread has two numbers in two rows

using Sums = float[kColumns][4];

// Kinds of arithmetic: the type in shared memory, and d (16 x 64) += a (16 x depth) b (depth x 64) by a warp. Shared
// rows are so long that reads along them and across them spread over the banks. a is stored as (row, step) or, turned,
// (step, row), b as (column, step) or, turned, (step, column).
struct ByFloats {
  using S = float;
  static constexpr int kPitch = kTile + 4;
  // Three tiles of floats would be more than a block may have without asking.
  static constexpr bool kKeepsRows = false;
  static FASTOPS_DEVICE float get(S x) { return x; }
  template <bool kTurned> static FASTOPS_DEVICE float at(const S* p, int row, int k) {
    return kTurned ? p[k * kPitch + row] : p[row * kPitch + k];
  }
};
struct ByFp32 : ByFloats {
  static FASTOPS_DEVICE S put(float x) { return x; }
  template <bool kTurnedA, bool kTurnedB>
  static FASTOPS_DEVICE void product(Sums& d, const S* a, const S* b, int depth, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      const float upper = at<kTurnedA>(a, g, k), lower = at<kTurnedA>(a, g + 8, k);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n * 8 >= columns) continue;
        const float first = at<kTurnedB>(b, n * 8 + t, k), second = at<kTurnedB>(b, n * 8 + t + 1, k);
        d[n][0] = simd::fma(upper, first, d[n][0]);
        d[n][1] = simd::fma(upper, second, d[n][1]);
        d[n][2] = simd::fma(lower, first, d[n][2]);
        d[n][3] = simd::fma(lower, second, d[n][3]);
      }
    }
  }
};

FASTOPS_DEVICE std::ptrdiff_t item_of(fastops_dtype dtype) {
  return dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2;
}
FASTOPS_DEVICE float element_of(const void* data, std::ptrdiff_t i, fastops_dtype dtype) {
  if (dtype == FASTOPS_F32) return static_cast<const float*>(data)[i];
  if (dtype == FASTOPS_F64) return static_cast<float>(static_cast<const double*>(data)[i]);
  const std::uint16_t h = static_cast<const std::uint16_t*>(data)[i];
  return dtype == FASTOPS_F16 ? half::from_f16(h) : half::from_bf16(h);
}
FASTOPS_DEVICE void set_element(void* data, std::ptrdiff_t i, fastops_dtype dtype, float x) {
  if (dtype == FASTOPS_F32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<std::uint16_t*>(data)[i] = dtype == FASTOPS_F16 ? half::to_f16(x) : half::to_bf16(x);
}
// The rows of one head from row `first` on; `lengths` are those of the batch's dimensions.
FASTOPS_DEVICE const char* head_of(const std::size_t (&lengths)[gpu::kBatchDimensions], const gpu::Heads& x,
                                   std::ptrdiff_t item, std::int64_t batch, std::int64_t head, std::int64_t first) {
  std::ptrdiff_t offset = head * x.head + first * x.row;
#pragma unroll
  for (int d = gpu::kBatchDimensions - 1; d >= 0; --d) {
    const auto length = static_cast<std::int64_t>(lengths[d]);
    if (length == 1) continue;
    const std::int64_t above = batch / length;
    offset += (batch - above * length) * x.batch[d];
    batch = above;
  }
  return static_cast<const char*>(x.data) + offset * item;
}
FASTOPS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FASTOPS_HD inline int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

inline std::int64_t divided_up(std::int64_t n, std::int64_t by) noexcept { return (n + by - 1) / by; }

FASTOPS_DEVICE float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
template <class T> FASTOPS_DEVICE T sum_of_warp(T x) {
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
// By all threads of a block of so many warps, in a fixed order; `shared` has a place for each warp.
template <int kWarps, class T> FASTOPS_DEVICE T sum_of_block(T x, T* shared) {
  x = sum_of_warp(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < kWarps; ++i) x += shared[i];
  return x;
}

// The launches of a call, up to the first that fails.
class Launcher {
 protected:
  explicit Launcher(gpu::Stream stream) noexcept : stream_(stream) {}
  // launch(blocks), where there are any.
  template <class F> void run(std::int64_t blocks, const F& launch) noexcept {
    if (status_ != 0 || blocks <= 0) return;
    if (static_cast<std::size_t>(blocks) > gpu::kMostBlocks) {
      status_ = gpu::kTooLarge;
      return;
    }
    launch(static_cast<unsigned>(blocks));
    status_ = launched();
  }

  gpu::Stream stream_;
  gpu::Status status_ = 0;
};

// The memory of a call, one array after another; sizes alone with null.
class Parts {
 public:
  explicit Parts(void* memory) noexcept : at_(reinterpret_cast<std::uintptr_t>(memory)), begin_(at_) {}
  template <class T> T* take(std::size_t n) noexcept {
    const std::uintptr_t p = at_;
    at_ += (n * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(p);
  }
  std::size_t used() const noexcept { return at_ - begin_; }

 private:
  std::uintptr_t at_, begin_;
};

}  // namespace fastops::FASTOPS_LEVEL::attention
#endif
