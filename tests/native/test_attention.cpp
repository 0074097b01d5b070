// SPDX-License-Identifier: BSD-3-Clause
// Every level's attention through the C interface against sums in double: all maps, causal or not, with masks, decays
// and grouped heads; gradients against difference quotients; the same bits for any number of threads. Linked twice, as
// test_levels.cpp.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "fastops/fastops.h"

namespace {

using Doubles = std::vector<double>;

Random source{11};
double uniform() { return 2 * double(source.next() >> 11) * 0x1p-53 - 1; }
Doubles numbers(std::size_t n) {
  Doubles x(n);
  for (double& value : x) value = float(uniform());
  return x;
}

// The largest of what it is called with, nan if one is. (A reduction by fmax is an internal error of GCC 12 for
// aarch64.)
void raise_to(double x, double* largest) {
  if (*largest == *largest && !(x <= *largest)) *largest = x;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;  // some ten times slower
#else
constexpr bool kSanitized = false;
#endif

struct Size {
  std::size_t heads_q, heads_kv, queries, keys, dim, values;
};
const Size kSizes[] = {{1, 1, 1, 1, 1, 1},       {2, 1, 7, 7, 3, 5},     {4, 2, 20, 33, 16, 8},
                       {2, 2, 41, 12, 9, 17},    {1, 1, 50, 50, 24, 32}, {3, 1, 130, 130, 64, 64},
                       {1, 1, 1030, 1030, 8, 70}};

struct Problem {
  Size size;
  int map;
  bool causal, normalize, masked, decayed;
  Doubles q, k, v, w, decay;
  std::vector<std::uint8_t> mask;

  Problem(const Size& s, int map_, bool causal_, bool extras)
      : size(s),
        map(map_),
        causal(causal_),
        normalize(map_ != FASTOPS_MAP_IDENTITY),
        masked(extras),
        decayed(extras && causal_ && map_ < FASTOPS_MAP_FAVOR),
        q(numbers(s.heads_q * s.queries * s.dim)),
        k(numbers(s.heads_kv * s.keys * s.dim)),
        v(numbers(s.heads_kv * s.keys * s.values)),
        w(numbers(features() * s.dim)),
        decay(numbers(s.heads_kv * s.keys)),
        mask(s.heads_kv * s.keys, 1) {
    for (double& g : decay) g = -0.5 * std::fabs(g);
    if (masked)
      for (std::size_t j = 0; j < mask.size(); j += 3) mask[j] = 0;
  }
  std::size_t features() const {
    return map == FASTOPS_MAP_FAVOR ? 11 : size.dim + (map == FASTOPS_MAP_COSINE ? 1 : 0);
  }
  double scale() const { return 0.7; }
  fastops_linear_attention shape(int dtype, const void* projection) const {
    fastops_linear_attention s{};
    s.feature_map = map;
    s.causal = causal;
    s.normalize = normalize;
    s.dtype = dtype;
    s.batch = 1;
    s.heads_q = size.heads_q;
    s.heads_kv = size.heads_kv;
    s.queries = size.queries;
    s.keys = size.keys;
    s.dim = size.dim;
    s.features = features();
    s.values = size.values;
    s.kernel_eps = map == FASTOPS_MAP_RELU || map == FASTOPS_MAP_RELU2 ? 0.25 : 0;
    s.scale = scale();
    s.projection = map == FASTOPS_MAP_FAVOR ? projection : nullptr;
    return s;
  }

  Doubles mapped(const double* x) const {
    Doubles f(features());
    double norm = 0;
    for (std::size_t d = 0; d < size.dim; ++d) norm += x[d] * x[d];
    for (std::size_t d = 0; d < size.dim && map != FASTOPS_MAP_FAVOR; ++d) {
      const double positive = std::fmax(x[d], 0);
      f[d] = map == FASTOPS_MAP_ELU        ? (x[d] < 0 ? std::exp(x[d]) : x[d] + 1)
             : map == FASTOPS_MAP_RELU     ? positive + 0.25
             : map == FASTOPS_MAP_RELU2    ? positive * positive + 0.25
             : map == FASTOPS_MAP_IDENTITY ? x[d]
             : map == FASTOPS_MAP_COSINE   ? (norm > 0 ? x[d] / std::sqrt(norm) : 0)
                                           : std::exp(scale() * x[d]);
    }
    if (map == FASTOPS_MAP_COSINE) f[size.dim] = 1;
    for (std::size_t r = 0; r < features() && map == FASTOPS_MAP_FAVOR; ++r) {
      double dot = 0;
      for (std::size_t d = 0; d < size.dim; ++d) dot += w[r * size.dim + d] * x[d];
      f[r] = std::exp(std::sqrt(scale()) * dot - 0.5 * scale() * norm) / std::sqrt(double(features()));
    }
    return f;
  }

  // The sums of the definition; absolute: with |v| and |weights| in their place, the measure of roundings.
  Doubles definition(bool absolute) const {
    Doubles y(size.heads_q * size.queries * size.values);
    std::vector<Doubles> keys;
    for (std::size_t j = 0; j < size.heads_kv * size.keys; ++j) keys.push_back(mapped(&k[j * size.dim]));
    for (std::size_t head = 0; head < size.heads_q; ++head)
      for (std::size_t i = 0; i < size.queries; ++i) {
        const std::size_t from = head / (size.heads_q / size.heads_kv);
        const Doubles fq = mapped(&q[(head * size.queries + i) * size.dim]);
        double softmax = 0;
        for (const double f : fq) softmax += f;
        double* const row = &y[(head * size.queries + i) * size.values];
        Doubles by_feature(features() * (size.values + 1));
        double den = 0;
        const auto last = std::ptrdiff_t(i) + std::ptrdiff_t(size.keys) - std::ptrdiff_t(size.queries);
        for (std::size_t j = 0; j < size.keys; ++j) {
          if ((causal && std::ptrdiff_t(j) > last) || !mask[from * size.keys + j]) continue;
          double gone = 0;
          for (std::size_t t = j + 1; decayed && std::ptrdiff_t(t) <= last; ++t) gone += decay[from * size.keys + t];
          const Doubles& fk = keys[from * size.keys + j];
          const double* const value = &v[(from * size.keys + j) * size.values];
          double weight = 0;
          for (std::size_t d = 0; d < features(); ++d) {
            weight += absolute ? std::fabs(fq[d] * fk[d]) : fq[d] * fk[d];
            for (std::size_t e = 0; e <= size.values && map == FASTOPS_MAP_SOFTMAX; ++e)
              by_feature[d * (size.values + 1) + e] += fk[d] * (e == size.values ? 1
                                                                : absolute       ? std::fabs(value[e])
                                                                                 : value[e]);
          }
          weight *= std::exp(gone) * (map < FASTOPS_MAP_EXP ? scale() : 1);
          den += weight;
          for (std::size_t e = 0; e < size.values; ++e)
            row[e] += absolute ? std::fabs(weight * value[e]) : weight * value[e];
        }
        for (std::size_t e = 0; e < size.values; ++e) {
          if (map == FASTOPS_MAP_SOFTMAX) {
            row[e] = 0;
            for (std::size_t d = 0; d < features(); ++d) {
              const double* const sums = &by_feature[d * (size.values + 1)];
              if (sums[size.values] > 0) row[e] += fq[d] / softmax * sums[e] / sums[size.values];
            }
          } else if (normalize) {
            row[e] = den == 0 ? 0 : row[e] / den;
          }
        }
      }
    return y;
  }
};

// The arrays of a problem in memory of type T.
template <class T> struct Arrays {
  const Problem& p;
  std::vector<T> q, k, v, w, decay, y;
  static constexpr int kDtype = sizeof(T) == 8 ? FASTOPS_F64 : FASTOPS_F32;

  explicit Arrays(const Problem& problem)
      : p(problem),
        q(p.q.begin(), p.q.end()),
        k(p.k.begin(), p.k.end()),
        v(p.v.begin(), p.v.end()),
        w(p.w.begin(), p.w.end()),
        decay(p.decay.begin(), p.decay.end()),
        y(p.size.heads_q * p.size.queries * p.size.values) {}
  static fastops_heads heads(const std::vector<T>& x, std::size_t rows, std::size_t columns) {
    return {x.data(), 0, std::ptrdiff_t(rows * columns), std::ptrdiff_t(columns)};
  }
  fastops_heads rows_q() const { return heads(q, p.size.queries, p.size.dim); }
  fastops_heads rows_k() const { return heads(k, p.size.keys, p.size.dim); }
  fastops_heads rows_v() const { return heads(v, p.size.keys, p.size.values); }
  fastops_heads rows_y(const std::vector<T>& x) const { return heads(x, p.size.queries, p.size.values); }
  fastops_linear_options options() const {
    fastops_linear_options o{};
    o.sequences = 1;
    if (p.masked) o.key_mask = {p.mask.data(), 0, std::ptrdiff_t(p.size.keys), 1};
    if (p.decayed) o.decay = {decay.data(), 0, std::ptrdiff_t(p.size.keys), 1};
    return o;
  }
  void forward() {
    const fastops_linear_attention shape = p.shape(kDtype, w.data());
    const fastops_linear_options o = options();
    const fastops_status status =
        fastops_linear_attention_forward(&shape, rows_q(), rows_k(), rows_v(), rows_y(y), &o, {nullptr, nullptr});
    CHECK(status == FASTOPS_OK, "forward: %d", int(status));
  }
  // Gradients of the sum of dy * y in q, k and v.
  std::vector<T> backward(const std::vector<T>& dy) {
    std::vector<T> g(q.size() + k.size() + v.size());
    const fastops_linear_attention shape = p.shape(kDtype, w.data());
    const fastops_linear_options o = options();
    const fastops_status status = fastops_linear_attention_backward(
        &shape, rows_y(dy), rows_q(), rows_k(), rows_v(), rows_y(y), g.data(), g.data() + q.size(),
        g.data() + q.size() + k.size(), &o, nullptr, nullptr, {nullptr, nullptr});
    CHECK(status == FASTOPS_OK, "backward: %d", int(status));
    return g;
  }
};

template <class T> bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T> void check_forward(const Problem& p, const char* level) {
  Arrays<T> arrays(p);
  arrays.forward();
  const Doubles want = p.definition(false), size = p.definition(true);
  const double bound = 64 * double(std::numeric_limits<T>::epsilon());
  double worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i)
    raise_to(std::fabs(double(arrays.y[i]) - want[i]) / (std::fabs(want[i]) + size[i] + 1e-3), &worst);
  CHECK(worst <= bound, "%s map %d causal %d queries %zu keys %zu dim %zu: %g", level, p.map, int(p.causal),
        p.size.queries, p.size.keys, p.size.dim, worst);
  const std::vector<T> once = arrays.y;
  fastops_set_num_threads(3);
  arrays.forward();
  CHECK(same_bits(once, arrays.y), "%s map %d causal %d: threads change bits", level, p.map, int(p.causal));
  fastops_set_num_threads(1);
}

double loss(Arrays<double>& arrays, const Doubles& dy) {
  arrays.forward();
  double sum = 0;
  for (std::size_t i = 0; i < dy.size(); ++i) sum += dy[i] * arrays.y[i];
  return sum;
}

void check_backward(const Problem& p, const char* level) {
  Arrays<double> arrays(p);
  const Doubles dy = numbers(arrays.y.size());
  arrays.forward();
  const Doubles g = arrays.backward(dy);
  std::vector<double>* const inputs[] = {&arrays.q, &arrays.k, &arrays.v};
  std::size_t at = 0;
  for (std::vector<double>* x : inputs) {
    const Doubles direction = numbers(x->size());
    double slope = 0, size = 0;
    for (std::size_t i = 0; i < x->size(); ++i) {
      slope += g[at + i] * direction[i];
      size += std::fabs(g[at + i] * direction[i]);
    }
    const double step = 1e-6;
    const Doubles here = *x;
    for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] = here[i] + step * direction[i];
    const double up = loss(arrays, dy);
    for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] = here[i] - step * direction[i];
    const double down = loss(arrays, dy);
    *x = here;
    // Roundings over the step, and the third derivative times its square; elements near 0 change sides.
    CHECK(std::fabs((up - down) / (2 * step) - slope) <= 3e-5 * (size + 1), "%s map %d causal %d keys %zu: %g, not %g",
          level, p.map, int(p.causal), p.size.keys, slope, (up - down) / (2 * step));
    at += x->size();
  }
  Arrays<float> single(p);
  single.forward();
  const std::vector<float> g_single = single.backward(std::vector<float>(dy.begin(), dy.end()));
  double largest = 1, worst = 0;
  for (const double x : g) raise_to(std::fabs(x), &largest);
  for (std::size_t i = 0; i < g.size(); ++i) raise_to(std::fabs(double(g_single[i]) - g[i]), &worst);
  CHECK(worst <= 1e-4 * largest, "%s map %d causal %d keys %zu: float32 gradient off by %g of %g", level, p.map,
        int(p.causal), p.size.keys, worst, largest);
}

