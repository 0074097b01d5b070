// SPDX-License-Identifier: BSD-3-Clause
// The optimizer steps for Python: lists of arrays to pointers, the GIL released, one call.
//
// A list is "plain" where every element is a NumPy array or a tensor that tells its memory through DLPack's C exchange
// interface, all shapes and dtypes fit and nothing overlaps. What is not plain is left to the caller, who words the
// error or brings arrays that fit.
#include "optim/optim_bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "core/python_call.h"
#include "core/tensor_exchange.h"
#include "core/tensor_home.h"
#include "fastops/fastops.h"

namespace py = pybind11;

namespace fastops {
namespace {

constexpr std::size_t kItemSize[] = {2, 2, 4, 8};
constexpr std::uint8_t kNoDtype = 255;
constexpr int kMaxDimensions = 64;  // of fastops_layout, and of NumPy

// One array.

struct View {
  char* data;
  std::size_t size;
  std::uint8_t dtype;
  bool contiguous, writable;
  bool doubtful;  // of torch: its bytes may be no values, even where its memory was seen before
  int ndim;
  const py::ssize_t* shape;
  const py::ssize_t* strides;  // in units of `unit` bytes; null where contiguous
  py::ssize_t unit;
};

std::uint8_t dtype_of(PyObject* descriptor) {
  struct Known {
    PyObject* descriptor;
    std::uint8_t dtype;
  };
  static thread_local std::vector<Known> known;
  for (const Known& entry : known)
    if (entry.descriptor == descriptor) return entry.dtype;
  const py::dtype dtype = py::reinterpret_borrow<py::dtype>(descriptor);
  std::uint8_t found = kNoDtype;
  const bool native = dtype.byteorder() != (PY_BIG_ENDIAN ? '<' : '>');
  if (native && dtype.num() == 23) found = FASTOPS_F16;
  if (native && dtype.num() == 11) found = FASTOPS_F32;
  if (native && dtype.num() == 12) found = FASTOPS_F64;
  constexpr int kFirstUserType = 256;
  if (dtype.num() >= kFirstUserType && dtype.itemsize() == 2 &&
      py::str(static_cast<py::object>(dtype.attr("name"))).cast<std::string>() == "bfloat16")
    found = FASTOPS_BF16;
  constexpr std::size_t kMost = 16;
  if (known.size() < kMost) {
    known.push_back({descriptor, found});
    Py_INCREF(descriptor);
  }
  return found;
}

bool is_contiguous(const py::ssize_t* shape, const py::ssize_t* strides, int ndim, py::ssize_t unit) {
  for (int axis = ndim; axis-- > 0;) {
    if (shape[axis] > 1 && strides[axis] != unit) return false;
    unit *= shape[axis];
  }
  return true;
}

// False where the object is of another kind.
bool view_tensor(PyObject* object, View* v) {
  const Exchange exchange = exchange_of(Py_TYPE(object));
  if (exchange.functions == nullptr) return false;
  DlTensor t;
  if (exchange.functions->view(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device_type != kDlCpu || t.lanes != 1 || t.ndim > kMaxDimensions) return false;
  fastops_dtype dtype{};
  v->dtype = float_dtype(t, &dtype) ? static_cast<std::uint8_t>(dtype) : kNoDtype;
  static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t));
  v->data = static_cast<char*>(t.data) + t.byte_offset;
  v->ndim = t.ndim;
  v->shape = reinterpret_cast<const py::ssize_t*>(t.shape);
  v->strides = reinterpret_cast<const py::ssize_t*>(t.strides);
  v->writable = exchange.writable;
  v->size = 1;
  for (int axis = 0; axis < v->ndim; ++axis) v->size *= static_cast<std::size_t>(v->shape[axis]);
  v->unit = v->dtype == kNoDtype ? 0 : static_cast<py::ssize_t>(kItemSize[v->dtype]);
  v->contiguous = v->strides == nullptr || is_contiguous(v->shape, v->strides, v->ndim, 1);
  // Parts of complex tensors, whose sign may be put off, have strides or one element.
  v->doubtful = v->size != 0 && (!v->contiguous || v->size == 1 || is_low(v->data));
  return true;
}

constexpr int kContiguousFlag = 0x0001, kWriteableFlag = 0x0400;

// The dtype asked for last: most lists hold one.
struct LatestDtype {
  PyObject* descriptor = nullptr;
  std::uint8_t dtype = kNoDtype;
  std::uint8_t of(PyObject* asked) {
    if (asked != descriptor) {
      dtype = dtype_of(asked);
      descriptor = asked;
    }
    return dtype;
  }
};

inline const py::detail::PyArray_Proxy& fields(PyObject* array) { return *py::detail::array_proxy(array); }

// A number that differs between shapes of the same size, short of an accident.
inline std::uint64_t shape_of(const py::ssize_t* shape, int ndim) {
  std::uint64_t hash = 0;
  for (int axis = 0; axis < ndim; ++axis) hash = hash * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(shape[axis]);
  return hash;
}
inline std::size_t size_of(const py::detail::PyArray_Proxy& array) {
  std::size_t size = 1;
  for (int axis = 0; axis < array.nd; ++axis) size *= static_cast<std::size_t>(array.dimensions[axis]);
  return size;
}

inline void view_array(PyObject* object, LatestDtype& latest, View* v) {
  const auto& array = fields(object);
  *v = {array.data,
        size_of(array),
        latest.of(array.descr),
        (array.flags & kContiguousFlag) != 0,
        (array.flags & kWriteableFlag) != 0,
        false,
        array.nd,
        array.dimensions,
        array.strides,
        1};
}

PyTypeObject* g_array = nullptr;        // numpy.ndarray
PyTypeObject* g_tensor_list = nullptr;  // fastops.TensorList

PyObject* interned(const char* text) {
  PyObject* const name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

struct Bytes {
  std::uintptr_t low, high;
};
Bytes bytes_of(const View& v) {
  const auto first = reinterpret_cast<std::uintptr_t>(v.data);
  if (v.size == 0) return {first, first};
  const std::size_t item = v.dtype == kNoDtype ? 1 : kItemSize[v.dtype];
  if (v.contiguous) return {first, first + item * v.size};
  Bytes all{first, first + item};
  for (int axis = 0; axis < v.ndim; ++axis) {
    if (v.shape[axis] == 1) continue;  // its stride may be any number
    const py::ssize_t span = v.strides[axis] * v.unit * (v.shape[axis] - 1);
    (span < 0 ? all.low : all.high) += static_cast<std::uintptr_t>(span);
  }
  return all;
}

// Whether these bytes of a tensor of torch are its storage's and hold its values. What DLPack's C interface does not
// tell: that the memory holds the negatives (the imaginary part of a conjugate), and that the storage was resized under
// its tensor. Runs Python code, in which other threads may get their turn; a subclass may forbid to look.
bool is_plain(PyObject* tensor, Bytes bytes, Home* home = nullptr) {
  struct Questions {
    py::object is_neg, untyped_storage, nbytes, data_ptr;
  };
  // Of the class, which a subclass cannot hide.
  static const Questions* known = nullptr;
  try {
    if (known == nullptr) {
      const py::object torch = py::module_::import("sys").attr("modules").attr("get")("torch");
      if (torch.is_none()) return false;
      const py::object tensors = torch.attr("Tensor"), storages = torch.attr("UntypedStorage");
      known = new Questions{tensors.attr("is_neg"), tensors.attr("untyped_storage"), storages.attr("nbytes"),
                            storages.attr("data_ptr")};
    }
    const auto ask = [](const py::object& question, PyObject* object) {
      PyObject* const answer = PyObject_CallOneArg(question.ptr(), object);
      if (answer == nullptr) throw py::error_already_set();
      return py::reinterpret_steal<py::object>(answer);
    };
    if (ask(known->is_neg, tensor).ptr() != Py_False) return false;
    const py::object storage = ask(known->untyped_storage, tensor);
    const auto length = ask(known->nbytes, storage.ptr()).cast<std::size_t>();
    const auto first = ask(known->data_ptr, storage.ptr()).cast<std::uintptr_t>();
    const std::uintptr_t low = bytes.low, high = bytes.high;
    if (low != high && (low < first || high < low || low - first > length || high - first > length)) return false;
    if (home != nullptr) *home = {address_of(tensor), address_of(storage.ptr())};
    return true;
  } catch (const py::error_already_set&) {
    return false;
  }
}

inline bool is_array(PyObject* object) { return Py_TYPE(object) == g_array; }

// What an array was when it was last looked at.
struct Record {
  char* data = nullptr;
  PyObject* dtype = nullptr;  // the descriptor; of other libraries' tensors its number
  std::size_t size = 0;
  std::uint64_t shape = 0;
  int ndim = 0, flags = 0;

  bool is_like(const Record& other) const {
    return dtype == other.dtype && size == other.size && shape == other.shape && ndim == other.ndim &&
           flags == other.flags;
  }
  bool operator==(const Record& other) const { return data == other.data && is_like(other); }
};
inline Record record_of_array(PyObject* object) {
  const auto& array = fields(object);
  return {array.data, array.descr, size_of(array), shape_of(array.dimensions, array.nd), array.nd, array.flags};
}
inline Record record_of_tensor(const View& v) {
  const int flags = (v.contiguous ? kContiguousFlag : 0) | (v.writable ? kWriteableFlag : 0);
  PyObject* const dtype = reinterpret_cast<PyObject*>(static_cast<std::uintptr_t>(v.dtype));
  return {v.data, dtype, v.size, shape_of(v.shape, v.ndim), v.ndim, flags};
}

// What a TensorList's arrays were when they were last looked at.
class Plan {
 public:
  Plan() : id_(++g_ids) {}
  std::uint64_t id() const { return id_; }
  std::uint64_t version() const { return version_; }
  bool foreign() const { return foreign_; }

  // Where the elements are kept that are tensors of torch.
  const std::vector<Home>& homes() const { return homes_; }

  // Looks at every array; the version changes where one of them did. `trusts`: not at tensors of other libraries, once
  // they were seen. False where an element cannot be read: then those before it count as not seen.
  bool look(PyObject* const* items, std::size_t count, bool trusts) {
    struct Forget {
      std::vector<Record>* records;
      ~Forget() {
        if (records != nullptr) records->clear();
      }
    } otherwise{&records_};
    if (!compare(items, count, trusts)) return false;
    otherwise.records = nullptr;
    return true;
  }

 private:
  bool compare(PyObject* const* items, std::size_t count, bool trusts) {
    bool same = records_.size() == count;
    if (!same) {
      records_.assign(count, {});
      homes_.assign(count, {});
    }
    struct Asked {
      std::size_t item;
      Bytes bytes;
    };
    std::vector<Asked> asked;
    for (std::size_t i = 0; i < count; ++i) {
      Record now;
      if (__builtin_expect(is_array(items[i]), 1)) {
        now = record_of_array(items[i]);
        if (now == records_[i]) continue;
      } else {
        if (same && trusts) continue;
        if (i + kAhead < count) homes_[i + kAhead].fetch(items[i + kAhead]);
        View v;
        if (!view_tensor(items[i], &v)) return false;
        now = record_of_tensor(v);
        foreign_ = true;
        const bool stays = now == records_[i];
        if (v.doubtful || (v.writable && !stays)) asked.push_back({i, bytes_of(v)});
        if (stays) continue;
      }
      records_[i] = now;
      same = false;
    }
    if (!same) ++version_;
    for (const Asked& x : asked)
      if (!is_plain(items[x.item], x.bytes, &homes_[x.item])) return false;
    return true;
  }

  inline static std::atomic<std::uint64_t> g_ids{0};
  const std::uint64_t id_;
  std::uint64_t version_ = 0;
  bool foreign_ = false;
  std::vector<Record> records_;
  std::vector<Home> homes_;
};

// Lists of arrays.

// The attributes of a TensorList.
struct Slots {
  PyObject *arrays = interned("_arrays"), *busy = interned("_busy"), *plan = interned("_plan"),
           *verify = interned("_verify");
  PyObject* nobody = PyLong_FromLong(0);
};
const Slots& slots() {
  static const Slots* const names = new Slots;
  return *names;
}
py::object get_slot(const py::object& owner, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(owner.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
void set_slot(const py::object& owner, PyObject* name, PyObject* value) {
  if (PyObject_SetAttr(owner.ptr(), name, value) != 0) throw py::error_already_set();
}

// The elements of an argument: those of a list, a tuple or a TensorList, which is then marked as taken.
class Items {
 public:
  Items() = default;
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() {
    if (taken_ && PyObject_SetAttr(owner_.ptr(), slots().busy, slots().nobody) != 0) PyErr_Clear();
  }
  bool open(const py::object& argument, const Items* others, std::size_t count) {
    owner_ = argument;
    sequence_ = argument;
    if (Py_TYPE(argument.ptr()) == g_tensor_list) {
      bool mine = false;
      for (std::size_t i = 0; i < count; ++i) mine = mine || others[i].owner_.ptr() == argument.ptr();
      if (!mine) {
        // The process whose call uses it: what a fork interrupts does not go on in the child.
        const py::int_ process(getpid());
        if (get_slot(argument, slots().busy).equal(process)) return false;
        set_slot(argument, slots().busy, process.ptr());
        taken_ = true;
      }
      sequence_ = get_slot(argument, slots().arrays);
      trusts_ = get_slot(argument, slots().verify).ptr() == Py_False;
      py::object plan = get_slot(argument, slots().plan);
      if (plan.is_none()) {
        plan = py::cast(new Plan, py::return_value_policy::take_ownership);
        set_slot(argument, slots().plan, plan.ptr());
      }
      plan_ = plan.cast<Plan*>();
      held_plan_ = std::move(plan);
    }
    return PyList_CheckExact(sequence_.ptr()) || PyTuple_CheckExact(sequence_.ptr());
  }
  std::size_t size() const { return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence_.ptr())); }
  PyObject** items() const { return PySequence_Fast_ITEMS(sequence_.ptr()); }
  // That of a TensorList, from which nobody can drop an element while the call runs.
  Plan* plan() const { return plan_; }
  bool look() const { return plan_->look(items(), size(), trusts_); }

 private:
  py::object owner_, sequence_, held_plan_;
  Plan* plan_ = nullptr;
  bool taken_ = false, trusts_ = false;
};

struct Span {
  std::uintptr_t low, high;
  bool written;
};

// [low, high) of a strided tensor whose first element is at `low`.
void extent(const fastops_layout& layout, std::size_t role, std::size_t item, std::uintptr_t& low,
            std::uintptr_t& high) {
  high = low + item;
  const auto ndim = static_cast<std::size_t>(layout.ndim);
  for (std::size_t axis = 0; axis < ndim; ++axis) {
    const std::ptrdiff_t span = layout.strides[role * ndim + axis] * (layout.shape[axis] - 1);
    (span < 0 ? low : high) += static_cast<std::uintptr_t>(span);
  }
}

// The lists of one call, and what the latest calls of this thread were found to be: lists whose addresses, sizes and
// dtypes are the same again need no second search for overlaps.
class Lists {
 public:
  bool torch = false;

  // False where the lists are not plain. `checked`: overlaps were ruled out.
  bool read(const std::vector<py::object>& arguments, unsigned written, bool checked) {
    const std::size_t roles = arguments.size();
    if (roles > FASTOPS_MAX_ROLES) return false;
    for (std::size_t r = 0; r < roles; ++r)
      if (!items_[r].open(arguments[r], items_, r)) return false;
    const std::size_t count = items_[0].size();
    for (std::size_t r = 1; r < roles; ++r)
      if (items_[r].size() != count) return false;
    Memory& m = memory();
    if (m.in_use) return false;  // a call from within a call of this thread
    m.in_use = true;
    memory_ = &m;
    bool planned = true, partly = false;
    std::vector<std::uint64_t> keys;
    for (std::size_t r = 0; r < roles; ++r) {
      const Plan* const plan = items_[r].plan();
      if (plan != nullptr && !items_[r].look()) return false;
      planned = planned && plan != nullptr;
      partly = partly || plan != nullptr;
      torch = torch || (plan != nullptr && plan->foreign());
      keys.push_back(plan == nullptr ? 0 : plan->id());
      keys.push_back(plan == nullptr ? 0 : plan->version());
    }
    // Looking may have run Python code, in which lists may have changed.
    for (std::size_t r = 0; r < roles; ++r) {
      if (items_[r].size() != count) return false;
      elements_[r] = items_[r].items();
    }
    if (!partly) keys.clear();
    const bool mixed = partly && !planned;
    hold(m, roles, count);
    for (Signature& s : m.kept)
      if (partly && s.keys == keys && s.written == written && (planned || follows(m, s, roles, written))) {
        list_ = {count, roles, s.size.data(), s.data.data(), s.dtype.data(), nullptr};
        return true;
      }
    m.data.resize(count * roles);
    m.dtype.resize(count * roles);
    m.size.resize(count);
    m.layout.clear();
    m.layouts.clear();
    m.tensors.clear();
    for (std::size_t i = 0; i < count; ++i)
      if (!read_contiguous(m, i, roles, written) && !read_tensor(m, i, roles, written)) return false;
    list_ = {count, roles, m.size.data(), m.data.data(), m.dtype.data(), m.layout.empty() ? nullptr : m.layout.data()};
    const bool known = !partly && !checked && m.known(roles, written);
    if (!checked && !known && overlaps(m, roles, written)) return false;
    if (!planned && !m.tensors.empty()) {
      // Where the same memory was found plain before, a lazy sign can only be met where one element makes it dense.
      for (const Tensor& x : m.tensors)
        if ((!known || x.doubtful) && !is_plain(x.object, x.bytes)) return false;
    }
    if (!checked && !known && m.layout.empty()) {
      Signature& s = m.remember(roles, written);
      if (mixed) keep_given(m, s, roles, count);
      s.keys = std::move(keys);  // last: asking a tensor may have raised an error
    }
    return true;
  }
  const fastops_tensor_list* get() const { return &list_; }
  Lists() = default;
  Lists(const Lists&) = delete;
  Lists& operator=(const Lists&) = delete;
  ~Lists() {
    if (memory_ == nullptr) return;
    // Dropping the last reference of an array may run Python code, which may call again.
    std::vector<PyObject*> held;
    held.swap(memory_->held);
    memory_->in_use = false;
    for (PyObject* object : held) Py_DECREF(object);
    held.clear();
    if (!memory_->in_use) held.swap(memory_->held);
  }

 private:
  struct Signature {
    std::size_t roles = 0;
    unsigned written = 0;
    std::vector<void*> data;
    std::vector<std::size_t> size;
    std::vector<std::uint8_t> dtype;
    std::vector<std::uint64_t> keys;  // id and version of every role's plan, 0 without one; empty where none has one
    // Where some have one: what the lists without one held, list by list, and the memory that is written, in its order.
    std::vector<Record> given;
    std::vector<Home> homes;
    std::vector<Span> spans;
  };
  struct Layout {
    fastops_layout head;
    std::vector<std::ptrdiff_t> numbers;  // shape, then strides of every role
  };
  struct Moved {
    std::size_t at, given;  // in Signature::data and Signature::given
    char* data;
  };
  struct Tensor {
    PyObject* object;
    Bytes bytes;
    bool doubtful;
  };
  struct Memory {
    bool in_use = false;
    std::vector<void*> data;
    std::vector<std::size_t> size;
    std::vector<std::uint8_t> dtype;
    std::vector<const fastops_layout*> layout;
    std::deque<Layout> layouts;
    std::vector<PyObject*> held;
    std::vector<Tensor> tensors;  // of other libraries
    std::vector<Span> spans;
    std::vector<Moved> moved;
    static constexpr std::size_t kKept = 4;
    Signature kept[kKept];
    std::size_t next = 0;

    bool known(std::size_t roles, unsigned written) const {
      if (!layout.empty()) return false;
      for (const Signature& s : kept)
        if (s.roles == roles && s.written == written && s.size == size && s.data == data && s.dtype == dtype)
          return true;
      return false;
    }
    // Without keys, by which lists with a plan find it.
    Signature& remember(std::size_t roles, unsigned written) {
      Signature& s = kept[next];
      s.roles = 0;
      s.keys.clear();
      s.given.clear();
      s.homes.clear();
      s.spans.clear();
      s.data = data;
      s.size = size;
      s.dtype = dtype;
      s.written = written;
      s.roles = roles;
      next = (next + 1) % kKept;
      return s;
    }
  };
  static Memory& memory() {
    static thread_local Memory m;
    return m;
  }

  // Keeps the elements of lists without a plan, and goes on with these: asking one may run Python code, in which lists
  // change, as they may while others have their turn.
  void hold(Memory& m, std::size_t roles, std::size_t count) {
    std::size_t lists = 0;
    for (std::size_t r = 0; r < roles; ++r) lists += items_[r].plan() == nullptr;
    m.held.reserve(lists * count);  // so that it stays where it is
    for (std::size_t r = 0; r < roles; ++r) {
      if (items_[r].plan() != nullptr) continue;
      PyObject* const* const first = m.held.data() + m.held.size();
      for (std::size_t i = 0; i < count; ++i) Py_INCREF(elements_[r][i]);
      m.held.insert(m.held.end(), elements_[r], elements_[r] + count);
      elements_[r] = first;
    }
  }
  void keep_given(const Memory& m, Signature& s, std::size_t roles, std::size_t count) {
    for (std::size_t r = 0; r < roles; ++r)
      for (std::size_t i = 0; i < count && items_[r].plan() == nullptr; ++i) {
        Record now;
        Home home;
        View v;
        char* const data = static_cast<char*>(s.data[i * roles + r]);
        if (is_array(elements_[r][i])) {
          now = record_of_array(elements_[r][i]);
        } else {
          home.tensor = address_of(elements_[r][i]);
          if (view_tensor(elements_[r][i], &v)) now = record_of_tensor(v);
        }
        // What asked it may have changed it: then a record of no tensor, so that it is read anew.
        if (now.data != data || now.size != s.size[i]) now = {};
        now.data = data;
        s.given.push_back(now);
        s.homes.push_back(home);
      }
    // Overlaps were ruled out, and the search left all memory in its order.
    for (const Span& span : m.spans)
      if (span.written) s.spans.push_back(span);
  }
  // Whether the lists without a plan hold tensors like the latest ones, at the same addresses or others that may be
  // read: gradients are made anew in each step.
  bool follows(Memory& m, Signature& s, std::size_t roles, unsigned written) {
    const std::size_t count = s.size.size();
    m.moved.clear();
    bool foreign = false;
    std::size_t k = 0, near = 0;  // m.held has the elements in the same order as Signature::given
    for (std::size_t r = 0; r < roles; ++r)
      for (std::size_t i = 0; i < count && items_[r].plan() == nullptr; ++i, ++k) {
        Record now;
        View v;
        PyObject* const element = m.held[k];
        const bool array = is_array(element);
        if (array) {
          now = record_of_array(element);
        } else {
          if (k + kAhead < m.held.size()) s.homes[k + kAhead].fetch(m.held[k + kAhead]);
          if (!view_tensor(element, &v)) return false;
          now = record_of_tensor(v);
          if (v.doubtful && !is_plain(element, bytes_of(v))) return false;
        }
        const bool stays = now.data == s.given[k].data;
        if (!now.is_like(s.given[k])) return false;
        if (!stays) {
          const auto low = reinterpret_cast<std::uintptr_t>(now.data);
          const std::size_t bytes = now.size * kItemSize[s.dtype[i * roles + r]];
          if ((written >> r & 1) || !is_apart(s.spans, low, low + bytes, near)) return false;
          const bool asked = array || v.doubtful || !v.writable;
          if (!asked && bytes > 0 && !is_plain(element, {low, low + bytes})) return false;
          m.moved.push_back({i * roles + r, k, now.data});
        }
        foreign = foreign || !array;
      }
    for (const Moved& moved : m.moved) s.data[moved.at] = s.given[moved.given].data = moved.data;
    torch = torch || foreign;
    return true;
  }
  // Whether [low, high) shares nothing with spans that are in order and apart. `near` is where to look first: tensors
  // made one after the other mostly lie so.
  static bool is_apart(const std::vector<Span>& spans, std::uintptr_t low, std::uintptr_t high, std::size_t& near) {
    const auto fits = [&](std::size_t k) {
      return (k == 0 || spans[k - 1].high <= low) && (k == spans.size() || spans[k].low >= high);
    };
    if (low == high || fits(near)) return true;
    const auto next = std::lower_bound(spans.begin(), spans.end(), low,
                                       [](const Span& span, std::uintptr_t at) { return span.low < at; });
    near = static_cast<std::size_t>(next - spans.begin());
    return fits(near);
  }

  // The short way of the usual tensor: NumPy's arrays, contiguous, of the dtypes that the last one had.
  bool read_contiguous(Memory& m, std::size_t i, std::size_t roles, unsigned written) {
    if (!m.layout.empty() || !is_array(elements_[0][i])) return false;
    const auto& first = fields(elements_[0][i]);
    for (std::size_t r = 0; r < roles; ++r) {
      if (!is_array(elements_[r][i])) return false;
      const auto& array = fields(elements_[r][i]);
      const int wanted = (written >> r & 1) ? kContiguousFlag | kWriteableFlag : kContiguousFlag;
      if (array.descr != latest_[r].descriptor || (array.flags & wanted) != wanted || array.nd != first.nd)
        return false;
      for (int axis = 0; axis < first.nd; ++axis)
        if (array.dimensions[axis] != first.dimensions[axis]) return false;
      m.data[i * roles + r] = array.data;
      m.dtype[i * roles + r] = latest_[r].dtype;
    }
    m.size[i] = size_of(first);
    return true;
  }
  bool read_tensor(Memory& m, std::size_t i, std::size_t roles, unsigned written) {
    View views[FASTOPS_MAX_ROLES];
    bool contiguous = true;
    for (std::size_t r = 0; r < roles; ++r) {
      View& v = views[r];
      if (is_array(elements_[r][i])) {
        view_array(elements_[r][i], latest_[r], &v);
      } else {
        if (!view_tensor(elements_[r][i], &v)) return false;
        // Those of a TensorList have been asked.
        if ((v.writable || v.doubtful) && items_[r].plan() == nullptr)
          m.tensors.push_back({elements_[r][i], bytes_of(v), v.doubtful});
        torch = true;
      }
      if (v.dtype == kNoDtype || ((written >> r & 1) && !v.writable) || v.ndim != views[0].ndim) return false;
      for (int axis = 0; axis < v.ndim; ++axis)
        if (v.shape[axis] != views[0].shape[axis]) return false;
      contiguous = contiguous && v.contiguous;
      m.data[i * roles + r] = v.data;
      m.dtype[i * roles + r] = v.dtype;
    }
    m.size[i] = views[0].size;
    if (!contiguous && views[0].size > 0) add_layout(m, i, views, roles);
    if (!m.layout.empty()) m.layout.resize(i + 1, nullptr);
    return true;
  }

  void add_layout(Memory& m, std::size_t i, const View* views, std::size_t roles) {
    const auto ndim = static_cast<std::size_t>(views[0].ndim);
    m.layouts.emplace_back();
    Layout& layout = m.layouts.back();
    layout.numbers.resize(ndim * (roles + 1));
    std::ptrdiff_t* const numbers = layout.numbers.data();
    for (std::size_t axis = 0; axis < ndim; ++axis) numbers[axis] = views[0].shape[axis];
    for (std::size_t r = 0; r < roles; ++r) {
      std::ptrdiff_t step = static_cast<std::ptrdiff_t>(kItemSize[views[r].dtype]);
      for (std::size_t axis = ndim; axis-- > 0;) {
        const bool dense = views[r].strides == nullptr, alone = views[r].shape[axis] == 1;
        numbers[(r + 1) * ndim + axis] = alone ? 0 : dense ? step : views[r].strides[axis] * views[r].unit;
        step *= views[r].shape[axis];
      }
    }
    layout.head = {views[0].ndim, numbers, numbers + ndim};
    m.layout.resize(i, nullptr);
    m.layout.push_back(&layout.head);
  }

  // Whether a written tensor may share memory with another, or with itself; the extents decide.
  static bool overlaps(Memory& m, std::size_t roles, unsigned written) {
    m.spans.clear();
    for (std::size_t i = 0; i < m.size.size(); ++i) {
      if (m.size[i] == 0) continue;
      const fastops_layout* const layout = m.layout.empty() ? nullptr : m.layout[i];
      for (std::size_t r = 0; r < roles; ++r) {
        const std::size_t item = kItemSize[m.dtype[i * roles + r]];
        auto low = reinterpret_cast<std::uintptr_t>(m.data[i * roles + r]), high = low + item * m.size[i];
        const bool writes = (written >> r & 1) != 0;
        if (layout != nullptr) {
          extent(*layout, r, item, low, high);
          if (writes && !is_injective(*layout, r, item)) return true;
        }
        m.spans.push_back({low, high, writes});
      }
    }
    std::sort(m.spans.begin(), m.spans.end(), [](const Span& a, const Span& b) { return a.low < b.low; });
    std::uintptr_t reached = 0, written_to = 0;
    for (const Span& span : m.spans) {
      if (span.low < (span.written ? reached : written_to)) return true;
      reached = std::max(reached, span.high);
      if (span.written) written_to = std::max(written_to, span.high);
    }
    return false;
  }
  // Sorted by stride, each axis steps over all that the smaller ones reach.
  static bool is_injective(const fastops_layout& layout, std::size_t role, std::size_t item) {
    std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> axes;
    const auto ndim = static_cast<std::size_t>(layout.ndim);
    for (std::size_t axis = 0; axis < ndim; ++axis)
      if (layout.shape[axis] > 1) axes.emplace_back(std::abs(layout.strides[role * ndim + axis]), layout.shape[axis]);
    std::sort(axes.begin(), axes.end());
    auto reach = static_cast<std::ptrdiff_t>(item);
    for (const auto& [stride, length] : axes) {
      if (stride < reach) return false;
      reach += stride * (length - 1);
    }
    return true;
  }
  Items items_[FASTOPS_MAX_ROLES];
  LatestDtype latest_[FASTOPS_MAX_ROLES];
  PyObject* const* elements_[FASTOPS_MAX_ROLES] = {};
  fastops_tensor_list list_{};
  Memory* memory_ = nullptr;
};

// Calls: 0 where the lists are not plain, 1 when it is done, 2 when tensors of another library were among them.

template <class F> int run_lists(const Lists& lists, const F& f) {
  const fastops_status status = unlocked([&](fastops_poll) { return f(lists.get()); });
  if (status == FASTOPS_INVALID) return 0;
  raise_unless_ok(status);
  return lists.torch ? 2 : 1;
}

template <class F>
int call_lists(const std::vector<py::object>& arguments, unsigned written, bool checked, const F& f) {
  Lists lists;
  return lists.read(arguments, written, checked) ? run_lists(lists, f) : 0;
}

int ema_update(const py::object& shadow_sets, const py::object& params, const py::object& weights,
               const py::object& seed, bool checked) {
  std::vector<py::object> arguments{params};
  for (const py::handle shadows : shadow_sets) arguments.push_back(py::reinterpret_borrow<py::object>(shadows));
  const std::size_t profiles = arguments.size() - 1;
  std::vector<double> numbers;
  bool per_tensor = false;
  for (const py::handle weight : weights) per_tensor = per_tensor || !PyFloat_CheckExact(weight.ptr());
  std::size_t count = 1;
  if (per_tensor) {
    const py::ssize_t n = PyObject_Length(params.ptr());
    if (n < 0) {
      PyErr_Clear();
      return 0;
    }
    count = static_cast<std::size_t>(n);
  }
  for (const py::handle weight : weights) {
    if (PyFloat_CheckExact(weight.ptr())) {
      numbers.insert(numbers.end(), count, PyFloat_AS_DOUBLE(weight.ptr()));
    } else {
      const auto many = weight.cast<std::vector<double>>();
      if (many.size() != count) return 0;
      numbers.insert(numbers.end(), many.begin(), many.end());
    }
  }
  if (numbers.size() != profiles * count) return 0;
  const bool random = !seed.is_none();
  const std::uint64_t start = random ? seed.cast<std::uint64_t>() : 0;
  return call_lists(arguments, ~1u, checked, [&](const fastops_tensor_list* list) {
    if (list->count == 0) return FASTOPS_OK;
    return fastops_ema_update(list, numbers.data(), per_tensor, random ? &start : nullptr);
  });
}

fastops_adamw adamw_of(const py::tuple& t) {
  return {t[0].cast<double>(),
          t[1].cast<double>(),
          t[2].cast<double>(),
          t[3].cast<double>(),
          t[4].cast<double>(),
          t[5].cast<double>(),
          t[6].cast<double>(),
          t[7].cast<double>(),
          t[8].cast<double>(),
          t[9].cast<bool>(),
          0};
}

int sgd_step(const py::object& params, const py::object& grads, const py::object& buffers, const py::object& ema,
             const py::tuple& t, bool checked) {
  fastops_sgd step{t[0].cast<double>(), t[1].cast<double>(), t[2].cast<double>(), t[3].cast<double>(),
                   t[4].cast<double>(), t[7].cast<double>(), t[5].cast<bool>(),   t[6].cast<bool>(),
                   t[8].cast<bool>(),   !buffers.is_none(),  !ema.is_none()};
  std::vector<py::object> arguments{params, grads};
  if (step.has_momentum) arguments.push_back(buffers);
  if (step.has_ema) arguments.push_back(ema);
  const unsigned written = (step.moves ? 1u : 0u) | (step.zero_grad ? 2u : 0u) | ~3u;
  return call_lists(arguments, written, checked,
                    [&](const fastops_tensor_list* list) { return fastops_sgd_step(list, &step); });
}

// `only_looks`: answers as a step would, and takes none.
int adamw_step(const py::object& params, const py::object& grads, const py::object& exp_avg,
               const py::object& exp_avg_sq, const py::object& ema, const py::tuple& numbers, bool checked,
               bool only_looks) {
  fastops_adamw step = adamw_of(numbers);
  step.has_ema = !ema.is_none();
  std::vector<py::object> arguments{params, grads, exp_avg, exp_avg_sq};
  if (step.has_ema) arguments.push_back(ema);
  Lists lists;
  if (!lists.read(arguments, step.zero_grad ? ~0u : ~2u, checked)) return 0;
  if (!only_looks)
    return run_lists(lists, [&](const fastops_tensor_list* list) { return fastops_adamw_step(list, &step); });
  fastops_tensor_list empty = *lists.get();
  const std::vector<std::size_t> nothing(empty.count);
  empty.size = nothing.data();
  return run_lists(lists, [&](const fastops_tensor_list*) { return fastops_adamw_step(&empty, &step); });
}

int lookahead_sync(const py::object& slow, const py::object& fast, double alpha, bool checked) {
  return call_lists({slow, fast}, 3u, checked,
                    [&](const fastops_tensor_list* list) { return fastops_lookahead_sync(list, alpha); });
}

int eg_step(const py::object& params, const py::object& grads, double lr, bool checked) {
  return call_lists({params, grads}, 1u, checked,
                    [&](const fastops_tensor_list* list) { return fastops_eg_step(list, lr); });
}

// Whether an address in [low, high) lies within the extent of a tensor.
bool touches(const fastops_tensor_list& list, std::uintptr_t low, std::uintptr_t high) {
  for (std::size_t k = 0; k < list.count * list.roles; ++k) {
    const std::size_t i = k / list.roles, item = kItemSize[list.dtype[k]];
    if (list.size[i] == 0) continue;
    auto first = reinterpret_cast<std::uintptr_t>(list.data[k]), last = first + item * list.size[i];
    if (list.layout != nullptr && list.layout[i] != nullptr) extent(*list.layout[i], k % list.roles, item, first, last);
    if (first < high && low < last) return true;
  }
  return false;
}

int adaptive_eg_step(const py::object& params, const py::object& grads, const py::object& momentum,
                     const py::object& update, const py::object& gain, py::array_t<double, py::array::c_style> scales,
                     const py::tuple& t, bool checked) {
  const fastops_adaptive_eg step{t[0].cast<double>(), t[1].cast<double>(), t[2].cast<double>(),
                                 t[3].cast<double>(), t[4].cast<double>(), t[5].cast<double>(),
                                 t[6].cast<double>(), t[7].cast<double>(), t[8].cast<double>()};
  double* const values = scales.mutable_data();
  const auto count = static_cast<std::size_t>(scales.size());
  return call_lists({params, grads, momentum, update, gain}, ~2u, checked, [&](const fastops_tensor_list* list) {
    const auto first = reinterpret_cast<std::uintptr_t>(values);
    if (list->count != count || (!checked && touches(*list, first, first + count * sizeof(double))))
      return FASTOPS_INVALID;
    return fastops_adaptive_eg_step(list, values, &step);
  });
}

int all_finite(const py::object& arrays, bool checked) {
  int answer = 0;
  const int done = call_lists({arrays}, 0u, checked,
                              [&](const fastops_tensor_list* list) { return fastops_all_finite(list, &answer); });
  return done == 0 ? -1 : answer;
}

// Lists of C-contiguous NumPy arrays of which everything was checked; rows of int64, flags of bool.
void lazy_adamw_rows(const py::list& params, const py::list& grads, const py::list& exp_avg, const py::list& exp_avg_sq,
                     const std::optional<py::list>& rows, const std::optional<py::list>& live, bool decays,
                     const py::tuple& numbers) {
  const fastops_adamw step = adamw_of(numbers);
  const std::size_t count = params.size();
  std::vector<std::size_t> size, row_size, row_count;
  std::vector<void*> data;
  std::vector<std::uint8_t> dtype;
  std::vector<const std::int64_t*> indices;
  std::vector<const std::uint8_t*> flags;
  const auto array = [](const py::list& list, std::size_t i) {
    View v{};
    LatestDtype latest;
    if (i >= list.size() || !py::isinstance<py::array>(list[i])) throw py::type_error("lists of arrays are wanted");
    view_array(list[i].ptr(), latest, &v);
    if (!v.contiguous) throw py::value_error("arrays must be C-contiguous");
    return v;
  };
  for (std::size_t i = 0; i < count; ++i) {
    for (const py::list* list : {&params, &grads, &exp_avg, &exp_avg_sq}) {
      const View v = array(*list, i);
      data.push_back(v.data);
      dtype.push_back(v.dtype);
    }
    const View v = array(params, i);
    size.push_back(v.size);
    row_size.push_back(v.shape[0] == 0 ? 0 : v.size / static_cast<std::size_t>(v.shape[0]));
    if (rows) {
      const View index = array(*rows, i);
      indices.push_back(reinterpret_cast<const std::int64_t*>(index.data));
      row_count.push_back(index.size);
    }
    if (live) flags.push_back(reinterpret_cast<const std::uint8_t*>(array(*live, i).data));
  }
  const fastops_tensor_list list{count, 4, size.data(), data.data(), dtype.data(), nullptr};
  call([&](fastops_poll) {
    return fastops_lazy_adamw_rows(&list, row_size.data(), rows ? indices.data() : nullptr, row_count.data(),
                                   live ? flags.data() : nullptr, decays, &step);
  });
}

}  // namespace

void bind_optim(py::module_& m) {
  using py::arg;
  g_array = reinterpret_cast<PyTypeObject*>(py::detail::npy_api::get().PyArray_Type_);
  py::class_<Plan>(m, "TensorPlan")
      .def_property_readonly("version", [](const Plan& plan) { return plan.version(); })
      .def("walk", [](const py::object& self, const py::tuple& tensors) {
        return walk(tensors, self, self.cast<const Plan&>().homes());
      });
  m.def(
      "register_tensor_list",
      [](const py::type& type) { g_tensor_list = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()); }, arg("type"));
  m.def("ema_update", &ema_update, arg("shadow_sets"), arg("params"), arg("weights"), arg("seed"), arg("checked"));
  m.def("sgd_step", &sgd_step, arg("params"), arg("grads"), arg("momentum_buffers"), arg("ema"), arg("step"),
        arg("checked"));
  m.def("adamw_step", &adamw_step, arg("params"), arg("grads"), arg("exp_avg"), arg("exp_avg_sq"), arg("ema"),
        arg("step"), arg("checked"), arg("only_looks") = false);
  m.def("lazy_adamw_rows", &lazy_adamw_rows, arg("params"), arg("grads"), arg("exp_avg"), arg("exp_avg_sq"),
        arg("rows"), arg("live"), arg("decays"), arg("step"));
  m.def("lookahead_sync", &lookahead_sync, arg("slow"), arg("fast"), arg("alpha"), arg("checked"));
  m.def("eg_step", &eg_step, arg("params"), arg("grads"), arg("lr"), arg("checked"));
  m.def("adaptive_eg_step", &adaptive_eg_step, arg("params"), arg("grads"), arg("momentum"), arg("update"), arg("gain"),
        arg("scales"), arg("step"), arg("checked"));
  m.def("all_finite", &all_finite, arg("arrays"), arg("checked"));
}

}  // namespace fastops
