// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic for XLA: broadcast buffers to runs, batches to pointers, one call of the C interface.
#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>

#include "jax/jax_handlers.h"

namespace fastops {
namespace {

using Numbers = ffi::Span<const double>;

// A multiplier by its numbers: form, flush, corrections, mantissa bits, segments, c, table. Made once and kept, as the
// programs that use it are.
const fastops_mitchell* multiplier(Numbers numbers) {
  struct Known {
    std::vector<double> numbers;
    fastops_mitchell* made;
  };
  static std::mutex mutex;
  static std::deque<Known> all;
  thread_local const Known* last = nullptr;
  const auto is = [&](const Known& known) {
    return known.numbers.size() == numbers.size() &&
           std::memcmp(known.numbers.data(), numbers.begin(), numbers.size() * sizeof(double)) == 0;
  };
  if (last != nullptr && is(*last)) return last->made;
  constexpr std::size_t kFields = 6;
  if (numbers.size() < kFields) return nullptr;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = std::find_if(all.begin(), all.end(), is);
  if (found != all.end()) {
    last = &*found;
    return last->made;
  }
  fastops_mitchell_params p{};
  p.form = static_cast<std::int32_t>(numbers[0]);
  p.flush = static_cast<std::int32_t>(numbers[1]);
  p.corrections = static_cast<std::int32_t>(numbers[2]);
  p.mantissa_bits = static_cast<std::int32_t>(numbers[3]);
  p.segments = static_cast<std::int32_t>(numbers[4]);
  p.c = numbers[5];
  if (numbers.size() - kFields > std::size(p.table)) return nullptr;
  std::copy(numbers.begin() + kFields, numbers.end(), p.table);
  fastops_mitchell* made = nullptr;
  if (fastops_mitchell_create(&p, &made) != FASTOPS_OK) return nullptr;
  all.push_back({std::vector<double>(numbers.begin(), numbers.end()), made});
  last = &all.back();
  return made;
}

ffi::Error no_multiplier() { return invalid("fastops: a multiplier that there is none of"); }
ffi::Error no_fit() { return invalid("fastops: buffers that do not fit each other"); }
ffi::Error no_mode() { return invalid("fastops: a mode of gradients that there is none of"); }

bool is_mode(std::int32_t mode) { return mode >= FASTOPS_GRADIENT_EXACT && mode <= FASTOPS_GRADIENT_MIMIC; }

bool alike(int dtype, std::initializer_list<const AnyBuffer*> buffers) {
  return dtype >= 0 &&
         std::all_of(buffers.begin(), buffers.end(), [&](const AnyBuffer* x) { return dtype_of(*x) == dtype; });
}

// One axis after those next to each other that both operands walk alike are one.
struct Axis {
  std::size_t length;
  std::ptrdiff_t a, b;
};

ffi::Error elementwise(AnyBuffer a, AnyBuffer b, Result out, std::int32_t op, Numbers numbers) {
  const int dtype = dtype_of(*out);
  const Dimensions da = a.dimensions(), db = b.dimensions(), dims = out->dimensions();
  if (!alike(dtype, {&a, &b}) || da.size() != dims.size() || db.size() != dims.size()) return no_fit();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  if (out->element_count() == 0) return ffi::Error::Success();

  want_large_pages(*out);
  const auto size = static_cast<std::ptrdiff_t>(item_size(dtype));
  std::vector<Axis> axes;  // the last one first
  std::ptrdiff_t step_a = size, step_b = size;
  for (std::size_t i = dims.size(); i-- > 0;) {
    const auto n = static_cast<std::size_t>(dims[i]);
    if ((da[i] != dims[i] && da[i] != 1) || (db[i] != dims[i] && db[i] != 1)) return no_fit();
    const Axis axis{n, da[i] == 1 ? 0 : step_a, db[i] == 1 ? 0 : step_b};
    step_a *= da[i];
    step_b *= db[i];
    if (n == 1) continue;
    if (!axes.empty()) {
      Axis& inner = axes.back();
      const auto inside = static_cast<std::ptrdiff_t>(inner.length);
      if (axis.a == inner.a * inside && axis.b == inner.b * inside) {
        inner.length *= n;
        continue;
      }
    }
    axes.push_back(axis);
  }
  if (axes.empty()) axes.push_back({1, size, size});

  const Axis run = axes.front();
  const auto* pa = static_cast<const char*>(a.untyped_data());
  const auto* pb = static_cast<const char*>(b.untyped_data());
  auto* po = static_cast<char*>(out->untyped_data());
  std::vector<std::size_t> at(axes.size(), 0);
  for (;;) {
    const fastops_status status =
        fastops_mitchell_apply(m, op == 0 ? FASTOPS_MUL : FASTOPS_DIV, static_cast<fastops_dtype>(dtype), pa, run.a, pb,
                               run.b, po, size, run.length);
    if (status != FASTOPS_OK) return error_of(status);
    po += static_cast<std::ptrdiff_t>(run.length) * size;
    std::size_t i = 1;
    for (; i < axes.size(); ++i) {
      pa += axes[i].a;
      pb += axes[i].b;
      if (++at[i] < axes[i].length) break;
      pa -= axes[i].a * static_cast<std::ptrdiff_t>(axes[i].length);
      pb -= axes[i].b * static_cast<std::ptrdiff_t>(axes[i].length);
      at[i] = 0;
    }
    if (i == axes.size()) return ffi::Error::Success();
  }
}

// Operands alike but for the samples of vmap, the first `samples` axes.
ffi::Error elementwise_grad(AnyBuffer dy, AnyBuffer a, AnyBuffer b, Result da, Result db, std::int32_t op,
                            std::int32_t mode, std::int32_t rank, Numbers numbers) {
  const int dtype = dtype_of(*da);
  const Dimensions dims = da->dimensions();
  if (!alike(dtype, {&dy, &a, &b, &*db}) || dims.size() < static_cast<std::size_t>(rank)) return no_fit();
  if (!is_mode(mode)) return no_mode();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  const std::size_t samples = dims.size() - static_cast<std::size_t>(rank), n = count_from(dims, samples);
  const auto at_dy = parts_of(dy.dimensions(), dims, samples), at_a = parts_of(a.dimensions(), dims, samples);
  const auto at_b = parts_of(b.dimensions(), dims, samples), at_out = parts_of(dims, dims, samples);
  if (at_dy.size() != at_out.size() || at_a.size() != at_out.size() || at_b.size() != at_out.size() ||
      db->element_count() != da->element_count() || count_from(dy.dimensions(), samples) != n ||
      count_from(a.dimensions(), samples) != n || count_from(b.dimensions(), samples) != n)
    return no_fit();
  want_large_pages(*da);
  want_large_pages(*db);
  const std::size_t size = item_size(dtype);
  const auto at = [size](const AnyBuffer& x, std::size_t start) {
    return static_cast<char*>(x.untyped_data()) + start * size;
  };
  for (std::size_t i = 0; i < at_out.size(); ++i) {
    const fastops_status status = fastops_mitchell_grad(
        m, op == 0 ? FASTOPS_MUL : FASTOPS_DIV, static_cast<fastops_gradient>(mode), static_cast<fastops_dtype>(dtype),
        at(a, at_a[i]), at(b, at_b[i]), at(dy, at_dy[i]), at(*da, at_out[i]), at(*db, at_out[i]), n);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

fastops_matrix matrix_of(const AnyBuffer& x) {
  const std::size_t rank = rank_of(x), cols = length(x, rank - 1);
  return {length(x, rank - 2), cols, static_cast<std::ptrdiff_t>(cols), 1};
}

// The matrices of a buffer for every one of a result's.
template <class Pointer> std::vector<Pointer> matrices(const AnyBuffer& x, const AnyBuffer& result, int dtype) {
  std::vector<Pointer> pointers;
  if (rank_of(x) != rank_of(result) || rank_of(x) < 2) return pointers;
  const auto starts = parts_of(x.dimensions(), result.dimensions(), rank_of(x) - 2);
  pointers.reserve(starts.size());
  for (const std::size_t start : starts)
    pointers.push_back(static_cast<char*>(x.untyped_data()) + start * item_size(dtype));
  return pointers;
}

ffi::Error matmul(AnyBuffer a, AnyBuffer b, Result out, Numbers numbers) {
  const int dtype = dtype_of(*out);
  if (!alike(dtype, {&a, &b})) return no_fit();
  const auto pa = matrices<const void*>(a, *out, dtype), pb = matrices<const void*>(b, *out, dtype);
  const auto po = matrices<void*>(*out, *out, dtype);
  if (pa.size() != po.size() || pb.size() != po.size()) return no_fit();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  return error_of(fastops_mitchell_matmul(m, static_cast<fastops_dtype>(dtype), po.size(), pa.data(), matrix_of(a),
                                          pb.data(), matrix_of(b), po.data(), matrix_of(*out), kNoPoll));
}

ffi::Error matmul_grad(AnyBuffer dy, AnyBuffer a, AnyBuffer b, Result da, Result db, std::int32_t mode,
                       Numbers numbers) {
  const int dtype = dtype_of(*da);
  if (!alike(dtype, {&dy, &a, &b, &*db})) return no_fit();
  if (!is_mode(mode)) return no_mode();
  const auto pdy = matrices<const void*>(dy, *da, dtype), pa = matrices<const void*>(a, *da, dtype);
  const auto pb = matrices<const void*>(b, *da, dtype);
  const auto pda = matrices<void*>(*da, *da, dtype), pdb = matrices<void*>(*db, *da, dtype);
  const std::size_t n = pda.size();
  if (pdy.size() != n || pa.size() != n || pb.size() != n || pdb.size() != n ||
      count_from(db->dimensions(), 0) != n * length(*db, rank_of(*db) - 2) * length(*db, rank_of(*db) - 1))
    return no_fit();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  const auto type = static_cast<fastops_dtype>(dtype);
  const auto gradient = static_cast<fastops_gradient>(mode);
  const fastops_status status =
      fastops_mitchell_matmul_grad_a(m, gradient, type, n, pa.data(), matrix_of(a), pb.data(), matrix_of(b), pdy.data(),
                                     matrix_of(dy), pda.data(), matrix_of(*da), kNoPoll);
  if (status != FASTOPS_OK) return error_of(status);
  return error_of(fastops_mitchell_matmul_grad_b(m, gradient, type, n, pa.data(), matrix_of(a), pb.data(), matrix_of(b),
                                                 pdy.data(), matrix_of(dy), pdb.data(), matrix_of(*db), kNoPoll));
}

constexpr std::size_t kImageAxes = 4, kSteps = 7;
using Steps = ffi::Span<const std::int64_t>;

fastops_conv2d shape_of(const AnyBuffer& x, const AnyBuffer& w, Steps steps) {
  const std::size_t i = rank_of(x) - kImageAxes, j = rank_of(w) - kImageAxes;
  const auto step = [&](std::size_t k) { return static_cast<std::size_t>(steps[k]); };
  return {length(x, i),     length(x, i + 1), length(x, i + 2), length(x, i + 3), length(w, j),
          length(w, j + 2), length(w, j + 3), step(0),          step(1),          step(2),
          step(3),          step(4),          step(5),          step(6)};
}

// The length of a result along an axis; 0 where a kernel has no place.
std::size_t conv_length(std::size_t n, std::size_t kernel, std::int64_t stride, std::int64_t padding,
                        std::int64_t dilation) {
  constexpr std::int64_t kMostPadding = std::int64_t{1} << 60;
  if (kernel < 1 || stride < 1 || dilation < 1 || padding < 0 || padding > kMostPadding) return 0;
  const std::size_t padded = n + 2 * static_cast<std::size_t>(padding), step = static_cast<std::size_t>(dilation);
  if (padded == 0 || (kernel > 1 && step > (padded - 1) / (kernel - 1))) return 0;
  return (padded - 1 - step * (kernel - 1)) / static_cast<std::size_t>(stride) + 1;
}

// Whether images, kernels, results and steps are of one convolution: the C interface is told the sizes of x and w
// alone.
bool convolves(const AnyBuffer& x, const AnyBuffer& w, const AnyBuffer& y, Steps steps) {
  const std::size_t i = rank_of(x) - kImageAxes, channels = length(x, i + 1), filters = length(w, i);
  if (steps[6] < 1) return false;
  const auto groups = static_cast<std::size_t>(steps[6]);
  return channels % groups == 0 && filters % groups == 0 && length(w, i + 1) == channels / groups &&
         length(y, i) == length(x, i) && length(y, i + 1) == filters && length(y, i + 2) > 0 && length(y, i + 3) > 0 &&
         length(y, i + 2) == conv_length(length(x, i + 2), length(w, i + 2), steps[0], steps[2], steps[4]) &&
         length(y, i + 3) == conv_length(length(x, i + 3), length(w, i + 3), steps[1], steps[3], steps[5]);
}

bool alike_images(const AnyBuffer& x, const AnyBuffer& y) {
  const Dimensions a = x.dimensions(), b = y.dimensions();
  return std::equal(a.end() - kImageAxes, a.end(), b.end() - kImageAxes);
}

ffi::Error conv2d(AnyBuffer x, AnyBuffer w, Result out, Steps steps, Numbers numbers) {
  const int dtype = dtype_of(*out);
  const std::size_t rank = rank_of(*out);
  if (!alike(dtype, {&x, &w}) || rank < kImageAxes || rank_of(x) != rank || rank_of(w) != rank ||
      steps.size() != kSteps || !convolves(x, w, *out, steps))
    return no_fit();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  const std::size_t samples = rank - kImageAxes, size = item_size(dtype);
  const auto at_x = parts_of(x.dimensions(), out->dimensions(), samples);
  const auto at_w = parts_of(w.dimensions(), out->dimensions(), samples);
  const auto at_out = parts_of(out->dimensions(), out->dimensions(), samples);
  if (at_x.size() != at_out.size() || at_w.size() != at_out.size()) return no_fit();
  fastops_conv2d shape = shape_of(x, w, steps);
  const auto at = [size](const AnyBuffer& y, std::size_t start) {
    return static_cast<char*>(y.untyped_data()) + start * size;
  };
  std::size_t calls = at_out.size();
  if (calls > 1 && count_from(w.dimensions(), 0) == count_from(w.dimensions(), samples) &&
      x.element_count() == calls * count_from(x.dimensions(), samples)) {
    // With kernels in common the samples' images are one batch.
    shape.batch *= calls;
    calls = 1;
  }
  for (std::size_t i = 0; i < calls; ++i) {
    const fastops_status status = fastops_mitchell_conv2d(m, static_cast<fastops_dtype>(dtype), &shape, at(x, at_x[i]),
                                                          at(w, at_w[i]), at(*out, at_out[i]), kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error conv2d_grad(AnyBuffer dy, AnyBuffer x, AnyBuffer w, Result dx, Result dw, std::int32_t mode, Steps steps,
                       Numbers numbers) {
  const int dtype = dtype_of(*dx);
  const std::size_t rank = rank_of(*dx);
  if (!alike(dtype, {&dy, &x, &w, &*dw}) || rank < kImageAxes || rank_of(dy) != rank || rank_of(x) != rank ||
      rank_of(w) != rank || rank_of(*dw) != rank || steps.size() != kSteps || !convolves(x, w, dy, steps) ||
      !alike_images(x, *dx) || !alike_images(w, *dw))
    return no_fit();
  if (!is_mode(mode)) return no_mode();
  const fastops_mitchell* const m = multiplier(numbers);
  if (m == nullptr) return no_multiplier();
  const std::size_t samples = rank - kImageAxes, size = item_size(dtype);
  const Dimensions dims = dx->dimensions();
  const auto at_dy = parts_of(dy.dimensions(), dims, samples), at_x = parts_of(x.dimensions(), dims, samples);
  const auto at_w = parts_of(w.dimensions(), dims, samples), at_dw = parts_of(dw->dimensions(), dims, samples);
  const auto at_dx = parts_of(dims, dims, samples);
  const std::size_t calls = at_dx.size();
  if (at_dy.size() != calls || at_x.size() != calls || at_w.size() != calls || at_dw.size() != calls ||
      dw->element_count() != calls * count_from(dw->dimensions(), samples))
    return no_fit();
  const fastops_conv2d shape = shape_of(x, w, steps);
  const auto at = [size](const AnyBuffer& y, std::size_t start) {
    return static_cast<char*>(y.untyped_data()) + start * size;
  };
  for (std::size_t i = 0; i < calls; ++i) {
    const fastops_status status = fastops_mitchell_conv2d_grad(
        m, static_cast<fastops_gradient>(mode), static_cast<fastops_dtype>(dtype), &shape, at(x, at_x[i]),
        at(w, at_w[i]), at(dy, at_dy[i]), at(*dx, at_dx[i]), at(*dw, at_dw[i]), kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastops

using namespace fastops;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fastops_jax_elementwise, guarded<elementwise>,
    ffi::Ffi::Bind().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Attr<std::int32_t>("op").Attr<Numbers>(
        "multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_elementwise_grad, guarded<elementwise_grad>,
                              ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int32_t>("op")
                                  .Attr<std::int32_t>("mode")
                                  .Attr<std::int32_t>("rank")
                                  .Attr<Numbers>("multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fastops_jax_matmul, guarded<matmul>,
    ffi::Ffi::Bind().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Attr<Numbers>("multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_matmul_grad, guarded<matmul_grad>,
                              ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int32_t>("mode")
                                  .Attr<Numbers>("multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fastops_jax_conv2d, guarded<conv2d>,
    ffi::Ffi::Bind().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Attr<Steps>("steps").Attr<Numbers>(
        "multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_conv2d_grad, guarded<conv2d_grad>,
                              ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int32_t>("mode")
                                  .Attr<Steps>("steps")
                                  .Attr<Numbers>("multiplier"));
