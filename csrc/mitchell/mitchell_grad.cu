// SPDX-License-Identifier: BSD-3-Clause
// Gradients of products and quotients, element by element, on a GPU, and their sums over the axes along which an
// operand was repeated.
#include "mitchell/mitchell_gpu.h"

namespace fastops::FASTOPS_LEVEL {
namespace gradients_kernels {

using namespace mitchell;

// Of the operation and of the multiplier's products; one table after the other in the device's memory, or null.
template <class Int> struct Arithmetic {
  int op;
  fastops_gradient mode;
  Form form;
  Constants<Int> k, k_product;
  const Int* tables;
};
inline constexpr int kTable = 256;

// Contiguous arrays, plain logarithms with one constant.

template <int op, int mode, class T>
__global__ void __launch_bounds__(kThreads)
    grad_contiguous(const void* a, const void* b, const void* dy, void* da, void* db, std::size_t n, bool packs,
                    const __grid_constant__ Arithmetic<IntegerOf<T>> arithmetic) {
  using S = typename T::S;
  const auto one = [&](S x, S y, S g) {
    return gradient<T>(op, static_cast<fastops_gradient>(mode), T::get(x), T::get(y), T::get(g), arithmetic.form,
                       arithmetic.k, arithmetic.k_product);
  };
  constexpr std::size_t kBlock = std::size_t{kThreads} * kItems<T>;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * kBlock;
  if (packs && first + kBlock <= n) {
    const std::size_t at = first + static_cast<std::size_t>(threadIdx.x) * kItems<T>;
    const auto x = load_vector<PackOf<T>>(static_cast<const S*>(a) + at);
    const auto y = load_vector<PackOf<T>>(static_cast<const S*>(b) + at);
    const auto g = load_vector<PackOf<T>>(static_cast<const S*>(dy) + at);
    PackOf<T> r, s;
#pragma unroll
    for (int i = 0; i < kItems<T>; ++i) {
      const auto found = one(x.v[i], y.v[i], g.v[i]);
      r.v[i] = T::put(found.a);
      s.v[i] = T::put(found.b);
    }
    store_vector(static_cast<S*>(da) + at, r);
    store_vector(static_cast<S*>(db) + at, s);
    return;
  }
  const std::size_t last = first + kBlock < n ? first + kBlock : n;
  for (std::size_t i = first + threadIdx.x; i < last; i += kThreads) {
    const auto found = one(static_cast<const S*>(a)[i], static_cast<const S*>(b)[i], static_cast<const S*>(dy)[i]);
    static_cast<S*>(da)[i] = T::put(found.a);
    static_cast<S*>(db)[i] = T::put(found.b);
  }
}

// Any strides, any form of the multiplier.

inline constexpr int kInputs = 3;  // a, b, dy
// Axes by their lengths, the last one fastest, and what a step along them is in each array.
template <int kArrays> struct Axes {
  int ndim;
  std::size_t shape[gpu::kMaxDimensions];
  std::ptrdiff_t stride[kArrays][gpu::kMaxDimensions];

  std::size_t size() const noexcept {
    std::size_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  FASTOPS_DEVICE void place(std::size_t index, std::ptrdiff_t (&at)[kArrays]) const {
    for (int d = ndim - 1; d >= 0; --d) {
      const std::size_t above = d == 0 ? 0 : index / shape[d];
      const auto i = static_cast<std::ptrdiff_t>(index - above * shape[d]);
      for (int k = 0; k < kArrays; ++k) at[k] += i * stride[k][d];
      index = above;
    }
  }
};

// The tables where the kernel reads them; every thread of the block calls.
template <class Int>
FASTOPS_DEVICE void take_tables(const Arithmetic<Int>& arithmetic, Int (&shared)[2 * kTable], Constants<Int>* k,
                                Constants<Int>* k_product) {
  *k = arithmetic.k;
  *k_product = arithmetic.k_product;
  if (arithmetic.tables == nullptr) return;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kTable; i += kThreads) shared[i] = arithmetic.tables[i];
  __syncthreads();
  k->table = shared;
  k_product->table = shared + kTable;
}

template <class Int> struct GeneralCall {
  Arithmetic<Int> arithmetic;
  Axes<kInputs + 2> axes;
  std::size_t n;
  const void *a, *b, *dy;
  void *da, *db;  // null where it is summed
};
template <class T>
__global__ void __launch_bounds__(kThreads) grad_general(const __grid_constant__ GeneralCall<IntegerOf<T>> call) {
  using S = typename T::S;
  __shared__ IntegerOf<T> tables[2 * kTable];
  Constants<IntegerOf<T>> k, k_product;
  take_tables(call.arithmetic, tables, &k, &k_product);
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.n) return;
  std::ptrdiff_t at[kInputs + 2] = {};
  call.axes.place(i, at);
  const auto found = gradient<T>(call.arithmetic.op, call.arithmetic.mode, T::get(static_cast<const S*>(call.a)[at[0]]),
                                 T::get(static_cast<const S*>(call.b)[at[1]]),
                                 T::get(static_cast<const S*>(call.dy)[at[2]]), call.arithmetic.form, k, k_product);
  if (call.da != nullptr) static_cast<S*>(call.da)[at[3]] = T::put(found.a);
  if (call.db != nullptr) static_cast<S*>(call.db)[at[4]] = T::put(found.b);
}

// Sums. A block takes `across` elements of the result, whose threads lie side by side, and a part of what is summed;
// where there are several parts, a second kernel adds their sums. The order of a sum depends on the shapes alone.

template <class Int> struct SumCall {
  Arithmetic<Int> arithmetic;
  Axes<kInputs + 1> kept;
  Axes<kInputs> summed;
  std::size_t elements, terms, parts, part;  // part: terms of one
  int across;                                // a power of two
  bool second;
  const void *a, *b, *dy;
  void* out;
  void* sums;  // [part][element], of what the dtype is computed in
};
template <class T>
__global__ void __launch_bounds__(kThreads) grad_sum(const __grid_constant__ SumCall<IntegerOf<T>> call) {
  using S = typename T::S;
  using E = typename T::E;
  __shared__ IntegerOf<T> tables[2 * kTable];
  __shared__ E partial[kThreads];
  Constants<IntegerOf<T>> k, k_product;
  take_tables(call.arithmetic, tables, &k, &k_product);
  const int t = static_cast<int>(threadIdx.x), lanes = kThreads / call.across;
  const std::size_t part = blockIdx.x % call.parts;
  const std::size_t element = blockIdx.x / call.parts * call.across + t % call.across;
  const std::size_t first = part * call.part;
  const std::size_t last = first + call.part < call.terms ? first + call.part : call.terms;
  std::ptrdiff_t base[kInputs + 1] = {};
  E sum{};
  if (element < call.elements) {
    call.kept.place(element, base);
    for (std::size_t i = first + t / call.across; i < last; i += lanes) {
      std::ptrdiff_t at[kInputs] = {base[0], base[1], base[2]};
      call.summed.place(i, at);
      const auto found =
          gradient<T>(call.arithmetic.op, call.arithmetic.mode, T::get(static_cast<const S*>(call.a)[at[0]]),
                      T::get(static_cast<const S*>(call.b)[at[1]]), T::get(static_cast<const S*>(call.dy)[at[2]]),
                      call.arithmetic.form, k, k_product);
      // Each gradient is rounded to the dtype, as on the CPU.
      sum += T::get(T::put(call.second ? found.b : found.a));
    }
  }
  partial[t] = sum;
  __syncthreads();
  for (int step = lanes / 2; step != 0; step /= 2) {
    if (t / call.across < step) partial[t] += partial[t + step * call.across];
    __syncthreads();
  }
  if (t >= call.across || element >= call.elements) return;
  if (call.parts == 1)
    static_cast<S*>(call.out)[base[3]] = T::put(partial[t]);
  else
    static_cast<E*>(call.sums)[part * call.elements + element] = partial[t];
}
template <class T>
__global__ void __launch_bounds__(kThreads) grad_add(const __grid_constant__ SumCall<IntegerOf<T>> call) {
  using E = typename T::E;
  const std::size_t element = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= call.elements) return;
  std::ptrdiff_t at[kInputs + 1] = {};
  call.kept.place(element, at);
  E sum{};
  for (std::size_t part = 0; part < call.parts; ++part)
    sum += static_cast<const E*>(call.sums)[part * call.elements + element];
  static_cast<typename T::S*>(call.out)[at[3]] = T::put(sum);
}

