// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic for Python: arrays to pointers, the GIL released, one call.
#include "mitchell/mitchell_bind.h"

#include <pybind11/numpy.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/numpy_arrays.h"
#include "core/python_call.h"
#include "core/tensor_exchange.h"
#include "fastops/fastops.h"
#include "mitchell/mitchell_ufuncs.h"

namespace py = pybind11;

namespace fastops {
namespace {

fastops_matrix matrix_of(const ArrayView& v) {
  const std::size_t n = v.ndim();
  return {static_cast<std::size_t>(v.shape[n - 2]), static_cast<std::size_t>(v.shape[n - 1]), v.strides[n - 2],
          v.strides[n - 1]};
}

// Pointers to the matrices of `v` for every matrix of a batch of shape `batch`, along which v is broadcast.
template <class Pointer>
std::vector<Pointer> matrices(const ArrayView& v, const std::vector<py::ssize_t>& batch, const char* name) {
  if (v.ndim() < 2 || v.ndim() - 2 > batch.size()) bad_value(std::string(name) + " has a shape that does not fit");
  const std::size_t lead = batch.size() - (v.ndim() - 2);
  std::size_t count = 1;
  std::vector<py::ssize_t> strides(batch.size(), 0);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    count *= static_cast<std::size_t>(batch[i]);
    if (i < lead) continue;
    if (v.shape[i - lead] == batch[i])
      strides[i] = v.strides[i - lead];
    else if (v.shape[i - lead] != 1)
      bad_value(std::string(name) + " has batch axes that do not broadcast to those of the result");
  }
  std::vector<Pointer> pointers;
  pointers.reserve(count);
  std::vector<py::ssize_t> at(batch.size(), 0);
  py::ssize_t offset = 0;
  for (std::size_t i = 0; i < count; ++i) {
    pointers.push_back(reinterpret_cast<Pointer>(v.data + offset * static_cast<py::ssize_t>(v.item_size)));
    for (std::size_t axis = batch.size(); axis-- > 0;) {
      offset += strides[axis];
      if (++at[axis] < batch[axis]) break;
      offset -= strides[axis] * batch[axis];
      at[axis] = 0;
    }
  }
  return pointers;
}

std::vector<py::ssize_t> batch_of(const ArrayView& v, const char* name) {
  if (v.ndim() < 2) bad_value(std::string(name) + " must have at least two axes");
  return {v.shape.begin(), v.shape.end() - 2};
}

// Multipliers.

using MultiplierPtr = std::shared_ptr<fastops_mitchell>;

// The multipliers of the latest specs. A spec object is usually the same one again, so it is found by its address.
MultiplierPtr multiplier(const py::object& spec) {
  struct Entry {
    PyObject* spec = nullptr;  // owned, so that its address stays its own
    fastops_mitchell_params params{};
    MultiplierPtr value;
  };
  constexpr std::size_t kKept = 16;
  static Entry* const entries = new Entry[kKept];  // outlives the interpreter's shutdown
  static std::size_t next = 0;
#ifdef Py_GIL_DISABLED
  static PyMutex mutex;
  struct Lock {
    Lock() { PyMutex_Lock(&mutex); }
    ~Lock() { PyMutex_Unlock(&mutex); }
  } lock;
#endif
  for (std::size_t i = 0; i < kKept; ++i)
    if (entries[i].spec == spec.ptr()) return entries[i].value;
  fastops_mitchell_params params;
  if (parse_spec(spec.ptr(), &params) < 0) throw py::error_already_set();
  for (std::size_t i = 0; i < kKept; ++i)
    if (entries[i].spec != nullptr && std::memcmp(&entries[i].params, &params, sizeof params) == 0)
      return entries[i].value;
  fastops_mitchell* created = nullptr;
  switch (fastops_mitchell_create(&params, &created)) {
    case FASTOPS_OK:
      break;
    case FASTOPS_NO_MEMORY:
      throw std::bad_alloc();
    default:
      bad_value("spec must describe a multiplier: form 0 .. 2, |c| < 0.5, segments 0, 2, 4, 8 or 16");
  }
  Entry& entry = entries[next];
  next = (next + 1) % kKept;
  MultiplierPtr value(created, &fastops_mitchell_destroy);
  PyObject* old = entry.spec;
  Py_INCREF(spec.ptr());
  entry.spec = spec.ptr();
  entry.params = params;
  entry.value = value;
  Py_XDECREF(old);
  return value;
}

// Calls.

void matmul_with(const fastops_mitchell* m, const py::object& a, const py::object& b, const py::object& out) {
  const ArrayView va = view(a, "a"), vb = view(b, "b"), vo = view(out, "out", true);
  want_float(vo, "out");
  want_dtype(va, vo.dtype, "a");
  want_dtype(vb, vo.dtype, "b");
  const auto batch = batch_of(vo, "out");
  const auto pa = matrices<const void*>(va, batch, "a"), pb = matrices<const void*>(vb, batch, "b");
  const auto po = matrices<void*>(vo, batch, "out");
  call([&](fastops_poll poll) {
    return fastops_mitchell_matmul(m, vo.dtype, po.size(), pa.data(), matrix_of(va), pb.data(), matrix_of(vb),
                                   po.data(), matrix_of(vo), poll);
  });
}

void matmul(const py::object& a, const py::object& b, const py::object& spec, const py::object& out) {
  const MultiplierPtr m = multiplier(spec);
  matmul_with(m.get(), a, b, out);
}

void exact_matmul(const py::object& a, const py::object& b, const py::object& out) { matmul_with(nullptr, a, b, out); }

fastops_gradient mode_of(int mode) {
  if (mode < 0 || mode > 2) bad_value("mode must be 0, 1 or 2, got " + std::to_string(mode));
  return static_cast<fastops_gradient>(mode);
}

void matmul_grad(const py::object& a, const py::object& b, const py::object& dy, const py::object& spec, int mode,
                 const py::object& da, const py::object& db) {
  const MultiplierPtr m = multiplier(spec);
  const fastops_gradient gradient = mode_of(mode);
  const ArrayView va = view(a, "a"), vb = view(b, "b"), vy = view(dy, "dy");
  const ArrayView vda = view(da, "da", true), vdb = view(db, "db", true);
  want_float(vy, "dy");
  want_dtype(va, vy.dtype, "a");
  want_dtype(vb, vy.dtype, "b");
  want_dtype(vda, vy.dtype, "da");
  want_dtype(vdb, vy.dtype, "db");
  const auto batch = batch_of(vy, "dy");
  if (batch != batch_of(vda, "da") || batch != batch_of(vdb, "db"))
    bad_value("da and db must have the batch axes of dy");
  const auto pa = matrices<const void*>(va, batch, "a"), pb = matrices<const void*>(vb, batch, "b");
  const auto pdy = matrices<const void*>(vy, batch, "dy");
  const auto pda = matrices<void*>(vda, batch, "da"), pdb = matrices<void*>(vdb, batch, "db");
  call([&](fastops_poll poll) {
    const fastops_status status =
        fastops_mitchell_matmul_grad_a(m.get(), gradient, vy.dtype, pdy.size(), pa.data(), matrix_of(va), pb.data(),
                                       matrix_of(vb), pdy.data(), matrix_of(vy), pda.data(), matrix_of(vda), poll);
    if (status != FASTOPS_OK) return status;
    return fastops_mitchell_matmul_grad_b(m.get(), gradient, vy.dtype, pdy.size(), pa.data(), matrix_of(va), pb.data(),
                                          matrix_of(vb), pdy.data(), matrix_of(vy), pdb.data(), matrix_of(vdb), poll);
  });
}

using PairArgument = std::pair<py::ssize_t, py::ssize_t>;

std::size_t at_least(py::ssize_t value, py::ssize_t least, const char* name) {
  if (value < least)
    bad_value(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
  return static_cast<std::size_t>(value);
}

// The shape of a convolution and of its result; what would not fit is refused here.
fastops_conv2d conv_shape(const ArrayView& x, const ArrayView& w, const PairArgument& stride,
                          const PairArgument& padding, const PairArgument& dilation, py::ssize_t groups,
                          std::vector<py::ssize_t>* out) {
  if (x.ndim() != 4 || w.ndim() != 4) bad_value("x and w must have four axes");
  constexpr py::ssize_t kLimit = py::ssize_t{1} << 31;
  fastops_conv2d s{};
  s.groups = at_least(groups, 1, "groups");
  s.batch = static_cast<std::size_t>(x.shape[0]);
  s.channels = static_cast<std::size_t>(x.shape[1]);
  s.height = static_cast<std::size_t>(x.shape[2]);
  s.width = static_cast<std::size_t>(x.shape[3]);
  s.filters = static_cast<std::size_t>(w.shape[0]);
  s.kernel_height = at_least(w.shape[2], 1, "w's height");
  s.kernel_width = at_least(w.shape[3], 1, "w's width");
  s.stride_h = at_least(stride.first, 1, "stride");
  s.stride_w = at_least(stride.second, 1, "stride");
  s.padding_h = at_least(padding.first, 0, "padding");
  s.padding_w = at_least(padding.second, 0, "padding");
  s.dilation_h = at_least(dilation.first, 1, "dilation");
  s.dilation_w = at_least(dilation.second, 1, "dilation");
  for (const auto& pair :
       {stride, padding, dilation, PairArgument(x.shape[2], x.shape[3]), PairArgument(w.shape[2], w.shape[3])})
    if (pair.first >= kLimit || pair.second >= kLimit) bad_value("sizes and steps must be below 2^31");
  if (s.channels % s.groups != 0 || s.filters % s.groups != 0 ||
      static_cast<std::size_t>(w.shape[1]) != s.channels / s.groups)
    bad_value("w must have shape (O, C / groups, KH, KW), groups dividing O and C");
  const py::ssize_t oh = x.shape[2] + 2 * padding.first - dilation.first * (w.shape[2] - 1) - 1;
  const py::ssize_t ow = x.shape[3] + 2 * padding.second - dilation.second * (w.shape[3] - 1) - 1;
  if (oh < 0 || ow < 0) bad_value("w is larger than the padded x");
  *out = {x.shape[0], w.shape[0], oh / stride.first + 1, ow / stride.second + 1};
  return s;
}

void conv2d(const py::object& x, const py::object& w, const PairArgument& stride, const PairArgument& padding,
            const PairArgument& dilation, py::ssize_t groups, const py::object& spec, const py::object& out) {
  const MultiplierPtr m = multiplier(spec);
  const ArrayView vx = view(x, "x"), vw = view(w, "w"), vo = view(out, "out", true);
  want_float(vo, "out");
  want_dtype(vx, vo.dtype, "x");
  want_dtype(vw, vo.dtype, "w");
  std::vector<py::ssize_t> shape;
  const fastops_conv2d s = conv_shape(vx, vw, stride, padding, dilation, groups, &shape);
  want_shape(vo, shape, "out");
  want_contiguous(vx, "x");
  want_contiguous(vw, "w");
  want_contiguous(vo, "out");
  call([&](fastops_poll poll) {
    return fastops_mitchell_conv2d(m.get(), vo.dtype, &s, vx.data, vw.data, vo.data, poll);
  });
}

void conv2d_grad(const py::object& x, const py::object& w, const py::object& dy, const PairArgument& stride,
                 const PairArgument& padding, const PairArgument& dilation, py::ssize_t groups, const py::object& spec,
                 int mode, const py::object& dx, const py::object& dw) {
  const MultiplierPtr m = multiplier(spec);
  const fastops_gradient gradient = mode_of(mode);
  const ArrayView vx = view(x, "x"), vw = view(w, "w"), vy = view(dy, "dy");
  const ArrayView vdx = view(dx, "dx", true), vdw = view(dw, "dw", true);
  want_float(vy, "dy");
  want_dtype(vx, vy.dtype, "x");
  want_dtype(vw, vy.dtype, "w");
  want_dtype(vdx, vy.dtype, "dx");
  want_dtype(vdw, vy.dtype, "dw");
  std::vector<py::ssize_t> shape;
  const fastops_conv2d s = conv_shape(vx, vw, stride, padding, dilation, groups, &shape);
  want_shape(vy, shape, "dy");
  want_shape(vdx, vx.shape, "dx");
  want_shape(vdw, vw.shape, "dw");
  want_contiguous(vx, "x");
  want_contiguous(vw, "w");
  want_contiguous(vy, "dy");
  want_contiguous(vdx, "dx");
  want_contiguous(vdw, "dw");
  call([&](fastops_poll poll) {
    return fastops_mitchell_conv2d_grad(m.get(), gradient, vy.dtype, &s, vx.data, vw.data, vy.data, vdx.data, vdw.data,
                                        poll);
  });
}

void lut_matmul(const py::object& a, const py::object& b, const py::object& table, const py::object& out) {
  const ArrayView va = view(a, "a"), vb = view(b, "b"), vt = view(table, "table"), vo = view(out, "out", true);
  for (const auto* v : {&va, &vb})
    if (v->dtype != FASTOPS_U8 && v->dtype != FASTOPS_I8)
      throw py::type_error("a and b must be of dtype uint8 or int8");
  for (const auto* v : {&vt, &vo})
    if (v->dtype != FASTOPS_I32 && v->dtype != FASTOPS_I64)
      throw py::type_error("table and out must be of dtype int32 or int64");
  want_shape(vt, {256, 256}, "table");
  want_contiguous(vt, "table");
  const auto batch = batch_of(vo, "out");
  const auto pa = matrices<const std::uint8_t*>(va, batch, "a"), pb = matrices<const std::uint8_t*>(vb, batch, "b");
  const auto po = matrices<void*>(vo, batch, "out");
  const fastops_matrix mo = matrix_of(vo);
  call([&](fastops_poll poll) {
    return fastops_lut_matmul(po.size(), pa.data(), matrix_of(va), pb.data(), matrix_of(vb), vt.data,
                              vt.dtype == FASTOPS_I64, po.data(), mo, vo.dtype == FASTOPS_I64, poll);
  });
}

void elementwise_grad(fastops_mitchell_op op, const py::object& a, const py::object& b, const py::object& dy,
                      const py::object& spec, int mode, const py::object& da, const py::object& db) {
  const MultiplierPtr m = multiplier(spec);
  const fastops_gradient gradient = mode_of(mode);
  const ArrayView va = view(a, "a"), vb = view(b, "b"), vy = view(dy, "dy");
  const ArrayView vda = view(da, "da", true), vdb = view(db, "db", true);
  const std::pair<const ArrayView*, const char*> all[] = {
      {&va, "a"}, {&vb, "b"}, {&vy, "dy"}, {&vda, "da"}, {&vdb, "db"}};
  want_float(vy, "dy");
  std::size_t count = 1;
  for (const py::ssize_t n : vy.shape) count *= static_cast<std::size_t>(n);
  for (const auto& [v, name] : all) {
    want_dtype(*v, vy.dtype, name);
    want_shape(*v, vy.shape, name);
    want_contiguous(*v, name);
  }
  call([&](fastops_poll) {
    return fastops_mitchell_grad(m.get(), op, gradient, vy.dtype, va.data, vb.data, vy.data, vda.data, vdb.data, count);
  });
}

// ufunc(a, b) of two dense tensors of one type, shape and dtype, as a tensor of that type. None where something is
// otherwise: NumPy's arrays are the way of all others.
py::object ufunc_of_tensors(const py::object& ufunc, const py::object& a, const py::object& b) {
  PyTypeObject* const type = Py_TYPE(a.ptr());
  if (Py_TYPE(b.ptr()) != type) return py::none();
  const Exchange exchange = exchange_of(type);
  if (exchange.functions == nullptr) return py::none();
  DlTensor x, y;
  fastops_dtype dtype{}, other{};
  if (!dense_view(*exchange.functions, a.ptr(), &x, &dtype) || !dense_view(*exchange.functions, b.ptr(), &y, &other))
    return py::none();
  if (dtype != other || x.ndim != y.ndim) return py::none();
  std::size_t n = 1;
  for (std::int32_t axis = 0; axis < x.ndim; ++axis) {
    if (x.shape[axis] != y.shape[axis]) return py::none();
    n *= static_cast<std::size_t>(x.shape[axis]);
  }
  void* data = nullptr;
  py::object result = new_tensor(*exchange.functions, x, &data);
  return apply_ufunc(ufunc.ptr(), dtype, x.data, y.data, data, n) ? result : py::none();
}

}  // namespace

void bind_mitchell(py::module_& m) {
  using py::arg;
  m.def(
      "register_bfloat16",
      [](const py::object& type) {
        if (register_bfloat16(type.ptr()) == nullptr) throw py::error_already_set();
      },
      arg("dtype_type"));
  m.def(
      "make_ufunc",
      [](const std::string& op, const std::string& name, const std::string& doc, const py::object& spec) {
        PyObject* ufunc = make_ufunc(op.c_str(), name.c_str(), doc.c_str(), spec.ptr());
        if (ufunc == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(ufunc);
      },
      arg("op"), arg("name"), arg("doc"), arg("spec"));
  m.def("ufunc_of_tensors", &ufunc_of_tensors, arg("ufunc"), arg("a"), arg("b"));
  m.def("matmul", &matmul, arg("a"), arg("b"), arg("spec"), arg("out"));
  m.def("exact_matmul", &exact_matmul, arg("a"), arg("b"), arg("out"));
  m.def("matmul_grad", &matmul_grad, arg("a"), arg("b"), arg("dy"), arg("spec"), arg("mode"), arg("da"), arg("db"));
  m.def("conv2d", &conv2d, arg("x"), arg("w"), arg("stride"), arg("padding"), arg("dilation"), arg("groups"),
        arg("spec"), arg("out"));
  m.def("conv2d_grad", &conv2d_grad, arg("x"), arg("w"), arg("dy"), arg("stride"), arg("padding"), arg("dilation"),
        arg("groups"), arg("spec"), arg("mode"), arg("dx"), arg("dw"));
  m.def("lut_matmul", &lut_matmul, arg("a"), arg("b"), arg("table"), arg("out"));
  const auto grad = [](fastops_mitchell_op op) {
    return [op](const py::object& a, const py::object& b, const py::object& dy, const py::object& spec, int mode,
                const py::object& da, const py::object& db) { elementwise_grad(op, a, b, dy, spec, mode, da, db); };
  };
  m.def("mul_grad", grad(FASTOPS_MUL), arg("a"), arg("b"), arg("dy"), arg("spec"), arg("mode"), arg("da"), arg("db"));
  m.def("div_grad", grad(FASTOPS_DIV), arg("a"), arg("b"), arg("dy"), arg("spec"), arg("mode"), arg("da"), arg("db"));
}

}  // namespace fastops
