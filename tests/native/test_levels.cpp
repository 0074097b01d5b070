// SPDX-License-Identifier: BSD-3-Clause
// Every level's kernels through the C interface against a plain model, over shapes that end in the middle of lanes,
// tiles and panels. Linked twice: with the library, and with kernels of emulated 64-byte lanes.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastops/fastops.h"

namespace {

constexpr fastops_poll kNoPoll = {nullptr, nullptr};

struct Case {
  const char* name;
  fastops_mitchell_params params;
};

std::vector<Case> cases() {
  const auto make = [](int form, int corrections, int mantissa_bits, double c) {
    fastops_mitchell_params p{};
    p.form = form;
    p.corrections = corrections;
    p.mantissa_bits = mantissa_bits;
    p.c = c;
    return p;
  };
  fastops_mitchell_params segments = make(FASTOPS_FORM_LOG, 0, 0, 0);
  segments.segments = 4;
  for (int i = 0; i < 16; ++i) segments.table[i] = 0.005 * i - 0.01;
  return {{"mitchell", make(FASTOPS_FORM_LOG, 0, 0, 0)},
          {"constant", make(FASTOPS_FORM_LOG, 0, 0, 463511 / 8388608.0)},
          {"negative constant", make(FASTOPS_FORM_LOG, 0, 0, -0.0625)},
          {"five bits", make(FASTOPS_FORM_LOG, 0, 5, 0)},
          {"segments", segments},
          {"equation", make(FASTOPS_FORM_EQUATION, 0, 0, 0.0625)},
          {"iterative 0", make(FASTOPS_FORM_ITERATIVE, 0, 0, 0)},
          {"iterative 2", make(FASTOPS_FORM_ITERATIVE, 2, 0, 0)}};
}

// x without its leading set bits, `count` of them; x > 0.
double without_top(double x, int count) {
  for (; count > 0 && x > 0; --count) x -= std::ldexp(1.0, std::ilogb(x));
  return x;
}

// The exact product of two float32 values under the multiplier.
double product(const fastops_mitchell_params& p, double a, double b) {
  if (a == 0 || b == 0 || !std::isfinite(a) || !std::isfinite(b)) return a * b;
  const double sign = std::signbit(a) != std::signbit(b) ? -1.0 : 1.0;
  const int ea = std::ilogb(a), eb = std::ilogb(b);
  double x = std::ldexp(std::fabs(a), -ea) - 1, y = std::ldexp(std::fabs(b), -eb) - 1;
  if (p.mantissa_bits) {
    x = std::ldexp(std::floor(std::ldexp(x, p.mantissa_bits)), -p.mantissa_bits);
    y = std::ldexp(std::floor(std::ldexp(y, p.mantissa_bits)), -p.mantissa_bits);
  }
  double c = p.c;
  if (p.segments) c = p.table[int(x * p.segments) * p.segments + int(y * p.segments)];
  c = std::nearbyint(std::ldexp(c, 23)) / 8388608.0;
  double value;
  if (p.form == FASTOPS_FORM_LOG) {
    const double s = x + y + c, whole = std::floor(s);
    value = std::ldexp(1 + s - whole, int(whole));
  } else if (p.form == FASTOPS_FORM_EQUATION) {
    value = 1 + x + y + c;
  } else {
    value = (1 + x) * (1 + y) - without_top(1 + x, p.corrections + 1) * without_top(1 + y, p.corrections + 1);
  }
  return sign * std::ldexp(value, ea + eb);
}

Random source{11};
float normal_float() {
  const std::uint64_t r = source.next();
  const float magnitude = std::ldexp(1 + float(r >> 41) * 0x1p-23f, int(r % 13) - 6);
  return r & 1024 ? -magnitude : magnitude;
}

bool same(float x, float y) { return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y); }

void elements(const char* level, const Case& one, const fastops_mitchell* m) {
  for (std::size_t n : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 200}) {
    std::vector<float> a(n), b(n), out(n + 1, 77.0f);
    for (std::size_t i = 0; i < n; ++i) {
      a[i] = i % 7 == 6 ? float(i % 3) * INFINITY : normal_float();
      b[i] = i % 11 == 10 ? 0.0f : normal_float();
    }
    CHECK(fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, a.data(), 4, b.data(), 4, out.data(), 4, n) == FASTOPS_OK,
          "%s, %s, n %zu", level, one.name, n);
    for (std::size_t i = 0; i < n; ++i) {
      const float want = float(product(one.params, a[i], b[i]));
      CHECK(same(out[i], want), "%s, %s, n %zu: %a * %a = %a, wanted %a", level, one.name, n, a[i], b[i], out[i], want);
    }
    CHECK(out[n] == 77.0f, "%s, %s, n %zu: written past the end", level, one.name, n);
  }
}

