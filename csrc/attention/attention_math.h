// SPDX-License-Identifier: BSD-3-Clause
// Feature maps of linear attention and the exponentials of all attention kernels, on simd lanes.
#ifndef FASTOPS_ATTENTION_ATTENTION_MATH_H
#define FASTOPS_ATTENTION_ATTENTION_MATH_H

#include "core/math.h"
#include "core/simd.h"

namespace fastops::FASTOPS_LEVEL::attention {

using simd::select;
using simd::splat;

template <class V> struct ExpRange;
template <> struct ExpRange<simd::f32> {
  static constexpr float kNormal = -87.3f;      // exp of it is normal
  static constexpr float kFarthest = 1e37f;     // logits beyond it count as it
  static constexpr float kVanishing = -200.0f;  // 2^it is 0
};
template <> struct ExpRange<simd::f64> {
  static constexpr double kNormal = -708.3, kFarthest = 1e37, kVanishing = -1200.0;
};

// exp(x) for kNormal <= x <= 0, within 1.5 units in the last place, 4 near kNormal (ln 2 is one float here); nan stays.
template <class V> FASTOPS_INLINE V exp_normal(V x) {
  using F = math::Format<V>;
  using T = typename F::T;
  const V rounded = simd::fma(x, splat<V>(F::kLog2E), splat<V>(F::kRound));
  const V n = rounded - splat<V>(F::kRound);
  V r;
  if constexpr (sizeof(T) == 4)
    r = simd::fma(n, splat<V>(T(-0x1.62e430p-1)), x);
  else
    r = simd::fma(n, splat<V>(-F::kLn2Low), simd::fma(n, splat<V>(-F::kLn2High), x));
  const V y = simd::fma(r * r, math::polynomial<typename F::Exp>(r), r) + 1;
  // The product keeps a nan of y, which a sum of bit patterns would not.
  using U = typename F::Unsigned;
  const U power = (simd::bits<U>(rounded) + typename F::U(F::kBias)) << F::kMantissa;
  return y * simd::bits<V>(power);
}
// exp(x) for x <= 0; 0 where it would be subnormal.
template <class V> FASTOPS_INLINE V exp_nonpositive(V x) {
  const V low = splat<V>(ExpRange<V>::kNormal);
  return select(x < low, V{}, exp_normal(simd::max(low, x)));
}

// exp(x) = y 2^n with an integer n: so a common factor 2^k never changes a bit of y. Where x is too large for its own
// fraction, y is 1 or so; of infinity both are nan, since inf / inf is.
template <class V> struct Exponential {
  V y, n;
};
template <class V> FASTOPS_INLINE Exponential<V> split_exp(V x) {
  using F = math::Format<V>;
  using T = typename F::T;
  const V far = splat<V>(ExpRange<V>::kFarthest), round = splat<V>(F::kRound);
  x = select(x < -far, -far, x);
  x = select(x > far, simd::fma(x, V{}, far), x);
  const V t = x * splat<V>(F::kLog2E);
  const V whole = splat<V>(F::kRound / 8);  // beyond it x ln 2 has no fraction to speak of
  const auto fine = (t < whole) & (t > -whole);
  const V rounded = simd::fma(x, splat<V>(F::kLog2E), round) - round;
  const V n = select(fine, rounded, t);
  V r = simd::fma(-n, splat<V>(F::kLn2Low), simd::fma(-n, splat<V>(F::kLn2High), x));
  r = select(fine | (x != x), r, V{} + T(0));
  return {simd::fma(r * r, math::polynomial<typename F::Exp>(r), r) + 1, n};
}
// y 2^k for an integer k, at most 1 or so above 0.
template <class V> FASTOPS_INLINE V times_power(V y, V k) {
  const V least = splat<V>(ExpRange<V>::kVanishing);
  k = select(k < least, least, k);
  return math::scale(y, k + splat<V>(math::Format<V>::kRound));
}

// elu(x) + 1 without its cancellation: exp(min(x, 0)) + max(x, 0). Never below the least normal number.
template <class V> FASTOPS_INLINE V elu_feature(V x) {
  const V negative = select(x < V{}, x, V{});
  return exp_normal(simd::max(splat<V>(ExpRange<V>::kNormal), negative)) + simd::max(V{}, x);
}
// nan stays.
template <class V> FASTOPS_INLINE V rectified(V x) { return select(x < V{}, V{}, x); }

}  // namespace fastops::FASTOPS_LEVEL::attention
#endif
