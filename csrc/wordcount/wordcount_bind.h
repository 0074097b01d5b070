// SPDX-License-Identifier: BSD-3-Clause
// Word counting's part of the Python module.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_BIND_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_wordcount(pybind11::module_& m);
}
#endif
