// SPDX-License-Identifier: BSD-3-Clause
// Lists of tensors on a GPU: read, checked, written as a table into the device's memory, and kept for the next call.
#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <tuple>
#include <utility>

#include "cuda/cuda_bind.h"

namespace py = pybind11;

namespace fastops::gpu {
namespace {

constexpr std::size_t kItemSize[] = {2, 2, 4, 8};
constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
constexpr const char* kFloats = "float16, bfloat16, float32 or float64";
constexpr const char* kWide = "float32 or float64";

struct Role {
  std::string name, dtypes;
  bool written;
};

// "grads[3]", made up where it is wanted: there are thousands of tensors.
struct Name {
  const Role& role;
  std::size_t i;
  operator std::string() const { return role.name + "[" + std::to_string(i) + "]"; }
};
inline std::string operator+(const Name& name, const std::string& text) { return std::string(name) + text; }
inline std::string operator+(const std::string& text, const Name& name) { return text + std::string(name); }

struct View {
  void* data = nullptr;
  std::vector<std::int64_t> shape, strides;  // strides of axes of one element: 0
  fastops_dtype dtype = FASTOPS_F32;
  int device = 0;
  bool read_only = false;
  std::uint64_t size = 1;
};

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  text += shape.size() == 1 ? ",)" : ")";
  return text.size() > 40 ? text.substr(0, 37) + "..." : text;
}

void set_layout(View* v, const std::int64_t* shape, const std::int64_t* strides, std::size_t ndim) {
  v->shape.assign(shape, shape + ndim);
  v->strides.assign(ndim, 0);
  v->size = 1;
  std::int64_t expected = 1;
  for (std::size_t d = ndim; d-- > 0;) {
    if (shape[d] > 1) v->strides[d] = strides == nullptr ? expected : strides[d];
    expected *= shape[d];
    v->size *= static_cast<std::uint64_t>(shape[d]);
  }
}

// What Python's describe(name, object) answers: (address, shape, strides, dtype, device, read only).
void read(const py::handle& object, const Name& name, const py::function& describe, View* v) {
  const Exchange exchange = exchange_of(Py_TYPE(object.ptr()));
  if (exchange.functions != nullptr && exchange.writable) {
    DlTensor t;
    if (exchange.functions->view(object.ptr(), &t) != 0) {
      PyErr_Clear();
    } else if ((t.device_type == kDlCuda || t.device_type == kDlCudaManaged) && float_dtype(t, &v->dtype)) {
      v->data = static_cast<char*>(t.data) + t.byte_offset;
      v->device = t.device_id;
      v->read_only = false;
      set_layout(v, t.shape, t.strides, static_cast<std::size_t>(t.ndim));
      // One element may be a lazy negative, whose strides do not tell.
      if (v->size == 0 || (v->size != 1 && !is_low(v->data))) return;
    }
  }
  const auto answer = describe(std::string(name), object).cast<py::tuple>();
  v->data = reinterpret_cast<void*>(answer[0].cast<std::uintptr_t>());
  const auto shape = answer[1].cast<std::vector<std::int64_t>>(), strides = answer[2].cast<std::vector<std::int64_t>>();
  set_layout(v, shape.data(), strides.data(), shape.size());
  const int dtype = answer[3].cast<int>();
  if (dtype < 0 || dtype > FASTOPS_F64) throw py::type_error(std::string(name) + " must be of dtype " + kFloats);
  v->dtype = static_cast<fastops_dtype>(dtype);
  v->device = answer[4].cast<int>();
  v->read_only = answer[5].cast<bool>();
}

// Whether the elements fill a run of memory, each once, in some order of the axes.
bool is_dense(const View& v) {
  std::vector<std::size_t> order;
  for (std::size_t d = 0; d < v.shape.size(); ++d)
    if (v.shape[d] > 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return v.strides[a] < v.strides[b]; });
  std::int64_t expected = 1;
  for (const std::size_t d : order) {
    if (v.strides[d] != expected) return false;
    expected *= v.shape[d];
  }
  return true;
}

void check_dtype(const Role& role, const Name& name, fastops_dtype main, fastops_dtype got) {
  const bool wide = got >= FASTOPS_F32;
  bool fits = false;
  std::string wanted;
  if (role.dtypes == "wide") {
    fits = wide;
    wanted = kWide;
  } else if (role.dtypes == "shadow") {
    fits = got != FASTOPS_F16;
    wanted = "bfloat16, float32 or float64";
  } else if (role.dtypes == "float") {
    fits = true;
  } else if (role.dtypes == "gradient" && main == FASTOPS_F32) {
    fits = got != FASTOPS_F64;
    wanted = "float16, bfloat16 or float32";
  } else {
    fits = got == main;
    wanted = std::string(kNames[main]) + ", as the first list has there";
  }
  if (!fits) throw py::type_error(name + " must be of dtype " + wanted + ", got " + kNames[got]);
}

