// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic on a GPU for Python: operands as (address, shape, strides), axes merged, one launch.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "cuda/cuda_bind.h"

namespace py = pybind11;

namespace fastops::gpu {
namespace {

constexpr std::size_t kItemSize[] = {2, 2, 4, 8, 1, 1, 2, 2, 4, 4, 8, 8};

class Multiplier {
 public:
  explicit Multiplier(const py::tuple& spec) {
    fastops_mitchell_params p{};
    if (spec.size() != 7) throw py::value_error("spec must be a tuple of seven items");
    p.form = spec[0].cast<std::int32_t>();
    p.flush = spec[1].cast<std::int32_t>();
    p.corrections = spec[2].cast<std::int32_t>();
    p.mantissa_bits = spec[3].cast<std::int32_t>();
    p.segments = spec[4].cast<std::int32_t>();
    p.c = spec[5].cast<double>();
    const auto table = spec[6].cast<std::vector<double>>();
    if (table.size() > 256) throw py::value_error("spec's table must have at most 256 entries");
    std::copy(table.begin(), table.end(), p.table);
    fastops_mitchell* made = nullptr;
    switch (fastops_mitchell_create(&p, &made)) {
      case FASTOPS_OK:
        break;
      case FASTOPS_NO_MEMORY:
        throw std::bad_alloc();
      default:
        throw py::value_error("spec must describe a multiplier");
    }
    m_.reset(made, fastops_mitchell_destroy);
  }
  const fastops_mitchell& operator*() const { return *m_; }

 private:
  std::shared_ptr<fastops_mitchell> m_;
};

struct Array {
  std::uintptr_t data = 0;
  std::vector<std::ptrdiff_t> shape, strides;  // elements
  bool is_number = false;
  double number = 0;
};
// (address, shape, strides), or a number.
Array array_of(const py::handle& x) {
  Array a;
  if (!py::isinstance<py::tuple>(x)) {
    a.is_number = true;
    a.number = x.cast<double>();
    return a;
  }
  const auto t = py::reinterpret_borrow<py::tuple>(x);
  a.data = t[0].cast<std::uintptr_t>();
  a.shape = t[1].cast<std::vector<std::ptrdiff_t>>();
  a.strides = t[2].cast<std::vector<std::ptrdiff_t>>();
  if (a.shape.size() != a.strides.size()) throw py::value_error("an array must have a stride for each axis");
  return a;
}

bool is_empty(const Array& x) { return std::find(x.shape.begin(), x.shape.end(), 0) != x.shape.end(); }

void want_aligned(const Array& x, std::size_t item, const char* name) {
  if (x.data % item != 0) throw py::value_error(std::string(name) + " must be aligned to its elements");
}

struct Span {
  std::uintptr_t low, high;
};
Span span_of(const Array& x, std::size_t item) {
  std::ptrdiff_t low = 0, high = 0;
  for (std::size_t d = 0; d < x.shape.size(); ++d) {
    if (x.shape[d] == 0) return {x.data, x.data};
    (x.strides[d] < 0 ? low : high) += x.strides[d] * (x.shape[d] - 1);
  }
  const auto size = static_cast<std::ptrdiff_t>(item);
  return {x.data + static_cast<std::uintptr_t>(low * size), x.data + static_cast<std::uintptr_t>((high + 1) * size)};
}
// Strides that take x to `shape`, 0 along the axes on which it is repeated.
std::vector<std::ptrdiff_t> broadcast(const Array& x, const std::vector<std::ptrdiff_t>& shape, const char* name) {
  std::vector<std::ptrdiff_t> strides(shape.size(), 0);
  if (x.is_number) return strides;
  if (x.shape.size() > shape.size()) throw py::value_error(std::string(name) + " has more axes than the result");
  const std::size_t lead = shape.size() - x.shape.size();
  for (std::size_t d = 0; d < x.shape.size(); ++d) {
    if (x.shape[d] != shape[lead + d] && x.shape[d] != 1)
      throw py::value_error(std::string(name) + " has a shape that does not fit the result");
    strides[lead + d] = x.shape[d] == 1 ? 0 : x.strides[d];
  }
  return strides;
}
void refuse_overlap(const Array& out, std::size_t out_item, const Array& x, std::size_t item, const char* name,
                    bool may_be_same) {
  if (x.is_number) return;
  if (may_be_same && x.data == out.data && x.shape == out.shape && x.strides == out.strides) return;
  const Span a = span_of(out, out_item), b = span_of(x, item);
  if (a.low < b.high && b.low < a.high)
    throw py::value_error(std::string("out must be memory apart from ") + name +
                          (may_be_same ? ", or exactly it" : "") + ", got an array that overlaps " + name);
}

// The largest stride of `out` first, and axes that lie behind one another in every array as one.
template <std::size_t Arrays>
int merge(std::vector<std::ptrdiff_t> shape, std::vector<std::ptrdiff_t> (&strides)[Arrays], int most,
          std::vector<std::ptrdiff_t>* merged) {
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t x, std::size_t y) { return std::abs(strides[0][x]) > std::abs(strides[0][y]); });
  std::vector<std::ptrdiff_t> result[Arrays];
  merged->clear();
  for (const std::size_t d : order) {
    if (shape[d] == 1) continue;
    bool joins = !merged->empty();
    for (std::size_t k = 0; joins && k < Arrays; ++k) joins = result[k].back() == shape[d] * strides[k][d];
    if (joins) {
      merged->back() *= shape[d];
      for (std::size_t k = 0; k < Arrays; ++k) result[k].back() = strides[k][d];
    } else {
      merged->push_back(shape[d]);
      for (std::size_t k = 0; k < Arrays; ++k) result[k].push_back(strides[k][d]);
    }
  }
  if (merged->size() > static_cast<std::size_t>(most))
    throw py::value_error("arrays must have at most " + std::to_string(most) +
                          " axes that do not lie behind one another, got " + std::to_string(merged->size()));
  for (std::size_t k = 0; k < Arrays; ++k) strides[k] = result[k];
  return static_cast<int>(merged->size());
}

