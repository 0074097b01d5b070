// SPDX-License-Identifier: BSD-3-Clause
// Attention for Python: arrays to pointers, the GIL released, one call.
#include "attention/attention_bind.h"

#include <array>
#include <string>

#include "core/numpy_arrays.h"
#include "core/python_call.h"
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

// An exact ndarray of the dtype, C-contiguous and aligned; with `own`, writable memory that no other array owns.
const py::detail::PyArray_Proxy* plain_array(PyObject* object, int ndim, PyObject* descr, bool own) {
  constexpr int kContiguous = 0x0001, kAligned = 0x0100, kWriteable = 0x0400;
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != Numpy::get().array) return nullptr;
  const auto* const a = py::detail::array_proxy(object);
  const int wanted = kContiguous | kAligned | (own ? kWriteable : 0);
  const bool fits = a->nd == ndim && (a->flags & wanted) == wanted && a->descr == descr;
  return fits && !(own && a->base != nullptr) ? a : nullptr;
}

// A step on arrays as decoding has them, without the cost of views. None where something is otherwise than plain_array
// wants it, or the sizes do not fit: the full check says what, or makes it fit.
py::object plain_step(const py::object& q, const py::object& k, const py::object& v, const py::object& state,
                      const py::object& out, const py::tuple& options) {
  const Numpy& numpy = Numpy::get();
  const auto is_array = [&](const py::object& x) {
    return reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == numpy.array;
  };
  if (!is_array(q) || !PyTuple_CheckExact(state.ptr())) return py::none();
  PyObject* const descr = py::detail::array_proxy(q.ptr())->descr;
  if (descr != numpy.float32 && descr != numpy.float64) return py::none();
  const auto* const aq = plain_array(q.ptr(), 3, descr, false);
  const auto* const ak = plain_array(k.ptr(), 3, descr, false);
  const auto* const av = plain_array(v.ptr(), 3, descr, false);
  if (aq == nullptr || ak == nullptr || av == nullptr) return py::none();
  const auto size = [](const py::detail::PyArray_Proxy* a, int axis) {
    return static_cast<std::size_t>(a->dimensions[axis]);
  };
  fastops_linear_attention s{};
  py::object projection;
  set_options(options, &s, &projection);
  s.dtype = descr == numpy.float64 ? FASTOPS_F64 : FASTOPS_F32;
  s.batch = size(aq, 0);
  s.heads_q = size(aq, 1);
  s.heads_kv = size(ak, 1);
  s.queries = s.keys = 1;
  s.dim = size(aq, 2);
  s.values = size(av, 2);
  s.features = s.dim + (s.feature_map == FASTOPS_MAP_COSINE ? 1 : 0);
  if (!projection.is_none() || size(ak, 0) != s.batch || size(av, 0) != s.batch || size(av, 1) != s.heads_kv ||
      size(ak, 2) != s.dim || s.dim == 0 || s.values == 0 || s.heads_kv == 0 || s.heads_q == 0 ||
      s.heads_q % s.heads_kv != 0)
    return py::none();

  const int parts = s.feature_map >= FASTOPS_MAP_EXP ? 3 : 2;
  if (PyTuple_GET_SIZE(state.ptr()) != parts) return py::none();
  const auto apart = [&](PyObject* x) {
    for (const auto* a : {aq, ak, av})
      if (a->base == x) return false;
    return x != q.ptr() && x != k.ptr() && x != v.ptr();
  };
  void* data[3] = {};
  for (int i = 0; i < parts; ++i) {
    PyObject* const x = PyTuple_GET_ITEM(state.ptr(), i);
    const auto* const a = plain_array(x, i == 0 ? 4 : 3, descr, true);
    if (a == nullptr || !apart(x) || size(a, 0) != s.batch || size(a, 1) != s.heads_kv || size(a, 2) != s.features ||
        (i == 0 && size(a, 3) != s.values))
      return py::none();
    for (int j = 0; j < i; ++j)
      if (x == PyTuple_GET_ITEM(state.ptr(), j)) return py::none();
    data[i] = a->data;
  }
  py::object y = out;
  if (out.is_none()) {
    const std::vector<py::ssize_t> shape = {aq->dimensions[0], aq->dimensions[1], av->dimensions[2]};
    y = py::array(py::reinterpret_borrow<py::dtype>(descr), shape);
  }
  const auto* const ay = plain_array(y.ptr(), 3, descr, true);
  if (ay == nullptr || !apart(y.ptr()) || size(ay, 0) != s.batch || size(ay, 1) != s.heads_q || size(ay, 2) != s.values)
    return py::none();
  for (int i = 0; i < parts; ++i)
    if (y.ptr() == PyTuple_GET_ITEM(state.ptr(), i)) return py::none();

  const auto heads = [](const py::detail::PyArray_Proxy* a) {
    const auto columns = static_cast<std::ptrdiff_t>(a->dimensions[2]);
    return fastops_heads{a->data, static_cast<std::ptrdiff_t>(a->dimensions[1]) * columns, columns, 0};
  };
  fastops_linear_options o{};
  o.final_state = {data[0], data[1], data[2]};
  call_briefly([&] { return fastops_linear_attention_step(&s, heads(aq), heads(ak), heads(av), heads(ay), &o); });
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
