// SPDX-License-Identifier: BSD-3-Clause
// Loops of the optimizer steps over runs of elements, compiled once per CPU level.
#include "optim/optim_kernels.h"

#include <type_traits>

#include "core/half.h"
#include "core/simd.h"
#include "optim/optim_math.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace optim;
using simd::kLanes;

// Elements in memory: float, double, and the half types by tag; any alignment.

struct F16 {};
struct BF16 {};
template <class S> inline constexpr std::size_t kSize = sizeof(S);
template <> inline constexpr std::size_t kSize<F16> = 2;
template <> inline constexpr std::size_t kSize<BF16> = 2;

template <class T> struct LanesOf;
template <> struct LanesOf<float> {
  using type = simd::f32;
};
template <> struct LanesOf<double> {
  using type = simd::f64;
};
template <class T> using Lanes = typename LanesOf<T>::type;
using simd::Element;

template <class V> FASTOPS_INLINE V load_bytes(const char* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Elements i .. of memory at p, converted to V.
template <class S, class V> FASTOPS_INLINE V get(const char* p, std::size_t i) {
  p += i * kSize<S>;
  if constexpr (std::is_same_v<S, Element<V>>) {
    return load_bytes<V>(p);
  } else if constexpr (std::is_same_v<V, simd::f64> && kSize<S> == 2) {
    V v;
    for (std::size_t k = 0; k < kLanes<V>; ++k) {
      std::uint16_t h;
      __builtin_memcpy(&h, p + 2 * k, 2);
      v[k] = std::is_same_v<S, F16> ? half::from_f16(h) : half::from_bf16(h);
    }
    return v;
  } else if constexpr (std::is_same_v<S, F16>) {
    return half::from_f16(load_bytes<simd::half_u16>(p));
  } else if constexpr (std::is_same_v<S, BF16>) {
    return half::from_bf16(load_bytes<simd::half_u16>(p));
  } else {
    typedef S Packed __attribute__((vector_size(kLanes<V> * sizeof(S))));
    return __builtin_convertvector(load_bytes<Packed>(p), V);
  }
}
template <class V> FASTOPS_INLINE void put(char* p, std::size_t i, V v) {
  __builtin_memcpy(p + i * sizeof(v[0]), &v, sizeof v);
}

// How much of a vector there is: all of it, or the first `count` elements.
struct Whole {};
struct Part {
  std::size_t count;
};
template <class S, class V> FASTOPS_INLINE V get(const char* p, std::size_t i, Whole) { return get<S, V>(p, i); }
template <class S, class V> FASTOPS_INLINE V get(const char* p, std::size_t i, Part part) {
  alignas(64) char whole[kLanes<V> * kSize<S>] = {};
  __builtin_memcpy(whole, p + i * kSize<S>, part.count * kSize<S>);
  return get<S, V>(whole, 0);
}
template <class V> FASTOPS_INLINE void put(char* p, std::size_t i, V v, Whole) { put(p, i, v); }
template <class V> FASTOPS_INLINE void put(char* p, std::size_t i, V v, Part part) {
  alignas(64) char whole[sizeof(V)];
  put(whole, 0, v);
  __builtin_memcpy(p + i * sizeof(v[0]), whole, part.count * sizeof(v[0]));
}

template <class V, class Body> FASTOPS_INLINE void for_each(std::size_t n, Body body) {
  constexpr std::size_t L = kLanes<V>;
  std::size_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    body(i, Whole{});
    body(i + L, Whole{});
  }
  if (i + L <= n) {
    body(i, Whole{});
    i += L;
  }
  if (i < n) body(i, Part{n - i});
}
#define FASTOPS_BODY __attribute__((always_inline))

// Moving averages.