// Memory for the time of a call, where it needs any.
class Workspace {
 public:
  Workspace(std::size_t bytes, int device, std::uintptr_t stream) {
    if (bytes != 0) memory_.emplace(bytes, device, stream);
  }
  void* data() const { return memory_ ? memory_->data() : nullptr; }

 private:
  std::optional<Memory> memory_;
};

void apply(const Multiplier& multiplier, int op, int dtype, const py::object& a, const py::object& b,
           const py::object& out, int device, std::uintptr_t stream) {
  const Array x = array_of(a), y = array_of(b), r = array_of(out);
  if (op < 0 || op > FASTOPS_EXP2 || dtype < 0 || dtype > FASTOPS_F64 || r.is_number)
    throw py::value_error("op or dtype is out of range");
  const std::size_t item = kItemSize[dtype];
  want_aligned(x, item, "a");
  want_aligned(y, item, "b");
  want_aligned(r, item, "out");
  std::vector<std::ptrdiff_t> strides[3] = {r.strides, broadcast(x, r.shape, "a"), broadcast(y, r.shape, "b")};
  refuse_overlap(r, item, x, item, "a", true);
  refuse_overlap(r, item, y, item, "b", true);
  Elementwise call{};
  std::vector<std::ptrdiff_t> shape;
  call.op = static_cast<fastops_mitchell_op>(op);
  call.dtype = static_cast<fastops_dtype>(dtype);
  call.ndim = merge(r.shape, strides, kMaxDimensions, &shape);
  call.a = {x.is_number ? nullptr : reinterpret_cast<const void*>(x.data), x.number, {}};
  call.b = {y.is_number ? nullptr : reinterpret_cast<const void*>(y.data), y.number, {}};
  call.out = reinterpret_cast<void*>(r.data);
  for (int d = 0; d < call.ndim; ++d) {
    const auto i = static_cast<std::size_t>(d);
    call.shape[d] = static_cast<std::size_t>(shape[i]);
    call.stride_out[d] = strides[0][i];
    call.a.stride[d] = strides[1][i];
    call.b.stride[d] = strides[2][i];
  }
  if (is_empty(r)) return;
  const py::gil_scoped_release unlocked;
  const OnDevice on(device);
  Status status = on.status;
  if (status == 0) status = mitchell_apply(*multiplier, call, stream_of(stream));
  const py::gil_scoped_acquire locked;
  raise_unless_ok(status);
}

