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
  std::size_t axes, count;

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
  Samples s{axes, 1};
  for (std::size_t i = 0; i < axes; ++i) s.count *= length(q, i);
  return s;
}

// (B, H, N, D), or (B, N, H, D) with tokens first.
struct Sizes {
  std::size_t batch, heads, rows, columns;
};
Sizes sizes_of(const Samples& s, const AnyBuffer& x, bool tokens_first) {
  const std::size_t first = s.length(x, 1), second = s.length(x, 2);
  return {s.length(x, 0), tokens_first ? second : first, tokens_first ? first : second, s.length(x, 3)};
}
bool has_sizes(const Samples& s, const AnyBuffer& x, const Sizes& z, bool tokens_first) {
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

bool all_of(int dtype, std::initializer_list<const AnyBuffer*> buffers) {
  for (const AnyBuffer* x : buffers)
    if (dtype_of(*x) != dtype) return false;
  return dtype >= 0;
}

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

// Offsets of packed sequences as the C interface takes them, checked.
ffi::Error take_offsets(const void* data, bool wide, std::size_t n, std::size_t total, std::vector<std::int64_t>* own) {
  own->resize(n);
  for (std::size_t i = 0; i < n; ++i)
    (*own)[i] = wide ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  bool fine = n > 0 && own->front() == 0 && own->back() == static_cast<std::int64_t>(total);
  for (std::size_t i = 1; i < n; ++i) fine = fine && (*own)[i] >= (*own)[i - 1];
  if (fine) return ffi::Error::Success();
  return invalid("cu_seqlens must be offsets that rise from 0 to " + std::to_string(total) + ", got others");
}
bool are_offsets(const Samples& s, const AnyBuffer& x) {
  return !s.has(x) || x.element_type() == ffi::DataType::S32 || x.element_type() == ffi::DataType::S64;
}

// What linear attention takes beyond q, k and v.
struct Extras {
  AnyBuffer projection, key_mask, offsets, decay, s, z, m;
};

// A call of linear attention, of each sample of vmap or of all of them as one batch.
class Linear {
 public:
  // Of (B, H, D) a step.
  Linear(const LinearNumbers& map, const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v, const Extras& extras,
         bool step)
      : map_(map),
        q_(q),
        k_(k),
        v_(v),
        extras_(extras),
        step_(step),
        samples_(samples_of(q, step ? kStepAxes : kAxes)) {}

  ffi::Error prepare() {
    const Samples& s = samples_;
    const std::size_t rank = s.axes + (step_ ? kStepAxes : kAxes);
    dtype_ = dtype_of(q_);
    if (!all_of(dtype_, {&q_, &k_, &v_}) || rank_of(q_) != rank || rank_of(k_) != rank || rank_of(v_) != rank)
      return no_fit();
    for (const auto* x : {&extras_.projection, &extras_.decay, &extras_.s, &extras_.z, &extras_.m})
      if (s.has(*x) && dtype_of(*x) != compute_dtype(dtype_)) return no_fit();
    if ((s.has(extras_.key_mask) && extras_.key_mask.element_type() != ffi::DataType::PRED) ||
        !are_offsets(s, extras_.offsets))
      return no_fit();
    q_sizes_ = sizes(q_);
    k_sizes_ = sizes(k_);
    v_sizes_ = sizes(v_);
    const Sizes &q = q_sizes_, &k = k_sizes_, &v = v_sizes_;
    if (!fits(q_, q) || !fits(k_, {q.batch, k.heads, k.rows, q.columns}) ||
        !fits(v_, {q.batch, k.heads, k.rows, v.columns}))
      return no_fit();

    shape_ = {};
    shape_.feature_map = map_.feature_map;
    shape_.causal = map_.causal;
    shape_.normalize = map_.normalize;
    shape_.dtype = dtype_;
    shape_.heads_q = q.heads;
    shape_.heads_kv = k.heads;
    shape_.queries = q.rows;
    shape_.keys = k.rows;
    shape_.dim = q.columns;
    shape_.values = v.columns;
    shape_.eps = map_.eps;
    shape_.kernel_eps = map_.kernel_eps;
    shape_.scale = map_.scale;
    const bool projects = s.has(extras_.projection);
    shape_.features =
        projects ? s.length(extras_.projection, 0) : q.columns + (map_.feature_map == FASTOPS_MAP_COSINE ? 1 : 0);
    const bool packed = s.has(extras_.offsets);
    sequences_ = packed ? s.size(extras_.offsets) - 1 : q.batch;
    const std::size_t f = shape_.features;
    mask_heads_ = s.has(extras_.key_mask) ? s.length(extras_.key_mask, 1) : 1;
    decay_rows_ = s.has(extras_.decay) && !step_ ? s.length(extras_.decay, 2) : 1;
    const bool decay_fits =
        step_ ? s.fits(extras_.decay, {q.batch, k.heads}) : s.fits(extras_.decay, {q.batch, k.heads, decay_rows_});
    if (!s.fits(extras_.projection, {f, q.columns}) || !s.fits(extras_.key_mask, {q.batch, mask_heads_, k.rows}) ||
        (mask_heads_ != 1 && mask_heads_ != k.heads) || !decay_fits || (decay_rows_ != 1 && decay_rows_ != k.rows) ||
        (packed && !s.fits(extras_.offsets, {sequences_ + 1})) ||
        !s.fits(extras_.s, {sequences_, k.heads, f, v.columns}) || !s.fits(extras_.z, {sequences_, k.heads, f}) ||
        !s.fits(extras_.m, {sequences_, k.heads, f}))
      return no_fit();
    if (s.has(extras_.decay)) {
      const ffi::Error error =
          check_decay(extras_.decay.untyped_data(), compute_dtype(dtype_), extras_.decay.element_count());
      if (error.failure()) return error;
    }
    calls_ = packed || projects ? s.count : s.count == 0 ? 0 : 1;
    batch_ = packed || projects ? q.batch : q.batch * s.count;
    shape_.batch = batch_;
    return ffi::Error::Success();
  }

  // Sets what differs between calls.
  ffi::Error begin(std::size_t i) {
    shape_.projection = samples_.at(extras_.projection, i, wide());
    options_ = {};
    options_.key_mask = rows_of(samples_.at(extras_.key_mask, i, 1), mask_heads_, k_sizes_.rows);
    options_.decay = rows_of(samples_.at(extras_.decay, i, wide()), k_sizes_.heads, decay_rows_);
    // A head's decay holds for it alone, also where there is one.
    options_.decay.head = static_cast<std::ptrdiff_t>(decay_rows_);
    options_.sequences = samples_.has(extras_.offsets) ? sequences_ : batch_;
    options_.initial_state = {samples_.at(extras_.s, i, wide()), samples_.at(extras_.z, i, wide()),
                              samples_.at(extras_.m, i, wide())};
    if (!samples_.has(extras_.offsets)) return ffi::Error::Success();
    const bool is_wide = extras_.offsets.element_type() == ffi::DataType::S64;
    const ffi::Error error = take_offsets(samples_.at(extras_.offsets, i, is_wide ? 8 : 4), is_wide, sequences_ + 1,
                                          k_sizes_.rows, &offsets_);
    options_.offsets = offsets_.data();
    return error;
  }

  // Whether a buffer is like q, k or v, or of the rows of q and the columns of v.
  bool like(const AnyBuffer& x, const Sizes& z, bool tokens_first) const {
    return dtype_of(x) == dtype_ &&
           (step_ ? samples_.fits(x, {z.batch, z.heads, z.columns}) : has_sizes(samples_, x, z, tokens_first));
  }
  Sizes result_sizes() const { return {q_sizes_.batch, q_sizes_.heads, q_sizes_.rows, v_sizes_.columns}; }
  bool is_state(const AnyBuffer& x, bool is_s) const {
    const std::size_t h = k_sizes_.heads, f = shape_.features;
    return dtype_of(x) == compute_dtype(dtype_) &&
           (is_s ? samples_.fits(x, {sequences_, h, f, v_sizes_.columns}) : samples_.fits(x, {sequences_, h, f}));
  }
  fastops_heads heads(const AnyBuffer& x, std::size_t i, const Sizes& z) const {
    return heads_of(samples_.at(x, i, item_size(dtype_)), z, map_.tokens_first != 0);
  }
  void* at(const AnyBuffer& x, std::size_t i) const { return samples_.at(x, i, item_size(dtype_)); }
  void* wide_at(const AnyBuffer& x, std::size_t i) const { return samples_.at(x, i, wide()); }
  bool has(const AnyBuffer& x) const { return samples_.has(x); }
  std::size_t wide() const { return item_size(compute_dtype(dtype_)); }
  // No heads: nothing to compute, and nothing that a pointer would point to.
  bool is_empty() const { return batch_ * q_sizes_.heads == 0; }

  const fastops_linear_attention& shape() const { return shape_; }
  fastops_linear_options& options() { return options_; }
  const Sizes& q() const { return q_sizes_; }
  const Sizes& k() const { return k_sizes_; }
  const Sizes& v() const { return v_sizes_; }
  std::size_t calls() const { return calls_; }
  bool tokens_first() const { return map_.tokens_first != 0; }

 private:
  Sizes sizes(const AnyBuffer& x) const {
    if (step_) return {samples_.length(x, 0), samples_.length(x, 1), 1, samples_.length(x, 2)};
    return sizes_of(samples_, x, tokens_first());
  }
  bool fits(const AnyBuffer& x, const Sizes& z) const { return like(x, z, tokens_first()); }

  LinearNumbers map_;
  AnyBuffer q_, k_, v_;
  Extras extras_;
  bool step_;
  Samples samples_;
  int dtype_ = -1;
  Sizes q_sizes_{}, k_sizes_{}, v_sizes_{};
  fastops_linear_attention shape_{};
  fastops_linear_options options_{};
  std::size_t sequences_ = 0, mask_heads_ = 1, decay_rows_ = 1, calls_ = 0, batch_ = 0;
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
  Linear call(map, q, k, v, {projection, key_mask, offsets, decay, s, z, m}, false);
  ffi::Error error = call.prepare();
  if (error.failure()) return error;
  if (!call.like(*y, call.result_sizes(), call.tokens_first())) return no_fit();
  std::vector<AnyBuffer> state;
  const bool exponents = map.feature_map >= FASTOPS_MAP_EXP;
  if (rest.size() != 0 && (error = take_state(call, rest, 0, exponents, &state)).failure()) return error;
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls(); ++i) {
    if ((error = call.begin(i)).failure()) return error;
    if (!state.empty())
      call.options().final_state = {call.wide_at(state[0], i), call.wide_at(state[1], i),
                                    exponents ? call.wide_at(state[2], i) : nullptr};
    const fastops_status status = fastops_linear_attention_forward(
        &call.shape(), call.heads(q, i, call.q()), call.heads(k, i, call.k()), call.heads(v, i, call.v()),
        call.heads(*y, i, call.result_sizes()), &call.options(), kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error linear_attention_step(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer projection, AnyBuffer key_mask,
                                 AnyBuffer offsets, AnyBuffer decay, AnyBuffer s, AnyBuffer z, AnyBuffer m, Result y,
                                 ffi::RemainingRets rest, LinearNumbers map) {
  const bool exponents = map.feature_map >= FASTOPS_MAP_EXP;
  Linear call(map, q, k, v, {projection, key_mask, offsets, decay, s, z, m}, true);
  if (!call.has(s) || !call.has(z) || call.has(m) != exponents || call.has(key_mask) || call.has(offsets))
    return no_fit();
  ffi::Error error = call.prepare();
  if (error.failure()) return error;
  if (!call.like(*y, call.result_sizes(), false)) return no_fit();
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
        fastops_linear_attention_step(&call.shape(), call.heads(q, i, call.q()), call.heads(k, i, call.k()),
                                      call.heads(v, i, call.v()), call.heads(*y, i, call.result_sizes()), &options);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

// dq, dk and dv have heads first in every layout.
ffi::Error linear_attention_backward(AnyBuffer dy, AnyBuffer ds, AnyBuffer dz, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                                     AnyBuffer y, AnyBuffer projection, AnyBuffer key_mask, AnyBuffer offsets,
                                     AnyBuffer decay, AnyBuffer s, AnyBuffer z, AnyBuffer m, Result dq, Result dk,
                                     Result dv, ffi::RemainingRets rest, LinearNumbers map) {
  Linear call(map, q, k, v, {projection, key_mask, offsets, decay, s, z, m}, false);
  ffi::Error error = call.prepare();
  if (error.failure()) return error;
  const bool first = call.tokens_first();
  if (!call.like(y, call.result_sizes(), first) || !call.like(dy, call.result_sizes(), first) ||
      !call.like(*dq, call.q(), false) || !call.like(*dk, call.k(), false) || !call.like(*dv, call.v(), false) ||
      call.has(ds) != call.has(dz) || (call.has(ds) && (!call.is_state(ds, true) || !call.is_state(dz, false))))
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
        &call.shape(), call.heads(dy, i, call.result_sizes()), call.heads(q, i, call.q()), call.heads(k, i, call.k()),
        call.heads(v, i, call.v()), call.heads(y, i, call.result_sizes()), call.at(*dq, i), call.at(*dk, i),
        call.at(*dv, i), &call.options(), &d_final, &d_initial, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error softmax_attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer key_mask, AnyBuffer offsets,
                             AnyBuffer factors, Result y, SoftmaxNumbers numbers) {
  const Samples s = samples_of(q, kAxes);
  const int dtype = dtype_of(q);
  const bool first = numbers.tokens_first != 0;
  if (!all_of(dtype, {&q, &k, &v, &*y}) || rank_of(q) != s.axes + kAxes || rank_of(k) != s.axes + kAxes ||
      rank_of(v) != s.axes + kAxes)
    return no_fit();
  const Sizes qs = sizes_of(s, q, first), ks = sizes_of(s, k, first), vs = sizes_of(s, v, first);
  const Sizes ys{qs.batch, qs.heads, qs.rows, vs.columns};
  const std::size_t mask_heads = s.has(key_mask) ? s.length(key_mask, 1) : 1;
  if (!has_sizes(s, q, qs, first) || !has_sizes(s, k, {qs.batch, ks.heads, ks.rows, qs.columns}, first) ||
      !has_sizes(s, v, {qs.batch, ks.heads, ks.rows, vs.columns}, first) || !has_sizes(s, *y, ys, first) ||
      !s.fits(key_mask, {qs.batch, mask_heads, ks.rows}) || (mask_heads != 1 && mask_heads != ks.heads) ||
      (s.has(key_mask) && key_mask.element_type() != ffi::DataType::PRED) || !are_offsets(s, offsets) ||
      !s.fits(factors, {qs.batch, qs.heads, qs.rows}) || (s.has(factors) && dtype_of(factors) != compute_dtype(dtype)))
    return no_fit();
  const bool packed = s.has(offsets);
  const std::size_t calls = packed ? s.count : s.count == 0 ? 0 : 1, item = item_size(dtype);
  fastops_linear_attention shape{};
  shape.causal = numbers.causal;
  shape.scale = numbers.scale;
  shape.dtype = dtype;
  shape.batch = packed ? qs.batch : qs.batch * s.count;
  shape.heads_q = qs.heads;
  shape.heads_kv = ks.heads;
  shape.queries = qs.rows;
  shape.keys = ks.rows;
  shape.dim = qs.columns;
  shape.values = vs.columns;
  if (shape.batch * qs.heads == 0) return ffi::Error::Success();
  std::vector<std::int64_t> own;
  for (std::size_t i = 0; i < calls; ++i) {
    std::size_t sequences = shape.batch;
    if (packed) {
      const bool wide = offsets.element_type() == ffi::DataType::S64;
      const ffi::Error error = take_offsets(s.at(offsets, i, wide ? 8 : 4), wide, s.size(offsets), ks.rows, &own);
      if (error.failure()) return error;
      sequences = own.size() - 1;
    }
    fastops_heads factor = rows_of(s.at(factors, i, item_size(compute_dtype(dtype))), qs.heads, qs.rows);
    if (s.has(factors)) factor.head = static_cast<std::ptrdiff_t>(qs.rows);
    const fastops_status status = fastops_softmax_attention(
        &shape, heads_of(s.at(q, i, item), qs, first), heads_of(s.at(k, i, item), ks, first),
        heads_of(s.at(v, i, item), vs, first), heads_of(s.at(*y, i, item), ys, first),
        rows_of(s.at(key_mask, i, 1), mask_heads, ks.rows), factor, packed ? own.data() : nullptr, sequences, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

// A call of Nystrom attention, of each sample of vmap or of all of them as one batch.
class Nystrom {
 public:
  Nystrom(const NystromNumbers& numbers, const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v,
          const AnyBuffer& key_mask, const AnyBuffer& taps, const AnyBuffer& q_landmarks, const AnyBuffer& k_landmarks)
      : key_mask_(key_mask),
        taps_(taps),
        q_marks_(q_landmarks),
        k_marks_(k_landmarks),
        samples_(samples_of(q, kAxes)),
        first_(numbers.tokens_first != 0),
        dtype_(dtype_of(q)) {
    const Samples& s = samples_;
    const std::size_t rank = s.axes + kAxes;
    if (!all_of(dtype_, {&q, &k, &v}) || rank_of(q) != rank || rank_of(k) != rank || rank_of(v) != rank) return;
    q_sizes = sizes_of(s, q, first_);
    k_sizes = sizes_of(s, k, first_);
    v_sizes = sizes_of(s, v, first_);
    const Sizes &qs = q_sizes, &ks = k_sizes, &vs = v_sizes;
    y_sizes = {qs.batch, qs.heads, qs.rows, vs.columns};
    for (const auto* x : {&taps, &q_landmarks, &k_landmarks})
      if (s.has(*x) && dtype_of(*x) != compute_dtype(dtype_)) return;
    const std::size_t taps_count = s.has(taps) ? s.length(taps, 1) : 0;
    const auto marks = static_cast<std::size_t>(numbers.landmarks);
    if (numbers.landmarks < 1 || numbers.iterations < 0 || !has_sizes(s, q, qs, first_) ||
        !has_sizes(s, k, {qs.batch, ks.heads, ks.rows, qs.columns}, first_) ||
        !has_sizes(s, v, {qs.batch, ks.heads, ks.rows, vs.columns}, first_) || !s.fits(key_mask, {qs.batch, ks.rows}) ||
        (s.has(key_mask) && key_mask.element_type() != ffi::DataType::PRED) || !s.fits(taps, {qs.heads, taps_count}) ||
        (s.has(taps) && (taps_count % 2 == 0 || qs.rows != ks.rows)) || s.has(q_landmarks) != s.has(k_landmarks) ||
        !s.fits(q_landmarks, {qs.batch, qs.heads, marks, qs.columns}) ||
        !s.fits(k_landmarks, {qs.batch, ks.heads, marks, qs.columns}))
      return;
    const bool apart = s.has(taps) || numbers.batch_init != 0;
    calls = apart ? s.count : s.count == 0 ? 0 : 1;
    shape.dtype = dtype_;
    shape.ridge_solve = numbers.ridge_solve;
    shape.normalize = numbers.normalize;
    shape.batch_init = numbers.batch_init;
    shape.batch = apart ? qs.batch : qs.batch * s.count;
    shape.heads_q = qs.heads;
    shape.heads_kv = ks.heads;
    shape.queries = qs.rows;
    shape.keys = ks.rows;
    shape.dim = qs.columns;
    shape.values = vs.columns;
    shape.landmarks = marks;
    shape.iterations = static_cast<std::size_t>(numbers.iterations);
    shape.taps = taps_count;
    shape.ridge = numbers.ridge;
    shape.scale = numbers.scale;
    fits_ = true;
  }

  bool fits() const { return fits_; }
  bool is_empty() const { return shape.batch * shape.heads_q == 0; }
  bool like(const AnyBuffer& x, const Sizes& z, bool tokens_first) const {
    return dtype_of(x) == dtype_ && has_sizes(samples_, x, z, tokens_first);
  }
  bool tokens_first() const { return first_; }
  fastops_heads heads(const AnyBuffer& x, std::size_t i, const Sizes& z) const { return heads_of(at(x, i), z, first_); }
  void* at(const AnyBuffer& x, std::size_t i) const { return samples_.at(x, i, item_size(dtype_)); }
  void* wide_at(const AnyBuffer& x, std::size_t i) const { return samples_.at(x, i, item_size(compute_dtype(dtype_))); }
  fastops_heads mask(std::size_t i) const {
    const void* data = samples_.at(key_mask_, i, 1);
    if (data == nullptr) return {};
    return {data, static_cast<std::ptrdiff_t>(k_sizes.rows), 0, 1};
  }
  void* taps(std::size_t i) const { return wide_at(taps_, i); }
  void* q_landmarks(std::size_t i) const { return wide_at(q_marks_, i); }
  void* k_landmarks(std::size_t i) const { return wide_at(k_marks_, i); }
  bool has_taps() const { return samples_.has(taps_); }
  bool has_landmarks() const { return samples_.has(q_marks_); }

  fastops_nystrom_attention shape{};
  Sizes q_sizes{}, k_sizes{}, v_sizes{}, y_sizes{};
  std::size_t calls = 0;

 private:
  AnyBuffer key_mask_, taps_, q_marks_, k_marks_;
  Samples samples_;
  bool first_, fits_ = false;
  int dtype_;
};

ffi::Error nystrom_attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer key_mask, AnyBuffer taps,
                             AnyBuffer q_landmarks, AnyBuffer k_landmarks, Result y, NystromNumbers numbers) {
  const Nystrom call(numbers, q, k, v, key_mask, taps, q_landmarks, k_landmarks);
  if (!call.fits() || !call.like(*y, call.y_sizes, call.tokens_first())) return no_fit();
  if (call.is_empty()) return ffi::Error::Success();
  for (std::size_t i = 0; i < call.calls; ++i) {
    const fastops_status status =
        fastops_nystrom_attention_forward(&call.shape, call.heads(q, i, call.q_sizes), call.heads(k, i, call.k_sizes),
                                          call.heads(v, i, call.v_sizes), call.heads(*y, i, call.y_sizes), call.mask(i),
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
  if (!call.fits() || !call.like(dy, call.y_sizes, call.tokens_first()) || !call.like(*dq, call.q_sizes, false) ||
      !call.like(*dk, call.k_sizes, false) || !call.like(*dv, call.v_sizes, false))
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
        &call.shape, call.heads(dy, i, call.y_sizes), call.heads(q, i, call.q_sizes), call.heads(k, i, call.k_sizes),
        call.heads(v, i, call.v_sizes), call.at(*dq, i), call.at(*dk, i), call.at(*dv, i), call.mask(i), call.taps(i),
        d_taps, call.q_landmarks(i), call.k_landmarks(i), d_q, d_k, kNoPoll);
    if (status != FASTOPS_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastops

using namespace fastops;

XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_linear_attention, guarded<linear_attention>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .RemainingRets()
                                  .Attrs<LinearNumbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_linear_attention_step, guarded<linear_attention_step>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .RemainingRets()
                                  .Attrs<LinearNumbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_linear_attention_backward, guarded<linear_attention_backward>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .RemainingRets()
                                  .Attrs<LinearNumbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_softmax_attention, guarded<softmax_attention>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attrs<SoftmaxNumbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_nystrom_attention, guarded<nystrom_attention>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attrs<NystromNumbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastops_jax_nystrom_attention_backward, guarded<nystrom_attention_backward>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .RemainingRets()
                                  .Attrs<NystromNumbers>());
