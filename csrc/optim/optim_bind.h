// SPDX-License-Identifier: BSD-3-Clause
// The optimizer steps' functions of the Python module.
#ifndef FASTOPS_OPTIM_OPTIM_BIND_H
#define FASTOPS_OPTIM_OPTIM_BIND_H

#include <pybind11/pybind11.h>

#include <vector>

#include "core/tensor_home.h"

namespace fastops {
void bind_optim(pybind11::module_& m);
void bind_optim_torch(pybind11::module_& m);

// An iterator over tensors that asks for the lines of later ones; `owner` keeps `homes`.
pybind11::object walk(const pybind11::tuple& tensors, const pybind11::object& owner, const std::vector<Home>& homes);
}  // namespace fastops
#endif
