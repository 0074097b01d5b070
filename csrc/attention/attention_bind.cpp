// SPDX-License-Identifier: BSD-3-Clause
// Attention for Python: arrays to pointers, the GIL released, one call.
#include "attention/attention_bind.h"

#include <array>
#include <string>

#include "core/numpy_arrays.h"
#include "core/python_call.h"
#include "core/tensor_exchange.h"
#include "fastops/fastops.h"

namespace fastops {
namespace {

constexpr std::array<const char*, 8> kMaps = {"elu", "relu", "relu2", "identity", "cosine", "exp", "favor", "softmax"};

fastops_dtype compute_dtype(fastops_dtype dtype) { return dtype == FASTOPS_F64 ? FASTOPS_F64 : FASTOPS_F32; }

// (batch, heads, rows, columns), or (batch, heads, columns) as rows of one.
struct Tensor {
  ArrayView view;
  fastops_heads heads;
  std::size_t batch, head, rows, columns;
};
Tensor tensor(const py::object& object, const char* name, bool writable = false) {
  Tensor t{fastops::view(object, name, writable), {}, 0, 0, 1, 0};
  const ArrayView& v = t.view;
  if (v.ndim() != 3 && v.ndim() != 4) bad_value(std::string(name) + " must have three or four axes");
  want_float(v, name);
  const bool has_rows = v.ndim() == 4;
  const std::size_t last = v.ndim() - 1;
  bool empty = false;
  for (const py::ssize_t n : v.shape) empty |= n == 0;
  if (!empty && v.shape[last] > 1 && v.strides[last] != 1)
    bad_value(std::string(name) + " must have a contiguous last axis");
  t.batch = static_cast<std::size_t>(v.shape[0]);
  t.head = static_cast<std::size_t>(v.shape[1]);
  if (has_rows) t.rows = static_cast<std::size_t>(v.shape[2]);
  t.columns = static_cast<std::size_t>(v.shape[last]);
  t.heads = {v.data, v.strides[0], v.strides[1], has_rows ? v.strides[2] : 0};
  return t;
}

// LinearOptions of fastops/_attention.py, a named tuple.
void set_options(const py::tuple& options, fastops_linear_attention* s, py::object* projection) {
  if (options.size() != 7) bad_value("options must have seven fields");
  s->feature_map = -1;
  for (std::size_t i = 0; i < kMaps.size(); ++i)
    if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(options.ptr(), 0), kMaps[i]) == 0)
      s->feature_map = static_cast<std::int32_t>(i);
  if (s->feature_map < 0) bad_value("feature_map is unknown");
  s->causal = options[1].cast<bool>();
  s->normalize = options[2].cast<bool>();
  s->eps = options[3].cast<double>();
  s->kernel_eps = options[4].cast<double>();
  s->scale = options[5].cast<double>();
  *projection = options[6];
}

fastops_linear_attention shape_of(const py::tuple& options, const Tensor& q, const Tensor& k, const Tensor& v,
                                  py::object* projection) {
  fastops_linear_attention s{};
  set_options(options, &s, projection);
  s.dtype = q.view.dtype;
  s.batch = q.batch;
  s.heads_q = q.head;
  s.heads_kv = k.head;
  s.queries = q.rows;
  s.keys = k.rows;
  s.dim = q.columns;
  s.values = v.columns;
  s.features = s.dim + (s.feature_map == FASTOPS_MAP_COSINE ? 1 : 0);
  if (s.feature_map == FASTOPS_MAP_FAVOR) {
    const ArrayView w = view(*projection, "projection");
    want_dtype(w, compute_dtype(q.view.dtype), "projection");
    want_contiguous(w, "projection");
    if (w.ndim() != 2 || static_cast<std::size_t>(w.shape[1]) != s.dim) bad_value("projection must have shape (m, D)");
    s.features = static_cast<std::size_t>(w.shape[0]);
    s.projection = w.data;
  }
  return s;
}

void want_fit(const Tensor& q, const Tensor& k, const Tensor& v) {
  want_dtype(k.view, q.view.dtype, "k");
  want_dtype(v.view, q.view.dtype, "v");
  if (k.batch != q.batch || v.batch != q.batch || v.head != k.head || v.rows != k.rows || k.columns != q.columns)
    bad_value("q, k and v have shapes that do not fit each other");
  if (k.head == 0 ? q.head != 0 : q.head % k.head != 0) bad_value("the heads of k must divide those of q");
}
void want_rows(const Tensor& t, const Tensor& like, std::size_t columns, fastops_dtype dtype, const char* name) {
  want_dtype(t.view, dtype, name);
  if (t.batch != like.batch || t.head != like.head || t.rows != like.rows || t.columns != columns)
    bad_value(std::string(name) + " has a shape that does not fit the others");
}

