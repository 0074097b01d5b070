// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels of linear attention and its step for one token.
#include "attention/attention_linear.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using namespace attention;

template <class T> std::size_t work_items(const LinearCall& call) noexcept {
  static constexpr LinearHead head{};
  Parts<T> parts(nullptr);
  Pass<T> pass(call, head, parts, call.causal ? kChunk : kMostRows);
  return parts.used();
}
template <class T> std::size_t state_items(const LinearCall& call) noexcept {
  Parts<T> parts(nullptr);
  State<T>(parts, padded<T>(call.features), padded<T>(call.values));
  return parts.used();
}

template <class T> std::size_t step_items(const LinearCall& call) noexcept {
  static constexpr LinearHead head{};
  Parts<T> parts(nullptr);
  Pass<T> pass(call, head, parts, State<T>(parts, padded<T>(call.features), 0), 1);
  return parts.used();
}

template <class T> void causal(const LinearCall& call, const LinearHead& head, void* work) noexcept {
  Parts<T> parts(work);
  Pass<T>(call, head, parts).causal();
}
template <class T> State<T> state_at(const LinearCall& call, void* states, std::size_t i) noexcept {
  Parts<T> parts(static_cast<T*>(states) + i * state_items<T>(call));
  return State<T>(parts, padded<T>(call.features), padded<T>(call.values));
}
// In blocks whose sums are added up: a running sum of millions of keys would err with each of them.
template <class T>
void absorb(const LinearCall& call, const LinearHead& head, std::size_t first, std::size_t last, bool with_initial,
            void* state, void* work) noexcept {
  constexpr std::size_t kBlock = 8192;
  Parts<T> parts(work);
  Pass<T> pass(call, head, parts, kMostRows);
  const State<T> total = state_at<T>(call, state, 0);
  const std::size_t features = padded<T>(call.features), values = padded<T>(call.values);
  for (std::size_t t = first; t == first || t < last; t += kBlock) {
    if (call.stop != nullptr && call.stop->asked(call.stop->context, head.worker)) return;
    pass.absorb(t, last - t < kBlock || last < t ? last : t + kBlock, with_initial && t == first);
    if (t == first)
      pass.copy_state(total);
    else
      add_state(total, pass.state(), features, values);
  }
}
template <class T>
void merge(const LinearCall& call, const LinearHead& head, void* states, std::size_t count, void* work) noexcept {
  const State<T> total = state_at<T>(call, states, 0);
  for (std::size_t i = 1; i < count; ++i)
    add_state(total, state_at<T>(call, states, i), padded<T>(call.features), padded<T>(call.values));
  Parts<T> parts(work);
  Pass<T>(call, head, parts, total, kMostRows).store_final();
}
template <class T>
void emit(const LinearCall& call, const LinearHead& head, std::size_t first, std::size_t last, const void* state,
          void* work) noexcept {
  Parts<T> parts(work);
  // The state is only read.
  Pass<T> pass(call, head, parts, state_at<T>(call, const_cast<void*>(state), 0), kMostRows);
  pass.emit(first, last);
}
template <class T> void step(const LinearCall& call, const LinearHead& head, void* work) noexcept {
  Parts<T> parts(work);
  Pass<T>(call, head, parts, State<T>(parts, padded<T>(call.features), 0), 1).step();
}

template <class T> constexpr LinearKernels kTable() {
  return {projection_items<T>, project<T>, work_items<T>, causal<T>,     state_items<T>,
          absorb<T>,           merge<T>,   emit<T>,       step_items<T>, step<T>};
}

}  // namespace

const LinearKernels kLinearKernels[2] = {kTable<float>(), kTable<double>()};

}  // namespace fastops::FASTOPS_LEVEL
