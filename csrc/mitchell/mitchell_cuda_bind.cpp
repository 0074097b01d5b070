// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic on a GPU for Python: operands as (address, shape, strides), axes merged, one launch.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <utility>

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

void apply(const Multiplier& multiplier, int op, int dtype, const py::object& a, const py::object& b,
           const py::object& out, int device, std::uintptr_t stream) {
  const Array x = array_of(a), y = array_of(b), r = array_of(out);
  if (op < 0 || op > FASTOPS_EXP2 || dtype < 0 || dtype > FASTOPS_F64 || r.is_number)
    throw py::value_error("op or dtype is out of range");
  const std::size_t item = kItemSize[dtype];
  want_aligned(x.data, item, "a");
  want_aligned(y.data, item, "b");
  want_aligned(r.data, item, "out");
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
  const Launching on(device);
  raise_unless_ok(mitchell_apply(*multiplier, call, stream_of(stream)));
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
    want_aligned(arrays[k].data, item, names[k]);
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
  const Launching on(device);
  const Workspace workspace(mitchell_gradient_workspace(*multiplier, call), device, stream);
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
  want_aligned(x.data, kItemSize[dtype], "a");
  want_aligned(y.data, kItemSize[dtype], "b");
  want_aligned(r.data, kItemSize[dtype], "out");
  refuse_overlap(r, kItemSize[dtype], x, kItemSize[dtype], "a", false);
  refuse_overlap(r, kItemSize[dtype], y, kItemSize[dtype], "b", false);
  if (is_empty(r)) return;
  const Launching on(device);
  raise_unless_ok(mitchell_matmul(&*multiplier, call, stream_of(stream)));
}

// Gradients of matrix products, convolutions and theirs.

void add_axis(Index* index, std::ptrdiff_t length) { index->length[index->axes++] = static_cast<std::size_t>(length); }
Index index_of(std::initializer_list<std::ptrdiff_t> lengths) {
  Index index{};
  for (const std::ptrdiff_t length : lengths) add_axis(&index, length);
  return index;
}
Walk walk_of(std::initializer_list<std::ptrdiff_t> strides) {
  Walk walk{};
  std::copy(strides.begin(), strides.end(), walk.stride);
  return walk;
}
// All of it is there.
Gathered gathered(const Array& x) {
  Gathered g{};
  g.data = reinterpret_cast<const void*>(x.data);
  g.height = g.width = 1;
  return g;
}

GatheredMatmul gathered_call(int dtype, const Multiplier* multiplier, int mode, bool second) {
  GatheredMatmul call{};
  std::fill(call.batch, call.batch + kBatchDimensions, std::size_t{1});
  call.dtype = static_cast<fastops_dtype>(dtype);
  call.terms = mode == FASTOPS_GRADIENT_EXACT ? Terms::kSlopes
               : mode == FASTOPS_GRADIENT_STE ? Terms::kExact
                                              : Terms::kProducts;
  // The slope is taken in the operand that the gradient belongs to; mimicked products have dy where that is.
  call.transposed = (mode == FASTOPS_GRADIENT_EXACT) == second;
  const bool flush = (**multiplier).params.flush != 0 && mode != FASTOPS_GRADIENT_STE;
  call.a.flush = call.point.flush = flush;
  call.b.flush = flush && mode != FASTOPS_GRADIENT_EXACT;
  return call;
}
void set_places(Gathered* to, const Array& x) {
  const bool flush = to->flush;
  *to = gathered(x);
  to->flush = flush;
}

void run(const Multiplier& multiplier, const GatheredMatmul* calls, std::size_t count, int device,
         std::uintptr_t stream) {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < count; ++i) bytes = std::max(bytes, mitchell_gathered_workspace(calls[i]));
  const Launching on(device);
  const Workspace workspace(bytes, device, stream);
  for (std::size_t i = 0; i < count; ++i)
    raise_unless_ok(mitchell_gathered(&*multiplier, calls[i], workspace.data(), stream_of(stream)));
}