struct Contents {
  std::size_t roles = 0;
  int device = 0;
  unsigned written = 0;
  std::vector<Tensor> tensors;

  bool operator==(const Contents& other) const {
    return roles == other.roles && device == other.device && written == other.written &&
           tensors.size() == other.tensors.size() &&
           std::memcmp(tensors.data(), other.tensors.data(), tensors.size() * sizeof(Tensor)) == 0;
  }
};

// A tensor that is written must share no memory with any other.
void refuse_overlap(const std::vector<Role>& roles, const Contents& contents) {
  struct Span {
    std::uintptr_t low, high;
    std::size_t role, tensor;
  };
  std::vector<Span> spans;
  for (std::size_t i = 0; i < contents.tensors.size(); ++i)
    for (std::size_t r = 0; r < roles.size(); ++r) {
      const Tensor& t = contents.tensors[i];
      const auto low = reinterpret_cast<std::uintptr_t>(t.at[r]);
      if (t.size != 0) spans.push_back({low, low + t.size * kItemSize[t.dtype[r]], r, i});
    }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.low < b.low; });
  // The spans that reach furthest so far: of all, and of those that are written.
  const Span *all = nullptr, *written = nullptr;
  for (const Span& span : spans) {
    const bool writes = roles[span.role].written;
    const Span* other = writes ? all : written;
    if (other != nullptr && other->high > span.low) {
      const Span &first = writes ? span : *other, &second = writes ? *other : span;
      throw py::value_error(Name{roles[first.role], first.tensor} + " must be memory apart from " +
                            Name{roles[second.role], second.tensor} + ", got arrays that overlap");
    }
    if (all == nullptr || span.high > all->high) all = &span;
    if (writes && (written == nullptr || span.high > written->high)) written = &span;
  }
}

Contents read_lists(const std::vector<Role>& roles, const std::vector<py::list>& lists, const py::function& describe) {
  Contents c;
  c.roles = roles.size();
  const std::size_t count = lists[0].size();
  for (std::size_t r = 0; r < roles.size(); ++r) {
    if (roles[r].written) c.written |= 1u << r;
    if (lists[r].size() != count)
      throw py::value_error(roles[r].name + " must be a list of " + std::to_string(count) + " arrays, as many as " +
                            roles[0].name + ", got " + std::to_string(lists[r].size()));
  }
  c.tensors.resize(count);
  std::memset(static_cast<void*>(c.tensors.data()), 0, count * sizeof(Tensor));
  View main, v;
  for (std::size_t i = 0; i < count; ++i) {
    Tensor& t = c.tensors[i];
    bool packs = true;
    for (std::size_t r = 0; r < roles.size(); ++r) {
      // Reading may run Python code, which may change the lists.
      if (i >= lists[r].size()) throw std::runtime_error("arrays must stay as they are during a call");
      const py::object object = lists[r][i];
      const Name name{roles[r], i};
      read(object, name, describe, &v);
      if (r == 0) main = v;
      check_dtype(roles[r], name, main.dtype, v.dtype);
      if (v.shape != main.shape)
        throw py::value_error(name + " must be of shape " + shape_text(main.shape) + " as " + Name{roles[0], i} +
                              ", got " + shape_text(v.shape));
      if (r == 0 ? !is_dense(v) : v.strides != main.strides)
        throw py::value_error(name +
                              (r == 0 ? " must be an array without gaps (a contiguous() one)"
                                      : " must be in the memory order of " + Name{roles[0], i}) +
                              ", got strides " + shape_text(v.strides));
      if (roles[r].written && v.read_only) throw py::value_error(name + " must be writable, got a read-only array");
      if (i == 0 && r == 0) c.device = v.device;
      if (v.device != c.device)
        throw py::value_error(name + " must be on device " + std::to_string(c.device) + ", where " + roles[0].name +
                              "[0] is, got one on device " + std::to_string(v.device));
      t.at[r] = v.data;
      t.size = v.size;
      t.dtype[r] = static_cast<std::uint8_t>(v.dtype);
      const auto address = reinterpret_cast<std::uintptr_t>(v.data);
      want_aligned(address, kItemSize[v.dtype], name);
      packs = packs && address % std::min<std::size_t>(4 * kItemSize[v.dtype], 16) == 0;
    }
    t.packs = packs;
  }
  return c;
}

