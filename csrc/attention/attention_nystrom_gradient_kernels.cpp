// SPDX-License-Identifier: BSD-3-Clause
// The gradient of Nystrom attention: a pass over the queries, the matrices between landmarks (every step of Newton's
// method and the coefficient it starts from, or the closed form of the ridge), a pass over the keys, and the means
// spread over their segments.
#include "attention/attention_nystrom.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

// to += factor from.
template <class T> void add_row(T* to, const T* from, std::size_t n, T factor) noexcept {
  const Vector<T> f = splat<Vector<T>>(factor);
  for (std::size_t i = 0; i < n; i += kWidth<T>)
    store(to + i, simd::fma(f, load<Vector<T>>(from + i), load<Vector<T>>(to + i)));
}
// Rows of d(logits) from weights and d(weights): p (dp - sum(p dp)), times the scale, in place of dp.
template <class T> void softmax_rows_gradient(const T* p, T* dp, std::size_t rows, std::size_t cols, T scale) noexcept {
  for (std::size_t r = 0; r < rows; ++r, p += cols, dp += cols) {
    const T sum = dot(p, dp, cols);
    for (std::size_t j = 0; j < cols; j += kWidth<T>)
      store(dp + j, load<Vector<T>>(p + j) * (load<Vector<T>>(dp + j) - sum) * scale);
  }
}

