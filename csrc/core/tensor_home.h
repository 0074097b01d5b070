// SPDX-License-Identifier: BSD-3-Clause
// Where torch keeps a tensor beside its elements, for walks over thousands of them: by the time a step comes round
// again its own arithmetic has pushed these lines out of the caches, and each look would wait for four of them in a
// row.
#ifndef FASTOPS_CORE_TENSOR_HOME_H
#define FASTOPS_CORE_TENSOR_HOME_H

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

namespace fastops {

// How many tensors ahead of the look their lines are asked for.
constexpr std::size_t kAhead = 8;

// Addresses that are prefetched and never read: they may be stale or wrong.
struct Home {
  std::uintptr_t tensor = 0, storage = 0;

  void fetch(PyObject* object) const {
    __builtin_prefetch(object);
    if (tensor == 0) return;
    // At most sizes, strides and the counter of versions that torch makes with them.
    for (std::uintptr_t line = 0; line < 4; ++line) line_at(tensor + 64 * line);
    line_at(storage);
    line_at(storage + 64);
  }

 private:
  static void line_at(std::uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address)); }
};

// What torch names as the address of a tensor or storage; 0 where it names none.
inline std::uintptr_t address_of(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("_cdata");
  PyObject* const number = name == nullptr ? nullptr : PyObject_GetAttr(object, name);
  const std::size_t address = number == nullptr ? 0 : PyLong_AsSize_t(number);
  Py_XDECREF(number);
  if (PyErr_Occurred() == nullptr) return address;
  PyErr_Clear();
  return 0;
}

}  // namespace fastops
#endif