template <class S, class P> void ema(const Piece& piece, double w, const std::uint64_t*) noexcept {
  using V = Lanes<S>;
  if (w == 0.0) return;
  const char* const p = piece.at[0];
  char* const s = piece.at[1];
  if (w == 1.0)
    return for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY { put(s, i, get<P, V>(p, i, part), part); });
  const Lerp<V> lerp(w);
  const auto pass = [&](const auto& step) FASTOPS_BODY {
    for_each<V>(piece.n, [&](std::size_t i, auto part)
                             FASTOPS_BODY { put(s, i, step(get<S, V>(s, i, part), get<P, V>(p, i, part)), part); });
  };
  // The end that the rule starts from is chosen outside of the loop.
  if (lerp.near_start)
    pass([c = lerp.coefficient](V start, V end) FASTOPS_BODY { return fma(c, end - start, start); });
  else
    pass([c = lerp.coefficient](V start, V end) FASTOPS_BODY { return fma(c, end - start, end); });
}

// bfloat16 shadows, by runs of 32 elements: a run is two halves that share their hashes.
template <class P> void ema_random(const Piece& piece, double w, const std::uint64_t* seed) noexcept {
  using V = simd::f32;
  constexpr std::size_t L = kLanes<V>;
  if (w == 0.0) return;
  const Lerp<V> lerp(w);
  const RandomBits random(*seed, piece.tensor);
  const bool copies = w == 1.0;
  const auto average = [&](char* s, const char* p, std::size_t i, simd::u32 bits) FASTOPS_BODY {
    const V end = get<P, V>(p, i);
    const V moved = copies ? end : lerp(get<BF16, V>(s, i), end);
    const simd::half_u16 rounded = half::narrow_bits(round_randomly(moved, bits));
    __builtin_memcpy(s + 2 * i, &rounded, sizeof rounded);
  };
  const auto run = [&](char* s, const char* p, std::size_t first) FASTOPS_BODY {
    for (std::size_t i = 0; i < 16; i += L) {
      const simd::u32 bits = random(first / 2 + i);
      average(s, p, i, bits & 0xffffu);
      average(s, p, i + 16, bits >> 16);
    }
  };
  std::size_t i = 0;
  for (; i + 32 <= piece.n; i += 32) run(piece.at[1] + 2 * i, piece.at[0] + kSize<P> * i, piece.first + i);
  if (i == piece.n) return;
  alignas(64) char s[32 * 2] = {}, p[32 * kSize<P>] = {};
  __builtin_memcpy(s, piece.at[1] + 2 * i, (piece.n - i) * 2);
  __builtin_memcpy(p, piece.at[0] + kSize<P> * i, (piece.n - i) * kSize<P>);
  run(s, p, piece.first + i);
  __builtin_memcpy(piece.at[1] + 2 * i, s, (piece.n - i) * 2);
}

template <std::size_t K, class P> void ema_profiles(const Piece& piece, const double* w) noexcept {
  using V = simd::f32;
  V coefficient[K];
  simd::i32 near_start[K];
  for (std::size_t k = 0; k < K; ++k) {
    const Lerp<V> lerp(w[k]);
    coefficient[k] = lerp.coefficient;
    near_start[k] = simd::i32{} - (lerp.near_start ? 1 : 0);
  }
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    const V p = get<P, V>(piece.at[0], i, part);
    for (std::size_t k = 0; k < K; ++k) {
      char* const at = piece.at[1 + k];
      const V s = get<float, V>(at, i, part);
      put(at, i, fma(coefficient[k], p - s, select(near_start[k], s, p)), part);
    }
  });
}

template <class T> void lookahead(const Piece& piece, double alpha) noexcept {
  using V = Lanes<T>;
  char *const slow = piece.at[0], *const fast = piece.at[1];
  const Lerp<V> lerp(alpha);
  const bool stays = alpha == 0.0, copies = alpha == 1.0;
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    const V q = get<T, V>(slow, i, part), p = get<T, V>(fast, i, part);
    const V r = stays ? q : copies ? p : lerp(q, p);
    put(slow, i, r, part);
    put(fast, i, r, part);
  });
}

// Steps.