// The middle in type U: from dW and du to dB and dA.
template <class U> struct MiddleGradient {
  using V = Vector<U>;
  const std::size_t m, mp, columns;  // columns: of W with u beside it, padded
  U *a, *b, *w, *dw, *db, *da;       // b, w, dw, db: landmarks x columns
  U *z, *steps, *x, *p, *q, *t, *dz, *dx, *dq, *at, *zt;

  MiddleGradient(const NystromCall& call, Parts<U>& parts)
      : m(call.landmarks),
        mp(padded<U>(call.landmarks)),
        columns(padded<U>(call.values + 1)),
        a(parts.take(m * mp)),
        b(parts.take(m * columns)),
        w(parts.take(m * columns)),
        dw(parts.take(m * columns)),
        db(parts.take(m * columns)),
        da(parts.take(m * mp)),
        z(parts.take(m * mp)),
        steps(parts.take(call.ridge_solve ? 0 : (call.iterations + 1) * m * mp)),
        x(parts.take(m * mp)),
        p(parts.take(m * mp)),
        q(parts.take(m * mp)),
        t(parts.take(m * mp)),
        dz(parts.take(m * mp)),
        dx(parts.take(m * mp)),
        dq(parts.take(m * mp)),
        at(parts.take((m > columns ? m : columns) * (mp > columns ? mp : columns))),
        zt(parts.take(mp * (mp > columns ? mp : columns))) {}

  static std::ptrdiff_t step(std::size_t n) { return static_cast<std::ptrdiff_t>(n); }
  // c [+]= f(l) r, f transposing where it says so; matrices of m x m.
  template <class F> void times(const U* l, bool l_transposed, const U* r, U* c, bool adds, F stopped) const noexcept {
    multiply(l, l_transposed ? 1 : step(mp), l_transposed ? step(mp) : 1, r, m, c, adds, stopped);
  }
  // c (m x m) [+]= l r^T of rows of `columns`.
  void outer(const U* l, const U* r, U* c, bool adds) noexcept {
    const U one = 1;
    fill<U>(zt, columns * mp, 0);
    for (std::size_t i = 0; i < m; ++i)
      for (std::size_t e = 0; e < columns; ++e) zt[e * mp + i] = r[i * columns + e];
    product<U>(m, mp, Term<U>{l, step(columns), 1, zt, step(mp), columns}, {c, step(mp), adds ? &one : nullptr, 0});
  }
  void add(U* to, const U* from, U factor) const noexcept { add_row(to, from, m * mp, factor); }
  void spread(const Norms<U>& n, U d_column, U d_row) const noexcept {
    for (std::size_t i = 0; i < m; ++i) da[i * mp + n.column_at] += d_column;
    for (std::size_t j = 0; j < m; ++j) da[n.row_at * mp + j] += d_row;
  }

  template <class F> void newton_forward(const NystromCall& call, F stopped) noexcept {
    const Norms<U> n = norms(a, m);
    const U c = call.coefficient > 0 ? static_cast<U>(call.coefficient) : U(1) / (n.column * n.row);
    turned(a, c, m, z);
    newton<U>(a, z, m, call.iterations, x, t, p, steps, stopped);
    __builtin_memcpy(steps + call.iterations * m * mp, z, m * mp * sizeof(U));
    product<U>(m, columns, Term<U>{z, step(mp), 1, b, step(columns), m}, {w, step(columns)});
  }
  void newton_values_backward() noexcept {
    product<U>(m, columns, Term<U>{z, 1, step(mp), dw, step(columns), m}, {db, step(columns)});
  }
  template <class F> void newton_backward(const NystromCall& call, F stopped) noexcept {
    const std::size_t items = m * mp;
    outer(dw, b, dz, false);
    fill<U>(da, items, 0);
    for (std::size_t i = call.iterations; i-- > 0 && !stopped();) {
      const U* const before = steps + i * items;
      // Z' = Z R / 4, R = 13 - X Q, Q = 15 - X P, P = 7 - X, X = A Z. All but Z are symmetric; p, q and r have the
      // signs -P, Q and -R.
      symmetric_multiply(a, step(mp), 1, before, m, x, stopped);
      __builtin_memcpy(p, x, items * sizeof(U));
      add_to_diagonal(p, U(-7), m);
      symmetric_multiply(x, step(mp), 1, p, m, q, stopped);
      add_to_diagonal(q, U(15), m);
      U* const r = zt;
      symmetric_multiply(x, step(mp), 1, q, m, r, stopped);
      add_to_diagonal(r, U(-13), m);
      // dR = Z^T dZ' / 4; dZ = dZ' R / 4.
      U* const dr = at;
      times(before, true, dz, dr, false, stopped);
      for (std::size_t j = 0; j < m; ++j) scale_row(dr + j * mp, mp, U(0.25));
      times(dz, false, r, t, false, stopped);
      for (std::size_t j = 0; j < items; j += kWidth<U>) store(dz + j, load<V>(t + j) * U(-0.25));
      // dX = -dR Q - dQ P - dP, dQ = -X dR, dP = -X dQ. dq holds -dQ.
      times(x, false, dr, dq, false, stopped);
      times(dr, false, q, dx, false, stopped);
      times(dq, false, p, dx, true, stopped);
      times(x, false, dq, dx, true, stopped);
      for (std::size_t j = 0; j < items; j += kWidth<U>) store(dx + j, -load<V>(dx + j));
      // dA += dX Z^T; dZ += A^T dX.
      turned(before, U(1), m, zt);
      times(dx, false, zt, da, true, stopped);
      times(a, true, dx, dz, true, stopped);
    }
    const Norms<U> n = norms(a, m);
    const U c = call.coefficient > 0 ? static_cast<U>(call.coefficient) : U(1) / (n.column * n.row);
    turned(dz, U(1), m, zt);
    add(da, zt, c);
    if (call.coefficient > 0) return;
    const U dc = dot(zt, a, items);
    spread(n, -dc * c / n.column, -dc * c / n.row);
  }

  // double alone: G = A^T A + ridge c I, W = G^-1 A^T B.
  template <class F> void ridge_forward(const NystromCall& call, F stopped) noexcept {
    const Norms<U> n = norms(a, m);
    symmetric_multiply(a, 1, step(mp), a, m, x, stopped);
    add_to_diagonal(x, static_cast<U>(call.ridge) * n.column * n.row, m);
    if constexpr (sizeof(U) == 8) {
      factorize(x, m, stopped);
      product<U>(m, columns, Term<U>{a, 1, step(mp), b, step(columns), m}, {w, step(columns)});
      solve_factorized(x, m, w, columns, stopped);
    }
  }
  // With R = A^T B: dR = G^-1 dW (in the place of dW), dG = -dR W^T, dB = A dR, dA = B dR^T + A (dG + dG^T) and the
  // norms' share.
  template <class F> void ridge_values_backward(F stopped) noexcept {
    if constexpr (sizeof(U) == 8) solve_factorized(x, m, dw, columns, stopped);
    product<U>(m, columns, Term<U>{a, step(mp), 1, dw, step(columns), m}, {db, step(columns)});
  }
  template <class F> void ridge_backward(const NystromCall& call, F stopped) noexcept {
    outer(b, dw, da, false);
    outer(dw, w, t, false);
    U trace = 0;
    for (std::size_t i = 0; i < m; ++i) trace -= t[i * mp + i];
    turned(t, U(1), m, q);
    for (std::size_t j = 0; j < m * mp; j += kWidth<U>) store(t + j, -(load<V>(t + j) + load<V>(q + j)));
    times(a, false, t, da, true, stopped);
    const Norms<U> n = norms(a, m);
    const U dc = static_cast<U>(call.ridge) * trace;
    spread(n, dc * n.row, dc * n.column);
  }
};

