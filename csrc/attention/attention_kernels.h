// SPDX-License-Identifier: BSD-3-Clause
// What the attention kernels of each CPU level are told, and the table of them that a level fills.
#ifndef FASTOPS_ATTENTION_ATTENTION_KERNELS_H
#define FASTOPS_ATTENTION_ATTENTION_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "fastops/fastops.h"

namespace fastops {

// Rows of one head, strides in elements; the last axis is contiguous.
struct Rows {
  const void* data;
  std::ptrdiff_t row;
};

// Long work asks now and then whether it is to end; `worker` is the one that asks.
struct Stop {
  bool (*asked)(void* context, unsigned worker) noexcept;
  void* context;
};

// What all heads of a call share. T is float, or double with FASTOPS_F64.
struct LinearCall {
  fastops_feature_map map;
  bool causal, normalize;
  fastops_dtype dtype;
  std::size_t dim, features, values;  // of q and k, of the state, of v
  std::size_t group;                  // query heads that share a key head
  double eps, kernel_eps, scale;
  const void* projection;  // FAVOR: prepared by LinearKernels::project
  const Stop* stop;
};

// One key head of one sequence with its query heads.
struct LinearHead {
  Rows q, k, v, out;  // of the first query head
  std::ptrdiff_t q_head, out_head;
  std::size_t queries, keys;
  std::size_t first, last;   // with causality: queries; the chunks that begin there are answered
  const std::uint8_t* mask;  // null: every key is there
  std::ptrdiff_t mask_step;
  const void* decay;  // T, null: none
  std::ptrdiff_t decay_step;
  // States (features x all values), (features), (features); null where there is none.
  const void *s_in, *z_in, *m_in;
  void *s_out, *z_out, *m_out;
  unsigned worker;
};

struct LinearGradient {
  Rows dy;  // like out
  std::ptrdiff_t dy_head;
  void *dq, *dk, *dv;  // rows contiguous, like q, k and v; dq of the first query head
  std::ptrdiff_t dq_head;
  const void *ds, *dz;  // of the state after the last key; null: none
  void *ds_in, *dz_in;  // of the initial state; null: not wanted
};

struct SoftmaxCall {
  bool causal;
  fastops_dtype dtype, out_dtype;
  std::size_t dim, values;
  double scale;
  const Stop* stop;
};
struct SoftmaxHead {
  Rows q, k, v, out;
  std::size_t queries, keys, first, last;  // the queries first .. last of them
  const std::uint8_t* mask;
  std::ptrdiff_t mask_step;
  const void* factor;  // T, one for each query; null: none
  std::ptrdiff_t factor_step;
  unsigned worker;
};

// Sizes are in elements of T.
struct LinearKernels {
  // FAVOR+'s projection in the kernels' form.
  std::size_t (*projection_items)(const LinearCall&) noexcept;
  void (*project)(const LinearCall&, const void* projection, void* prepared) noexcept;

