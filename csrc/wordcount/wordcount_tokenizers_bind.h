// SPDX-License-Identifier: BSD-3-Clause
// The tokenizers "unicode" and "zh" as functions of the Python module.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_TOKENIZERS_BIND_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_TOKENIZERS_BIND_H

#include <pybind11/pybind11.h>

#include "wordcount/wordcount_breaks.h"

namespace fastops {
void bind_tokenizers(pybind11::module_& m);

// The table in NumPy arrays from fastops._word_break.table(), which must outlive it; checked.
BreakTable break_table(const pybind11::object& pages, const pybind11::object& classes);
}  // namespace fastops
#endif
