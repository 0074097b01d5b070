// SPDX-License-Identifier: BSD-3-Clause
// How the module makes NumPy ufuncs, and reads the description of a multiplier; a failure sets a Python error.
#ifndef FASTOPS_MITCHELL_UFUNCS_H
#define FASTOPS_MITCHELL_UFUNCS_H

#include <Python.h>

#include "fastops/fastops.h"

namespace fastops {

// A new ufunc, or null; spec = (form, flush, corrections, mantissa_bits, segments, c, table). What it stands on is
// never freed: whoever asks keeps the ufunc for the life of the process.
PyObject* make_ufunc(const char* op, const char* name, const char* doc, PyObject* spec);
// From now on ufuncs have a loop for this NumPy scalar type, and those made before get theirs. Returns None, or
// null.
PyObject* register_bfloat16(PyObject* type);
// `spec` as plain data; -1 with an error set where it is not one.
int parse_spec(PyObject* spec, fastops_mitchell_params* params);

}  // namespace fastops
#endif
