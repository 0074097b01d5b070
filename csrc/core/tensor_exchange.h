// SPDX-License-Identifier: BSD-3-Clause
// Tensors of other libraries through DLPack's C exchange interface: where their memory is, and new ones like them.
#ifndef FASTOPS_CORE_TENSOR_EXCHANGE_H
#define FASTOPS_CORE_TENSOR_EXCHANGE_H

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fastops/fastops.h"

namespace fastops {

// DLPack's C interface, as of version 1.2: what is used of it.

struct DlTensor {
  void* data;
  std::int32_t device_type, device_id, ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DlManaged {
  std::uint32_t major, minor;
  void* context;
  void (*destroy)(DlManaged* self);
  std::uint64_t flags;
  DlTensor tensor;
};
struct DlExchange {
  std::uint32_t major, minor;
  void* previous;
  int (*allocate)(DlTensor* like, DlManaged** made, void* context,
                  void (*set_error)(void* context, const char* kind, const char* text));
  void* export_owner;
  int (*to_object)(DlManaged* given, void** object);  // takes `given` over
  int (*view)(void* object, DlTensor* tensor);
};
constexpr std::int32_t kDlCpu = 1;
constexpr std::uint32_t kDlMajor = 1;
constexpr std::uint8_t kDlFloat = 2, kDlBfloat = 4;

struct Exchange {
  const DlExchange* functions;  // null where the type has none
  bool writable;
};

// The interface does not say whether memory may be written: torch's may, others' arrays may be immutable.
inline bool is_torch(PyTypeObject* type) {
  namespace py = pybind11;
  for (const py::handle base : py::reinterpret_borrow<py::tuple>(type->tp_mro)) {
    const auto module = py::str(py::getattr(base, "__module__", py::str())).cast<std::string>();
    if (module == "torch" || module.rfind("torch.", 0) == 0) return true;
  }
  return false;
}

// The few types met are kept, for good.
inline Exchange exchange_of(PyTypeObject* type) {
  namespace py = pybind11;
  struct Known {
    PyTypeObject* type;
    Exchange exchange;
  };
  static thread_local std::vector<Known> known;
  for (const Known& entry : known)
    if (entry.type == type) return entry.exchange;
  const DlExchange* exchange = nullptr;
  for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), name, py::none());
    if (!PyCapsule_CheckExact(capsule.ptr())) continue;
    exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
    if (exchange == nullptr) throw py::error_already_set();
    if (exchange->major != kDlMajor) exchange = nullptr;
    break;
  }
  const Exchange found{exchange, exchange != nullptr && is_torch(type)};
  constexpr std::size_t kMost = 64;
  if (known.size() < kMost) {
    known.push_back({type, found});
    Py_INCREF(type);
  }
  return found;
}

// Answers whether the tensor's elements are of a floating-point dtype, and which.
inline bool float_dtype(const DlTensor& t, fastops_dtype* dtype) {
  if (t.lanes != 1) return false;
  if (t.code == kDlBfloat && t.bits == 16) *dtype = FASTOPS_BF16;
  if (t.code == kDlFloat && t.bits == 16) *dtype = FASTOPS_F16;
  if (t.code == kDlFloat && t.bits == 32) *dtype = FASTOPS_F32;
  if (t.code == kDlFloat && t.bits == 64) *dtype = FASTOPS_F64;
  return t.code == kDlBfloat ? t.bits == 16 : t.code == kDlFloat && (t.bits == 16 || t.bits == 32 || t.bits == 64);
}

// Only what was loaded at low addresses has memory there: a storage that was resized to nothing leaves an offset in
// place of a pointer.
inline bool is_low(const void* data) {
  constexpr std::uintptr_t kLow = std::uintptr_t{1} << 36;
  return reinterpret_cast<std::uintptr_t>(data) < kLow;
}

// A tensor on the CPU of more than one element, which lie behind one another; false for others. (One element may be
// dense and yet a part of a complex number whose sign torch has put off.)
inline bool dense_view(const DlExchange& functions, PyObject* object, DlTensor* t, fastops_dtype* dtype) {
  if (functions.view(object, t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t->device_type != kDlCpu || !float_dtype(*t, dtype)) return false;
  std::int64_t size = 1;
  for (std::int32_t axis = t->ndim; axis-- > 0;) {
    if (t->strides != nullptr && t->shape[axis] > 1 && t->strides[axis] != size) return false;
    size *= t->shape[axis];
  }
  t->data = static_cast<char*>(t->data) + t->byte_offset;
  return size > 1 && !is_low(t->data);
}

// A new tensor of the library with the dtype and device of `like` and the shape that it names; `data`: its memory.
inline pybind11::object new_tensor(const DlExchange& functions, DlTensor like, void** data) {
  DlManaged* made = nullptr;
  const auto failed = [](void*, const char*, const char* text) { PyErr_SetString(PyExc_RuntimeError, text); };
  if (functions.allocate(&like, &made, nullptr, failed) != 0 || made == nullptr) {
    if (PyErr_Occurred() == nullptr) throw std::bad_alloc();
    throw pybind11::error_already_set();
  }
  *data = static_cast<char*>(made->tensor.data) + made->tensor.byte_offset;
  void* object = nullptr;
  if (functions.to_object(made, &object) != 0) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
}

}  // namespace fastops
#endif