// What may follow the new parameters in the same pass: their shadow, and gradients of zero.
template <class T, class G> struct Finish {
  using V = Lanes<T>;
  char *shadow, *gradient;
  Lerp<V> lerp;
  bool copies;

  Finish(double w, char* shadow_at, char* gradient_at)
      : shadow(w == 0.0 ? nullptr : shadow_at), gradient(gradient_at), lerp(w), copies(w == 1.0) {}
  template <class Size> FASTOPS_INLINE void operator()(std::size_t i, V p, Size part) const {
    if (shadow != nullptr) put(shadow, i, copies ? p : lerp(get<T, V>(shadow, i, part), p), part);
    if (gradient == nullptr) return;
    if constexpr (std::is_same_v<Size, Whole>)
      __builtin_memset(gradient + i * kSize<G>, 0, kLanes<V> * kSize<G>);
    else
      __builtin_memset(gradient + i * kSize<G>, 0, part.count * kSize<G>);
  }
};

template <class T, class G> void sgd(const Piece& piece, const fastops_sgd& step) noexcept {
  using V = Lanes<T>;
  const Sgd<V> rule(step);
  char *const p = piece.at[0], *const g = piece.at[1], *const m = step.has_momentum ? piece.at[2] : nullptr;
  char* const shadow = step.has_ema && step.moves ? piece.at[step.has_momentum ? 3 : 2] : nullptr;
  const Finish<T, G> finish(step.ema_weight, shadow, step.zero_grad ? g : nullptr);
  const bool moves = step.moves != 0, reads = moves || rule.decays;
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    V parameter = reads ? get<T, V>(p, i, part) : V{};
    V direction = rule.gradient(parameter, get<G, V>(g, i, part));
    if (m != nullptr) {
      const V velocity = rule.velocity(get<T, V>(m, i, part), direction);
      put(m, i, velocity, part);
      direction = rule.direction(velocity, direction);
    }
    if (moves) {
      parameter = rule.move(parameter, direction);
      put(p, i, parameter, part);
    }
    finish(i, parameter, part);
  });
}

template <class T, class G> void adamw(const Piece& piece, const fastops_adamw& step) noexcept {
  using V = Lanes<T>;
  const Adam<V> rule(step);
  char *const p = piece.at[0], *const g = piece.at[1], *const m = piece.at[2], *const v = piece.at[3];
  const Finish<T, G> finish(step.ema_weight, step.has_ema ? piece.at[4] : nullptr, step.zero_grad ? g : nullptr);
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    V parameter = get<T, V>(p, i, part), first = get<T, V>(m, i, part), second = get<T, V>(v, i, part);
    rule(parameter, get<G, V>(g, i, part), first, second);
    put(p, i, parameter, part);
    put(m, i, first, part);
    put(v, i, second, part);
    finish(i, parameter, part);
  });
}

// The moments of a row without a gradient.
template <class T> void decay_moments(const Piece& piece, const fastops_adamw& step) noexcept {
  using V = Lanes<T>;
  const V beta1 = splat<V>(static_cast<T>(1.0 - step.w1)), beta2 = splat<V>(static_cast<T>(step.beta2));
  char *const m = piece.at[2], *const v = piece.at[3];
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    put(m, i, beta1 * get<T, V>(m, i, part), part);
    put(v, i, beta2 * get<T, V>(v, i, part), part);
  });
}

template <class T, class G> void eg(const Piece& piece, double lr) noexcept {
  using V = Lanes<T>;
  const V rate = splat<V>(static_cast<T>(-lr));
  char* const p = piece.at[0];
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    put(p, i, get<T, V>(p, i, part) * math::exp(rate * get<G, V>(piece.at[1], i, part)), part);
  });
}

// Sums in double in the chains of Angle, whatever the lanes are: the same order at every level.
template <class T, class G> void angle(const Piece& piece, Angle* sums) noexcept {
  using V = simd::f64;
  constexpr std::size_t L = kLanes<V>, kParts = kSumChains / L;
  V dot[kParts], update[kParts], gradient[kParts];
  for (std::size_t k = 0; k < kParts; ++k) {
    dot[k] = simd::load<V>(sums->dot + k * L);
    update[k] = simd::load<V>(sums->update + k * L);
    gradient[k] = simd::load<V>(sums->gradient + k * L);
  }
  const auto add = [&](std::size_t i, std::size_t k, auto part) FASTOPS_BODY {
    const V h = get<T, V>(piece.at[3], i, part), g = get<G, V>(piece.at[1], i, part);
    dot[k] = fma(h, g, dot[k]);
    update[k] = fma(h, h, update[k]);
    gradient[k] = fma(g, g, gradient[k]);
  };
  std::size_t i = 0;
  for (; i + kSumChains <= piece.n; i += kSumChains)
    for (std::size_t k = 0; k < kParts; ++k) add(i + k * L, k, Whole{});
  for (std::size_t k = 0; i < piece.n; ++k, i += L) add(i, k, Part{piece.n - i < L ? piece.n - i : L});
  for (std::size_t k = 0; k < kParts; ++k) {
    simd::store(sums->dot + k * L, dot[k]);
    simd::store(sums->update + k * L, update[k]);
    simd::store(sums->gradient + k * L, gradient[k]);
  }
}