// Launches.

bool is_summed(const gpu::ElementwiseGradient& call, const gpu::Strided& x, int d) noexcept {
  return x.stride[d] == 0 && call.shape[d] != 1;
}
bool is_summed(const gpu::ElementwiseGradient& call, const gpu::Strided& x) noexcept {
  for (int d = 0; d < call.ndim; ++d)
    if (is_summed(call, x, d)) return true;
  return false;
}

// How a sum is cut up.
struct Cut {
  std::size_t elements = 1, terms = 1, parts, part, blocks;
  int across = 1;
};
Cut cut_of(const gpu::ElementwiseGradient& call, const gpu::Strided& x) noexcept {
  Cut cut;
  for (int d = 0; d < call.ndim; ++d) (is_summed(call, x, d) ? cut.terms : cut.elements) *= call.shape[d];
  // Threads run along the axis whose elements lie together.
  if (call.ndim != 0 && !is_summed(call, x, call.ndim - 1))
    while (cut.across < 32 && static_cast<std::size_t>(cut.across) < cut.elements) cut.across *= 2;
  const std::size_t across = static_cast<std::size_t>(cut.across);
  const std::size_t groups = cut.elements / across + (cut.elements % across != 0 ? 1 : 0);
  // Enough blocks for a large GPU, eight terms a thread at least.
  constexpr std::size_t kEnough = 1024, kTerms = 8;
  const std::size_t least = kThreads / across * kTerms;
  cut.parts = groups == 0 || groups >= kEnough ? 1 : kEnough / groups;
  if (cut.parts > cut.terms / least) cut.parts = cut.terms < least ? 1 : cut.terms / least;
  cut.part = (cut.terms + cut.parts - 1) / cut.parts;
  cut.blocks = groups * cut.parts;
  return cut;
}

