// SPDX-License-Identifier: BSD-3-Clause
// NumPy arrays as pointers, shapes and strides, and the checks that protect memory.
#ifndef FASTOPS_CORE_NUMPY_ARRAYS_H
#define FASTOPS_CORE_NUMPY_ARRAYS_H

#include <pybind11/numpy.h>

#include <atomic>
#include <string>
#include <vector>

#include "fastops/fastops.h"

namespace fastops {

namespace py = pybind11;

struct ArrayView {
  char* data;
  fastops_dtype dtype;
  std::vector<py::ssize_t> shape, strides;  // strides in elements, 0 along axes of one element
  std::size_t item_size;

  std::size_t ndim() const { return shape.size(); }
};

[[noreturn]] inline void bad_value(const std::string& text) { throw py::value_error(text); }

inline bool is_bfloat16(const py::dtype& dtype) {
  static std::atomic<int> number{-1};  // the type's number, once it was met; threads ask at once where there is no GIL
  const int num = dtype.num();
  if (num == number.load(std::memory_order_relaxed)) return true;
  constexpr int kFirstUserType = 256;
  if (num < kFirstUserType || dtype.itemsize() != 2) return false;
  if (py::str(static_cast<py::object>(dtype.attr("name"))).cast<std::string>() != "bfloat16") return false;
  number.store(num, std::memory_order_relaxed);
  return true;
}

inline fastops_dtype dtype_of(const py::array& array, const char* name) {
  const py::dtype dtype = array.dtype();
  switch (dtype.num()) {
    case 1:
      return FASTOPS_I8;
    case 2:
      return FASTOPS_U8;
    case 11:
      return FASTOPS_F32;
    case 12:
      return FASTOPS_F64;
    case 23:
      return FASTOPS_F16;
    default:
      break;
  }
  if (is_bfloat16(dtype)) return FASTOPS_BF16;
  if (dtype.kind() == 'i' && dtype.itemsize() == 4) return FASTOPS_I32;
  if (dtype.kind() == 'i' && dtype.itemsize() == 8) return FASTOPS_I64;
  throw py::type_error(std::string(name) + " has dtype " + py::str(static_cast<py::object>(dtype)).cast<std::string>() +
                       ", which no kernel takes");
}

// Only what protects memory is checked: the shapes fit, elements are aligned and native, strides whole elements.
inline ArrayView view(const py::object& object, const char* name, bool writable = false) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error(std::string(name) + " must be a numpy.ndarray, got " + Py_TYPE(object.ptr())->tp_name);
  const py::array array = py::reinterpret_borrow<py::array>(object);
  const auto& api = *py::detail::array_proxy(array.ptr());
  constexpr int kAligned = 0x0100, kWriteable = 0x0400;
  if ((api.flags & kAligned) == 0) bad_value(std::string(name) + " must be aligned");
  if (writable && (api.flags & kWriteable) == 0) bad_value(std::string(name) + " must be writable");
  const char order = array.dtype().byteorder();
  if (order == (PY_BIG_ENDIAN ? '<' : '>')) bad_value(std::string(name) + " must be in native byte order");
  ArrayView v{api.data, dtype_of(array, name), {}, {}, static_cast<std::size_t>(array.itemsize())};
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    const py::ssize_t size = array.shape(i), stride = array.strides(i);
    if (size > 1 && stride % array.itemsize() != 0)
      bad_value(std::string(name) + " must have strides that are multiples of its item size");
    v.shape.push_back(size);
    v.strides.push_back(size > 1 ? stride / array.itemsize() : 0);
  }
  return v;
}

inline void want_dtype(const ArrayView& v, fastops_dtype dtype, const char* name) {
  if (v.dtype != dtype) throw py::type_error(std::string(name) + " must have the dtype of the other arrays");
}
inline void want_float(const ArrayView& v, const char* name) {
  if (v.dtype > FASTOPS_F64) throw py::type_error(std::string(name) + " must be of a floating-point dtype");
}
inline void want_contiguous(const ArrayView& v, const char* name) {
  py::ssize_t expected = 1;
  for (const py::ssize_t n : v.shape)
    if (n == 0) return;
  for (std::size_t i = v.ndim(); i-- > 0;) {
    if (v.shape[i] > 1 && v.strides[i] != expected) bad_value(std::string(name) + " must be C-contiguous");
    expected *= v.shape[i];
  }
}
inline void want_shape(const ArrayView& v, const std::vector<py::ssize_t>& shape, const char* name) {
  if (v.shape != shape) bad_value(std::string(name) + " has a shape that does not fit the others");
}

}  // namespace fastops
#endif
