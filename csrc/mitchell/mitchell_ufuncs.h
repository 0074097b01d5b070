// SPDX-License-Identifier: BSD-3-Clause
// How the module makes NumPy ufuncs, and reads the description of a multiplier; a failure sets a Python error.
#ifndef FASTOPS_MITCHELL_UFUNCS_H
#define FASTOPS_MITCHELL_UFUNCS_H

#include <Python.h>

#include <cstddef>

#include "fastops/fastops.h"

namespace fastops {

// A new ufunc, or null; spec = (form, flush, corrections, mantissa_bits, segments, c, table). What it stands on is
// never freed: whoever asks keeps the ufunc for the life of the process.
PyObject* make_ufunc(const char* op, const char* name, const char* doc, PyObject* spec);
// From now on ufuncs have a loop for this NumPy scalar type, and those made before get theirs. Returns None, or
// null.
PyObject* register_bfloat16(PyObject* type);
// out = ufunc(a, b) of n elements of a floating-point dtype behind one another, without NumPy's search for a loop and
// its floating-point warnings; false where the ufunc was not made here or has no such loop.
bool apply_ufunc(PyObject* ufunc, fastops_dtype dtype, const void* a, const void* b, void* out, std::size_t n);
// `spec` as plain data; -1 with an error set where it is not one.
int parse_spec(PyObject* spec, fastops_mitchell_params* params);

}  // namespace fastops
#endif