// A mask, decay or factor of (batch, heads, tokens), or (batch, heads) of a step.
fastops_heads per_token(const py::object& object, const char* name, const Tensor& like, bool boolean) {
  if (object.is_none()) return {};
  ArrayView v;
  if (boolean) {
    const auto array = object.cast<py::array>();
    if (array.dtype().kind() != 'b') throw py::type_error(std::string(name) + " must be of dtype bool");
    v = view(array.attr("view")("uint8"), name);
  } else {
    v = view(object, name);
    want_dtype(v, compute_dtype(like.view.dtype), name);
  }
  const bool step = like.view.ndim() == 3;
  std::vector<py::ssize_t> shape(like.view.shape.begin(), like.view.shape.end() - 1);
  want_shape(v, shape, name);
  return {v.data, v.strides[0], v.strides[1], step ? 0 : v.strides[2]};
}

fastops_linear_state state_of(const py::object& object, const fastops_linear_attention& s, std::size_t sequences,
                              const char* name, bool writable, bool gradient = false) {
  if (object.is_none()) return {};
  const auto parts = object.cast<py::tuple>();
  const bool exponents = s.feature_map >= FASTOPS_MAP_EXP && !gradient;
  if (parts.size() != (exponents ? 3 : 2)) bad_value(std::string(name) + " has a wrong number of arrays");
  const auto size = [](std::size_t n) { return static_cast<py::ssize_t>(n); };
  void* data[3] = {};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const ArrayView v = view(parts[i], name, writable);
    want_dtype(v, compute_dtype(static_cast<fastops_dtype>(s.dtype)), name);
    want_contiguous(v, name);
    std::vector<py::ssize_t> shape = {size(sequences), size(s.heads_kv), size(s.features)};
    if (i == 0) shape.push_back(size(s.values));
    want_shape(v, shape, name);
    data[i] = v.data;
  }
  return {data[0], data[1], data[2]};
}

std::size_t take_offsets(const py::object& object, const fastops_linear_attention& s, const std::int64_t** offsets) {
  if (object.is_none()) return s.batch;
  const ArrayView v = view(object, "offsets");
  if (v.dtype != FASTOPS_I64 || v.ndim() != 1 || v.shape[0] < 1) bad_value("offsets must be int64 of one axis");
  want_contiguous(v, "offsets");
  *offsets = reinterpret_cast<const std::int64_t*>(v.data);
  return static_cast<std::size_t>(v.shape[0]) - 1;
}

void linear_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                      const py::tuple& options, const py::object& key_mask, const py::object& offsets,
                      const py::object& decay, const py::object& state, const py::object& state_out) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v"), to = tensor(out, "out", true);
  want_fit(tq, tk, tv);
  want_rows(to, tq, tv.columns, tq.view.dtype, "out");
  py::object projection;
  const fastops_linear_attention s = shape_of(options, tq, tk, tv, &projection);
  fastops_linear_options o{};
  o.sequences = take_offsets(offsets, s, &o.offsets);
  o.key_mask = per_token(key_mask, "key_mask", tk, true);
  o.decay = per_token(decay, "decay", tk, false);
  o.initial_state = state_of(state, s, o.sequences, "state", false);
  o.final_state = state_of(state_out, s, o.sequences, "state_out", true);
  call([&](fastops_poll poll) {
    return fastops_linear_attention_forward(&s, tq.heads, tk.heads, tv.heads, to.heads, &o, poll);
  });
}

void linear_attention_step(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                           const py::tuple& options, const py::object& decay, const py::object& state) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v"), to = tensor(out, "out", true);
  if (tq.view.ndim() != 3) bad_value("q must have three axes");
  want_fit(tq, tk, tv);
  want_rows(to, tq, tv.columns, tq.view.dtype, "out");
  py::object projection;
  const fastops_linear_attention s = shape_of(options, tq, tk, tv, &projection);
  fastops_linear_options o{};
  o.decay = per_token(decay, "decay", tk, false);
  o.final_state = state_of(state, s, s.batch, "state", true);
  call_briefly([&] { return fastops_linear_attention_step(&s, tq.heads, tk.heads, tv.heads, to.heads, &o); });
}