// da and db have the shapes of a and b, dy that of the result.
void grad(const Multiplier& multiplier, const Multiplier& product, int op, int mode, int dtype, const py::object& a,
          const py::object& b, const py::object& dy, const py::object& da, const py::object& db, int device,
          std::uintptr_t stream) {
  constexpr std::size_t kArrays = 5;
  const char* const names[kArrays] = {"dy", "a", "b", "da", "db"};
  const Array arrays[kArrays] = {array_of(dy), array_of(a), array_of(b), array_of(da), array_of(db)};
  if ((op != FASTOPS_MUL && op != FASTOPS_DIV) || mode < 0 || mode > FASTOPS_GRADIENT_MIMIC || dtype < 0 ||
      dtype > FASTOPS_F64)
    throw py::value_error("op, mode or dtype is out of range");
  const std::size_t item = kItemSize[dtype];
  std::vector<std::ptrdiff_t> strides[kArrays], shape;
  for (std::size_t k = 0; k < kArrays; ++k) {
    if (arrays[k].is_number) throw py::value_error(std::string(names[k]) + " must be an array");
    want_aligned(arrays[k], item, names[k]);
    strides[k] = broadcast(arrays[k], arrays[0].shape, names[k]);
    // Of the axes that an operand has not, a gradient has none either.
    if (k >= 3 && arrays[k].shape != arrays[k - 2].shape)
      throw py::value_error(std::string(names[k]) + " must have the shape of " + names[k - 2]);
    for (std::size_t other = 0; k >= 3 && other < k; ++other)
      refuse_overlap(arrays[k], item, arrays[other], item, names[other], false);
  }
  ElementwiseGradient call{};
  call.op = static_cast<fastops_mitchell_op>(op);
  call.mode = static_cast<fastops_gradient>(mode);
  call.dtype = static_cast<fastops_dtype>(dtype);
  call.ndim = merge(arrays[0].shape, strides, kMaxDimensions, &shape);
  Strided* const operands[kArrays] = {&call.dy, &call.a, &call.b, &call.da, &call.db};
  for (int d = 0; d < call.ndim; ++d) {
    const auto i = static_cast<std::size_t>(d);
    call.shape[d] = static_cast<std::size_t>(shape[i]);
    for (std::size_t k = 0; k < kArrays; ++k) operands[k]->stride[d] = strides[k][i];
  }
  for (std::size_t k = 0; k < kArrays; ++k) operands[k]->data = reinterpret_cast<const void*>(arrays[k].data);
  if (is_empty(arrays[3]) && is_empty(arrays[4])) return;
  const Workspace workspace(mitchell_gradient_workspace(*multiplier, call), device, stream);
  const OnDevice on(device);
  raise_unless_ok(on.status);
  raise_unless_ok(mitchell_gradient(*multiplier, *product, call, workspace.data(), stream_of(stream)));
}

