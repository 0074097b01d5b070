// SPDX-License-Identifier: BSD-3-Clause
// Every helper of core/simd.h against the same thing done element by element.
#include <cmath>
#include <cstring>

#include "check.h"
#include "level.h"
#include "core/simd.h"

namespace simd = fastops::FASTOPS_LEVEL::simd;
using fastops::FASTOPS_LEVEL::FlushSubnormals;
using fastops::FASTOPS_LEVEL::kFusedMultiplyAdd;

namespace {

template <class V, class T> void memory() {
  constexpr std::size_t n = simd::kLanes<V>;
  static_assert(n * sizeof(T) == sizeof(V));
  T in[n + 1], out[n + 1];
  for (std::size_t i = 0; i <= n; ++i) in[i] = static_cast<T>(i + 1);
  for (std::size_t offset = 0; offset < 2; ++offset) {  // unaligned too
    std::memset(out, 0, sizeof out);
    simd::store(out, simd::load<V>(in + offset));
    for (std::size_t i = 0; i < n; ++i) CHECK(out[i] == in[i + offset], "lane %zu", i);
    CHECK(out[n] == T(0), "store wrote too far");
  }
  for (std::size_t count = 0; count < n; ++count) {
    const V v = simd::load_first<V>(in, count, T(99));
    for (std::size_t i = 0; i < n; ++i) CHECK(v[i] == (i < count ? in[i] : T(99)), "count %zu lane %zu", count, i);
    std::memset(out, 0, sizeof out);
    simd::store_first(out, simd::load<V>(in), count);
    for (std::size_t i = 0; i <= n; ++i) CHECK(out[i] == (i < count ? in[i] : T(0)), "count %zu lane %zu", count, i);
  }
  const V seven = simd::splat<V>(T(7));
  for (std::size_t i = 0; i < n; ++i) CHECK(seven[i] == T(7), "lane %zu", i);
  const V v = simd::load<V>(in), chosen = simd::select(v > seven, v, seven);
  for (std::size_t i = 0; i < n; ++i) CHECK(chosen[i] == (in[i] > T(7) ? in[i] : T(7)), "lane %zu", i);
  for (std::size_t i = 0; i < n; ++i) {
    V one = V{};
    one[i] = T(1);
    if constexpr (sizeof(T) >= 4) CHECK(simd::any(one > V{}), "lane %zu", i);
  }
  if constexpr (sizeof(T) >= 4) CHECK(!simd::any(v != v), "no lane is set");
}

template <class V, class T> void arithmetic() {
  constexpr std::size_t n = simd::kLanes<V>;
  Random random{1};
  for (int round = 0; round < 2000; ++round) {
    T a[n], b[n], c[n];
    for (std::size_t i = 0; i < n; ++i) {
      const auto draw = [&] {
        return T(std::ldexp(1 + double(random.next() >> 12) * 0x1p-52, int(random.next() % 9) - 4));
      };
      a[i] = draw();
      b[i] = -draw();
      c[i] = draw();
    }
    const V sum = simd::fma(simd::load<V>(a), simd::load<V>(b), simd::load<V>(c));
    const V root = simd::sqrt(simd::load<V>(a));
    for (std::size_t i = 0; i < n; ++i) {
      const T once = std::fma(a[i], b[i], c[i]);
      volatile T product = a[i] * b[i];
      const T twice = product + c[i];
      CHECK(sum[i] == (kFusedMultiplyAdd ? once : twice), "fma(%a, %a, %a) = %a", double(a[i]), double(b[i]),
            double(c[i]), double(sum[i]));
      CHECK(root[i] == std::sqrt(a[i]), "sqrt(%a) = %a", double(a[i]), double(root[i]));
    }
  }
}

void lookup() {
  std::int32_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = 1000 - 37 * i;
  for (int first = 0; first < 16; ++first) {
    simd::i32 index{};
    for (std::size_t i = 0; i < simd::kLanes<simd::i32>; ++i) index[i] = (first + 5 * int(i)) % 16;
    const simd::i32 found = simd::lookup16(table, index);
    for (std::size_t i = 0; i < simd::kLanes<simd::i32>; ++i) CHECK(found[i] == table[index[i]], "index %d", index[i]);
  }
}

void lookup_of_pairs() {
  constexpr std::size_t n = simd::kLanes<simd::u16>;
  simd::u16 low{}, high{}, index{};
  for (std::size_t i = 0; i < n; ++i) {
    low[i] = static_cast<std::uint16_t>(3 * i + 1);
    high[i] = static_cast<std::uint16_t>(60000 - i);
  }
  for (std::size_t first = 0; first < 256; ++first) {
    for (std::size_t i = 0; i < n; ++i) index[i] = static_cast<std::uint16_t>((first + 7 * i) % 256);
    const simd::u16 found = simd::lookup_pair(low, high, index);
    const std::uint32_t mask = static_cast<std::uint32_t>(first * 0x01030507u);
    const simd::u16 chosen = simd::select_bits(mask, low, high);
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t at = index[i] % (2 * n);
      CHECK(found[i] == (at < n ? low[at] : high[at - n]), "index %d", int(index[i]));
      CHECK(chosen[i] == ((mask >> i & 1) != 0 ? low[i] : high[i]), "mask %x lane %zu", mask, i);
    }
  }
}

