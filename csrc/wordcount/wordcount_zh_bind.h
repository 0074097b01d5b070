// SPDX-License-Identifier: BSD-3-Clause
// The tokenizer "zh" as a class of the Python module.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_ZH_BIND_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_ZH_BIND_H

#include <pybind11/pybind11.h>

namespace fastops {
void bind_wordcount_zh(pybind11::module_& m);
}  // namespace fastops
#endif