// The gradient in x, of a product with `other`, shaped as x: for each step k of the product's depth and element i of
// x's other axis the sum over n, the result's other axis, and over what the batch repeats.
GatheredMatmul matmul_gradient(GatheredMatmul call, bool second, const Array& x, const Array& other, const Array& dy,
                               const Array& gradient) {
  const std::size_t n = dy.shape.size();
  const std::vector<std::ptrdiff_t> batch(dy.shape.begin(), dy.shape.end() - 2);
  const auto leading = [&](const Array& each, const char* name) {
    Array lead;
    lead.shape.assign(each.shape.begin(), each.shape.end() - 2);
    lead.strides.assign(each.strides.begin(), each.strides.end() - 2);
    return broadcast(lead, batch, name);
  };
  std::vector<std::ptrdiff_t> strides[4] = {leading(dy, "dy"), leading(other, "the other operand"), leading(x, "x"),
                                            leading(gradient, "the gradient")};
  std::vector<std::ptrdiff_t> merged;
  merge(batch, strides, kBatchDimensions, &merged);
  set_places(&call.a, other);
  set_places(&call.b, dy);
  set_places(&call.point, x);
  set_places(&call.out, gradient);
  int kept = kBatchDimensions;
  for (std::size_t d = merged.size(); d-- > 0;) {
    if (strides[3][d] == 0) continue;
    --kept;
    call.batch[kept] = static_cast<std::size_t>(merged[d]);
    Gathered* const arrays[] = {&call.b, &call.a, &call.point, &call.out};
    for (std::size_t k = 0; k < 4; ++k) arrays[k]->batch[kept] = strides[k][d];
  }
  for (std::size_t d = 0; d < merged.size(); ++d) {
    if (strides[3][d] != 0) continue;
    call.b.row.stride[call.depth.axes] = strides[0][d];
    call.a.col.stride[call.depth.axes] = strides[1][d];
    add_axis(&call.depth, merged[d]);
  }
  // Of x and other: the axis that both have (k), and the one of their own; dy has these two.
  const auto k_of = [&](const Array& each, bool is_second) {
    return each.strides[each.strides.size() - (is_second ? 2 : 1)];
  };
  const auto own_of = [&](const Array& each, bool is_second) {
    return each.strides[each.strides.size() - (is_second ? 1 : 2)];
  };
  const std::ptrdiff_t lengths[] = {dy.shape[n - 2], dy.shape[n - 1]}, steps[] = {dy.strides[n - 2], dy.strides[n - 1]};
  call.rows = index_of({x.shape[x.shape.size() - (second ? 2 : 1)]});
  call.cols = index_of({lengths[second ? 1 : 0]});
  call.a.row = walk_of({k_of(other, !second)});
  call.a.col.stride[call.depth.axes] = own_of(other, !second);
  call.b.row.stride[call.depth.axes] = steps[second ? 0 : 1];
  add_axis(&call.depth, lengths[second ? 0 : 1]);
  call.b.col = walk_of({steps[second ? 1 : 0]});
  for (auto [g, each] : {std::pair{&call.point, &x}, std::pair{&call.out, &gradient}}) {
    g->row = walk_of({k_of(*each, second)});
    g->col = walk_of({own_of(*each, second)});
  }
  return call;
}

void check_gradients(int mode, int dtype, std::initializer_list<std::pair<const char*, const Array*>> arrays,
                     std::size_t inputs) {
  if (mode < 0 || mode > FASTOPS_GRADIENT_MIMIC || dtype < 0 || dtype > FASTOPS_F64)
    throw py::value_error("mode or dtype is out of range");
  const auto* const first = arrays.begin();
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const auto& [name, x] = first[i];
    if (x->is_number || x->shape.size() < 2) throw py::value_error(std::string(name) + " must have two axes or more");
    want_aligned(x->data, kItemSize[dtype], name);
    for (std::size_t k = 0; i >= inputs && k < i; ++k)
      refuse_overlap(*x, kItemSize[dtype], *first[k].second, kItemSize[dtype], first[k].first, false);
  }
}