template <class V, class T> void extremes() {
  constexpr std::size_t n = simd::kLanes<V>;
  Random random{2};
  for (int round = 0; round < 100; ++round) {
    V a{}, b{};
    for (std::size_t i = 0; i < n; ++i) {
      a[i] = static_cast<T>(random.next());
      b[i] = static_cast<T>(random.next());
    }
    const V most = simd::max(a, b), least = simd::min(a, b);
    for (std::size_t i = 0; i < n; ++i)
      CHECK(most[i] == (a[i] < b[i] ? b[i] : a[i]) && least[i] == (a[i] < b[i] ? a[i] : b[i]), "lane %zu", i);
  }
}

void streaming() {
  alignas(64) float out[2 * simd::kLanes<simd::f32>] = {};
  alignas(64) double wide[2 * simd::kLanes<simd::f64>] = {};
  simd::stream(out + simd::kLanes<simd::f32>, simd::splat<simd::f32>(3.0f));
  simd::stream(wide + simd::kLanes<simd::f64>, simd::splat<simd::f64>(-3.0));
  simd::stream_fence();
  for (std::size_t i = 0; i < simd::kLanes<simd::f32>; ++i)
    CHECK(out[i] == 0.0f && out[simd::kLanes<simd::f32> + i] == 3.0f, "lane %zu", i);
  for (std::size_t i = 0; i < simd::kLanes<simd::f64>; ++i)
    CHECK(wide[i] == 0.0 && wide[simd::kLanes<simd::f64> + i] == -3.0, "lane %zu", i);
}

__attribute__((noinline)) float half_of(float x) {
  volatile float half = 0.5f;
  return x * half;
}

void flush() {
  volatile float smallest = 0x1p-126f, subnormal = 0x1p-140f;
  CHECK(half_of(smallest) == 0x1p-127f, "subnormals are kept at first");
  {
    const FlushSubnormals guard;
    volatile float result = half_of(smallest), of_subnormal = half_of(subnormal);
    std::uint32_t bits[2];
    float values[2] = {result, of_subnormal};
    std::memcpy(bits, values, sizeof bits);
    CHECK(bits[0] == 0, "a subnormal result is %x", bits[0]);
    CHECK(bits[1] == 0, "half a subnormal is %x", bits[1]);
  }
  CHECK(half_of(smallest) == 0x1p-127f, "subnormals are kept again");
}

}  // namespace

// Apart from main, whose own entry may not use the level's instructions before the question is answered.
__attribute__((noinline)) int run() {
  memory<simd::f32, float>();
  memory<simd::f64, double>();
  memory<simd::i32, std::int32_t>();
  memory<simd::u32, std::uint32_t>();
  memory<simd::i64, std::int64_t>();
  memory<simd::u64, std::uint64_t>();
  memory<simd::u16, std::uint16_t>();
  memory<simd::u8, std::uint8_t>();
  arithmetic<simd::f32, float>();
  arithmetic<simd::f64, double>();
  lookup();
  lookup_of_pairs();
  extremes<simd::i32, std::int32_t>();
  extremes<simd::i64, std::int64_t>();
  streaming();
  flush();
  return check_result("test_simd");
}

int main() {
  if (level_runs()) return run();
  puts("this CPU lacks the level");
  return CHECK_SKIPPED;
}