// What a step needs of NumPy: its array type and the two dtypes, which live as long as the process.
struct Numpy {
  PyObject *array, *float32, *float64;

  static const Numpy& get() {
    static const Numpy numpy{reinterpret_cast<PyObject*>(py::detail::npy_api::get().PyArray_Type_),
                             py::dtype::of<float>().release().ptr(), py::dtype::of<double>().release().ptr()};
    return numpy;
  }
};

// An array or a tensor of another library, dense and of more than one element, as decoding has them.
struct Plain {
  char* data = nullptr;
  const std::int64_t* shape = nullptr;
  int ndim = 0;
  fastops_dtype dtype{};
  bool writable = false;

  std::size_t size(int axis) const { return static_cast<std::size_t>(shape[axis]); }
  std::size_t bytes() const {
    std::size_t n = dtype == FASTOPS_F64 ? 8 : 4;
    for (int axis = 0; axis < ndim; ++axis) n *= size(axis);
    return n;
  }
  bool touches(const Plain& other) const { return data < other.data + other.bytes() && other.data < data + bytes(); }
};
// False for what is neither an exact ndarray nor a tensor with `functions`, or not of float32 or float64.
bool read_plain(PyObject* object, const DlExchange* functions, PyTypeObject* type, Plain* plain) {
  if (Py_TYPE(object) != type) return false;
  if (functions != nullptr) {
    DlTensor t;
    if (!dense_view(*functions, object, &t, &plain->dtype)) return false;
    plain->data = static_cast<char*>(t.data);
    plain->shape = t.shape;
    plain->ndim = t.ndim;
    plain->writable = true;
  } else {
    static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t));
    constexpr int kContiguous = 0x0001, kAligned = 0x0100, kWriteable = 0x0400;
    const auto* const a = py::detail::array_proxy(object);
    if ((a->flags & (kContiguous | kAligned)) != (kContiguous | kAligned)) return false;
    if (a->descr != Numpy::get().float32 && a->descr != Numpy::get().float64) return false;
    plain->dtype = a->descr == Numpy::get().float64 ? FASTOPS_F64 : FASTOPS_F32;
    plain->data = a->data;
    plain->shape = reinterpret_cast<const std::int64_t*>(a->dimensions);
    plain->ndim = a->nd;
    plain->writable = (a->flags & kWriteable) != 0;
  }
  return plain->dtype == FASTOPS_F32 || plain->dtype == FASTOPS_F64;
}