void matmul_grad(const Multiplier& multiplier, int mode, int dtype, const py::object& a, const py::object& b,
                 const py::object& dy, const py::object& da, const py::object& db, int device, std::uintptr_t stream) {
  const Array x = array_of(a), y = array_of(b), g = array_of(dy), dx = array_of(da), dw = array_of(db);
  check_gradients(mode, dtype, {{"a", &x}, {"b", &y}, {"dy", &g}, {"da", &dx}, {"db", &dw}}, 3);
  matmul_of(x, y, g);
  if (dx.shape != x.shape || dw.shape != y.shape) throw py::value_error("gradients must have their operands' shapes");
  for (const bool second : {false, true}) {
    const GatheredMatmul call = matmul_gradient(gathered_call(dtype, &multiplier, mode, second), second, second ? y : x,
                                                second ? x : y, g, second ? dw : dx);
    run(multiplier, &call, 1, device, stream);
  }
}

// Vertical first.
using Pair = std::array<std::ptrdiff_t, 2>;
struct Convolution {
  Array x, w, y;  // y: the result, or its gradient
  Pair stride, padding, dilation;
  std::ptrdiff_t groups;
  std::ptrdiff_t images() const { return x.shape[0]; }
  std::ptrdiff_t channels() const { return w.shape[1]; }  // of a group
  std::ptrdiff_t filters() const { return w.shape[0] / groups; }
};
void check(const Convolution& c) {
  for (const Array* each : {&c.x, &c.w, &c.y})
    if (each->is_number || each->shape.size() != 4) throw py::value_error("images and kernels must have four axes");
  const auto in = [](const Pair& values, std::ptrdiff_t low) {
    return std::all_of(values.begin(), values.end(), [&](std::ptrdiff_t v) { return v >= low && v < kMostPixels; });
  };
  if (c.groups < 1 || !in(c.stride, 1) || !in(c.padding, 0) || !in(c.dilation, 1) || c.w.shape[0] % c.groups != 0 ||
      c.x.shape[1] != c.channels() * c.groups || c.y.shape[0] != c.images() || c.y.shape[1] != c.w.shape[0])
    throw py::value_error("a convolution's settings must fit its arrays");
  for (std::size_t d = 0; d < 2; ++d) {
    const std::ptrdiff_t size = c.x.shape[2 + d], kernel = c.w.shape[2 + d];
    const std::ptrdiff_t padded = size + 2 * c.padding[d], reach = c.dilation[d] * (kernel - 1) + 1;
    if (kernel < 1 || size >= kMostPixels || padded >= kMostPixels || padded < reach ||
        c.y.shape[2 + d] != (padded - reach) / c.stride[d] + 1)
      throw py::value_error("a convolution's sizes must fit its arrays, whose padded sides are below 2**29");
  }
}

// The patches of x: (channel, kernel row, kernel column) x (image, row, column) of a group.
Index taps_of(const Convolution& c) { return index_of({c.channels(), c.w.shape[2], c.w.shape[3]}); }
Index positions_of(const Convolution& c) { return index_of({c.images(), c.y.shape[2], c.y.shape[3]}); }
void set_patches(Gathered* g, const Convolution& c, Walk* taps, Walk* positions) {
  const std::vector<std::ptrdiff_t>& s = c.x.strides;
  set_places(g, c.x);
  g->batch[kBatchDimensions - 1] = c.channels() * s[1];
  g->offset = -c.padding[0] * s[2] - c.padding[1] * s[3];
  g->y = static_cast<std::int32_t>(-c.padding[0]);
  g->x = static_cast<std::int32_t>(-c.padding[1]);
  g->height = static_cast<std::int32_t>(c.x.shape[2]);
  g->width = static_cast<std::int32_t>(c.x.shape[3]);
  *taps = walk_of({s[1], c.dilation[0] * s[2], c.dilation[1] * s[3]});
  *positions = walk_of({s[0], c.stride[0] * s[2], c.stride[1] * s[3]});
  taps->y[1] = static_cast<std::int32_t>(c.dilation[0]);
  taps->x[2] = static_cast<std::int32_t>(c.dilation[1]);
  positions->y[1] = static_cast<std::int32_t>(c.stride[0]);
  positions->x[2] = static_cast<std::int32_t>(c.stride[1]);
}
// Kernels, or their gradient: filter x (channel, kernel row, kernel column).
void set_kernels(Gathered* g, const Convolution& c, const Array& w, Walk* filters, Walk* taps) {
  set_places(g, w);
  g->batch[kBatchDimensions - 1] = c.filters() * w.strides[0];
  *filters = walk_of({w.strides[0]});
  *taps = walk_of({w.strides[1], w.strides[2], w.strides[3]});
}
// The result, or its gradient: filter x (image, row, column).
void set_result(Gathered* g, const Convolution& c, Walk* filters, Walk* positions) {
  const std::vector<std::ptrdiff_t>& s = c.y.strides;
  set_places(g, c.y);
  g->batch[kBatchDimensions - 1] = c.filters() * s[1];
  *filters = walk_of({s[1]});
  *positions = walk_of({s[0], s[2], s[3]});
}

