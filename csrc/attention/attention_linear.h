// SPDX-License-Identifier: BSD-3-Clause
// Linear attention by chunks of tokens: inside a chunk the triangle of weights, between chunks the state S = sum f(k)
// v.
#ifndef FASTOPS_ATTENTION_ATTENTION_LINEAR_H
#define FASTOPS_ATTENTION_ATTENTION_LINEAR_H

#include "attention/attention_kernels.h"
#include "attention/attention_math.h"
#include "attention/attention_tile.h"

namespace fastops::FASTOPS_LEVEL::attention {

// Exponentials are kept as 2^n times a part near 1, n an integer of T; no key seen yet is this.
template <class T> inline constexpr T kNone = T(-1e38);
// How far the largest exponent of a feature may rise within a chunk: far from underflow of what came before it.
template <class T> inline constexpr T kMostGrowth = T(40);
// With exponentials: decays below it go into the exponents of the state, not into its numbers; how far the decays
// within a chunk may add up; sums of keys below 2^this are brought up again, since what made them large is forgotten.
template <class T> inline constexpr T kSteepDecay = T(-20);
template <class T> inline constexpr T kMostDecay = T(-28);
inline constexpr int kForgotten = -32;
// Denominators below it are computed again from larger features of the query: their inverse might overflow.
template <class T> inline constexpr T kSmallDenominator = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-960);
template <class T> inline constexpr int kMostLift = sizeof(T) == 4 ? 120 : 960;

// Tokens of a chunk without causality.
inline constexpr std::size_t kMostRows = 2 * kChunk;

inline bool has_exponents(fastops_feature_map map) noexcept { return map >= FASTOPS_MAP_EXP; }

// f = body(x) by whole vectors, zeros from n on.
template <class T, class Body>
FASTOPS_INLINE void map_row(const T* x, T* f, std::size_t n, std::size_t padded_n, Body body) {
  using V = Vector<T>;
  std::size_t i = 0;
#pragma GCC unroll 2
  for (; i + kWidth<T> <= n; i += kWidth<T>) store(f + i, body(load<V>(x + i)));
  if (i < n) {
    const V v = body(load<V>(x + i));
    for (std::size_t l = 0; l < kWidth<T>; ++l) f[i + l] = i + l < n ? v[l] : T(0);
    i += kWidth<T>;
  }
  for (; i < padded_n; ++i) f[i] = 0;
}

// FAVOR+'s projection W, scaled, as its transpose (dim x features) and itself (features x dim), rows padded.
template <class T> struct Projection {
  const T *transposed, *plain;
  std::size_t dim, features;  // padded

  Projection(const LinearCall& call)
      : transposed(static_cast<const T*>(call.projection)),
        dim(padded<T>(call.dim)),
        features(padded<T>(call.features)) {
    plain = transposed + call.dim * features;
  }
};
template <class T> std::size_t projection_items(const LinearCall& call) noexcept {
  return call.dim * padded<T>(call.features) + call.features * padded<T>(call.dim);
}
template <class T> void project(const LinearCall& call, const void* projection, void* prepared) noexcept {
  const auto* const w = static_cast<const T*>(projection);
  auto* const to = static_cast<T*>(prepared);
  fill<T>(to, projection_items<T>(call), 0);
  const T factor = static_cast<T>(__builtin_sqrt(call.scale));
  const std::size_t features = padded<T>(call.features), dim = padded<T>(call.dim);
  T* const plain = to + call.dim * features;
  for (std::size_t r = 0; r < call.features; ++r)
    for (std::size_t d = 0; d < call.dim; ++d) to[d * features + r] = plain[r * dim + d] = factor * w[r * call.dim + d];
}

// A state in padded rows.
template <class T> struct State {
  T *s, *z, *m;
  State(Parts<T>& parts, std::size_t features, std::size_t values)
      : s(parts.take(features * values)), z(parts.take(features)), m(parts.take(features)) {}
};

// to += from, in common units.
template <class T>
void add_state(const State<T>& to, const State<T>& from, std::size_t features, std::size_t values) noexcept {
  for (std::size_t d = 0; d < features; ++d) {
    const T m = to.m[d] > from.m[d] ? to.m[d] : from.m[d];
    const T f = power_of_2(to.m[d] - m), g = power_of_2(from.m[d] - m);
    to.m[d] = m;
    to.z[d] = f * to.z[d] + g * from.z[d];
    T* const row = to.s + d * values;
    for (std::size_t e = 0; e < values; e += kWidth<T>)
      store(row + e, simd::fma(splat<Vector<T>>(f), load<Vector<T>>(row + e),
                               splat<Vector<T>>(g) * load<Vector<T>>(from.s + d * values + e)));
  }
}

