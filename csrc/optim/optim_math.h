// SPDX-License-Identifier: BSD-3-Clause
// The mathematics of moving averages and optimizer steps on one element or one vector of them, every fused product
// explicit, so that results are equal wherever fma rounds once. V is a simd lane type; T its element.
#ifndef FASTOPS_OPTIM_OPTIM_MATH_H
#define FASTOPS_OPTIM_OPTIM_MATH_H

#include "core/math.h"
#include "core/simd.h"
#include "optim/optim_kernels.h"

namespace fastops::FASTOPS_LEVEL::optim {

using simd::fma;
using simd::select;
using simd::splat;

// s + w (p - s), from the nearer end as torch.lerp: exact at w = 1 for finite operands. w = 1 - decay comes in double.
template <class V> struct Lerp {
  V coefficient;
  bool near_start;

  FASTOPS_HD explicit Lerp(double w) {
    using T = simd::Element<V>;
    const T rounded = static_cast<T>(w);
    near_start = rounded < T(0.5);
    coefficient = splat<V>(near_start ? rounded : static_cast<T>(rounded - T(1)));
  }
  FASTOPS_INLINE V operator()(V start, V end) const { return fma(coefficient, end - start, near_start ? start : end); }
};

// m = keep m + gain (g + weight_decay p); p -= lr (nesterov ? g + momentum m : m).
template <class V> struct Sgd {
  using T = simd::Element<V>;
  V lr, momentum, keep, gain, weight_decay;
  bool decays, nesterov;

  explicit Sgd(const fastops_sgd& s)
      : lr(splat<V>(static_cast<T>(-s.lr))),
        momentum(splat<V>(static_cast<T>(s.momentum))),
        keep(splat<V>(static_cast<T>(s.keep))),
        gain(splat<V>(static_cast<T>(s.gain))),
        weight_decay(splat<V>(static_cast<T>(s.weight_decay))),
        decays(s.weight_decay != 0.0),
        nesterov(s.nesterov != 0) {}
  FASTOPS_INLINE V gradient(V p, V g) const { return decays ? fma(weight_decay, p, g) : g; }
  FASTOPS_INLINE V velocity(V m, V g) const { return fma(keep, m, gain * g); }
  FASTOPS_INLINE V direction(V m, V g) const { return nesterov ? fma(momentum, m, g) : m; }
  FASTOPS_INLINE V move(V p, V direction) const { return fma(lr, direction, p); }
};

// AdamW in the arrangement of torch (Loshchilov and Hutter 2019).
template <class V> struct Adam {
  using T = simd::Element<V>;
  V decay, l2, beta2, w2, step_size, scale, eps;
  Lerp<V> first;
  bool coupled;

  explicit Adam(const fastops_adamw& s)
      : decay(splat<V>(static_cast<T>(s.decay))),
        l2(splat<V>(static_cast<T>(s.l2))),
        beta2(splat<V>(static_cast<T>(s.beta2))),
        w2(splat<V>(static_cast<T>(s.w2))),
        step_size(splat<V>(static_cast<T>(-s.step_size))),
        scale(splat<V>(static_cast<T>(s.scale))),
        eps(splat<V>(static_cast<T>(s.eps))),
        first(s.w1),
        coupled(s.l2 != 0.0) {}
  FASTOPS_INLINE void operator()(V& p, V g, V& m, V& v) const {
    if (coupled) g = fma(l2, p, g);
    m = first(m, g);
    v = fma(w2 * g, g, beta2 * v);
    p = fma(step_size, m / fma(simd::sqrt(v), scale, eps), decay * p);
  }
};

// The gains of the adaptive exponentiated gradient (Amid et al. 2022): up where the gradient keeps its sign.
template <class V> struct Gain {
  using T = simd::Element<V>;
  V up, down, low, high;

  explicit Gain(const fastops_adaptive_eg& s)
      : up(splat<V>(static_cast<T>(__builtin_exp(s.gain_lr)))),
        down(splat<V>(static_cast<T>(__builtin_exp(-s.gain_lr)))),
        low(splat<V>(static_cast<T>(s.gain_low))),
        high(splat<V>(static_cast<T>(s.gain_high))) {}
  static FASTOPS_INLINE V sign(V x) { return select(x > V{}, V{} + T(1), select(x < V{}, V{} - T(1), x)); }
  FASTOPS_INLINE V operator()(V gain, V m, V g) const {
    const V agreement = sign(m) * sign(g);  // nan where one of them is
    const V factor = select(agreement > V{}, up, select(agreement < V{}, down, agreement + T(1)));
    const V product = gain * factor;
    return select(product < low, low, select(product > high, high, product));
  }
};

// 16 random bits for each of 32 elements, from one hash a pair: element e takes the low half of hash (e / 32) 16 + e %
// 16 where bit 4 of e is clear, the high half where it is set. That division suits vectors of 4, 8 and 16 lanes.
struct RandomBits {
  std::uint32_t add, mix;

  FASTOPS_HD RandomBits(std::uint64_t seed, std::uint64_t tensor) noexcept {
    const std::uint64_t key = mix64(seed ^ mix64(tensor));
    add = static_cast<std::uint32_t>(key);
    mix = static_cast<std::uint32_t>(key >> 32);
  }
  // Hashes of the pairs from `pair` on, which is a multiple of the lanes.
  FASTOPS_INLINE simd::u32 operator()(std::uint64_t pair) const {
    simd::u32 x = simd::lane_numbers() + (static_cast<std::uint32_t>(pair) + add);
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x ^= splat<simd::u32>(mix + static_cast<std::uint32_t>(pair >> 32) * 0x9e3779b9u);
    x *= 0x735a2d97u;
    return x ^ (x >> 15);
  }

 private:
  // splitmix64's finaliser (Steele, Lea and Flood 2014).
  static FASTOPS_HD std::uint64_t mix64(std::uint64_t x) noexcept {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
};

// The bits of bfloat16: away from zero with the probability of the part cut off; infinity and nan stay what they are.
FASTOPS_INLINE simd::i32 round_randomly(simd::f32 x, simd::u32 random16) {
  const simd::u32 u = simd::bits<simd::u32>(x);
  const simd::i32 magnitude = simd::bits<simd::i32>(u & 0x7fffffffu);
  const simd::u32 cut = (u + random16) >> 16;
  const simd::u32 quiet = select(magnitude > 0x7f800000, simd::u32{} + 0x40u, simd::u32{});
  return simd::bits<simd::i32>(select(magnitude >= 0x7f800000, (u >> 16) | quiet, cut));
}

}  // namespace fastops::FASTOPS_LEVEL::optim
#endif