// The axes of an index by the steps that `by` takes along them, the smallest last: threads run along that one, and
// images may have their channels together.
void put_in_order(Index* index, const Walk* by, std::initializer_list<Walk*> walks) {
  int order[kIndexAxes];
  std::iota(order, order + index->axes, 0);
  std::stable_sort(order, order + index->axes,
                   [&](int x, int y) { return std::abs(by->stride[x]) > std::abs(by->stride[y]); });
  const Index before = *index;
  for (int d = 0; d < index->axes; ++d) index->length[d] = before.length[order[d]];
  for (Walk* walk : walks) {
    const Walk old = *walk;
    for (int d = 0; d < index->axes; ++d) {
      walk->stride[d] = old.stride[order[d]];
      walk->y[d] = old.y[order[d]];
      walk->x[d] = old.x[order[d]];
    }
  }
}

// With the axes of its depth in the order that its kernel takes them.
GatheredMatmul as_pixels(GatheredMatmul call) {
  call.results = Results::kPixels;
  if (mitchell_is_depthwise(call)) return call;
  call.results = Results::kMatrix;
  const Walk taps = call.b.row;
  const std::size_t filters = call.depth.length[0];
  put_in_order(&call.depth, &taps, {&call.a.col, &call.b.row});
  // The taps of one filter no longer lie together where filters come last.
  if (call.b.row.stride[0] != taps.stride[0]) call.taps *= filters;
  return call;
}
GatheredMatmul convolution(GatheredMatmul call, const Convolution& c) {
  call.batch[kBatchDimensions - 1] = static_cast<std::size_t>(c.groups);
  call.rows = index_of({c.filters()});
  call.depth = taps_of(c);
  call.cols = positions_of(c);
  set_kernels(&call.a, c, c.w, &call.a.row, &call.a.col);
  set_patches(&call.b, c, &call.b.row, &call.b.col);
  set_result(&call.out, c, &call.out.row, &call.out.col);
  return as_pixels(call);
}
GatheredMatmul kernel_gradient(GatheredMatmul call, const Convolution& c, const Array& dw) {
  call.batch[kBatchDimensions - 1] = static_cast<std::size_t>(c.groups);
  call.rows = taps_of(c);
  call.depth = positions_of(c);
  call.cols = index_of({c.filters()});
  set_patches(&call.a, c, &call.a.row, &call.a.col);
  set_result(&call.b, c, &call.b.col, &call.b.row);
  set_kernels(&call.point, c, c.w, &call.point.col, &call.point.row);
  set_kernels(&call.out, c, dw, &call.out.col, &call.out.row);
  call.results = Results::kTaps;
  if (mitchell_is_depthwise(call)) return call;
  call.results = Results::kMatrix;
  const Walk taps = call.a.row;
  put_in_order(&call.rows, &taps, {&call.a.row, &call.point.row, &call.out.row});
  return call;
}

