// SPDX-License-Identifier: BSD-3-Clause
// The C interface of one element: one integer sum where operands and result are normal numbers, else the kernel's way.
#include <cstring>

#include "mitchell/mitchell_params.h"

namespace fastops {
namespace {

constexpr double kLmulConstant = 0x1p-4;

// The plain multiplier, or L-Mul's.
const fastops_mitchell& multiplier(bool is_lmul) noexcept {
  struct Own {
    fastops_mitchell m;
    explicit Own(double constant) noexcept : m() {
      fastops_mitchell_params params{};
      params.c = constant;
      set_constants(m, params);
    }
  };
  static const Own plain(0.0), lmul(kLmulConstant);
  return is_lmul ? lmul.m : plain.m;
}

template <class F> struct Bits;
template <> struct Bits<float> {
  using U = std::uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr U kOne = U{127} << kMantissa, kNormals = U{254} << kMantissa, kSign = U{1} << 31;
  static constexpr fastops_dtype kType = FASTOPS_F32;
};
template <> struct Bits<double> {
  using U = std::uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr U kOne = U{1023} << kMantissa, kNormals = U{2046} << kMantissa, kSign = U{1} << 63;
  static constexpr fastops_dtype kType = FASTOPS_F64;
};

template <class F> typename Bits<F>::U bits(F value) noexcept {
  typename Bits<F>::U result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
template <class F> F number(typename Bits<F>::U pattern) noexcept {
  F result;
  std::memcpy(&result, &pattern, sizeof result);
  return result;
}

// Whether these bits, without a sign, are a normal number's. Sums that left the range wrap to patterns that are not.
template <class F> bool is_normal(typename Bits<F>::U magnitude) noexcept {
  using N = Bits<F>;
  return magnitude - (typename N::U{1} << N::kMantissa) < N::kNormals;
}

template <class F>
__attribute__((noinline)) F any_element(fastops_mitchell_op op, F a, F b, bool is_lmul = false) noexcept {
  F result = 0;
  fastops_mitchell_apply(&multiplier(is_lmul), op, Bits<F>::kType, &a, sizeof a, &b, sizeof b, &result, sizeof result,
                         1);
  return result;
}

// kLmul: with that constant.
template <class F, bool kLmul = false> F mul(F a, F b) noexcept {
  using N = Bits<F>;
  using U = typename N::U;
  const U x = bits(a) & ~N::kSign, y = bits(b) & ~N::kSign;
  const U sum = x - N::kOne + y + (kLmul ? U{1} << (N::kMantissa - 4) : U{0});
  if (__builtin_expect(is_normal<F>(x) && is_normal<F>(y) && is_normal<F>(sum), 1))
    return number<F>(sum | ((bits(a) ^ bits(b)) & N::kSign));
  return any_element<F>(FASTOPS_MUL, a, b, kLmul);
}

template <class F> F div(F a, F b) noexcept {
  using N = Bits<F>;
  const typename N::U x = bits(a) & ~N::kSign, y = bits(b) & ~N::kSign, sum = x - y + N::kOne;
  if (__builtin_expect(is_normal<F>(x) && is_normal<F>(y) && is_normal<F>(sum), 1))
    return number<F>(sum | ((bits(a) ^ bits(b)) & N::kSign));
  return any_element<F>(FASTOPS_DIV, a, b);
}

template <class F> F square(F a) noexcept {
  using N = Bits<F>;
  const typename N::U x = bits(a) & ~N::kSign, sum = x - N::kOne + x;
  if (__builtin_expect(is_normal<F>(x) && is_normal<F>(sum), 1)) return number<F>(sum);
  return any_element<F>(FASTOPS_SQUARE, a, a);
}

template <class F> F reciprocal(F a) noexcept {
  using N = Bits<F>;
  const typename N::U x = bits(a) & ~N::kSign, sum = N::kOne - x + N::kOne;
  if (__builtin_expect(is_normal<F>(x) && is_normal<F>(sum), 1)) return number<F>(sum | (bits(a) & N::kSign));
  return any_element<F>(FASTOPS_RECIPROCAL, a, a);
}

template <class F> F unary(fastops_mitchell_op op, F a) noexcept { return any_element<F>(op, a, a); }

}  // namespace
}  // namespace fastops

using namespace fastops;

float fastops_mitchell_mul_f32(float a, float b) noexcept { return mul(a, b); }
double fastops_mitchell_mul_f64(double a, double b) noexcept { return mul(a, b); }
float fastops_mitchell_div_f32(float a, float b) noexcept { return div(a, b); }
double fastops_mitchell_div_f64(double a, double b) noexcept { return div(a, b); }
float fastops_mitchell_square_f32(float a) noexcept { return square(a); }
double fastops_mitchell_square_f64(double a) noexcept { return square(a); }
float fastops_mitchell_reciprocal_f32(float a) noexcept { return reciprocal(a); }
double fastops_mitchell_reciprocal_f64(double a) noexcept { return reciprocal(a); }
float fastops_mitchell_sqrt_f32(float a) noexcept { return unary(FASTOPS_SQRT, a); }
double fastops_mitchell_sqrt_f64(double a) noexcept { return unary(FASTOPS_SQRT, a); }
float fastops_mitchell_rsqrt_f32(float a) noexcept { return unary(FASTOPS_RSQRT, a); }
double fastops_mitchell_rsqrt_f64(double a) noexcept { return unary(FASTOPS_RSQRT, a); }
float fastops_mitchell_log2_f32(float a) noexcept { return unary(FASTOPS_LOG2, a); }
double fastops_mitchell_log2_f64(double a) noexcept { return unary(FASTOPS_LOG2, a); }
float fastops_mitchell_exp2_f32(float a) noexcept { return unary(FASTOPS_EXP2, a); }
double fastops_mitchell_exp2_f64(double a) noexcept { return unary(FASTOPS_EXP2, a); }
float fastops_lmul_f32(float a, float b) noexcept { return mul<float, true>(a, b); }
double fastops_lmul_f64(double a, double b) noexcept { return mul<double, true>(a, b); }
