// SPDX-License-Identifier: BSD-3-Clause
// Moving averages and optimizer steps over lists of tensors on a GPU: one launch, a block of threads for each chunk of
// a tensor.
#include <type_traits>

#include "cuda/device.h"
#include "optim/optim_math.h"

namespace fastops::FASTOPS_LEVEL {
namespace lists_kernels {

using namespace optim;

constexpr int kThreads = 256;
constexpr std::size_t kWidth = 4;  // elements that a thread takes at once

// Elements i .. i + W of a role.
template <class T, int W> using Values = Vector<typename T::S, W>;
template <class T, int W> FASTOPS_DEVICE Values<T, W> get(const void* p, std::size_t i) {
  return load_vector<Values<T, W>>(static_cast<const typename T::S*>(p) + i);
}
template <class T, int W> FASTOPS_DEVICE void put(void* p, std::size_t i, const Values<T, W>& v) {
  store_vector(static_cast<typename T::S*>(p) + i, v);
}

// Elements first .. last of a tensor. A step loads what it needs for several groups of elements before it computes with
// any, so that so many loads are under way.
template <int kBatch, class Step>
FASTOPS_DEVICE void run(const Step& step, std::size_t first, std::size_t last, bool packs) {
  constexpr std::size_t stride = kThreads * kWidth;
  std::size_t i = first;
  if (packs) {
    for (; i + kBatch * stride <= last; i += kBatch * stride) {
      typename Step::template Loaded<kWidth> loaded[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) loaded[b] = step.template load<kWidth>(i + b * stride + threadIdx.x * kWidth);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) step.template finish<kWidth>(i + b * stride + threadIdx.x * kWidth, loaded[b]);
    }
    for (std::size_t k = i + threadIdx.x * kWidth; k + kWidth <= last; k += stride)
      step.template finish<kWidth>(k, step.template load<kWidth>(k));
    i = last - (last - first) % kWidth;
  }
  for (i += threadIdx.x; i < last; i += kThreads) step.template finish<1>(i, step.template load<1>(i));
}

template <class To, class From> FASTOPS_DEVICE To converted(typename From::S s) {
  return static_cast<To>(From::get(s));
}

// Moving averages.

// What every average reads.
template <class S, class P> struct Followed {
  void* shadow;
  const void* parameter;

  template <int W> struct Loaded {
    Values<S, W> s;
    Values<P, W> p;
  };
  template <int W> FASTOPS_DEVICE Loaded<W> load(std::size_t i) const {
    return {get<S, W>(shadow, i), get<P, W>(parameter, i)};
  }
};

template <class S, class P> struct EmaStep : Followed<S, P> {
  using T = typename S::E;
  template <int W> using Loaded = typename Followed<S, P>::template Loaded<W>;
  Lerp<T> lerp;
  bool copies;

  template <int W> FASTOPS_DEVICE void finish(std::size_t i, const Loaded<W>& x) const {
    Values<S, W> r;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const T p = converted<T, P>(x.p.v[j]);
      r.v[j] = S::put(copies ? p : lerp(S::get(x.s.v[j]), p));
    }
    put<S, W>(this->shadow, i, r);
  }
};

// bfloat16 shadows, rounded at random by the element's number in its tensor.
template <class P> struct RandomEmaStep : Followed<BF16, P> {
  template <int W> using Loaded = typename Followed<BF16, P>::template Loaded<W>;
  Lerp<float> lerp;
  bool copies;
  RandomBits random;

  template <int W> FASTOPS_DEVICE void finish(std::size_t i, const Loaded<W>& x) const {
    Values<BF16, W> r;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const std::size_t e = i + j;
      const std::uint32_t hash = random(e / 32 * 16 + e % 16);
      const float p = converted<float, P>(x.p.v[j]);
      const float moved = copies ? p : lerp(BF16::get(x.s.v[j]), p);
      r.v[j] = static_cast<std::uint16_t>(round_randomly(moved, (e & 16) == 0 ? hash & 0xffffu : hash >> 16));
    }
    put<BF16, W>(this->shadow, i, r);
  }
};

struct Range {
  std::size_t first, last;
};
FASTOPS_DEVICE Range range_of(const gpu::Chunk& chunk, const gpu::Tensor& tensor) {
  const std::size_t first = chunk.index * gpu::kChunk, end = first + gpu::kChunk;
  return {first, end < tensor.size ? end : static_cast<std::size_t>(tensor.size)};
}