void close(const char* level, const char* name, std::size_t m, std::size_t k, std::size_t n, float got, double want,
           double magnitude) {
  // Each of k roundings is at most 2^-24 of the magnitudes summed; one more for the result.
  if (std::isnan(want) || std::isinf(want) || std::fabs(want) > 3.5e38) {
    CHECK(same(got, float(want)), "%s, %s, %zu x %zu x %zu: %g, wanted %g", level, name, m, k, n, got, want);
  } else {
    const double bound = (double(k) + 2) * 0x1p-24 * magnitude;
    CHECK(std::fabs(got - want) <= bound, "%s, %s, %zu x %zu x %zu: %.9g, wanted %.9g within %g", level, name, m, k, n,
          got, want, bound);
  }
}

void matmul(const char* level, const Case& one, const fastops_mitchell* mitchell) {
  static const std::size_t shapes[][3] = {{1, 1, 1},   {1, 5, 1},    {2, 3, 4},    {5, 7, 16},   {6, 8, 33}, {7, 1, 65},
                                          {13, 64, 9}, {31, 17, 49}, {33, 65, 70}, {3, 300, 97}, {8, 0, 3}};
  for (const auto& shape : shapes) {
    const std::size_t m = shape[0], k = shape[1], n = shape[2];
    std::vector<float> a(m * k), b(k * n), out(m * n, 77.0f);
    for (float& x : a) x = normal_float();
    for (float& x : b) x = normal_float();
    if (k > 4 && m > 4) {
      a[2 * k + 1] = 0.0f;
      a[3 * k + 2] = INFINITY;
      a[4 * k + 3] = 0x1p-130f;  // subnormal: zero in a product of matrices
      b[n] = 0.0f;
    }
    const void *pa = a.data(), *pb = b.data();
    void* pc = out.data();
    const auto signed_of = [](std::size_t x) { return static_cast<std::ptrdiff_t>(x); };
    // Every second shape has b transposed in memory.
    const bool transposed = (m + n) % 2 == 0;
    const fastops_matrix sa = {m, k, signed_of(k), 1};
    const fastops_matrix sb = {k, n, transposed ? 1 : signed_of(n), transposed ? signed_of(k) : 1};
    const fastops_matrix sc = {m, n, signed_of(n), 1};
    CHECK(fastops_mitchell_matmul(mitchell, FASTOPS_F32, 1, &pa, sa, &pb, sb, &pc, sc, kNoPoll) == FASTOPS_OK, "%s, %s",
          level, one.name);
    for (std::size_t i = 0; i < m; ++i)
      for (std::size_t j = 0; j < n; ++j) {
        double want = 0, magnitude = 0;
        for (std::size_t l = 0; l < k; ++l) {
          const auto zero_if_subnormal = [](float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; };
          const float left = zero_if_subnormal(a[i * k + l]);
          const float right = zero_if_subnormal(b[transposed ? j * k + l : l * n + j]);
          const double term = product(one.params, left, right);
          want += term;
          magnitude += std::fabs(term);
        }
        close(level, one.name, m, k, n, out[i * n + j], want, magnitude);
      }
  }
}

void convolution(const char* level, const Case& one, const fastops_mitchell* mitchell) {
  for (int round = 0; round < 3; ++round) {
    fastops_conv2d s{};
    s.batch = 2;
    s.groups = round == 2 ? 2 : 1;
    s.channels = 4;
    s.filters = 6;
    s.height = 7;
    s.width = 9;
    s.kernel_height = 3;
    s.kernel_width = 2;
    s.stride_h = 1 + (round == 1);
    s.stride_w = 1;
    s.padding_h = round > 0;
    s.padding_w = round;
    s.dilation_h = 1;
    s.dilation_w = 1 + (round == 2);
    const std::size_t per_group = s.channels / s.groups;
    const std::size_t height =
        (s.height + 2 * s.padding_h - (s.dilation_h * (s.kernel_height - 1) + 1)) / s.stride_h + 1;
    const std::size_t width = (s.width + 2 * s.padding_w - (s.dilation_w * (s.kernel_width - 1) + 1)) / s.stride_w + 1;
    std::vector<float> x(s.batch * s.channels * s.height * s.width),
        w(s.filters * per_group * s.kernel_height * s.kernel_width);
    std::vector<float> out(s.batch * s.filters * height * width);
    for (float& v : x) v = normal_float();
    for (float& v : w) v = normal_float();
    CHECK(fastops_mitchell_conv2d(mitchell, FASTOPS_F32, &s, x.data(), w.data(), out.data(), kNoPoll) == FASTOPS_OK,
          "%s", level);
    std::size_t at = 0;
    for (std::size_t image = 0; image < s.batch; ++image)
      for (std::size_t filter = 0; filter < s.filters; ++filter)
        for (std::size_t row = 0; row < height; ++row)
          for (std::size_t col = 0; col < width; ++col, ++at) {
            double want = 0, magnitude = 0;
            const std::size_t group = filter / (s.filters / s.groups);
            for (std::size_t c = 0; c < per_group; ++c)
              for (std::size_t kh = 0; kh < s.kernel_height; ++kh)
                for (std::size_t kw = 0; kw < s.kernel_width; ++kw) {
                  const std::size_t ih = row * s.stride_h + kh * s.dilation_h,
                                    iw = col * s.stride_w + kw * s.dilation_w;
                  if (ih < s.padding_h || iw < s.padding_w || ih - s.padding_h >= s.height ||
                      iw - s.padding_w >= s.width)
                    continue;
                  const float left = w[((filter * per_group + c) * s.kernel_height + kh) * s.kernel_width + kw];
                  const float right =
                      x[((image * s.channels + group * per_group + c) * s.height + ih - s.padding_h) * s.width + iw -
                        s.padding_w];
                  // The weights are the first operand: their segment picks the row of a table.
                  const double term = product(one.params, left, right);
                  want += term;
                  magnitude += std::fabs(term);
                }
            close(level, one.name, s.batch, per_group * 6, at, out[at], want, magnitude);
          }
  }
}