template <class T> void check_softmax(const Size& s, bool causal, const char* level) {
  Problem p(s, FASTOPS_MAP_IDENTITY, causal, false);
  Arrays<T> arrays(p);
  fastops_linear_attention shape = p.shape(Arrays<T>::kDtype, nullptr);
  const fastops_heads none{};
  const fastops_status status =
      fastops_softmax_attention(&shape, arrays.rows_q(), arrays.rows_k(), arrays.rows_v(), arrays.rows_y(arrays.y),
                                none, none, nullptr, 1, {nullptr, nullptr});
  CHECK(status == FASTOPS_OK, "softmax: %d", int(status));
  double worst = 0;
  for (std::size_t head = 0; head < s.heads_q; ++head)
    for (std::size_t i = 0; i < s.queries; ++i) {
      const std::size_t from = head / (s.heads_q / s.heads_kv);
      Doubles sums(s.values + 1);
      for (std::size_t j = 0; j < s.keys; ++j) {
        if (causal && std::ptrdiff_t(j) > std::ptrdiff_t(i) + std::ptrdiff_t(s.keys) - std::ptrdiff_t(s.queries))
          continue;
        double dot = 0;
        for (std::size_t d = 0; d < s.dim; ++d)
          dot += p.q[(head * s.queries + i) * s.dim + d] * p.k[(from * s.keys + j) * s.dim + d];
        const double weight = std::exp(p.scale() * dot);
        for (std::size_t e = 0; e < s.values; ++e) sums[e] += weight * p.v[(from * s.keys + j) * s.values + e];
        sums[s.values] += weight;
      }
      const double inverse = sums[s.values] > 0 ? 1 / sums[s.values] : 0;
      for (std::size_t e = 0; e < s.values; ++e)
        raise_to(std::fabs(double(arrays.y[(head * s.queries + i) * s.values + e]) - sums[e] * inverse), &worst);
    }
  CHECK(worst <= 64 * double(std::numeric_limits<T>::epsilon()), "%s softmax causal %d keys %zu: %g", level,
        int(causal), s.keys, worst);
}