template <class T> class GradientPass : public NystromPass<T> {
  using Base = NystromPass<T>;
  using V = Vector<T>;
  using Base::call_, Base::head_, Base::m_, Base::mp_, Base::dp_, Base::vp_, Base::logits_, Base::o_, Base::keep_,
      Base::v_copy_, Base::at, Base::row;
  static constexpr std::size_t W = kWidth<T>;

 public:
  // dk and dv are sums over the query heads of a key head, of all keys. Without room of their own where results are
  // rows of T in whole vectors: those are added up where they go.
  struct Sums {
    T *dq, *dk, *dv;
    Sums(const NystromCall& call, std::size_t queries, std::size_t keys, Parts<T>& parts)
        : dq(parts.take(is_plain<T>(call.dtype, call.dim) ? 0 : queries * padded<T>(call.dim))),
          dk(parts.take(is_plain<T>(call.dtype, call.dim) ? 0 : keys * padded<T>(call.dim))),
          dv(parts.take(is_plain<T>(call.dtype, call.values) ? 0 : keys * padded<T>(call.values))) {}
  };

  GradientPass(const NystromCall& call, const NystromHead& head, const Rows& dy, const Sums& sums, T* d_conv,
               T* d_q_landmarks, T* d_k_landmarks, Parts<T>& parts)
      : Base(call, head, parts),
        dy_(dy),
        sums_(sums),
        d_conv_(d_conv),
        d_q_landmarks_(d_q_landmarks),
        d_k_landmarks_(d_k_landmarks),
        of_landmarks_(head.q_landmarks == nullptr || d_q_landmarks != nullptr || d_k_landmarks != nullptr),
        g_(parts.take(kBlock * vp_)),
        dl_(parts.take(kBlock * (mp_ > kBlock ? mp_ : kBlock))),
        shift_(parts.take(mp_ + kBlock)),
        qt_(parts.take(call.dim * kBlock)),
        middle_(call, true, parts),
        partial_(call, parts),
        dw_(parts.take(m_ * vp_)),
        du_(parts.take(mp_)),
        turned_(parts.take((dp_ > vp_ ? dp_ : vp_) * (mp_ > kBlock ? mp_ : kBlock))),
        b_(parts.take(m_ * vp_)),
        db_(parts.take(m_ * vp_)),
        dq_rows_(parts.take(m_ * dp_)),
        dk_rows_(parts.take(m_ * dp_)) {}

  void run(Parts<T>& parts) noexcept {
    if (this->stopped()) return;
    this->prepare(middle_, false);
    if (middle_.flags[0] == 0) {
      exact();
    } else {
      landmarks(parts);
    }
    convolution();
  }

 private:
  // dy of the queries i .. i + n, zeros for those that are masked.
  void take_gradient(std::size_t i, std::size_t n) noexcept {
    for (std::size_t r = 0; r < n; ++r)
      if (this->query_seen(i + r))
        read_row<T>(call_.dtype, row(dy_, i + r), call_.values, g_ + r * vp_);
      else
        fill<T>(g_ + r * vp_, vp_, 0);
  }
  void turn(const T* from, std::size_t rows, std::size_t cols, std::size_t from_row, std::size_t to_row) noexcept {
    fill<T>(turned_, cols * to_row, 0);
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t j = 0; j < cols; ++j) turned_[j * to_row + i] = from[i * from_row + j];
  }

  void landmarks(Parts<T>& parts) noexcept {
    this->absorb(0, head_.keys, middle_, partial_);
    this->sums_over_keys(partial_, b_);
    // Room of floats for matrices of doubles where those are needed.
    if (sizeof(T) == 4 && (call_.ridge_solve || call_.iterations > kSinglePrecisionSteps)) {
      Parts<double> wide(parts.take(0));
      MiddleGradient<double> inner(call_, wide);
      through(inner);
    } else {
      MiddleGradient<T> inner(call_, parts);
      through(inner);
    }
  }
  template <class U> void through(MiddleGradient<U>& inner) noexcept {
    convert<U>(middle_.a, m_, m_, inner.a);
    for (std::size_t i = 0; i < m_; ++i)
      for (std::size_t e = 0; e < inner.columns; ++e)
        inner.b[i * inner.columns + e] = e < call_.values    ? static_cast<U>(b_[i * vp_ + e])
                                         : e == call_.values ? static_cast<U>(this->ones_of(partial_))
                                                             : U(0);
    const auto stops = [this] { return this->stopped(); };
    if (call_.ridge_solve)
      inner.ridge_forward(call_, stops);
    else
      inner.newton_forward(call_, stops);
    for (std::size_t i = 0; i < m_; ++i) {
      for (std::size_t e = 0; e < vp_; ++e)
        middle_.w[i * vp_ + e] = e < call_.values ? static_cast<T>(inner.w[i * inner.columns + e]) : T(0);
      middle_.u[i] = static_cast<T>(inner.w[i * inner.columns + call_.values]);
    }
    for (std::size_t i = m_; i < mp_; ++i) middle_.u[i] = 0;

    queries();
    if (this->stopped()) return;
    for (std::size_t i = 0; i < m_; ++i)
      for (std::size_t e = 0; e < inner.columns; ++e)
        inner.dw[i * inner.columns + e] = e < call_.values    ? static_cast<U>(dw_[i * vp_ + e])
                                          : e == call_.values ? static_cast<U>(du_[i])
                                                              : U(0);
    if (call_.ridge_solve)
      inner.ridge_values_backward(stops);
    else
      inner.newton_values_backward();
    for (std::size_t i = 0; i < m_; ++i)
      for (std::size_t e = 0; e < vp_; ++e)
        db_[i * vp_ + e] = e < call_.values ? static_cast<T>(inner.db[i * inner.columns + e]) : T(0);
    if (of_landmarks_) matrix_gradient(inner);
    keys();
    if (of_landmarks_) give_landmarks();
  }
  // Through Z to A and through its softmax to both landmarks.
  template <class U> void matrix_gradient(MiddleGradient<U>& inner) noexcept {
    const auto stops = [this] { return this->stopped(); };
    if (call_.ridge_solve)
      inner.ridge_backward(call_, stops);
    else
      inner.newton_backward(call_, stops);
    T* const da = parts_a_;
    convert<T>(inner.da, m_, m_, da);
    softmax_rows_gradient(middle_.a, da, m_, mp_, static_cast<T>(call_.scale));
    const T one = 1;
    product<T>(m_, dp_, Term<T>{da, at(mp_), 1, middle_.k_rows, at(dp_), m_}, {dq_rows_, at(dp_)});
    product<T>(m_, dp_, Term<T>{da, 1, at(mp_), middle_.q_rows, at(dp_), m_}, {dk_rows_, at(dp_), &one, 0});
  }

  // dW, du, the queries' own gradient and the key landmarks' share of it.
  void queries() noexcept {
    fill<T>(dw_, m_ * vp_, 0);
    fill<T>(du_, mp_, 0);
    fill<T>(dk_rows_, m_ * dp_, 0);
    turn(middle_.w, m_, vp_, vp_, mp_);
    const T one = 1;
    for (std::size_t i = 0; i < head_.queries; i += kBlock) {
      if (this->stopped()) return;
      const std::size_t n = head_.queries - i < kBlock ? head_.queries - i : kBlock;
      const Block<T> q = this->query_weights(i, n, middle_, nullptr);
      take_gradient(i, n);
      if (call_.normalize) {
        // out = num / r: dr = -(G . out) / r.
        product<T>(n, vp_, Term<T>{logits_, at(mp_), 1, middle_.w, at(vp_), m_}, {o_, at(vp_)});
        for (std::size_t r = 0; r < n; ++r) {
          const T sum = dot(logits_ + r * mp_, middle_.u, mp_), inverse = sum == 0 ? T(0) : T(1) / sum;
          scale_row(g_ + r * vp_, vp_, inverse);
          shift_[r] = -dot(g_ + r * vp_, o_ + r * vp_, vp_) * inverse;
          add_row(du_, logits_ + r * mp_, mp_, shift_[r]);
        }
      }
      product<T>(m_, vp_, Term<T>{logits_, 1, at(mp_), g_, at(vp_), n}, {dw_, at(vp_), &one, 0});
      product<T>(n, mp_, Term<T>{g_, at(vp_), 1, turned_, at(mp_), call_.values}, {dl_, at(mp_)});
      if (call_.normalize)
        for (std::size_t r = 0; r < n; ++r) add_row(dl_ + r * mp_, middle_.u, mp_, shift_[r]);
      softmax_rows_gradient(logits_, dl_, n, mp_, static_cast<T>(call_.scale));
      for (std::size_t r = 0; r < n; ++r)
        if (!this->query_seen(i + r)) fill<T>(dl_ + r * mp_, mp_, 0);
      product<T>(n, dp_, Term<T>{dl_, at(mp_), 1, middle_.k_rows, at(dp_), m_}, {sums_.dq + i * dp_, at(dp_)});
      if (of_landmarks_) product<T>(m_, dp_, Term<T>{dl_, 1, at(mp_), q.data, q.step, n}, {dk_rows_, at(dp_), &one, 0});
    }
  }

  void keys() noexcept {
    turn(db_, m_, vp_, vp_, mp_);
    for (std::size_t i = 0; i < mp_; ++i) {
      shift_[i] = i < m_ ? dot(db_ + i * vp_, b_ + i * vp_, vp_) : T(0);
      keep_[i] = i < m_ && partial_.sum[i] != 0 ? T(1) / partial_.sum[i] : T(0);
    }
    typename Base::Segments segments(this->count(head_.keys, false), m_);
    const T one = 1, scale = static_cast<T>(call_.scale);
    for (std::size_t t = 0; t < head_.keys;) {
      if (this->stopped()) return;
      const typename Base::Keys keys = this->take_keys(t, head_.keys);
      const std::size_t first = t, n = keys.count;
      t = keys.next;
      if (n == 0) continue;
      this->key_logits(keys, middle_);
      product<T>(n, mp_, Term<T>{keys.v.data, keys.v.step, 1, turned_, at(mp_), call_.values}, {dl_, at(mp_)});
      for (std::size_t i = 0; i < mp_; i += W) {
        const V top = load<V>(partial_.top + i), inverse = load<V>(keep_ + i), shift = load<V>(shift_ + i);
        for (std::size_t j = 0; j < n; ++j) {
          const V p = exp_nonpositive(load<V>(logits_ + j * mp_ + i) - top) * inverse;
          store(logits_ + j * mp_ + i, p);
          store(dl_ + j * mp_ + i, p * (load<V>(dl_ + j * mp_ + i) - shift) * scale);
        }
      }
      for (std::size_t j = 0; j < n; ++j)
        for (std::size_t i = m_; i < mp_; ++i) logits_[j * mp_ + i] = dl_[j * mp_ + i] = 0;
      // Where no key is masked, rows follow each other, and tiles take several at a time.
      const std::size_t together = head_.mask == nullptr ? n : 1;
      for (std::size_t j = 0; j < n; j += together) {
        const std::size_t key = this->number(first, j);
        product<T>(together, vp_, Term<T>{logits_ + j * mp_, at(mp_), 1, db_, at(vp_), m_},
                   {sums_.dv + key * vp_, at(vp_), &one, 0});
        product<T>(together, dp_, Term<T>{dl_ + j * mp_, at(mp_), 1, middle_.q_rows, at(dp_), m_},
                   {sums_.dk + key * dp_, at(dp_), &one, 0});
      }
      if (of_landmarks_)
        product<T>(m_, dp_, Term<T>{dl_, 1, at(mp_), keys.k.data, keys.k.step, n}, {dq_rows_, at(dp_), &one, 0});
      for (std::size_t j = 0; j < n && head_.k_landmarks == nullptr; ++j) {
        add_row(sums_.dk + this->number(first, j) * dp_, dk_rows_ + segments.segment() * dp_, dp_,
                T(1) / static_cast<T>(segments.length()));
        segments.next();
      }
    }
  }
  void give_landmarks() noexcept {
    if (head_.q_landmarks != nullptr) {
      for (std::size_t i = 0; i < m_ && d_q_landmarks_ != nullptr; ++i)
        write_row<T>(Base::kWorking, dq_rows_ + i * dp_, call_.dim, d_q_landmarks_ + i * call_.dim);
      // Summed over the query heads of a key head.
      for (std::size_t i = 0; i < m_ && d_k_landmarks_ != nullptr; ++i)
        for (std::size_t d = 0; d < call_.dim; ++d) d_k_landmarks_[i * call_.dim + d] += dk_rows_[i * dp_ + d];
      return;
    }
    typename Base::Segments segments(this->count(head_.queries, true), m_);
    for (std::size_t t = 0; t < head_.queries; ++t) {
      if (!this->query_seen(t)) continue;
      add_row(sums_.dq + t * dp_, dq_rows_ + segments.segment() * dp_, dp_, T(1) / static_cast<T>(segments.length()));
      segments.next();
    }
  }

  // Exact attention: blocks of queries by blocks of keys, the logits again transposed.
  void exact() noexcept {
    const T scale = static_cast<T>(call_.scale), one = 1;
    for (std::size_t i = 0; i < head_.queries; i += kBlock) {
      const std::size_t n = head_.queries - i < kBlock ? head_.queries - i : kBlock, cols = padded<T>(n);
      take_gradient(i, n);
      exact_statistics(i, n);
      const Block<T> q = this->query_block(i, n);
      T* const q_rows = turned_;  // q again, since x_copy_ takes the keys
      for (std::size_t r = 0; r < n; ++r) __builtin_memcpy(q_rows + r * dp_, q[r], dp_ * sizeof(T));
      T* const dq = sums_.dq + i * dp_;
      fill<T>(dq, n * dp_, 0);
      for (std::size_t t = 0; t < head_.keys;) {
        if (this->stopped()) return;
        const typename Base::Keys keys = this->take_keys(t, head_.keys);
        const std::size_t first = t, count = keys.count;
        t = keys.next;
        if (count == 0) continue;
        exact_logits(keys, cols);
        for (std::size_t j = 0; j < count; ++j)
          for (std::size_t r = 0; r < cols; ++r) dl_[j * kBlock + r] = r < n ? dot(keys.v[j], g_ + r * vp_, vp_) : T(0);
        for (std::size_t j = 0; j < count; ++j)
          for (std::size_t r = 0; r < cols; r += W) {
            const V p = exp_nonpositive(load<V>(logits_ + j * kBlock + r) - load<V>(keep_ + r)) * load<V>(shift_ + r);
            store(logits_ + j * kBlock + r, p);
            store(dl_ + j * kBlock + r, p * (load<V>(dl_ + j * kBlock + r) - load<V>(qt_shift_ + r)) * scale);
          }
        for (std::size_t j = 0; j < count; ++j) {
          const std::size_t key = this->number(first, j);
          product<T>(1, vp_, Term<T>{logits_ + j * kBlock, at(kBlock), 1, g_, at(vp_), n},
                     {sums_.dv + key * vp_, at(vp_), &one, 0});
          product<T>(1, dp_, Term<T>{dl_ + j * kBlock, at(kBlock), 1, q_rows, at(dp_), n},
                     {sums_.dk + key * dp_, at(dp_), &one, 0});
        }
        product<T>(n, dp_, Term<T>{dl_, 1, at(kBlock), keys.k.data, keys.k.step, count}, {dq, at(dp_), &one, 0});
      }
    }
  }
  void exact_logits(const typename Base::Keys& keys, std::size_t cols) noexcept {
    product<T>(keys.count, cols, Term<T>{keys.k.data, keys.k.step, 1, qt_, at(kBlock), call_.dim},
               {logits_, at(kBlock)});
  }
  // Of the queries i .. i + n: the largest logit in keep_, 1 / sum in shift_, dy . out in qt_shift_.
  void exact_statistics(std::size_t i, std::size_t n) noexcept {
    const std::size_t cols = padded<T>(n);
    const Block<T> q = this->query_block(i, n);
    fill<T>(qt_, call_.dim * kBlock, 0);
    for (std::size_t r = 0; r < n; ++r)
      for (std::size_t d = 0; d < call_.dim; ++d) qt_[d * kBlock + r] = q[r][d] * static_cast<T>(call_.scale);
    fill(keep_, kBlock, kLowest<T>);
    fill<T>(shift_, kBlock, 0);
    fill<T>(qt_shift_, kBlock, 0);
    // Twice: the maxima, then the sums and dy . v.
    for (int pass = 0; pass < 2; ++pass)
      for (std::size_t t = 0; t < head_.keys;) {
        if (this->stopped()) return;
        const typename Base::Keys keys = this->take_keys(t, head_.keys);
        t = keys.next;
        if (keys.count == 0) continue;
        exact_logits(keys, cols);
        for (std::size_t j = 0; j < keys.count; ++j)
          for (std::size_t r = 0; r < n; ++r) {
            const T x = logits_[j * kBlock + r];
            if (pass == 0) {
              if (!(x <= keep_[r])) keep_[r] = x;
              continue;
            }
            const T e = exp_nonpositive(splat<V>(x - keep_[r]))[0];
            shift_[r] += e;
            qt_shift_[r] += e * dot(keys.v[j], g_ + r * vp_, vp_);
          }
      }
    for (std::size_t r = 0; r < kBlock; ++r) {
      shift_[r] = shift_[r] == 0 ? T(0) : T(1) / shift_[r];
      qt_shift_[r] *= shift_[r];
    }
  }

  void convolution() noexcept {
    if (head_.conv == nullptr) return;
    const auto* const weights = static_cast<const T*>(head_.conv);
    const std::size_t half = call_.taps / 2;
    for (std::size_t i = 0; i < head_.queries; i += kBlock) {
      if (this->stopped()) return;
      const std::size_t n = head_.queries - i < kBlock ? head_.queries - i : kBlock;
      take_gradient(i, n);
      this->values_around(i, n);
      for (std::size_t r = 0; r < n; ++r)
        for (std::size_t t = 0; t < call_.taps; ++t) {
          const std::size_t j = i + r + t;
          if (j < half || j - half >= head_.keys || !this->seen(j - half)) continue;
          add_row(sums_.dv + (j - half) * vp_, g_ + r * vp_, vp_, weights[t]);
          if (d_conv_ != nullptr) d_conv_[t] += dot(g_ + r * vp_, v_copy_ + (r + t) * vp_, vp_);
        }
    }
  }

 public:
  // Set by the caller: room of a matrix between landmarks, and of kBlock numbers.
  T* parts_a_ = nullptr;
  T* qt_shift_ = nullptr;

 private:
  const Rows dy_;
  const Sums sums_;
  T *const d_conv_, *const d_q_landmarks_, *const d_k_landmarks_;
  const bool of_landmarks_;  // given ones may be constants
  T *const g_, *const dl_, *const shift_, *const qt_;
  const Middle<T> middle_;
  const Partial<T> partial_;
  T *const dw_, *const du_, *const turned_, *const b_, *const db_, *const dq_rows_, *const dk_rows_;
};

