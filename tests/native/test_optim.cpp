// SPDX-License-Identifier: BSD-3-Clause
// Every level's optimizer steps through the C interface against the formulas in scalar code: the same bits wherever fma
// rounds once, also for strided tensors and any number of threads. Linked twice, as test_levels.cpp.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "fastops/fastops.h"

namespace {

Random source{5};
// Of many magnitudes, so that differences round.
float random_float() {
  const std::uint64_t r = source.next();
  const float magnitude = std::ldexp(1 + float(r >> 41) * 0x1p-23f, int(r % 17) - 14);
  return r & 1024 ? -magnitude : magnitude;
}

// Tensors of lengths that end within vectors, and one that several blocks share.
const std::size_t kLengths[] = {0, 1, 3, 7, 8, 31, 64, 65, 129, 1000, 100003};
constexpr std::size_t kCount = sizeof kLengths / sizeof kLengths[0];

// `roles` copies of tensors of float32, contiguous or every second element of memory twice as long.
struct Tensors {
  std::vector<std::vector<float>> memory;
  std::vector<void*> data;
  std::vector<std::size_t> size;
  std::vector<std::uint8_t> dtype;
  std::vector<std::ptrdiff_t> numbers;
  std::vector<fastops_layout> layouts;
  std::vector<const fastops_layout*> layout;
  std::size_t roles, step;