  // A worker's workspace for all functions but the gradient.
  std::size_t (*work_items)(const LinearCall&) noexcept;
  void (*causal)(const LinearCall&, const LinearHead&, void* work) noexcept;
  // Without causality: states of parts of the keys, their sum, the queries against it.
  std::size_t (*state_items)(const LinearCall&) noexcept;
  void (*absorb)(const LinearCall&, const LinearHead&, std::size_t first, std::size_t last, bool with_initial,
                 void* state, void* work) noexcept;
  // Adds `count` states up in the first, and writes the head's final state.
  void (*merge)(const LinearCall&, const LinearHead&, void* states, std::size_t count, void* work) noexcept;
  void (*emit)(const LinearCall&, const LinearHead&, std::size_t first, std::size_t last, const void* state,
               void* work) noexcept;
  // One token; s_out, z_out and m_out are the state, in place.
  std::size_t (*step_items)(const LinearCall&) noexcept;
  void (*step)(const LinearCall&, const LinearHead&, void* work) noexcept;
};

struct LinearGradientKernels {
  std::size_t (*work_items)(const LinearCall&, std::size_t queries, std::size_t keys) noexcept;
  void (*run)(const LinearCall&, const LinearHead&, const LinearGradient&, void* work) noexcept;
};

struct SoftmaxKernels {
  std::size_t (*work_items)(const SoftmaxCall&) noexcept;
  void (*run)(const SoftmaxCall&, const SoftmaxHead&, void* work) noexcept;
};
// The queries of one SoftmaxHead, at most.
inline constexpr std::size_t kSoftmaxRows = 96;
// Queries or keys that Nystrom attention takes at once.
inline constexpr std::size_t kNystromBlock = 96;

// What all heads of a call of Nystrom attention share.
struct NystromCall {
  fastops_dtype dtype;
  std::size_t dim, values, landmarks, iterations, taps;
  bool ridge_solve, normalize;
  double ridge, scale;
  double coefficient;  // of the start, above 0 where it is the same for all matrices
  const Stop* stop;
  bool informs = false;  // whether any head has room for information
};
struct NystromHead {
  Rows q, k, v, out;
  std::size_t queries, keys;
  const std::uint8_t* mask;
  std::ptrdiff_t mask_step;
  bool mask_queries;                      // the mask is of the queries, too
  const void* conv;                       // T (taps)
  const void *q_landmarks, *k_landmarks;  // T (landmarks x dim); null: means of segments
  void* info;                             // T (4); null: not wanted
  unsigned worker;
};
struct NystromGradient {
  Rows dy;  // of the first query head, as q and out
  std::ptrdiff_t dy_head, q_head, dq_head;
  std::size_t group;                    // query heads of the key head
  void *dq, *dk, *dv;                   // rows contiguous
  void* d_conv;                         // T (group, taps); null: none
  void *d_q_landmarks, *d_k_landmarks;  // T (group, landmarks, dim), (landmarks, dim); null: not wanted
};

// `middle` is what the phases of a head hand on to each other.
struct NystromKernels {
  std::size_t (*work_items)(const NystromCall&) noexcept;
  std::size_t (*middle_items)(const NystromCall&) noexcept;
  std::size_t (*partial_items)(const NystromCall&) noexcept;
  std::size_t (*landmark_items)(const NystromCall&) noexcept;
  // The landmarks first .. last of the queries or of the keys, where any are needed.
  void (*means)(const NystromCall&, const NystromHead&, bool of_queries, std::size_t first, std::size_t last,
                void* landmarks, void* work) noexcept;
  // The matrix between landmarks (null: they are made here); the product of its norms, 0 where attention is exact.
  double (*prepare)(const NystromCall&, const NystromHead&, const void* landmarks, void* middle, void* work) noexcept;
  // What of the middle needs no keys; before solve().
  void (*invert)(const NystromCall&, const NystromHead&, void* middle, void* work) noexcept;
  // softmax(s Qt K^T) V over the keys first .. last.
  void (*absorb)(const NystromCall&, const NystromHead&, std::size_t first, std::size_t last, const void* middle,
                 void* partial, void* work) noexcept;
  // Adds the second partial, which is lost, to the first.
  void (*merge)(const NystromCall&, void* partial, void* other) noexcept;
  void (*solve)(const NystromCall&, const NystromHead&, void* middle, const void* partial, void* work) noexcept;
  // The queries first .. last.
  void (*emit)(const NystromCall&, const NystromHead&, std::size_t first, std::size_t last, const void* middle,
               void* work) noexcept;
};

struct NystromGradientKernels {
  std::size_t (*work_items)(const NystromCall&, std::size_t queries, std::size_t keys, std::size_t group) noexcept;
  void (*run)(const NystromCall&, const NystromHead&, const NystromGradient&, void* work) noexcept;
};

// [0]: float, [1]: double.
#define FASTOPS_DECLARE_ATTENTION(level)                          \
  namespace level {                                               \
  extern const LinearKernels kLinearKernels[2];                   \
  extern const LinearGradientKernels kLinearGradientKernels[2];   \
  extern const SoftmaxKernels kSoftmaxKernels[2];                 \
  extern const NystromKernels kNystromKernels[2];                 \
  extern const NystromGradientKernels kNystromGradientKernels[2]; \
  }
FASTOPS_FOR_EACH_LEVEL(FASTOPS_DECLARE_ATTENTION)
#undef FASTOPS_DECLARE_ATTENTION

}  // namespace fastops
#endif