// A step on what decoding has, without the cost of views: arrays, or tensors all of one type, which is that of the
// result. None where something is otherwise than read_plain wants it, or the sizes do not fit: the full check says
// what, or makes it fit.
py::object plain_step(const py::object& q, const py::object& k, const py::object& v, const py::object& state,
                      const py::object& out, const py::tuple& options) {
  PyTypeObject* const type = Py_TYPE(q.ptr());
  const bool arrays = reinterpret_cast<PyObject*>(type) == Numpy::get().array;
  const Exchange exchange = arrays ? Exchange{nullptr, true} : exchange_of(type);
  if ((!arrays && (exchange.functions == nullptr || !exchange.writable)) || !PyTuple_CheckExact(state.ptr()))
    return py::none();
  const auto read = [&](PyObject* x, Plain* plain) { return read_plain(x, exchange.functions, type, plain); };
  Plain pq, pk, pv;
  if (!read(q.ptr(), &pq) || !read(k.ptr(), &pk) || !read(v.ptr(), &pv)) return py::none();
  if (pq.ndim != 3 || pk.ndim != 3 || pv.ndim != 3 || pk.dtype != pq.dtype || pv.dtype != pq.dtype) return py::none();
  fastops_linear_attention s{};
  py::object projection;
  set_options(options, &s, &projection);
  s.dtype = pq.dtype;
  s.batch = pq.size(0);
  s.heads_q = pq.size(1);
  s.heads_kv = pk.size(1);
  s.queries = s.keys = 1;
  s.dim = pq.size(2);
  s.values = pv.size(2);
  s.features = s.dim + (s.feature_map == FASTOPS_MAP_COSINE ? 1 : 0);
  if (!projection.is_none() || pk.size(0) != s.batch || pv.size(0) != s.batch || pv.size(1) != s.heads_kv ||
      pk.size(2) != s.dim || s.dim == 0 || s.values == 0 || s.heads_kv == 0 || s.heads_q == 0 ||
      s.heads_q % s.heads_kv != 0)
    return py::none();

  const int parts = s.feature_map >= FASTOPS_MAP_EXP ? 3 : 2;
  if (PyTuple_GET_SIZE(state.ptr()) != parts) return py::none();
  Plain written[4];
  const auto apart = [&](const Plain& x, int before) {
    for (int i = 0; i < before; ++i)
      if (x.touches(written[i])) return false;
    return !x.touches(pq) && !x.touches(pk) && !x.touches(pv);
  };
  for (int i = 0; i < parts; ++i) {
    Plain& part = written[i];
    if (!read(PyTuple_GET_ITEM(state.ptr(), i), &part) || !part.writable || part.dtype != s.dtype ||
        part.ndim != (i == 0 ? 4 : 3) || part.size(0) != s.batch || part.size(1) != s.heads_kv ||
        part.size(2) != s.features || (i == 0 && part.size(3) != s.values) || !apart(part, i))
      return py::none();
  }
  py::object y = out;
  if (out.is_none()) {
    std::int64_t shape[3] = {pq.shape[0], pq.shape[1], pv.shape[2]};
    if (arrays) {
      y = py::array(py::reinterpret_borrow<py::dtype>(py::detail::array_proxy(q.ptr())->descr),
                    std::vector<py::ssize_t>(shape, shape + 3));
    } else {
      const std::uint8_t bits = s.dtype == FASTOPS_F64 ? 64 : 32;
      void* data = nullptr;
      y = new_tensor(*exchange.functions, {nullptr, kDlCpu, 0, 3, kDlFloat, bits, 1, shape, nullptr, 0}, &data);
    }
  }
  Plain& result = written[3];
  if (!read(y.ptr(), &result) || !result.writable || result.dtype != s.dtype || result.ndim != 3 ||
      result.size(0) != s.batch || result.size(1) != s.heads_q || result.size(2) != s.values || !apart(result, parts))
    return py::none();

  const auto heads = [](const Plain& x) {
    const auto columns = static_cast<std::ptrdiff_t>(x.shape[2]);
    return fastops_heads{x.data, static_cast<std::ptrdiff_t>(x.shape[1]) * columns, columns, 0};
  };
  fastops_linear_options o{};
  o.final_state = {written[0].data, written[1].data, parts == 3 ? written[2].data : nullptr};
  call_briefly([&] { return fastops_linear_attention_step(&s, heads(pq), heads(pk), heads(pv), heads(result), &o); });
  return y;
}

void linear_attention_backward(const py::object& dy, const py::object& q, const py::object& k, const py::object& v,
                               const py::object& y, const py::object& dq, const py::object& dk, const py::object& dv,
                               const py::tuple& options, const py::object& key_mask, const py::object& offsets,
                               const py::object& decay, const py::object& state, const py::object& d_state,
                               const py::object& d_initial) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v");
  const Tensor ty = tensor(y, "y"), tdy = tensor(dy, "dy");
  const Tensor tdq = tensor(dq, "dq", true), tdk = tensor(dk, "dk", true), tdv = tensor(dv, "dv", true);
  const fastops_dtype dtype = tq.view.dtype;
  want_fit(tq, tk, tv);
  want_rows(ty, tq, tv.columns, dtype, "y");
  want_rows(tdy, tq, tv.columns, dtype, "dy");
  want_rows(tdq, tq, tq.columns, dtype, "dq");
  want_rows(tdk, tk, tk.columns, dtype, "dk");
  want_rows(tdv, tk, tv.columns, dtype, "dv");
  want_contiguous(tdq.view, "dq");
  want_contiguous(tdk.view, "dk");
  want_contiguous(tdv.view, "dv");
  py::object projection;
  const fastops_linear_attention s = shape_of(options, tq, tk, tv, &projection);
  fastops_linear_options o{};
  o.sequences = take_offsets(offsets, s, &o.offsets);
  o.key_mask = per_token(key_mask, "key_mask", tk, true);
  o.decay = per_token(decay, "decay", tk, false);
  o.initial_state = state_of(state, s, o.sequences, "state", false);
  const fastops_linear_state ds = state_of(d_state, s, o.sequences, "d_state", false, true);
  const fastops_linear_state di = state_of(d_initial, s, o.sequences, "d_initial", true, true);
  call([&](fastops_poll poll) {
    return fastops_linear_attention_backward(&s, tdy.heads, tq.heads, tk.heads, tv.heads, ty.heads, tdq.view.data,
                                             tdk.view.data, tdv.view.data, &o, &ds, &di, poll);
  });
}