constexpr const char* kNotThere =
    "a call whose list is not on the GPU yet: call once before, with the same memory, and wait for it";

// A table in the device's memory. It holds no tensor: who launches with it knows that they live.
class Plan {
 public:
  Plan(Contents contents, std::uintptr_t stream) : contents_(std::move(contents)) {
    std::vector<Chunk> chunks;
    for (std::size_t i = 0; i < contents_.tensors.size(); ++i)
      for (std::uint64_t first = 0; first < contents_.tensors[i].size; first += kChunk)
        chunks.push_back({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(first / kChunk)});
    table_.chunk_count = chunks.size();
    if (chunks.empty()) return;
    const std::size_t head = contents_.tensors.size() * sizeof(Tensor), tail = chunks.size() * sizeof(Chunk);
    const Stream first = stream_of(stream);
    const Launching on(contents_.device);
    refuse_capture(first, kNotThere);
    raise_unless_ok(allocate(&memory_, head + tail, first));
    auto* const at = static_cast<char*>(memory_);
    Status status = upload(at, contents_.tensors.data(), head, first);
    if (status == 0) status = upload(at + head, chunks.data(), tail, first);
    if (status == 0) status = uploaded_.record(first);
    if (status != 0) {
      uploaded_.reset();
      (void)release(memory_, first);
      raise_unless_ok(status);
    }
    table_.tensors = reinterpret_cast<const Tensor*>(at);
    table_.chunks = reinterpret_cast<const Chunk*>(at + head);
  }
  ~Plan() {
    if (memory_ == nullptr) return;
    const OnReleased on(contents_.device);
    if (untold_ && !captured_) {
      release_when_idle(memory_, contents_.device);
    } else if (!captured_) {  // a graph may be launched at any time
      uses_.release(memory_, contents_.device, &uploaded_);
    }
    uses_.clear();
    uploaded_.reset();
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  const Contents& contents() const { return contents_; }

  // Launches on a stream: f(table) on the plan's device. The plan outlives streams, so it names none but this one.
  template <class F> void launch(std::uintptr_t handle, const F& f) {
    if (memory_ == nullptr) return;
    const Launching on(contents_.device);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Stream stream = stream_of(handle);
    ready_ = ready_ || uploaded_.is_done();
    if (goes_into_graph(stream)) {
      // The capture may have begun since the table was sent.
      if (!ready_) refuse_capture(stream, kNotThere);
      captured_ = true;
      return raise_unless_ok(f(table_));
    }
    if (!ready_) raise_unless_ok(uploaded_.precede(stream));
    const bool before = std::exchange(untold_, true);
    raise_unless_ok(f(table_));
    raise_unless_ok(uses_.record(handle));
    untold_ = before;
  }

 private:
  Contents contents_;
  TensorTable table_{};
  void* memory_ = nullptr;
  Event uploaded_;
  bool ready_ = false, captured_ = false;
  bool untold_ = false;  // of a launch it is not known when it ends
  Uses uses_;            // launches
  std::mutex mutex_;
};
using PlanPtr = std::shared_ptr<Plan>;

// The latest plans: a training loop calls with the same few lists again and again.
class Plans {
 public:
  PlanPtr find(const Contents& contents) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if ((*it)->contents() == contents) {
        kept_.splice(kept_.begin(), kept_, it);
        return kept_.front();
      }
    return nullptr;
  }
  void keep(const PlanPtr& plan) {
    PlanPtr last;
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_front(plan);
    if (kept_.size() > kMost) {
      last = kept_.back();
      kept_.pop_back();
    }
  }
  void clear() {
    std::list<PlanPtr> all;
    const std::lock_guard<std::mutex> lock(mutex_);
    all.swap(kept_);
  }

 private:
  static constexpr std::size_t kMost = 8;
  std::mutex mutex_;
  std::list<PlanPtr> kept_;
};
Plans& plans() {
  static auto* const kept = new Plans;  // outlives the driver's shutdown
  return *kept;
}

PlanPtr plan(const py::sequence& roles, const py::sequence& lists, const py::function& describe,
             std::uintptr_t stream) {
  std::vector<Role> parsed;
  std::vector<py::list> items;
  for (const py::handle role : roles) {
    const auto fields = py::reinterpret_borrow<py::tuple>(role);
    parsed.push_back({fields[0].cast<std::string>(), fields[2].cast<std::string>(), fields[1].cast<bool>()});
  }
  for (const py::handle list : lists) items.push_back(py::list(py::reinterpret_borrow<py::object>(list)));
  if (parsed.empty() || parsed.size() > kRoles || parsed.size() != items.size())
    throw py::value_error("roles and lists must be as many, five at most");
  Contents contents = read_lists(parsed, items, describe);
  if (PlanPtr found = plans().find(contents)) return found;
  refuse_overlap(parsed, contents);
  const auto made = std::make_shared<Plan>(std::move(contents), stream);
  plans().keep(made);
  return made;
}

