// SPDX-License-Identifier: BSD-3-Clause
// Attention's functions of the Python module.
#ifndef FASTOPS_ATTENTION_ATTENTION_BIND_H
#define FASTOPS_ATTENTION_ATTENTION_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_attention(pybind11::module_& m);
}
#endif
