// SPDX-License-Identifier: BSD-3-Clause
// The gradient of linear attention: one pass forward for dq, with the state again, and one backward for dk and dv.
//
// With G = dy / den and c = -(G . y): A_ij = G_i . v_j + c_i, dq_i = sum_j A_ij k_j, dk_j = sum_i A_ij q_i, dv_j =
// sum_i (q_i . k_j) G_i.
#include "attention/attention_linear.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

template <class T> class GradientPass : public Pass<T> {
  using Base = Pass<T>;
  using V = Vector<T>;
  static constexpr std::size_t W = kWidth<T>;
  using Base::call_, Base::head_, Base::dp_, Base::fp_, Base::vp_, Base::exponents_, Base::with_decay_, Base::x_,
      Base::v_, Base::v_copy_, Base::kf_, Base::kft_, Base::qf_, Base::p_, Base::o_, Base::running_, Base::m_old_,
      Base::prefix_, Base::factor_, Base::state_, Base::live_, Base::shift_, Base::transposed_, Base::least,
      Base::stride, Base::copy, Base::normalizes;

 public:
  GradientPass(const LinearCall& call, const LinearHead& head, const LinearGradient& gradient, Parts<T>& parts)
      : Base(call, head, parts),
        gradient_(gradient),
        softmax_(call.map == FASTOPS_MAP_SOFTMAX),
        st_(parts.take(vp_ * fp_)),
        ds_(parts.take(fp_ * vp_)),
        dst_(parts.take(vp_ * fp_)),
        dz_(parts.take(fp_)),
        g_(parts.take(kChunk * vp_)),
        y_(parts.take(kChunk * vp_)),
        vt_(parts.take(vp_ * kChunk)),
        a_(parts.take(kChunk * kChunk)),
        df_(parts.take(kChunk * fp_)),
        dkf_(parts.take(kChunk * fp_)),
        dv_(parts.take(kChunk * vp_)),
        dx_(parts.take(kChunk * dp_)),
        c_(parts.take(kChunk)),
        first_m_(parts.take(fp_)),
        denominators_(parts.take(call.group * head.queries)),
        lifts_(parts.take(call.group * head.queries)),
        shares_(softmax_ ? parts.take(call.group * head.queries * fp_) : nullptr),
        starts_(parts.take(2 * (head.keys + 1))),
        z_at_(exponents_ ? parts.take((head.keys + 1) * fp_) : nullptr),
        m_at_(exponents_ ? parts.take((head.keys + 1) * fp_) : nullptr) {}

  void run() noexcept {
    this->load_initial();
    fill<T>(ds_, fp_ * vp_, 0);
    fill<T>(dz_, fp_, 0);
    if (gradient_.ds != nullptr) {
      const auto* const ds = static_cast<const T*>(gradient_.ds);
      for (std::size_t d = 0; d < call_.features; ++d) copy(ds_ + d * vp_, ds + d * call_.values, call_.values);
      copy(dz_, static_cast<const T*>(gradient_.dz), call_.features);
    }
    transpose<T>(state_.s, vp_, fp_, vp_, st_, fp_);
    if (call_.causal) {
      this->made_decay_ = 0;
      transposed_ = st_;
      forward();
      reverse();
    } else {
      all_at_once();
    }
    store_initial();
  }

 private:
  // Tokens of a chunk begin there; an int64 in the room of T.
  std::size_t start(std::size_t piece) const noexcept {
    std::int64_t t;
    __builtin_memcpy(&t, reinterpret_cast<const char*>(starts_) + 8 * piece, 8);
    return static_cast<std::size_t>(t);
  }
  void set_start(std::size_t piece, std::size_t t) noexcept {
    const auto value = static_cast<std::int64_t>(t);
    __builtin_memcpy(reinterpret_cast<char*>(starts_) + 8 * piece, &value, 8);
  }

  // dq, and what the way back needs: denominators, where the chunks begin, their units and sums of keys.
  void forward() noexcept {
    const std::size_t keys = head_.keys, queries = head_.queries;
    alone_ = queries > keys ? queries - keys : 0;
    shift_keys_ = keys > queries ? keys - queries : 0;
    copy(first_m_, state_.m, fp_);
    queries_alone(false);
    pieces_ = 0;
    for (std::size_t t = 0; t < keys;) {
      const std::size_t limit = t < shift_keys_ ? shift_keys_ - t : keys - t;
      const std::size_t n = this->take_keys(t, least(kChunk, limit));
      set_start(pieces_, t);
      if (exponents_) {
        copy(z_at_ + pieces_ * fp_, state_.z, fp_);
        copy(m_at_ + pieces_ * fp_, state_.m, fp_);
      }
      ++pieces_;
      if (t >= shift_keys_) {
        transpose_values(n);
        for (std::size_t r = 0; r < call_.group; ++r) chunk_dq(r, t - shift_keys_ + alone_, n);
      }
      // st = keep st + v^T f(k).
      const T keep = with_decay_ ? prefix_[n - 1] : T(1);
      if (with_decay_)
        for (std::size_t j = 0; j < n; ++j) scale_row(kf_ + j * fp_, fp_, factor_[(n - 1) * kChunk + j]);
      product<T>(vp_, fp_, Term<T>{v_.data, 1, v_.step, kf_, stride(fp_), n}, {st_, stride(fp_), &keep, 0});
      if (with_decay_) scale_row(state_.z, fp_, keep);
      this->add_keys(n);
      t += n;
      if (this->stopped()) {
        pieces_ = 0;  // their end is not known: nothing to walk back over
        return;
      }
    }
    set_start(pieces_, keys);
  }

  // Queries before the first key: the initial state is all they see.
  void queries_alone(bool collects) noexcept {
    for (std::size_t r = 0; r < call_.group; ++r)
      for (std::size_t i = 0; i < alone_; i += kChunk) state_dq(r, i, least(kChunk, alone_ - i), collects);
  }

  // The queries i .. i + n against the state alone: dq, and their part of ds and dz where `collects`.
  void state_dq(std::size_t r, std::size_t i, std::size_t n, bool collects) noexcept {
    if (this->stopped()) return;
    this->take_queries(r, i, n);
    for (std::size_t row = 0; row < n; ++row) {
      T* const f = qf_ + row * fp_;
      if (softmax_) {
        copy(dx_ + row * dp_, f, fp_);
        this->divide(f, state_.z);
      }
      take_gradient(r, i, row, lifted_denominator(row, state_.z));
    }
    product<T>(n, fp_, Term<T>{g_, stride(vp_), 1, st_, stride(fp_), call_.values}, {df_, stride(fp_)});
    for (std::size_t row = 0; row < n; ++row) {
      add_multiple(df_ + row * fp_, state_.z, c_[row]);
      if (collects && softmax_) {
        // z's own share: -qs dqs / z.
        for (std::size_t d = 0; d < call_.features; ++d)
          if (state_.z[d] != 0) dz_[d] -= qf_[row * fp_ + d] * df_[row * fp_ + d] / state_.z[d];
      }
      if (collects) add_multiple(dz_, qf_ + row * fp_, c_[row]);
    }
    if (collects) add_to_ds(n);
    finish_dq(r, i, n, state_.z, false);
  }
  void add_to_ds(std::size_t n) noexcept {
    const T one = 1;
    product<T>(call_.features, vp_, Term<T>{qf_, 1, stride(fp_), g_, stride(vp_), n}, {ds_, stride(vp_), &one, 0});
  }
  static void add_multiple(T* to, const T* from, T factor, std::size_t n) noexcept {
    const V f = splat<V>(factor);
    for (std::size_t i = 0; i < n; i += W) store(to + i, simd::fma(f, load<V>(from + i), load<V>(to + i)));
  }
  void add_multiple(T* to, const T* from, T factor) const noexcept {
    if (factor != 0) add_multiple(to, from, factor, fp_);
  }

  // The denominator of a row, whose features are made larger where it is tiny.
  T lifted_denominator(std::size_t row, const T* z) noexcept {
    if (!normalizes()) return 0;
    const T denominator = dot(qf_ + row * fp_, z, fp_);
    if (!this->is_small(denominator)) return denominator;
    this->lift_row(row);
    return dot(qf_ + row * fp_, z, fp_);
  }

  // g_ = dy / den, c_ = -(G . y) of a row.
  void take_gradient(std::size_t r, std::size_t i, std::size_t row, T denominator) noexcept {
    const T factor = this->row_factor(denominator, row);
    denominators_[r * head_.queries + i + row] = denominator;
    lifts_[r * head_.queries + i + row] = this->lifted_[row];
    T* const g = g_ + row * vp_;
    read_row<T>(call_.dtype, this->head_row(gradient_.dy, gradient_.dy_head, r, i + row), call_.values, g);
    scale_row(g, vp_, factor);
    c_[row] = 0;
    if (normalizes()) {
      read_row<T>(call_.dtype, this->head_row(head_.out, head_.out_head, r, i + row), call_.values, y_);
      c_[row] = -dot(g, y_, vp_);
    }
  }

  // A = tril(G v^T + c), with the decays.
  void take_weights_gradient(std::size_t n) noexcept {
    lower_product<T>(n, {g_, stride(vp_), 1, vt_, stride(kChunk), call_.values}, a_, stride(kChunk),
                     with_decay_ ? factor_ : nullptr, c_);
  }

  void chunk_dq(std::size_t r, std::size_t i, std::size_t n) noexcept {
    this->take_queries(r, i, n);
    T* const sums = dkf_;  // the keys' sums at every row
    if (normalizes() || softmax_) {
      copy(running_, state_.z, fp_);
      for (std::size_t row = 0; row < n; ++row) {
        if (with_decay_) scale_row(running_, fp_, this->decays_[row]);
        this->accumulate(running_, kf_ + row * fp_);
        copy(sums + row * fp_, running_, fp_);
      }
    }
    for (std::size_t row = 0; row < n; ++row) {
      T* const f = qf_ + row * fp_;
      if (softmax_) {
        copy(dx_ + row * dp_, f, fp_);
        this->divide(f, sums + row * fp_);
      }
      take_gradient(r, i, row, lifted_denominator(row, sums + row * fp_));
    }
    take_weights_gradient(n);
    if (with_decay_)
      for (std::size_t row = 0; row < n; ++row) {
        scale_row(g_ + row * vp_, vp_, prefix_[row]);
        c_[row] *= prefix_[row];
      }
    const Term<T> terms[2] = {{g_, stride(vp_), 1, st_, stride(fp_), call_.values},
                              {a_, stride(kChunk), 1, kf_, stride(fp_), n}};
    product<T>(n, fp_, terms, 2, {df_, stride(fp_)}, Band::kLower);
    for (std::size_t row = 0; row < n; ++row) add_multiple(df_ + row * fp_, state_.z, c_[row]);
    finish_dq(r, i, n, sums, true);
  }

  // From the gradient of the features, df_, to dq. The softmax map: by_z are the sums that the rows were divided by.
  void finish_dq(std::size_t r, std::size_t i, std::size_t n, const T* by_z, bool own_z) noexcept {
    for (std::size_t row = 0; row < n; ++row) {
      T* const df = df_ + row * fp_;
      T* const f = qf_ + row * fp_;
      if (!exponents_ && call_.scale != 1.0) scale_row(df, fp_, static_cast<T>(call_.scale));
      if (this->lifted_[row] != 1) scale_row(df, fp_, this->lifted_[row]);
      if (!softmax_) continue;
      // df f = dqs qs, since f = qs / z and dqs = df / z; its sum times qs, kept in dx_, is the softmax' own share.
      const T sum = dot(df, f, fp_);
      T* const share = shares_ + (r * head_.queries + i + row) * fp_;
      const T* const z = by_z + (own_z ? row * fp_ : 0);
      for (std::size_t d = 0; d < fp_; ++d) {
        share[d] = z[d] == 0 ? T(0) : df[d] * f[d] / z[d];
        df[d] = df[d] * f[d] - dx_[row * dp_ + d] * sum;
      }
    }
    to_input(qf_, df_, n, softmax_);
    for (std::size_t row = 0; row < n; ++row)
      write_row<T>(call_.dtype, dx_ + row * dp_, call_.dim,
                   const_cast<char*>(row_at(call_.dtype, row_at(call_.dtype, gradient_.dq, gradient_.dq_head, r),
                                            stride(call_.dim), i + row)));
  }
  char* output(void* data, std::size_t row, std::size_t width) const noexcept {
    return const_cast<char*>(row_at(call_.dtype, data, stride(width), row));
  }

  // dx_ from the gradient df of the features f of x; with is_product from f df, of the softmax map.
  void to_input(const T* f, const T* df, std::size_t n, bool is_product) noexcept {
    for (std::size_t row = 0; row < n; ++row, f += fp_, df += fp_) {
      const T* const x = x_[row];
      T* const dx = dx_ + row * dp_;
      const auto all = [&](auto body) FASTOPS_BODY {
        for (std::size_t d = 0; d < dp_; d += W) store(dx + d, body(load<V>(x + d), load<V>(f + d), load<V>(df + d)));
      };
      const T scale = static_cast<T>(call_.scale);
      switch (call_.map) {
        case FASTOPS_MAP_ELU:
          all([](V v, V, V d) FASTOPS_BODY { return select(v < V{}, d * elu_feature(v), d); });
          break;
        case FASTOPS_MAP_RELU:
          all([](V v, V, V d) FASTOPS_BODY { return select(v > V{}, d, v * T(0)); });
          break;
        case FASTOPS_MAP_RELU2:
          all([](V v, V, V d) FASTOPS_BODY { return select(v > V{}, d * (v + v), v * T(0)); });
          break;
        case FASTOPS_MAP_COSINE: {
          const auto norm = this->norm_of(x);
          T along = 0;
          for (std::size_t d = 0; d < call_.dim; ++d) along += x[d] * norm.down / norm.root * df[d];
          for (std::size_t d = 0; d < call_.dim; ++d)
            dx[d] = (df[d] - x[d] * norm.down / norm.root * along) / norm.root * norm.down;
          break;
        }
        case FASTOPS_MAP_EXP:
          all([scale](V, V fv, V d) FASTOPS_BODY { return fv * d * scale; });
          break;
        case FASTOPS_MAP_SOFTMAX:
          all([scale, is_product](V, V fv, V d) FASTOPS_BODY { return (is_product ? d : fv * d) * scale; });
          break;
        case FASTOPS_MAP_FAVOR: {
          const Projection<T> w(call_);
          T* const logs = m_old_;
          for (std::size_t d = 0; d < fp_; d += W) store(logs + d, load<V>(f + d) * load<V>(df + d));
          V sum{};
          for (std::size_t d = 0; d < fp_; d += W) sum += load<V>(logs + d);
          product<T>(1, dp_, Term<T>{logs, stride(fp_), 1, w.plain, stride(w.dim), call_.features}, {dx, stride(dp_)});
          add_multiple(dx, x, -scale * sum_lanes<T>(sum), dp_);
          break;
        }
        default:
          all([](V, V, V d) FASTOPS_BODY { return d; });
      }
    }
  }

  // Rows past the chunk's are zeros.
  void transpose_values(std::size_t n) noexcept {
    const T* from = v_.data;
    auto step = static_cast<std::size_t>(v_.step);
    if (v_.step < 0 || n != padded<T>(n) || from == v_copy_) {
      for (std::size_t j = 0; j < padded<T>(n); ++j)
        if (j >= n)
          fill<T>(v_copy_ + j * vp_, vp_, 0);
        else if (from != v_copy_)
          copy(v_copy_ + j * vp_, v_[j], vp_);
      from = v_copy_;
      step = vp_;
    }
    transpose<T>(from, step, padded<T>(n), vp_, vt_, kChunk);
  }
  void transpose_ds() noexcept { transpose<T>(ds_, vp_, fp_, vp_, dst_, fp_); }

  // dv and dk of the tokens t .. t + n, whose gradients of features and values are in dkf_ and dv_.
  void finish_keys(std::size_t t, std::size_t n) noexcept {
    x_ = this->block(head_.k, t, n, call_.dim, this->x_copy_, head_.mask == nullptr ? nullptr : live_);
    to_input(kf_, dkf_, n, false);
    for (std::size_t j = 0; j < n; ++j) {
      if (!live_[j]) {
        fill<T>(dx_ + j * dp_, dp_, 0);
        fill<T>(dv_ + j * vp_, vp_, 0);
      }
      write_row<T>(call_.dtype, dx_ + j * dp_, call_.dim, output(gradient_.dk, t + j, call_.dim));
      write_row<T>(call_.dtype, dv_ + j * vp_, call_.values, output(gradient_.dv, t + j, call_.values));
    }
  }

  void reverse() noexcept {
    transposed_ = nullptr;
    this->units_fixed_ = true;
    if (softmax_) fill<T>(running_, fp_, 0);
    for (std::size_t piece = pieces_; piece-- > 0;) {
      const std::size_t t = start(piece), n = start(piece + 1) - t;
      if (exponents_) {
        if (piece + 1 < pieces_) to_units(m_at_ + piece * fp_, m_at_ + (piece + 1) * fp_, n + t);
        copy(state_.m, m_at_ + piece * fp_, fp_);
      }
      this->take_keys(t, n);
      chunk_dk(t, n);
      finish_keys(t, n);
      if (this->stopped()) return;
    }
    if (exponents_ && pieces_ > 0) to_units(first_m_, m_at_, 0);
    if (alone_ == 0) return;
    // Their part of the initial state's gradient: the state is loaded again, dq comes out as before.
    this->load_initial();
    transpose<T>(state_.s, vp_, fp_, vp_, st_, fp_);
    queries_alone(true);
  }
  // The gradient of the state from units of 2^from to those of 2^to, across the steep decay of token t if it has one.
  void to_units(const T* to, const T* from, std::size_t t) noexcept {
    double decay = 0;
    if (t < head_.keys && this->is_steep(t))
      decay =
          static_cast<double>(static_cast<const T*>(head_.decay)[stride(t) * head_.decay_step]) * 1.4426950408889634;
    for (std::size_t d = 0; d < fp_; ++d) {
      const double exponent = static_cast<double>(to[d]) - static_cast<double>(from[d]) + decay;
      if (exponent == 0) continue;
      const T factor = static_cast<T>(__builtin_exp2(exponent < -20000 ? -20000 : exponent > 20000 ? 20000 : exponent));
      scale_row(ds_ + d * vp_, vp_, factor);
      dz_[d] *= factor;
    }
  }

  void chunk_dk(std::size_t t, std::size_t n) noexcept {
    transpose_ds();
    this->transpose_keys(n);
    transpose_values(n);
    // What later tokens ask of this chunk's.
    product<T>(n, vp_, Term<T>{kf_, stride(fp_), 1, ds_, stride(vp_), call_.features}, {dv_, stride(vp_)});
    product<T>(n, fp_, Term<T>{v_.data, v_.step, 1, dst_, stride(fp_), call_.values}, {dkf_, stride(fp_)});
    for (std::size_t j = 0; j < n; ++j) {
      this->accumulate(dkf_ + j * fp_, dz_);
      if (!with_decay_) continue;
      const T factor = factor_[(n - 1) * kChunk + j];
      scale_row(dv_ + j * vp_, vp_, factor);
      scale_row(dkf_ + j * fp_, fp_, factor);
    }
    if (with_decay_) {
      for (std::size_t d = 0; d < call_.features; ++d) scale_row(ds_ + d * vp_, vp_, prefix_[n - 1]);
      scale_row(dz_, fp_, prefix_[n - 1]);
    }
    if (t < shift_keys_) return;
    const std::size_t i = t - shift_keys_ + alone_;
    for (std::size_t r = 0; r < call_.group; ++r) {
      this->take_queries(r, i, n);
      if (softmax_) divide_by_sums(n, z_at_ + piece_of(t) * fp_);
      for (std::size_t row = 0; row < n; ++row) {
        const std::size_t at = r * head_.queries + i + row;
        this->lifted_[row] = lifts_[at];
        if (lifts_[at] != 1) scale_row(qf_ + row * fp_, fp_, lifts_[at]);
        take_gradient(r, i, row, denominators_[at]);
      }
      lower_product<T>(n, {qf_, stride(fp_), 1, kft_, stride(kChunk), call_.features}, p_, stride(kChunk),
                       with_decay_ ? factor_ : nullptr);
      take_weights_gradient(n);
      const bool whole = diagonals_are_finite(n);
      add_later_rows(p_, g_, vp_, dv_, n, whole);
      add_later_rows(a_, qf_, fp_, dkf_, n, whole);
      if (softmax_) {
        fill<T>(running_, fp_, 0);
        for (std::size_t row = n; row-- > 0;) {
          add_multiple(running_, shares_ + (r * head_.queries + i + row) * fp_, T(-1));
          this->accumulate(dkf_ + row * fp_, running_);
        }
        this->accumulate(dz_, running_);
      }
      if (with_decay_)
        for (std::size_t row = 0; row < n; ++row) {
          scale_row(g_ + row * vp_, vp_, prefix_[row]);
          c_[row] *= prefix_[row];
        }
      for (std::size_t row = 0; row < n; ++row) add_multiple(dz_, qf_ + row * fp_, c_[row]);
      add_to_ds(n);
    }
  }
  // A row of queries or of G that is not finite shows on its diagonals, which are products with it.
  bool diagonals_are_finite(std::size_t n) const noexcept {
    T sum = 0;
    for (std::size_t row = 0; row < n; ++row) sum += (p_[row * kChunk + row] + a_[row * kChunk + row]) * T(0);
    return sum == 0;
  }
  // to_j += sum over i >= j of w_ij row_i. Tile by tile also the zeros of w are multiplied, which only finite rows
  // bear.
  static void add_later_rows(const T* w, const T* rows, std::size_t width, T* to, std::size_t n, bool whole) noexcept {
    const T one = 1;
    if (whole)
      return product<T>(n, width, Term<T>{w, 1, stride(kChunk), rows, stride(width), n}, {to, stride(width), &one, 0},
                        Band::kUpper);
    for (std::size_t j = 0; j < n; ++j)
      product<T>(1, width, Term<T>{w + j * kChunk + j, 1, stride(kChunk), rows + j * width, stride(width), n - j},
                 {to + j * width, stride(width), &one, 0});
  }
  std::size_t piece_of(std::size_t t) const noexcept {
    std::size_t low = 0, high = pieces_;
    while (high - low > 1) {
      const std::size_t middle = (low + high) / 2;
      (start(middle) <= t ? low : high) = middle;
    }
    return low;
  }
  void divide_by_sums(std::size_t n, const T* before) noexcept {
    copy(running_, before, fp_);
    for (std::size_t row = 0; row < n; ++row) {
      this->accumulate(running_, kf_ + row * fp_);
      this->divide(qf_ + row * fp_, running_);
    }
  }

  void all_at_once() noexcept {
    const std::size_t keys = head_.keys;
    copy(first_m_, state_.m, fp_);
    this->absorb(0, keys, true);
    transpose<T>(state_.s, vp_, fp_, vp_, st_, fp_);
    for (std::size_t r = 0; r < call_.group; ++r)
      for (std::size_t i = 0; i < head_.queries; i += kChunk) state_dq(r, i, least(kChunk, head_.queries - i), true);
    transpose_ds();
    this->units_fixed_ = true;
    for (std::size_t t = 0; t < keys;) {
      const std::size_t n = this->take_keys(t, least(kChunk, keys - t));
      product<T>(n, vp_, Term<T>{kf_, stride(fp_), 1, ds_, stride(vp_), call_.features}, {dv_, stride(vp_)});
      product<T>(n, fp_, Term<T>{v_.data, v_.step, 1, dst_, stride(fp_), call_.values}, {dkf_, stride(fp_)});
      for (std::size_t j = 0; j < n; ++j) this->accumulate(dkf_ + j * fp_, dz_);
      finish_keys(t, n);
      t += n;
      if (this->stopped()) return;
    }
    if (exponents_) to_units(first_m_, state_.m, 0);
  }

  void store_initial() const noexcept {
    if (gradient_.ds_in == nullptr) return;
    auto* const ds = static_cast<T*>(gradient_.ds_in);
    for (std::size_t d = 0; d < call_.features; ++d) copy(ds + d * call_.values, ds_ + d * vp_, call_.values);
    copy(static_cast<T*>(gradient_.dz_in), dz_, call_.features);
  }

  const LinearGradient& gradient_;
  const bool softmax_;
  // S^T (values x features), the gradient of the state and its transpose.
  T *const st_, *const ds_, *const dst_, *const dz_;
  T *const g_, *const y_, *const vt_, *const a_, *const df_, *const dkf_, *const dv_, *const dx_, *const c_,
                                                                                                      *const first_m_;
  T *const denominators_, *const lifts_, *const shares_, *const starts_, *const z_at_, *const m_at_;
  std::size_t alone_ = 0, shift_keys_ = 0, pieces_ = 0;
};

template <class T> std::size_t work_items(const LinearCall& call, std::size_t queries, std::size_t keys) noexcept {
  LinearHead head{};
  head.queries = queries;
  head.keys = keys;
  static constexpr LinearGradient gradient{};
  Parts<T> parts(nullptr);
  GradientPass<T>(call, head, gradient, parts);
  return parts.used();
}
template <class T>
void run(const LinearCall& call, const LinearHead& head, const LinearGradient& gradient, void* work) noexcept {
  Parts<T> parts(work);
  GradientPass<T>(call, head, gradient, parts).run();
}

}  // namespace

const LinearGradientKernels kLinearGradientKernels[2] = {{work_items<float>, run<float>},
                                                         {work_items<double>, run<double>}};

}  // namespace fastops::FASTOPS_LEVEL
