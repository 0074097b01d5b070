// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels of Nystrom attention.
#include "attention/attention_nystrom.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

SoftmaxCall exact_call(const NystromCall& call) noexcept {
  return {false, call.dtype, call.dtype, call.dim, call.values, call.scale, nullptr};
}

// The landmarks of a head, queries' and then keys', where they have no room in its middle.
template <class T> std::size_t landmark_items(const NystromCall& call) noexcept {
  return 2 * call.landmarks * padded<T>(call.dim);
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
  const std::size_t rows = landmark_items<T>(call) + 16, others = pass + (rows > exact ? rows : exact);
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

template <class T>
void means(const NystromCall& call, const NystromHead& head, bool of_queries, std::size_t first, std::size_t last,
           void* landmarks, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  T* const rows = static_cast<T*>(landmarks) + (of_queries ? 0 : landmark_items<T>(call) / 2);
  if (pass.approximates()) pass.means(of_queries, first, last, rows);
}
template <class T>
double prepare(const NystromCall& call, const NystromHead& head, const void* landmarks, void* middle,
               void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  Middle<T> with_rows = middle_at<T>(call, middle);
  T* const given = const_cast<T*>(static_cast<const T*>(landmarks));
  with_rows.q_rows = given != nullptr ? given : parts.take(landmark_items<T>(call));
  with_rows.k_rows = with_rows.q_rows + landmark_items<T>(call) / 2;
  return pass.prepare(with_rows, given != nullptr);
}
template <class T> void invert(const NystromCall& call, const NystromHead& head, void* middle, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T> pass(call, head, parts);
  Parts<T> all(work);  // no rows or logits are needed here
  if (pass.inverts_first()) pass.invert(middle_at<T>(call, middle), all);
}
template <class T>
void absorb(const NystromCall& call, const NystromHead& head, std::size_t first, std::size_t last, const void* middle,
            void* partial, void* work) noexcept {
  Parts<T> parts(work);
  NystromPass<T>(call, head, parts).absorb(first, last, middle_at<T>(call, middle), partial_at<T>(call, partial));
}
template <class T> void merge(const NystromCall& call, void* partial, void* other) noexcept {
  using V = Vector<T>;
  const Partial<T> to = partial_at<T>(call, partial), from = partial_at<T>(call, other);
  const std::size_t vp = padded<T>(call.values);
  T *const f = from.top, *const g = from.sum;  // what the values of each are multiplied by
  for (std::size_t i = 0; i < padded<T>(call.landmarks); i += kWidth<T>) {
    const V one = load<V>(to.top + i), two = load<V>(from.top + i), top = select(one > two, one, two);
    const auto factor = [top](V x) { return select(x == V{} + kLowest<T>, V{}, exp_nonpositive(x - top)); };
    const V of_one = factor(one), of_two = factor(two);
    store(to.top + i, top);
    store(to.sum + i, of_one * load<V>(to.sum + i) + of_two * load<V>(from.sum + i));
    store(f + i, of_one);
    store(g + i, of_two);
  }
  for (std::size_t i = 0; i < call.landmarks; ++i)
    for (std::size_t e = 0; e < vp; e += kWidth<T>)
      store(to.values + i * vp + e, simd::fma(splat<V>(f[i]), load<V>(to.values + i * vp + e),
                                              splat<V>(g[i]) * load<V>(from.values + i * vp + e)));
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
  return {work_items<T>, middle_items<T>, partial_items<T>, landmark_items<T>, means<T>, prepare<T>,
          invert<T>,     absorb<T>,       merge<T>,         solve<T>,          emit<T>};
}

}  // namespace

const NystromKernels kNystromKernels[2] = {kTable<float>(), kTable<double>()};

}  // namespace fastops::FASTOPS_LEVEL
