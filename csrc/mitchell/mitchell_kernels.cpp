// SPDX-License-Identifier: BSD-3-Clause
// Kernels, compiled once per CPU level.
#include "core/simd.h"