// Taps first, first + every, ... of a kernel meet the rows (columns) of an image that are `every` steps of the stride
// apart, from `pixel` on: there is no other product among those of all taps with all of them.
struct Phase {
  std::ptrdiff_t first, every, taps, pixel, pixels, position;  // position: of the result at the first of both
};
std::vector<Phase> phases_of(const Convolution& c, std::size_t d) {
  const std::ptrdiff_t stride = c.stride[d], dilation = c.dilation[d], kernel = c.w.shape[2 + d];
  const std::ptrdiff_t every = stride / std::gcd(stride, dilation), size = c.x.shape[2 + d];
  std::vector<Phase> phases;
  for (std::ptrdiff_t first = 0; first < std::min(every, kernel); ++first) {
    // Pixel + padding = tap * dilation + position * stride.
    const std::ptrdiff_t pixel = ((first * dilation - c.padding[d]) % stride + stride) % stride;
    if (pixel >= size) continue;
    phases.push_back({first, every, (kernel - 1 - first) / every + 1, pixel, (size - 1 - pixel) / stride + 1,
                      (pixel + c.padding[d] - first * dilation) / stride});
  }
  return phases;
}
GatheredMatmul image_gradient(GatheredMatmul call, const Convolution& c, const Array& dx, const Phase& down,
                              const Phase& across) {
  const std::vector<std::ptrdiff_t>&w = c.w.strides, &s = c.y.strides;
  call.batch[kBatchDimensions - 1] = static_cast<std::size_t>(c.groups);
  call.skips = true;
  call.taps = static_cast<std::size_t>(down.taps * across.taps);
  call.rows = index_of({c.channels()});
  call.depth = index_of({c.filters(), down.taps, across.taps});
  call.cols = index_of({c.images(), down.pixels, across.pixels});
  // From the last tap to the first, so that the results that they meet follow one another.
  const std::ptrdiff_t back_y = down.every * c.dilation[0] / c.stride[0], last_y = down.taps - 1;
  const std::ptrdiff_t back_x = across.every * c.dilation[1] / c.stride[1], last_x = across.taps - 1;
  set_places(&call.a, c.w);
  call.a.batch[kBatchDimensions - 1] = c.filters() * w[0];
  call.a.offset = (down.first + last_y * down.every) * w[2] + (across.first + last_x * across.every) * w[3];
  call.a.row = walk_of({w[1]});
  call.a.col = walk_of({w[0], -down.every * w[2], -across.every * w[3]});
  set_places(&call.b, c.y);
  call.b.batch[kBatchDimensions - 1] = c.filters() * s[1];
  const std::ptrdiff_t first_y = down.position - last_y * back_y, first_x = across.position - last_x * back_x;
  call.b.offset = first_y * s[2] + first_x * s[3];
  call.b.y = static_cast<std::int32_t>(first_y);
  call.b.x = static_cast<std::int32_t>(first_x);
  call.b.height = static_cast<std::int32_t>(c.y.shape[2]);
  call.b.width = static_cast<std::int32_t>(c.y.shape[3]);
  call.b.row = walk_of({s[1], back_y * s[2], back_x * s[3]});
  call.b.row.y[1] = static_cast<std::int32_t>(back_y);
  call.b.row.x[2] = static_cast<std::int32_t>(back_x);
  call.b.col = walk_of({s[0], s[2], s[3]});
  call.b.col.y[1] = call.b.col.x[2] = 1;
  for (auto [g, each] : {std::pair{&call.point, &c.x}, std::pair{&call.out, &dx}}) {
    const std::vector<std::ptrdiff_t>& t = each->strides;
    set_places(g, *each);
    g->batch[kBatchDimensions - 1] = c.channels() * t[1];
    g->offset = down.pixel * t[2] + across.pixel * t[3];
    g->row = walk_of({t[1]});
    g->col = walk_of({t[0], c.stride[0] * t[2], c.stride[1] * t[3]});
  }
  return as_pixels(call);
}