// f(dtype) with the tag of a floating-point dtype.
template <class F> FASTOPS_DEVICE void with_dtype(std::uint8_t dtype, const F& f) {
  switch (dtype) {
    case FASTOPS_F16:
      return f(F16());
    case FASTOPS_BF16:
      return f(BF16());
    case FASTOPS_F32:
      return f(F32());
    default:
      return f(F64());
  }
}

__global__ void __launch_bounds__(kThreads)
    ema_kernel(gpu::TensorTable table, double w_of_all, const double* weights, bool random, std::uint64_t seed) {
  const gpu::Chunk chunk = table.chunks[blockIdx.x];
  const gpu::Tensor& tensor = table.tensors[chunk.tensor];
  const double w = weights == nullptr ? w_of_all : weights[chunk.tensor];
  if (w == 0.0) return;
  const bool copies = w == 1.0, packs = tensor.packs != 0;
  const Range range = range_of(chunk, tensor);
  void* const shadow = tensor.at[1];
  const void* const parameter = tensor.at[0];
  with_dtype(tensor.dtype[0], [&](auto p) {
    using P = decltype(p);
    if (tensor.dtype[1] == FASTOPS_F32) {
      const EmaStep<F32, P> step{{shadow, parameter}, Lerp<float>(w), copies};
      run<4>(step, range.first, range.last, packs);
    } else if (tensor.dtype[1] == FASTOPS_F64) {
      const EmaStep<F64, P> step{{shadow, parameter}, Lerp<double>(w), copies};
      run<2>(step, range.first, range.last, packs);
    } else if (random) {
      const RandomEmaStep<P> step{{shadow, parameter}, Lerp<float>(w), copies, RandomBits(seed, chunk.tensor)};
      run<4>(step, range.first, range.last, packs);
    }
  });
}

// Steps.

// What follows the new parameters in the same pass: their shadow, and gradients of zero.
template <class T> struct Follower {
  Lerp<T> lerp;
  bool present, copies, zero_grad;
  Follower(double w, bool present_, bool zero_grad_)
      : lerp(w), present(present_ && w != 0.0), copies(w == 1.0), zero_grad(zero_grad_) {}
  FASTOPS_DEVICE T operator()(T shadow, T p) const { return copies ? p : lerp(shadow, p); }
};

template <class T> struct AdamRule {
  Adam<T> adam;
  Follower<T> follower;
  explicit AdamRule(const fastops_adamw& s) : adam(s), follower(s.ema_weight, s.has_ema != 0, s.zero_grad != 0) {}
};
template <class T> struct SgdRule {
  Sgd<T> sgd;
  Follower<T> follower;
  bool moves, has_momentum;
  explicit SgdRule(const fastops_sgd& s)
      : sgd(s),
        follower(s.ema_weight, s.has_ema != 0 && s.moves != 0, s.zero_grad != 0),
        moves(s.moves != 0),
        has_momentum(s.has_momentum != 0) {}
};
// A list may hold tensors of both dtypes.
template <template <class> class Rule> struct Rules {
  Rule<float> single;
  Rule<double> wide;
};

template <class T, class G> struct AdamStep {
  using E = typename T::E;
  const gpu::Tensor& tensor;
  const AdamRule<E>& rule;

  template <int W> struct Loaded {
    Values<T, W> p, m, v, shadow;
    Values<G, W> g;
  };
  template <int W> FASTOPS_DEVICE Loaded<W> load(std::size_t i) const {
    Loaded<W> x{get<T, W>(tensor.at[0], i),
                get<T, W>(tensor.at[2], i),
                get<T, W>(tensor.at[3], i),
                {},
                get<G, W>(tensor.at[1], i)};
    if (rule.follower.present) x.shadow = get<T, W>(tensor.at[4], i);
    return x;
  }
  template <int W> FASTOPS_DEVICE void finish(std::size_t i, Loaded<W> x) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      rule.adam(x.p.v[j], converted<E, G>(x.g.v[j]), x.m.v[j], x.v.v[j]);
      if (rule.follower.present) x.shadow.v[j] = rule.follower(x.shadow.v[j], x.p.v[j]);
    }
    put<T, W>(tensor.at[0], i, x.p);
    put<T, W>(tensor.at[2], i, x.m);
    put<T, W>(tensor.at[3], i, x.v);
    if (rule.follower.present) put<T, W>(tensor.at[4], i, x.shadow);
    if (rule.follower.zero_grad) put<G, W>(tensor.at[1], i, Values<G, W>{});
  }
};

