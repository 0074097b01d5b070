// SPDX-License-Identifier: BSD-3-Clause
// float16 operands by the definition, in integers, against every level this machine runs: a stratified sample of the
// pairs, or with the argument `all` each of the 2^32; always all 65536 operands of the unary operations.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fastops/fastops.h"

namespace {

using Half = std::uint16_t;
constexpr Half kNan = 0x7e00, kInf = 0x7c00, kSign = 0x8000;

// A finite non-zero number is 2^exponent (1 + mantissa / 1024).
struct Number {
  int exponent, mantissa;
  bool zero, infinite, nan;
  Half sign;
};

Number decode(Half h, bool flush) {
  Number r{};
  r.sign = h & kSign;
  const int magnitude = h & 0x7fff, field = magnitude >> 10;
  r.mantissa = magnitude & 1023;
  r.nan = magnitude > kInf;
  r.infinite = magnitude == kInf;
  r.exponent = field - 15;
  if (field == 0) {
    r.zero = magnitude == 0 || flush;
    r.exponent = -14;
    for (; !r.zero && r.mantissa < 1024; --r.exponent) r.mantissa *= 2;
    r.mantissa &= 1023;
  }
  return r;
}

// n 2^exponent, n > 0, rounded to nearest even; with `flush`, below 2^-14 before rounding is zero.
Half round_to_half(std::uint64_t n, int exponent, bool flush) {
  const int top = 63 - __builtin_clzll(n);
  const int e = top + exponent;
  if (e > 15) return kInf;
  if (e < -14 && flush) return 0;
  const int unit = (e < -14 ? -14 : e) - 10;  // the result is a multiple of 2^unit
  const int drop = unit - exponent;
  if (drop > 62) return 0;
  std::uint64_t q;
  if (drop <= 0) {
    q = n << -drop;
  } else {
    q = n >> drop;
    const std::uint64_t rest = n - (q << drop), half = std::uint64_t{1} << (drop - 1);
    if (rest > half || (rest == half && (q & 1))) ++q;
  }
  // q in units of 2^unit: its bit 10 counts as the exponent field, and a carry moves on by itself.
  const std::uint64_t bits = e < -14 ? q : q + (static_cast<std::uint64_t>(e + 14) << 10);
  return static_cast<Half>(bits >= kInf ? static_cast<std::uint64_t>(kInf) : bits);
}

// b > 0, a constant where this is inlined.
inline int floor_div(int a, int b) { return a / b - (a % b < 0 ? 1 : 0); }

// The value of the logarithm sum / 1024, times 2^exponent.
Half from_log(int sum, int exponent, bool flush) {
  const int carry = floor_div(sum, 1024);
  return round_to_half(static_cast<std::uint64_t>(1024 + sum - 1024 * carry), exponent + carry - 10, flush);
}

Half oracle_mul(const Number& a, const Number& b, int c, bool flush) {
  const Half sign = a.sign ^ b.sign;
  if (a.nan || b.nan || (a.zero && b.infinite) || (a.infinite && b.zero)) return kNan;
  if (a.infinite || b.infinite) return sign | kInf;
  if (a.zero || b.zero) return sign;
  return sign | from_log(a.mantissa + b.mantissa + c, a.exponent + b.exponent, flush);
}
Half oracle_div(const Number& a, const Number& b, int c, bool flush) {
  const Half sign = a.sign ^ b.sign;
  if (a.nan || b.nan || (a.zero && b.zero) || (a.infinite && b.infinite)) return kNan;
  if (a.infinite || b.zero) return sign | kInf;
  if (a.zero || b.infinite) return sign;
  return sign | from_log(a.mantissa - b.mantissa + c, a.exponent - b.exponent, flush);
}
int half_to_even(int u) {
  const int t = floor_div(u, 2);
  return u % 2 != 0 && t % 2 != 0 ? t + 1 : t;
}
Half oracle_unary(fastops_mitchell_op op, Half h, const Number& a, int c, bool flush) {
  const Number one = decode(0x3c00, false);
  if (op == FASTOPS_SQUARE) return oracle_mul(a, a, c, flush);
  if (op == FASTOPS_RECIPROCAL) return oracle_div(one, a, c, flush);
  if (a.nan) return kNan;
  if (op == FASTOPS_EXP2) {
    if (a.infinite) return a.sign ? 0 : kInf;
    std::int64_t x = 0;  // in units of 2^-24
    const std::int64_t significand = 1024 + a.mantissa;
    // A subnormal's significand was normalised: its low bits are zero.
    if (!a.zero)
      x = a.exponent >= -14 ? significand * (std::int64_t{1} << (a.exponent + 14)) : significand >> (-14 - a.exponent);
    if (a.sign) x = -x;
    const std::int64_t whole = x >> 24, unit = 1 << 24;
    return round_to_half(static_cast<std::uint64_t>(unit + (x - whole * unit)), static_cast<int>(whole) - 24, flush);
  }
  if (op == FASTOPS_LOG2 && a.zero) return kInf | kSign;
  if (op == FASTOPS_RSQRT && a.zero) return a.sign | kInf;
  if (op == FASTOPS_SQRT && a.zero) return a.sign;
  if (a.sign) return kNan;
  if (a.infinite) return op == FASTOPS_RSQRT ? 0 : h;
  const int u = a.exponent * 1024 + a.mantissa;
  if (op == FASTOPS_SQRT) return from_log(half_to_even(u + 2 * c), 0, flush);
  if (op == FASTOPS_RSQRT) return from_log(half_to_even(2 * c - u), 0, flush);
  if (u == 0) return 0;
  const Half sign = u < 0 ? kSign : Half{0};
  return sign | round_to_half(static_cast<std::uint64_t>(u < 0 ? -u : u), -10, false);
}

bool same(Half a, Half b) { return a == b || ((a & 0x7fff) > kInf && (b & 0x7fff) > kInf); }

struct Case {
  const char* name;
  fastops_mitchell_op op;
  double c;
  int flush;
};
constexpr Case kCases[] = {{"mul", FASTOPS_MUL, 0.0, 0},
                           {"mul, c = 0.055255", FASTOPS_MUL, 0.055255, 0},
                           {"mul, c = -0.3, flush", FASTOPS_MUL, -0.3, 1},
                           {"div", FASTOPS_DIV, 0.0, 0},
                           {"div, c = 0.4, flush", FASTOPS_DIV, 0.4, 1},
                           {"square", FASTOPS_SQUARE, 0.0, 0},
                           {"reciprocal", FASTOPS_RECIPROCAL, 0.0, 0},
                           {"sqrt", FASTOPS_SQRT, 0.0, 0},
                           {"sqrt, c = -0.0288", FASTOPS_SQRT, -0.0288, 0},
                           {"rsqrt", FASTOPS_RSQRT, 0.0, 0},
                           {"rsqrt, c = -0.0876, flush", FASTOPS_RSQRT, -0.0876, 1},
                           {"log2", FASTOPS_LOG2, 0.0, 0},
                           {"exp2", FASTOPS_EXP2, 0.0, 0},
                           {"exp2, flush", FASTOPS_EXP2, 0.0, 1}};

// Few enough that no level starts threads, many against the cost of choosing a level.
constexpr std::size_t kBatch = 8 * 65536;
std::vector<Half> g_a(kBatch), g_b(kBatch), g_got(kBatch), g_want(kBatch);
std::vector<Number> g_numbers[2];

int compare(const Case& t, const fastops_mitchell* m, const std::vector<const char*>& targets, std::size_t n,
            std::vector<unsigned long long>& wrong) {
  for (std::size_t level = 0; level < targets.size(); ++level) {
    if (fastops_set_target(targets[level]) != FASTOPS_OK) return 1;
    std::memset(g_got.data(), 0x55, n * sizeof(Half));
    if (fastops_mitchell_apply(m, t.op, FASTOPS_F16, g_a.data(), 2, g_b.data(), 2, g_got.data(), 2, n) != FASTOPS_OK)
      return 1;
    if (std::memcmp(g_got.data(), g_want.data(), n * sizeof(Half)) == 0) continue;
    for (std::size_t i = 0; i < n; ++i) {
      if (same(g_got[i], g_want[i])) continue;
      if (wrong[level]++ < 4)
        std::printf("  %s, %s: a %04x b %04x: got %04x, want %04x\n", targets[level], t.name, g_a[i], g_b[i], g_got[i],
                    g_want[i]);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && std::strcmp(argv[1], "all") == 0;
  std::vector<const char*> targets;
  for (int i = 0; const char* name = fastops_compiled_target(i); ++i) {
    if (fastops_target_runs(name) == 1)
      targets.push_back(name);
    else
      std::printf("%s: not run, this CPU lacks it\n", name);
  }
  for (int flush = 0; flush < 2; ++flush)
    for (int i = 0; i < 65536; ++i) g_numbers[flush].push_back(decode(static_cast<Half>(i), flush != 0));
  unsigned long long failures = 0;
  for (const Case& t : kCases) {
    static fastops_mitchell_params params;
    params.c = t.c;
    params.flush = t.flush;
    fastops_mitchell* m = nullptr;
    if (fastops_mitchell_create(&params, &m) != FASTOPS_OK) return 1;
    const bool flush = t.flush != 0, binary = t.op == FASTOPS_MUL || t.op == FASTOPS_DIV;
    const int c = static_cast<int>(std::nearbyint(t.c * 1024));
    const std::vector<Number>& number = g_numbers[t.flush];
    std::vector<unsigned long long> wrong(targets.size(), 0);
    const auto start = std::chrono::steady_clock::now();
    unsigned long long count = 0;
    if (!binary) {
      for (int i = 0; i < 65536; ++i) {
        g_a[i] = g_b[i] = static_cast<Half>(i);
        g_want[i] = oracle_unary(t.op, g_a[i], number[i], c, flush);
      }
      count = 65536;
      if (compare(t, m, targets, 65536, wrong) != 0) return 1;
    } else {
      // One operand of each stratum of 256, drawn anew for each row, or all; rows of both signs and all exponents.
      const std::size_t columns = all ? 65536 : 256;
      std::uint32_t random = 1;
      // Without `all` only the plain product has every row; the others every eleventh.
      const int step = all || &t == kCases ? 1 : 11;
      std::size_t n = 0;
      for (int i = 0; i < 65536; i += step) {
        for (std::size_t j = 0; j < columns; ++j, ++n) {
          random = random * 1664525u + 1013904223u;
          g_a[n] = static_cast<Half>(i);
          g_b[n] = static_cast<Half>(all ? j : 256 * j + (random >> 24));
          g_want[n] = t.op == FASTOPS_MUL ? oracle_mul(number[i], number[g_b[n]], c, flush)
                                          : oracle_div(number[i], number[g_b[n]], c, flush);
        }
        if (n + columns <= kBatch && i + step < 65536) continue;
        count += n;
        if (compare(t, m, targets, n, wrong) != 0) return 1;
        n = 0;
      }
    }
    fastops_mitchell_destroy(m);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (std::size_t level = 0; level < targets.size(); ++level) {
      std::printf("%s %s: %llu pairs, %llu wrong\n", targets[level], t.name, count, wrong[level]);
      failures += wrong[level];
    }
    std::printf("  %.1f s\n", seconds);
    std::fflush(stdout);
    // The whole range is for the plain product; the other cases differ from it in constants only.
    if (all && &t == kCases) break;
  }
  return failures == 0 ? 0 : 1;
}
