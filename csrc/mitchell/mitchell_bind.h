// SPDX-License-Identifier: BSD-3-Clause
// What module.cpp needs of this family, and what its two Python files share.
#ifndef FASTOPS_MITCHELL_BIND_H
#define FASTOPS_MITCHELL_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_mitchell(pybind11::module_& module);
}
#endif
