// SPDX-License-Identifier: BSD-3-Clause
// Linear attention from C++: (heads, tokens, features) in C order.
#include <fastops/fastops.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::size_t heads = 2, tokens = 5, dim = 4;
  std::vector<float> q(heads * tokens * dim), k(q.size()), v(q.size()), out(q.size());
  for (std::size_t i = 0; i < q.size(); ++i) {
    q[i] = static_cast<float>(i % 7) / 4 - 0.5F;
    k[i] = static_cast<float>(i % 5) / 4 - 0.5F;
    v[i] = static_cast<float>(i % 11) / 8;
  }

  fastops_linear_attention shape{};
  shape.feature_map = FASTOPS_MAP_ELU;
  shape.causal = 1;
  shape.normalize = 1;
  shape.dtype = FASTOPS_F32;
  shape.batch = 1;
  shape.heads_q = shape.heads_kv = heads;
  shape.queries = shape.keys = tokens;
  shape.dim = shape.features = shape.values = dim;
  shape.scale = 1.0;
  const auto view = [&](const std::vector<float>& x) {
    return fastops_heads{x.data(), heads * tokens * dim, tokens * dim, dim};
  };
  const fastops_linear_options options{};
  if (fastops_linear_attention_forward(&shape, view(q), view(k), view(v), view(out), &options, {}) != FASTOPS_OK)
    return 1;
  for (const float x : out) std::printf("attention %a\n", static_cast<double>(x));
}
