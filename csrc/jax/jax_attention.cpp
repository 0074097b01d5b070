// SPDX-License-Identifier: BSD-3-Clause
// Attention for XLA: buffers of four axes to heads, samples of vmap as one batch where they can be, one call of the C
// interface.
#include <cstring>
#include <initializer_list>

#include "jax/jax_handlers.h"

namespace fastops {

// The options of each operation, as attributes of a call.
struct LinearNumbers {
  std::int32_t feature_map, causal, normalize, tokens_first;
  double eps, kernel_eps, scale;
};
struct SoftmaxNumbers {
  std::int32_t causal, tokens_first;
  double scale;
};
struct NystromNumbers {
  std::int32_t landmarks, iterations, ridge_solve, batch_init, normalize, tokens_first;
  double ridge, scale;
};

}  // namespace fastops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(fastops::LinearNumbers, StructMember<std::int32_t>("feature_map"),
                                      StructMember<std::int32_t>("causal"), StructMember<std::int32_t>("normalize"),
                                      StructMember<std::int32_t>("tokens_first"), StructMember<double>("eps"),
                                      StructMember<double>("kernel_eps"), StructMember<double>("scale"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(fastops::SoftmaxNumbers, StructMember<std::int32_t>("causal"),
                                      StructMember<std::int32_t>("tokens_first"), StructMember<double>("scale"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(fastops::NystromNumbers, StructMember<std::int32_t>("landmarks"),
                                      StructMember<std::int32_t>("iterations"),
                                      StructMember<std::int32_t>("ridge_solve"),
                                      StructMember<std::int32_t>("batch_init"), StructMember<std::int32_t>("normalize"),
                                      StructMember<std::int32_t>("tokens_first"), StructMember<double>("ridge"),
                                      StructMember<double>("scale"));

namespace fastops {
namespace {

constexpr std::size_t kAxes = 4, kStepAxes = 3;

ffi::Error no_fit() { return invalid("fastops: buffers that do not fit each other"); }

// Buffers with the samples of vmap as their first axes, all of them in full.
struct Samples {
  std::size_t axes, own, count;

  // An operand that is absent has no axes of its own.
  bool has(const AnyBuffer& x) const { return rank_of(x) > axes; }
  std::size_t size(const AnyBuffer& x) const { return count_from(x.dimensions(), axes); }
  std::size_t length(const AnyBuffer& x, std::size_t axis) const { return fastops::length(x, axes + axis); }
  char* at(const AnyBuffer& x, std::size_t sample, std::size_t item) const {
    return has(x) ? static_cast<char*>(x.untyped_data()) + sample * size(x) * item : nullptr;
  }
  // Whether a buffer has these samples, and the lengths after them; of an absent one, yes.
  bool fits(const AnyBuffer& x, std::initializer_list<std::size_t> lengths) const {
    if (rank_of(x) < axes || count_from(x.dimensions(), 0) != count * size(x)) return false;
    if (!has(x)) return true;
    if (rank_of(x) != axes + lengths.size()) return false;
    std::size_t axis = axes;
    for (const std::size_t n : lengths)
      if (fastops::length(x, axis++) != n) return false;
    return true;
  }
};

Samples samples_of(const AnyBuffer& q, std::size_t own) {
  const std::size_t axes = rank_of(q) < own ? 0 : rank_of(q) - own;
  Samples s{axes, own, 1};
  for (std::size_t i = 0; i < axes; ++i) s.count *= length(q, i);
  return s;
}

// (B, H, N, D), or (B, N, H, D) with tokens first; of a step (B, H, D).
struct Sizes {
  std::size_t batch, heads, rows, columns;
};
Sizes sizes_of(const Samples& s, const AnyBuffer& x, bool tokens_first) {
  const std::size_t first = s.length(x, 1), second = s.length(x, 2);
  if (s.own == kStepAxes) return {s.length(x, 0), first, 1, second};
  return {s.length(x, 0), tokens_first ? second : first, tokens_first ? first : second, s.length(x, 3)};
}
bool has_sizes(const Samples& s, const AnyBuffer& x, const Sizes& z, bool tokens_first) {
  if (s.own == kStepAxes) return s.fits(x, {z.batch, z.heads, z.columns});
  return s.fits(x, {z.batch, tokens_first ? z.rows : z.heads, tokens_first ? z.heads : z.rows, z.columns});
}
fastops_heads heads_of(const void* data, const Sizes& z, bool tokens_first) {
  const auto d = static_cast<std::ptrdiff_t>(z.columns), h = static_cast<std::ptrdiff_t>(z.heads);
  const auto n = static_cast<std::ptrdiff_t>(z.rows);
  return {data, h * n * d, tokens_first ? d : n * d, tokens_first ? h * d : d};
}
// (B, H, N), or with one head, or one row, for all.
fastops_heads rows_of(const void* data, std::size_t heads, std::size_t rows) {
  if (data == nullptr) return {};
  const auto h = static_cast<std::ptrdiff_t>(heads), n = static_cast<std::ptrdiff_t>(rows);
  return {data, h * n, h == 1 ? 0 : n, n == 1 ? 0 : 1};
}

// q, k and v that fit each other, and the result of theirs.
struct Operands {
  Samples samples{};
  bool first = false;  // tokens
  int dtype = -1;
  Sizes q{}, k{}, v{}, y{};

  // Answers whether they do.
  bool take(const AnyBuffer& of_q, const AnyBuffer& of_k, const AnyBuffer& of_v, bool step, bool tokens_first) {
    samples = samples_of(of_q, step ? kStepAxes : kAxes);
    first = tokens_first;
    dtype = dtype_of(of_q);
    for (const AnyBuffer* x : {&of_q, &of_k, &of_v})
      if (dtype < 0 || dtype_of(*x) != dtype || rank_of(*x) != samples.axes + samples.own) return false;
    q = sizes_of(samples, of_q, first);
    k = sizes_of(samples, of_k, first);
    v = sizes_of(samples, of_v, first);
    y = {q.batch, q.heads, q.rows, v.columns};
    return like(of_q, q, first) && like(of_k, {q.batch, k.heads, k.rows, q.columns}, first) &&
           like(of_v, {q.batch, k.heads, k.rows, v.columns}, first);
  }
  bool like(const AnyBuffer& x, const Sizes& z, bool tokens_first) const {
    return dtype_of(x) == dtype && has_sizes(samples, x, z, tokens_first);
  }
  // Whether a buffer that may be absent is of the dtype of sums.
  bool is_wide(const AnyBuffer& x) const { return !samples.has(x) || dtype_of(x) == compute_dtype(dtype); }
  bool is_mask(const AnyBuffer& x) const { return !samples.has(x) || x.element_type() == ffi::DataType::PRED; }
  // The sizes in a call for samples of vmap apart, or for all of them as one batch.
  template <class Shape> void set(Shape* shape, bool apart) const {
    shape->dtype = dtype;
    shape->batch = apart ? q.batch : q.batch * samples.count;
    shape->heads_q = q.heads;
    shape->heads_kv = k.heads;
    shape->queries = q.rows;
    shape->keys = k.rows;
    shape->dim = q.columns;
    shape->values = v.columns;
  }
  std::size_t count(bool apart) const { return apart ? samples.count : samples.count == 0 ? 0 : 1; }
  fastops_heads heads(const AnyBuffer& x, std::size_t i, const Sizes& z) const { return heads_of(at(x, i), z, first); }
  void* at(const AnyBuffer& x, std::size_t i) const { return samples.at(x, i, item_size(dtype)); }
  void* wide_at(const AnyBuffer& x, std::size_t i) const { return samples.at(x, i, item_size(compute_dtype(dtype))); }
};

ffi::Error check_decay(const void* data, int dtype, std::size_t n) {
  const auto fine = [&](const auto* logs) {
    for (std::size_t i = 0; i < n; ++i)
      if (!(logs[i] <= 0)) return false;
    return true;
  };
  if (dtype == FASTOPS_F64 ? fine(static_cast<const double*>(data)) : fine(static_cast<const float*>(data)))
    return ffi::Error::Success();
  return invalid("decay must be <= 0 everywhere, the logarithm of a factor, got positive ones or nan");
}

// Offsets of packed sequences of a sample as the C interface takes them, checked.
ffi::Error take_offsets(const Samples& s, const AnyBuffer& x, std::size_t sample, std::size_t total,
                        std::vector<std::int64_t>* own) {
  const bool wide = x.element_type() == ffi::DataType::S64;
  const void* const data = s.at(x, sample, wide ? 8 : 4);
  const std::size_t n = s.size(x);
  own->resize(n);
  for (std::size_t i = 0; i < n; ++i)
    (*own)[i] = wide ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  std::string got;
  if (n == 0) {
    got = "none";
  } else if (own->front() != 0) {
    got = std::to_string(own->front()) + " as the first";
  } else {
    for (std::size_t i = 1; i < n && got.empty(); ++i)
      if ((*own)[i] < (*own)[i - 1]) got = std::to_string((*own)[i]) + " after " + std::to_string((*own)[i - 1]);
    if (got.empty() && own->back() != static_cast<std::int64_t>(total))
      got = std::to_string(own->back()) + " as the last";
  }
  if (got.empty()) return ffi::Error::Success();
  return invalid("cu_seqlens must be offsets that rise from 0 to " + std::to_string(total) + ", got " + got);
}
bool are_offsets(const Samples& s, const AnyBuffer& x) {
  return !s.has(x) || x.element_type() == ffi::DataType::S32 || x.element_type() == ffi::DataType::S64;
}

// What linear attention takes beyond q, k and v.
struct Extras {
  AnyBuffer projection, key_mask, offsets, decay, s, z, m;
};

// A call of linear attention, of each sample of vmap or of all of them as one batch.
class Linear : public Operands {
 public:
  explicit Linear(const Extras& extras) : extras_(extras) {}

  // Of (B, H, D) a step.
  ffi::Error prepare(const LinearNumbers& map, const AnyBuffer& of_q, const AnyBuffer& of_k, const AnyBuffer& of_v,
                     bool step) {
    if (!take(of_q, of_k, of_v, step, map.tokens_first != 0)) return no_fit();
    const Samples& s = samples;
    for (const auto* x : {&extras_.projection, &extras_.decay, &extras_.s, &extras_.z, &extras_.m})
      if (!is_wide(*x)) return no_fit();
    if (!is_mask(extras_.key_mask) || !are_offsets(s, extras_.offsets)) return no_fit();
    const bool projects = s.has(extras_.projection), packed = s.has(extras_.offsets);
    set(&shape_, packed || projects);
    shape_.feature_map = map.feature_map;
    shape_.causal = map.causal;
    shape_.normalize = map.normalize;
    shape_.eps = map.eps;
    shape_.kernel_eps = map.kernel_eps;
    shape_.scale = map.scale;
    shape_.features =
        projects ? s.length(extras_.projection, 0) : q.columns + (map.feature_map == FASTOPS_MAP_COSINE ? 1 : 0);
    sequences_ = packed ? s.size(extras_.offsets) - 1 : q.batch;
    const std::size_t f = shape_.features;
    mask_heads_ = s.has(extras_.key_mask) ? s.length(extras_.key_mask, 1) : 1;
    decay_rows_ = s.has(extras_.decay) && !step ? s.length(extras_.decay, 2) : 1;
    const bool decay_fits =
        step ? s.fits(extras_.decay, {q.batch, k.heads}) : s.fits(extras_.decay, {q.batch, k.heads, decay_rows_});
    if (!s.fits(extras_.projection, {f, q.columns}) || !s.fits(extras_.key_mask, {q.batch, mask_heads_, k.rows}) ||
        (mask_heads_ != 1 && mask_heads_ != k.heads) || !decay_fits || (decay_rows_ != 1 && decay_rows_ != k.rows) ||
        (packed && !s.fits(extras_.offsets, {sequences_ + 1})) ||
        !s.fits(extras_.s, {sequences_, k.heads, f, v.columns}) || !s.fits(extras_.z, {sequences_, k.heads, f}) ||
        !s.fits(extras_.m, {sequences_, k.heads, f}))
      return no_fit();
    if (s.has(extras_.decay)) {
      const ffi::Error error =
          check_decay(extras_.decay.untyped_data(), compute_dtype(dtype), extras_.decay.element_count());
      if (error.failure()) return error;
    }
    calls_ = count(packed || projects);
    return ffi::Error::Success();
  }

  // Sets what differs between calls.
  ffi::Error begin(std::size_t i) {
    shape_.projection = wide_at(extras_.projection, i);
    options_ = {};
    options_.key_mask = rows_of(samples.at(extras_.key_mask, i, 1), mask_heads_, k.rows);
    options_.decay = rows_of(wide_at(extras_.decay, i), k.heads, decay_rows_);
    // A head's decay holds for it alone, also where there is one.
    options_.decay.head = static_cast<std::ptrdiff_t>(decay_rows_);
    options_.sequences = samples.has(extras_.offsets) ? sequences_ : shape_.batch;
    options_.initial_state = {wide_at(extras_.s, i), wide_at(extras_.z, i), wide_at(extras_.m, i)};
    if (!samples.has(extras_.offsets)) return ffi::Error::Success();
    const ffi::Error error = take_offsets(samples, extras_.offsets, i, k.rows, &offsets_);
    options_.offsets = offsets_.data();
    return error;
  }

  bool is_state(const AnyBuffer& x, bool is_s) const {
    const std::size_t h = k.heads, f = shape_.features;
    return dtype_of(x) == compute_dtype(dtype) &&
           (is_s ? samples.fits(x, {sequences_, h, f, v.columns}) : samples.fits(x, {sequences_, h, f}));
  }
  bool has(const AnyBuffer& x) const { return samples.has(x); }
  // No heads: nothing to compute, and nothing that a pointer would point to.
  bool is_empty() const { return shape_.batch * q.heads == 0; }

  const fastops_linear_attention& shape() const { return shape_; }
  fastops_linear_options& options() { return options_; }
  std::size_t calls() const { return calls_; }

 private:
  Extras extras_;
  fastops_linear_attention shape_{};
  fastops_linear_options options_{};
  std::size_t sequences_ = 0, mask_heads_ = 1, decay_rows_ = 1, calls_ = 0;
  std::vector<std::int64_t> offsets_;
};

// The state in results from `first` on.
ffi::Error take_state(const Linear& call, ffi::RemainingRets results, std::size_t first, bool exponents,
                      std::vector<AnyBuffer>* state) {
  const std::size_t parts = exponents ? 3 : 2;
  if (results.size() != first + parts) return no_fit();
  for (std::size_t i = 0; i < parts; ++i) {
    auto part = results.get<AnyBuffer>(first + i);
    if (part.has_error() || !call.is_state(**part, i == 0)) return no_fit();
    state->push_back(**part);
  }
  return ffi::Error::Success();
}

ffi::Error linear_attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer projection, AnyBuffer key_mask,
                            AnyBuffer offsets, AnyBuffer decay, AnyBuffer s, AnyBuffer z, AnyBuffer m, Result y,
                            ffi::RemainingRets rest, LinearNumbers map) {
  Linear call({projection, key_mask, offsets, decay, s, z, m});
  ffi::Error error = call.prepare(map, q, k, v, false);
  if (error.failure()) return error;
  if (!call.like(*y, call.y, call.first)) return no_fit();
  std::vector<AnyBuffer> state;
  const bool exponents = map.feature_map >= FASTOPS_MAP_EXP;
  if (rest.size() != 0 && (error = take_state(call, rest, 0, exponents, &state)).failure()) return error;
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls(); ++i) {
    if ((error = call.begin(i)).failure()) return error;
    if (!state.empty())
      call.options().final_state = {call.wide_at(state[0], i), call.wide_at(state[1], i),
                                    exponents ? call.wide_at(state[2], i) : nullptr};
    const fastops_status status =
        fastops_linear_attention_forward(&call.shape(), call.heads(q, i, call.q), call.heads(k, i, call.k),
                                         call.heads(v, i, call.v), call.heads(*y, i, call.y), &call.options(), kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error linear_attention_step(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer projection, AnyBuffer key_mask,
                                 AnyBuffer offsets, AnyBuffer decay, AnyBuffer s, AnyBuffer z, AnyBuffer m, Result y,
                                 ffi::RemainingRets rest, LinearNumbers map) {
  const bool exponents = map.feature_map >= FASTOPS_MAP_EXP;
  Linear call({projection, key_mask, offsets, decay, s, z, m});
  ffi::Error error = call.prepare(map, q, k, v, true);
  if (error.failure()) return error;
  if (!call.has(s) || !call.has(z) || call.has(m) != exponents || call.has(key_mask) || call.has(offsets))
    return no_fit();
  if (!call.like(*y, call.y, false)) return no_fit();
  std::vector<AnyBuffer> state;
  if ((error = take_state(call, rest, 0, exponents, &state)).failure()) return error;
  const AnyBuffer* before[] = {&s, &z, &m};
  // XLA may give the state's own memory for the one after it.
  for (std::size_t i = 0; i < state.size(); ++i)
    if (state[i].untyped_data() != before[i]->untyped_data() && state[i].size_bytes() > 0)
      std::memcpy(state[i].untyped_data(), before[i]->untyped_data(), state[i].size_bytes());
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls(); ++i) {
    if ((error = call.begin(i)).failure()) return error;
    fastops_linear_options& options = call.options();
    options.initial_state = {};
    options.final_state = {call.wide_at(state[0], i), call.wide_at(state[1], i),
                           exponents ? call.wide_at(state[2], i) : nullptr};
    const fastops_status status =
        fastops_linear_attention_step(&call.shape(), call.heads(q, i, call.q), call.heads(k, i, call.k),
                                      call.heads(v, i, call.v), call.heads(*y, i, call.y), &options);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

// dq, dk and dv have heads first in every layout.
ffi::Error linear_attention_backward(AnyBuffer dy, AnyBuffer ds, AnyBuffer dz, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                                     AnyBuffer y, AnyBuffer projection, AnyBuffer key_mask, AnyBuffer offsets,
                                     AnyBuffer decay, AnyBuffer s, AnyBuffer z, AnyBuffer m, Result dq, Result dk,
                                     Result dv, ffi::RemainingRets rest, LinearNumbers map) {
  Linear call({projection, key_mask, offsets, decay, s, z, m});
  ffi::Error error = call.prepare(map, q, k, v, false);
  if (error.failure()) return error;
  if (!call.like(y, call.y, call.first) || !call.like(dy, call.y, call.first) || !call.like(*dq, call.q, false) ||
      !call.like(*dk, call.k, false) || !call.like(*dv, call.v, false) || call.has(ds) != call.has(dz) ||
      (call.has(ds) && (!call.is_state(ds, true) || !call.is_state(dz, false))))
    return no_fit();
  std::vector<AnyBuffer> initial;
  if (call.has(s) && (error = take_state(call, rest, 0, false, &initial)).failure()) return error;
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls(); ++i) {
    if ((error = call.begin(i)).failure()) return error;
    const fastops_linear_state d_final{call.wide_at(ds, i), call.wide_at(dz, i), nullptr};
    fastops_linear_state d_initial{};
    if (!initial.empty()) d_initial = {call.wide_at(initial[0], i), call.wide_at(initial[1], i), nullptr};
    const fastops_status status = fastops_linear_attention_backward(
        &call.shape(), call.heads(dy, i, call.y), call.heads(q, i, call.q), call.heads(k, i, call.k),
        call.heads(v, i, call.v), call.heads(y, i, call.y), call.at(*dq, i), call.at(*dk, i), call.at(*dv, i),
        &call.options(), &d_final, &d_initial, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error softmax_attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer key_mask, AnyBuffer offsets,
                             AnyBuffer factors, Result y, SoftmaxNumbers numbers) {
  Operands o;
  if (!o.take(q, k, v, false, numbers.tokens_first != 0)) return no_fit();
  const Samples& s = o.samples;
  const std::size_t mask_heads = s.has(key_mask) ? s.length(key_mask, 1) : 1;
  if (!o.like(*y, o.y, o.first) || !s.fits(key_mask, {o.q.batch, mask_heads, o.k.rows}) ||
      (mask_heads != 1 && mask_heads != o.k.heads) || !o.is_mask(key_mask) || !are_offsets(s, offsets) ||
      !s.fits(factors, {o.q.batch, o.q.heads, o.q.rows}) || !o.is_wide(factors))
    return no_fit();
  const bool packed = s.has(offsets);
  fastops_linear_attention shape{};
  o.set(&shape, packed);
  shape.causal = numbers.causal;
  shape.scale = numbers.scale;
  if (shape.batch * o.q.heads == 0) return ffi::Error::Success();
  std::vector<std::int64_t> own;
  for (std::size_t i = 0; i < o.count(packed); ++i) {
    std::size_t sequences = shape.batch;
    if (packed) {
      const ffi::Error error = take_offsets(s, offsets, i, o.k.rows, &own);
      if (error.failure()) return error;
      sequences = own.size() - 1;
    }
    fastops_heads factor = rows_of(o.wide_at(factors, i), o.q.heads, o.q.rows);
    if (s.has(factors)) factor.head = static_cast<std::ptrdiff_t>(o.q.rows);
    const fastops_status status = fastops_softmax_attention(
        &shape, o.heads(q, i, o.q), o.heads(k, i, o.k), o.heads(v, i, o.v), o.heads(*y, i, o.y),
        rows_of(s.at(key_mask, i, 1), mask_heads, o.k.rows), factor, packed ? own.data() : nullptr, sequences, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

// A call of Nystrom attention, of each sample of vmap or of all of them as one batch.
class Nystrom : public Operands {
 public:
  Nystrom(const NystromNumbers& numbers, const AnyBuffer& of_q, const AnyBuffer& of_k, const AnyBuffer& of_v,
          const AnyBuffer& key_mask, const AnyBuffer& taps, const AnyBuffer& q_landmarks, const AnyBuffer& k_landmarks)
      : key_mask_(key_mask), taps_(taps), q_marks_(q_landmarks), k_marks_(k_landmarks) {
    if (!take(of_q, of_k, of_v, false, numbers.tokens_first != 0)) return;
    const Samples& s = samples;
    const std::size_t taps_count = s.has(taps) ? s.length(taps, 1) : 0;
    const auto marks = static_cast<std::size_t>(numbers.landmarks);
    if (numbers.landmarks < 1 || numbers.iterations < 0 || !is_wide(taps) || !is_wide(q_landmarks) ||
        !is_wide(k_landmarks) || !s.fits(key_mask, {q.batch, k.rows}) || !is_mask(key_mask) ||
        !s.fits(taps, {q.heads, taps_count}) || (s.has(taps) && (taps_count % 2 == 0 || q.rows != k.rows)) ||
        s.has(q_landmarks) != s.has(k_landmarks) || !s.fits(q_landmarks, {q.batch, q.heads, marks, q.columns}) ||
        !s.fits(k_landmarks, {q.batch, k.heads, marks, q.columns}))
      return;
    const bool apart = s.has(taps) || numbers.batch_init != 0;
    calls = count(apart);
    set(&shape, apart);
    shape.ridge_solve = numbers.ridge_solve;
    shape.normalize = numbers.normalize;
    shape.batch_init = numbers.batch_init;
    shape.landmarks = marks;
    shape.iterations = static_cast<std::size_t>(numbers.iterations);
    shape.taps = taps_count;
    shape.ridge = numbers.ridge;
    shape.scale = numbers.scale;
    fits_ = true;
  }

  bool fits() const { return fits_; }
  bool is_empty() const { return shape.batch * shape.heads_q == 0; }
  fastops_heads mask(std::size_t i) const {
    const void* data = samples.at(key_mask_, i, 1);
    if (data == nullptr) return {};
    return {data, static_cast<std::ptrdiff_t>(k.rows), 0, 1};
  }
  void* taps(std::size_t i) const { return wide_at(taps_, i); }
  void* q_landmarks(std::size_t i) const { return wide_at(q_marks_, i); }
  void* k_landmarks(std::size_t i) const { return wide_at(k_marks_, i); }
  bool has_taps() const { return samples.has(taps_); }
  bool has_landmarks() const { return samples.has(q_marks_); }

  fastops_nystrom_attention shape{};
  std::size_t calls = 0;

 private:
  AnyBuffer key_mask_, taps_, q_marks_, k_marks_;
  bool fits_ = false;
};

ffi::Error nystrom_attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer key_mask, AnyBuffer taps,
                             AnyBuffer q_landmarks, AnyBuffer k_landmarks, Result y, NystromNumbers numbers) {
  const Nystrom call(numbers, q, k, v, key_mask, taps, q_landmarks, k_landmarks);
  if (!call.fits() || !call.like(*y, call.y, call.first)) return no_fit();
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls; ++i) {
    const fastops_status status =
        fastops_nystrom_attention_forward(&call.shape, call.heads(q, i, call.q), call.heads(k, i, call.k),
                                          call.heads(v, i, call.v), call.heads(*y, i, call.y), call.mask(i),
                                          call.taps(i), call.q_landmarks(i), call.k_landmarks(i), nullptr, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

// dq, dk and dv have heads first in every layout; then the gradients of the taps and of the landmarks that are there.
ffi::Error nystrom_attention_backward(AnyBuffer dy, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer key_mask,
                                      AnyBuffer taps, AnyBuffer q_landmarks, AnyBuffer k_landmarks, Result dq,
                                      Result dk, Result dv, ffi::RemainingRets rest, NystromNumbers numbers) {
  const Nystrom call(numbers, q, k, v, key_mask, taps, q_landmarks, k_landmarks);
  if (!call.fits() || !call.like(dy, call.y, call.first) || !call.like(*dq, call.q, false) ||
      !call.like(*dk, call.k, false) || !call.like(*dv, call.v, false))
    return no_fit();
  std::vector<const AnyBuffer*> of;
  if (call.has_taps()) of.push_back(&taps);
  if (call.has_landmarks()) of.insert(of.end(), {&q_landmarks, &k_landmarks});
  if (rest.size() != of.size()) return no_fit();
  std::vector<AnyBuffer> more;
  for (std::size_t i = 0; i < of.size(); ++i) {
    auto part = rest.get<AnyBuffer>(i);
    if (part.has_error() || (*part)->size_bytes() != of[i]->size_bytes()) return no_fit();
    more.push_back(**part);
    if ((*part)->size_bytes() > 0) std::memset((*part)->untyped_data(), 0, (*part)->size_bytes());
  }
  if (call.is_empty()) return ffi::Error::Success();
  const std::size_t marks = call.has_taps() ? 1 : 0;
  for (std::size_t i = 0; i < call.calls; ++i) {
    void* const d_taps = call.has_taps() ? call.wide_at(more[0], i) : nullptr;
    void* const d_q = call.has_landmarks() ? call.wide_at(more[marks], i) : nullptr;
    void* const d_k = call.has_landmarks() ? call.wide_at(more[marks + 1], i) : nullptr;
    const fastops_status status = fastops_nystrom_attention_backward(
        &call.shape, call.heads(dy, i, call.y), call.heads(q, i, call.q), call.heads(k, i, call.k),
        call.heads(v, i, call.v), call.at(*dq, i), call.at(*dk, i), call.at(*dv, i), call.mask(i), call.taps(i), d_taps,
        call.q_landmarks(i), call.k_landmarks(i), d_q, d_k, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastops

using namespace fastops;

#define FASTOPS_HANDLER(name) XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_##name, guarded<name>, binding_of(&name))
FASTOPS_HANDLER(linear_attention);
FASTOPS_HANDLER(linear_attention_step);
FASTOPS_HANDLER(linear_attention_backward);
FASTOPS_HANDLER(softmax_attention);
FASTOPS_HANDLER(nystrom_attention);
FASTOPS_HANDLER(nystrom_attention_backward);
#undef FASTOPS_HANDLER