  Tensors(std::size_t roles_, std::size_t step_) : roles(roles_), step(step_) {
    numbers.reserve(kCount * (roles + 1));
    layouts.reserve(kCount);
    for (const std::size_t n : kLengths) {
      size.push_back(n);
      const std::size_t at = numbers.size();
      numbers.push_back(std::ptrdiff_t(n));
      for (std::size_t r = 0; r < roles; ++r) {
        memory.emplace_back(n * step);
        for (float& x : memory.back()) x = random_float();
        if (r == 3)
          for (float& x : memory.back()) x = std::fabs(x);
        data.push_back(memory.back().data());
        dtype.push_back(FASTOPS_F32);
        numbers.push_back(std::ptrdiff_t(step * sizeof(float)));
      }
      layouts.push_back({1, numbers.data() + at, numbers.data() + at + 1});
      layout.push_back(step == 1 ? nullptr : &layouts.back());
    }
  }
  fastops_tensor_list list() const {
    return {kCount, roles, size.data(), data.data(), dtype.data(), step == 1 ? nullptr : layout.data()};
  }
  // Calls f(p0, p1, ...) with pointers to element e of every tensor's roles.
  template <class F> void each(const F& f) {
    for (std::size_t i = 0; i < kCount; ++i)
      for (std::size_t e = 0; e < size[i]; ++e) {
        float* at[8];
        for (std::size_t r = 0; r < roles; ++r) at[r] = &memory[i * roles + r][e * step];
        f(at);
      }
  }
};

float lerp(float s, float p, double w) {
  const float rounded = float(w);
  return rounded < 0.5f ? std::fma(rounded, p - s, s) : std::fma(rounded - 1.0f, p - s, p);
}

bool g_fused;  // whether the level's fma rounds once

void compare(const Tensors& got, const Tensors& wanted, const char* what) {
  for (std::size_t k = 0; k < got.memory.size(); ++k)
    for (std::size_t e = 0; e < got.memory[k].size(); ++e) {
      const float x = got.memory[k][e], y = wanted.memory[k][e];
      const bool same = g_fused ? std::memcmp(&x, &y, 4) == 0 : std::fabs(x - y) <= 4e-6f * (1 + std::fabs(y));
      CHECK(same, "%s: %s, list %d, element %d: %a, wanted %a", fastops_get_target(), what, int(k), int(e), double(x),
            double(y));
    }
}

template <class Step, class Model>
void check_step(const char* what, std::size_t roles, const Step& step, const Model& model) {
  for (const std::size_t stride : {1, 2}) {
    Tensors wanted(roles, stride);
    for (const unsigned threads : {1u, 3u}) {
      Tensors got = wanted;
      for (std::size_t k = 0; k < got.memory.size(); ++k) got.data[k] = got.memory[k].data();
      for (std::size_t i = 0; i < kCount; ++i) {
        got.layouts[i] = {1, got.numbers.data() + i * (roles + 1), got.numbers.data() + i * (roles + 1) + 1};
        if (stride != 1) got.layout[i] = &got.layouts[i];
      }
      fastops_set_num_threads(threads);
      const fastops_tensor_list list = got.list();
      const fastops_status status = step(&list);
      CHECK(status == FASTOPS_OK, "%s: status %d", what, int(status));
      Tensors model_of = wanted;
      model_of.each(model);
      compare(got, model_of, what);
    }
  }
}

void check_level() {
  for (const double w : {0.0, 0.001, 0.3, 0.5, 0.9, 1.0})
    check_step(
        "ema", 2, [&](const fastops_tensor_list* list) { return fastops_ema_update(list, &w, 0, nullptr); },
        [&](float** at) {
          if (w == 1.0)
            *at[1] = *at[0];
          else if (w != 0.0)
            *at[1] = lerp(*at[1], *at[0], w);
        });
  const double weights[5] = {0.1, 0.6, 0.25, 0.0, 0.75};
  check_step(
      "profiles", 6, [&](const fastops_tensor_list* list) { return fastops_ema_update(list, weights, 0, nullptr); },
      [&](float** at) {
        for (int k = 0; k < 5; ++k)
          if (weights[k] != 0.0) *at[1 + k] = lerp(*at[1 + k], *at[0], weights[k]);
      });
  for (const int nesterov : {0, 1}) {
    const fastops_sgd s{0.1, 0.9, 0.9, 0.7, 0.01, 0.2, nesterov, 1, 1, 1, 1};
    check_step(
        "sgd", 4, [&](const fastops_tensor_list* list) { return fastops_sgd_step(list, &s); },
        [&](float** at) {
          const float g = std::fma(float(s.weight_decay), *at[0], *at[1]);
          *at[2] = std::fma(float(s.keep), *at[2], float(s.gain) * g);
          const float direction = nesterov ? std::fma(float(s.momentum), *at[2], g) : *at[2];
          *at[0] = std::fma(float(-s.lr), direction, *at[0]);
          *at[3] = lerp(*at[3], *at[0], s.ema_weight);
          *at[1] = 0.0f;
        });
  }
  const fastops_sgd waits{0.1, 0.9, 1.0, 0.25, 0.0, 0.2, 0, 0, 0, 1, 0};
  check_step(
      "sgd that accumulates", 3, [&](const fastops_tensor_list* list) { return fastops_sgd_step(list, &waits); },
      [&](float** at) { *at[2] = std::fma(float(waits.keep), *at[2], float(waits.gain) * *at[1]); });
  const fastops_adamw a{0.999, 0.1, 0.1, 0.999, 0.001, 0.01, 3.0, 1e-8, 0.2, 1, 1};
  check_step(
      "adamw", 5, [&](const fastops_tensor_list* list) { return fastops_adamw_step(list, &a); },
      [&](float** at) {
        const float g = std::fma(float(a.l2), *at[0], *at[1]);
        *at[2] = lerp(*at[2], g, a.w1);
        *at[3] = std::fma(float(a.w2) * g, g, float(a.beta2) * *at[3]);
        const float root = std::fma(std::sqrt(*at[3]), float(a.scale), float(a.eps));
        *at[0] = std::fma(float(-a.step_size), *at[2] / root, float(a.decay) * *at[0]);
        *at[4] = lerp(*at[4], *at[0], a.ema_weight);
        *at[1] = 0.0f;
      });
  check_step(
      "lookahead", 2, [](const fastops_tensor_list* list) { return fastops_lookahead_sync(list, 0.4); },
      [](float** at) { *at[0] = *at[1] = lerp(*at[0], *at[1], 0.4); });

  Tensors finite(1, 1);
  fastops_tensor_list list = finite.list();
  int answer = -1;
  CHECK(fastops_all_finite(&list, &answer) == FASTOPS_OK && answer == 1, "answer %d", answer);
  for (const float odd : {INFINITY, -INFINITY, NAN})
    for (const std::size_t at : {0, 777, 999}) {
      const float kept = finite.memory[9][at];
      finite.memory[9][at] = odd;
      CHECK(fastops_all_finite(&list, &answer) == FASTOPS_OK && answer == 0, "%g at %d", double(odd), int(at));
      finite.memory[9][at] = kept;
    }
}

// The hash of the header in scalar code: 16 bits of element e of a tensor.
std::uint64_t mix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
std::uint32_t random_bits(std::uint64_t seed, std::uint64_t tensor, std::uint64_t e) {
  const std::uint64_t key = mix64(seed ^ mix64(tensor)), pair = e / 32 * 16 + e % 16;
  std::uint32_t x = std::uint32_t(pair) + std::uint32_t(key);
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x ^= std::uint32_t(key >> 32) + std::uint32_t(pair >> 32) * 0x9e3779b9u;
  x *= 0x735a2d97u;
  x ^= x >> 15;
  return e & 16 ? x >> 16 : x & 0xffff;
}

// bfloat16 shadows of two tensors, the second with or without gaps: the bits of the formula for every number of
// threads, and right on average.
void check_rounding() {
  const std::size_t n = 70001;
  for (const std::size_t step : {1, 2})
    for (const unsigned threads : {1u, 3u}) {
      std::vector<std::uint16_t> small(5), shadow(n * step);
      std::vector<float> param(n * step);
      for (std::size_t e = 0; e < n * step; ++e) {
        shadow[e] = 0x3f00;  // 0.5
        param[e] = 1.0f + 0.01f * random_float();
      }
      param[17 * step] = INFINITY;
      param[18 * step] = NAN;
      void* data[4] = {param.data(), small.data(), param.data(), shadow.data()};
      const std::uint8_t dtype[4] = {FASTOPS_F32, FASTOPS_BF16, FASTOPS_F32, FASTOPS_BF16};
      const std::size_t size[2] = {5, n};
      const std::ptrdiff_t shape = n, strides[2] = {std::ptrdiff_t(step * 4), std::ptrdiff_t(step * 2)};
      const fastops_layout layout{1, &shape, strides};
      const fastops_layout* layouts[2] = {nullptr, &layout};
      const fastops_tensor_list list{2, 2, size, data, dtype, step == 1 ? nullptr : layouts};
      const double w = 0.001;
      const std::uint64_t seed = 3;
      fastops_set_num_threads(threads);
      CHECK(fastops_ema_update(&list, &w, 0, nullptr) == FASTOPS_INVALID, "bfloat16 without a seed");
      CHECK(fastops_ema_update(&list, &w, 0, &seed) == FASTOPS_OK, "a seed");
      double moved = 0, wanted = 0;
      for (std::size_t e = 0; e < n; ++e) {
        const float exact = lerp(0.5f, param[e * step], w);
        std::uint32_t bits;
        std::memcpy(&bits, &exact, 4);
        std::uint16_t expected = std::uint16_t((bits + random_bits(seed, 1, e)) >> 16);
        if (std::isnan(exact) || std::isinf(exact))
          expected = std::uint16_t(bits >> 16) | (std::isnan(exact) ? 0x40 : 0);
        const std::uint16_t got = shadow[e * step];
        CHECK(g_fused ? got == expected : std::abs(got - expected) <= 1, "%s: element %d, step %d: %x, wanted %x",
              fastops_get_target(), int(e), int(step), got, expected);
        if (std::isfinite(exact)) {
          moved += got == 0x3f00 ? 0.0 : 0x1p-8;
          wanted += double(exact) - 0.5;
        }
      }
      // Each element is off by a step of 2^-8 with a variance below 2^-16 / 8: four deviations of the sum.
      CHECK(std::fabs(moved - wanted) < 4 * std::sqrt(double(n) / 8) * 0x1p-8, "moved by %g, wanted %g", moved, wanted);
    }
}

void refusals() {
  double w = 0.1;
  Tensors good(2, 1);
  fastops_tensor_list list = good.list();
  CHECK(fastops_ema_update(nullptr, &w, 0, nullptr) == FASTOPS_INVALID, "no list");
  CHECK(fastops_ema_update(&list, nullptr, 0, nullptr) == FASTOPS_INVALID, "no weight");
  for (const double bad : {-0.1, 1.1, double(NAN)})
    CHECK(fastops_ema_update(&list, &bad, 0, nullptr) == FASTOPS_INVALID, "weight %g", bad);
  CHECK(fastops_adamw_step(&list, nullptr) == FASTOPS_INVALID, "no step");
  const fastops_adamw a{};
  CHECK(fastops_adamw_step(&list, &a) == FASTOPS_INVALID, "two roles of four");
  good.dtype[3] = FASTOPS_F16;
  CHECK(fastops_ema_update(&list, &w, 0, nullptr) == FASTOPS_INVALID, "a float16 shadow");
  good.dtype[3] = 77;
  CHECK(fastops_ema_update(&list, &w, 0, nullptr) == FASTOPS_INVALID, "an unknown dtype");
}

}  // namespace

int main() {
  for (int i = 0; const char* name = fastops_compiled_target(i); ++i) {
    if (fastops_set_target(name) != FASTOPS_OK) {
      printf("%s: not run, the CPU lacks it\n", name);
      continue;
    }
    g_fused = std::string(name) != "v2";
    check_level();
    check_rounding();
    refusals();
  }
  return check_result("test_optim");
}