void want_roles(const Plan& plan, std::size_t roles) {
  if (plan.contents().roles != roles && !plan.contents().tensors.empty())
    throw py::value_error("the plan must have " + std::to_string(roles) + " roles");
}

void ema(Plan& plan, const py::object& weight, const py::object& seed, std::uintptr_t stream) {
  want_roles(plan, 2);
  const bool random = !seed.is_none();
  const std::uint64_t number = random ? seed.cast<std::uint64_t>() : 0;
  const auto& tensors = plan.contents().tensors;
  for (std::size_t i = 0; i < tensors.size() && !random; ++i)
    if (tensors[i].dtype[1] == FASTOPS_BF16)
      throw py::type_error("shadows[" + std::to_string(i) + "] must be of dtype " + kWide +
                           ", or bfloat16 with rounding='stochastic', got bfloat16");
  if (PyFloat_Check(weight.ptr())) {
    const double w = weight.cast<double>();
    plan.launch(stream, [&](const TensorTable& table) {
      return ema_update(table, w, nullptr, random ? &number : nullptr, stream_of(stream));
    });
    return;
  }
  const auto weights = weight.cast<std::vector<double>>();
  if (weights.size() != tensors.size()) throw py::value_error("weights must be as many as tensors");
  if (weights.empty()) return;
  plan.launch(stream, [&](const TensorTable& table) {
    const Memory memory(weights.size() * sizeof(double), plan.contents().device, stream);
    const Status status = upload(memory.data(), weights.data(), weights.size() * sizeof(double), stream_of(stream));
    if (status != 0) return status;
    return ema_update(table, 0.0, static_cast<const double*>(memory.data()), random ? &number : nullptr,
                      stream_of(stream));
  });
}

void sgd(Plan& plan, const py::tuple& s, bool has_momentum, bool has_ema, std::uintptr_t stream) {
  want_roles(plan, 2 + has_momentum + has_ema);
  const fastops_sgd step{s[0].cast<double>(),
                         s[1].cast<double>(),
                         s[2].cast<double>(),
                         s[3].cast<double>(),
                         s[4].cast<double>(),
                         s[7].cast<double>(),
                         s[5].cast<bool>(),
                         s[6].cast<bool>(),
                         s[8].cast<bool>(),
                         has_momentum,
                         has_ema};
  plan.launch(stream, [&](const TensorTable& table) { return sgd_step(table, step, stream_of(stream)); });
}

void adamw(Plan& plan, const py::tuple& s, bool has_ema, std::uintptr_t stream) {
  want_roles(plan, 4 + has_ema);
  const fastops_adamw step{s[0].cast<double>(),
                           s[1].cast<double>(),
                           s[2].cast<double>(),
                           s[3].cast<double>(),
                           s[4].cast<double>(),
                           s[5].cast<double>(),
                           s[6].cast<double>(),
                           s[7].cast<double>(),
                           s[8].cast<double>(),
                           s[9].cast<bool>(),
                           has_ema};
  plan.launch(stream, [&](const TensorTable& table) { return adamw_step(table, step, stream_of(stream)); });
}

}  // namespace

void bind_optim(py::module_& m) {
  py::class_<Plan, PlanPtr>(m, "Plan", "The table of a list of tensors in a device's memory; it keeps no tensor alive.",
                            py::module_local())
      .def_property_readonly("device", [](const Plan& p) { return p.contents().device; })
      .def_property_readonly("count", [](const Plan& p) { return p.contents().tensors.size(); });
  m.def("plan", &plan, py::arg("roles"), py::arg("lists"), py::arg("describe"), py::arg("stream"),
        "The lists, one for each role (name, written, dtypes), read and checked.");
  m.def("forget_plans", [] { plans().clear(); }, "Frees the tables kept for the next call.");
  m.def("ema_update", &ema, py::arg("plan"), py::arg("weight"), py::arg("seed"), py::arg("stream"));
  m.def("sgd_step", &sgd, py::arg("plan"), py::arg("step"), py::arg("has_momentum"), py::arg("has_ema"),
        py::arg("stream"));
  m.def("adamw_step", &adamw, py::arg("plan"), py::arg("step"), py::arg("has_ema"), py::arg("stream"));
}

}  // namespace fastops::gpu