template <class T> std::size_t inner_items(const NystromCall& call) noexcept {
  if (sizeof(T) == 4 && (call.ridge_solve || call.iterations > kSinglePrecisionSteps)) {
    Parts<double> parts(nullptr);
    MiddleGradient<double>(call, parts);
    return 2 * parts.used();
  }
  Parts<T> parts(nullptr);
  MiddleGradient<T>(call, parts);
  return parts.used();
}

template <class T>
void run(const NystromCall& call, const NystromHead& head, const NystromGradient& gradient, void* work) noexcept {
  Parts<T> all(work);
  typename GradientPass<T>::Sums sums(call, head.queries, head.keys, all);
  const std::size_t dp = padded<T>(call.dim), vp = padded<T>(call.values);
  const bool plain = is_plain<T>(call.dtype, call.dim), plain_values = is_plain<T>(call.dtype, call.values);
  if (plain) sums.dk = static_cast<T*>(gradient.dk);
  if (plain_values) sums.dv = static_cast<T*>(gradient.dv);
  fill<T>(sums.dk, head.keys * dp, 0);
  fill<T>(sums.dv, head.keys * vp, 0);
  T* const a = all.take(call.landmarks * padded<T>(call.landmarks));
  T* const shift = all.take(kBlock);
  void* const rest = all.take(0);
  const auto landmark_items = call.landmarks * call.dim;
  auto* const dqs = static_cast<T*>(gradient.d_q_landmarks);
  auto* const dks = static_cast<T*>(gradient.d_k_landmarks);
  if (dks != nullptr) fill<T>(dks, landmark_items, 0);
  for (std::size_t r = 0; r < gradient.group; ++r) {
    NystromHead one = head;
    one.q.data = row_at(call.dtype, head.q.data, gradient.q_head, r);
    if (head.conv != nullptr) one.conv = static_cast<const T*>(head.conv) + r * call.taps;
    if (head.q_landmarks != nullptr) one.q_landmarks = static_cast<const T*>(head.q_landmarks) + r * landmark_items;
    const Rows dy{row_at(call.dtype, gradient.dy.data, gradient.dy_head, r), gradient.dy.row};
    T* const d_conv = gradient.d_conv == nullptr ? nullptr : static_cast<T*>(gradient.d_conv) + r * call.taps;
    if (d_conv != nullptr) fill<T>(d_conv, call.taps, 0);
    const char* const dq = row_at(call.dtype, gradient.dq, gradient.dq_head, r);
    if (plain) sums.dq = reinterpret_cast<T*>(const_cast<char*>(dq));
    Parts<T> parts(rest);
    GradientPass<T> pass(call, one, dy, sums, d_conv, dqs == nullptr ? nullptr : dqs + r * landmark_items, dks, parts);
    pass.parts_a_ = a;
    pass.qt_shift_ = shift;
    pass.run(parts);
    for (std::size_t i = 0; i < head.queries && !plain; ++i)
      write_row<T>(call.dtype, sums.dq + i * dp, call.dim,
                   const_cast<char*>(row_at(call.dtype, dq, static_cast<std::ptrdiff_t>(call.dim), i)));
  }
  for (std::size_t j = 0; j < head.keys; ++j) {
    if (!plain)
      write_row<T>(call.dtype, sums.dk + j * dp, call.dim,
                   const_cast<char*>(row_at(call.dtype, gradient.dk, static_cast<std::ptrdiff_t>(call.dim), j)));
    if (!plain_values)
      write_row<T>(call.dtype, sums.dv + j * vp, call.values,
                   const_cast<char*>(row_at(call.dtype, gradient.dv, static_cast<std::ptrdiff_t>(call.values), j)));
  }
}
template <class T>
std::size_t work_items(const NystromCall& call, std::size_t queries, std::size_t keys, std::size_t) noexcept {
  Parts<T> parts(nullptr);
  const typename GradientPass<T>::Sums sums(call, queries, keys, parts);
  parts.take(call.landmarks * padded<T>(call.landmarks));
  parts.take(kBlock);
  static constexpr NystromHead head{};
  GradientPass<T>(call, head, Rows{}, sums, nullptr, nullptr, nullptr, parts);
  return parts.used() + inner_items<T>(call) + 64;
}

}  // namespace

const NystromGradientKernels kNystromGradientKernels[2] = {{work_items<float>, run<float>},
                                                           {work_items<double>, run<double>}};

}  // namespace fastops::FASTOPS_LEVEL
