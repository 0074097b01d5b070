// SPDX-License-Identifier: BSD-3-Clause
// Exact softmax attention of a block of queries over all keys, streamed: the logits of a block of keys lie transposed,
// a key a row, so that maxima and sums run down the lanes and neither K nor V is packed (Milakov and Gimelshein 2018;
// Dao et al. 2022).
#include "attention/attention_kernels.h"
#include "attention/attention_math.h"
#include "attention/attention_tile.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

constexpr std::size_t kKeys = 96;  // of a block: its logits, K and V stay in the nearest caches

template <class T> struct Sizes {
  std::size_t dim, values;
  Sizes(const SoftmaxCall& call) : dim(padded<T>(call.dim)), values(padded<T>(call.values)) {}
};

template <class T> std::size_t work_items(const SoftmaxCall& call) noexcept {
  const Sizes<T> size(call);
  return kSoftmaxRows * (call.dim + size.dim + size.values + kKeys + 4) + kKeys * (size.dim + size.values) + 16;
}

template <class T> bool finite(const T* x, std::size_t n) noexcept {
  Vector<T> sum{};
  for (std::size_t i = 0; i < n; i += kWidth<T>) sum += load<Vector<T>>(x + i) * T(0);
  return !simd::any(sum != sum);
}

template <class T> void run(const SoftmaxCall& call, const SoftmaxHead& head, void* work) noexcept {
  using V = Vector<T>;
  constexpr std::size_t W = kWidth<T>;
  const Sizes<T> size(call);
  const auto stride = [](std::size_t n) { return static_cast<std::ptrdiff_t>(n); };
  auto* base = static_cast<T*>(work);
  const auto take = [&base](std::size_t n) {
    T* const part = base;
    base += n;
    return part;
  };
  T* const out = take(kSoftmaxRows * size.values);
  T* const logits = take(kKeys * kSoftmaxRows);
  T* const top = take(kSoftmaxRows);
  T* const sum = take(kSoftmaxRows);
  T* const keep = take(kSoftmaxRows);
  T* const k = take(kKeys * size.dim);
  T* const v = take(kKeys * size.values);
  T* const qt = take(call.dim * kSoftmaxRows);
  T* const row = take(size.dim);

  const std::size_t rows = head.last - head.first, cols = padded<T>(rows);
  for (std::size_t i = 0; i < call.dim * kSoftmaxRows; ++i) qt[i] = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    read_row<T>(call.dtype, row_at(call.dtype, head.q.data, head.q.row, head.first + i), call.dim, row);
    T scale = static_cast<T>(call.scale);
    if (head.factor != nullptr) scale *= static_cast<const T*>(head.factor)[stride(head.first + i) * head.factor_step];
    for (std::size_t d = 0; d < call.dim; ++d) qt[d * kSoftmaxRows + i] = row[d] * scale;
  }
  constexpr T kLeast = -__builtin_huge_val();
  for (std::size_t i = 0; i < kSoftmaxRows; ++i) {
    top[i] = kLeast;
    sum[i] = 0;
  }
  for (std::size_t i = 0; i < rows * size.values; ++i) out[i] = 0;

  // Causal: query i sees the keys j <= i + keys - queries.
  const auto shift = stride(head.keys) - stride(head.queries);
  const auto seen = [&](std::size_t i) {
    if (!call.causal) return stride(head.keys);
    const std::ptrdiff_t last = stride(i) + shift + 1;
    return last < 0 ? 0 : last;
  };
  const auto end = static_cast<std::size_t>(rows == 0 ? 0 : seen(head.last - 1));
  for (std::size_t first = 0; first < end; first += kKeys) {
    if (first / kKeys % 16 == 0 && call.stop != nullptr && call.stop->asked(call.stop->context, head.worker)) return;
    std::size_t n = 0;  // live keys of the block, close together
    std::size_t number[kKeys];
    const std::size_t last = end - first < kKeys ? end : first + kKeys;
    for (std::size_t j = first; j < last; ++j) {
      if (head.mask != nullptr && head.mask[stride(j) * head.mask_step] == 0) continue;
      read_row<T>(call.dtype, row_at(call.dtype, head.k.data, head.k.row, j), call.dim, k + n * size.dim);
      read_row<T>(call.dtype, row_at(call.dtype, head.v.data, head.v.row, j), call.values, v + n * size.values);
      number[n++] = j;
    }
    if (n == 0) continue;
    product<T>(n, cols, Term<T>{k, stride(size.dim), 1, qt, stride(kSoftmaxRows), call.dim},
               {logits, stride(kSoftmaxRows)});
    bool hidden = false;
    for (std::size_t j = 0; j < n && call.causal; ++j)
      for (std::size_t i = 0; i < rows && stride(number[j]) >= seen(head.first + i); ++i) {
        logits[j * kSoftmaxRows + i] = kLeast;
        hidden = true;
      }
    bool rises = false;
    for (std::size_t i = 0; i < cols; i += W) {
      const V before = load<V>(top + i);
      V most = before;
      for (std::size_t j = 0; j < n; ++j) {
        const V x = load<V>(logits + j * kSoftmaxRows + i);
        most = select(x > most, x, most);
      }
      // Where nothing is seen yet the largest is -inf, and so is every logit: 0 in its place gives exp(-inf) = 0.
      const V base_of = select(most == kLeast, V{}, most);
      const V kept = exp_nonpositive(before - base_of);
      V total{};
      for (std::size_t j = 0; j < n; ++j) {
        T* const at = logits + j * kSoftmaxRows + i;
        const V e = exp_nonpositive(load<V>(at) - base_of);
        total += e;
        store(at, e);
      }
      store(top + i, most);
      store(keep + i, kept);
      store(sum + i, simd::fma(load<V>(sum + i), kept, total));
      rises |= simd::any(kept != V{} + T(1));
    }
    // Where a row does not see all of the keys, an infinite value would reach it, since 0 times inf is nan.
    if (hidden && !finite(v, n * size.values)) {
      for (std::size_t i = 0; i < rows; ++i) {
        std::size_t live = n;
        while (live > 0 && stride(number[live - 1]) >= seen(head.first + i)) --live;
        T* const to = out + i * size.values;
        product<T>(1, size.values, Term<T>{logits + i, 1, stride(kSoftmaxRows), v, stride(size.values), live},
                   {to, stride(size.values), keep + i, 0});
      }
      continue;
    }
    const T one = 1;
    product<T>(rows, size.values, Term<T>{logits, 1, stride(kSoftmaxRows), v, stride(size.values), n},
               {out, stride(size.values), rises ? keep : &one, rises ? 1 : 0});
  }
  for (std::size_t i = 0; i < rows; ++i) {
    const T factor = sum[i] == 0 ? T(0) : T(1) / sum[i];
    T* const from = out + i * size.values;
    for (std::size_t e = 0; e < size.values; e += W) store(from + e, load<V>(from + e) * factor);
    write_row<T>(call.out_dtype, from, call.values,
                 const_cast<char*>(row_at(call.out_dtype, head.out.data, head.out.row, head.first + i)));
  }
}

}  // namespace

const SoftmaxKernels kSoftmaxKernels[2] = {{work_items<float>, run<float>}, {work_items<double>, run<double>}};

}  // namespace fastops::FASTOPS_LEVEL