std::size_t sums_of(const gpu::ElementwiseGradient& call, const gpu::Strided& x) noexcept {
  if (!is_summed(call, x)) return 0;
  const Cut cut = cut_of(call, x);
  return cut.parts == 1 ? 0 : cut.parts * cut.elements * (call.dtype == FASTOPS_F64 ? 8 : 4);
}
std::size_t tables_of(const fastops_mitchell& m, const gpu::ElementwiseGradient& call) noexcept {
  return m.params.segments == 0 ? 0 : 2 * kTable * (call.dtype == FASTOPS_F64 ? 8 : 4);
}

template <class Int, class Axis> void add_axis(Axis* axes, const gpu::ElementwiseGradient& call, int d) noexcept {
  axes->shape[axes->ndim] = call.shape[d];
  const gpu::Strided* const arrays[] = {&call.a, &call.b, &call.dy};
  for (int k = 0; k < kInputs; ++k) axes->stride[k][axes->ndim] = arrays[k]->stride[d];
  ++axes->ndim;
}

template <class T>
gpu::Status sum(const Arithmetic<IntegerOf<T>>& arithmetic, const gpu::ElementwiseGradient& call, const gpu::Strided& x,
                void* sums, gpu::Stream stream) noexcept {
  const Cut cut = cut_of(call, x);
  if (cut.elements == 0) return 0;
  SumCall<IntegerOf<T>> sum{};
  sum.arithmetic = arithmetic;
  for (int d = 0; d < call.ndim; ++d) {
    if (is_summed(call, x, d)) {
      add_axis<IntegerOf<T>>(&sum.summed, call, d);
    } else {
      sum.kept.stride[kInputs][sum.kept.ndim] = x.stride[d];
      add_axis<IntegerOf<T>>(&sum.kept, call, d);
    }
  }
  sum.elements = cut.elements;
  sum.terms = cut.terms;
  sum.parts = cut.parts;
  sum.part = cut.part;
  sum.across = cut.across;
  sum.second = &x == &call.db;
  sum.a = call.a.data;
  sum.b = call.b.data;
  sum.dy = call.dy.data;
  sum.out = const_cast<void*>(x.data);
  sum.sums = sums;
  const auto kernel = grad_sum<T>;
  FASTOPS_LAUNCH(kernel, static_cast<unsigned>(cut.blocks), kThreads, 0, stream, sum);
  if (cut.parts != 1) {
    const auto add = grad_add<T>;
    FASTOPS_LAUNCH(add, static_cast<unsigned>((cut.elements + kThreads - 1) / kThreads), kThreads, 0, stream, sum);
  }
  return launched();
}

// f(op, mode) as constants.
template <class F> void with_gradient(int op, fastops_gradient mode, const F& f) {
  const auto with_mode = [&](auto chosen) {
    switch (mode) {
      case FASTOPS_GRADIENT_EXACT:
        return f(chosen, std::integral_constant<int, FASTOPS_GRADIENT_EXACT>());
      case FASTOPS_GRADIENT_STE:
        return f(chosen, std::integral_constant<int, FASTOPS_GRADIENT_STE>());
      default:
        return f(chosen, std::integral_constant<int, FASTOPS_GRADIENT_MIMIC>());
    }
  };
  if (op == FASTOPS_MUL)
    with_mode(std::integral_constant<int, FASTOPS_MUL>());
  else
    with_mode(std::integral_constant<int, FASTOPS_DIV>());
}

