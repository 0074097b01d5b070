// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels of Nystrom attention.
#include "attention/attention_nystrom.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

SoftmaxCall exact_call(const NystromCall& call) noexcept {
  return {false, call.dtype, call.dtype, call.dim, call.values, call.scale, nullptr};
}

template <class T> std::size_t work_items(const NystromCall& call) noexcept {
  Parts<T> parts(nullptr);
  static constexpr NystromHead head{};
  NystromPass<T>(call, head, parts);
  const std::size_t pass = parts.used(), m = call.landmarks, mp = padded<T>(m);
  // The middle's matrices, in double where steps or the ridge want that; or the exact rows'.
  const std::size_t wide = sizeof(T) == 8 ? 1 : 2;  // elements of T in a double
  const std::size_t md = padded<double>(m), vd = padded<double>(call.values + 1);
  // Z and, with information, two products of it.
  const std::size_t kept = (call.ridge_solve ? 0 : 1) + (call.informs ? 3 : 0);
  std::size_t middle = m * padded<T>(call.values) + kept * m * mp + 8 * 16;
  if (call.ridge_solve)
    middle += wide * (2 * m * md + m * vd + m * (vd > md || !call.informs ? vd : md)) + 4 * 16;
  else if (wide > 1 && call.iterations > kSinglePrecisionSteps)
    middle += wide * (5 * m * md + 2 * m * vd) + 2 * 16;
  else
    middle += 3 * m * mp + 3 * 16;
  const std::size_t exact = kSoftmaxKernels[sizeof(T) == 8].work_items(exact_call(call));
  const std::size_t rows = 2 * (m * padded<T>(call.dim) + 16), others = pass + (rows > exact ? rows : exact);
  return middle > others ? middle : others;
}
template <class T> std::size_t middle_items(const NystromCall& call) noexcept {
  Parts<T> parts(nullptr);
  Middle<T>(call, false, parts);
  return parts.used();
}
template <class T> std::size_t partial_items(const NystromCall& call) noexcept {
  Parts<T> parts(nullptr);
  Partial<T>(call, parts);
  return parts.used();
}
template <class T> Middle<T> middle_at(const NystromCall& call, const void* memory) noexcept {
  Parts<T> parts(const_cast<void*>(memory));
  return Middle<T>(call, false, parts);
}
template <class T> Partial<T> partial_at(const NystromCall& call, const void* memory) noexcept {
  Parts<T> parts(const_cast<void*>(memory));
  return Partial<T>(call, parts);
}

template <class T> double prepare(const NystromCall& call, const NystromHead& head, void* middle, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  Middle<T> with_rows = middle_at<T>(call, middle);
  with_rows.q_rows = parts.take(call.landmarks * padded<T>(call.dim));
  with_rows.k_rows = parts.take(call.landmarks * padded<T>(call.dim));
  return pass.prepare(with_rows);
}
template <class T>
void absorb(const NystromCall& call, const NystromHead& head, std::size_t first, std::size_t last, const void* middle,
            void* partial, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T>(call, head, parts).absorb(first, last, middle_at<T>(call, middle), partial_at<T>(call, partial));
}
template <class T> void merge(const NystromCall& call, void* partial, const void* other) noexcept {
  const Partial<T> to = partial_at<T>(call, partial), from = partial_at<T>(call, other);
  const std::size_t vp = padded<T>(call.values);
  for (std::size_t i = 0; i < call.landmarks; ++i) {
    const T top = to.top[i] > from.top[i] ? to.top[i] : from.top[i];
    const auto factor = [top](T x) { return x == kLowest<T> ? T(0) : exp_nonpositive(splat<Vector<T>>(x - top))[0]; };
    const T f = factor(to.top[i]), g = factor(from.top[i]);
    to.top[i] = top;
    to.sum[i] = f * to.sum[i] + g * from.sum[i];
    for (std::size_t e = 0; e < vp; e += kWidth<T>)
      store(to.values + i * vp + e, simd::fma(splat<Vector<T>>(f), load<Vector<T>>(to.values + i * vp + e),
                                              splat<Vector<T>>(g) * load<Vector<T>>(from.values + i * vp + e)));
  }
}
template <class T>
void solve(const NystromCall& call, const NystromHead& head, void* middle, const void* partial, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  Parts<T> all(work);  // no rows or logits are needed any more
  pass.solve(middle_at<T>(call, middle), partial_at<T>(call, partial), all);
}
template <class T>
void emit(const NystromCall& call, const NystromHead& head, std::size_t first, std::size_t last, const void* middle,
          void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  pass.emit(first, last, middle_at<T>(call, middle), parts.take(0));
}

template <class T> constexpr NystromKernels kTable() {
  return {work_items<T>, middle_items<T>, partial_items<T>, prepare<T>, absorb<T>, merge<T>, solve<T>, emit<T>};
}

}  // namespace

const NystromKernels kNystromKernels[2] = {kTable<float>(), kTable<double>()};

}  // namespace fastops::FASTOPS_LEVEL