// Nystrom attention: the same numbers at every level, for any number of threads, in both types; gradients of double by
// difference quotients.
struct NystromCase {
  std::size_t queries, keys, dim, values, landmarks, taps;
  bool ridge, normalize, masked;
};
const NystromCase kNystromCases[] = {{40, 40, 9, 5, 4, 3, false, false, true},
                                     {33, 70, 16, 8, 7, 0, true, true, true},
                                     {130, 130, 24, 17, 33, 5, false, true, false},
                                     {20, 200, 8, 8, 32, 0, false, false, true},
                                     {1100, 1100, 8, 16, 16, 0, true, false, false}};

template <class T> struct NystromArrays {
  const NystromCase& c;
  std::vector<T> q, k, v, conv, y;
  std::vector<std::uint8_t> mask;
  static constexpr int kDtype = sizeof(T) == 8 ? FASTOPS_F64 : FASTOPS_F32;
  static constexpr std::size_t kHeads = 2;

  NystromArrays(const NystromCase& one, const Doubles& numbers_)
      : c(one), y(kHeads * one.queries * one.values), mask(one.keys, 1) {
    auto at = numbers_.begin();
    for (auto [x, n] : {std::pair{&q, kHeads * c.queries * c.dim}, std::pair{&k, kHeads * c.keys * c.dim},
                        std::pair{&v, kHeads * c.keys * c.values}, std::pair{&conv, kHeads * c.taps}}) {
      x->assign(at, at + std::ptrdiff_t(n));
      at += std::ptrdiff_t(n);
    }
    for (std::size_t j = 0; c.masked && j < mask.size(); j += 4) mask[j] = 0;
  }
  static std::size_t count(const NystromCase& c) {
    return kHeads * (c.queries * c.dim + c.keys * (c.dim + c.values) + c.taps);
  }
  fastops_nystrom_attention shape() const {
    fastops_nystrom_attention s{};
    s.dtype = kDtype;
    s.ridge_solve = c.ridge;
    s.normalize = c.normalize;
    s.batch = 1;
    s.heads_q = s.heads_kv = kHeads;
    s.queries = c.queries;
    s.keys = c.keys;
    s.dim = c.dim;
    s.values = c.values;
    s.landmarks = c.landmarks;
    s.iterations = 6;
    s.taps = c.taps;
    s.ridge = 1e-3;
    s.scale = 0.8;
    return s;
  }
  static fastops_heads heads(const std::vector<T>& x, std::size_t rows, std::size_t columns) {
    return {x.data(), 0, std::ptrdiff_t(rows * columns), std::ptrdiff_t(columns)};
  }
  fastops_heads masks() const { return c.masked ? fastops_heads{mask.data(), 0, 0, 1} : fastops_heads{}; }
  void forward() {
    const fastops_nystrom_attention s = shape();
    const fastops_status status = fastops_nystrom_attention_forward(
        &s, heads(q, c.queries, c.dim), heads(k, c.keys, c.dim), heads(v, c.keys, c.values),
        heads(y, c.queries, c.values), masks(), c.taps > 0 ? conv.data() : nullptr, nullptr, nullptr, nullptr,
        {nullptr, nullptr});
    CHECK(status == FASTOPS_OK, "nystrom: %d", int(status));
  }
  std::vector<T> backward(const std::vector<T>& dy) {
    std::vector<T> g(q.size() + k.size() + v.size() + conv.size());
    const fastops_nystrom_attention s = shape();
    T* const dk = g.data() + q.size();
    const fastops_status status = fastops_nystrom_attention_backward(
        &s, heads(dy, c.queries, c.values), heads(q, c.queries, c.dim), heads(k, c.keys, c.dim),
        heads(v, c.keys, c.values), g.data(), dk, dk + k.size(), masks(), c.taps > 0 ? conv.data() : nullptr,
        c.taps > 0 ? dk + k.size() + v.size() : nullptr, nullptr, nullptr, nullptr, nullptr, {nullptr, nullptr});
    CHECK(status == FASTOPS_OK, "nystrom backward: %d", int(status));
    return g;
  }
};

