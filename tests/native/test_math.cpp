// SPDX-License-Identifier: BSD-3-Clause
// core/math.h against libm in a wider format: samples by default, all 2^32 float32 inputs with the
// argument "all" (of one function with its name as the next argument).
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "level.h"
#include "core/math.h"

namespace math = fastops::FASTOPS_LEVEL::math;
namespace simd = fastops::FASTOPS_LEVEL::simd;

namespace {

// The table of core/math.h. A float32 bound is the largest error found over all inputs: it may only fall.
constexpr bool kFused = fastops::FASTOPS_LEVEL::kFusedMultiplyAdd;
constexpr double kWide = kFused ? 1.0 : 2.0;

// |got - want| in units of the last place that `want` has in T.
template <class T, class Wide> double ulps(T got, Wide want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : 1e30;
  if (std::isnan(got)) return 1e30;
  const int digits = sizeof(T) == 4 ? 24 : 53, lowest = sizeof(T) == 4 ? -149 : -1074;
  const Wide largest = sizeof(T) == 4 ? Wide(0x1.fffffep127f) : Wide(0x1.fffffffffffffp1023);
  const Wide overflow = largest + std::ldexp(Wide(1), sizeof(T) == 4 ? 103 : 970);
  if (std::fabs(want) >= overflow) return std::isinf(got) && (got > 0) == (want > 0) ? 0 : 1e30;
  if (std::isinf(got)) return 1e30;
  if (want == 0) return got == 0 && std::signbit(got) == std::signbit(want) ? 0 : 1e30;
  int exponent;
  std::frexp(want, &exponent);
  const int unit = exponent - digits < lowest ? lowest : exponent - digits;
  return static_cast<double>(std::fabs(std::ldexp(Wide(got) - want, -unit)));
}

template <class T, class Wide> struct Function {
  const char* name;
  void (*lanes)(const T*, T*);
  Wide (*exact)(Wide);
  double worst;
  T where;
  double bound;
};

#define FASTOPS_ENTRY(V, T, Wide, name, exact, bound) \
  {#name,                                             \
   [](const T* in, T* out) { simd::store(out, math::name(simd::load<V>(in))); },                       \
   [](Wide x) { return exact; },                                    \
   0,                                                 \
   0,                                                 \
   bound}
#define FASTOPS_TABLE(V, T, Wide, exp_, exp2_, log_, log2_, rsqrt_)                                         \
  {FASTOPS_ENTRY(V, T, Wide, exp, std::exp(x), exp_), FASTOPS_ENTRY(V, T, Wide, exp2, std::exp2(x), exp2_), \
   FASTOPS_ENTRY(V, T, Wide, log, std::log(x), log_), FASTOPS_ENTRY(V, T, Wide, log2, std::log2(x), log2_), \
   FASTOPS_ENTRY(V, T, Wide, rsqrt, 1 / std::sqrt(x), rsqrt_)}
Function<float, double> single[] = FASTOPS_TABLE(simd::f32, float, double, 0.81, kFused ? 0.94 : 1.21,
                                                 kFused ? 0.77 : 0.85, kFused ? 0.88 : 1.96, kFused ? 0.51 : 1.50);
using Extended = long double;
Function<double, Extended> wide[] = FASTOPS_TABLE(simd::f64, double, Extended, kWide, kWide, kWide, kWide, kWide);

template <class T, class Wide> void examine(Function<T, Wide>& f, const T* in, std::size_t lanes) {
  T out[16];
  f.lanes(in, out);
  for (std::size_t i = 0; i < lanes; ++i) {
    const Wide want = f.exact(Wide(in[i]));
    if (out[i] == static_cast<T>(want) && want != 0) continue;  // correctly rounded
    const double error = ulps(out[i], want);
    if (error > f.worst) {
      f.worst = error;
      f.where = in[i];
    }
    CHECK(error <= f.bound, "%s(%a) = %a, wanted %La, %g ulp", f.name, double(in[i]), double(out[i]),
          static_cast<long double>(want), error);
  }
}

template <class To, class From> To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// An emulated x87 (Bochs' FYL2X) can miss a long double logarithm by several units of a double; libm's logarithms of
// double, which do not use it, then stand in. Their error is at most 0.55 ulp (glibc's log 0.519, log2 0.547).
void choose_logarithms() {
  volatile Extended x = 0x1.676428f5748bp+0L;
  const Extended want = 0xa.db01a56b1fc4d24p-5L;  // ln x, by decimal arithmetic of 60 digits
  if (std::fabs(std::log(Extended(x)) - want) < 0x1p-60L) return;
  puts("  long double logarithms are off here: float64 log and log2 against libm in double, bounds wider by 0.55 ulp");
  wide[2].exact = [](Extended t) { return Extended(std::log(double(t))); };
  wide[3].exact = [](Extended t) { return Extended(std::log2(double(t))); };
  wide[2].bound += 0.55;
  wide[3].bound += 0.55;
}

void all_single(const char* only) {
  constexpr std::size_t n = simd::kLanes<simd::f32>;
  for (auto& f : single) {
    if (only != nullptr && std::strcmp(only, f.name) != 0) continue;
    for (std::uint64_t first = 0; first < std::uint64_t{1} << 32; first += n) {
      float in[n];
      for (std::size_t i = 0; i < n; ++i) in[i] = bits_of<float>(static_cast<std::uint32_t>(first + i));
      examine(f, in, n);
    }
    printf("  all 2^32 inputs of %s\n", f.name);
  }
}

// Bit patterns at random, so that every exponent comes as often, and numbers near 0, 1 and the ends of exp's domain.
template <class T, class U, class Wide, std::size_t N>
void sample(Function<T, Wide> (&table)[N], std::size_t lanes, std::size_t rounds) {
  Random random{7};
  for (auto& f : table)
    for (std::size_t round = 0; round < rounds; ++round) {
      T in[16];
      for (std::size_t i = 0; i < lanes; ++i) {
        const std::uint64_t r = random.next();
        const T unit = static_cast<T>(static_cast<double>(r >> 11) * 0x1p-53);
        switch (round % 4) {
          case 0:
            in[i] = bits_of<T>(static_cast<U>(r));
            break;
          case 1:
            in[i] = T(0.5) + unit;
            break;
          case 2:
            in[i] = (unit - T(0.5)) * T(sizeof(T) == 4 ? 220 : 1600);
            break;
          default:
            in[i] = unit * T(sizeof(T) == 4 ? 0x1p-120 : 0x1p-1015) * T(sizeof(T) == 4 ? 0x1p-10 : 0x1p-20);
            break;
        }
      }
      examine(f, in, lanes);
    }
}

template <class T, class Wide, std::size_t N> void specials(Function<T, Wide> (&table)[N], std::size_t lanes) {
  const T inf = T(INFINITY), smallest = sizeof(T) == 4 ? T(0x1p-149) : T(0x1p-1074);
  const T normal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  for (auto& f : table)
    for (T x : {T(0),
                T(-0.0),
                T(1),
                T(-1),
                T(2),
                T(0.5),
                T(4),
                inf,
                -inf,
                T(NAN),
                smallest,
                -smallest,
                normal,
                -normal,
                std::nextafter(normal, T(0)),
                std::nextafter(T(1), T(0)),
                std::nextafter(T(1), inf),
                std::nextafter(inf, T(0)),
                -std::nextafter(inf, T(0)),
                T(-104),
                T(89),
                T(-150),
                T(-149.5),
                T(128),
                T(127.999),
                T(88.7228391),
                T(709.7827128933841),
                T(-745.2),
                T(-1074.5),
                T(-1075),
                T(1023.99),
                T(1024)}) {
      T in[16];
      for (std::size_t i = 0; i < lanes; ++i) in[i] = i % 2 ? T(1) : x;  // neighbours must not matter
      examine(f, in, lanes);
    }
  // Exact results must come out exact.
  struct {
    int function;
    T in, out;
  } exact[] = {{0, 0, 1}, {1, 0, 1}, {1, 5, 32},       {1, -3, T(0.125)}, {2, 1, 0},
               {3, 1, 0}, {3, 8, 3}, {3, T(0.25), -2}, {4, 4, T(0.5)}};
  for (const auto& e : exact) {
    T in[16], out[16];
    for (std::size_t i = 0; i < lanes; ++i) in[i] = e.in;
    table[e.function].lanes(in, out);
    CHECK(out[0] == e.out && out[lanes - 1] == e.out, "%s(%g) = %g", table[e.function].name, double(e.in),
          double(out[0]));
  }
}

template <class T, class Wide, std::size_t N> void report(const char* type, const Function<T, Wide> (&table)[N]) {
  for (const auto& f : table)
    printf("  %s %-5s %.4f ulp at %a\n", type, f.name, f.worst < 0.5 ? 0.5 : f.worst, double(f.where));
}

}  // namespace

// Apart from main, whose own entry may not use the level's instructions before the question is answered.
__attribute__((noinline)) int run(bool all, const char* only) {
  choose_logarithms();
  specials(single, simd::kLanes<simd::f32>);
  specials(wide, simd::kLanes<simd::f64>);
  sample<float, std::uint32_t>(single, simd::kLanes<simd::f32>, all ? 1 : 20'000);
  sample<double, std::uint64_t>(wide, simd::kLanes<simd::f64>, all ? 5'000'000 : 20'000);
  if (all) all_single(only);
  report("f32", single);
  report("f64", wide);
  return check_result("test_math");
}

int main(int count, char** arguments) {
  if (level_runs()) return run(count > 1 && std::strcmp(arguments[1], "all") == 0, count > 2 ? arguments[2] : nullptr);
  puts("this CPU lacks the level");
  return CHECK_SKIPPED;
}