void softmax_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                       bool causal, double scale, const py::object& key_mask, const py::object& offsets,
                       const py::object& factor) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v"), to = tensor(out, "out", true);
  want_fit(tq, tk, tv);
  want_rows(to, tq, tv.columns, tq.view.dtype, "out");
  fastops_linear_attention s{};
  s.causal = causal;
  s.scale = scale;
  s.dtype = tq.view.dtype;
  s.batch = tq.batch;
  s.heads_q = tq.head;
  s.heads_kv = tk.head;
  s.queries = tq.rows;
  s.keys = tk.rows;
  s.dim = tq.columns;
  s.values = tv.columns;
  const std::int64_t* ends = nullptr;
  const std::size_t sequences = take_offsets(offsets, s, &ends);
  const fastops_heads mask = per_token(key_mask, "key_mask", tk, true);
  const fastops_heads factors = per_token(factor, "logn", tq, false);
  call([&](fastops_poll poll) {
    return fastops_softmax_attention(&s, tq.heads, tk.heads, tv.heads, to.heads, mask, factors, ends, sequences, poll);
  });
}

// NystromOptions of fastops/_attention.py.
fastops_nystrom_attention nystrom_shape(const py::tuple& options, const Tensor& q, const Tensor& k, const Tensor& v) {
  if (options.size() != 7) bad_value("options must have seven fields");
  want_fit(q, k, v);
  fastops_nystrom_attention s{};
  s.landmarks = options[0].cast<std::size_t>();
  s.iterations = options[1].cast<std::size_t>();
  const auto pinv = options[2].cast<std::string>();
  if (pinv != "newton" && pinv != "ridge") bad_value("pinv must be 'newton' or 'ridge'");
  s.ridge_solve = pinv == "ridge";
  s.ridge = options[3].cast<double>();
  s.scale = options[4].cast<double>();
  s.batch_init = options[5].cast<bool>();
  s.normalize = options[6].cast<bool>();
  s.dtype = q.view.dtype;
  s.batch = q.batch;
  s.heads_q = q.head;
  s.heads_kv = k.head;
  s.queries = q.rows;
  s.keys = k.rows;
  s.dim = q.columns;
  s.values = v.columns;
  if (s.landmarks < 1 || s.landmarks > 65536) bad_value("landmarks must be in 1 .. 65536");
  return s;
}
// A contiguous array of the computation's type and of this shape, or null for None.
void* optional_array(const py::object& object, const std::vector<std::size_t>& shape, fastops_dtype dtype,
                     const char* name, bool writable) {
  if (object.is_none()) return nullptr;
  const ArrayView a = view(object, name, writable);
  want_dtype(a, compute_dtype(dtype), name);
  want_contiguous(a, name);
  want_shape(a, {shape.begin(), shape.end()}, name);
  return a.data;
}
fastops_heads sample_mask(const py::object& object, const Tensor& k) {
  if (object.is_none()) return {};
  const auto array = object.cast<py::array>();
  if (array.dtype().kind() != 'b') throw py::type_error("key_mask must be of dtype bool");
  const ArrayView m = view(array.attr("view")("uint8"), "key_mask");
  want_shape(m, {static_cast<py::ssize_t>(k.batch), static_cast<py::ssize_t>(k.rows)}, "key_mask");
  return {m.data, m.strides[0], 0, m.strides[1]};
}
std::size_t taps_of(const py::object& conv) {
  return conv.is_none() ? 0 : static_cast<std::size_t>(conv.cast<py::array>().shape(1));
}

void nystrom_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                       const py::tuple& options, const py::object& key_mask, const py::object& conv_weight,
                       const py::object& q_landmarks, const py::object& k_landmarks, const py::object& info) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v"), to = tensor(out, "out", true);
  fastops_nystrom_attention s = nystrom_shape(options, tq, tk, tv);
  want_rows(to, tq, tv.columns, tq.view.dtype, "out");
  const fastops_dtype dtype = tq.view.dtype;
  s.taps = taps_of(conv_weight);
  const fastops_heads mask = sample_mask(key_mask, tk);
  const void* const conv = optional_array(conv_weight, {s.heads_q, s.taps}, dtype, "conv_weight", false);
  const void* const ql =
      optional_array(q_landmarks, {s.batch, s.heads_q, s.landmarks, s.dim}, dtype, "q_landmarks", false);
  const void* const kl =
      optional_array(k_landmarks, {s.batch, s.heads_kv, s.landmarks, s.dim}, dtype, "k_landmarks", false);
  void* const told = optional_array(info, {s.batch, s.heads_q, 4}, dtype, "info", true);
  call([&](fastops_poll poll) {
    return fastops_nystrom_attention_forward(&s, tq.heads, tk.heads, tv.heads, to.heads, mask, conv, ql, kl, told,
                                             poll);
  });
}

