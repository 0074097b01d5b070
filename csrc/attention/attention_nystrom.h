// SPDX-License-Identifier: BSD-3-Clause
// Nystrom attention of one head: P1 = softmax(s Q Kt^T), A = softmax(s Qt Kt^T), B = softmax(s Qt K^T) V, out = P1 Z B,
// where Z stands for the inverse of A (Xiong et al. 2021) and Qt, Kt are means of segments. Neither P1 nor softmax(s Qt
// K^T) is ever whole: the first in blocks of queries, the second transposed in blocks of keys.
#ifndef FASTOPS_ATTENTION_ATTENTION_NYSTROM_H
#define FASTOPS_ATTENTION_ATTENTION_NYSTROM_H

#include "attention/attention_kernels.h"
#include "attention/attention_math.h"
#include "attention/attention_tile.h"

namespace fastops::FASTOPS_LEVEL::attention {

inline constexpr std::size_t kBlock = kNystromBlock;
static_assert(kBlock <= kSoftmaxRows);  // exact rows go to that kernel
// More steps than this need float64 for the matrices between landmarks.
inline constexpr std::size_t kSinglePrecisionSteps = 8;

// A head's matrices between landmarks; rows padded to vectors. Where attention is exact there is nothing in it.
template <class T> struct Middle {
  T* flags;                  // [0]: 1 where landmarks stand for the sample
  T *q_rows, *k_rows;        // landmarks x dim; without room of their own where they are not kept
  T *q_columns, *k_columns;  // dim x landmarks, times the scale
  T *a, *w, *u;              // landmarks x landmarks, landmarks x values, landmarks

  Middle(const NystromCall& call, bool keeps_rows, Parts<T>& parts)
      : flags(parts.take(1)),
        q_rows(parts.take(keeps_rows ? call.landmarks * padded<T>(call.dim) : 0)),
        k_rows(parts.take(keeps_rows ? call.landmarks * padded<T>(call.dim) : 0)),
        q_columns(parts.take(call.dim * padded<T>(call.landmarks))),
        k_columns(parts.take(call.dim * padded<T>(call.landmarks))),
        a(parts.take(call.landmarks * padded<T>(call.landmarks))),
        w(parts.take(call.landmarks * padded<T>(call.values))),
        u(parts.take(padded<T>(call.landmarks))) {}
};

// Part of softmax(s Qt K^T) V: the largest logit and the sum of exponentials of every landmark, and the sum of values.
template <class T> struct Partial {
  T *top, *sum, *values;
  Partial(const NystromCall& call, Parts<T>& parts)
      : top(parts.take(padded<T>(call.landmarks))),
        sum(parts.take(padded<T>(call.landmarks))),
        values(parts.take(call.landmarks * padded<T>(call.values))) {}
};

template <class T> constexpr T kLowest = -static_cast<T>(__builtin_huge_val());

template <class T> void add_to_diagonal(T* x, T value, std::size_t m) noexcept {
  for (std::size_t i = 0; i < m; ++i) x[i * padded<T>(m) + i] += value;
}
// Steps of `work` multiply-adds each until the next question whether to stop, some milliseconds, in multiples of
// `whole`. Of the register tile it can be more at once.
inline constexpr std::size_t kTilesWork = std::size_t{1} << 27, kMemorysWork = std::size_t{1} << 23;
inline std::size_t steps_at_once(std::size_t most, std::size_t work, std::size_t whole) noexcept {
  return most / (work + 1) / whole * whole + whole;
}
// to = factor from^T; matrices of m x m.
template <class U> void turned(const U* from, U factor, std::size_t m, U* to) noexcept {
  constexpr std::size_t kLine = 64 / sizeof(U);
  const std::size_t mp = padded<U>(m);
  for (std::size_t i = 0; i < m; i += kLine)
    for (std::size_t j = 0; j < mp; ++j)
      for (std::size_t r = i; r < m && r < i + kLine; ++r) to[r * mp + j] = j < m ? factor * from[j * mp + r] : U(0);
}
// c = [c +] a b of matrices of m x m, unless `stopped`; element (i, k) of a at a[i * a_row + k * a_step].
template <class T, class F>
void multiply(const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_step, const T* b, std::size_t m, T* c, bool adds,
              F stopped) noexcept {
  const auto mp = static_cast<std::ptrdiff_t>(padded<T>(m));
  const T one = 1;
  const std::size_t rows = steps_at_once(kTilesWork, m * m, kChunk);
  for (std::size_t i = 0; i < m; i += rows) {
    if (m > rows && stopped()) return;
    const auto row = static_cast<std::ptrdiff_t>(i);
    product<T>(m - i < rows ? m - i : rows, padded<T>(m), Term<T>{a + row * a_row, a_row, a_step, b, mp, m},
               {c + row * mp, mp, adds ? &one : nullptr, 0});
  }
}
template <class T, class F> void multiply(const T* a, const T* b, std::size_t m, T* c, F stopped) noexcept {
  multiply(a, static_cast<std::ptrdiff_t>(padded<T>(m)), 1, b, m, c, false, stopped);
}
// The same where the product is symmetric: below the tiles at the diagonal it is that above, mirrored.
template <class T, class F>
void symmetric_multiply(const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_step, const T* b, std::size_t m, T* c,
                        F stopped) noexcept {
  constexpr std::size_t kPanel = kTileVectors * kWidth<T>;
  const std::size_t mp = padded<T>(m), columns_at_once = steps_at_once(kTilesWork, m * m, kPanel);
  const auto step = static_cast<std::ptrdiff_t>(mp);
  for (std::size_t j = 0; j < m; j += kPanel) {
    if (m > columns_at_once && j % columns_at_once == 0 && stopped()) return;
    product<T>(m - j < kPanel ? m : j + kPanel, mp - j < kPanel ? mp - j : kPanel,
               Term<T>{a, a_row, a_step, b + j, step, m}, {c + j, step});
    const std::size_t columns = m - j < kPanel ? m - j : kPanel, whole = columns / kWidth<T> * kWidth<T>;
    transpose(c + j, mp, j, whole, c + j * mp, mp);
    for (std::size_t i = whole; i < columns; ++i)
      for (std::size_t r = 0; r < j; ++r) c[(j + i) * mp + r] = c[r * mp + j + i];
  }
}
// The largest lane, in pairs as sum_lanes; nan where one is or not.
template <class T, class V> FASTOPS_INLINE T most_of_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    using Half = typename simd::LaneType<T, sizeof(V) / 2>::type;
    Half half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return most_of_lanes<T>(select(half[0] > half[1], half[0], half[1]));
  }
}
// Rows of weights from rows of logits; the columns from `m` on get none. With `inverses` the weights still have to be
// multiplied by those.
template <class T> void softmax_rows(T* s, std::size_t rows, std::size_t m, T* inverses = nullptr) noexcept {
  using V = Vector<T>;
  const std::size_t mp = padded<T>(m);
  for (std::size_t r = 0; r < rows; ++r, s += mp) {
    for (std::size_t j = m; j < mp; ++j) s[j] = kLowest<T>;
    V most = splat<V>(kLowest<T>);
    for (std::size_t j = 0; j < mp; j += kWidth<T>) {
      const V x = load<V>(s + j);
      most = select(x > most, x, most);
    }
    const T top = most_of_lanes<T>(most);
    V sum{};
    for (std::size_t j = 0; j < mp; j += kWidth<T>) {
      const V e = exp_nonpositive(load<V>(s + j) - top);
      sum += e;
      store(s + j, e);
    }
    const T inverse = T(1) / sum_lanes<T>(sum);
    if (inverses != nullptr) {
      inverses[r] = inverse;
      continue;
    }
    for (std::size_t j = 0; j < mp; j += kWidth<T>) store(s + j, load<V>(s + j) * inverse);
  }
}
// The largest column sum and row sum of |a|, and where they are.
template <class T> struct Norms {
  T column, row;
  std::size_t column_at, row_at;
};
template <class T> Norms<T> norms(const T* a, std::size_t m) noexcept {
  const std::size_t mp = padded<T>(m);
  Norms<T> n{0, 0, 0, 0};
  for (std::size_t j = 0; j < m; j += kWidth<T>) {
    Vector<T> sums{};
    for (std::size_t i = 0; i < m; ++i) sums += load<Vector<T>>(a + i * mp + j);
    for (std::size_t k = 0; k < kWidth<T> && j + k < m; ++k)
      if (!(sums[k] <= n.column)) n.column = sums[k], n.column_at = j + k;
  }
  // Several rows at a time: each sum waits for its last addition.
  constexpr std::size_t kRows = 8;
  for (std::size_t i = 0; i < m; i += kRows) {
    T sums[kRows] = {};
    if (m - i >= kRows) {
      for (std::size_t j = 0; j < m; ++j)
        for (std::size_t r = 0; r < kRows; ++r) sums[r] += a[(i + r) * mp + j];
    } else {
      for (std::size_t r = 0; i + r < m; ++r)
        for (std::size_t j = 0; j < m; ++j) sums[r] += a[(i + r) * mp + j];
    }
    for (std::size_t r = 0; r < kRows && i + r < m; ++r)
      if (!(sums[r] <= n.row)) n.row = sums[r], n.row_at = i + r;
  }
  return n;
}
// With more steps than this only X P is halved, see there.
inline constexpr std::size_t kSymmetricSteps = 6;
// The steps of Newton's method of third order from z, of which every one but the last is left in z_steps where it is
// not null (steps + 1 matrices). x, t, u: room of a matrix each. Before each it asks `stopped`.
// X = A Z and its polynomials are symmetric, as Z begins as a multiple of A^T, and their products can be halved. But
// rounding then no longer corrects itself: halved in all steps, the result's error is 2 to 6 times as large; in all but
// the last two of six, and X P in all, it is the same.
template <class U, class F>
void newton(const U* a, U* z, std::size_t m, std::size_t steps, U* x, U* t, U* u, U* z_steps, F stopped) noexcept {
  const std::size_t items = m * padded<U>(m);
  const auto row = static_cast<std::ptrdiff_t>(padded<U>(m));
  for (std::size_t i = 0; i < steps && !stopped(); ++i) {
    const bool early = steps <= kSymmetricSteps && i + 2 < steps;
    const auto times = [&](const U* l, const U* r, U* c) {
      if (early)
        symmetric_multiply(l, row, 1, r, m, c, stopped);
      else
        multiply(l, r, m, c, stopped);
    };
    if (z_steps != nullptr) __builtin_memcpy(z_steps + i * items, z, items * sizeof(U));
    // -Z (13 - X (15 - X (7 - X))) = Z (X (15 + X (X - 7)) - 13)
    times(a, z, x);
    __builtin_memcpy(t, x, items * sizeof(U));
    add_to_diagonal(t, U(-7), m);
    symmetric_multiply(x, row, 1, t, m, u, stopped);
    add_to_diagonal(u, U(15), m);
    times(x, u, t);
    add_to_diagonal(t, U(-13), m);
    multiply(z, t, m, u, stopped);
    for (std::size_t j = 0; j < items; j += kWidth<U>) store(z + j, load<Vector<U>>(u + j) * U(-0.25));
  }
}
template <class To, class From> void convert(const From* from, std::size_t rows, std::size_t cols, To* to) noexcept {
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < padded<To>(cols); ++j)
      to[i * padded<To>(cols) + j] = j < cols ? static_cast<To>(from[i * padded<From>(cols) + j]) : To(0);
}