void conv2d(const Multiplier& multiplier, int dtype, const py::object& x, const py::object& w, const Pair& stride,
            const Pair& padding, const Pair& dilation, std::ptrdiff_t groups, const py::object& out, int device,
            std::uintptr_t stream) {
  const Convolution c{array_of(x), array_of(w), array_of(out), stride, padding, dilation, groups};
  check(c);
  check_gradients(0, dtype, {{"x", &c.x}, {"w", &c.w}, {"out", &c.y}}, 2);
  if (is_empty(c.y)) return;
  GatheredMatmul call = gathered_call(dtype, &multiplier, FASTOPS_GRADIENT_MIMIC, true);
  const GatheredMatmul one = convolution(call, c);
  run(multiplier, &one, 1, device, stream);
}
// dx must lie together: it is cleared where no tap reaches it.
void conv2d_grad(const Multiplier& multiplier, int mode, int dtype, const py::object& x, const py::object& w,
                 const py::object& dy, const Pair& stride, const Pair& padding, const Pair& dilation,
                 std::ptrdiff_t groups, const py::object& dx, const py::object& dw, int device, std::uintptr_t stream) {
  const Convolution c{array_of(x), array_of(w), array_of(dy), stride, padding, dilation, groups};
  const Array image = array_of(dx), kernel = array_of(dw);
  check(c);
  check_gradients(mode, dtype, {{"x", &c.x}, {"w", &c.w}, {"dy", &c.y}, {"dx", &image}, {"dw", &kernel}}, 3);
  if (image.shape != c.x.shape || kernel.shape != c.w.shape)
    throw py::value_error("gradients must have their operands' shapes");
  const auto item = static_cast<std::ptrdiff_t>(kItemSize[dtype]);
  const std::ptrdiff_t size =
      std::accumulate(image.shape.begin(), image.shape.end(), item, std::multiplies<std::ptrdiff_t>());
  if (!is_empty(image)) {
    if (const Span span = span_of(image, kItemSize[dtype]); span.high - span.low != static_cast<std::uintptr_t>(size))
      throw py::value_error("dx must lie together");
    const std::vector<Phase> down = phases_of(c, 0), across = phases_of(c, 1);
    std::vector<GatheredMatmul> calls;
    std::ptrdiff_t reached = 0;
    for (const Phase& y : down)
      for (const Phase& z : across) {
        calls.push_back(image_gradient(gathered_call(dtype, &multiplier, mode, true), c, image, y, z));
        reached += y.pixels * z.pixels;
      }
    if (reached != c.x.shape[2] * c.x.shape[3]) {
      const Launching on(device);
      const Span span = span_of(image, kItemSize[dtype]);
      raise_unless_ok(clear(reinterpret_cast<void*>(span.low), static_cast<std::size_t>(size), stream_of(stream)));
    }
    run(multiplier, calls.data(), calls.size(), device, stream);
  }
  if (!is_empty(kernel)) {
    const GatheredMatmul call = kernel_gradient(gathered_call(dtype, &multiplier, mode, false), c, kernel);
    run(multiplier, &call, 1, device, stream);
  }
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
  want_aligned(r.data, wide_out ? 8 : 4, "out");
  refuse_overlap(r, wide_out ? 8 : 4, x, 1, "a", false);
  refuse_overlap(r, wide_out ? 8 : 4, y, 1, "b", false);
  if (is_empty(r)) return;
  const auto bytes = static_cast<std::size_t>(entries.size * entries.itemsize);
  const Launching on(device);
  const Memory memory(bytes, device, stream);
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
  m.def("matmul_grad", &matmul_grad, py::arg("multiplier"), py::arg("mode"), py::arg("dtype"), py::arg("a"),
        py::arg("b"), py::arg("dy"), py::arg("da"), py::arg("db"), py::arg("device"), py::arg("stream"));
  m.def("conv2d", &conv2d, py::arg("multiplier"), py::arg("dtype"), py::arg("x"), py::arg("w"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("out"), py::arg("device"),
        py::arg("stream"));
  m.def("conv2d_grad", &conv2d_grad, py::arg("multiplier"), py::arg("mode"), py::arg("dtype"), py::arg("x"),
        py::arg("w"), py::arg("dy"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("dx"), py::arg("dw"), py::arg("device"), py::arg("stream"));
  m.def("lut_matmul", &lut, py::arg("a"), py::arg("b"), py::arg("table"), py::arg("wide_out"), py::arg("out"),
        py::arg("device"), py::arg("stream"));
}

}  // namespace fastops::gpu