template <class T>
gpu::Status differentiate(const fastops_mitchell& m, const fastops_mitchell& product,
                          const gpu::ElementwiseGradient& call, char* workspace, gpu::Stream stream) noexcept {
  using Int = IntegerOf<T>;
  Arithmetic<Int> arithmetic{};
  arithmetic.op = call.op;
  arithmetic.mode = call.mode;
  arithmetic.form.params = {m.params.form, m.params.corrections};
  arithmetic.k = constants_of<T>(m, call.dtype);
  arithmetic.k_product = constants_of<T>(product, call.dtype);
  if (const std::size_t size = tables_of(m, call); size != 0) {
    Int tables[2 * kTable];
    int at = 0;
    for (const fastops_mitchell* each : {&m, &product})
      for (int i = 0; i < kTable; ++i, ++at) {
        if constexpr (sizeof(Int) == 4)
          tables[at] = each->single[call.dtype].table[i];
        else
          tables[at] = each->wide.table[i];
      }
    const gpu::Status status = gpu::upload(workspace, tables, sizeof tables, stream);
    if (status != 0) return status;
    arithmetic.tables = reinterpret_cast<const Int*>(workspace);
    workspace += size;
  }
  const bool sums_a = is_summed(call, call.da), sums_b = is_summed(call, call.db);
  if (!sums_a || !sums_b) {
    std::size_t n = 1;
    bool contiguous = !sums_a && !sums_b, aligned = true;
    for (int d = 0; d < call.ndim; ++d) n *= call.shape[d];
    for (const gpu::Strided* x : {&call.a, &call.b, &call.dy, &call.da, &call.db}) {
      contiguous = contiguous && is_dense(call.ndim, call.shape, x->stride);
      aligned = aligned && is_aligned(x->data);
    }
    if (n == 0) {
    } else if (contiguous && m.params.form == FASTOPS_FORM_LOG && arithmetic.tables == nullptr) {
      constexpr std::size_t kBlock = std::size_t{kThreads} * kItems<T>;
      with_gradient(call.op, call.mode, [&](auto op, auto mode) {
        const auto kernel = grad_contiguous<decltype(op)::value, decltype(mode)::value, T>;
        FASTOPS_LAUNCH(kernel, static_cast<unsigned>((n + kBlock - 1) / kBlock), kThreads, 0, stream, call.a.data,
                       call.b.data, call.dy.data, const_cast<void*>(call.da.data), const_cast<void*>(call.db.data), n,
                       aligned, arithmetic);
      });
    } else {
      GeneralCall<Int> general{};
      general.arithmetic = arithmetic;
      for (int d = 0; d < call.ndim; ++d) {
        general.axes.stride[kInputs][d] = call.da.stride[d];
        general.axes.stride[kInputs + 1][d] = call.db.stride[d];
        add_axis<Int>(&general.axes, call, d);
      }
      general.n = n;
      general.a = call.a.data;
      general.b = call.b.data;
      general.dy = call.dy.data;
      general.da = sums_a ? nullptr : const_cast<void*>(call.da.data);
      general.db = sums_b ? nullptr : const_cast<void*>(call.db.data);
      const auto kernel = grad_general<T>;
      FASTOPS_LAUNCH(kernel, static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, stream, general);
    }
    const gpu::Status status = launched();
    if (status != 0) return status;
  }
  for (const gpu::Strided* x : {&call.da, &call.db}) {
    if (!is_summed(call, *x)) continue;
    const gpu::Status status = sum<T>(arithmetic, call, *x, workspace, stream);
    if (status != 0) return status;
    workspace += sums_of(call, *x);
  }
  return 0;
}

}  // namespace gradients_kernels
using namespace gradients_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

std::size_t mitchell_gradient_workspace(const fastops_mitchell& m, const ElementwiseGradient& call) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  return level::tables_of(m, call) + level::sums_of(call, call.da) + level::sums_of(call, call.db);
}

Status mitchell_gradient(const fastops_mitchell& m, const fastops_mitchell& product, const ElementwiseGradient& call,
                         void* workspace, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  char* const memory = static_cast<char*>(workspace);
  switch (call.dtype) {
    case FASTOPS_F16:
      return level::differentiate<level::F16>(m, product, call, memory, stream);
    case FASTOPS_BF16:
      return level::differentiate<level::BF16>(m, product, call, memory, stream);
    case FASTOPS_F32:
      return level::differentiate<level::F32>(m, product, call, memory, stream);
    default:
      return level::differentiate<level::F64>(m, product, call, memory, stream);
  }
}

}  // namespace fastops::gpu