// g = U^T U, U in its place, unless `stopped`.
template <class F> void factorize(double* g, std::size_t m, F stopped) noexcept {
  const std::size_t mp = padded<double>(m);
  const std::size_t steps = steps_at_once(kMemorysWork, m * m, 1);
  for (std::size_t k = 0; k < m; ++k) {
    if (m > steps && k % steps == 0 && stopped()) return;
    double* const row = g + k * mp;
    const std::size_t first = k / kWidth<double> * kWidth<double>;
    const double root = __builtin_sqrt(row[k]);
    for (std::size_t j = first; j < mp; j += kWidth<double>) store(row + j, load<simd::f64>(row + j) / root);
    row[k] = root;
    for (std::size_t i = k + 1; i < m; ++i) {
      const simd::f64 f = splat<simd::f64>(-row[i]);
      double* const to = g + i * mp;
      for (std::size_t j = i / kWidth<double> * kWidth<double>; j < mp; j += kWidth<double>)
        store(to + j, simd::fma(f, load<simd::f64>(row + j), load<simd::f64>(to + j)));
    }
  }
}
// b = (U^T U)^-1 b, b of m rows of `cols` (whole vectors), unless `stopped`.
template <class F>
void solve_factorized(const double* g, std::size_t m, double* b, std::size_t cols, F stopped) noexcept {
  const std::size_t mp = padded<double>(m), steps = steps_at_once(kMemorysWork, m * cols, 1);
  const auto reduce = [&](std::size_t from, std::size_t to, double factor) {
    for (std::size_t j = 0; j < cols; j += kWidth<double>)
      store(b + to * cols + j, simd::fma(splat<simd::f64>(-factor), load<simd::f64>(b + from * cols + j),
                                         load<simd::f64>(b + to * cols + j)));
  };
  for (std::size_t k = 0; k < m; ++k) {
    if (m > steps && k % steps == 0 && stopped()) return;
    scale_row(b + k * cols, cols, 1 / g[k * mp + k]);
    for (std::size_t i = k + 1; i < m; ++i) reduce(k, i, g[k * mp + i]);
  }
  for (std::size_t k = m; k-- > 0;) {
    if (m > steps && k % steps == 0 && stopped()) return;
    scale_row(b + k * cols, cols, 1 / g[k * mp + k]);
    for (std::size_t i = 0; i < k; ++i) reduce(k, i, g[i * mp + k]);
  }
}

