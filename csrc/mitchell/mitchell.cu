// SPDX-License-Identifier: BSD-3-Clause
// Element-wise Mitchell arithmetic on a GPU: the mathematics of the CPU's kernels, one number a lane.
#include "mitchell/mitchell_gpu.h"

namespace fastops::FASTOPS_LEVEL {
namespace elementwise_kernels {

using namespace mitchell;

// Contiguous arrays, plain logarithms with one constant.

// Loads that are under way at once.
inline constexpr int kPacks = 2;
template <class T> inline constexpr std::size_t kBlock = std::size_t{kThreads} * kItems<T> * kPacks;

template <int op, class T, class K>
FASTOPS_DEVICE PackOf<T> compute(const PackOf<T>& a, const PackOf<T>& b, const K& k) {
  using E = typename T::E;
  PackOf<T> r;
  if constexpr (is_sum(op)) {
    if (k.fast) {
      Short<op, E, true> sum(k);
#pragma unroll
      for (int i = 0; i < kItems<T>; ++i) r.v[i] = T::put(sum(T::get(a.v[i]), is_binary(op) ? T::get(b.v[i]) : E{}));
      if (sum.in_range()) return r;
    }
  }
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const E x = T::get(a.v[i]), y = is_binary(op) ? T::get(b.v[i]) : x;
    r.v[i] = T::put(log_form<op>(x, y, k));
  }
  return r;
}

template <class T> FASTOPS_DEVICE PackOf<T> load_operand(const void* p, std::size_t at, typename T::S number) {
  if (p != nullptr) return load_vector<PackOf<T>>(static_cast<const typename T::S*>(p) + at);
  PackOf<T> r;
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) r.v[i] = number;
  return r;
}

// Null a or b: the number.
template <int op, class T>
__global__ void __launch_bounds__(kThreads)
    apply_contiguous(const void* a, const void* b, typename T::S number_a, typename T::S number_b, void* out,
                     std::size_t n, bool packs, Constants<IntegerOf<T>> k) {
  using S = typename T::S;
  using E = typename T::E;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * kBlock<T>;
  if (packs && first + kBlock<T> <= n) {
    PackOf<T> x[kPacks], y[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::size_t at = first + (static_cast<std::size_t>(p) * kThreads + threadIdx.x) * kItems<T>;
      x[p] = load_operand<T>(a, at, number_a);
      y[p] = is_binary(op) ? load_operand<T>(b, at, number_b) : x[p];
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::size_t at = first + (static_cast<std::size_t>(p) * kThreads + threadIdx.x) * kItems<T>;
      store_vector(static_cast<S*>(out) + at, compute<op, T>(x[p], y[p], k));
    }
    return;
  }
  const std::size_t last = first + kBlock<T> < n ? first + kBlock<T> : n;
  for (std::size_t i = first + threadIdx.x; i < last; i += kThreads) {
    const E x = T::get(a == nullptr ? number_a : static_cast<const S*>(a)[i]);
    const E y = !is_binary(op) ? x : T::get(b == nullptr ? number_b : static_cast<const S*>(b)[i]);
    static_cast<S*>(out)[i] = T::put(log_form<op>(x, y, k));
  }
}

// Any strides, any form of the multiplier.

template <class Int> struct GeneralCall {
  int op, ndim;
  std::size_t shape[gpu::kMaxDimensions], n;
  std::ptrdiff_t stride_a[gpu::kMaxDimensions], stride_b[gpu::kMaxDimensions], stride_out[gpu::kMaxDimensions];
  const void *a, *b;
  void* out;
  Form form;
  Constants<Int> k;
  Int table[256];
};

// f(op) with the operation as a constant; of host code and of kernels.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F> FASTOPS_INLINE void with_op(int op, const F& f) {
  switch (op) {
    case FASTOPS_MUL:
      return f(std::integral_constant<int, FASTOPS_MUL>());
    case FASTOPS_DIV:
      return f(std::integral_constant<int, FASTOPS_DIV>());
    case FASTOPS_SQUARE:
      return f(std::integral_constant<int, FASTOPS_SQUARE>());
    case FASTOPS_RECIPROCAL:
      return f(std::integral_constant<int, FASTOPS_RECIPROCAL>());
    case FASTOPS_SQRT:
      return f(std::integral_constant<int, FASTOPS_SQRT>());
    case FASTOPS_RSQRT:
      return f(std::integral_constant<int, FASTOPS_RSQRT>());
    case FASTOPS_LOG2:
      return f(std::integral_constant<int, FASTOPS_LOG2>());
    default:
      return f(std::integral_constant<int, FASTOPS_EXP2>());
  }
}