void check_nystrom(const char* level) {
  static std::vector<Doubles> first_level;
  Random of_case{23};
  std::size_t number = 0;
  for (const NystromCase& c : kNystromCases) {
    source = of_case;
    const Doubles inputs = numbers(NystromArrays<double>::count(c));
    NystromArrays<double> wide(c, inputs);
    NystromArrays<float> narrow(c, inputs);
    wide.forward();
    narrow.forward();
    double largest = 0, difference = 0;
    for (std::size_t i = 0; i < wide.y.size(); ++i) {
      raise_to(std::fabs(wide.y[i]), &largest);
      raise_to(std::fabs(double(narrow.y[i]) - wide.y[i]), &difference);
    }
    CHECK(difference <= 2e-5 * largest, "%s nystrom %zu: float32 off by %g of %g", level, number, difference, largest);
    const std::vector<float> once = narrow.y;
    fastops_set_num_threads(3);
    narrow.forward();
    CHECK(same_bits(once, narrow.y), "%s nystrom %zu: threads change bits", level, number);
    fastops_set_num_threads(1);

    const Doubles y = wide.y, dy = numbers(y.size());
    const Doubles g = wide.backward(dy);
    std::size_t at = 0;
    for (std::vector<double>* x : {&wide.q, &wide.k, &wide.v, &wide.conv}) {
      const Doubles direction = numbers(x->size()), here = *x;
      double slope = 0, size = 0, ends[2] = {0, 0};
      for (std::size_t i = 0; i < x->size(); ++i) {
        slope += g[at + i] * direction[i];
        size += std::fabs(g[at + i] * direction[i]);
      }
      const double step = 1e-5;
      for (int end = 0; end < 2; ++end) {
        for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] = here[i] + (end == 0 ? -step : step) * direction[i];
        wide.forward();
        for (std::size_t i = 0; i < dy.size(); ++i) ends[end] += dy[i] * wide.y[i];
      }
      *x = here;
      CHECK(std::fabs((ends[1] - ends[0]) / (2 * step) - slope) <= 1e-5 * (size + 1), "%s nystrom %zu: %g, not %g",
            level, number, slope, (ends[1] - ends[0]) / (2 * step));
      at += x->size();
    }
    if (first_level.size() <= number) first_level.push_back(y);
    double apart = 0;
    for (std::size_t i = 0; i < y.size(); ++i) raise_to(std::fabs(y[i] - first_level[number][i]), &apart);
    CHECK(apart <= 1e-11 * largest, "%s nystrom %zu: %g from the first level", level, number, apart);
    ++number;
  }
}

}  // namespace

int main() {
  for (int index = 0; const char* level = fastops_compiled_target(index); ++index) {
    if (fastops_set_target(level) != FASTOPS_OK) {
      printf("%s: not run by this CPU\n", level);
      continue;
    }
    fastops_set_num_threads(1);
    check_nystrom(level);
    const bool emulated = std::getenv("FASTOPS_EMULATED") != nullptr;  // a CPU some fifty times slower
    for (const Size& s : kSizes)
      for (const bool causal : {false, true}) {
        if ((emulated && s.keys > 50) || (kSanitized && s.dim == 64)) continue;
        check_softmax<float>(s, causal, level);
        check_softmax<double>(s, causal, level);
        for (int map = FASTOPS_MAP_ELU; map <= FASTOPS_MAP_SOFTMAX; ++map)
          for (const bool extras : {false, true}) {
            if (s.keys > 200 && (map != FASTOPS_MAP_ELU || !extras)) continue;
            const Problem p(s, map, causal, extras);
            check_forward<float>(p, level);
            check_forward<double>(p, level);
            if (s.keys <= 50) check_backward(p, level);
          }
      }
  }
  return check_result("test_attention");
}
