// SPDX-License-Identifier: BSD-3-Clause
// The optimizer steps' functions of the Python module.
#ifndef FASTOPS_OPTIM_OPTIM_BIND_H
#define FASTOPS_OPTIM_OPTIM_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_optim(pybind11::module_& m);
}
#endif
