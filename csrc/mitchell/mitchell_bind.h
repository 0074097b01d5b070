// SPDX-License-Identifier: BSD-3-Clause
// The Mitchell functions of the Python module.
#ifndef FASTOPS_MITCHELL_BIND_H
#define FASTOPS_MITCHELL_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_mitchell(pybind11::module_& module);
}
#endif