// One head's passes over its tokens. Names: kf, qf are chunks of features, s, z, m the state, p the triangle of
// weights.
template <class T> class Pass {
  using V = Vector<T>;
  static constexpr std::size_t W = kWidth<T>;

 public:
  // Chunks of `rows` tokens: kChunk with causality, whose triangle they hold, else more, one for a step.
  Pass(const LinearCall& call, const LinearHead& head, Parts<T>& parts, std::size_t rows = kChunk)
      : Pass(call, head, parts, State<T>(parts, padded<T>(call.features), padded<T>(call.values)), rows) {}
  Pass(const LinearCall& call, const LinearHead& head, Parts<T>& parts, const State<T>& state, std::size_t rows)
      : call_(call),
        head_(head),
        dp_(padded<T>(call.dim)),
        fp_(padded<T>(call.features)),
        vp_(padded<T>(call.values)),
        exponents_(has_exponents(call.map)),
        with_decay_(head.decay != nullptr),
        rows_(rows),
        share_(call.map == FASTOPS_MAP_FAVOR ? static_cast<T>(1 / __builtin_sqrt(static_cast<double>(call.features)))
                                             : T(1)),
        x_copy_(parts.take(rows * dp_)),
        v_copy_(parts.take(rows * vp_)),
        kf_(parts.take(rows * fp_)),
        kft_(parts.take(rows == kChunk ? fp_ * kChunk : 0)),
        qf_(parts.take(rows * fp_)),
        p_(parts.take(rows == kChunk ? kChunk * kChunk : 0)),
        o_(parts.take(rows * vp_)),
        running_(parts.take(fp_)),
        m_old_(parts.take(fp_)),
        decays_(parts.take(kChunk)),
        prefix_(parts.take(kChunk)),
        factor_(parts.take(rows == kChunk ? kChunk * kChunk : 0)),
        state_(state) {}

  // The chunks that begin at the queries head.first .. head.last.
  void causal() noexcept {
    load_initial();
    made_decay_ = 0;
    const std::size_t keys = head_.keys, queries = head_.queries;
    const std::size_t alone = queries > keys ? queries - keys : 0;  // queries before the first key
    const std::size_t shift = keys > queries ? keys - queries : 0;  // keys before the first query
    if (head_.first == 0) emit(0, alone);
    for (std::size_t t = 0; t < shift;) {
      const std::size_t n = take_keys(t, least(kChunk, shift - t));
      update(n);
      t += n;
      if (stopped()) return;
    }
    // Chunks are the same whichever of them are answered.
    const std::size_t end = head_.last == queries ? keys : shift + head_.last - alone;
    for (std::size_t t = shift; t < end;) {
      const std::size_t i = t - shift + alone, n = take_keys(t, least(kChunk, keys - t));
      if (i >= head_.first) {
        transpose_keys(n);
        for (std::size_t r = 0; r < call_.group; ++r) attend(r, i, n);
      }
      update(n);
      t += n;
      if (stopped()) return;
    }
    if (head_.last == queries) store_final();
  }

  void absorb(std::size_t first, std::size_t last, bool with_initial) noexcept {
    if (with_initial)
      load_initial();
    else
      clear_state();
    for (std::size_t t = first; t < last;) {
      const std::size_t n = take_keys(t, least(rows_, last - t));
      update(n);
      t += n;
      if (stopped()) return;
    }
  }

  // Queries against the state alone.
  void emit(std::size_t first, std::size_t last) noexcept {
    for (std::size_t r = 0; r < call_.group; ++r)
      for (std::size_t i = first; i < last; i += rows_) {
        if (stopped()) return;
        const std::size_t n = least(rows_, last - i);
        take_queries(r, i, n);
        if (call_.map == FASTOPS_MAP_SOFTMAX)
          for (std::size_t row = 0; row < n; ++row) divide(qf_ + row * fp_, state_.z);
        for (std::size_t row = 0; row < n; ++row) {
          T* const f = qf_ + row * fp_;
          factors_[row] = normalizes() ? dot(f, state_.z, fp_) : T(0);
          if (is_small(factors_[row])) {
            lift_row(row);
            factors_[row] = dot(f, state_.z, fp_);
          }
          factors_[row] = row_factor(factors_[row], row);
        }
        const Term<T> term{qf_, stride(fp_), 1, state_.s, stride(vp_), call_.features};
        write(r, i, n, &term, 1);
      }
  }

  void load_initial() noexcept {
    clear_state();
    if (head_.s_in == nullptr) return;
    const auto* const s = static_cast<const T*>(head_.s_in);
    for (std::size_t d = 0; d < call_.features; ++d)
      for (std::size_t e = 0; e < call_.values; ++e) state_.s[d * vp_ + e] = s[d * call_.values + e];
    copy(state_.z, static_cast<const T*>(head_.z_in), call_.features);
    if (!exponents_) return;
    const auto* const m = static_cast<const T*>(head_.m_in);
    for (std::size_t d = 0; d < call_.features; ++d) state_.m[d] = m[d] > kNone<T> ? m[d] : kNone<T>;
  }
  void store_final() const noexcept {
    if (head_.s_out == nullptr) return;
    auto* const s = static_cast<T*>(head_.s_out);
    for (std::size_t d = 0; d < call_.features; ++d)
      for (std::size_t e = 0; e < call_.values; ++e) s[d * call_.values + e] = state_.s[d * vp_ + e];
    copy(static_cast<T*>(head_.z_out), state_.z, call_.features);
    if (!exponents_) return;
    auto* const m = static_cast<T*>(head_.m_out);
    for (std::size_t d = 0; d < call_.features; ++d)
      m[d] = state_.m[d] > kNone<T> ? state_.m[d] : static_cast<T>(-__builtin_inf());
  }
  const State<T>& state() const noexcept { return state_; }
  void copy_state(const State<T>& to) const noexcept {
    copy(to.s, state_.s, fp_ * vp_);
    copy(to.z, state_.z, fp_);
    copy(to.m, state_.m, fp_);
  }

  // One token, with the caller's own state in place of the padded one.
  void step() noexcept {
    in_place_ = true;
    take_step_decay();
    auto* const s = static_cast<T*>(head_.s_out);
    auto* const z = static_cast<T*>(head_.z_out);
    copy(state_.z, z, call_.features);
    for (std::size_t d = call_.features; d < fp_; ++d) state_.z[d] = 0;
    T* const keep = running_;
    fill(keep, fp_, with_decay_ ? prefix_[0] : T(1));
    if (exponents_) {
      auto* const m = static_cast<T*>(head_.m_out);
      fill(state_.m, fp_, kNone<T>);
      for (std::size_t d = 0; d < call_.features; ++d) state_.m[d] = m[d] > kNone<T> ? m[d] : kNone<T>;
      take_keys(0, 1);
      for (std::size_t d = 0; d < call_.features; ++d) {
        keep[d] *= power_of_2(m_old_[d] - state_.m[d]);
        m[d] = state_.m[d];
      }
    } else {
      take_keys(0, 1);
    }
    for (std::size_t d = 0; d < call_.features; ++d) z[d] = state_.z[d] = keep[d] * z[d] + kf_[d];
    for (std::size_t d = call_.features; d < fp_; ++d) state_.z[d] = 0;
    for (std::size_t r = 0; r < call_.group; ++r) {
      take_queries(r, 0, 1);
      if (call_.map == FASTOPS_MAP_SOFTMAX) divide(qf_, state_.z);
      T denominator = normalizes() ? dot(qf_, state_.z, fp_) : T(0);
      if (is_small(denominator)) {
        lift_row(0);
        denominator = dot(qf_, state_.z, fp_);
      }
      step_columns(s, keep, r == 0);
      scale_row(o_, vp_, row_factor(denominator, 0));
      write_row<T>(call_.dtype, o_, call_.values,
                   const_cast<char*>(row_at(call_.dtype, head_.out.data, head_.out_head, r)));
    }
  }

 protected:
  // Asked after every chunk, answers every so many of them: some 100 us of work.
  bool stopped() noexcept {
    return ++asked_ % 16 == 0 && call_.stop != nullptr && call_.stop->asked(call_.stop->context, head_.worker);
  }
  static std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }
  static std::ptrdiff_t stride(std::size_t n) { return static_cast<std::ptrdiff_t>(n); }
  static void copy(T* to, const T* from, std::size_t n) { __builtin_memcpy(to, from, n * sizeof(T)); }
  bool normalizes() const { return call_.normalize && call_.map != FASTOPS_MAP_SOFTMAX; }
  const char* head_row(const Rows& rows, std::ptrdiff_t step, std::size_t r, std::size_t i) const {
    return row_at(call_.dtype, row_at(call_.dtype, rows.data, step, r), rows.row, i);
  }

  void clear_state() noexcept {
    fill<T>(state_.s, fp_ * vp_, 0);
    fill<T>(state_.z, fp_, 0);
    fill(state_.m, fp_, kNone<T>);
  }

  // The tokens t .. t + n of k and v, with features and decay; how many of them one chunk can hold. Fewer than n where
  // a row is not finite, since 0 times nan would reach the rows before it, or where exponents rise too steeply.
  std::size_t take_keys(std::size_t t, std::size_t n) noexcept {
    bool all = true;
    for (std::size_t j = 0; j < n; ++j) {
      live_[j] = head_.mask == nullptr || head_.mask[stride(t + j) * head_.mask_step] != 0;
      all &= live_[j];
    }
    x_ = block(head_.k, t, n, call_.dim, x_copy_, all ? nullptr : live_);
    v_ = block(head_.v, t, n, call_.values, v_copy_, all ? nullptr : live_);
    fetch_ahead(head_.k, t + n, head_.keys, call_.dim);
    fetch_ahead(head_.v, t + n, head_.keys, call_.values);
    if (call_.causal) n = finite_rows(n);
    if (exponents_ && with_decay_) n = limit_decay(t, n);
    if (exponents_)
      n = exponential_keys(n);
    else
      plain_features(kf_, n);
    for (std::size_t j = 0; j < rows_; ++j)
      if (j >= n || !live_[j]) fill<T>(kf_ + j * fp_, fp_, 0);
    if (with_decay_ && !in_place_) take_decay(t, n);
    return n;
  }

  // The rows t .. t + n of an array; those that are not live are zeros.
  Block<T> block(const Rows& rows, std::size_t t, std::size_t n, std::size_t width, T* copy,
                 const bool* live) const noexcept {
    const char* const data = row_at(call_.dtype, rows.data, rows.row, t);
    if (live == nullptr && is_plain<T>(call_.dtype, width)) return {reinterpret_cast<const T*>(data), rows.row};
    const std::size_t wide = padded<T>(width);
    if (live == nullptr) {
      read_rows<T>(call_.dtype, data, rows.row, n, width, copy);
      return {copy, stride(wide)};
    }
    for (std::size_t j = 0; j < n; ++j)
      if (live[j])
        read_row<T>(call_.dtype, row_at(call_.dtype, data, rows.row, j), width, copy + j * wide);
      else
        fill<T>(copy + j * wide, wide, 0);
    return {copy, stride(wide)};
  }

  // The rows t .., as many as a chunk has.
  void fetch_ahead(const Rows& rows, std::size_t t, std::size_t end, std::size_t width) const noexcept {
    fetch_rows(call_.dtype, rows.data, rows.row, t, least(t + rows_, end), width);
  }

  // Rows up to the first that is not finite; at least one.
  std::size_t finite_rows(std::size_t n) const noexcept {
    const auto finite = [&](std::size_t first, std::size_t last) {
      // Several sums, since each addition waits for the one before.
      constexpr std::size_t kSums = 4;
      V sums[kSums] = {};
      const auto add = [&](const T* row, std::size_t width) FASTOPS_BODY {
        std::size_t d = 0;
        for (; d + kSums * W <= width; d += kSums * W)
#pragma GCC unroll 4
          for (std::size_t i = 0; i < kSums; ++i) sums[i] = simd::fma(load<V>(row + d + i * W), V{}, sums[i]);
        for (; d < width; d += W) sums[0] = simd::fma(load<V>(row + d), V{}, sums[0]);
      };
      for (std::size_t j = first; j < last; ++j) {
        add(x_[j], dp_);
        add(v_[j], vp_);
      }
      const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      return !simd::any(sum != sum);
    };
    if (finite(0, n)) return n;
    for (std::size_t j = 0; j < n; ++j)
      if (!finite(j, j + 1)) return j == 0 ? 1 : j;
    return n;
  }

  void plain_features(T* f, std::size_t n) const noexcept {
    const T eps = static_cast<T>(call_.kernel_eps);
    const auto all = [&](auto body) FASTOPS_BODY {
      for (std::size_t j = 0; j < n; ++j) map_row(x_[j], f + j * fp_, call_.dim, fp_, body);
    };
    switch (call_.map) {
      case FASTOPS_MAP_ELU:
        return all([](V v) FASTOPS_BODY { return elu_feature(v); });
      case FASTOPS_MAP_RELU:
        return all([eps](V v) FASTOPS_BODY { return rectified(v) + eps; });
      case FASTOPS_MAP_RELU2:
        return all([eps](V v) FASTOPS_BODY {
          const V r = rectified(v);
          return simd::fma(r, r, splat<V>(eps));
        });
      case FASTOPS_MAP_COSINE:
        for (std::size_t j = 0; j < n; ++j) {
          const Norm norm = norm_of(x_[j]);
          map_row(x_[j], f + j * fp_, call_.dim, fp_, [norm](V v) FASTOPS_BODY { return v * norm.down / norm.root; });
          f[j * fp_ + call_.dim] = 1;
        }
        return;
      default:
        return all([](V v) FASTOPS_BODY { return v; });
    }
  }
  // |x| = root / down, down a power of two: squares overflow where elements do not. A quotient by the root is exactly 1
  // where x has one element.
  struct Norm {
    T down, root;
  };
  Norm norm_of(const T* x) const noexcept {
    T largest = 0;
    for (std::size_t d = 0; d < call_.dim; ++d) {
      const T size = x[d] < 0 ? -x[d] : x[d];
      if (!(size <= largest)) largest = size;
    }
    if (largest == 0) return {0, 1};
    int exponent = 0;
    (void)__builtin_frexp(static_cast<double>(largest), &exponent);
    constexpr int kMost = sizeof(T) == 4 ? 120 : 960;  // of subnormal numbers: the inverse would overflow
    const T down = power_of_2(static_cast<T>(exponent < -kMost ? kMost : -exponent));
    V sum{};
    for (std::size_t d = 0; d < dp_; d += W) {
      const V v = load<V>(x + d) * down;
      sum = simd::fma(v, v, sum);
    }
    return {down, static_cast<T>(__builtin_sqrt(static_cast<double>(sum_lanes<T>(sum))))};
  }

  // Logarithms of the exponential features.
  void logarithms(T* f, std::size_t n) const noexcept {
    const T scale = static_cast<T>(call_.scale);
    if (call_.map != FASTOPS_MAP_FAVOR) {
      for (std::size_t j = 0; j < n; ++j)
        map_row(x_[j], f + j * fp_, call_.dim, fp_, [scale](V v) FASTOPS_BODY { return v * scale; });
      return;
    }
    const Projection<T> w(call_);
    product<T>(n, fp_, Term<T>{x_.data, x_.step, 1, w.transposed, stride(fp_), call_.dim}, {f, stride(fp_)});
    for (std::size_t j = 0; j < n; ++j) {
      const T half = T(0.5) * scale * dot(x_[j], x_[j], dp_);
      map_row(f + j * fp_, f + j * fp_, call_.features, fp_, [half](V v) FASTOPS_BODY { return v - half; });
    }
  }

  std::size_t exponential_keys(std::size_t n) noexcept {
    logarithms(kf_, n);
    if (call_.causal) n = level_rows(n);
    copy(m_old_, state_.m, fp_);
    bool changed = false;
    for (std::size_t d = 0; d < fp_; d += W) {
      V top = load<V>(state_.m + d);
      for (std::size_t j = 0; j < n; ++j) {
        if (!live_[j]) continue;
        const V e = split_exp(load<V>(kf_ + j * fp_ + d)).n;
        top = select(e > top, e, top);
      }
      changed |= simd::any(top != load<V>(state_.m + d));
      store(state_.m + d, top);
    }
    if (changed && !units_fixed_) rescale(m_old_);
    for (std::size_t j = 0; j < n; ++j) power_features(kf_ + j * fp_);
    return n;
  }
  // Logarithms to features in units of 2^m.
  void power_features(T* f) const noexcept {
    for (std::size_t d = 0; d < fp_; d += W) {
      const Exponential<V> e = split_exp(load<V>(f + d));
      store(f + d, times_power(e.y, e.n - load<V>(state_.m + d)) * share_);
    }
    for (std::size_t d = call_.features; d < fp_; ++d) f[d] = 0;
  }
  std::size_t level_rows(std::size_t n) const noexcept {
    std::size_t first = 0;
    while (first < n && !live_[first]) ++first;
    std::size_t rows = n;
    for (std::size_t d = 0; d < fp_ && first < n; d += W) {
      const V start = split_exp(load<V>(kf_ + first * fp_ + d)).n, before = load<V>(state_.m + d);
      // Rows before the first live key see what was before alone.
      const auto none = (before <= kNone<T>) | (start <= before);
      if (first > 0 && simd::any(select(none, V{}, start - before) > kMostGrowth<T>)) return first;
      const V limit = select(start > before, start, before) + kMostGrowth<T>;
      for (std::size_t j = first + 1; j < rows; ++j)
        if (live_[j] && simd::any(split_exp(load<V>(kf_ + j * fp_ + d)).n > limit)) rows = j;
    }
    return rows;
  }
  // The state from units of 2^old to those of 2^m.
  void rescale(const T* old) noexcept {
    for (std::size_t d = 0; d < fp_; ++d)
      if (old[d] != state_.m[d]) scale_state(d, power_of_2(old[d] - state_.m[d]));
  }
  void scale_state(std::size_t d, T factor) noexcept {
    state_.z[d] *= factor;
    if (in_place_) return;
    if (transposed_ == nullptr) {
      scale_row(state_.s + d * vp_, vp_, factor);
    } else {
      for (std::size_t e = 0; e < vp_; ++e) transposed_[e * fp_ + d] *= factor;
    }
  }

  bool is_steep(std::size_t t) const noexcept {
    return exponents_ && with_decay_ &&
           static_cast<const T*>(head_.decay)[stride(t) * head_.decay_step] < kSteepDecay<T>;
  }
  // Tokens t .. t + n up to where decays would hide what comes before them. The first one's decay, where it is steep,
  // goes into the units of the state; and units that decays have left behind are brought down.
  std::size_t limit_decay(std::size_t t, std::size_t n) noexcept {
    const auto* const g = static_cast<const T*>(head_.decay);
    T sum = 0;
    for (std::size_t j = 1; j < n; ++j)
      if ((sum += g[stride(t + j) * head_.decay_step]) < kMostDecay<T>) n = j;
    if (units_fixed_) return n;
    const T decay = g[stride(t) * head_.decay_step];
    Exponential<V> first{splat<V>(T(1)), V{}};
    if (is_steep(t)) first = split_exp(splat<V>(decay));
    for (std::size_t d = 0; d < call_.features; ++d) {
      if (state_.m[d] <= kNone<T>) continue;
      state_.m[d] += first.n[0];
      T factor = decay == -__builtin_inf() ? T(0) : first.y[0];
      const T z = state_.z[d] * factor;
      if (z == 0) {
        state_.m[d] = kNone<T>;
      } else if (z < power_of_2(T(kForgotten))) {
        int exponent = 0;
        (void)__builtin_frexp(static_cast<double>(z), &exponent);
        state_.m[d] += static_cast<T>(exponent);
        factor *= power_of_2(static_cast<T>(-exponent));
      }
      if (factor == 1) continue;
      scale_state(d, factor);
      if (in_place_) running_[d] *= factor;
    }
    return n;
  }

  // Products of decays: prefix_[i] up to and with token i, factor_[i][j] after token j up to i.
  void take_decay(std::size_t t, std::size_t n) noexcept {
    const auto* const g = static_cast<const T*>(head_.decay);
    if (head_.decay_step == 0 && made_decay_ >= n) return;
    made_decay_ = n;
    for (std::size_t j = 0; j < kChunk; ++j) decays_[j] = j < n ? g[stride(t + j) * head_.decay_step] : T(0);
    if (is_steep(t)) decays_[0] = 0;
    for (std::size_t j = 0; j < kChunk; j += W) store(decays_ + j, exp_nonpositive(load<V>(decays_ + j)));
    fill<T>(factor_, kChunk * kChunk, 0);
    T product = 1;
    for (std::size_t i = 0; i < n; ++i) {
      const T e = decays_[i];
      prefix_[i] = product *= e;
      if (i > 0)
        for (std::size_t j = 0; j < i; j += W)
          store(factor_ + i * kChunk + j, load<V>(factor_ + (i - 1) * kChunk + j) * e);
      factor_[i * kChunk + i] = 1;
    }
  }

  void take_queries(std::size_t r, std::size_t i, std::size_t n) noexcept {
    const Rows q{row_at(call_.dtype, head_.q.data, head_.q_head, r), head_.q.row};
    x_ = block(q, i, n, call_.dim, x_copy_, nullptr);
    fetch_ahead(q, i + n, head_.queries, call_.dim);
    for (std::size_t row = 0; row < n; ++row) lifted_[row] = 1;
    if (!exponents_) {
      plain_features(qf_, n);
      if (call_.scale != 1.0)
        for (std::size_t row = 0; row < n; ++row) scale_row(qf_ + row * fp_, fp_, static_cast<T>(call_.scale));
      return;
    }
    logarithms(qf_, n);
    for (std::size_t row = 0; row < n; ++row) exponential_query(qf_ + row * fp_, row);
  }
  // Features in units of 2^(shift_ - m); of the softmax map those that add up to 1.
  void exponential_query(T* f, std::size_t row) noexcept {
    const bool softmax = call_.map == FASTOPS_MAP_SOFTMAX;
    T top = kNone<T> * 2;
    for (std::size_t d = 0; d < fp_; d += W) {
      V e = split_exp(load<V>(f + d)).n;
      if (!softmax) e += load<V>(state_.m + d);
      for (std::size_t l = 0; l < W && d + l < call_.features; ++l)
        if (!(e[l] <= top)) top = e[l];
    }
    V sum{};
    for (std::size_t d = 0; d < fp_; d += W) {
      const Exponential<V> e = split_exp(load<V>(f + d));
      const V n = softmax ? e.n : e.n + load<V>(state_.m + d);
      V y = times_power(e.y, n - top) * share_;
      if (d + W > call_.features)
        for (std::size_t l = 0; l < W; ++l) y[l] = d + l < call_.features ? y[l] : T(0);
      sum += y;
      store(f + d, y);
    }
    shift_[row] = top;
    if (softmax) scale_row(f, fp_, T(1) / sum_lanes<T>(sum));
  }
  // f / z, 0 where z is.
  void divide(T* f, const T* z) const noexcept {
    for (std::size_t d = 0; d < fp_; d += W) {
      const V sum = load<V>(z + d);
      store(f + d, select(sum == V{}, V{}, load<V>(f + d) / sum));
    }
  }

  void transpose_keys(std::size_t n) noexcept { transpose<T>(kf_, fp_, padded<T>(n), fp_, kft_, kChunk); }

  // The queries i .. i + n, one beside each key of the chunk.
  void attend(std::size_t r, std::size_t i, std::size_t n) noexcept {
    take_queries(r, i, n);
    if (call_.map == FASTOPS_MAP_SOFTMAX) {
      copy(running_, state_.z, fp_);
      for (std::size_t row = 0; row < n; ++row) {
        accumulate(running_, kf_ + row * fp_);
        divide(qf_ + row * fp_, running_);
      }
    }
    weigh(n);
    const auto denominator = [&](std::size_t row) {
      V sum{};
      for (std::size_t j = 0; j < padded<T>(row + 1); j += W) sum += load<V>(p_ + row * kChunk + j);
      return sum_lanes<T>(sum) + (with_decay_ ? prefix_[row] : T(1)) * dot(qf_ + row * fp_, state_.z, fp_);
    };
    bool small = false;
    for (std::size_t row = 0; row < n; ++row) {
      factors_[row] = normalizes() ? denominator(row) : T(0);
      small |= is_small(factors_[row]);
    }
    if (small) {
      lift(n);
      weigh(n);
      for (std::size_t row = 0; row < n; ++row) factors_[row] = denominator(row);
    }
    if (with_decay_)
      for (std::size_t row = 0; row < n; ++row) scale_row(qf_ + row * fp_, fp_, prefix_[row]);
    const Term<T> terms[2] = {{qf_, stride(fp_), 1, state_.s, stride(vp_), call_.features},
                              {p_, stride(kChunk), 1, v_.data, v_.step, n}};
    for (std::size_t row = 0; row < n; ++row) factors_[row] = row_factor(factors_[row], row);
    write(r, i, n, terms, 2);
  }
  // The triangle of weights.
  void weigh(std::size_t n) noexcept {
    lower_product<T>(n, {qf_, stride(fp_), 1, kft_, stride(kChunk), call_.features}, p_, stride(kChunk),
                     with_decay_ ? factor_ : nullptr);
  }
  bool is_small(T denominator) const noexcept {
    return !exponents_ && normalizes() && denominator < kSmallDenominator<T> && denominator > -kSmallDenominator<T>;
  }
  // Features of those rows times a power of two, which the normaliser takes out again.
  void lift(std::size_t n) noexcept {
    for (std::size_t row = 0; row < n; ++row)
      if (is_small(factors_[row])) lift_row(row);
  }
  // As far as the largest of them allows.
  void lift_row(std::size_t row) noexcept {
    T* const f = qf_ + row * fp_;
    T largest = 0;
    for (std::size_t d = 0; d < call_.features; ++d) {
      const T size = f[d] < 0 ? -f[d] : f[d];
      largest = size > largest ? size : largest;
    }
    int exponent = 0;
    (void)__builtin_frexp(static_cast<double>(largest), &exponent);
    const int most = kMostLift<T> - (exponent > 0 ? exponent : 0);
    lifted_[row] = power_of_2(static_cast<T>(most > 0 ? most : 0));
    scale_row(f, fp_, lifted_[row]);
  }
  void add_keys(std::size_t n) noexcept {
    for (std::size_t d = 0; d < fp_; d += W) {
      V sum = load<V>(state_.z + d);
      // The chunk's sum by itself first: a long sum errs with every addition to it.
      V chunk{};
      for (std::size_t j = 0; j < n; ++j) chunk += load<V>(kf_ + j * fp_ + d);
      store(state_.z + d, sum + chunk);
    }
  }
  void accumulate(T* sum, const T* row) const noexcept {
    for (std::size_t d = 0; d < fp_; d += W) store(sum + d, load<V>(sum + d) + load<V>(row + d));
  }
  // 1 / (denominator + eps), 0 where that is 0; without a normaliser the units of the weights.
  T row_factor(T denominator, std::size_t row) const noexcept {
    const bool shifted = exponents_ && call_.map != FASTOPS_MAP_SOFTMAX;
    if (!normalizes()) return shifted ? power_of_2(shift_[row]) : T(1);
    if (call_.eps != 0.0) {
      const T eps = static_cast<T>(call_.eps);
      denominator += shifted ? eps * power_of_2(-shift_[row]) : eps * lifted_[row];
    }
    // Of less than the least normal number there may be no inverse.
    constexpr T kNormal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
    if (denominator < kNormal && denominator > -kNormal) return 0;
    return T(1) / denominator;
  }
  // The outputs i .. i + n: the sum of the terms, times factors_.
  void write(std::size_t r, std::size_t i, std::size_t n, const Term<T>* terms, int count) noexcept {
    const Rows out{row_at(call_.dtype, head_.out.data, head_.out_head, r), head_.out.row};
    char* const data = const_cast<char*>(row_at(call_.dtype, out.data, out.row, i));
    fetch_ahead(out, i + n, head_.queries, call_.values);
    if (is_plain<T>(call_.dtype, call_.values)) {
      product<T>(n, vp_, terms, count, {reinterpret_cast<T*>(data), out.row, nullptr, 0, factors_},
                 count == 2 ? Band::kLower : Band::kAll);
      return;
    }
    product<T>(n, vp_, terms, count, {o_, stride(vp_), nullptr, 0, factors_}, count == 2 ? Band::kLower : Band::kAll);
    for (std::size_t row = 0; row < n; ++row)
      write_row<T>(call_.dtype, o_ + row * vp_, call_.values,
                   const_cast<char*>(row_at(call_.dtype, data, out.row, row)));
  }

  // S and z after the chunk.
  void update(std::size_t n) noexcept {
    const T keep = with_decay_ ? prefix_[n - 1] : T(1);
    if (with_decay_)
      for (std::size_t j = 0; j < n; ++j) scale_row(kf_ + j * fp_, fp_, factor_[(n - 1) * kChunk + j]);
    product<T>(call_.features, vp_, Term<T>{kf_, 1, stride(fp_), v_.data, v_.step, n},
               {state_.s, stride(vp_), &keep, 0});
    if (with_decay_) scale_row(state_.z, fp_, keep);
    add_keys(n);
  }

  void take_step_decay() noexcept {
    if (!with_decay_) return;
    fill<T>(decays_, kChunk, 0);
    decays_[0] = is_steep(0) ? T(0) : *static_cast<const T*>(head_.decay);
    store(decays_, exp_nonpositive(load<V>(decays_)));
    prefix_[0] = decays_[0];
  }
  // Columns e .. of a token's step: [s = keep s + k v and] o = q s. Whole vectors, with the values and the sums in
  // registers: values read beside what is written wait for it where the last 12 bits of the addresses agree.
  template <std::size_t Vectors> void step_vectors(T* s, const T* keep, std::size_t e, bool moves) noexcept {
    V values[Vectors], sums[Vectors] = {};
#pragma GCC unroll 8
    for (std::size_t x = 0; x < Vectors; ++x) values[x] = load<V>(v_[0] + e + x * W);
    const T *const k = kf_, *const q = qf_;
    const std::size_t rows = call_.features, row = call_.values;
    s += e;
    if (moves) {
      for (std::size_t d = 0; d < rows; ++d, s += row) {
        const V kd = splat<V>(k[d]), qd = splat<V>(q[d]), kept = splat<V>(keep[d]);
#pragma GCC unroll 8
        for (std::size_t x = 0; x < Vectors; ++x) {
          const V y = simd::fma(kd, values[x], kept * load<V>(s + x * W));
          store(s + x * W, y);
          sums[x] = simd::fma(qd, y, sums[x]);
        }
      }
    } else {
      for (std::size_t d = 0; d < rows; ++d, s += row) {
        const V qd = splat<V>(q[d]);
#pragma GCC unroll 8
        for (std::size_t x = 0; x < Vectors; ++x) sums[x] = simd::fma(qd, load<V>(s + x * W), sums[x]);
      }
    }
#pragma GCC unroll 8
    for (std::size_t x = 0; x < Vectors; ++x) store(o_ + e + x * W, sums[x]);
  }
  void step_part(T* s, const T* keep, std::size_t e, std::size_t count, bool moves) noexcept {
    V sum{};
    const V value = load<V>(v_[0] + e);
    for (std::size_t d = 0; d < call_.features; ++d, s += call_.values) {
      V y = simd::load_first<V>(s + e, count, T(0));
      if (moves) simd::store_first(s + e, y = simd::fma(splat<V>(kf_[d]), value, splat<V>(keep[d]) * y), count);
      sum = simd::fma(splat<V>(qf_[d]), y, sum);
    }
    store(o_ + e, sum);
  }
  void step_columns(T* s, const T* keep, bool moves) noexcept {
    std::size_t e = 0;
    for (; e + 4 * W <= call_.values; e += 4 * W) step_vectors<4>(s, keep, e, moves);
    for (; e + 2 * W <= call_.values; e += 2 * W) step_vectors<2>(s, keep, e, moves);
    for (; e + W <= call_.values; e += W) step_vectors<1>(s, keep, e, moves);
    if (e < call_.values) step_part(s, keep, e, call_.values - e, moves);
  }

  const LinearCall& call_;
  const LinearHead& head_;
  const std::size_t dp_, fp_, vp_;  // padded
  const bool exponents_, with_decay_;
  const std::size_t rows_;
  const T share_;  // FAVOR's 1 / sqrt(features)
  T *const x_copy_, *const v_copy_, *const kf_, *const kft_, *const qf_, *const p_, *const o_,
                                                                                        *const running_,
                                                                                            *const m_old_,
                                                                                                *const decays_,
                                                                                                    *const prefix_,
                                                                                                        *const factor_;
  State<T> state_;
  T* transposed_ = nullptr;   // the state's S as (values x features), where a pass keeps that
  Block<T> x_{}, v_{};        // the chunk's rows of q or k, and of v: the caller's, or the copies
  bool in_place_ = false;     // S is the caller's, and rescaled with the step, by running_
  bool units_fixed_ = false;  // m is given, not found from the keys
  std::size_t made_decay_ = 0;
  unsigned asked_ = 15;  // so that the first question is answered
  bool live_[kMostRows];
  T shift_[kMostRows], factors_[kMostRows], lifted_[kMostRows];
};

}  // namespace fastops::FASTOPS_LEVEL::attention
#endif