template <class T> class NystromPass {
 protected:
  using V = Vector<T>;
  static constexpr std::size_t W = kWidth<T>;
  static constexpr fastops_dtype kWorking = sizeof(T) == 8 ? FASTOPS_F64 : FASTOPS_F32;

 public:
  NystromPass(const NystromCall& call, const NystromHead& head, Parts<T>& parts)
      : call_(call),
        head_(head),
        m_(call.landmarks),
        mp_(padded<T>(call.landmarks)),
        dp_(padded<T>(call.dim)),
        vp_(padded<T>(call.values)),
        x_copy_(parts.take(kBlock * dp_)),
        v_copy_(parts.take((kBlock + call.taps) * vp_)),
        logits_(parts.take(kBlock * (mp_ > kBlock ? mp_ : kBlock))),
        o_(parts.take(kBlock * vp_)),
        keep_(parts.take(mp_ + kBlock)) {}

  // Rows of the arrays.
  bool seen(std::size_t t) const noexcept {
    return head_.mask == nullptr || head_.mask[static_cast<std::ptrdiff_t>(t) * head_.mask_step] != 0;
  }
  bool query_seen(std::size_t t) const noexcept { return !head_.mask_queries || seen(t); }
  std::size_t count(std::size_t n, bool of_queries) const noexcept {
    if (head_.mask == nullptr || (of_queries && !head_.mask_queries)) return n;
    std::size_t found = 0;
    for (std::size_t t = 0; t < n; ++t) found += seen(t);
    return found;
  }
  const char* row(const Rows& rows, std::size_t t) const noexcept {
    return row_at(call_.dtype, rows.data, rows.row, t);
  }
  // Where landmarks stand for the sample: there are more rows than landmarks, or landmarks are given.
  bool approximates() const noexcept {
    return head_.q_landmarks != nullptr || (count(head_.queries, true) > m_ && count(head_.keys, false) > m_);
  }

  // Walks over the rows that are there by balanced segments: the first m - n mod m have n / m rows, the others one
  // more.
  class Segments {
   public:
    Segments(std::size_t there, std::size_t m) noexcept : length_(there / m), longer_(m - there % m) {
      left_ = length();
    }
    std::size_t segment() const noexcept { return segment_; }
    std::size_t length() const noexcept { return length_ + (segment_ >= longer_ ? 1 : 0); }
    void next() noexcept {
      if (--left_ == 0) go_to(segment_ + 1);
    }
    void go_to(std::size_t segment) noexcept {
      segment_ = segment;
      left_ = length();
    }
    // The rows before the segment.
    std::size_t before() const noexcept { return segment_ * length_ + (segment_ > longer_ ? segment_ - longer_ : 0); }

   private:
    std::size_t length_, longer_, segment_ = 0, left_;
  };
  // The landmarks first .. last, of all in `to`: means of segments, or those that are given.
  void means(bool of_queries, std::size_t first, std::size_t last, T* to) noexcept {
    const Rows& rows = of_queries ? head_.q : head_.k;
    const std::size_t n = of_queries ? head_.queries : head_.keys;
    const auto* const given = static_cast<const T*>(of_queries ? head_.q_landmarks : head_.k_landmarks);
    if (given != nullptr) {
      for (std::size_t i = first; i < last; ++i) read_row<T>(kWorking, given + i * call_.dim, call_.dim, to + i * dp_);
      return;
    }
    fill<T>(to + first * dp_, (last - first) * dp_, 0);
    const bool plain = is_plain<T>(call_.dtype, call_.dim), masked = head_.mask != nullptr;
    Segments at_row(count(n, of_queries), m_);
    at_row.go_to(first);
    Segments mean = at_row;
    std::size_t skipped = masked ? at_row.before() : 0;
    for (std::size_t t = masked ? 0 : at_row.before(); at_row.segment() < last; ++t) {
      if (t % 4096 == 0 && stopped()) return;
      if (!(of_queries ? query_seen(t) : seen(t))) continue;
      if (skipped > 0) {
        --skipped;
        continue;
      }
      const T* x = reinterpret_cast<const T*>(row(rows, t));
      if (!plain) read_row<T>(call_.dtype, row(rows, t), call_.dim, x_copy_), x = x_copy_;
      T* const sum = to + at_row.segment() * dp_;
      for (std::size_t d = 0; d < dp_; d += W) store(sum + d, load<V>(sum + d) + load<V>(x + d));
      at_row.next();
    }
    for (; mean.segment() < last; mean.go_to(mean.segment() + 1))
      scale_row(to + mean.segment() * dp_, dp_, T(1) / static_cast<T>(mean.length()));
  }
  void columns(const T* rows, T* to) const noexcept {
    const T scale = static_cast<T>(call_.scale);
    fill<T>(to, call_.dim * mp_, 0);
    for (std::size_t i = 0; i < m_; ++i)
      for (std::size_t d = 0; d < call_.dim; ++d) to[d * mp_ + i] = scale * rows[i * dp_ + d];
  }

  // With the landmarks in the rows of `middle`, which are made here or were before.
  double prepare(const Middle<T>& middle, bool has_means) noexcept {
    middle.flags[0] = approximates() ? 1 : 0;
    if (middle.flags[0] == 0) return 0;
    if (!has_means) {
      means(true, 0, m_, middle.q_rows);
      means(false, 0, m_, middle.k_rows);
    }
    columns(middle.q_rows, middle.q_columns);
    columns(middle.k_rows, middle.k_columns);
    product<T>(m_, mp_, Term<T>{middle.q_rows, at(dp_), 1, middle.k_columns, at(mp_), call_.dim}, {middle.a, at(mp_)});
    softmax_rows(middle.a, m_, m_);
    return product_of(norms(middle.a, m_));
  }

  // Keys t .. of a block that are there, close together, and their values; how many, and from where the next block
  // begins.
  struct Keys {
    Block<T> k, v;
    std::size_t count, next;
  };
  Keys take_keys(std::size_t t, std::size_t last) noexcept {
    std::size_t next = t, n = 0;
    if (head_.mask == nullptr) {
      n = last - t < kBlock ? last - t : kBlock;
      next = t + n;
      fetch_rows(call_.dtype, head_.k.data, head_.k.row, next, next + n < last ? next + n : last, call_.dim);
      fetch_rows(call_.dtype, head_.v.data, head_.v.row, next, next + n < last ? next + n : last, call_.values);
      return {block(head_.k, t, n, call_.dim, x_copy_), block(head_.v, t, n, call_.values, v_copy_), n, next};
    }
    for (; next < last && n < kBlock; ++next) {
      if (!seen(next)) continue;
      read_row<T>(call_.dtype, row(head_.k, next), call_.dim, x_copy_ + n * dp_);
      read_row<T>(call_.dtype, row(head_.v, next), call_.values, v_copy_ + n * vp_);
      number_[n++] = next;
    }
    return {{x_copy_, at(dp_)}, {v_copy_, at(vp_)}, n, next};
  }
  std::size_t number(std::size_t first, std::size_t i) const noexcept {
    return head_.mask == nullptr ? first + i : number_[i];
  }
  Block<T> block(const Rows& rows, std::size_t t, std::size_t n, std::size_t width, T* copy) const noexcept {
    if (is_plain<T>(call_.dtype, width)) return {reinterpret_cast<const T*>(row(rows, t)), rows.row};
    for (std::size_t i = 0; i < n; ++i) read_row<T>(call_.dtype, row(rows, t + i), width, copy + i * padded<T>(width));
    return {copy, at(padded<T>(width))};
  }

  // Queries that are masked are zeros: 0 times what they hold could be nan.
  Block<T> query_block(std::size_t i, std::size_t n) const noexcept {
    if (!head_.mask_queries) return block(head_.q, i, n, call_.dim, x_copy_);
    for (std::size_t r = 0; r < n; ++r)
      if (query_seen(i + r))
        read_row<T>(call_.dtype, row(head_.q, i + r), call_.dim, x_copy_ + r * dp_);
      else
        fill<T>(x_copy_ + r * dp_, dp_, 0);
    return {x_copy_, at(dp_)};
  }

  void clear(const Partial<T>& partial) const noexcept {
    fill(partial.top, mp_, kLowest<T>);
    fill<T>(partial.sum, mp_, 0);
    fill<T>(partial.values, m_ * vp_, 0);
  }
  void absorb(std::size_t first, std::size_t last, const Middle<T>& middle, const Partial<T>& partial) noexcept {
    clear(partial);
    for (std::size_t t = first; t < last;) {
      if (stopped()) return;
      const Keys keys = take_keys(t, last);
      t = keys.next;
      if (keys.count == 0) continue;
      key_logits(keys, middle);
      bool rises = false;
      for (std::size_t i = 0; i < mp_; i += W) {
        const V before = load<V>(partial.top + i);
        V most = before;
        for (std::size_t j = 0; j < keys.count; ++j) {
          const V x = load<V>(logits_ + j * mp_ + i);
          most = select(x > most, x, most);
        }
        const V kept = exp_nonpositive(before - most);
        V total{};
        for (std::size_t j = 0; j < keys.count; ++j) {
          const V e = exp_nonpositive(load<V>(logits_ + j * mp_ + i) - most);
          total += e;
          store(logits_ + j * mp_ + i, e);
        }
        store(partial.top + i, most);
        store(keep_ + i, kept);
        store(partial.sum + i, simd::fma(load<V>(partial.sum + i), kept, total));
        rises |= simd::any(kept != V{} + T(1));
      }
      const T one = 1;
      product<T>(m_, vp_, Term<T>{logits_, 1, at(mp_), keys.v.data, keys.v.step, keys.count},
                 {partial.values, at(vp_), rises ? keep_ : &one, rises ? 1 : 0});
    }
  }
  // Logits of a block of keys, a key a row.
  void key_logits(const Keys& keys, const Middle<T>& middle) noexcept {
    product<T>(keys.count, mp_, Term<T>{keys.k.data, keys.k.step, 1, middle.q_columns, at(mp_), call_.dim},
               {logits_, at(mp_)});
  }

  // Whether Newton's steps can be taken before B is there: Z then has the room of A, which nothing needs any more.
  bool inverts_first() const noexcept {
    return !call_.ridge_solve && !call_.informs && (sizeof(T) == 8 || call_.iterations <= kSinglePrecisionSteps);
  }
  void invert(const Middle<T>& middle, Parts<T>& parts) noexcept {
    if (stopped()) return;
    T* const z = parts.take(m_ * mp_);
    newton_steps(middle, start(norms(middle.a, m_)), z, parts);
    __builtin_memcpy(middle.a, z, m_ * mp_ * sizeof(T));
  }
  static double product_of(const Norms<T>& n) noexcept {
    return static_cast<double>(n.column) * static_cast<double>(n.row);
  }
  double start(const Norms<T>& n) const noexcept {
    return call_.coefficient > 0 ? call_.coefficient : 1 / product_of(n);
  }
  void newton_steps(const Middle<T>& middle, double c, T* z, Parts<T>& parts) noexcept {
    turned(middle.a, static_cast<T>(c), m_, z);
    T* const x = parts.take(m_ * mp_);
    T* const t = parts.take(m_ * mp_);
    T* const u = parts.take(m_ * mp_);
    steps<T>(middle.a, z, x, t, u);
  }
  // The middle: W = Z B and u = Z 1, or 0 where there is no key: the sums of no weights. After invert() where that is
  // to come first.
  void solve(const Middle<T>& middle, const Partial<T>& partial, Parts<T>& parts) noexcept {
    if (stopped()) return;
    T* const b = parts.take(m_ * vp_);
    sums_over_keys(partial, b);
    if (inverts_first()) return apply(middle.a, b, middle, partial);
    const Norms<T> n = norms(middle.a, m_);
    const double c = start(n);
    T* const z = parts.take(call_.ridge_solve && !call_.informs ? 0 : m_ * mp_);
    if (call_.ridge_solve) {
      ridge(middle, b, ones_of(partial), product_of(n), z, parts);
    } else if (sizeof(T) == 4 && call_.iterations > kSinglePrecisionSteps) {
      many_steps(middle, b, ones_of(partial), c, z, parts);
    } else {
      newton_steps(middle, c, z, parts);
      apply(z, b, middle, partial);
    }
    if (head_.info == nullptr) return;
    auto* const info = static_cast<T*>(head_.info);
    info[1] = static_cast<T>(c);
    T* const az = parts.take(m_ * mp_);
    T* const aza = parts.take(m_ * mp_);
    const auto stops = [this] { return stopped(); };
    multiply(middle.a, z, m_, az, stops);
    multiply(az, middle.a, m_, aza, stops);
    double off = 0, size = 0;
    for (std::size_t i = 0; i < m_; ++i)
      for (std::size_t j = 0; j < m_; ++j) {
        const double a = static_cast<double>(middle.a[i * mp_ + j]);
        off += (static_cast<double>(aza[i * mp_ + j]) - a) * (static_cast<double>(aza[i * mp_ + j]) - a);
        size += a * a;
      }
    info[0] = static_cast<T>(__builtin_sqrt(off / size));
  }
  void apply(const T* z, const T* b, const Middle<T>& middle, const Partial<T>& partial) const noexcept {
    product<T>(m_, vp_, Term<T>{z, at(mp_), 1, b, at(vp_), m_}, {middle.w, at(vp_)});
    for (std::size_t i = 0; i < m_; ++i) {
      V sum{};
      for (std::size_t j = 0; j < mp_; j += W) sum += load<V>(z + i * mp_ + j);
      middle.u[i] = ones_of(partial) * sum_lanes<T>(sum);
    }
    for (std::size_t i = m_; i < mp_; ++i) middle.u[i] = 0;
  }
  // Sums of the rows of softmax(s Qt K^T).
  static T ones_of(const Partial<T>& partial) noexcept { return partial.sum[0] == 0 ? T(0) : T(1); }
  // B = softmax(s Qt K^T) V; zeros where there is no key.
  void sums_over_keys(const Partial<T>& partial, T* b) const noexcept {
    for (std::size_t i = 0; i < m_; ++i) {
      const T inverse = partial.sum[i] == 0 ? T(0) : T(1) / partial.sum[i];
      for (std::size_t e = 0; e < vp_; e += W) store(b + i * vp_ + e, load<V>(partial.values + i * vp_ + e) * inverse);
    }
  }
  // B and, beside it, `ones`, in rows of double.
  void with_ones(const T* b, T ones, double* wide) const noexcept {
    const std::size_t vd = padded<double>(call_.values + 1);
    fill<double>(wide, m_ * vd, 0);
    for (std::size_t i = 0; i < m_; ++i) {
      for (std::size_t e = 0; e < call_.values; ++e) wide[i * vd + e] = static_cast<double>(b[i * vp_ + e]);
      wide[i * vd + call_.values] = static_cast<double>(ones);
    }
  }
  void take_apart(const double* both, const Middle<T>& middle) const noexcept {
    const std::size_t vd = padded<double>(call_.values + 1);
    for (std::size_t i = 0; i < m_; ++i) {
      for (std::size_t e = 0; e < vp_; ++e)
        middle.w[i * vp_ + e] = e < call_.values ? static_cast<T>(both[i * vd + e]) : T(0);
      middle.u[i] = static_cast<T>(both[i * vd + call_.values]);
    }
    for (std::size_t i = m_; i < mp_; ++i) middle.u[i] = 0;
  }
  // Newton's steps in double, up to W and u: their sums cancel.
  void many_steps(const Middle<T>& middle, const T* b, T ones, double c, T* z, Parts<T>& parts) noexcept {
    constexpr std::size_t kTwo = sizeof(T) == 8 ? 1 : 2;  // elements of T in a double
    const std::size_t md = padded<double>(m_), items = m_ * md, vd = padded<double>(call_.values + 1);
    double* const a = reinterpret_cast<double*>(parts.take(kTwo * 5 * items));
    double* const both = reinterpret_cast<double*>(parts.take(kTwo * 2 * m_ * vd));
    convert<double>(middle.a, m_, m_, a);
    turned(a, c, m_, a + items);
    steps<double>(a, a + items, a + 2 * items, a + 3 * items, a + 4 * items);
    with_ones(b, ones, both);
    product<double>(m_, vd, Term<double>{a + items, at(md), 1, both, at(vd), m_}, {both + m_ * vd, at(vd)});
    take_apart(both + m_ * vd, middle);
    convert<T>(a + items, m_, m_, z);
  }
  template <class U> void steps(const U* a, U* z, U* x, U* t, U* u) noexcept {
    newton<U>(a, z, m_, call_.iterations, x, t, u, nullptr, [this] { return stopped(); });
  }
  // (A^T A + ridge c I)^-1 A^T, in double, times B and 1; all of it in z where information is asked for.
  void ridge(const Middle<T>& middle, const T* b, T ones, double product_of_norms, T* z, Parts<T>& parts) noexcept {
    constexpr std::size_t kTwo = sizeof(T) == 8 ? 1 : 2;  // elements of T in a double
    const std::size_t md = padded<double>(m_), vd = padded<double>(call_.values + 1);
    double* const a = reinterpret_cast<double*>(parts.take(kTwo * m_ * md));
    double* const g = reinterpret_cast<double*>(parts.take(kTwo * m_ * md));
    double* const wide = reinterpret_cast<double*>(parts.take(kTwo * m_ * vd));
    double* const right = reinterpret_cast<double*>(parts.take(kTwo * m_ * (vd > md || !call_.informs ? vd : md)));
    normal_matrix(middle.a, product_of_norms, a, g);
    with_ones(b, ones, wide);
    product<double>(m_, vd, Term<double>{a, 1, at(md), wide, at(vd), m_}, {right, at(vd)});
    const auto stops = [this] { return stopped(); };
    solve_factorized(g, m_, right, vd, stops);
    take_apart(right, middle);
    if (head_.info == nullptr) return;
    turned(a, 1.0, m_, right);
    solve_factorized(g, m_, right, md, stops);
    convert<T>(right, m_, m_, z);
  }
  // a = A in double, g the factor of A^T A + ridge c I.
  void normal_matrix(const T* from, double product_of_norms, double* a, double* g) const noexcept {
    const std::size_t md = padded<double>(m_);
    convert<double>(from, m_, m_, a);
    const auto stops = [this] { return stopped(); };
    symmetric_multiply(a, 1, at(md), a, m_, g, stops);
    add_to_diagonal(g, call_.ridge * product_of_norms, m_);
    factorize(g, m_, stops);
  }

  void emit(std::size_t first, std::size_t last, const Middle<T>& middle, void* softmax_work) noexcept {
    auto* const info = static_cast<T*>(head_.info);
    if (info != nullptr && first == 0) {
      const bool exact = middle.flags[0] == 0, none = exact || count(head_.queries, true) == 0;
      const T nothing = static_cast<T>(__builtin_nan(""));
      if (exact) info[0] = info[1] = nothing;
      info[2] = none ? nothing : -kLowest<T>;
      info[3] = none ? nothing : kLowest<T>;
    }
    for (std::size_t i = first; i < last; i += kBlock) {
      if (stopped()) return;
      const std::size_t n = last - i < kBlock ? last - i : kBlock;
      if (middle.flags[0] != 0)
        landmark_rows(i, n, middle, info);
      else
        exact_rows(i, n, softmax_work);
      finish(i, n);
    }
  }

 protected:
  static std::ptrdiff_t at(std::size_t n) { return static_cast<std::ptrdiff_t>(n); }
  bool stopped() const noexcept {
    return call_.stop != nullptr && call_.stop->asked(call_.stop->context, head_.worker);
  }

  // P1 of the queries i .. i + n in logits_, each row's still to be multiplied by that of `inverses` where there are.
  Block<T> query_weights(std::size_t i, std::size_t n, const Middle<T>& middle, T* inverses) noexcept {
    const Block<T> q = query_block(i, n);
    product<T>(n, mp_, Term<T>{q.data, q.step, 1, middle.k_columns, at(mp_), call_.dim}, {logits_, at(mp_)});
    softmax_rows(logits_, n, m_, inverses);
    return q;
  }
  void landmark_rows(std::size_t i, std::size_t n, const Middle<T>& middle, T* info) noexcept {
    query_weights(i, n, middle, keep_);
    const std::size_t end = i + n + kBlock < head_.queries ? i + n + kBlock : head_.queries;
    fetch_rows(call_.dtype, head_.q.data, head_.q.row, i + n, end, call_.dim);
    const Target<T> target{o_, at(vp_), nullptr, 0, keep_};
    if (call_.normalize || info != nullptr) {
      for (std::size_t r = 0; r < n; ++r) {
        const T whole = dot(logits_ + r * mp_, middle.u, mp_), sum = whole * keep_[r];
        if (call_.normalize) keep_[r] = whole == 0 ? T(0) : T(1) / whole;
        if (info == nullptr || !query_seen(i + r)) continue;
        if (info[2] == info[2] && !(info[2] <= sum)) info[2] = sum;
        if (info[3] == info[3] && !(info[3] >= sum)) info[3] = sum;
      }
    }
    product<T>(n, vp_, Term<T>{logits_, at(mp_), 1, middle.w, at(vp_), m_}, target);
  }
  void exact_rows(std::size_t i, std::size_t n, void* work) noexcept {
    const SoftmaxCall call{false, call_.dtype, kWorking, call_.dim, call_.values, call_.scale, call_.stop};
    SoftmaxHead head{};
    head.q = {row(head_.q, i), head_.q.row};
    head.k = head_.k;
    head.v = head_.v;
    head.queries = head.last = n;
    head.keys = head_.keys;
    head.mask = head_.mask;
    head.mask_step = head_.mask_step;
    head.worker = head_.worker;
    head.out = {o_, at(vp_)};
    kSoftmaxKernels[sizeof(T) == 8].run(call, head, work);
    for (std::size_t r = 0; r < n; ++r)
      for (std::size_t e = call_.values; e < vp_; ++e) o_[r * vp_ + e] = 0;
  }
  // The convolution, zeros for masked queries, and the rounding.
  void finish(std::size_t i, std::size_t n) noexcept {
    if (head_.conv != nullptr) {
      values_around(i, n);
      const auto* const weights = static_cast<const T*>(head_.conv);
      for (std::size_t r = 0; r < n; ++r)
        for (std::size_t e = 0; e < vp_; e += W) {
          V sum = load<V>(o_ + r * vp_ + e);
          for (std::size_t t = 0; t < call_.taps; ++t)
            sum = simd::fma(splat<V>(weights[t]), load<V>(v_copy_ + (r + t) * vp_ + e), sum);
          store(o_ + r * vp_ + e, sum);
        }
    }
    for (std::size_t r = 0; r < n; ++r) {
      if (!query_seen(i + r)) fill<T>(o_ + r * vp_, vp_, 0);
      write_row<T>(call_.dtype, o_ + r * vp_, call_.values, const_cast<char*>(row(head_.out, i + r)));
    }
  }
  // The values from taps / 2 before row i on, zeros outside of the array and where they are masked, in v_copy_.
  void values_around(std::size_t i, std::size_t n) noexcept {
    const std::size_t half = call_.taps / 2;
    for (std::size_t r = 0; r < n + call_.taps - 1; ++r) {
      T* const to = v_copy_ + r * vp_;
      if (i + r < half || i + r - half >= head_.keys || !seen(i + r - half))
        fill<T>(to, vp_, 0);
      else
        read_row<T>(call_.dtype, row(head_.v, i + r - half), call_.values, to);
    }
  }

  const NystromCall& call_;
  const NystromHead& head_;
  const std::size_t m_, mp_, dp_, vp_;
  T *const x_copy_, *const v_copy_, *const logits_, *const o_, *const keep_;
  std::size_t number_[kBlock];
};

}  // namespace fastops::FASTOPS_LEVEL::attention
#endif
