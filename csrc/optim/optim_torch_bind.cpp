// SPDX-License-Identifier: BSD-3-Clause
// What an optimizer of torch asks of thousands of parameters in each step, in one walk each.
#include "optim/optim_bind.h"

#include <cstddef>
#include <vector>

namespace py = pybind11;

namespace fastops {
namespace {

// The elements of a tuple, one after the other, whose lines are asked for ahead: torch walks over it by itself.
struct Ahead {
  PyObject_HEAD PyObject *tensors, *owner;
  const std::vector<Home>* homes;
  Py_ssize_t next;
};

PyObject* next_of(PyObject* self) {
  auto* const walk = reinterpret_cast<Ahead*>(self);
  const Py_ssize_t i = walk->next, count = PyTuple_GET_SIZE(walk->tensors), later = i + Py_ssize_t{kAhead};
  if (i >= count) return nullptr;
  // They may have become others meanwhile.
  if (later < count && static_cast<std::size_t>(later) < walk->homes->size())
    (*walk->homes)[static_cast<std::size_t>(later)].fetch(PyTuple_GET_ITEM(walk->tensors, later));
  ++walk->next;
  PyObject* const tensor = PyTuple_GET_ITEM(walk->tensors, i);
  Py_INCREF(tensor);
  return tensor;
}

void free_walk(PyObject* self) {
  auto* const walk = reinterpret_cast<Ahead*>(self);
  PyTypeObject* const type = Py_TYPE(self);
  Py_XDECREF(walk->tensors);
  Py_XDECREF(walk->owner);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyTypeObject* g_walk = nullptr;

PyTypeObject* make_type_of_walks() {
  static PyType_Slot slots[] = {{Py_tp_iter, reinterpret_cast<void*>(&PyObject_SelfIter)},
                                {Py_tp_iternext, reinterpret_cast<void*>(&next_of)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&free_walk)},
                                {0, nullptr}};
  // One that Python makes would walk over nothing.
  static PyType_Spec spec = {"fastops._core.TensorWalk", sizeof(Ahead), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  auto* const type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (type == nullptr) throw py::error_already_set();
  return type;
}

// The gradients of parameters, and where those of the latest call were kept.
class GradientReader {
 public:
  // A list of them, and whether every parameter has one.
  py::tuple read(const py::object& params) {
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    // Reading one may run Python code, in which a list may change.
    const py::tuple kept = py::reinterpret_steal<py::tuple>(PySequence_Tuple(params.ptr()));
    if (!kept || grad == nullptr) throw py::error_already_set();
    const std::size_t count = kept.size();
    if (seen_.size() != count) seen_.assign(count, {});
    py::list found(count);
    bool complete = true;
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* const param = PyTuple_GET_ITEM(kept.ptr(), static_cast<Py_ssize_t>(i));
      if (i + kAhead < count && seen_.size() == count) {
        const Seen& later = seen_[i + kAhead];
        later.param_home.fetch(PyTuple_GET_ITEM(kept.ptr(), static_cast<Py_ssize_t>(i + kAhead)));
        later.grad_home.fetch(later.grad);
      }
      PyObject* const gradient = PyObject_GetAttr(param, grad);
      if (gradient == nullptr) throw py::error_already_set();
      PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(i), gradient);
      complete = complete && gradient != Py_None;
      // To ask for an address may run Python code too, which may read with this reader.
      Seen now = seen_.size() == count ? seen_[i] : Seen{};
      if (now.param != param) now = {param, nullptr, {address_of(param), 0}, {}};
      // Of gradients once they stay: many are made anew in each step.
      if (now.grad != gradient)
        now.grad_home = {};
      else if (now.grad_home.tensor == 0 && gradient != Py_None)
        now.grad_home.tensor = address_of(gradient);
      now.grad = gradient;
      if (seen_.size() == count) seen_[i] = now;
    }
    return py::make_tuple(found, complete);
  }

 private:
  struct Seen {
    PyObject *param = nullptr, *grad = nullptr;  // compared and prefetched, never read
    Home param_home, grad_home;
  };
  std::vector<Seen> seen_;
};

// Whether dicts hold these objects under these names: those of the first dict first.
bool hold(const py::list& dicts, const py::tuple& names, const py::list& entries) {
  const std::size_t count = dicts.size(), width = names.size();
  if (entries.size() != count * width) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(PyList_GET_ITEM(dicts.ptr(), static_cast<Py_ssize_t>(i + kAhead)));
    PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyDict_CheckExact(dict)) return false;
    for (std::size_t k = 0; k < width; ++k) {
      PyObject* const name = PyTuple_GET_ITEM(names.ptr(), static_cast<Py_ssize_t>(k));
      PyObject* const entry = PyDict_GetItemWithError(dict, name);
      if (entry == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (entry != PyList_GET_ITEM(entries.ptr(), static_cast<Py_ssize_t>(i * width + k))) return false;
    }
  }
  return true;
}

}  // namespace

py::object walk(const py::tuple& tensors, const py::object& owner, const std::vector<Home>& homes) {
  auto* const made = PyObject_New(Ahead, g_walk);
  if (made == nullptr) throw py::error_already_set();
  made->tensors = py::object(tensors).release().ptr();
  made->owner = py::object(owner).release().ptr();
  made->homes = &homes;
  made->next = 0;
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(made));
}

void bind_optim_torch(py::module_& m) {
  using py::arg;
  g_walk = make_type_of_walks();
  py::class_<GradientReader>(m, "GradientReader").def(py::init<>()).def("read", &GradientReader::read, arg("params"));
  m.def("hold", &hold, arg("dicts"), arg("names"), arg("entries"));
}

}  // namespace fastops