template <int op, class F, class K> FASTOPS_HD inline F apply_one(F a, F b, const Form& form, const K& k) {
  return full<op>(a, b, form, k);
}

template <class T>
__global__ void __launch_bounds__(kThreads) apply_general(const __grid_constant__ GeneralCall<IntegerOf<T>> call,
                                                          typename T::S number_a, typename T::S number_b) {
  using S = typename T::S;
  using E = typename T::E;
  __shared__ IntegerOf<T> table[256];
  Constants<IntegerOf<T>> k = call.k;
  k.table = table;
  if (k.segment_bits != 0) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) table[i] = call.table[i];
    __syncthreads();
  }
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.n) return;
  std::ptrdiff_t at_a = 0, at_b = 0, at_out = 0;
  std::size_t rest = i;
  for (int d = call.ndim - 1; d >= 0; --d) {
    const std::size_t above = d == 0 ? 0 : rest / call.shape[d];
    const auto index = static_cast<std::ptrdiff_t>(rest - above * call.shape[d]);
    at_a += index * call.stride_a[d];
    at_b += index * call.stride_b[d];
    at_out += index * call.stride_out[d];
    rest = above;
  }
  const E x = T::get(call.a == nullptr ? number_a : static_cast<const S*>(call.a)[at_a]);
  const E y = T::get(call.b == nullptr ? number_b : static_cast<const S*>(call.b)[at_b]);
  E r{};
  with_op(call.op, [&](auto op) { r = apply_one<decltype(op)::value>(x, y, call.form, k); });
  static_cast<S*>(call.out)[at_out] = T::put(r);
}

// Launches.

bool is_contiguous(const gpu::Elementwise& call, const gpu::Operand& x) noexcept {
  return x.data == nullptr || is_dense(call.ndim, call.shape, x.stride);
}
template <class T>
gpu::Status apply(const fastops_mitchell& m, const gpu::Elementwise& call, std::size_t n, gpu::Stream stream) noexcept {
  using E = typename T::E;
  const auto k = constants_of<T>(m, call.dtype);
  const auto number_a = T::put(static_cast<E>(call.a.number)), number_b = T::put(static_cast<E>(call.b.number));
  const bool binary = is_binary(call.op);
  const gpu::Operand& second = binary ? call.b : call.a;
  if (m.params.form == FASTOPS_FORM_LOG && k.segment_bits == 0 && is_contiguous(call, call.a) &&
      is_contiguous(call, second) && is_dense(call.ndim, call.shape, call.stride_out)) {
    const bool packs = is_aligned(call.a.data) && is_aligned(second.data) && is_aligned(call.out);
    const auto blocks = static_cast<unsigned>((n + kBlock<T> - 1) / kBlock<T>);
    with_op(call.op, [&](auto op) {
      const auto kernel = apply_contiguous<decltype(op)::value, T>;
      FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream, call.a.data, second.data, number_a, number_b, call.out, n,
                     packs, k);
    });
    return launched();
  }
  GeneralCall<IntegerOf<T>> general{};
  general.op = call.op;
  general.ndim = call.ndim;
  general.n = n;
  for (int d = 0; d < call.ndim; ++d) {
    general.shape[d] = call.shape[d];
    general.stride_a[d] = call.a.stride[d];
    general.stride_b[d] = second.stride[d];
    general.stride_out[d] = call.stride_out[d];
  }
  general.a = call.a.data;
  general.b = second.data;
  general.out = call.out;
  general.form.params = {m.params.form, m.params.corrections};
  general.k = k;
  if constexpr (sizeof(E) == 4)
    std::memcpy(general.table, m.single[call.dtype].table, sizeof general.table);
  else
    std::memcpy(general.table, m.wide.table, sizeof general.table);
  const auto kernel = apply_general<T>;
  const auto number_second = binary ? number_b : number_a;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, stream, general, number_a,
                 number_second);
  return launched();
}

}  // namespace elementwise_kernels
using namespace elementwise_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

Status mitchell_apply(const fastops_mitchell& m, const Elementwise& call, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  std::size_t n = 1;
  for (int d = 0; d < call.ndim; ++d) n *= call.shape[d];
  if (n == 0) return 0;
  switch (call.dtype) {
    case FASTOPS_F16:
      return level::apply<level::F16>(m, call, n, stream);
    case FASTOPS_BF16:
      return level::apply<level::BF16>(m, call, n, stream);
    case FASTOPS_F32:
      return level::apply<level::F32>(m, call, n, stream);
    default:
      return level::apply<level::F64>(m, call, n, stream);
  }
}

}  // namespace fastops::gpu