template <class T, class G>
void adaptive_eg(const Piece& piece, const fastops_adaptive_eg& step, double scale) noexcept {
  using V = Lanes<T>;
  const Gain<V> rule(step);
  const V beta = splat<V>(static_cast<T>(step.beta)), rest = splat<V>(static_cast<T>(1.0 - step.beta));
  const V mu = splat<V>(static_cast<T>(step.mu)), lr = splat<V>(static_cast<T>(step.lr));
  const V minus_scale = splat<V>(static_cast<T>(-scale));
  char *const p = piece.at[0], *const m = piece.at[2], *const h = piece.at[3], *const gain = piece.at[4];
  for_each<V>(piece.n, [&](std::size_t i, auto part) FASTOPS_BODY {
    const V g = get<G, V>(piece.at[1], i, part), momentum = get<T, V>(m, i, part);
    const V factor = rule(get<T, V>(gain, i, part), momentum, g);
    const V update = fma(mu, get<T, V>(h, i, part), lr * factor * g);
    put(gain, i, factor, part);
    put(m, i, fma(beta, momentum, rest * g), part);
    put(h, i, update, part);
    put(p, i, fma(minus_scale, update, get<T, V>(p, i, part)), part);
  });
}

// Questions.

template <class S> struct ComputeOf {
  using type = simd::f32;
};
template <> struct ComputeOf<double> {
  using type = simd::f64;
};
template <class S> using Compute = typename ComputeOf<S>::type;

template <class S> bool all_zero(const char* p, std::size_t n) noexcept {
  using V = Compute<S>;
  bool zero = true;
  for_each<V>(n,
              [&](std::size_t i, auto part) FASTOPS_BODY { zero = zero && !simd::any(get<S, V>(p, i, part) != V{}); });
  return zero;
}

template <class S> bool all_finite(const char* p, std::size_t n) noexcept {
  using V = Compute<S>;
  // x - x is nan for infinities and nan.
  using M = decltype(V{} != V{});
  M odd{};
  for_each<V>(n, [&](std::size_t i, auto part) FASTOPS_BODY {
    const V x = get<S, V>(p, i, part), zero = x - x;
    odd |= zero != zero;
  });
  return !simd::any(odd);
}

}  // namespace

#define FASTOPS_STEP(name) {name<float, F16>, name<float, BF16>, name<float, float>, name<double, double>}
#define FASTOPS_EMA(name, S) {name<S, F16>, name<S, BF16>, name<S, float>, name<S, double>}
#define FASTOPS_EACH(name) {name<F16>, name<BF16>, name<float>, name<double>}
const OptimKernels kOptimKernels = {
    {{}, FASTOPS_EACH(ema_random), FASTOPS_EMA(ema, float), FASTOPS_EMA(ema, double)},
    {{}, {}, FASTOPS_EMA(ema_profiles, 2), FASTOPS_EMA(ema_profiles, 3), FASTOPS_EMA(ema_profiles, 4)},
    FASTOPS_STEP(sgd),
    FASTOPS_STEP(adamw),
    FASTOPS_STEP(eg),
    FASTOPS_STEP(angle),
    FASTOPS_STEP(adaptive_eg),
    {nullptr, nullptr, lookahead<float>, lookahead<double>},
    {nullptr, nullptr, decay_moments<float>, decay_moments<double>},
    FASTOPS_EACH(all_zero),
    FASTOPS_EACH(all_finite),
};

}  // namespace fastops::FASTOPS_LEVEL