// The matrices of x, along whose leading axes it is repeated to those of the result.
Matrices matrices_of(const Array& x, const std::vector<std::ptrdiff_t>& batch) {
  Matrices m{reinterpret_cast<const void*>(x.data), {}, x.strides[x.strides.size() - 2], x.strides.back()};
  for (std::size_t d = 0; d < batch.size(); ++d) m.batch[kBatchDimensions - batch.size() + d] = batch[d];
  return m;
}
Matmul matmul_of(const Array& a, const Array& b, const Array& out) {
  const std::size_t n = out.shape.size();
  if (a.is_number || b.is_number || out.is_number || n < 2 || a.shape.size() < 2 || b.shape.size() < 2)
    throw py::value_error("matrices must have at least two axes");
  const auto rows = out.shape[n - 2], cols = out.shape[n - 1], depth = a.shape.back();
  if (a.shape[a.shape.size() - 2] != rows || b.shape.back() != cols || b.shape[b.shape.size() - 2] != depth)
    throw py::value_error("matrices must have shapes that multiply");
  const std::vector<std::ptrdiff_t> batch(out.shape.begin(), out.shape.end() - 2);
  const auto leading = [&](const Array& x, const char* name) {
    Array lead;
    lead.shape.assign(x.shape.begin(), x.shape.end() - 2);
    lead.strides.assign(x.strides.begin(), x.strides.end() - 2);
    return broadcast(lead, batch, name);
  };
  std::vector<std::ptrdiff_t> strides[3] = {leading(out, "out"), leading(a, "a"), leading(b, "b")}, merged;
  merge(batch, strides, kBatchDimensions, &merged);
  Matmul call{};
  std::fill(call.batch, call.batch + kBatchDimensions, std::size_t{1});
  for (std::size_t d = 0; d < merged.size(); ++d)
    call.batch[kBatchDimensions - merged.size() + d] = static_cast<std::size_t>(merged[d]);
  call.rows = static_cast<std::size_t>(rows);
  call.cols = static_cast<std::size_t>(cols);
  call.depth = static_cast<std::size_t>(depth);
  call.out = matrices_of(out, strides[0]);
  call.a = matrices_of(a, strides[1]);
  call.b = matrices_of(b, strides[2]);
  return call;
}
void matmul(const Multiplier& multiplier, int dtype, const py::object& a, const py::object& b, const py::object& out,
            int device, std::uintptr_t stream) {
  const Array x = array_of(a), y = array_of(b), r = array_of(out);
  if (dtype < 0 || dtype > FASTOPS_F64) throw py::value_error("dtype is out of range");
  Matmul call = matmul_of(x, y, r);
  call.dtype = static_cast<fastops_dtype>(dtype);
  want_aligned(x, kItemSize[dtype], "a");
  want_aligned(y, kItemSize[dtype], "b");
  want_aligned(r, kItemSize[dtype], "out");
  refuse_overlap(r, kItemSize[dtype], x, kItemSize[dtype], "a", false);
  refuse_overlap(r, kItemSize[dtype], y, kItemSize[dtype], "b", false);
  if (is_empty(r)) return;
  const OnDevice on(device);
  raise_unless_ok(on.status);
  raise_unless_ok(mitchell_matmul(&*multiplier, call, stream_of(stream)));
}

void lut(const py::object& a, const py::object& b, const py::buffer& table, bool wide_out, const py::object& out,
         int device, std::uintptr_t stream) {
  const Array x = array_of(a), y = array_of(b), r = array_of(out);
  Matmul call = matmul_of(x, y, r);
  const py::buffer_info entries = table.request();
  const bool wide_table = entries.itemsize == 8;
  // Without a term the table is not read.
  if (entries.size != 65536 || (entries.itemsize != 4 && !wide_table) || (wide_table && !wide_out && call.depth != 0))
    throw py::value_error("table must be 256 x 256 of int32, or of int64 beside an int64 result");
  refuse_overlap(r, wide_out ? 8 : 4, x, 1, "a", false);
  refuse_overlap(r, wide_out ? 8 : 4, y, 1, "b", false);
  if (is_empty(r)) return;
  const auto bytes = static_cast<std::size_t>(entries.size * entries.itemsize);
  const Memory memory(bytes, device, stream);
  const OnDevice on(device);
  raise_unless_ok(on.status);
  raise_unless_ok(upload(memory.data(), entries.ptr, bytes, stream_of(stream)));
  raise_unless_ok(lut_matmul(call, memory.data(), wide_table && wide_out, wide_out, stream_of(stream)));
}

}  // namespace

void bind_mitchell(py::module_& m) {
  py::class_<Multiplier>(m, "Multiplier", "The constants of one operation, rounded for every dtype.",
                         py::module_local())
      .def(py::init<const py::tuple&>(), py::arg("spec"));
  m.def("apply", &apply, py::arg("multiplier"), py::arg("op"), py::arg("dtype"), py::arg("a"), py::arg("b"),
        py::arg("out"), py::arg("device"), py::arg("stream"),
        "out = op(a, b); arrays are (address, shape, strides in elements), operands may be numbers.");
  m.def("grad", &grad, py::arg("multiplier"), py::arg("product"), py::arg("op"), py::arg("mode"), py::arg("dtype"),
        py::arg("a"), py::arg("b"), py::arg("dy"), py::arg("da"), py::arg("db"), py::arg("device"), py::arg("stream"));
  m.def("matmul", &matmul, py::arg("multiplier"), py::arg("dtype"), py::arg("a"), py::arg("b"), py::arg("out"),
        py::arg("device"), py::arg("stream"));
  m.def("lut_matmul", &lut, py::arg("a"), py::arg("b"), py::arg("table"), py::arg("wide_out"), py::arg("out"),
        py::arg("device"), py::arg("stream"));
}

}  // namespace fastops::gpu