void bytes(const char* level, const fastops_mitchell* m) {
  std::vector<std::uint8_t> a(65536), b(65536);
  std::vector<std::uint16_t> out(65536);
  for (std::size_t i = 0; i < 65536; ++i) {
    a[i] = std::uint8_t(i >> 8);
    b[i] = std::uint8_t(i);
  }
  CHECK(
      fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_U8, a.data(), 1, b.data(), 1, out.data(), 2, 65536) == FASTOPS_OK,
      "u8");
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < 65536; ++i) {
    const double want = product({}, a[i], b[i]);
    CHECK(out[i] == want, "%s: %d * %d = %d, wanted %g", level, a[i], b[i], out[i], want);
    sum += out[i];
  }
  CHECK(sum == 1025628691, "%s: the table's sum is %llu", level, static_cast<unsigned long long>(sum));
}

void lut(const char* level) {
  std::vector<std::int32_t> table(65536);
  for (int range = 0; range < 3; ++range) {
    for (auto& entry : table) {
      const auto r = static_cast<std::int32_t>(source.next());
      entry = range == 0 ? r & 0xffff : range == 1 ? r : r >> 17;
    }
    for (const auto& shape : {std::vector<std::size_t>{1, 1, 1}, {5, 33, 70}, {17, 130, 31}, {3, 0, 4}}) {
      const std::size_t m = shape[0], k = shape[1], n = shape[2];
      std::vector<std::uint8_t> a(m * k), b(k * n);
      for (auto& v : a) v = std::uint8_t(source.next());
      for (auto& v : b) v = std::uint8_t(source.next());
      std::vector<std::int64_t> out(m * n, 77);
      const std::uint8_t *pa = a.data(), *pb = b.data();
      void* pc = out.data();
      const auto d = [](std::size_t x) { return static_cast<std::ptrdiff_t>(x); };
      CHECK(fastops_lut_matmul(1, &pa, {m, k, d(k), 1}, &pb, {k, n, d(n), 1}, table.data(), 0, &pc, {m, n, d(n), 1}, 1,
                               kNoPoll) == FASTOPS_OK,
            "%s", level);
      for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < n; ++j) {
          std::int64_t want = 0;
          for (std::size_t l = 0; l < k; ++l) want += table[a[i * k + l] * 256 + b[l * n + j]];
          CHECK(out[i * n + j] == want, "%s, table %d, %zu x %zu x %zu", level, range, m, k, n);
        }
    }
  }
}

}  // namespace

int main() {
  int ran = 0;
  for (int i = 0; const char* level = fastops_compiled_target(i); ++i) {
    if (fastops_target_runs(level) != 1) {
      printf("%s: this CPU does not run it\n", level);
      continue;
    }
    CHECK(fastops_set_target(level) == FASTOPS_OK, "%s", level);
    for (const Case& one : cases()) {
      fastops_mitchell* m = nullptr;
      CHECK(fastops_mitchell_create(&one.params, &m) == FASTOPS_OK, "%s", one.name);
      if (m == nullptr) continue;
      elements(level, one, m);
      matmul(level, one, m);
      convolution(level, one, m);
      if (std::strcmp(one.name, "mitchell") == 0) bytes(level, m);
      fastops_mitchell_destroy(m);
    }
    lut(level);
    printf("%s: done\n", level);
    ++ran;
  }
  CHECK(ran > 0, "no level runs");
  return check_result("test_levels");
}