template <class T, class G> struct SgdStep {
  using E = typename T::E;
  const gpu::Tensor& tensor;
  const SgdRule<E>& rule;

  template <int W> struct Loaded {
    Values<T, W> p, m, shadow;
    Values<G, W> g;
  };
  template <int W> FASTOPS_DEVICE Loaded<W> load(std::size_t i) const {
    Loaded<W> x{};
    x.g = get<G, W>(tensor.at[1], i);
    if (rule.moves || rule.sgd.decays) x.p = get<T, W>(tensor.at[0], i);
    if (rule.has_momentum) x.m = get<T, W>(tensor.at[2], i);
    if (rule.follower.present) x.shadow = get<T, W>(shadow(), i);
    return x;
  }
  template <int W> FASTOPS_DEVICE void finish(std::size_t i, Loaded<W> x) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      E direction = rule.sgd.gradient(x.p.v[j], converted<E, G>(x.g.v[j]));
      if (rule.has_momentum) {
        x.m.v[j] = rule.sgd.velocity(x.m.v[j], direction);
        direction = rule.sgd.direction(x.m.v[j], direction);
      }
      if (rule.moves) x.p.v[j] = rule.sgd.move(x.p.v[j], direction);
      if (rule.follower.present) x.shadow.v[j] = rule.follower(x.shadow.v[j], x.p.v[j]);
    }
    if (rule.has_momentum) put<T, W>(tensor.at[2], i, x.m);
    if (rule.moves) put<T, W>(tensor.at[0], i, x.p);
    if (rule.follower.present) put<T, W>(shadow(), i, x.shadow);
    if (rule.follower.zero_grad) put<G, W>(tensor.at[1], i, Values<G, W>{});
  }
  FASTOPS_DEVICE void* shadow() const { return rule.has_momentum ? tensor.at[3] : tensor.at[2]; }
};

// The step of one chunk: float64 by itself, float32 with gradients of any dtype that is no wider.
template <template <class, class> class Step, template <class> class Rule>
FASTOPS_DEVICE void take_step(const gpu::TensorTable& table, const Rules<Rule>& rules) {
  const gpu::Chunk chunk = table.chunks[blockIdx.x];
  const gpu::Tensor tensor = table.tensors[chunk.tensor];
  const Range range = range_of(chunk, tensor);
  const bool packs = tensor.packs != 0;
  if (tensor.dtype[0] == FASTOPS_F64) return run<1>(Step<F64, F64>{tensor, rules.wide}, range.first, range.last, packs);
  with_dtype(tensor.dtype[1], [&](auto g) {
    using G = decltype(g);
    if constexpr (!std::is_same_v<G, F64>) run<2>(Step<F32, G>{tensor, rules.single}, range.first, range.last, packs);
  });
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(gpu::TensorTable table, const __grid_constant__ Rules<AdamRule> rules) {
  take_step<AdamStep>(table, rules);
}

__global__ void __launch_bounds__(kThreads)
    sgd_kernel(gpu::TensorTable table, const __grid_constant__ Rules<SgdRule> rules) {
  take_step<SgdStep>(table, rules);
}

}  // namespace lists_kernels
using namespace lists_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

using namespace fastops::FASTOPS_LEVEL;

Status ema_update(const TensorTable& table, double w, const double* weights, const std::uint64_t* seed,
                  Stream stream) noexcept {
  if (table.chunk_count == 0) return 0;
  FASTOPS_LAUNCH(ema_kernel, static_cast<unsigned>(table.chunk_count), kThreads, 0, stream, table, w, weights,
                 seed != nullptr, seed == nullptr ? 0 : *seed);
  return launched();
}

Status sgd_step(const TensorTable& table, const fastops_sgd& step, Stream stream) noexcept {
  if (table.chunk_count == 0) return 0;
  const Rules<SgdRule> rules{SgdRule<float>(step), SgdRule<double>(step)};
  FASTOPS_LAUNCH(sgd_kernel, static_cast<unsigned>(table.chunk_count), kThreads, 0, stream, table, rules);
  return launched();
}

Status adamw_step(const TensorTable& table, const fastops_adamw& step, Stream stream) noexcept {
  if (table.chunk_count == 0) return 0;
  const Rules<AdamRule> rules{AdamRule<float>(step), AdamRule<double>(step)};
  FASTOPS_LAUNCH(adamw_kernel, static_cast<unsigned>(table.chunk_count), kThreads, 0, stream, table, rules);
  return launched();
}

}  // namespace fastops::gpu