void nystrom_attention_backward(const py::object& dy, const py::object& q, const py::object& k, const py::object& v,
                                const py::object& dq, const py::object& dk, const py::object& dv,
                                const py::tuple& options, const py::object& key_mask, const py::object& conv_weight,
                                const py::object& d_conv_weight, const py::object& q_landmarks,
                                const py::object& k_landmarks, const py::object& d_q_landmarks,
                                const py::object& d_k_landmarks) {
  const Tensor tq = tensor(q, "q"), tk = tensor(k, "k"), tv = tensor(v, "v"), tdy = tensor(dy, "dy");
  const Tensor tdq = tensor(dq, "dq", true), tdk = tensor(dk, "dk", true), tdv = tensor(dv, "dv", true);
  fastops_nystrom_attention s = nystrom_shape(options, tq, tk, tv);
  const fastops_dtype dtype = tq.view.dtype;
  want_rows(tdy, tq, tv.columns, dtype, "dy");
  want_rows(tdq, tq, tq.columns, dtype, "dq");
  want_rows(tdk, tk, tk.columns, dtype, "dk");
  want_rows(tdv, tk, tv.columns, dtype, "dv");
  want_contiguous(tdq.view, "dq");
  want_contiguous(tdk.view, "dk");
  want_contiguous(tdv.view, "dv");
  s.taps = taps_of(conv_weight);
  const fastops_heads mask = sample_mask(key_mask, tk);
  const std::vector<std::size_t> of_q = {s.batch, s.heads_q, s.landmarks, s.dim};
  const std::vector<std::size_t> of_k = {s.batch, s.heads_kv, s.landmarks, s.dim};
  const void* const conv = optional_array(conv_weight, {s.heads_q, s.taps}, dtype, "conv_weight", false);
  void* const d_conv = optional_array(d_conv_weight, {s.heads_q, s.taps}, dtype, "d_conv_weight", true);
  const void* const ql = optional_array(q_landmarks, of_q, dtype, "q_landmarks", false);
  const void* const kl = optional_array(k_landmarks, of_k, dtype, "k_landmarks", false);
  void* const dql = optional_array(d_q_landmarks, of_q, dtype, "d_q_landmarks", true);
  void* const dkl = optional_array(d_k_landmarks, of_k, dtype, "d_k_landmarks", true);
  call([&](fastops_poll poll) {
    return fastops_nystrom_attention_backward(&s, tdy.heads, tq.heads, tk.heads, tv.heads, tdq.view.data, tdk.view.data,
                                              tdv.view.data, mask, conv, d_conv, ql, kl, dql, dkl, poll);
  });
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("linear_attention", &linear_attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("options"),
        arg("key_mask"), arg("offsets"), arg("decay"), arg("state"), arg("state_out"));
  m.def("linear_attention_step", &linear_attention_step, arg("q"), arg("k"), arg("v"), arg("out"), arg("options"),
        arg("decay"), arg("state"));
  m.def("plain_step", &plain_step, arg("q"), arg("k"), arg("v"), arg("state"), arg("out"), arg("options"));
  m.def("linear_attention_backward", &linear_attention_backward, arg("dy"), arg("q"), arg("k"), arg("v"), arg("y"),
        arg("dq"), arg("dk"), arg("dv"), arg("options"), arg("key_mask"), arg("offsets"), arg("decay"), arg("state"),
        arg("d_state"), arg("d_initial"));
  m.def("nystrom_attention", &nystrom_attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("options"),
        arg("key_mask"), arg("conv_weight"), arg("q_landmarks"), arg("k_landmarks"), arg("info"));
  m.def("nystrom_attention_backward", &nystrom_attention_backward, arg("dy"), arg("q"), arg("k"), arg("v"), arg("dq"),
        arg("dk"), arg("dv"), arg("options"), arg("key_mask"), arg("conv_weight"), arg("d_conv_weight"),
        arg("q_landmarks"), arg("k_landmarks"), arg("d_q_landmarks"), arg("d_k_landmarks"));
  m.def("softmax_attention", &softmax_attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("causal"), arg("scale"),
        arg("key_mask"), arg("offsets"), arg("logn"));
}

}  // namespace fastops
